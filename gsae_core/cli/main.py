"""`python -m gsae_core ...`: the only module that prints."""

import contextlib
import secrets
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gsae_core.analysis.features.files import read_manifest
from gsae_core.analysis.pareto import matched_ratio
from gsae_core.cli import commands
from gsae_core.cli.arguments import (
    PROGRAM,
    Command,
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
from gsae_core.cli.report import evals_table, time_spent
from gsae_core.config import EvalConfig, validated
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.machine import slot_of
from gsae_core.runs.evals import averaged, measure_again, measured_earlier, measured_on, positions
from gsae_core.runs.jobs.job import Job
from gsae_core.runs.jobs.worker import Worker
from gsae_core.runs.launch import run_id
from gsae_core.runs.run import Run, runs_root
from gsae_core.runs.work.index import index_folder
from gsae_core.runs.work.transfer import Transfer, is_transfer
from gsae_core.schedule import shortfalls_of_run

if TYPE_CHECKING:
    from tqdm import tqdm

    from gsae_core.runs.work.index import Progress as IndexProgress
    from gsae_core.runs.work.train import Progress
    from gsae_core.runs.work.transfer import Progress as HubProgress
    from gsae_core.training.report import StepReport

MISTAKE = 2
FAILURE = 1
INTERRUPTED = 130

UNITS = {
    "training": "step",
    "evaluating": "token",
    "indexing": "token",
    "downloading": "byte",
    "labelling": "feature",
}
WHOLE = ("training", "labelling")
"""Stages of few enough units to be counted in full."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return the exit code: 0, or 2 for a mistake, said in one sentence.

    Args:
        argv: the words after the program; None takes the process's own.
    """
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        if words[:1] == ["bench"]:
            return _bench(words[1:])
        command: Command = parse(words)
        match command:
            case Train():
                return _train(command)
            case Resume():
                return _resume(command)
            case Evaluate():
                return _evaluate(command)
            case Index():
                return _index(command)
            case Label():
                return commands.label(command, **_screen())
            case Pull():
                return commands.pull(command, **_screen())
            case Push():
                return commands.push(command, **_screen())
            case Import() | ExportSAE() | List():
                return _exchange(command)
            case Doctor():
                return _doctor(command)
    except InputError as error:
        _say(" ".join(str(error).split()))
        return MISTAKE
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED


def _train(flags: Train) -> int:
    config = run_config(flags)
    run = Run.create(flags.out or runs_root() / run_id(config, secrets.token_hex(2)), config)
    print(f"run {run.folder}", flush=True)
    try:
        return _work(run)
    except InputError:
        # A mistake met before the first step leaves nothing that could be resumed, and the name
        # should be free for the corrected command.
        if run.status.step == 0:
            shutil.rmtree(run.folder)
        raise


def _resume(command: Resume) -> int:
    if is_transfer(command.run):
        return commands.go_on(Transfer(command.run.absolute()), **_screen())
    return _work(Run.open(command.run))


def _screen() -> dict[str, Any]:
    """Return how a command kept elsewhere shows itself: sentences, lines of the answer, bars."""
    return {"say": _say, "show": partial(print, flush=True), "follow": _follow}


def _work(run: Run) -> int:
    """Train a run to its end, or to where it is interrupted, once its device is free."""
    try:
        with Worker(run) as worker:
            _take_turn(run, worker)
            # After the wait: what is imported here fills memory.
            from gsae_core.runs.work.train import train_run

            # Not before the text has been read: what is wrong with it is then said alone.
            ahead = shortfalls_of_run(run.config)
            stage = _follow(train_run(run, worker=worker), before_training=ahead)
    except KeyboardInterrupt:
        stage = "cancelled"
    except InputError:
        raise
    except Exception as error:
        return _unexpected(run, error)  # the worker has put the traceback into the log
    if stage != "finished":
        status = run.status
        _say(
            f"stopped after step {status.step} of {status.n_steps}; go on with: "
            f"{PROGRAM} resume {run.folder}"
        )
        return INTERRUPTED
    _report(run)
    return 0


def _take_turn(run: Run, worker: Worker) -> None:
    """Wait until no other run of this folder trains on the device; say so once."""
    slot = slot_of(run.config.device)
    for n, ahead in enumerate(worker.turn(slot)):
        if n == 0:
            runs = "1 run goes" if ahead == 1 else f"{ahead} runs go"
            _say(f"waiting for {slot}: {runs} first; Ctrl-C leaves the line")


def _evaluate(command: Evaluate) -> int:
    from gsae_core.runs.work.train import evaluate_run

    run = Run.open(command.run)
    if command.tokens is not None:
        validated(EvalConfig, {"n_tokens": command.tokens}, {"n_tokens": "--tokens"})
    try:
        _follow(evaluate_run(run, n_tokens=command.tokens, replace=command.replace))
    except (InputError, KeyboardInterrupt):
        raise
    except Exception as error:
        with (run.folder / "log.txt").open("a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
        return _unexpected(run, error)
    _report(run)
    return 0


def _index(command: Index) -> int:
    from gsae_core.runs.work.index import index_run

    run = Run.open(command.run)
    names = [command.sae] if command.sae else [spec.name for spec in run.config.saes]
    for name in names:
        folder = index_folder(run, name)
        steps = index_run(run, name, n_tokens=command.tokens, split=command.split)
        try:
            stage = _follow(steps)
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:
            return _unexpected(Job(folder), error)  # the worker has put the traceback into the log
        if stage != "finished":
            _say(f"stopped; go on with: {PROGRAM} index {run.folder} --sae {name}")
            return INTERRUPTED
        manifest = read_manifest(folder)
        print(
            f"{name}: {manifest.amount()}, L0 {manifest.l0:.1f}, "
            f"{readable(manifest.n_bytes)} in {folder}",
            flush=True,
        )
    return 0


def _unexpected(run: Job, error: Exception) -> int:
    first = str(error).partition("\n")[0]
    _say(f"{type(error).__name__}: {first}; the traceback is in {run.folder / 'log.txt'}")
    return FAILURE


def _exchange(command: Import | ExportSAE | List) -> int:
    from gsae_core.cli.commands import lines

    for line in lines(command):
        print(line, flush=True)
    return 0


def _doctor(command: Doctor) -> int:
    from gsae_core.cli.doctor import examine

    failed = False
    for check in examine(command.runs):
        failed |= check.verdict == "bad"
        print(f"{check.verdict:<4}  {check.name:<16}  {check.found}", flush=True)
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


def _follow(
    progress: "Iterator[Progress | IndexProgress | HubProgress]",
    *,
    before_training: Sequence[str] = (),
) -> str:
    """Draw a bar for each stage until the work ends; return the last stage.

    Args:
        progress: closed at the end.
        before_training: sentences to say before the bar of that stage.
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
                elif stage in UNITS:
                    for sentence in before_training if stage == "training" else ():
                        _say(sentence)
                    bar = bars.enter_context(_bar(now))
            if bar is not None:
                bar.update(now.done - bar.n)
                report = getattr(now, "report", None)
                if report is not None and not bar.disable and _is_time(bar):
                    bar.set_postfix_str(_glance(report), refresh=False)
    return stage


def _bar(now: "Progress | IndexProgress | HubProgress") -> "tqdm[NoReturn]":
    from tqdm import tqdm

    return tqdm(
        total=now.total,
        # A resumed run begins where it stands: the bar's speed is of this process alone.
        initial=now.done - 1 if now.stage == "training" else 0,
        desc=now.stage,
        unit=f" {UNITS[now.stage]}",
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


def _report(run: Run) -> None:
    evals = run.evals()
    print("\n".join(["", *evals_table(evals), *_how_measured(run, evals), ""]))
    print(matched_ratio(evals).sentence)
    for sentence in time_spent(run.recent_metrics()):
        print(sentence)
    for event in run.events():
        if event["event"] == "sae stopped":
            print(f"{event['sae']} stopped: {event['why']}")
    print(f"the run is in {run.folder}", flush=True)


def _how_measured(run: Run, evals: list[dict[str, Any]]) -> list[str]:
    """Return what loss recovered means in a table that has it."""
    if not evals:
        return []
    on = f"measured on {measured_on(evals[0])}"
    if any(measured_earlier(row) for row in evals):
        return [on, measure_again(str(run.folder))]
    return [on, f"losses: {averaged(evals[0])}; {positions(evals[0])}"]


def _say(sentence: str) -> None:
    print(f"gsae_core: {sentence}", file=sys.stderr, flush=True)
