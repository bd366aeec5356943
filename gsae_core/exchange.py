"""`import`, `export` and `list`: what each does, as the lines it prints."""

from collections.abc import Iterable, Iterator

from gsae_core.errors import InputError
from gsae_core.exchange_flags import ExportSAE, Import, List
from gsae_core.launch import runs_root
from gsae_core.report import aligned
from gsae_core.store.formats.detect import find_saes
from gsae_core.store.formats.found import Found, Place
from gsae_core.store.listing import Listed, survey
from gsae_core.store.runs import Run
from gsae_core.validation import validated
from gsae_core.wording import fixed, marked_fvu, worse_than_mean

PROGRAM = "python -m gsae_core"

# Of cfg.json's metadata: what describes the written SAE and not the one it is made from.
OWN = {
    *("recipe", "tie", "aux", "detach_b_dec", "k_aux"),
    *("init_threshold", "bandwidth", "threshold_unit"),
}


def lines(command: Import | ExportSAE | List) -> Iterable[str]:
    """Return what a command prints, as it does its work."""
    match command:
        case Import():
            return import_lines(command)
        case ExportSAE():
            return export_lines(command)
        case List():
            return list_lines(command)


def import_lines(command: Import) -> Iterator[str]:
    """Yield what was imported, and every assumption, having imported it."""
    from gsae_core.config import ModelConfig
    from gsae_core.store.imports import import_saes

    if command.layer is not None:
        validated(ModelConfig, {"layer": command.layer}, {"layer": "--layer"})
    run, sources = import_saes(
        command.path,
        command.to,
        model=command.model,
        layer=command.layer,
        site=command.site,
        saes=command.sae,
        data=command.data,
    )
    yield f"run {run.folder}"
    for name, source in sources.items():
        yield f"{name}: {source.architecture} of {source.library}"
        yield from (f"  {sentence}" for sentence in source.assumed)
    yield f"for {run.config.model.name}, {run.config.model.hook_name}"
    yield f"measure it with: {PROGRAM} evaluate {run.folder}"


def export_lines(command: ExportSAE) -> Iterator[str]:
    """Yield what was written and how close it is, having written it."""
    from gsae_core.store.checkpoint import load_sae, read_cfg
    from gsae_core.store.formats.writer import write_sae

    run = Run.open(command.run)
    name = command.sae or only_sae(run)
    folder = run.sae_folder(name)
    metadata = {k: v for k, v in (read_cfg(folder).get("metadata") or {}).items() if k not in OWN}
    if metadata.get("stopped"):
        yield f"{name} stopped learning: {metadata['stopped']}"
    sae = load_sae(folder)
    if command.format == "jumprelu":
        metadata["converted_from"] = sae.architecture
    written = write_sae(sae, command.to, format=command.format, metadata=metadata)
    for path in written.files:
        yield str(path)
    yield f"largest difference {written.largest_difference:.1e}: {written.parity.sentence}"


def only_sae(run: Run) -> str:
    """Return the name of a run's one SAE.

    Raises:
        InputError: if it has several.
    """
    names = [spec.name for spec in run.config.saes]
    if len(names) > 1:
        raise InputError(f"expected --sae with one of this run's SAEs ({', '.join(names)})")
    return names[0]


def list_lines(command: List) -> list[str]:
    """Return a table of the runs or SAEs at a path.

    Raises:
        InputError: if there is neither.
    """
    path = runs_root() if command.path is None else command.path
    if (path / "config.json").is_file() and (path / "status.json").is_file():
        return _saes_of(Run.open(path))
    if path.is_dir():
        listed, unreadable = survey(path)
        # A run that can be opened may still have lost a part of what it measured.
        damaged = [f"{run.id}: {reason}" for run, _ in listed for reason in run.damages()]
        damaged += [f"{run.id}: {run.reason}" for run in unreadable]
        if listed:
            return [*_runs(listed), *_worse([run for run, _ in listed]), *damaged]
        if any((path / run.id / "status.json").exists() for run in unreadable):
            return damaged
    elif command.path is None:
        raise InputError(f"expected runs in {path}, found no such folder; train or import first")
    return _foreign(find_saes(path))


def _runs(runs: list[Listed]) -> list[str]:
    rows = [
        [
            run.id,
            run.judged(said).state,
            run.config.model.name,
            run.config.model.hook_name,
            ", ".join(dict.fromkeys(spec.architecture for spec in run.config.saes)),
            str(len(run.config.saes)),
            run.config.imported or "ours",
        ]
        for run, said in runs
    ]
    return aligned([["run", "state", "model", "site", "architectures", "SAEs", "from"], *rows])


def _worse(runs: list[Run]) -> list[str]:
    """Return a line for each run with SAEs that are worse than predicting the mean."""
    lines = []
    for run in runs:
        try:
            sentence = worse_than_mean({row["name"]: row["fvu"] for row in run.evals()})
        except InputError:
            continue  # told among what is damaged
        lines += [f"{run.id}: {sentence}"] if sentence else []
    return lines


def _saes_of(run: Run) -> list[str]:
    damages = run.damages()
    try:
        measured = {row["name"]: row for row in run.evals()}
    except InputError:
        measured = {}  # among the damages
    head = ["SAE", "architecture", "d_in", "latents", "lambda", "L0", "FVU", "from"]
    rows, notes = [], []
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
                _number(spec.sparsity),
                fixed(numbers.get("l0"), 1),
                marked_fvu(numbers.get("fvu"), 4),
                source.get("library", "ours"),
            ]
        )
        notes += [f"{spec.name}: {sentence}" for sentence in source.get("assumed", [])]
    worse = worse_than_mean({name: row["fvu"] for name, row in measured.items()})
    notes = [worse, *notes] if worse else notes
    place = f"{run.config.model.name}, {run.config.model.hook_name}"
    return [f"{run.id}, {run.status.state}: {place}", *aligned([head, *rows]), *notes, *damages]


def _number(value: float) -> str:
    return "–" if value != value else f"{value:g}"  # NaN: its files do not say


def _foreign(found: list[Found]) -> list[str]:
    rows = [
        [
            sae.name,
            sae.architecture,
            "–" if sae.d_in is None else str(sae.d_in),
            "–" if sae.d_sae is None else str(sae.d_sae),
            _place(sae.place),
            sae.library,
            str(sae.weights),
        ]
        for sae in found
    ]
    return aligned([["SAE", "architecture", "d_in", "latents", "place", "format", "file"], *rows])


def _place(place: Place) -> str:
    known = [place.model, None if place.layer is None else f"layer {place.layer}", place.site]
    return " ".join(part for part in known if part) or place.hook_name or "–"
