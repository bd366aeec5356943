"""Figures of a run that still moves, in Vega-Lite: charts keep their zoom while data arrive.

A chart is a specification that no data change, and a slim table. Streamlit hands new rows to the
chart that is there; a new specification would be a new chart, zoomed out.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from gsae_core.config import SAESpec
from gsae_core.plots.palette import AXES, LOOKS, Theme, hover_name, log_ticks, shades

if TYPE_CHECKING:
    import altair
    import pyarrow as pa

XAxis = Literal["tokens", "step", "seconds"]

PERCENT = ("dead_gate", "dead_magnitude")
TITLES = {
    "loss": "loss (Eq. 8)",
    "reconstruction": "squared error",
    "sparsity_loss": "sparsity penalty",
    "auxiliary": "auxiliary error",
    "l0": "L0",
    "fvu": "FVU",
    "gamma": "γ of the output",
    "gamma_gate": "γ of the gate path",
    "dead_gate": "dead: gate never opens",
    "dead_magnitude": "dead: gate opens, silent",
    "lr": "learning rate",
}
"""Short enough for a third of a narrow window; tooltips have the long ones."""


class Line(NamedTuple):
    """One SAE of one run, and how all charts draw it."""

    run: str
    sae: str
    label: str
    colour: str
    dash: tuple[int, ...]
    shape: str
    """Vega's name of its marker."""


def shared(lines: Sequence[Line], title: str) -> dict[str, Any]:
    """Return what every live chart's specification begins with."""
    names = json.dumps([line.label for line in lines])
    return {
        "title": {"text": title, "anchor": "start", "fontSize": 13, "fontWeight": "normal"},
        "height": 240,
        "padding": {"left": 0, "right": 4, "top": 0, "bottom": 0},
        "transform": [{"calculate": f"{names}[datum.line]", "as": "SAE"}],
    }


def series_scale(lines: Sequence[Line], trait: str) -> dict[str, Any]:
    """Return the scale from a line's number to its colour, dash or shape."""
    values = [list(v) if isinstance(v := getattr(line, trait), tuple) else v for line in lines]
    return {"domain": list(range(len(lines))), "range": values}


@functools.lru_cache(maxsize=256)
def line_spec(
    lines: tuple[Line, ...],
    column: str,
    x: XAxis,
    smooth: bool,
    log: bool,
    rule: float | None,
    top: float | None,
) -> dict[str, Any]:
    form = "~%" if column in PERCENT else "~g"
    scale: dict[str, Any] = {"type": "log", "nice": False} if log else {"zero": False}
    if top is not None:
        scale = {"domain": [0, top], "nice": False}
    axis = {"format": form, **({"values": log_ticks("y")} if log else {"tickCount": 5})}
    encoding = {
        "x": {
            "field": "x",
            "type": "quantitative",
            "title": AXES[x],
            "axis": {"format": "~s", "tickCount": 5, "grid": False},
            "scale": {"nice": False},
        },
        "color": {"field": "line", "type": "nominal", "scale": series_scale(lines, "colour")},
        "strokeDash": {"field": "line", "type": "nominal", "scale": series_scale(lines, "dash")},
        "tooltip": [
            {"field": "SAE", "type": "nominal"},
            {"field": "x", "type": "quantitative", "title": AXES[x], "format": ",.6~g"},
            {"field": "raw", "type": "quantitative", "title": AXES[column], "format": ".4~g"},
        ],
    }
    for channel in ("color", "strokeDash"):
        encoding[channel]["legend"] = None  # one legend serves all charts of a page

    def y(field: str) -> dict[str, Any]:
        return {"field": field, "type": "quantitative", "title": None, "scale": scale, "axis": axis}

    zoom = {
        "name": "zoom",
        "select": {"type": "interval", "encodings": ["x"]},
        "bind": "scales",
    }
    mark = {"type": "line", "strokeWidth": 2, "clip": True}
    main = {"mark": mark, "params": [zoom], "encoding": {**encoding, "y": y("raw")}}
    layers = [main]
    if smooth:
        main["encoding"]["y"] = y("value")
        faint = {**mark, "strokeWidth": 1, "opacity": 0.25}
        layers.insert(0, {"mark": faint, "encoding": {**encoding, "y": y("raw")}})
    if rule is not None:
        ruler = {"type": "rule", "strokeDash": [2, 2], "opacity": 0.6, "color": "#7d8894"}
        layers.insert(0, {"mark": ruler, "encoding": {"y": {"datum": rule}}})
    if column in PERCENT:
        # Where nothing is dead the axis would have no length: it reaches a percent at least.
        unseen = {"type": "rule", "opacity": 0}
        layers += [{"mark": unseen, "encoding": {"y": {"datum": end}}} for end in (0, 0.01)]
    return {**shared(lines, TITLES[column]), "layer": layers}


# A tick sends every chart: eight lines of 150 points are 15 kB. No line has more than its most,
# nor less than its least even where the others need the room.
CHART_POINTS, MOST_POINTS, LEAST_POINTS = 1200, 1000, 60
GAMMAS = ("gamma", "gamma_gate")
# Tops of the axis of gamma: its first steps may reach 4, and all that matters later lies near 1.
CEILINGS = (1.5, 3.0, 10.0)
RUN_COLOURS = {
    "light": ("#0072B2", "#D55E00", "#00795a", "#a8588a", "#8a6200"),
    "dark": ("#56B4E9", "#f08a3c", "#2bbf95", "#d993ba", "#e6b53c"),
}
"""Of runs laid over each other, the first that of the page's run."""


Track = dict[str, np.ndarray]
"""What was logged of a line: a float64 array for each number, oldest first."""


class LiveChart(NamedTuple):
    """A Vega-Lite chart: its specification without data, and the data."""

    spec: dict[str, Any]
    columns: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, spec: dict[str, Any], data: pd.DataFrame) -> "LiveChart":
        """Return the chart of a table."""
        return cls(spec, {str(name): data[name].to_numpy() for name in data})

    @property
    def data(self) -> pd.DataFrame:
        """The data for a table: made when asked for, for a table a second costs."""
        return pd.DataFrame(dict(self.columns))

    def arrow(self) -> "pa.Table":
        """Return the data as Streamlit sends them, single precision.

        Seven digits draw a line and fill a tooltip; `data` keeps all of them.
        """
        import pyarrow as pa

        return pa.table(
            {
                name: column.astype("float32") if column.dtype == "float64" else column
                for name, column in self.columns.items()
            }
        )

    def altair(self) -> "altair.Chart | altair.LayerChart":
        """Return the chart for a notebook."""
        import altair

        inline = {"values": self.data.to_dict("records")}
        chart = altair.Chart.from_dict(self.spec | {"data": inline})
        assert isinstance(chart, altair.Chart | altair.LayerChart)
        return chart


def lines_of(run: str, saes: Sequence[SAESpec], theme: Theme) -> tuple[Line, ...]:
    """Return a run's SAEs as lines: hue by architecture, strength by sparsity."""
    colours = shades(saes, theme)
    looks = {spec.name: (LOOKS[spec.architecture], hover_name(spec)) for spec in saes}
    return tuple(
        Line(run, name, label, colours[name], look.dash, look.vega_shape)
        for name, (look, label) in looks.items()
    )


def lines_of_runs(runs: Mapping[str, Sequence[SAESpec]], theme: Theme) -> tuple[Line, ...]:
    """Return the SAEs of several runs as lines: hue by run, dash and marker by architecture.

    The first run comes last, so that it is drawn over the others.
    """
    colours = RUN_COLOURS[theme]
    drawn = list(enumerate(runs.items()))[::-1]
    return tuple(
        Line(
            run,
            spec.name,
            f"{hover_name(spec)} · {run}",
            colours[i % len(colours)],
            LOOKS[spec.architecture].dash,
            LOOKS[spec.architecture].vega_shape,
        )
        for i, (run, saes) in drawn
        for spec in saes
    )


def tracks(frames: Mapping[str, pd.DataFrame], lines: Sequence[Line]) -> list[Track]:
    """Return what was logged of each line; empty where nothing was yet.

    Args:
        frames: metric lines of each run as a table, in the order in which they were written.
    """
    parts: dict[tuple[str, str], Track] = {}
    for run, frame in frames.items():
        if frame.empty:
            continue
        # Arrays once, instead of a table for each line and chart: those took 60 ms a tick, not 4.
        numbers = frame.select_dtypes("number")
        values = numbers.to_numpy("float64")
        names = frame["sae"].astype("category").cat
        for code, sae in enumerate(names.categories):
            own = names.codes.to_numpy() == code
            if not own.any():
                continue  # a step whose lines are half written, or lost
            columns = np.ascontiguousarray(values[own].T)
            parts[run, str(sae)] = dict(zip(map(str, numbers), columns, strict=True))
    return [parts.get((line.run, line.sae), {}) for line in lines]


def smoothed(values: np.ndarray, weight: float) -> np.ndarray:
    """Return the exponential moving average: causal, and unbiased early on.

    Args:
        weight: share of the past in each value, from 0 (raw) to below 1.
    """
    if weight == 0:
        return values
    return np.asarray(pd.Series(values).ewm(alpha=1 - weight, adjust=True).mean())


def thin(values: np.ndarray, limit: int) -> np.ndarray:
    """Return at most `limit` places that keep the look of a line.

    They are the first and the last, and the lowest and the highest of each stretch between.
    """
    if len(values) <= limit:
        return np.arange(len(values))
    inner, n_stretches = values[1:-1], (limit - 2) // 2
    width = -(-len(inner) // n_stretches)
    # One call for all stretches: of nine charts a second, eight lines each, loops took half a core.
    filled = np.full((-(-len(inner) // width), width), inner[-1])  # the first of equals is found
    filled.ravel()[: len(inner)] = inner
    starts = 1 + width * np.arange(len(filled))
    kept = np.zeros(len(values), dtype=bool)
    kept[starts + filled.argmin(axis=1)] = kept[starts + filled.argmax(axis=1)] = True
    kept[[0, -1]] = True
    return kept.nonzero()[0]


def line_chart(
    lines: Sequence[Line],
    logged: Sequence[Track],
    column: str,
    *,
    x: XAxis,
    smoothing: float = 0.0,
    log: bool = False,
    rule: float | None = None,
) -> LiveChart:
    """Return one quantity against training, a line per SAE; smoothing leaves the raw line faint.

    Args:
        logged: what `tracks` returns for `lines`.
        column: a key of `metrics.jsonl`, e.g. `l0`.
        rule: value marked with a thin line, such as gamma = 1.
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
            data["value"] = smoothed(raw, smoothing)[places].astype("float32")
        parts.append(data)
    columns = ["x", "line", "raw", *(["value"] if smoothing > 0 else [])]
    top = ceiling([part["raw"] for part in parts]) if column in GAMMAS else None
    spec = line_spec(tuple(lines), column, x, smoothing > 0, log, rule, top)
    return LiveChart(spec, joined(parts, columns))


def ceiling(series: Sequence[np.ndarray]) -> float | None:
    """Return the lowest of `CEILINGS` above the later half of every line; None if none is.

    A new ceiling is a new specification, which ends a zoom: hence few of them, far apart.
    """
    late = [float(values[len(values) // 2 :].max()) for values in series if len(values)]
    return next((top for top in CEILINGS if max(late, default=0.0) < 0.95 * top), None)


def joined(
    parts: Sequence[Mapping[str, np.ndarray]], columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return columns set end to end; empty ones where there are no parts."""
    if not parts:
        return {name: np.empty(0) for name in columns}
    return {name: np.concatenate([p[name] for p in parts]) for name in columns}


TRAIL = 40  # logged points of an SAE's path that the plane shows


def plane(
    lines: Sequence[Line], logged: Sequence[Track], *, finished: Sequence[str] = ()
) -> LiveChart:
    """Return where each SAE stands, L0 against FVU, and its path there; down and left is better.

    Args:
        finished: runs that are done: their markers are solid, those of others hollow.
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
    columns = ["step", "l0", "fvu", "line", "now"]
    return LiveChart(_plane_spec(tuple(lines)), joined(parts, columns))


@functools.lru_cache(maxsize=64)
def _plane_spec(lines: tuple[Line, ...]) -> dict[str, Any]:
    def log_axis(channel: str, field: str, title: str | None) -> dict[str, Any]:
        return {
            "field": field,
            "type": "quantitative",
            "title": title,
            "scale": {"type": "log", "nice": False, "padding": 14},
            "axis": {"values": log_ticks(channel), "format": "~g"},
        }

    colour = {
        "field": "line",
        "type": "nominal",
        "scale": series_scale(lines, "colour"),
        "legend": None,
    }
    here = {
        # Short enough for a third of a narrow page; the figure's own title says L0.
        "x": log_axis("x", "l0", "active features per token"),
        "y": log_axis("y", "fvu", None),
        "color": colour,
    }
    trail = {
        "mark": {"type": "line", "opacity": 0.35, "strokeWidth": 1.5, "clip": True},
        "params": [{"name": "zoom", "select": "interval", "bind": "scales"}],
        "encoding": {**here, "order": {"field": "step", "type": "quantitative"}},
    }
    shape = {
        "field": "line",
        "type": "nominal",
        "scale": series_scale(lines, "shape"),
        "legend": None,
    }
    marker = {
        "transform": [{"filter": "datum.now > 0"}],
        "mark": {"type": "point", "size": 90, "strokeWidth": 2, "opacity": 1, "clip": True},
        "encoding": {
            **here,
            "shape": shape,
            "fillOpacity": {"condition": {"test": "datum.now > 1", "value": 1}, "value": 0},
            "fill": {**colour},
            "tooltip": [
                {"field": "SAE", "type": "nominal"},
                {"field": "l0", "type": "quantitative", "title": "L0", "format": ".1f"},
                {"field": "fvu", "type": "quantitative", "title": "FVU", "format": ".3f"},
            ],
        },
    }
    spec = {**shared(lines, "FVU against L0"), "layer": [trail, marker]}
    # Vega begins this title left of the axis, where nothing is drawn: its first letter was cut off.
    spec["title"]["dx"] = 10
    return spec
