"""The steps of a run: taken, logged, sampled and saved, from where the run stands."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

from gsae_core.config import RunConfig
from gsae_core.errors import InputError
from gsae_core.samples import Sampler
from gsae_core.store.metrics_log import MetricsLog
from gsae_core.store.resume import has_state, load_state, save_state
from gsae_core.store.runs import Run
from gsae_core.store.worker import Worker
from gsae_core.training.report import StepReport
from gsae_core.training.trainer import train
from gsae_core.workshop import Bench

# Enough points for a chart as wide as a screen, few enough that a page reads them in one go.
LOGGED_POINTS = 300


def learn(run: Run, bench: Bench, worker: Worker) -> Iterator[StepReport]:
    """Take the steps that are left, log them, and save whenever it is time and at the end.

    Raises:
        InputError: while iterating: other data than before, or a full or read-only disk.
    """
    trainer = bench.trainer
    clock = _Clock(bench)
    n_bytes = _take_up(run, bench, clock)
    worker.step = trainer.steps_done
    worker.enter("training", total=trainer.cfg.n_steps, done=trainer.steps_done)
    log = MetricsLog(run.folder / "metrics.jsonl", n_bytes=n_bytes)
    sampler = Sampler(run, bench)
    every = log_every(trainer.cfg.n_steps)

    def note_stopped() -> None:
        # As far as is known without waiting for the device, which hears of a step late.
        for spec, why in zip(run.config.saes, trainer.stopped, strict=True):
            if why is not None and spec.name not in bench.stopped:
                bench.stopped[spec.name] = why
                run.add_event("sae stopped", sae=spec.name, why=why)

    def save() -> None:
        trainer.settle()
        note_stopped()
        state = {
            "trainer": trainer.state_dict(),
            "stopped": bench.stopped,
            "mean_square_norm": bench.stream.mean_square_norm,
            "seconds": clock.seconds,
            "seconds_lm": clock.seconds_lm,
            "metrics_bytes": log.sync(),
        }
        save_state(run.folder / "resume", state)

    with contextlib.closing(log):
        saved_at, saved_step = time.monotonic(), trainer.steps_done
        batches = bench.stream.batches(start=trainer.steps_done)
        try:
            for report in train(list(trainer.saes), batches, trainer.cfg, trainer=trainer):
                worker.step = worker.done = report.step
                if report.step % every == 0 or report.step in (1, report.n_steps):
                    times = {"seconds": clock.seconds, "seconds_lm": clock.seconds_lm}
                    log.add(_rows(run.config, report, **times))
                sampler.see(report.step)
                note_stopped()
                if time.monotonic() - saved_at >= 60 * run.config.checkpoint_minutes:
                    save()
                    saved_at, saved_step = time.monotonic(), report.step
                yield report
                if worker.stop_requested:
                    break
        except GeneratorExit:
            save()
            raise
        # Not after other exceptions: some SAEs may have taken the step and others not.
        if trainer.steps_done > saved_step:
            save()


class _Clock:
    """Wall-clock seconds of training, and the language model's share, over all resumes."""

    def __init__(self, bench: Bench) -> None:
        self.before, self.lm_before = 0.0, 0.0
        self._stream = bench.stream
        # Setting up measured the scale: not part of training, and done anew on every resume.
        self._began, self._lm_began = time.monotonic(), bench.stream.seconds_harvesting

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self._began

    @property
    def seconds_lm(self) -> float:
        return self.lm_before + self._stream.seconds_harvesting - self._lm_began


def _take_up(run: Run, bench: Bench, clock: _Clock) -> int:
    """Bring trainer and clock to where the run was saved; return how much of its log stands."""
    if not has_state(run.folder / "resume"):
        return 0
    state = load_state(run.folder / "resume")
    _check_data(state["mean_square_norm"], bench.stream.mean_square_norm)
    bench.trainer.load_state_dict(state["trainer"])
    clock.before = state["seconds"]
    clock.lm_before = state.get("seconds_lm", 0.0)  # states of older versions have none
    bench.stopped.update(state["stopped"])
    run.add_event("resumed", step=bench.trainer.steps_done)
    return state["metrics_bytes"]


def log_every(n_steps: int) -> int:
    """Return how many steps lie between two logged points."""
    return max(1, round(n_steps / LOGGED_POINTS))


def _rows(
    cfg: RunConfig, report: StepReport, *, seconds: float, seconds_lm: float
) -> list[dict[str, Any]]:
    rows = []
    for spec, sae in zip(cfg.saes, report.saes, strict=True):
        if sae.loss is None:
            continue
        rows.append(
            {
                "step": report.step,
                "tokens": report.tokens,
                "seconds": round(seconds, 3),
                "seconds_lm": round(seconds_lm, 3),
                "seconds_sae": round(report.seconds, 3),
                "sae": spec.name,
                "loss": float(sae.loss.total),
                "reconstruction": float(sae.loss.reconstruction),
                "sparsity_loss": float(sae.loss.sparsity),
                "auxiliary": float(sae.loss.auxiliary),
                **({} if sae.n_candidates is None else {"screen_ratio": sae.screen_ratio}),
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
