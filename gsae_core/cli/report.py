"""Answers as lines of text: tables of runs, SAEs and measurements."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gsae_core import text
from gsae_core.analysis.pareto import ratio_sentences
from gsae_core.checkpoints.formats.detect import find_saes
from gsae_core.checkpoints.formats.libraries import HookPoint
from gsae_core.checkpoints.hub import Repository
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.runs.evals import (
    losses,
    measure_again,
    measured_earlier,
    measured_elsewhere,
    measured_on,
)
from gsae_core.runs.outliers import outliers_measured
from gsae_core.runs.run import Run, runs_root, survey


def only_sae(run: Run) -> str:
    """Return the name of a run's one SAE; an InputError names them where it has several."""
    names = [spec.name for spec in run.config.saes]
    if len(names) > 1:
        raise InputError(f"expected --sae with one of this run's SAEs ({', '.join(names)})")
    return names[0]


def list_lines(path: Path | None) -> list[str]:
    """Return a table of the runs or SAEs at a path; None is the folder of runs."""
    folder = path or runs_root()
    if (folder / "config.json").is_file() and (folder / "status.json").is_file():
        return _saes_of(Run.open(folder))
    if folder.is_dir():
        listed, unreadable = survey(folder)
        # A run that can be opened may still have lost a part of what it measured.
        damaged = [f"{run.id}: {reason}" for run, _ in listed for reason in run.damages()]
        damaged += [f"{run}: {reason}" for run, reason in unreadable.items()]
        if listed:
            rows = [["run", "state", "model", "site", "architectures", "SAEs", "from"]]
            rows += [
                [
                    run.id,
                    run.judged(said).state,
                    run.config.model.name,
                    run.config.hook_names,
                    ", ".join(dict.fromkeys(spec.architecture for spec in run.config.saes)),
                    str(len(run.config.saes)),
                    run.config.imported or run.config.finetuned or "ours",
                ]
                for run, said in listed
            ]
            notes = [f"{run.id}: {note}" for run, _ in listed for note in _notes(run)]
            return [*text.aligned(rows), *notes, *damaged]
        if any((folder / name / "status.json").exists() for name in unreadable):
            return damaged
    elif path is None:
        raise InputError(f"expected runs in {folder}, found no such folder; train or import first")
    rows = [["SAE", "architecture", "d_in", "latents", "place", "format", "file"]]
    rows += [
        [
            sae.name,
            sae.architecture,
            "–" if sae.d_in is None else str(sae.d_in),
            "–" if sae.d_sae is None else str(sae.d_sae),
            _place(sae.place),
            sae.library,
            str(sae.weights),
        ]
        for sae in find_saes(folder)
    ]
    return text.aligned(rows)


def _measured(run: Run) -> list[dict[str, Any]]:
    """Return a run's evaluation; none where it is damaged, which `Run.damages` says."""
    try:
        return run.evals()
    except InputError:
        return []


def _warnings(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what an FVU alone would hide: SAEs worse than predicting the mean, and outliers."""
    sentence = text.worse_than_mean({row["name"]: row["fvu"] for row in evals})
    return [*([sentence] if sentence else []), *outliers_measured(evals)]


def _notes(run: Run) -> list[str]:
    """Return what is said below a table with a run's numbers, or without them."""
    evals = _measured(run)
    elsewhere = measured_elsewhere(evals, str(run.folder))
    return [*_warnings(evals), *([elsewhere] if elsewhere else [])]


def _saes_of(run: Run) -> list[str]:
    measured = {row["name"]: row for row in _measured(run)}
    rows = [["SAE", "architecture", "d_in", "latents", "lambda", "L0", "FVU", "from"]]
    notes = _notes(run)
    for spec in run.config.saes:
        try:
            cfg = run.sae_cfg(spec.name)
        except InputError:
            cfg = {}
        source = (cfg.get("metadata") or {}).get("source") or {}
        numbers = measured.get(spec.name, {})
        rows.append(
            [
                spec.name,
                spec.architecture,
                str(cfg.get("d_in", "–")),
                str(spec.d_sae),
                # NaN: its files do not say.
                "–" if math.isnan(spec.sparsity) else f"{spec.sparsity:g}",
                text.fixed(numbers.get("l0"), 1),
                text.marked_fvu(numbers.get("fvu"), 4),
                source.get("library", "ours"),
            ]
        )
        notes += [f"{spec.name}: {sentence}" for sentence in source.get("assumed", [])]
    if len(run.config.places) > 1:
        places = ["site", *(run.config.place(spec).hook_name for spec in run.config.saes)]
        rows = [[*row, place] for row, place in zip(rows, places, strict=True)]
    place = f"{run.config.model.name}, {run.config.hook_names}"
    return [f"{run.id}, {run.status.state}: {place}", *text.aligned(rows), *notes, *run.damages()]


def _place(place: HookPoint) -> str:
    known = [place.model, None if place.layer is None else f"layer {place.layer}", place.site]
    return " ".join(part for part in known if part) or place.hook_name or "–"


def listing(repository: Repository) -> list[str]:
    """Return the SAEs of a repository as lines: path, layout, size."""
    head = f"{repository.asked} at {repository.commit[:12]}"
    if not repository.saes:
        return [f"{head}: no SAE among {len(repository.files)} files"]
    rows = [["SAE", "layout", "size"]]
    rows += [[sae.path or ".", sae.library, readable(sae.n_bytes)] for sae in repository.saes]
    return [f"{head}: {len(repository.saes)} of them", *text.aligned(rows)]


def evals_table(evals: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return evals.json as a table, and below it which SAEs are worse than predicting the mean."""
    rows = [["SAE", "latents", "L0", "loss recovered", "KL", "FVU", "gamma", "gate gamma", "alive"]]
    rows += [
        [
            row["name"],
            str(row["d_sae"]),
            text.fixed(row["l0"], 1),
            text.percent(row["loss_recovered"], 2),
            text.fixed(row["kl"], 4),
            text.marked_fvu(row["fvu"], 4),
            text.fixed(row["gamma"], 3),
            # A ReLU SAE has no gate apart from its output.
            text.fixed(row["gamma_gate"], 3) if row["architecture"] == "gated" else "–",
            text.percent(row["alive_fraction"], 1),
        ]
        for row in evals
    ]
    return [*text.aligned(rows), *_warnings(evals)]


def time_spent(rows: Sequence[Mapping[str, Any]], unit: str = "token") -> list[str]:
    """Return what training took, and the share of what is not SAEs; nothing for older runs."""
    last = rows[-1] if rows else {}
    if not last.get("seconds") or "seconds_lm" not in last:
        return []
    seconds = last["seconds"]
    return [
        f"{text.count(last['tokens'])} {unit}s in {text.duration(seconds)}, "
        f"{text.count(last['tokens'] / seconds)}/s on average; time in {text.WORDS[unit].source} "
        f"{text.percent(last['seconds_lm'] / seconds, 0)}, in SAEs "
        f"{text.percent(last['seconds_sae'] / seconds, 0)}"
    ]


def run_report(run: Run) -> list[str]:
    """Return what a finished run measured, what it took, and where it is."""
    evals, events = run.evals(), run.events()
    tracking = [e for e in events if e["event"] in ("tracked", "tracker stopped")][-1:]
    lines = ["", *evals_table(evals)]
    if evals:
        lines.append(f"measured on {measured_on(evals[0])}")
        if any(measured_earlier(row) for row in evals):
            lines.append(measure_again(str(run.folder)))
        else:
            lines.append(losses(evals[0]))
    return [
        *lines,
        "",
        *([] if run.config.activations else ratio_sentences(evals)),
        *time_spent(run.recent_metrics(), run.config.unit),
        *(f"{e['sae']} stopped: {e['why']}" for e in events if e["event"] == "sae stopped"),
        *(f"no longer tracked: {e['why']}" for e in tracking if e["event"] == "tracker stopped"),
        f"the run is in {run.folder}",
    ]
