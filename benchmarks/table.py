"""What a benchmark found: lines for a person, JSON for a program, and the machine it ran on."""

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from benchmarks.harness import Result
from gsae_core.files import readable
from gsae_core.machine import gpus
from gsae_core.text import fixed

SHOWN_VERSIONS = ("torch", "transformers", "transformer-lens")
CPUINFO = Path("/proc/cpuinfo")


class Row(NamedTuple):
    """One way of doing the work."""

    name: str
    result: Result
    ratio: float
    """Its median time over the unit's."""
    cells: dict[str, str]
    """What else is worth a column, by the column's title."""

    def json(self) -> dict[str, Any]:
        result = self.result
        return {
            "name": self.name,
            "ms": result.ms,
            "ratio": self.ratio,
            "rounds_ms": list(result.rounds),
            "temporary_bytes": result.temporary,
            "resident_bytes": result.resident,
            **result.facts,
        }


class Table(NamedTuple):
    """What one benchmark found."""

    title: str
    settings: dict[str, Any]
    unit: str
    """Name of the row that ratios are multiples of."""
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """Sentences on who is missing, and on comparisons that the columns do not show."""
    machine: dict[str, Any]

    def lines(self) -> list[str]:
        """Return the table as lines of text."""
        extra = list(dict.fromkeys(title for row in self.rows for title in row.cells))
        header = ["", "time", "ratio", *extra]
        body = [
            [row.name, milliseconds(row.result.ms), f"{fixed(row.ratio, 2)}x"]
            + [row.cells.get(title, "–") for title in extra]
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(header, *body, strict=True)]
        lines = [self.title, machine_line(self.machine), ""]
        for cells in (header, *body):
            first, *others = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
            lines.append("  ".join([cells[0].ljust(len(first)), *others]).rstrip())
        return [*lines, "", f"ratio: to {self.unit}; times are medians", *self.notes]

    def json(self) -> dict[str, Any]:
        """Return the table as plain data: settings, machine, every round."""
        return {
            "benchmark": self.title,
            "settings": self.settings,
            "machine": self.machine,
            "unit": self.unit,
            "rows": [row.json() for row in self.rows],
            "notes": list(self.notes),
        }

    def text(self, *, as_json: bool) -> str:
        return json.dumps(self.json(), indent=2) if as_json else "\n".join(self.lines())


def rows_of(
    results: Sequence[Result], *, unit: str, n_tokens: int | None = None
) -> tuple[Row, ...]:
    """Return a row for each result: its ratio to the result called `unit`, speed and memory.

    Args:
        results: in the order of the table.
        unit: one of them.
        n_tokens: tokens that a round reads, where speed is worth a column.
    """
    base = next(result.ms for result in results if result.name == unit)
    rows = []
    for result in results:
        cells = {}
        if n_tokens is not None:
            cells["tokens/s"] = f"{1e3 * n_tokens / result.ms:,.0f}"
        if "l0" in result.facts:
            cells["L0"] = f"{result.facts['l0']:.1f}"
        if result.temporary is not None:
            cells["temporary memory"] = readable(result.temporary)
        if result.resident is not None:
            cells["whole process"] = readable(result.resident)
        rows.append(Row(result.name, result, result.ms / base, cells))
    return tuple(rows)


def milliseconds(ms: float) -> str:
    """Return a time with three digits at least: `258 ms`, `12.4 s`."""
    if ms >= 1e4:
        return f"{ms / 1e3:,.1f} s"
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms"


def processor(cpuinfo: Path = CPUINFO) -> str:
    """Return the processor's model name."""
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_facts(*, threads: int, device: str) -> dict[str, Any]:
    """Return what the figures depend on: no names of hosts, users or folders."""
    cores, features = psutil.cpu_count(), torch.backends.cpu.get_cpu_capability()
    return {
        "processor": f"{processor()} ({cores} cores, {features})",
        "device": device,
        "gpus": list(gpus()) if device.startswith("cuda") else [],
        "threads": threads,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in SHOWN_VERSIONS},
    }


def machine_line(facts: dict[str, Any]) -> str:
    """Return the machine and the versions in one line."""
    where = ", ".join(facts["gpus"]) or facts["processor"]
    versions = ", ".join(f"{name} {facts[name]}" for name in ("python", *SHOWN_VERSIONS))
    return f"{where}, {facts['threads']} threads, {facts['system']}; {versions}"
