"""`python -m gsae_core ...`: what each command does, and the only module that prints."""

import contextlib
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from gsae_core.analysis.features.files import read_manifest
from gsae_core.analysis.labels import Annotation, Labels
from gsae_core.checkpoints.hub import look, one_sae, parse_address
from gsae_core.cli import report
from gsae_core.cli.arguments import (
    PROGRAM,
    Doctor,
    Evaluate,
    ExportSAE,
    Import,
    Index,
    Label,
    List,
    Pull,
    Push,
    Resume,
    Train,
    parse,
    run_config,
)
from gsae_core.config import EvalConfig, ModelConfig, validated
from gsae_core.errors import InputError
from gsae_core.files import left_out, readable
from gsae_core.machine import slot_of
from gsae_core.runs.jobs.job import Job
from gsae_core.runs.jobs.worker import Worker
from gsae_core.runs.run import Run, is_example, labels_folder, run_id, runs_root
from gsae_core.runs.work.index import index_folder
from gsae_core.runs.work.transfer import (
    PushRequest,
    Transfer,
    ask,
    free_name,
    is_transfer,
    new_run_folder,
    plan_pull,
    run_name,
)
from gsae_core.schedule import shortfalls_of_run
from gsae_core.text import Progress, fixed

if TYPE_CHECKING:
    from tqdm import tqdm

    from gsae_core.analysis.autointerp import LocalWriter, RemoteWriter
    from gsae_core.analysis.features.index import FeatureIndex
    from gsae_core.training.trainer import StepReport

MISTAKE = 2
FAILURE = 1
INTERRUPTED = 130

# Of cfg.json's metadata: what describes the written SAE and not the one it is made from.
OWN = {
    *("recipe", "tie", "aux", "detach_b_dec", "k_aux"),
    *("init_threshold", "bandwidth", "threshold_unit"),
}

BARS = ("training", "evaluating", "indexing", "downloading", "labelling")
"""Stages that are drawn as bars."""
WHOLE = ("training", "labelling")
"""Those of few enough units to be counted in full."""


def show(*lines: str) -> None:
    """Print lines of the answer."""
    print(*lines, sep="\n", flush=True)


def say(sentence: str) -> None:
    """Print a sentence for the person who watches, beside the answer."""
    print(f"gsae_core: {sentence}", file=sys.stderr, flush=True)


class Ended(Exception):
    """A command ended early: its exit code, and the sentence that says why."""

    def __init__(self, code: int, sentence: str) -> None:
        super().__init__(sentence)
        self.code = code


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code; `argv` are the words after the program."""
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        return _bench(words[1:]) if words[:1] == ["bench"] else _run(parse(words))
    except InputError as error:
        say(" ".join(str(error).split()))
        return MISTAKE
    except Ended as error:
        say(str(error))
        return error.code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


def _run(command: object) -> int:
    match command:
        case Train():
            _train(command)
        case Resume() if is_transfer(command.run):
            _transfer(Transfer(command.run.absolute()))
        case Resume():
            _work(Run.open(command.run))
        case Evaluate():
            _evaluate(command)
        case Index():
            _index(command)
        case Label():
            return _label(command)
        case Pull():
            _pull(command)
        case Push():
            _push(command)
        case Import():
            _import(command)
        case ExportSAE():
            _export(command)
        case List():
            show(*report.list_lines(command.path))
        case Doctor():
            return _doctor(command)
    return 0


@contextlib.contextmanager
def _unexpected(job: Job, *, log: bool = False) -> Iterator[None]:
    """Turn an unexpected error into a sentence that says where its traceback is.

    `log`: put it there; a worker has done so itself.
    """
    try:
        yield
    except (InputError, Ended):
        raise
    except Exception as error:
        path = job.folder / "log.txt"
        if log:
            with path.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
        first = str(error).partition("\n")[0]
        sentence = f"{type(error).__name__}: {first}; the traceback is in {path}"
        raise Ended(FAILURE, sentence) from error


def _train(flags: Train) -> None:
    config = run_config(flags)
    run = Run.create(flags.out or runs_root() / run_id(config, secrets.token_hex(2)), config)
    show(f"run {run.folder}")
    try:
        _work(run)
    except InputError:
        # A mistake met before the first step leaves nothing that could be resumed, and the name
        # should be free for the corrected command.
        if run.status.step == 0:
            shutil.rmtree(run.folder)
        raise


def _work(run: Run) -> None:
    """Train a run once its device is free, to its end or to where it is interrupted."""
    stage = "cancelled"
    with _unexpected(run), contextlib.suppress(KeyboardInterrupt), Worker(run) as worker:
        slot = slot_of(run.config.device)
        for n, ahead in enumerate(worker.wait_for_device(slot)):
            if n == 0:
                runs = "1 run goes" if ahead == 1 else f"{ahead} runs go"
                say(f"waiting for {slot}: {runs} first; Ctrl-C leaves the line")
        # After the wait: what is imported here fills memory.
        from gsae_core.runs.work.train import train_run

        # Not before the text has been read: what is wrong with it is then said alone.
        ahead = shortfalls_of_run(run.config)
        stage = _follow(train_run(run, worker=worker), before_training=ahead)
    if stage != "finished":
        step, n_steps = run.status.step, run.status.n_steps
        resume = f"{PROGRAM} resume {run.folder}"
        raise Ended(INTERRUPTED, f"stopped after step {step} of {n_steps}; go on with: {resume}")
    show(*report.run_report(run))


def _evaluate(command: Evaluate) -> None:
    from gsae_core.runs.work.train import evaluate_run

    run = Run.open(command.run)
    if command.tokens is not None:
        validated(EvalConfig, {"n_tokens": command.tokens}, {"n_tokens": "--tokens"})
    with _unexpected(run, log=True):
        _follow(evaluate_run(run, n_tokens=command.tokens, replace=command.replace))
    show(*report.run_report(run))


def _index(command: Index) -> None:
    from gsae_core.runs.work.index import index_run

    run = Run.open(command.run)
    for name in [command.sae] if command.sae else [spec.name for spec in run.config.saes]:
        folder = index_folder(run, name)
        with _unexpected(Job(folder)):
            stage = _follow(index_run(run, name, n_tokens=command.tokens, split=command.split))
        if stage != "finished":
            again = f"{PROGRAM} index {run.folder} --sae {name}"
            raise Ended(INTERRUPTED, f"stopped; go on with: {again}")
        manifest = read_manifest(folder)
        size = readable(manifest.n_bytes)
        show(f"{name}: {manifest.amount()}, L0 {manifest.l0:.1f}, {size} in {folder}")


def _import(command: Import) -> None:
    """Import SAEs, and show what they are and every assumption."""
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
    show(f"run {run.folder}")
    for name, source in sources.items():
        show(f"{name}: {source.architecture} of {source.library}")
        for sentence in source.assumed:
            show(f"  {sentence}")
    show(f"for {run.config.model.name}, {run.config.model.hook_name}")
    show(f"measure it with: {PROGRAM} evaluate {run.folder}")


def _export(command: ExportSAE) -> None:
    """Write an SAE, and show its files and how close they are."""
    from gsae_core.checkpoints.checkpoint import load_sae, read_cfg
    from gsae_core.checkpoints.formats.write import write_sae

    run = Run.open(command.run)
    name = command.sae or report.only_sae(run)
    folder = run.sae_folder(name)
    metadata = {k: v for k, v in (read_cfg(folder).get("metadata") or {}).items() if k not in OWN}
    if metadata.get("stopped"):
        show(f"{name} stopped learning: {metadata['stopped']}")
    sae = load_sae(folder)
    if command.format == "jumprelu":
        metadata["converted_from"] = sae.architecture
    written = write_sae(sae, command.to, format=command.format, metadata=metadata)
    show(*map(str, written.files))
    show(f"largest difference {written.parity.largest:.1e}: {written.parity.sentence}")


def _doctor(command: Doctor) -> int:
    from gsae_core.cli.doctor import examine

    failed = False
    for check in examine(command.runs):
        failed |= check.status == "bad"
        show(f"{check.status:<4}  {check.name:<17}  {check.found}")
    return FAILURE if failed else 0


def _bench(words: Sequence[str]) -> int:
    """Pass the words on to `benchmarks`, a folder beside the package in a clone."""
    clone = Path(__file__).resolve().parents[2]
    if not (clone / "benchmarks" / "__main__.py").is_file():
        raise InputError(
            f"expected the benchmarks beside the package, got no folder benchmarks in {clone}; "
            "run this in a clone of the repository"
        )
    sys.path.insert(0, str(clone))
    return import_module("benchmarks.__main__").main(words, program=f"{PROGRAM} bench")


def _follow(progress: Iterator[Progress], *, before_training: Sequence[str] = ()) -> str:
    """Draw a bar for each stage until the work ends; return the last stage.

    `before_training` are sentences to say before the bar of that stage.
    """
    stage, bar = "", None
    # train_run and evaluate_run are generators, though their type says Iterator: closed, they save.
    with contextlib.closing(progress), contextlib.ExitStack() as bars:  # pyright: ignore
        for now in progress:
            if now.stage != stage:
                bars.close()
                stage, bar = now.stage, None
                if stage == "loading":
                    print("loading the model and the text", file=sys.stderr, flush=True)
                elif stage in BARS:
                    for sentence in before_training if stage == "training" else ():
                        say(sentence)
                    bar = bars.enter_context(_bar(now))
            if bar is not None:
                bar.update(now.done - bar.n)
                if now.report is not None and not bar.disable and _is_time(bar):
                    bar.set_postfix_str(_glance(now.report), refresh=False)
    return stage


def _bar(now: Progress) -> "tqdm[NoReturn]":
    from tqdm import tqdm

    return tqdm(
        total=now.total,
        # A resumed run begins where it stands: the bar's speed is of this process alone.
        initial=now.done - 1 if now.stage == "training" else 0,
        desc=now.stage,
        unit=f" {now.unit}",
        unit_scale=now.stage not in WHOLE,
        disable=None,  # no bar where stderr is a file
    )


def _is_time(bar: "tqdm[NoReturn]") -> bool:
    # Reading a number waits for the device; as often as the bar is drawn is cheap.
    return time.time() - bar.last_print_t >= bar.mininterval


def _glance(report: "StepReport") -> str:
    """Return L0 and loss over the SAEs that learn, lowest to highest."""
    learning = [sae for sae in report.saes if sae.loss is not None]
    if not learning:
        return "no SAE learns"
    l0 = sorted(sae.l0 for sae in learning)
    loss = sorted(float(sae.loss.total) for sae in learning if sae.loss is not None)
    return f"L0 {l0[0]:.3g} to {l0[-1]:.3g}, loss {loss[0]:.3g} to {loss[-1]:.3g}"


def _pull(command: Pull) -> None:
    """Fetch an SAE and make a run of it, or list what there is."""
    repository = look(parse_address(command.address))
    if repository.renamed:
        say(repository.renamed)
    if command.list:
        show(*report.listing(repository))
        return
    sae = one_sae(repository)
    root = runs_root()
    folder = command.to or root / free_name(root, run_name(repository.repo, sae.path))
    new_run_folder(folder.absolute().parent, folder.name)
    place = {"model": command.model, "layer": command.layer, "site": command.site}
    request = plan_pull(repository, sae, to=folder.name, **place)
    count = f"{len(sae.files)} file{'s' * (len(sae.files) > 1)}"
    say(
        f"{sae.path or repository.repo}: {sae.library}, {count}, {readable(sae.n_bytes)}, "
        f"commit {repository.commit[:12]}"
    )
    _transfer(ask(folder.absolute().parent, request))


def _push(command: Push) -> None:
    from gsae_core.runs.work.publish import check_token, pack

    run = Run.open(command.run)
    request = PushRequest(run.id, command.sae, command.to, command.public)
    parcel = pack(run, request.saes, request.repo, public=request.public)
    check_token()
    say(f"{len(parcel.files)} files, {readable(parcel.n_bytes)}, to {parcel.repo}")
    for note in parcel.notes:
        say(note)
    _transfer(ask(run.folder.parent, request))


def _transfer(transfer: Transfer) -> None:
    """Do a transfer, or what is left of it."""
    from gsae_core.runs.work.transfer import work

    if transfer.status.state == "finished":
        raise InputError(
            f"expected a transfer that is not done, got one that led to {transfer.result}; give "
            "its command again to do it anew"
        )
    if _follow(work(transfer)) != "finished":
        raise Ended(
            INTERRUPTED,
            f"stopped; what came is kept: give the same command again, or {PROGRAM} resume "
            f"{transfer.folder}",
        )
    result = str(transfer.result)
    show(f"run {transfer.root / result}" if transfer.is_pull else result)


MOST_MISUNDERSTOOD = 3
"""Answers in a row that are not understood before no more is asked: the others would not be."""


def _label(command: Label) -> int:
    """Label features of a run's SAE; return the exit code, 1 if some could not be labelled.

    What is labelled is kept, also where an error or Ctrl-C ends this.
    """
    from gsae_core.analysis.autointerp import RemoteWriter

    if command.with_ is None:
        raise InputError(
            "expected --with MODEL, got none; give a folder or the name of a model on this "
            "machine, or with --remote the name of one at the address in OPENAI_BASE_URL"
        )
    run = Run.open(command.run)
    name = command.sae or report.only_sae(run)
    index = run.features(name)
    if is_example(run):
        # Where the Features page keeps them: the example itself is only read.
        index.labels = Labels(labels_folder(runs_root().absolute(), name))
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
    writer = RemoteWriter(command.with_) if command.remote else _local(command.with_, device)
    say(_announcement(command, index, writer, len(asked)))
    done, failed = [], {}
    try:
        _follow(_labelling(command, index, writer, asked, done, failed))
    except KeyboardInterrupt:
        again = "the same command goes on from there"
        if command.again:
            labelled = {said.feature for said in done}
            rest = " ".join(str(number) for number in asked if number not in labelled)
            again = f"for the others give --again --features {rest}"
        say(f"stopped after {len(done)} of {len(asked)}; {again}")
        return INTERRUPTED
    finally:
        if done:
            show("feature  score  label")
        for said in done:
            show(f"{said.feature:<7}  {fixed(said.score, 2):>5}  {said.text}")
        for number, sentence in failed.items():
            say(f"feature {number}: {sentence}")
    if len(done) + len(failed) < len(asked):
        say(
            f"stopped after {MOST_MISUNDERSTOOD} answers in a row that were not understood; try "
            "another model, or --score none"
        )
    return FAILURE if failed else 0


def _chosen(command: Label, index: "FeatureIndex") -> list[int]:
    """Return the features to label, each once and none of them dead."""
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


def _local(name: str, device: str) -> "LocalWriter":
    """Return a model on this machine; nothing is fetched."""
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


def _labelling(
    command: Label,
    index: "FeatureIndex",
    writer: "LocalWriter | RemoteWriter",
    asked: Sequence[int],
    done: list[Annotation],
    failed: dict[int, str],
) -> Iterator[Progress]:
    """Label one feature after another, and yield how many; `done` and `failed` grow."""
    from gsae_core.analysis.autointerp import NotLabelled, NotUnderstood, label_feature

    by = None if command.score == "none" else command.score
    misunderstood = 0
    for i, number in enumerate(asked):
        yield Progress("labelling", i, len(asked), "feature")
        try:
            done.append(label_feature(index.feature(number), writer, by=by))
            misunderstood = 0
        except NotLabelled as error:
            failed[number] = str(error)
            misunderstood += isinstance(error, NotUnderstood)
        if misunderstood == MOST_MISUNDERSTOOD:
            return
    yield Progress("labelling", len(asked), len(asked), "feature")
