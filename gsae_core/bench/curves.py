"""`bench curves`: how a step's time grows, point by point into scaling.json, and as figures."""

import json
from pathlib import Path
from typing import Any

import torch

from gsae_core.bench.contestants import Say
from gsae_core.bench.figure import Axes, Line, line_chart
from gsae_core.bench.flags import Curves, Step
from gsae_core.bench.step import OURS, PRODUCT, bench_step
from gsae_core.bench.table import machine_facts, machine_line
from gsae_core.errors import InputError
from gsae_core.store.files import replace_durably, write_json

NUMBERS = "scaling.json"
X_TITLES = {
    "d_sae": "latents (d_sae)",
    "l0": "L0 (active features per token)",
    "saes": "SAEs that learn at once",
}
FILES = {"d_sae": "scaling-width.svg", "l0": "scaling-l0.svg", "saes": "scaling-saes.svg"}
# Rows that are drawn, and what they are called where colours are few.
DRAWN = {
    OURS: "ours",
    "SAELens SAETrainer.step": "SAELens",
    "dictionary_learning update": "dictionary_learning",
    "gradients alone: autograd": "autograd, gradients alone",
}

Point = dict[str, Any]


def bench_curves(flags: Curves, say: Say) -> list[Path]:
    """Measure every point that is not known yet, draw the curves, and return the files written.

    Raises:
        InputError: for flags that cannot be, a folder that is not there or cannot be written, a
            scaling.json that is something else, or too little memory.
    """
    flags.check()
    if not flags.folder.is_dir():
        raise InputError(f"--folder: expected a folder, found none at {flags.folder}")
    numbers = flags.folder / NUMBERS
    machine = machine_facts(threads=flags.threads or torch.get_num_threads(), device=flags.device)
    known = [] if flags.fresh else read_points(numbers)
    curves: dict[str, list[Point]] = {}
    for name, steps in flags.steps().items():
        curves[name] = []
        for step in steps:
            point = find_point(known, step, machine)
            if point is None:
                say(f"{name} {getattr(step, name):g}")
                point = bench_step(step, say).json()
                known.append(point)
                write_json(numbers, {"points": known})
            curves[name].append(point)
    written = [numbers]
    for name, points in curves.items():
        written.append(flags.folder / FILES[name])
        _write_text(written[-1], draw(name, points))
    return written


def read_points(path: Path) -> list[Point]:
    """Return the points of a scaling.json; none if there is no such file.

    Raises:
        InputError: if it is something else.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    points = found.get("points") if isinstance(found, dict) else None
    if not isinstance(points, list) or not all(
        isinstance(point, dict) and {"settings", "machine", "rows"} <= point.keys()
        for point in points
    ):
        raise InputError(
            f"expected points of an earlier run in {path}, got something else; "
            "begin anew with --fresh"
        )
    return points


def find_point(known: list[Point], step: Step, machine: dict[str, Any]) -> Point | None:
    """Return the point that was measured with these settings on this machine, if one was."""
    for point in known:
        same = all(getattr(step, name) == value for name, value in point["settings"].items())
        if same and point["machine"] == machine:
            return point
    return None


def draw(name: str, points: list[Point]) -> str:
    """Return the figure of one curve: time of a step, in encoder products, over `name`."""
    lines = []
    for row_name, shown in DRAWN.items():
        found = [
            (float(point["settings"][name]), float(row["ratio"]))
            for point in points
            for row in point["rows"]
            if row["name"] == row_name
        ]
        # One colour for each in every figure, also where others are missing.
        lines.append(Line(shown, tuple(found)))
    fixed = points[0]["settings"]
    others = {"batch": "batch", "d_in": "d_in", "d_sae": "d_sae", "l0": "L0"}
    shape = ", ".join(f"{said} {fixed[key]:g}" for key, said in others.items() if key != name)
    machine = machine_line(points[0]["machine"]).partition(";")[0]
    each = " for each SAE" if name == "saes" else ""
    return line_chart(
        lines,
        Axes(
            title=f"Time of a Gated training step{each}",
            subtitle=f"{shape}, float32; {machine}",
            x=X_TITLES[name],
            y=f"time{each}, in encoder products",
            unit_line=f"one {PRODUCT}",
        ),
    )


def _write_text(path: Path, text: str) -> None:
    def write(sibling: Path) -> None:
        sibling.write_text(text, encoding="utf-8")

    replace_durably(path, write, n_bytes=len(text.encode("utf-8")))
