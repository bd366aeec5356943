"""The button under every figure: its data as a table, and a link to the page."""

from streamlit.testing.v1 import AppTest


def page() -> None:
    import pandas as pd
    import streamlit as st

    from gsae_core.app.parts import figure_tools

    st.session_state["shell.page"] = "Pareto"
    figure_tools(pd.DataFrame({"l0": [12.0, 6.0], "fvu": [0.2, 0.4]}), name="plane")


def test_a_closed_button_makes_no_table() -> None:
    at = AppTest.from_function(page).run()
    assert not at.exception
    assert len(at.dataframe) == 0


def test_an_open_one_shows_the_data_and_the_link_with_every_choice() -> None:
    at = AppTest.from_function(page)
    at.query_params["run"] = "a b"
    at.query_params["smooth"] = "0.5"
    at.session_state["pareto.tools_plane"] = True
    at.run()
    assert not at.exception
    assert at.dataframe[0].value.to_dict("list") == {"l0": [12.0, 6.0], "fvu": [0.2, 0.4]}
    assert at.code[0].value.endswith("?run=a+b&smooth=0.5")
