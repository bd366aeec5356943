"""Pareto: active features and fidelity to the language model of each SAE."""

import pandas as pd
import streamlit as st

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.analysis.results import (
    NUMBERS,
    PaperSite,
    against,
    model_site_text,
    published,
    several_runs,
)
from gsae_core.app import cache, shell
from gsae_core.app.glossary import definition
from gsae_core.app.pareto_view import card, comparer, difference_card, table_columns
from gsae_core.app.parts import correct, escape_markdown, figure_tools, notice, plain, say_worse
from gsae_core.app.pickers import choice, paper_site
from gsae_core.plots.palette import AXES
from gsae_core.plots.pareto import RUN_LOOKS, Measure, placed, tradeoff
from gsae_core.runs.evals import averaged, measure_again, measured_earlier, measured_on, positions
from gsae_core.text import WORSE, fixed, is_worse_than_mean, percent

# Labels first: the address holds what a bound widget shows.
LABELS: dict[str, Measure] = {
    "loss recovered": "loss_recovered",
    "CE increase": "delta_ce",
    "FVU": "fvu",
    "KL": "kl",
    "L0": "l0",
}
MAX_OTHERS = len(RUN_LOOKS) - 2  # beside the run of the sidebar and a baseline

frame = shell.page(
    "Pareto",
    icon="⚖️",
    purpose="Fidelity to the language model against active features per token, for every SAE.",
)
run = shell.need_run(frame, "its trade-off curves")
shell.need_evals(run)
by_id = {other.id: other for other in frame.runs if (other.folder / "evals.json").exists()}
by_id |= {run.id: run}
others = [name for name in by_id if name != run.id]


def choose_axes() -> tuple[Measure, Measure, bool]:
    """Draw the choice of axes; return x, y and whether x is logarithmic."""
    correct("xm", list(LABELS), what="measure", shown="L0")
    up, along, log = st.columns([6, 3, 2], vertical_alignment="bottom")
    fidelity = [label for label in LABELS if label != "L0"]
    with up:
        about = definition("loss_recovered")
        y = choice("Fidelity", fidelity, key="ym", what="measure", help=about)
    x = along.selectbox(
        "Against",
        ["L0", "FVU", "CE increase", "KL", "loss recovered"],
        key="xm",
        bind="query-params",
        help=definition("l0"),
    )
    log_x = log.toggle("Log axis", value=True, key="logx", bind="query-params")
    return LABELS[x or "L0"], LABELS[y], log_x


def choose_company() -> tuple[list[str], str | None, PaperSite | None]:
    """Draw the choice of further runs, of a baseline run and of the paper's; return all three."""
    correct("runs", others, what="other run with results on this machine", shown="the others")
    correct("base", list(by_id), what="run with results on this machine", shown="no baseline")
    first, second, third = st.columns(3)
    more = first.multiselect(
        "Also show runs",
        others,
        key="runs",
        bind="query-params",
        max_selections=MAX_OTHERS,
        placeholder="none" if others else "no other run has results yet",
        disabled=not others,
        help="Colour and shape show the architecture; fill, size and dash show the run.",
    )
    base = second.selectbox(
        "Baseline run",
        list(by_id),
        index=None,
        key="base",
        bind="query-params",
        placeholder="none",
        help="Adds columns of differences: each SAE minus the baseline run's SAE of the same "
        "architecture and λ.",
    )
    with third:
        return more, base, paper_site()


def headline(evals: pd.DataFrame) -> None:
    """Draw the matched-fidelity ratio of each run and where it comes from."""
    with st.container(border=True):
        number, words = st.columns([1, 3], vertical_alignment="center")
        number.metric(
            "Matched L0 ratio",
            f"{fixed(matched.median, 2)}×" if matched.pairs else "–",
            help=definition("matched_ratio"),
        )
        with words:
            plain(f"{matched.sentence}.")
            st.caption(
                "Above 1, the Gated SAEs need fewer active features for the same loss recovered."
            )
        runs = list(dict.fromkeys(evals["run"]))
        for other in runs[1:]:
            rows = evals.query("run == @other").to_dict("records")
            plain(f"{other}: {matched_ratio(rows).sentence}.", size=".9rem")
        if matched.pairs:
            with st.expander("Interpolation"):
                interpolation()


def how_measured(evals: pd.DataFrame) -> None:
    """Say which runs' losses are not comparable with the others', and how to measure again."""
    rows = {row["run"]: row for row in evals.to_dict("records")}
    for name, row in rows.items():
        if measured_earlier(row):
            again = measure_again(str(by_id[str(name)].folder))
            notice(again, title=f"{name} was measured under an earlier definition", kind="warning")
    replaced = {str(name): str(row["replaced"]) for name, row in rows.items()}
    if len(set(replaced.values())) > 1:
        listed = "; ".join(f"{name}: {where}" for name, where in replaced.items())
        notice(
            "Losses with reconstructions at counted tokens alone do not compare with those at all "
            f"positions ({listed}). Measure again: python -m gsae_core evaluate RUN --replace "
            "counted",
            title="These runs replaced different positions",
            kind="warning",
        )


def interpolation() -> None:
    """Draw the levels the ratio is the median over."""
    st.dataframe(
        [
            {
                "loss recovered": percent(pair.loss_recovered, 2),
                "L0 gated": fixed(pair.l0_gated, 1),
                "L0 baseline": fixed(pair.l0_baseline, 1),
                "ratio": fixed(pair.ratio, 2),
            }
            for pair in matched.pairs
        ],
        hide_index=True,
        alt="Levels of loss recovered, L0 of both frontiers there, and their ratio",
    )
    st.caption(
        "One row per frontier SAE whose loss recovered the other frontier reaches; log L0 is "
        "interpolated linearly in loss recovered between neighbouring SAEs. Dotted in the plot."
    )


def remember_click() -> None:
    """Keep the last two points clicked."""
    points = st.session_state["pareto.plane"]["selection"]["points"]
    names = [point["customdata"][0] for point in points if point.get("customdata")]
    kept = [name for name in st.session_state.get("pick", []) if name not in names]
    st.session_state["pick"] = [*kept, *names][-2:]


def plot(evals: pd.DataFrame, picked: list[str], x: Measure, y: Measure) -> None:
    """Draw the plane, what is not in it, and the paper's runs behind it."""
    figure = tradeoff(
        evals,
        y,
        x=x,
        log_x=log_x,
        matched=matched,
        picked=picked,
        paper=None if place is None else published(place),
    )
    st.plotly_chart(
        figure,
        key="pareto.plane",
        on_select=remember_click,
        selection_mode="points",
        config={"displaylogo": False},
        alt=f"{AXES[y]} against {AXES[x]} for every SAE, with each architecture's frontier",
    )
    figure_tools(
        evals.loc[:, ["run", "name", "architecture", "sparsity", *dict.fromkeys([x, y])]],
        name="plane",
        about=f"{definition(y)}\n\nFrontier: {definition('frontier')}",
    )
    sources = {name: model_site_text(by_id[name].config) for name in shown_runs}
    if len(set(sources.values())) > 1:
        listed = "; ".join(f"{name}: {source}" for name, source in sources.items())
        plain(f"Different model, site or text: not comparable ({listed}).", size=".875rem")
    if x == y:
        st.caption(f"Both axes show {AXES[x]}: the SAEs lie on the diagonal.")
    missing = len(evals) - len(placed(evals, x, y, log_x=log_x))
    if missing:
        st.caption(
            f"{missing} of {len(evals)} SAEs are not shown: not measured, or not above "
            "0 on the logarithmic axis."
        )
    if place is not None and (x, y) != ("l0", "loss_recovered"):
        st.caption("The paper published L0 and loss recovered; choose these axes to see its runs.")
    elif place is not None:
        runs = published(place)
        ratio = matched_ratio(runs.to_dict("records")).sentence
        st.caption(
            f"Faint: {len(runs)} runs of {place.model}, {place.site} of block "
            f"{place.layer}, as printed in {place.source}; "
            f"{ratio}. Another language model: compare the distance "
            "between the two curves, not their height."
        )


def table(evals: pd.DataFrame, base: str | None) -> None:
    """Draw every number of every SAE, and its change against the baseline run."""
    st.subheader("All SAEs", anchor=False)
    shown = evals.loc[:, ["run", "name", "architecture", "sparsity", "d_sae", *NUMBERS]]
    shares = {name: 100 * evals[name] for name in ("loss_recovered", "alive_fraction")}
    shown = shown.assign(**shares)
    named = evals["name" if len(set(evals["run"])) == 1 else "id"]
    say_worse(dict(zip(named, evals["fvu"], strict=True)))
    worse = [WORSE * is_worse_than_mean(float(fvu)) for fvu in evals["fvu"]]
    if any(worse):
        shown.insert(5, "worse", worse)
    if base:
        shown = shown.join(against(evals, base)[[f"change_{name}" for name in NUMBERS[:6]]])
        shown = shown.assign(change_loss_recovered=100 * shown["change_loss_recovered"])
        # Each change beside its number: at the far right they are out of sight.
        pairs = [column for name in NUMBERS for column in (name, f"change_{name}")]
        own = [name for name in shown if name not in pairs]
        shown = shown[[*own, *(column for column in pairs if column in shown)]]
    st.dataframe(
        shown.drop(columns="run") if shown["run"].nunique() == 1 else shown,
        hide_index=True,
        column_config=table_columns(topk="topk" in set(evals["architecture"])),
        placeholder="–",
        alt="Every SAE with its held-out numbers",
    )
    figure_tools(evals, name="evaluations")
    first = evals.iloc[0]
    st.caption(
        f"{escape_markdown(run.id)}: {escape_markdown(measured_on(first.to_dict()))}. Cross-"
        f"entropy of the language model: {fixed(first['ce_clean'], 4)} nats per token unchanged, "
        f"{fixed(first['ce_zero'], 4)} with zero ablation ({averaged(first.to_dict())}; "
        f"{positions(first.to_dict())})."
    )


def cards(evals: pd.DataFrame, picked: list[str]) -> None:
    """Draw the cards of the SAEs picked, and what changes between two."""
    rows = {str(row["id"]): row for row in evals.to_dict("records")}
    for number, (cell, name) in enumerate(zip(st.columns(2), picked, strict=False), start=1):
        with cell:
            card(rows[name], by_id[str(rows[name]["run"])], number=number)
    if len(picked) == 2:
        difference_card(rows[picked[0]], rows[picked[1]])


place_of_ratio = st.container()
x, y, log_x = choose_axes()
more, base, place = choose_company()
shown_runs: list[str] = [run.id, *more]
if base and base not in shown_runs:
    shown_runs.append(base)
evals = several_runs({name: cache.evaluations(by_id[name]) for name in shown_runs})
matched = matched_ratio(evals.query("run == @run.id").to_dict("records"))
with place_of_ratio:
    headline(evals)
    how_measured(evals)
names = list(evals["id"])
correct("pick", names, what="SAE shown here", shown="those that are")
place_of_plot = st.container()
picked = st.multiselect(
    "Compare",
    names,
    key="pick",
    max_selections=2,
    bind="query-params",
    placeholder="click points, or choose up to two SAEs",
)
with place_of_plot:
    plot(evals, picked, x, y)
cards(evals, picked)
table(evals, base)
correct("cols", names, what="SAE shown here", shown="those that are")
comparer(evals, by_id, picked)
