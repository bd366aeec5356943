"""Widgets that several pages draw: pickers of SAEs, a text, choices and numbers of the address."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.analysis.results import PaperSite, nearest_pair, paper_sites
from gsae_core.app import cache, shell
from gsae_core.app.parts import (
    asked,
    correct,
    key_for,
    notice,
    say_stranger,
    say_worse,
    settle,
    write,
)
from gsae_core.app.shell import Frame
from gsae_core.config import Architecture
from gsae_core.runs.run import Run

ADDRESS_TEXT = 500
"""Characters of a text that an address carries; a longer one stays in the session."""

CODE = 'import json\n\ndef read_config(path):\n    with open(path, encoding="utf-8") as file:'
PROSE = "When Mary and John went to the shop, John gave a bottle of milk to"

C = TypeVar("C", bound=str)


def need_saes(frame: Frame, what: str) -> tuple[Run, list[str]]:
    """Return the chosen run and its SAEs that can be looked through; without any, end the page."""
    run = shell.need_run(frame, what)
    names = [spec.name for spec in run.config.saes]
    names = [n for n in names if (run.folder / cache.WEIGHTS.format(sae=n)).is_file()]
    if names:
        return run, names
    shell.need_evals(run)
    text = f"expected the weights of {run.id}'s SAEs in {run.folder / 'saes'}, found none; copy "
    text += "them back, or train the run again"
    notice(text, title="This run has no SAE weights")
    return st.stop()


def need_model(run: Run) -> None:
    """End the page of a run that has no language model."""
    if run.config.activations is None:
        return
    text = "It was trained on vectors from a folder: no text can be read or written with it. "
    text += "Its features are on the Features page."
    notice(text, kind="info", title="This run has no language model")
    st.stop()


def beside(run: Run, name: str, names: Sequence[str]) -> str | None:
    """Return what to compare an SAE with: a Gated one with a baseline, nearest in L0.

    Without one, any other SAE; None if it is alone.
    """
    others = [n for n in alongside(run, name, names) if n != name]
    gated = architecture(run, name) == "gated"
    unlike = [n for n in others if (architecture(run, n) == "gated") != gated]
    near = _nearest(run, [name, *unlike]).values()
    return next((n for n in (*near, *unlike, *others) if n != name), None)


def alongside(run: Run, name: str, names: Sequence[str]) -> list[str]:
    """Return those of a run's SAEs that read what one of them does, itself among them."""
    place = run.config.place_of(name)
    return [each for each in names if run.config.place_of(each) == place]


@cache.kept("evals.json")
def _nearest(run: Run, names: Sequence[str]) -> Mapping[str, str]:
    """Return `nearest_pair` of those SAEs of a run; empty where it was not evaluated."""
    evals: Any = cache.evaluations(run)
    return nearest_pair(evals[evals["name"].isin(names)]) if len(evals) else {}


def stacking(key: str, *, least: int = 22, last_stays: bool = False) -> DeltaGenerator:
    """Return a container whose columns stack where one would be narrower than `least` rem.

    Streamlit's own stack below 640 px, where tables and texts beside each other are long cut off.
    The last column can stay in sight while the others are scrolled.
    """
    name = key.replace(".", "-")  # as Streamlit writes a key into a class
    row = f".st-key-{name}>[data-testid=stLayoutWrapper]>[data-testid=stHorizontalBlock]"
    column = f"{row}>[data-testid=stColumn]"
    stays = f"{column}:last-child{{position:sticky;top:4rem;align-self:flex-start}}"
    st.html(
        f"<style>{row}{{flex-wrap:wrap}}{column}{{min-width:min({least}rem,100%)}}"
        f"{stays if last_stays else ''}</style>"
    )
    return st.container(key=key)


def architecture(run: Run, name: str) -> Architecture:
    """Return what kind of SAE a name stands for."""
    return next(spec.architecture for spec in run.config.saes if spec.name == name)


def _pick(label: str, offered: Sequence[str], *, key: str, param: str, default: str) -> str:
    """Draw a picker of SAEs; return the choice.

    It is not bound to the address as other widgets are: Streamlit would then refuse to leave for a
    page that is given the same parameter.
    """
    settle(param, offered, key=key, default=default, what="SAE of this run")
    return st.selectbox(label, offered, key=key, persist_state="session")


def pick_pair(run: Run, names: Sequence[str], *, page: str) -> tuple[str, str | None]:
    """Draw a page's pickers of an SAE and of one beside it; return both, which the address follows.

    At first the Gated SAE whose L0 a baseline comes nearest to is chosen.
    """
    left, right = st.columns(2)
    evals = cache.evaluations(run)
    pair = _nearest(run, alongside(run, names[0], names))
    first = pair.get("gated") or pair.get("base") or names[0]
    with left:
        name = _pick("SAE", names, key=key_for(f"{page}.sae", run.id), param="sae", default=first)
    offered = [*(each for each in alongside(run, name, names) if each != name), "none"]
    second = beside(run, name, names) or "none"
    with right:
        key = key_for(f"{page}.base", run.id)
        base = _pick("Compare with", offered, key=key, param="base", default=second)
    write({"sae": name, "base": base})
    fvus = dict(zip(evals["name"], evals["fvu"], strict=True)) if len(evals) else {}
    say_worse({one: fvus[one] for one in (name, base) if one in fvus})
    return name, None if base == "none" else base


def text_field(
    label: str, *, page: str, model: str, changed: Callable[[], None] | None = None
) -> str:
    """Draw the field for a text, which the address and the other page share; return the text.

    `changed` is called when another text was typed, before the page is drawn with it.
    """
    key = f"{page}.text"
    wanted = asked("text")
    if wanted or key not in st.session_state:
        example = CODE if model == "bundled" else PROSE
        st.session_state[key] = wanted or st.session_state.get("shell.text") or example
    text = st.text_area(label, key=key, height=120, on_change=changed) or ""
    st.session_state["shell.text"] = text
    write({"text": text if text.strip() and len(text) <= ADDRESS_TEXT else None})
    return text


def choice(
    label: str, options: Iterable[C], *, key: str, what: str, shown: str | None = None, **looks: Any
) -> C:
    """Draw a choice that the address holds; return it. The first is the usual one.

    If the address asks for something else, a sentence says that it is no `what` and that `shown` is
    shown.
    """
    listed = list(options)
    correct(key, listed, what=what, shown=shown or listed[0])
    return st.segmented_control(
        label, listed, default=listed[0], required=True, key=key, bind="query-params", **looks
    )


def paper_site() -> PaperSite | None:
    """Draw the choice of one of the paper's sites, which Pareto and Shrinkage share; return it."""
    places = {place.label: place for place in paper_sites()}
    correct("paper", places, what="site in the paper's tables", shown="none")
    label = st.selectbox(
        "Published results",
        list(places),
        index=None,
        key="paper",
        bind="query-params",
        placeholder="none",
        help="Runs of the paper's tables at one hook point (model, site, block), drawn faintly.",
    )
    return None if label is None else places[label]


def ticked_row(event: Any, n_rows: int) -> int | None:
    """Return which row of a table a browser says is ticked; None if that is none there is."""
    rows = event["selection"]["rows"] if event else []
    return int(rows[0]) if rows and 0 <= rows[0] < n_rows else None


def correct_number(
    key: str, low: float | int, high: float | int, *, what: str, shown: str, whole: bool = True
) -> bool:
    """Say that the number an address gives is none, or is out of range; binding drops it silently.

    Return whether it gives one that is right. Call it before the widget bound to `key` is drawn.
    """
    asked = st.query_params.get(key)
    if asked is None:
        return False
    pattern = r"-?\d{1,15}" if whole else r"-?\d{1,15}(\.\d{1,15})?([eE][+-]?\d{1,2})?"
    if re.fullmatch(pattern, asked.strip()) and low <= float(asked) <= high:
        return True
    say_stranger(asked, what=f"{what} from {low:g} to {high:g}", shown=shown)
    return False
