"""Pareto: what each SAE costs in active features and what it keeps of the language model."""

import streamlit as st

from gsae_core import shell
from gsae_core.analysis.pareto import matched_ratio
from gsae_core.glossary import definition
from gsae_core.pieces import marked, plain
from gsae_core.plots.curves import Measure, evaluation_frame, tradeoff
from gsae_core.plots.palette import AXES, LOOKS
from gsae_core.wording import fixed, percent, signed_percent

COLUMNS = {
    "name": "SAE",
    "architecture": "architecture",
    "sparsity": "λ",
    "d_sae": "features",
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
DIGITS = {"l0": 1, "delta_ce": 4, "kl": 4, "fvu": 3, "gamma": 3, "gamma_gate": 3, "cosine": 3}
# Labels first: the address holds what a bound widget shows.
LABELS: dict[str, Measure] = {
    "loss recovered": "loss_recovered",
    "CE increase": "delta_ce",
    "FVU": "fvu",
    "KL": "kl",
}
CARD = ("l0", "loss_recovered", "delta_ce", "kl", "fvu", "gamma")

frame = shell.page(
    "Pareto",
    icon="⚖️",
    purpose="How much of the language model survives, for how many active features per token.",
)
run = shell.need_run(frame, "its trade-off curves")
evals = evaluation_frame(shell.need_evals(run))
matched = matched_ratio(evals.to_dict("records"))


def say(column: str, value: float) -> str:
    """Return a number of the table as text."""
    if column in ("loss_recovered", "alive_fraction"):
        return percent(value, 2 if column == "loss_recovered" else 1)
    return fixed(value, DIGITS.get(column, 3))


def headline() -> None:
    """Draw the matched-fidelity ratio and where it comes from."""
    with st.container(border=True):
        number, words = st.columns([1, 3], vertical_alignment="center")
        number.metric(
            "L0 baseline / L0 gated",
            f"{fixed(matched.median, 2)}×" if matched.pairs else "–",
            help=definition("matched_ratio"),
        )
        with words:
            plain(matched.sentence[0].upper() + matched.sentence[1:] + ".")
            st.caption(
                "Above 1, the Gated SAEs need fewer active features for the same loss recovered."
            )
        if matched.pairs:
            with st.expander("The interpolation"):
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
                    "Log L0 is taken linear in loss recovered between SAEs next to each other."
                )


def remember_click() -> None:
    """Keep the last two points clicked."""
    points = st.session_state["plane"]["selection"]["points"]
    names = [point["customdata"][0] for point in points if point.get("customdata")]
    kept = [name for name in st.session_state.get("pick", []) if name not in names]
    st.session_state["pick"] = [*kept, *names][-2:]


def card(name: str) -> None:
    """Draw one SAE's numbers."""
    row = evals[evals["name"] == name].iloc[0]
    with st.container(border=True):
        look = LOOKS[row["architecture"]]
        marked(
            row["architecture"], f"{look.label}, λ {row['sparsity']:g}, {row['d_sae']:,} features"
        )
        for cells in (CARD[:3], CARD[3:]):
            for cell, column in zip(st.columns(3), cells, strict=True):
                cell.metric(COLUMNS[column], say(column, row[column]), help=definition(column))


def difference(first: str, second: str) -> None:
    """Draw what changes from one SAE to another."""
    rows = evals.set_index("name")
    with st.container(border=True):
        plain(f"From {first} to {second}")
        for cells in (CARD[:3], CARD[3:]):
            for cell, column in zip(st.columns(3), cells, strict=True):
                before, after = float(rows.loc[first, column]), float(rows.loc[second, column])
                cell.metric(
                    COLUMNS[column],
                    say(column, after),
                    delta=signed_percent(before, after),
                    delta_color="off",
                )


headline()
label = st.segmented_control(
    "Fidelity",
    list(LABELS),
    default="loss recovered",
    required=True,
    key="ym",
    bind="query-params",
    help=definition("loss_recovered"),
)
measure = LABELS[label]
figure = tradeoff(evals, measure, matched=matched if measure == "loss_recovered" else None)
st.plotly_chart(
    figure,
    key="plane",
    on_select=remember_click,
    selection_mode="points",
    config={"displaylogo": False},
    alt=f"{AXES[measure]} against L0 for every SAE of the run, with both frontiers",
)
picked = st.multiselect(
    "Compare",
    list(evals["name"]),
    key="pick",
    max_selections=2,
    bind="query-params",
    placeholder="click points, or choose up to two SAEs",
)
if picked:
    for cell, name in zip(st.columns(2), picked, strict=False):
        with cell:
            card(name)
if len(picked) == 2:
    difference(*picked)

st.subheader("All SAEs", anchor=False)
table = evals.loc[:, [column for column in COLUMNS if column in evals]].rename(columns=COLUMNS)
table = table.assign(**{name: 100 * table[name] for name in ("loss recovered", "alive")})
formats = {"loss recovered": "%.2f %%", "alive": "%.1f %%", "L0": "%.1f"}
formats |= dict.fromkeys(("ΔCE (nats)", "KL (nats)"), "%.4f")
formats |= dict.fromkeys(("FVU", "γ", "γ gate path", "cosine"), "%.3f")
st.dataframe(
    table,
    hide_index=True,
    column_config={
        COLUMNS[column]: st.column_config.NumberColumn(
            format=formats.get(COLUMNS[column]), help=definition(column)
        )
        for column in evals
        if column in COLUMNS and column not in ("name", "architecture", "d_sae")
    },
    placeholder="–",
    alt="Every SAE of the run with its held-out numbers",
)
tokens = max(evals["n_tokens"])
left, right = st.columns([3, 1], vertical_alignment="center")
left.caption(
    f"Measured on {tokens:,} held-out tokens. The language model alone loses "
    f"{fixed(evals['ce_clean'].iloc[0], 4)} nats per token, and with the site set to zero "
    f"{fixed(evals['ce_zero'].iloc[0], 4)}."
)
right.download_button(
    "Download CSV",
    evals.to_csv(index=False),
    file_name=f"{run.id}-evals.csv",
    mime="text/csv",
    icon=":material/download:",
    on_click="ignore",
    key="csv",
)
