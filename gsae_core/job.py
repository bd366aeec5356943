"""A run from its config to its files: model, corpus, stream, training, evaluation.

What a worker process does. It reports through the run folder and yields its progress, so that a
command line may draw it. Killed at any line and started again, it ends with the same bits.
"""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from gsae_core.analysis.fidelity import Evaluation, evaluating
from gsae_core.config import RunConfig, SAESpec
from gsae_core.errors import InputError
from gsae_core.lm.corpus import Corpus
from gsae_core.lm.model import LanguageModel
from gsae_core.sae.metrics import Metrics
from gsae_core.store.checkpoint import check_width, load_sae, read_cfg
from gsae_core.store.evals import EvalRow, write_evals, write_feature_stats, write_norm_deciles
from gsae_core.store.metrics_log import MetricsLog
from gsae_core.store.resume import has_state, load_state, save_state
from gsae_core.store.runs import Run
from gsae_core.store.status import lock
from gsae_core.store.worker import Worker
from gsae_core.training.report import StepReport
from gsae_core.training.trainer import train
from gsae_core.workshop import Bench, load_lm, load_text, save_saes, set_up

Stage = Literal["loading", "training", "evaluating", "finished", "cancelled"]

# Enough points for a chart as wide as a screen, few enough that a page reads them in one go.
LOGGED_POINTS = 300


class Progress(NamedTuple):
    """How far a run is: steps while training (with the last one's report), tokens evaluated."""

    stage: Stage
    done: int
    total: int
    report: StepReport | None = None


def train_run(run: Run) -> Iterator[Progress]:
    """Train a run from where it stands, evaluate it, and yield progress; files tell the rest.

    A request to stop (control.json, SIGTERM, Ctrl-C, or closing this iterator) ends it after the
    step, saved, in state `cancelled`.

    Raises:
        InputError: while iterating, for whatever a person can mend; status.json then says it too.
    """
    n_steps = run.config.train.n_steps
    with Worker(run) as worker, _sentences_about_memory():
        yield Progress("loading", worker.step, n_steps)
        bench = set_up(run)
        yield from _train(run, bench, worker)
        save_saes(run, bench)
        if bench.trainer.finished:
            _refuse_if_all_stopped(bench)
            model, corpus = bench.model, bench.corpus
            del bench  # Optimiser states and a chunk of activations: room for the evaluation.
            for progress in _evaluate(run, model, corpus, run.config.evaluation.n_tokens):
                if worker.stop_requested:
                    break
                yield progress
            else:
                yield Progress("finished", n_steps, n_steps)
                return
        worker.outcome = "cancelled"
        yield Progress("cancelled", worker.step, n_steps)


def evaluate_run(run: Run, *, n_tokens: int | None = None) -> Iterator[Progress]:
    """Measure a run's saved SAEs on held-out tokens again, replace evals.json, yield progress.

    Args:
        run: has saved SAEs; need not be finished.
        n_tokens: held-out tokens; None takes the run's number.

    Raises:
        InputError: while iterating: no or damaged SAEs, or another process holds the run.
    """
    from filelock import Timeout

    held = lock(run.folder, "worker")
    try:
        held.acquire(blocking=False)
    except Timeout:
        raise InputError(
            f"expected a run that nobody is training, got {run.id}; wait until it has finished"
        ) from None
    with held, _sentences_about_memory():
        n_tokens = n_tokens or run.config.evaluation.n_tokens
        yield Progress("loading", 0, n_tokens)
        model = load_lm(run.config)
        yield from _evaluate(run, model, load_text(run.config, model), n_tokens)
        yield Progress("finished", n_tokens, n_tokens)


def _train(run: Run, bench: Bench, worker: Worker) -> Iterator[Progress]:
    """Take the steps that are left, log them, and save whenever it is time and at the end."""
    trainer = bench.trainer
    resume = run.folder / "resume"
    began, seconds_before, n_bytes = time.monotonic(), 0.0, 0
    if has_state(resume):
        state = load_state(resume)
        _check_data(state["mean_square_norm"], bench.stream.mean_square_norm)
        trainer.load_state_dict(state["trainer"])
        seconds_before, n_bytes = state["seconds"], state["metrics_bytes"]
        bench.stopped.update(state["stopped"])
        run.add_event("resumed", step=trainer.steps_done)
    worker.step = trainer.steps_done
    log = MetricsLog(run.folder / "metrics.jsonl", n_bytes=n_bytes)
    every = log_every(trainer.cfg.n_steps)

    def seconds() -> float:
        return seconds_before + time.monotonic() - began

    def save() -> None:
        state = {
            "trainer": trainer.state_dict(),
            "stopped": bench.stopped,
            "mean_square_norm": bench.stream.mean_square_norm,
            "seconds": seconds(),
            "metrics_bytes": log.sync(),
        }
        save_state(resume, state)

    with contextlib.closing(log):
        saved_at, saved_step = time.monotonic(), trainer.steps_done
        batches = bench.stream.batches(start=trainer.steps_done)
        try:
            for report in train(list(trainer.saes), batches, trainer.cfg, trainer=trainer):
                worker.step = report.step
                if report.step % every == 0 or report.step in (1, report.n_steps):
                    log.add(_rows(run.config, report, seconds()))
                for spec, sae in zip(run.config.saes, report.saes, strict=True):
                    if sae.stopped is not None and spec.name not in bench.stopped:
                        bench.stopped[spec.name] = sae.stopped
                        run.add_event("sae stopped", sae=spec.name, why=sae.stopped)
                if time.monotonic() - saved_at >= 60 * run.config.checkpoint_minutes:
                    save()
                    saved_at, saved_step = time.monotonic(), report.step
                yield Progress("training", report.step, report.n_steps, report)
                if worker.stop_requested:
                    break
        except GeneratorExit:
            save()
            raise
        # Not after other exceptions: some SAEs may have taken the step and others not.
        if trainer.steps_done > saved_step:
            save()


def log_every(n_steps: int) -> int:
    """Return how many steps lie between two logged points."""
    return max(1, round(n_steps / LOGGED_POINTS))


def _evaluate(run: Run, model: LanguageModel, corpus: Corpus, n_tokens: int) -> Iterator[Progress]:
    """Measure the saved SAEs, as everyone else will load them, and write what was found."""
    cfg = run.config
    specs, saes = [], []
    for spec in cfg.saes:
        folder = run.sae_folder(spec.name)
        sae = load_sae(folder)
        check_width(sae, model.width(cfg.model.site), name=spec.name, hook_name=cfg.model.hook_name)
        reason = read_cfg(folder)["metadata"]["stopped"]
        if reason is not None:
            run.add_event("not evaluated", sae=spec.name, why=reason)
            continue
        specs.append(spec)
        saes.append(sae.to(model.device))
    total = min(n_tokens, corpus.n_held_out_tokens)
    steps = evaluating(
        model,
        saes,
        corpus.held_out,
        layer=cfg.model.layer,
        site=cfg.model.site,
        n_tokens=n_tokens,
    )
    evaluations = yield from _progress(steps, total)
    rows = []
    for spec, sae, evaluation in zip(specs, saes, evaluations, strict=True):
        rows.append(_eval_row(spec, sae.d_in, evaluation))
        _write_latents(run.sae_folder(spec.name), evaluation.metrics)
        deciles = [decile._asdict() for decile in evaluation.norms.deciles()]
        write_norm_deciles(run.sae_folder(spec.name), deciles)
    write_evals(run.folder, rows)


def _progress(
    steps: Generator[int, None, list[Evaluation]], total: int
) -> Generator[Progress, None, list[Evaluation]]:
    while True:
        try:
            done = next(steps)
        except StopIteration as end:
            return end.value
        yield Progress("evaluating", min(done, total), total)


def _eval_row(spec: SAESpec, d_in: int, evaluation: Evaluation) -> EvalRow:
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


def _rows(cfg: RunConfig, report: StepReport, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for spec, sae in zip(cfg.saes, report.saes, strict=True):
        if sae.loss is None:
            continue
        rows.append(
            {
                "step": report.step,
                "tokens": report.tokens,
                "seconds": round(seconds, 3),
                "sae": spec.name,
                "loss": float(sae.loss.total),
                "reconstruction": float(sae.loss.reconstruction),
                "sparsity_loss": float(sae.loss.sparsity),
                "auxiliary": float(sae.loss.auxiliary),
                "l0": sae.l0,
                "fvu": sae.fvu,
                "gamma": sae.gamma,
                "gamma_gate": sae.gamma_gate,
                "dead_gate": sae.gate_dead_fraction,
                "dead_magnitude": sae.magnitude_dead_fraction,
                "lr": sae.lr,
                "sparsity_coeff": sae.sparsity_coeff,
            }
        )
    return rows


def _check_data(saved: float, found: float) -> None:
    # One number sums up the activations; rounding may differ between machines, data may not.
    if not math.isclose(saved, found, rel_tol=1e-4):
        raise InputError(
            f"expected the activations this run began with (E|x|^2 = {saved:.6g}), got others "
            f"({found:.6g}); the model or the corpus has changed, so start a new run"
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
