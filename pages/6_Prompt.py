"""Prompt: one text through an SAE, token by token, and through a second one."""

import pandas as pd
import streamlit as st

from gsae_core.app import prompt_view, shell
from gsae_core.app.components import read_number, token_picker
from gsae_core.app.parts import figure_tools, key_for, noticed, own, plain, settle, write
from gsae_core.app.pickers import (
    architecture,
    choice,
    correct_number,
    need_model,
    need_saes,
    pick_pair,
    stacking,
    text_field,
)
from gsae_core.app.prompt_view import (
    MEASURES,
    SORTS,
    Seen,
    attributed,
    cells,
    feature_rows,
    next_tokens,
    read,
)
from gsae_core.runs.run import Run
from gsae_core.text import quoted

frame = shell.page(
    "Prompt",
    icon="💬",
    purpose="Which features fire on each token of your text, how strongly, and their effect on "
    "the next token.",
)


@noticed()
def choose() -> tuple[Run, tuple[str, ...], str]:
    """Draw the pickers and the text; return the run, its SAEs and the text."""
    run, names = need_saes(frame, "the features of any text")
    need_model(run)
    name, other = pick_pair(run, names, page="prompt")

    def changed() -> None:
        # It is looked at from its last token on: the number in `tok` was of the text before.
        st.session_state["prompt.new_text"] = True

    text = text_field("Text", page="prompt", model=run.config.model.name, changed=changed)
    return run, (name,) if other is None else (name, other), text


@noticed()
def first_answer(run: Run, names: tuple[str, ...], text: str) -> Seen:
    """Read the text, and say what was read."""
    with st.spinner("Reading the text", show_time=True):
        seen = read(run, names, text)
    prompt_view.say_reading(seen)
    prompt_view.numbers(seen)
    return seen


def of(seen: Seen) -> tuple[object, ...]:
    """Return what the keys of widgets are about whose choices are of one text."""
    return seen.run.id, seen.names, seen.text


def which_token(seen: Seen) -> int:
    """Draw the number of the token that is looked at; a click in the strip changes it."""
    last = len(seen.looks[0].prompt.tokens) - 1
    correct_number("tok", 0, last, what="token", shown=f"token {last}")
    is_new = st.session_state.pop("prompt.new_text", False)
    if is_new or not 0 <= (st.session_state.get("tok") or 0) <= last:
        st.session_state["tok"] = last
    return int(
        st.number_input("Token", 0, last, value=last, key="tok", bind="query-params", step=1)
    )


@noticed()
def whole_text(seen: Seen) -> None:
    """Draw the strip, and what of a token is looked at."""
    strip = st.container()
    with stacking("prompt.controls", least=9):
        one, two, three = st.columns([1, 1.7, 2.6], vertical_alignment="bottom")
    with one:
        position = which_token(seen)
    offered = next_tokens(seen, position)
    with two:
        target = st.selectbox(
            "Next token",
            range(len(offered)),
            format_func=lambda i: prompt_view.label_of(offered[i]),
            key=key_for("prompt.target", *of(seen), position),
            help="Attribution is to the logit of this token after the chosen position.",
        )
    with three:
        measure = choice("Shade tokens by", MEASURES, key="by", what="measure of the strip")
    tables = attributed(seen, position=position, token=offered[target].id)
    with strip:
        tokens = cells(seen, tables, measure)
        token_picker(
            key=own("tokens"),
            read=lambda sent: read_number(sent, range(len(tokens))),
            pick=lambda index: st.session_state.update(tok=index),
            tokens=tokens,
            picked=position,
            two=len(seen.names) > 1,
        )
        prompt_view.legend(seen, measure)
        figure_tools(
            seen.looks[0].tokens.drop(columns="counted"),
            name="tokens_of_text",
            about=MEASURES[measure][1],
        )
    one_token(seen, tables[0], position, prompt_view.label_of(offered[target]))


def one_token(seen: Seen, table: pd.DataFrame, position: int, target: str) -> None:
    """Draw the features of the token, and the same of both SAEs."""
    token = quoted(seen.looks[0].prompt.tokens[position])
    with stacking("prompt.token"):
        left, right = st.columns(2, gap="medium")
    with left:
        st.subheader("Features of the token", anchor=False)
        plain(f"token {position}, ‘{token}’", size=".9rem")
        settle("sort", SORTS, key="prompt.sort", default="activation", what="order")
        sort = st.segmented_control(
            "Sort by",
            list(SORTS),
            default="activation",
            required=True,
            key="prompt.sort",
            persist_state="session",
        )
        write({"sort": sort if sort != "activation" else None})
        features(seen, table, position, sort, target)
    with right:
        st.subheader("Compare with", anchor=False)
        if seen.alignment is None:
            st.caption("Choose a second SAE above to see which features both share.")
        else:
            plain(f"token {position}, ‘{token}’", size=".9rem")
            prompt_view.alignment_view(seen, position=position)


def features(seen: Seen, table: pd.DataFrame, position: int, sort: str, target: str) -> None:
    """Draw the table of features, and where to go with one of them."""
    rows = feature_rows(table, position=position, sort=sort)
    if rows.empty:
        st.caption("No feature fires on this token; special tokens are not read by the SAE.")
        return
    gated = architecture(seen.run, seen.names[0]) == "gated"
    ticked = prompt_view.features_table(
        rows, gated=gated, target=target, key=key_for("prompt.features", *of(seen), position, sort)
    )
    latent = int(rows["latent"].iloc[0]) if ticked is None else ticked
    how = "ticked" if ticked is not None else "the first; tick another"
    st.caption(f"Feature {latent} ({how}) on every token:")
    prompt_view.on_every_token(seen, latent, at=position)
    with st.container(horizontal=True):
        if st.button("Open in Features", icon=":material/search:", key="prompt.to_features"):
            shell.go("pages/5_Features.py", seen.run, sae=seen.names[0], feature=str(latent))
        if st.button("Steer this feature", icon=":material/alt_route:", key="prompt.to_steer"):
            shell.go("pages/7_Steer.py", seen.run, sae=seen.names[0], f=str(latent))


seen = first_answer(*choose())
whole_text(seen)
