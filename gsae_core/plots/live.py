"""Figures of a run that still moves, in Altair: charts keep their zoom while data arrive.

A chart is a specification that no data change, and a slim table. Streamlit hands new rows to the
chart that is there; a new specification would be a new chart, zoomed out.
"""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from gsae_core.config import SAESpec
from gsae_core.errors import extra
from gsae_core.plots.palette import AXES, LOOKS, NEUTRAL, Theme, hover_name, shades

if TYPE_CHECKING:
    import pyarrow as pa

with extra("app"):
    import altair as alt

XAxis = Literal["tokens", "step", "seconds"]

PERCENT = ("dead_gate", "dead_magnitude")
TITLES = {
    "loss": "loss (Eq. 8)",
    "reconstruction": "squared error",
    "sparsity_loss": "sparsity penalty",
    "auxiliary": "auxiliary error",
    "kl": "KL divergence",
    "l0": "L0",
    "fvu": "FVU",
    "gamma": "γ of the output",
    "gamma_gate": "γ of the gate path",
    "dead_gate": "dead: gate never opens",
    "dead_magnitude": "dead: gate open, no output",
    "lr": "learning rate",
}
"""Short enough for a third of a narrow window; tooltips have the long ones."""

# A tick sends every chart: eight lines of 150 points are 15 kB. No line has more than its most,
# nor less than its least even where the others need the room.
CHART_POINTS, MOST_POINTS, LEAST_POINTS = 1200, 1000, 60
GAMMAS = ("gamma", "gamma_gate")
# Tops of the axis of gamma: its first steps may reach 4, and all that matters later lies near 1.
CEILINGS = (1.5, 3.0, 10.0)
TRAIL = 40  # logged points of an SAE's path that the plane shows
RUN_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#00795a", "#a8588a", "#8a6200"),
    "dark": ("#56B4E9", "#f08a3c", "#2bbf95", "#d993ba", "#e6b53c"),
}
"""Of runs laid over each other and of places, the first that of the page's run."""

# What Altair puts into a specification that is not of the chart: pages bring data and theme.
OUTSIDE = ("$schema", "config", "data")

Track = dict[str, np.ndarray]
"""What was logged of a line: a float64 array for each number, oldest first."""


class Line(NamedTuple):
    """One SAE of one run, and how all charts draw it."""

    run: str
    sae: str
    label: str
    colour: str
    dash: tuple[int, ...]
    shape: str  # Vega's name of its marker
    group: str = ""
    """What its hue tells where lines differ in it: the run, the place, or both."""


class LiveChart(NamedTuple):
    """A Vega-Lite chart: its specification without data, and the data."""

    spec: dict[str, Any]
    columns: Mapping[str, np.ndarray]

    @property
    def data(self) -> pd.DataFrame:
        """The data as a table: made on request, since a table for every tick takes time."""
        return pd.DataFrame(dict(self.columns))

    def arrow(self) -> "pa.Table":
        """Return the data for Streamlit, in single precision: seven digits draw a line."""
        import pyarrow as pa

        return pa.table(
            {
                name: column.astype("float32") if column.dtype == "float64" else column
                for name, column in self.columns.items()
            }
        )


def spec_of(layers: Sequence[alt.Chart], **properties: Any) -> dict[str, Any]:
    """Return the specification of layers, checked, without data and Altair's own theme."""
    spec = alt.layer(*layers, data=alt.NamedData(name="rows")).properties(**properties).to_dict()
    return {name: value for name, value in spec.items() if name not in OUTSIDE}


def tooltips(form: str, **titles: str) -> list[alt.Tooltip]:
    """Return a line of a tooltip for each column of numbers, all in one format."""
    return [alt.Tooltip(f"{name}:Q", title=title, format=form) for name, title in titles.items()]


def lines_of(
    runs: Mapping[str, Sequence[SAESpec]],
    theme: Theme,
    place_of: Callable[[str, SAESpec], str] = lambda _run, _spec: "",
) -> tuple[Line, ...]:
    """Return the SAEs of runs as lines: dash and marker by architecture.

    Hue tells runs and places apart; of one, hue tells the architecture and its strength the
    sparsity. The first run comes last, so that it is drawn over the others. `place_of` names the
    place that a run's SAE reads, "" where the run has but one.
    """
    groups: dict[tuple[str, str], list[SAESpec]] = {}
    for run, saes in runs.items():
        for spec in saes:
            groups.setdefault((run, place_of(run, spec)), []).append(spec)
    hues, lines = RUN_COLOURS[theme], []
    for number, ((run, place), saes) in reversed(list(enumerate(groups.items()))):
        own_hues = shades(saes, theme)
        told = [part for part in (place, run if len(runs) > 1 else "") if part]
        for spec in saes:
            look = LOOKS[spec.architecture]
            label = " · ".join([hover_name(spec), *told])
            colour = hues[number % len(hues)] if len(groups) > 1 else own_hues[spec.name]
            group = " · ".join(told) or run
            lines.append(Line(run, spec.name, label, colour, look.dash, look.shape, group))
    return tuple(lines)


def tracks(frames: Mapping[str, pd.DataFrame], lines: Sequence[Line]) -> list[Track]:
    """Return what was logged of each line, empty where nothing was yet.

    `frames` holds the metric lines of each run, in the order in which they were written.
    """
    parts: dict[tuple[str, str], Track] = {}
    for run, frame in frames.items():
        if frame.empty:
            continue
        # Arrays once, instead of a table for each line and chart: those took 60 ms a tick, not 4.
        numbers = frame.select_dtypes("number")
        values = numbers.to_numpy("float64")
        for sae, places in frame.groupby("sae", observed=True).indices.items():
            columns = np.ascontiguousarray(values[places].T)
            parts[run, str(sae)] = dict(zip(map(str, numbers), columns, strict=True))
    return [parts.get((line.run, line.sae), {}) for line in lines]


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` places that keep the look of a line.

    They are the first and the last, and the lowest and the highest of each stretch between.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    inner, n_stretches = values[1:-1], (limit - 2) // 2
    width = -(-len(inner) // n_stretches)
    # One call for all stretches: of nine charts a second, eight lines each, loops took half a core.
    filled = np.pad(inner, (0, -len(inner) % width), mode="edge").reshape(-1, width)
    starts = 1 + width * np.arange(len(filled))
    extremes = starts + filled.argmin(axis=1), starts + filled.argmax(axis=1)
    return np.unique(np.concatenate([[0, len(values) - 1], *extremes]))


def line_chart(
    lines: Sequence[Line],
    logged: Sequence[Track],
    column: str,
    *,
    x: XAxis,
    smoothing: float = 0.0,
    log: bool = False,
) -> LiveChart:
    """Return one key of `metrics.jsonl` against training, a line per SAE.

    `logged` is what `tracks` returns for the lines. Smoothing leaves the raw line faint. A gamma
    has a thin rule at 1.
    """
    limit = min(max(CHART_POINTS // max(len(lines), 1), LEAST_POINTS), MOST_POINTS)
    parts: list[dict[str, np.ndarray]] = []
    for index, part in enumerate(logged):
        if column not in part or x not in part:
            continue
        shown = part[column] > 0 if log else np.isfinite(part[column])
        raw = part[column][shown]
        places = thin(raw, limit)
        data = {
            "x": part[x][shown][places],
            "line": np.full(len(places), index, dtype="int16"),
            "raw": raw[places].astype("float32"),
        }
        if smoothing > 0:
            # An exponential moving average: causal, and unbiased early on.
            means = pd.Series(raw).ewm(alpha=1 - smoothing, adjust=True).mean().to_numpy()
            data["value"] = means[places].astype("float32")
        parts.append(data)
    top = ceiling([part["raw"] for part in parts]) if column in GAMMAS else None
    return LiveChart(_line_spec(tuple(lines), column, x, smoothing > 0, log, top), _joined(parts))


def ceiling(series: Sequence[np.ndarray]) -> float | None:
    """Return the lowest of `CEILINGS` above the later half of every line; None if none is.

    A new ceiling is a new specification, which ends a zoom: hence few of them, far apart.
    """
    late = [float(values[len(values) // 2 :].max()) for values in series if len(values)]
    return next((top for top in CEILINGS if max(late, default=0.0) < 0.95 * top), None)


def plane(
    lines: Sequence[Line],
    logged: Sequence[Track],
    *,
    finished: Sequence[str] = (),
    unit: str = "token",
) -> LiveChart:
    """Return where each SAE stands, L0 against FVU, and its path there; down and left is better.

    Markers of runs that are finished are solid, those of others hollow. `unit`: what L0 is over.
    """
    parts: list[dict[str, np.ndarray]] = []
    for index, (line, part) in enumerate(zip(lines, logged, strict=True)):
        if not {"step", "l0", "fvu"} <= set(part):
            continue
        path = np.flatnonzero((part["l0"] > 0) & (part["fvu"] > 0))[-TRAIL:]
        now = np.zeros(len(path), dtype="int16")
        # 2 is a solid marker, 1 a hollow one, 0 a point of the path.
        now[-1:] = 2 if line.run in finished else 1
        data = {name: part[name][path] for name in ("step", "l0", "fvu")}
        parts.append(data | {"line": np.full(len(path), index, dtype="int16"), "now": now})
    return LiveChart(_plane_spec(tuple(lines), unit), _joined(parts))


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return columns set end to end; none where there are no parts."""
    names = parts[0] if parts else ()
    return {name: np.concatenate([part[name] for part in parts]) for name in names}


@functools.lru_cache(maxsize=256)
def _line_spec(
    lines: tuple[Line, ...], column: str, x: XAxis, smooth: bool, log: bool, top: float | None
) -> dict[str, Any]:
    scale = alt.Scale(type="log", nice=False) if log else alt.Scale(zero=False)
    if top is not None:
        scale = alt.Scale(domain=[0, top], nice=False)
    # On an even axis "~g" writes the 10 after 8 as 1e+1.
    form = "~%" if column in PERCENT else "~g" if log else "~r"
    ticks: dict[str, Any] = {"values": log_ticks("y")} if log else {"tickCount": 5}

    def drawn(field: str, **mark: Any) -> alt.Chart:
        chart = alt.Chart().mark_line(clip=True, **mark)
        return chart.encode(
            alt.X("x:Q", title=AXES[x], scale=alt.Scale(nice=False)).axis(
                format="~s", tickCount=5, grid=False
            ),
            alt.Y(field, type="quantitative", title=None, scale=scale).axis(format=form, **ticks),
            alt.Color("line:N", scale=series_scale(lines, "colour"), legend=None),
            alt.StrokeDash("line:N", scale=series_scale(lines, "dash"), legend=None),
            tooltip=[
                alt.Tooltip("SAE:N"),
                *tooltips(",.6~g", x=AXES[x]),
                *tooltips(".4~g", raw=AXES[column]),
            ],
        )

    zoom = alt.selection_interval(name="zoom", bind="scales", encodings=["x"])
    layers = [drawn("value" if smooth else "raw", strokeWidth=2).add_params(zoom)]
    if smooth:
        layers.insert(0, drawn("raw", strokeWidth=1, opacity=0.25))
    if column in GAMMAS:
        rule = alt.Chart().mark_rule(strokeDash=[2, 2], opacity=0.6, color=NEUTRAL)
        layers.insert(0, rule.encode(y=alt.datum(1.0)))
    if column in PERCENT:
        # Where nothing is dead the axis would have no length: it reaches a percent at least.
        unseen = alt.Chart().mark_rule(opacity=0)
        layers += [unseen.encode(y=alt.datum(end)) for end in (0, 0.01)]
    return _layered(lines, TITLES[column], layers)


@functools.lru_cache(maxsize=64)
def _plane_spec(lines: tuple[Line, ...], unit: str) -> dict[str, Any]:
    scale = alt.Scale(type="log", nice=False, padding=14)
    colour: dict[str, Any] = {"scale": series_scale(lines, "colour"), "legend": None}
    here = alt.Chart().encode(
        # Short enough for a third of a narrow page; the figure's own title says L0.
        alt.X("l0:Q", title=f"active features per {unit}", scale=scale).axis(
            values=log_ticks("x"), format="~g"
        ),
        alt.Y("fvu:Q", title=None, scale=scale).axis(values=log_ticks("y"), format="~g"),
        alt.Color("line:N", **colour),
    )
    trail = here.mark_line(opacity=0.35, strokeWidth=1.5, clip=True).encode(order="step:Q")
    marker = (
        here.transform_filter("datum.now > 0")
        .mark_point(size=90, strokeWidth=2, opacity=1, clip=True)
        .encode(
            alt.Shape("line:N", scale=series_scale(lines, "shape"), legend=None),
            alt.Fill("line:N", **colour),
            fillOpacity=alt.condition("datum.now > 1", alt.value(1), alt.value(0)),
            tooltip=[alt.Tooltip("SAE:N"), *tooltips(".1f", l0="L0"), *tooltips(".3f", fvu="FVU")],
        )
    )
    zoom = alt.selection_interval(name="zoom", bind="scales")
    # Vega begins this title left of the axis, where nothing is drawn: its first letter was cut off.
    return _layered(lines, "FVU against L0", [trail.add_params(zoom), marker], dx=10)


def _layered(
    lines: Sequence[Line], title: str, layers: Sequence[alt.Chart], **title_fields: Any
) -> dict[str, Any]:
    """Return the specification of layers, with what every live chart has."""
    names = json.dumps([line.label for line in lines])
    return spec_of(
        layers,
        title=alt.Title(title, anchor="start", fontSize=13, fontWeight="normal", **title_fields),
        height=240,
        padding={"left": 0, "right": 4, "top": 0, "bottom": 0},
        transform=[alt.CalculateTransform(calculate=f"{names}[datum.line]", **{"as": "SAE"})],
    )


def series_scale(lines: Sequence[Line], trait: str) -> alt.Scale:
    """Return the scale from a line's number to its colour, dash or shape."""
    values = [list(v) if isinstance(v := getattr(line, trait), tuple) else v for line in lines]
    return alt.Scale(domain=list(range(len(lines))), range=values)


def log_ticks(scale: str) -> alt.ExprRef:
    """Return round ticks of a log axis of Vega, chosen in the browser from what the axis shows.

    Vega's own are a grid line for every digit; ours chosen here would follow the data, and a
    specification that changes throws the zoom away. Those off the axis are left out by Vega.
    """
    coarse, fine = (
        [float(f"{digit}e{decade}") for decade in range(-7, 8) for digit in digits]
        for digits in ((1, 2, 5), (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8))
    )
    wide = f"domain('{scale}')[1] > 20 * domain('{scale}')[0]"
    return alt.ExprRef(f"{wide} ? {json.dumps(coarse)} : {json.dumps(fine)}")
