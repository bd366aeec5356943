"""The plane of sparsity against error while a sweep moves through it, in Vega-Lite."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gsae_core.plots.live import Line, LiveChart, Track, joined
from gsae_core.plots.live_spec import series_scale, shared
from gsae_core.plots.palette import log_ticks

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
