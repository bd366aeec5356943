"""Pareto: active features and fidelity of each SAE."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from gsae_core.analysis.pareto import matched_ratio
from gsae_core.analysis.results import (
    MAX_COLUMNS,
    NUMBERS,
    PaperSite,
    against,
    changes,
    hook_points,
    model_site_text,
    published,
    settings,
    settings_table,
    several_runs,
    unit_measured,
)
from gsae_core.app import cache, shell
from gsae_core.app.glossary import definition
from gsae_core.app.parts import (
    correct,
    escape_markdown,
    figure_tools,
    marked,
    notice,
    plain,
    say_worse,
)
from gsae_core.app.pickers import choice, paper_site
from gsae_core.config import NO_MODEL
from gsae_core.plots.palette import AXES, LOOKS, knob
from gsae_core.plots.pareto import RUN_LOOKS, Measure, placed, tradeoff
from gsae_core.runs.evals import (
    NO_LOSSES,
    averaged,
    measure_again,
    measured_earlier,
    measured_elsewhere,
    measured_on,
    positions,
    without_model,
)
from gsae_core.runs.outliers import outliers_measured
from gsae_core.runs.run import Run
from gsae_core.text import (
    WORDS,
    WORSE,
    count,
    facts,
    fixed,
    in_units,
    is_worse_than_mean,
    marked_fvu,
    percent,
    signed_percent,
)

# Labels first: the address holds what a bound widget shows.
LABELS: dict[str, Measure] = {
    "loss recovered": "loss_recovered",
    "CE increase": "delta_ce",
    "FVU": "fvu",
    "KL": "kl",
    "L0": "l0",
}
MAX_OTHERS = len(RUN_LOOKS) - 2  # beside the run of the sidebar and a baseline
# Heading of each of `NUMBERS`.
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
# On a card beside another there is room for one word.
SHORT = TITLES | {"loss_recovered": "recovered"}
DIGITS = {"l0": 1, "delta_ce": 4, "kl": 4}
# Numbers written in percent, and their decimals.
SHARES = {"loss_recovered": 2, "alive_fraction": 1}
LOSSES = ("loss_recovered", "delta_ce", "kl")

frame = shell.page(
    "Pareto",
    icon="⚖️",
    purpose="Fidelity against sparsity, for every SAE.",
)
run = shell.need_run(frame, "its trade-off curves")
shell.need_evals(run)
by_id = {other.id: other for other in frame.runs if (other.folder / "evals.json").exists()}
by_id |= {run.id: run}
others = [name for name in by_id if name != run.id]


def about(term: str) -> str:
    return in_units(definition(term), run.config.unit)


def choose_axes() -> tuple[Measure, Measure, bool]:
    """Draw the choice of axes; return x, y and whether x is logarithmic."""
    correct("xm", list(LABELS), what="measure", shown="L0")
    up, along, log = st.columns([6, 3, 2], vertical_alignment="bottom")
    fidelity = [label for label in LABELS if label != "L0"]
    if run.config.activations is not None:  # there are no losses
        fidelity.remove("FVU")
        fidelity.insert(0, "FVU")
    with up:
        y = choice("Fidelity", fidelity, key="ym", what="measure", help=about("loss_recovered"))
    x = along.selectbox(
        "Against",
        ["L0", "FVU", "CE increase", "KL", "loss recovered"],
        key="xm",
        bind="query-params",
        help=about("l0"),
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


def at_hook_points(evals: pd.DataFrame) -> pd.DataFrame:
    """Draw the choice of hook points where a run has several; return the SAEs at those chosen."""
    if len(set(evals["group"])) == len(set(evals["run"])):
        return evals
    hooks = pd.Series(hook_points(evals), index=evals.index)
    known = list(dict.fromkeys(hooks))
    correct("places", known, what="hook point shown here", shown="the others")
    chosen = st.multiselect(
        "Hook points",
        known,
        key="places",
        bind="query-params",
        placeholder="all",
        help="SAEs share a frontier with those of their own hook point; fill, size and dash tell "
        "them apart.",
    )
    # Never without a point of the run that the page is about.
    kept = pd.DataFrame(evals[hooks.isin(chosen or known)])
    return kept if run.id in set(kept["run"]) else evals


def headline(evals: pd.DataFrame) -> None:
    """Draw the matched-fidelity ratio of each run and place, and where it comes from."""
    ratios = {
        str(group): matched_ratio(rows.to_dict("records")).sentence
        for group, rows in evals.groupby("group")
    }
    differ = len(set(ratios.values())) > 1 or bool(matched.pairs)
    with st.container(border=True):
        number, words = st.columns([1, 3], vertical_alignment="center")
        number.metric(
            "Matched L0 ratio",
            f"{fixed(matched.median, 2)}×" if matched.pairs else "–",
            help=about("matched_ratio"),
        )
        with words:
            several = len(groups) > len(shown_runs) and differ
            plain(f"{groups[0]}: {matched.sentence}." if several else f"{matched.sentence}.")
            if matched.pairs:
                said = "Above 1, the Gated SAEs need fewer active features"
                st.caption(f"{said} for the same loss recovered.")
        for other in groups[1:] if differ else ():
            plain(f"{other}: {ratios[other]}.", size=".9rem")
        if matched.pairs:
            with st.expander("Interpolation"):
                interpolation()


def how_measured(evals: pd.DataFrame) -> None:
    """Say which runs' losses are not comparable with the others', and how to measure again."""
    rows = {row["run"]: row for row in evals.to_dict("records")}
    for name, row in rows.items():
        elsewhere = measured_elsewhere([row], str(by_id[str(name)].folder))
        if name != run.id and elsewhere:
            notice(f"{name}: {elsewhere}", kind="warning")
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
    unit = unit_measured(evals)
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
        alt=f"{in_units(AXES[y], unit)} against {in_units(AXES[x], unit)} for every SAE, with each "
        "architecture's frontier",
    )
    figure_tools(
        evals.loc[:, ["run", "name", "architecture", "sparsity", *dict.fromkeys([x, y])]],
        name="plane",
        about=f"{about(y)}\n\nFrontier: {about('frontier')}",
    )
    if len(groups) > len(RUN_LOOKS):
        said = f"The first {len(RUN_LOOKS)} of {len(groups)} runs and hook points are drawn"
        st.caption(f"{said}; choose fewer to see the others.")
    texts = {row["run"]: row["text"] for row in evals.to_dict("records")}
    sources = {name: model_site_text(by_id[name].config, texts.get(name)) for name in shown_runs}
    if len(set(sources.values())) > 1:
        listed = "; ".join(f"{name}: {source}" for name, source in sources.items())
        plain(f"Different model, site or text: not comparable ({listed}).", size=".875rem")
    if x == y:
        st.caption(f"Both axes show {in_units(AXES[x], unit)}: the SAEs lie on the diagonal.")
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
        | {"sparsity": number("λ (TopK: k)" if topk else "λ", help=about("sparsity"))}
        | {
            name: number(
                title,
                format=f"%.{SHARES[name]}f %%" if name in SHARES else f"%.{DIGITS.get(name, 3)}f",
                help=about(name),
            )
            for name, title in TITLES.items()
        }
        | {
            f"change_{name}": number(
                f"Δ {TITLES[name]}",
                format="%+.2f" if name in ("l0", "loss_recovered") else "%+.4f",
                help=f"Minus the baseline run's. {about(name)}",
            )
            for name in NUMBERS[:6]
        }
    )


def table(evals: pd.DataFrame, base: str | None) -> None:
    """Draw every number of every SAE, and its change against the baseline run."""
    st.subheader("All SAEs", anchor=False)
    shown = evals.loc[:, ["run", "name", "architecture", "sparsity", "d_sae", *numbers]]
    if len(groups) > len(shown_runs):
        shown.insert(2, "hook point", hook_points(evals))
    shares = {name: 100 * evals[name] for name in SHARES if name in numbers}
    shown = shown.assign(**shares)
    named = evals["name" if len(set(evals["run"])) == 1 else "id"]
    say_worse(dict(zip(named, evals["fvu"], strict=True)))
    rows = evals.to_dict("records")
    for name in dict.fromkeys(str(row["run"]) for row in rows):
        of = f"{name}: " if len(set(evals["run"])) > 1 else ""
        for sentence in outliers_measured([row for row in rows if row["run"] == name]):
            notice(f"{of}{sentence}.", kind="warning")
    worse = [WORSE * is_worse_than_mean(float(fvu)) for fvu in evals["fvu"]]
    if any(worse):
        shown.insert(list(shown).index("d_sae") + 1, "worse", worse)
    if base:
        changed = against(evals, base)[
            [f"change_{name}" for name in NUMBERS[:6] if name in numbers]
        ]
        shown = shown.join(changed)
        if "change_loss_recovered" in shown:
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
    if without_model(first.to_dict()):
        said = f"{measured_on(first.to_dict())}; {NO_LOSSES}"
        st.caption(f"{escape_markdown(run.id)}: {escape_markdown(said)}.")
        return
    # Each hook point is zeroed by itself.
    own = pd.DataFrame(evals[evals["run"] == run.id]).drop_duplicates("group")
    zeros = [fixed(loss, 4) for loss in own["ce_zero"]]
    if len(own) > 1:
        zeros = [f"{loss} at {hook}" for loss, hook in zip(zeros, hook_points(own), strict=True)]
    st.caption(
        f"{escape_markdown(run.id)}: {escape_markdown(measured_on(first.to_dict()))}. Cross-"
        f"entropy of the language model: {fixed(first['ce_clean'], 4)} nats per token unchanged, "
        f"with zero ablation {escape_markdown(', '.join(zeros))} ({averaged(first.to_dict())}; "
        f"{positions(first.to_dict())})."
    )


def number_cells() -> Iterator[tuple[str, DeltaGenerator]]:
    """Yield each number that is measured here with its place, three to a row."""
    for start in range(0, len(numbers), 3):
        yield from zip(numbers[start : start + 3], st.columns(3), strict=False)


def hook_of(run: Run, name: str) -> str:
    """Return the hook point that an SAE reads."""
    one = len(run.config.places) == 1
    return run.config.hook_names if one else run.config.place_of(name).hook_name


def card(row: Mapping[str, Any], run: Run, *, number: int) -> None:
    """Draw a row of `several_runs`, its provenance, and the ways to the SAE's other pages.

    `number` is the card's, which its ring in the plot bears.
    """
    config, kind = run.config, row["architecture"]
    made = f"{LOOKS[kind].label}, {knob(kind, row['sparsity'])}, {row['d_sae']:,} features"
    with st.container(border=True, key=f"pareto.card_{number}"):
        marked(kind, f"{number} · {made}")
        plain(f"{run.id} / {row['name']}", size=".85rem")
        for name, cell in number_cells():
            cell.metric(SHORT[name], say(name, row[name]), help=about(name))
        say_worse({str(row["name"]): row["fvu"]})
        if measured_earlier(row):
            plain(f"{measure_again(str(run.folder))}.", size=".875rem")
        spec = next((spec for spec in config.saes if spec.name == row["name"]), None)
        learnt = {"imported from": config.imported or ""}
        if config.imported is None:
            rate = (spec and spec.lr) or config.train.lr
            learnt = {"trained on": f"{count(config.train.n_tokens)} {config.unit}s"}
            learnt["learning rate"] = f"{rate:g}"
        with st.expander("Provenance"):
            place = {"model": config.model.name, "hook point": hook_of(run, row["name"])}
            provenance = {
                **({} if config.model.name == NO_MODEL else place),
                WORDS[config.unit].read: config.activations or config.data.source,
                **learnt,
                "recipe": "–" if spec is None else f"{spec.recipe}, tie {spec.tie}",
                "measured on": measured_on(row),
                "losses with": NO_LOSSES if without_model(row) else positions(row),
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
        for name, cell in number_cells():
            cell.metric(
                TITLES[name],
                say(name, found[name][1]),
                delta=say_change(name, *found[name]),
                delta_color="off",
                delta_arrow="off",  # the sign says it, and a change of 0 has no direction
                help=about(name),
            )


def cards(evals: pd.DataFrame, picked: list[str]) -> None:
    """Draw the cards of the SAEs picked, and what changes between two."""
    rows = {str(row["id"]): row for row in evals.to_dict("records")}
    for number, (cell, name) in enumerate(zip(st.columns(2), picked, strict=False), start=1):
        with cell:
            card(rows[name], by_id[str(rows[name]["run"])], number=number)
    if len(picked) == 2:
        difference_card(rows[picked[0]], rows[picked[1]])


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


place_of_ratio = st.container()
x, y, log_x = choose_axes()
more, base, place = choose_company()
shown_runs: list[str] = [run.id, *more]
if base and base not in shown_runs:
    shown_runs.append(base)
evals = at_hook_points(several_runs({name: cache.evaluations(by_id[name]) for name in shown_runs}))
groups = list(dict.fromkeys(evals["group"]))  # the first is of the sidebar's run
# Of vectors alone there are no losses, and no empty columns for them.
is_of_text = unit_measured(evals) == "token"
numbers = [name for name in NUMBERS if is_of_text or name not in LOSSES]
matched = matched_ratio(evals.query("group == @groups[0]").to_dict("records"))
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
