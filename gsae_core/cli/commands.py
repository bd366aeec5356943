"""`import`, `export` and `list`: what each does, as the lines it prints."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from gsae_core.analysis.labels import Labels, Said
from gsae_core.checkpoints.formats.detect import find_saes
from gsae_core.checkpoints.formats.found import Found, Place
from gsae_core.checkpoints.hub import Repository, look, one_sae, parse_address
from gsae_core.cli.arguments import ExportSAE, Import, Label, List, Pull, Push
from gsae_core.config import validated
from gsae_core.errors import InputError
from gsae_core.files import left_out, readable
from gsae_core.runs.run import Listed, Run, runs_root, survey
from gsae_core.runs.work.transfer import (
    PushRequest,
    Transfer,
    ask,
    free_name,
    new_run_folder,
    plan_pull,
    run_name,
)
from gsae_core.text import aligned, fixed, marked_fvu, worse_than_mean

if TYPE_CHECKING:
    from gsae_core.analysis.autointerp import LocalWriter, RemoteWriter
    from gsae_core.analysis.features.index import FeatureIndex

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
    from gsae_core.runs.work.imports import import_saes

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
    from gsae_core.checkpoints.checkpoint import load_sae, read_cfg
    from gsae_core.checkpoints.formats.write import write_sae

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


INTERRUPTED = 130

Say = Callable[[str], None]
Follow = Callable[[Iterator[Any]], str]


def pull(command: Pull, *, say: Say, show: Say, follow: Follow) -> int:
    """Fetch an SAE and make a run of it, or list what there is; return the exit code.

    Args:
        say: takes a sentence for the person who watches.
        show: takes a line of the answer.
        follow: draws progress until the work ends, and returns its last stage.

    Raises:
        InputError: for anything that a person can mend.
    """
    repository = look(parse_address(command.address))
    if repository.renamed:
        say(repository.renamed)
    if command.list:
        for line in listing(repository):
            show(line)
        return 0
    sae = one_sae(repository)
    folder = command.to or _default(repository, sae.path)
    new_run_folder(folder.absolute().parent, folder.name)
    place = {"model": command.model, "layer": command.layer, "site": command.site}
    request = plan_pull(repository, sae, to=folder.name, **place)
    count = f"{len(sae.files)} file{'s' * (len(sae.files) > 1)}"
    say(
        f"{sae.path or repository.repo}: {sae.library}, {count}, {readable(sae.n_bytes)}, "
        f"commit {repository.commit[:12]}"
    )
    return go_on(ask(folder.absolute().parent, request), say=say, show=show, follow=follow)


def _default(repository: Repository, path: str) -> Path:
    root = runs_root()
    return root / free_name(root, run_name(repository.repo, path))


def listing(repository: Repository) -> list[str]:
    """Return the SAEs of a repository as lines: path, layout, size."""
    head = f"{repository.asked} at {repository.commit[:12]}"
    if not repository.saes:
        return [f"{head}: no SAE among {len(repository.files)} files"]
    rows = [["SAE", "layout", "size"]]
    rows += [[sae.path or ".", sae.library, readable(sae.n_bytes)] for sae in repository.saes]
    return [f"{head}: {len(repository.saes)} of them", *aligned(rows)]


def push(command: Push, *, say: Say, show: Say, follow: Follow) -> int:
    """Send SAEs of a run to the Hub; return the exit code.

    Raises:
        InputError: for anything that a person can mend.
    """
    from gsae_core.runs.work.publish import check_token
    from gsae_core.runs.work.transfer import parcel_of

    run = Run.open(command.run)
    request = PushRequest(run.id, command.sae, command.to, command.public)
    parcel = parcel_of(run, request)
    check_token()
    n_files = len(parcel.files) + len(parcel.texts)
    say(f"{n_files} files, {readable(parcel.n_bytes)}, to {parcel.repo}")
    for note in parcel.notes:
        say(note)
    return go_on(ask(run.folder.parent, request), say=say, show=show, follow=follow)


def go_on(transfer: Transfer, *, say: Say, show: Say, follow: Follow) -> int:
    """Do a transfer, or what is left of it; return the exit code.

    Raises:
        InputError: for anything that a person can mend.
    """
    from gsae_core.runs.work.transfer import work

    if transfer.status.state == "finished":
        raise InputError(
            f"expected a transfer that is not done, got one that led to {transfer.result}; give "
            "its command again to do it anew"
        )
    if follow(work(transfer)) != "finished":
        say(
            "stopped; what came is kept: give the same command again, or python -m gsae_core "
            f"resume {transfer.folder}"
        )
        return INTERRUPTED
    if transfer.kind == "pull":
        show(f"run {transfer.root / str(transfer.result)}")
    else:
        show(str(transfer.result))
    return 0


FAILURE = 1
MOST_MISUNDERSTOOD = 3
"""Answers in a row that are not understood before no more is asked: the others would not be."""


class Progress(NamedTuple):
    """How many features have been asked about."""

    stage: str
    done: int
    total: int


def label(command: Label, *, say: Say, show: Say, follow: Follow) -> int:
    """Label features of a run's SAE; return the exit code, 1 if some could not be labelled.

    What is labelled is kept, also where an error or Ctrl-C ends this.

    Args:
        say: takes a sentence for the person who watches.
        show: takes a line of the answer.
        follow: draws progress until the work ends, and returns its last stage.

    Raises:
        InputError: for anything that a person can mend.
    """
    if command.with_ is None:
        raise InputError(
            "expected --with MODEL, got none; give a folder or the name of a model on this "
            "machine, or with --remote the name of one at the address in OPENAI_BASE_URL"
        )
    run = Run.open(command.run)
    index = _index(run, command)
    numbers = _chosen(command, index)
    if index.labels.damaged:
        say(left_out(index.labels.damaged, "labels.jsonl"))
    known = {} if command.again else index.labels.latest("label")
    asked = [number for number in numbers if number not in known]
    if len(asked) < len(numbers):
        n = len(numbers) - len(asked)
        say(f"{n} of {len(numbers)} features have a label, which stays; --again asks anew")
    if not asked:
        return 0
    device = command.device or run.config.device
    writer = _remote(command) if command.remote else _local(command.with_, device, say)
    say(_announcement(command, index, writer, len(asked)))
    done, failed = [], {}
    try:
        follow(_work(command, index, writer, asked, done, failed))
    except KeyboardInterrupt:
        say(f"stopped after {len(done)} of {len(asked)}; {_rest(command, asked, done)}")
        return INTERRUPTED
    finally:
        for line in _table(done):
            show(line)
        for number, sentence in failed.items():
            say(f"feature {number}: {sentence}")
    if len(done) + len(failed) < len(asked):
        say(
            f"stopped after {MOST_MISUNDERSTOOD} answers in a row that were not understood; try "
            "another model, or --score none"
        )
    return FAILURE if failed else 0


def _index(run: Run, command: Label) -> "FeatureIndex":
    """Return the index, with the labels that the Features page shows."""
    from gsae_core.runs.example import is_example, labels_folder

    name = command.sae or only_sae(run)
    index = run.features(name)
    if is_example(run):
        index.labels = Labels(labels_folder(runs_root().absolute(), name))
    return index


def _chosen(command: Label, index: "FeatureIndex") -> list[int]:
    """Return the features to label, each once and none of them dead.

    Raises:
        InputError: if none or an unknown or dead one is asked for.
    """
    import numpy as np

    from gsae_core.analysis.autointerp import check_fires

    if (command.most is None) == (not command.features):
        came = "neither" if command.most is None else "both"
        raise InputError(f"expected --features with numbers or --most with how many, got {came}")
    if command.most is None:
        for number in command.features:
            check_fires(index.feature(number))
        return list(dict.fromkeys(command.features))
    if command.most < 1:
        raise InputError(f"--most: expected a number of at least 1, got {command.most}")
    fired = np.diff(index.array("offsets"))
    order = np.argsort(-fired, kind="stable")[: command.most]
    return [int(number) for number in order if fired[number]]


def _remote(command: Label) -> "RemoteWriter":
    from gsae_core.analysis.autointerp import RemoteWriter

    return RemoteWriter(str(command.with_))


def _local(name: str, device: str, say: Say) -> "LocalWriter":
    """Return a model on this machine; nothing is fetched.

    Raises:
        InputError: if it is not here, or not one that can be read.
    """
    from gsae_core.analysis.autointerp import LocalWriter
    from gsae_core.lm.catalog import cached_models, model_folder
    from gsae_core.runs.plan.cost import resolve_device

    folder = model_folder(name) or cached_models().get(name)
    if folder is None:
        raise InputError(
            f"expected a model on this machine, found no {name!r}; fetch it first, with "
            f"hf download {name}, or give --remote if it is at the address in OPENAI_BASE_URL"
        )
    say(f"loading {name}")
    called = Path(name).name if model_folder(name) else name
    return LocalWriter(str(folder), device=str(resolve_device(device)), name=called)


def _announcement(
    command: Label, index: "FeatureIndex", writer: "LocalWriter | RemoteWriter", n: int
) -> str:
    """Return what will be asked of whom, and what of it leaves this machine."""
    from gsae_core.analysis.autointerp import AFTER, BEFORE, N_SCORED, N_SHOWN, LocalWriter

    features = f"{n} feature{'s' * (n > 1)} of {index.manifest.sae}"
    if isinstance(writer, LocalWriter):
        return f"{features}: {writer.name} on this machine writes; no text leaves it"
    texts = N_SHOWN if command.score == "none" else N_SHOWN + 2 * N_SCORED
    token = ", and the token in OPENAI_API_KEY" if writer.has_token else ""
    is_bare = urlsplit(writer.where).scheme == "http"
    bare = ", over a connection that is not encrypted" if is_bare else ""
    return (
        f"{features}: sending to {writer.where}, for {writer.name}, up to {texts} texts of each, "
        f"of at most {BEFORE + 1 + AFTER} tokens out of {index.manifest.text}{token}{bare}"
    )


def _work(
    command: Label,
    index: "FeatureIndex",
    writer: "LocalWriter | RemoteWriter",
    asked: Sequence[int],
    done: list[Said],
    failed: dict[int, str],
) -> Iterator[Progress]:
    """Label one feature after another, and yield how many; `done` and `failed` grow."""
    from gsae_core.analysis.autointerp import NotLabelled, NotUnderstood, label_feature

    by = None if command.score == "none" else command.score
    misunderstood = 0
    for i, number in enumerate(asked):
        yield Progress("labelling", i, len(asked))
        try:
            done.append(label_feature(index.feature(number), writer, by=by))
            misunderstood = 0
        except NotLabelled as error:
            failed[number] = str(error)
            misunderstood += isinstance(error, NotUnderstood)
        if misunderstood == MOST_MISUNDERSTOOD:
            return
    yield Progress("labelling", len(asked), len(asked))


def _rest(command: Label, asked: Sequence[int], done: Sequence[Said]) -> str:
    if not command.again:
        return "the same command goes on from there"
    labelled = {said.feature for said in done}
    rest = " ".join(str(number) for number in asked if number not in labelled)
    return f"for the others give --again --features {rest}"


def _table(done: Sequence[Said]) -> list[str]:
    """Return a line for each label: feature, score, label, as far as there are any."""
    from gsae_core.text import aligned

    if not done:
        return []
    rows = [
        [str(said.feature), "–" if said.score is None else f"{said.score:.2f}"] for said in done
    ]
    lines = aligned([["feature", "score"], *rows])
    return [
        f"{line}  {text}"
        for line, text in zip(lines, ["label", *(s.text for s in done)], strict=True)
    ]
