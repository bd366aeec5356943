"""Parts of the Pareto page: cards of one SAE and of a difference, settings side by side."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.analysis.results import MAX_COLUMNS, NUMBERS, changes, settings, settings_table
from gsae_core.app import shell
from gsae_core.app.glossary import definition
from gsae_core.app.parts import marked, plain, say_worse
from gsae_core.plots.palette import LOOKS, knob
from gsae_core.runs.evals import measure_again, measured_earlier, measured_on, positions
from gsae_core.runs.run import Run
from gsae_core.text import WORSE, count, facts, fixed, marked_fvu, percent, signed_percent

TITLES = {
    "l0": "L0",
    "loss_recovered": "loss recovered",
    "delta_ce": "ΔCE (nats)",
    "kl": "KL (nats)",
    "fvu": "FVU",
    "gamma": "γ",
    "gamma_gate": "γ gate path",
    "cosine": "cosine",
    "alive_fraction": "alive",
}
"""Heading of each of `NUMBERS`."""

# On a card beside another there is room for one word.
SHORT = TITLES | {"loss_recovered": "recovered"}

DIGITS = {"l0": 1, "delta_ce": 4, "kl": 4}
SHARES = {"loss_recovered": 2, "alive_fraction": 1}
"""Numbers written in percent, and their decimals."""


def say(number: str, value: float) -> str:
    """Return one of `NUMBERS` as text."""
    if number in SHARES:
        return percent(value, SHARES[number])
    if number == "fvu":
        return marked_fvu(value)
    return fixed(value, DIGITS.get(number, 3))


def say_change(number: str, before: float, after: float) -> str:
    """Return the change of a number, absolute and in percent, e.g. `-60.0 (-50.0 %)`."""
    difference = after - before
    if difference != difference:
        return "–"
    if number in SHARES:
        return f"{100 * difference:+.{SHARES[number]}f} points"
    return f"{difference:+,.{DIGITS.get(number, 3)}f} ({signed_percent(before, after)})"


def table_columns(*, topk: bool) -> dict[str, Any]:
    """Return heading, format and definition of each column of a table of SAEs.

    `topk` says whether TopK SAEs are among them, whose sparsity is a number of features.
    """
    configs = {"run": "run", "name": "SAE", "architecture": "architecture", "d_sae": "features"}
    number = st.column_config.NumberColumn
    mark = "FVU above 1: the SAE reconstructs worse than the mean activation."
    return (
        configs
        | {"worse": st.column_config.TextColumn(WORSE, width=36, help=mark)}
        | {"sparsity": number("λ (TopK: k)" if topk else "λ", help=definition("sparsity"))}
        | {
            name: number(
                title,
                format=f"%.{SHARES[name]}f %%" if name in SHARES else f"%.{DIGITS.get(name, 3)}f",
                help=definition(name),
            )
            for name, title in TITLES.items()
        }
        | {
            f"change_{name}": number(
                f"Δ {TITLES[name]}",
                format="%+.2f" if name in ("l0", "loss_recovered") else "%+.4f",
                help=f"Minus the baseline run's. {definition(name)}",
            )
            for name in NUMBERS[:6]
        }
    )


def _cells() -> Iterator[tuple[str, DeltaGenerator]]:
    """Yield each number with its place, three to a row."""
    for start in range(0, len(NUMBERS), 3):
        yield from zip(NUMBERS[start : start + 3], st.columns(3), strict=True)


def card(row: Mapping[str, Any], run: Run, *, number: int) -> None:
    """Draw a row of `several_runs`, its provenance, and the ways to the SAE's other pages.

    `number` is the card's, which its ring in the plot bears.
    """
    config, kind = run.config, row["architecture"]
    made = f"{LOOKS[kind].label}, {knob(kind, row['sparsity'])}, {row['d_sae']:,} features"
    with st.container(border=True, key=f"pareto.card_{number}"):
        marked(kind, f"{number} · {made}")
        plain(f"{run.id} / {row['name']}", size=".85rem")
        for name, cell in _cells():
            cell.metric(SHORT[name], say(name, row[name]), help=definition(name))
        say_worse({str(row["name"]): row["fvu"]})
        if measured_earlier(row):
            plain(f"{measure_again(str(run.folder))}.", size=".875rem")
        spec = next((spec for spec in config.saes if spec.name == row["name"]), None)
        learnt = {"imported from": config.imported or ""}
        if config.imported is None:
            rate = (spec and spec.lr) or config.train.lr
            learnt = {"trained on": f"{count(config.train.n_tokens)} tokens"}
            learnt["learning rate"] = f"{rate:g}"
        with st.expander("Provenance"):
            provenance = {
                "model": config.model.name,
                "hook point": config.model.hook_name,
                "text": config.data.source,
                **learnt,
                "recipe": "–" if spec is None else f"{spec.recipe}, tie {spec.tie}",
                "measured on": measured_on(row),
                "losses with": positions(row),
            }
            st.html(facts(provenance))
        with st.container(horizontal=True, gap="small"):
            if st.button("Live", icon=":material/monitoring:", key=f"pareto.live_{number}"):
                shell.go("pages/2_Live.py", run)
            if st.button("Shrinkage", icon=":material/straighten:", key=f"pareto.shrink_{number}"):
                st.session_state["shrinkage.open_sae"] = str(row["name"])
                shell.go("pages/4_Shrinkage.py", run)


def difference_card(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Draw what changes from one SAE to another, absolute and in percent."""
    with st.container(border=True, key="pareto.difference"):
        plain(f"Change from 1, {before['id']}, to 2, {after['id']}")
        found = changes(before, after)
        for name, cell in _cells():
            cell.metric(
                TITLES[name],
                say(name, found[name][1]),
                delta=say_change(name, *found[name]),
                delta_color="off",
                delta_arrow="off",  # the sign says it, and a change of 0 has no direction
                help=definition(name),
            )


def comparer(table: pd.DataFrame, runs: Mapping[str, Run], picked: Sequence[str]) -> None:
    """Draw the settings of up to ten SAEs of `several_runs` side by side.

    `picked` are the ids to begin with; all where there are fewer than two.
    """
    st.subheader("Settings side by side", anchor=False)
    options = list(table["id"])
    left, right = st.columns([5, 2], vertical_alignment="bottom")
    chosen = left.multiselect(
        "Columns",
        options,
        key="cols",
        bind="query-params",
        max_selections=MAX_COLUMNS,
        placeholder="the SAEs picked above, or all",
        help=f"Up to {MAX_COLUMNS} SAEs. Empty: the two picked in the plot, or else all shown.",
    )
    only = right.toggle("Differences only", value=True, key="diff", bind="query-params")
    names = chosen or (list(picked) if len(picked) > 1 else options)
    by_id = table.set_index("id")
    columns = {}
    for name in names[:MAX_COLUMNS]:
        config = runs[str(by_id.loc[name, "run"])].config
        spec = next((s for s in config.saes if s.name == by_id.loc[name, "name"]), None)
        if spec is not None:
            columns[name] = settings(config, spec)
    if len(names) > MAX_COLUMNS:
        st.caption(f"The first {MAX_COLUMNS} of {len(names)}; choose columns to see others.")
    found = settings_table(columns, differences=only)
    if found.empty:
        st.caption("These SAEs have the same settings; switch off “Differences only” to see them.")
    else:
        st.dataframe(found, alt="Settings of each SAE, a row per setting")
