"""A run from its config to its files: model, corpus, stream, training, evaluation.

What a worker process does. It reports through the run folder and yields its progress, so that a
command line may draw it. Killed at any line and started again, it ends with the same bits.
"""

import contextlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from gsae_core.analysis.fidelity import Evaluation, evaluating, n_sequences
from gsae_core.config import EvalConfig, Positions, SAESpec
from gsae_core.errors import InputError
from gsae_core.learning import learn
from gsae_core.lm.corpus import Corpus
from gsae_core.lm.model import LanguageModel
from gsae_core.machine import slot_of
from gsae_core.sae.metrics import Metrics
from gsae_core.store.checkpoint import check_width, load_sae, read_cfg
from gsae_core.store.evals import (
    EvalRow,
    write_evals,
    write_feature_stats,
    write_norm_deciles,
    write_tokens,
)
from gsae_core.store.runs import Run
from gsae_core.store.status import lock
from gsae_core.store.worker import Worker
from gsae_core.training.report import StepReport
from gsae_core.workshop import Bench, check_held_out, load_lm, load_text, save_saes, set_up

Stage = Literal["waiting", "loading", "training", "evaluating", "finished", "cancelled"]


class Progress(NamedTuple):
    """How far a run is: runs ahead of it, steps (with the last one's report), tokens evaluated."""

    stage: Stage
    done: int
    total: int
    report: StepReport | None = None


def train_run(run: Run, *, worker: Worker | None = None) -> Iterator[Progress]:
    """Train a run from where it stands, evaluate it, and yield progress; files tell the rest.

    A run whose device trains another one waits for its turn. A request to stop (control.json,
    SIGTERM, Ctrl-C, or closing this iterator) ends it after the step, saved, in state `cancelled`.

    Args:
        run: not finished.
        worker: holds the run and its device already; it is the caller's to end.

    Raises:
        InputError: while iterating, for what a person can mend; status.json then says it too.
    """
    if worker is not None:
        yield from _train_and_evaluate(run, worker)
        return
    with Worker(run) as worker:
        for ahead in worker.turn(slot_of(run.config.device)):
            yield Progress("waiting", 0, ahead)
        yield from _train_and_evaluate(run, worker)


def _train_and_evaluate(run: Run, worker: Worker) -> Iterator[Progress]:
    n_steps = run.config.train.n_steps
    if not worker.stop_requested:
        with _sentences_about_memory():
            worker.enter("loading", total=0)
            yield Progress("loading", worker.step, n_steps)
            bench = set_up(run)
            for report in learn(run, bench, worker):
                yield Progress("training", report.step, report.n_steps, report)
            save_saes(run, bench)
            if bench.trainer.finished:
                _refuse_if_all_stopped(bench)
                model, corpus = bench.model, bench.corpus
                del bench  # Optimiser states and a chunk of activations: room for the evaluation.
                wanted = run.config.evaluation
                worker.enter("evaluating", total=_n_measured(corpus, wanted))
                for progress in _evaluate(run, model, corpus, run.config.evaluation):
                    worker.done = progress.done
                    if worker.stop_requested:
                        break
                    yield progress
                else:
                    yield Progress("finished", n_steps, n_steps)
                    return
    worker.outcome = "cancelled"
    yield Progress("cancelled", worker.step, n_steps)


def evaluate_run(
    run: Run, *, n_tokens: int | None = None, replace: Positions | None = None
) -> Iterator[Progress]:
    """Measure a run's saved SAEs on held-out tokens again, replace evals.json, yield progress.

    Args:
        run: has saved SAEs; need not be finished.
        n_tokens: held-out tokens; None takes the run's number.
        replace: where the model reads reconstructions; None takes the run's choice.

    Raises:
        InputError: while iterating: no or damaged SAEs, another process holds the run, or its text
            is no longer the one it was trained on.
    """
    from filelock import Timeout

    held = lock(run.folder, "worker")
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"expected a run that no process is training, got {run.id}; wait until it has finished"
        ) from None
    with held, _sentences_about_memory():
        asked = {"n_tokens": n_tokens, "replace": replace}
        wanted = run.config.evaluation.model_copy(
            update={name: value for name, value in asked.items() if value is not None}
        )
        yield Progress("loading", 0, wanted.n_tokens)
        model = load_lm(run.config)
        corpus = load_text(run.config, model, n_held_out=wanted.n_tokens)
        check_held_out(run, corpus)
        yield from _evaluate(run, model, corpus, wanted)
        yield Progress("finished", wanted.n_tokens, wanted.n_tokens)


def _evaluate(
    run: Run, model: LanguageModel, corpus: Corpus, wanted: EvalConfig
) -> Iterator[Progress]:
    """Measure the saved SAEs, as everyone else will load them, and write what was found."""
    cfg = run.config
    specs, saes = [], []
    for spec in cfg.saes:
        folder = run.sae_folder(spec.name)
        sae = load_sae(folder)
        check_width(sae, model.width(cfg.model.site), name=spec.name, hook_name=cfg.model.hook_name)
        reason = (read_cfg(folder).get("metadata") or {}).get("stopped")
        if reason is not None:
            run.add_event("not evaluated", sae=spec.name, why=reason)
            continue
        specs.append(spec)
        saes.append(sae.to(model.device))
    total = _n_measured(corpus, wanted)
    steps = evaluating(
        model,
        saes,
        corpus.held_out,
        layer=cfg.model.layer,
        site=cfg.model.site,
        n_tokens=wanted.n_tokens,
        replace=wanted.replace,
    )
    evaluations = yield from _progress(steps, total)
    rows = []
    for spec, sae, evaluation in zip(specs, saes, evaluations, strict=True):
        rows.append(_eval_row(spec, sae.d_in, evaluation, wanted, corpus.shortage))
        _write_latents(run.sae_folder(spec.name), evaluation.metrics)
        deciles = [decile._asdict() for decile in evaluation.norms.deciles()]
        write_norm_deciles(run.sae_folder(spec.name), deciles)
    ids, counted = corpus.held_out[: n_sequences(corpus.held_out, wanted.n_tokens)]
    write_tokens(run.folder, ids.numpy(), counted.numpy())
    write_evals(run.folder, rows)


def _n_measured(corpus: Corpus, wanted: EvalConfig) -> int:
    """Return how many held-out tokens an evaluation takes, to the sequence."""
    return min(wanted.n_tokens, corpus.n_held_out_tokens)


def _progress(
    steps: Generator[int, None, list[Evaluation]], total: int
) -> Generator[Progress, None, list[Evaluation]]:
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        yield Progress("evaluating", min(done, total), total)


def _eval_row(
    spec: SAESpec, d_in: int, evaluation: Evaluation, wanted: EvalConfig, shortage: str
) -> EvalRow:
    losses, metrics = evaluation.fidelity, evaluation.metrics
    return EvalRow(
        name=spec.name,
        architecture=spec.architecture,
        sparsity=spec.sparsity,
        d_in=d_in,
        d_sae=spec.d_sae,
        l0=metrics.l0,
        loss_recovered=losses.loss_recovered,
        ce_clean=losses.ce_clean,
        ce_sae=losses.ce_sae,
        ce_zero=losses.ce_zero,
        kl=losses.kl,
        gamma=metrics.gamma,
        gamma_gate=metrics.gamma_gate,
        fvu=metrics.fvu,
        cosine=metrics.cosine,
        alive_fraction=metrics.alive_fraction,
        n_tokens=metrics.n_tokens,
        n_tokens_asked=wanted.n_tokens,
        shortage=shortage if metrics.n_tokens < wanted.n_tokens else None,
        n_predictions=losses.n_tokens,
        zeroed="all",
        replaced=wanted.replace,
    )


def _write_latents(folder: Path, metrics: Metrics) -> None:
    fired = metrics.firings.numpy()
    sums = metrics.sums
    opened = None if sums is None else sums.gate_open
    write_feature_stats(
        folder,
        fired=fired,
        gate_open=fired if opened is None else opened.cpu().numpy(),
        density=metrics.density.numpy(),
        gamma=metrics.gamma_per_feature.numpy(),
    )


def _refuse_if_all_stopped(bench: Bench) -> None:
    if len(bench.stopped) == len(bench.trainer.saes):
        name, reason = next(iter(bench.stopped.items()))
        raise InputError(
            f"expected an SAE that learns to the end, got none: {name} stopped at {reason}; lower "
            "the learning rate and start a new run"
        )


@contextlib.contextmanager
def _sentences_about_memory() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        # On the CPU the same failure comes as a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise InputError(
            "expected more memory than the device has left; lower the batch size, the width or the "
            f"number of SAEs ({str(error).partition(chr(10))[0]})"
        ) from error
