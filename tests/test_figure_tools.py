"""The button under every figure: its data as a table and as a file, and a link to the page."""

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from gsae_core.app import parts


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


def test_the_file_is_what_the_figure_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    monkeypatch.setattr(parts.st, "download_button", lambda _, data, **kw: made.append((data, kw)))
    monkeypatch.setattr(parts.st, "popover", Open)
    monkeypatch.setattr(parts, "own", lambda name: name)
    parts.figure_tools(pd.DataFrame({"l0": [12.0], "fvu": [0.25]}), name="plane")
    ((data, settings),) = made
    assert data() == "l0,fvu\n12.0,0.25\n"
    assert settings["file_name"] == "plane.csv"


class Open:
    """A popover that somebody has opened."""

    open = True

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...
