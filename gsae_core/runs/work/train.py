"""A run from its config to its files: model, corpus, stream, training, evaluation.

What a worker process does. It reports through the run folder and yields its progress, so that a
command line may draw it. Killed at any line and started again, it ends with the same bits.
"""

import contextlib
import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gsae_core.analysis.fidelity import (
    Evaluation,
    evaluating,
    evaluating_vectors,
    n_sequences,
)
from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.config import DataConfig, EvalConfig, Place, Positions, RunConfig, SAESpec, given
from gsae_core.errors import InputError
from gsae_core.files import read_json, replace_durably, sha256, write_json
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel
from gsae_core.lm.stream import SCALE_VECTORS
from gsae_core.lm.vectors import VectorSource
from gsae_core.machine import slot_of
from gsae_core.norms import lengths
from gsae_core.runs.evals import EvalRow, write_arrays, write_evals
from gsae_core.runs.jobs.job import holding
from gsae_core.runs.jobs.worker import perform
from gsae_core.runs.metrics_log import MetricsLog
from gsae_core.runs.plan.cost import state_bytes
from gsae_core.runs.run import Run, read_added, trained_folder
from gsae_core.runs.track import Mirror
from gsae_core.runs.work.samples import Sampler
from gsae_core.runs.work.setup import (
    RunSetup,
    another_text,
    check_held_out,
    harvest_of,
    learning,
    load_elsewhere,
    load_lm,
    load_source,
    load_text,
    on_device_here,
    save_saes,
    set_up,
    state_folder,
)
from gsae_core.sae.base import SAE, check_width
from gsae_core.text import Progress
from gsae_core.training.learner import SPOILT
from gsae_core.training.trainer import StepReport, train

# Enough points for a chart as wide as a screen, few enough that a page reads them in one go.
LOGGED_POINTS = 300


def train_run(run: Run, *, device: str | None = None) -> Iterator[Progress]:
    """Train a run from where it stands, evaluate it, and yield progress; files tell the rest.

    A run whose device trains another one waits for its turn. A request to stop, or closing this
    iterator, ends it after the step, saved, in state `cancelled`. An `InputError` while iterating
    is said in status.json too. `device`: None takes the run's; of a run that began on another
    machine, what this one has in its place.
    """
    run = run.on(device)
    return perform(run, train_and_evaluate(run), slot=slot_of(run.config.device))


def train_and_evaluate(run: Run) -> Iterator[Progress]:
    """Do what `train_run` does, held by a worker whose device is free."""
    yield Progress("loading", 0, 0, run.config.unit)
    run = on_device_here(run)
    with _sentences_about_memory(), contextlib.closing(Mirror(run)) as mirror:
        part = learning(run)
        setup = set_up(part, beside=run.config.places)
        try:
            yield from _learn(part, setup, mirror)
        except GeneratorExit:
            if not run.config.train.extended:  # else what was finished stays until it is longer
                save_saes(part, setup)
            raise
        save_saes(part, setup)
        if part is run and len(setup.stopped) == len(setup.trainer.saes):
            name, reason = next(iter(setup.stopped.items()))
            spoilt = reason.endswith(SPOILT)
            mend = "give the model float32" if spoilt else "lower the learning rate"
            raise InputError(
                f"expected an SAE that learns to the end, got none: {name} stopped at {reason}; "
                f"{mend} and start a new run"
            )
        model, corpus = setup.model, setup.corpus
        del setup  # Optimiser states and a chunk of activations: room for the evaluation.
        yield from _evaluate(run, model, corpus.held_out, run.config.evaluation)
        mirror.add_evaluation()
        join_added(run, n_bytes=state_bytes(run.config, model.width))


def join_added(run: Run, *, n_bytes: int) -> None:
    """Make one resumable state of the run's and of that of added SAEs, if there are any."""
    if read_added(run) is None:
        return
    whole, added = load_state(run.folder / "resume"), load_state(run.folder / "extend")
    saes = whole["trainer"]["saes"]
    if len(saes) < len(run.config.saes):
        saes.extend(added["trainer"]["saes"])
        # Of a place that only added ones read, what was measured and pooled there.
        theirs = learning(run).config.places
        norms = whole.setdefault("mean_square_norms", [whole["mean_square_norm"]])
        pools = [added["trainer"]["pool"], *added["trainer"]["pools_beside"]]
        for place in run.config.places[len(norms) :]:
            norms.append(added["mean_square_norms"][theirs.index(place)])
            beside = whole["trainer"].setdefault("pools_beside", [])
            beside.append(pools[theirs.index(place)])
        whole["stopped"] |= added["stopped"]
        whole["metrics_bytes"] = added["metrics_bytes"]
        save_state(run.folder / "resume", whole, n_bytes=n_bytes)
    shutil.rmtree(run.folder / "extend")


def _learn(run: Run, setup: RunSetup, mirror: Mirror) -> Iterator[Progress]:
    """Take and log the steps that are left; save from time to time, at the end and when closed."""
    trainer = setup.trainer
    before = _take_up(run, setup)
    # Over all resumes.
    began, lm_before = time.monotonic() - before.get("seconds", 0.0), before.get("seconds_lm", 0.0)
    n_steps = trainer.cfg.n_steps
    yield Progress("training", trainer.steps_done, n_steps, "step")
    sampler = Sampler(run, setup)
    added = read_added(run)
    kept = before.get("metrics_bytes", 0 if added is None else added.metrics_bytes)
    log = MetricsLog(run.folder / "metrics.jsonl", n_bytes=kept)
    if run.config.track is not None:
        mirror.add(run.metrics())  # but for what the tracker holds
    every = log_every(n_steps)

    def seconds() -> dict[str, float]:
        now = {"seconds": time.monotonic() - began, "seconds_lm": lm_before + setup.seconds}
        return {name: round(value, 3) for name, value in now.items()}

    def note_stopped() -> None:
        for spec, why in zip(run.config.saes, trainer.stopped, strict=True):
            if why is not None and spec.name not in setup.stopped:
                setup.stopped[spec.name] = why
                run.add_event("sae stopped", sae=spec.name, why=why)

    def save() -> None:
        state = {
            "trainer": trainer.state_dict(),
            "stopped": setup.stopped,
            "scale_of": setup.stream.scale_of,
            "mean_square_norm": setup.stream.mean_square_norm,
            "mean_square_norms": list(setup.stream.mean_square_norms),
            **seconds(),
            "metrics_bytes": log.sync(),
        }
        n_bytes = state_bytes(run.config, setup.model.width)
        save_state(state_folder(run), state, n_bytes=n_bytes)

    with contextlib.closing(log):
        saved_at, saved_step = time.monotonic(), trainer.steps_done
        batches = setup.batches(trainer.steps_done)
        try:
            for report in train(list(trainer.saes), batches, trainer.cfg, trainer=trainer):
                if report.step % every == 0 or report.step in (1, n_steps):
                    rows = _rows(run.config, report, seconds())
                    log.add(rows)
                    mirror.add(rows)
                sampler.see(report.step)
                note_stopped()
                if time.monotonic() - saved_at >= 60 * run.config.checkpoint_minutes:
                    save()
                    saved_at, saved_step = time.monotonic(), report.step
                yield Progress("training", report.step, n_steps, "step", report)
        except GeneratorExit:
            save()
            raise
        # Not after other exceptions: some SAEs may have taken the step and others not.
        if trainer.steps_done > saved_step:
            save()


def _take_up(run: Run, setup: RunSetup) -> dict[str, Any]:
    """Bring the trainer to where the run was saved; return what else was saved, if anything."""
    folder = state_folder(run)
    if not (folder / "state.json").exists():
        return {}
    state = load_state(folder)
    # Earlier versions read one place alone.
    before = state.get("mean_square_norms", [state["mean_square_norm"]])
    # One number sums up a place's activations; rounding may differ between machines, data may not.
    for saved, found in zip(before, setup.stream.mean_square_norms, strict=True):
        if not math.isclose(saved, found, rel_tol=1e-4):
            raise InputError(
                f"expected the activations this run began with (E|x|^2 = {saved:.6g}), got others "
                f"({found:.6g}); the model or the corpus has changed, so start a new run"
            )
    setup.trainer.load_state_dict(state.pop("trainer"))  # large, and not kept
    setup.stopped.update(state["stopped"])
    run.add_event("resumed", step=setup.trainer.steps_done)
    return state


def save_state(folder: Path, state: dict[str, Any], *, n_bytes: int) -> None:
    """Write the state a run resumes from; the older one stays until the new one is on the disk.

    It holds tensors, numbers, strings, None, and dicts, lists and tuples of these: about `n_bytes`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob("state-*.pt"))
    turn = 1 + max((int(path.stem.removeprefix("state-")) for path in older), default=0)
    path = folder / f"state-{turn:06d}.pt"
    replace_durably(path, lambda sibling: torch.save(state, sibling), n_bytes=n_bytes)
    # Only this small file says which state counts, so a crash at any line leaves a whole one.
    pointer = {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
    # Known before the state is read, which is large. Earlier versions' scale was of all vectors.
    pointer |= {"scale_of": state["scale_of"]} if "scale_of" in state else {}
    write_json(folder / "state.json", pointer)
    # Half-written siblings are what a killed process leaves.
    for other in (*older, *folder.glob(".*.tmp")):
        other.unlink()


def load_state(folder: Path) -> dict[str, Any]:
    """Return what `save_state` wrote, its tensors on the CPU. Nothing in the file is executed."""
    pointer = read_json(folder / "state.json")
    path = folder / Path(str(pointer.get("file"))).name
    if not path.is_file() or sha256(path) != pointer.get("sha256"):
        raise InputError(
            f"expected the resumable state {path} as it was written, found none or other content; "
            f"delete the folder {folder} to train from step 0"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def log_every(n_steps: int) -> int:
    """Return how many steps lie between two logged points."""
    return max(1, round(n_steps / LOGGED_POINTS))


def _rows(cfg: RunConfig, report: StepReport, seconds: dict[str, float]) -> list[dict[str, Any]]:
    return [
        {
            "step": report.step,
            "tokens": report.tokens,
            **seconds,
            "seconds_sae": round(report.seconds, 3),
            "sae": spec.name,
            "loss": float(sae.loss.total),
            "reconstruction": float(sae.loss.reconstruction),
            "sparsity_loss": float(sae.loss.sparsity),
            "auxiliary": float(sae.loss.auxiliary),
            **({} if sae.n_candidates is None else {"screen_ratio": sae.screen_ratio}),
            **({} if sae.kl is None else {"kl": float(sae.kl)}),
            **{name: getattr(sae, name) for name in ("l0", "fvu", "gamma", "gamma_gate")},
            "dead_gate": sae.gate_dead_fraction,
            "dead_magnitude": sae.magnitude_dead_fraction,
            "lr": sae.lr,
            "sparsity_coeff": sae.sparsity_coeff,
        }
        for spec, sae in zip(cfg.saes, report.saes, strict=True)
        if sae.loss is not None
    ]


def evaluate_run(
    run: Run,
    *,
    n_tokens: int | None = None,
    replace: Positions | None = None,
    data: Mapping[str, Any] | None = None,
) -> Iterator[Progress]:
    """Measure a run's saved SAEs on held-out tokens again, replace evals.json, yield progress.

    `n_tokens` and `replace` are an `EvalConfig`'s; None takes those of the run. `data`: another
    text, `source` and other fields of a `DataConfig`; evals.json names it, and trackers are sent
    nothing.
    """
    busy = f"expected a run that no process is training, got {run.id}; wait until it has finished"
    with (
        holding(run.folder, busy),
        _sentences_about_memory(),
        contextlib.closing(Mirror(run, required=False)) as mirror,
    ):
        if run.config.track is not None:
            mirror.add(run.metrics())
        asked = given(n_tokens=n_tokens, replace=replace)
        wanted = run.config.evaluation.model_copy(update=asked)
        elsewhere = None if data is None else another_text(run, data)
        yield Progress("loading", 0, 0, run.config.unit)
        run = on_device_here(run)
        if elsewhere is None:
            model = load_source(run.config)
            corpus = load_text(run.config, model, n_held_out=wanted.n_tokens)
            check_held_out(run, corpus)
            yield from _evaluate(run, model, corpus.held_out, wanted)
            mirror.add_evaluation()
        else:
            model = load_lm(run.config)
            sequences = load_elsewhere(run.config, model, elsewhere, wanted.n_tokens)
            yield from _evaluate(run, model, sequences, wanted, elsewhere)
        yield Progress("finished", wanted.n_tokens, wanted.n_tokens, run.config.unit)


def _evaluate(
    run: Run,
    model: LanguageModel | VectorSource,
    held_out: SequenceSet,
    wanted: EvalConfig,
    elsewhere: DataConfig | None = None,
) -> Iterator[Progress]:
    """Measure the saved SAEs, as everyone else will load them, and write what was found.

    `elsewhere`: the text that the sequences are of, if it is not the run's.
    """
    cfg = run.config
    text = None if elsewhere is None else elsewhere.named
    yield Progress("evaluating", 0, min(wanted.n_tokens, held_out.n_tokens), cfg.unit)
    rows: dict[str, EvalRow] = {}
    for number, place in enumerate(cfg.places):
        specs, saes = _saved_at(run, place, model)
        harvest = harvest_of(model, held_out, place)
        told = {
            "n_tokens": wanted.n_tokens,
            "median_norm": _median_norm(run, specs, harvest),
            "max_norm_ratio": cfg.max_norm_ratio,
        }
        if isinstance(model, VectorSource):
            steps = evaluating_vectors(saes, harvest, **told)
        else:
            steps = evaluating(
                model, saes, held_out, **place._asdict(), replace=wanted.replace, **told
            )
        evaluations = yield from _share(steps, number, len(cfg.places))
        for spec, sae, evaluation in zip(specs, saes, evaluations, strict=True):
            row = _eval_row(cfg, spec, sae.d_in, evaluation, wanted)
            if text is not None and row.shortage is not None:
                row = row.model_copy(update={"shortage": "the text has no more"})
            rows[spec.name] = row.model_copy(update={"text": text})
            _write_measured(run.sae_folder(spec.name), evaluation)
    write_evals(run.folder, [rows[spec.name] for spec in cfg.saes if spec.name in rows])
    if isinstance(model, VectorSource) and not model.is_harvested:
        return  # no tokens
    read, counted = held_out[: n_sequences(held_out, wanted.n_tokens)]
    ids = read.numpy()
    ids = ids.astype(np.uint16 if ids.max(initial=0) < 2**16 else np.int32)
    columns = {"ids": ids, "counted": counted.numpy()}
    write_arrays(run.folder / "evaluated_tokens.safetensors", columns)


def _saved_at(
    run: Run, place: Place, model: LanguageModel | VectorSource
) -> tuple[list[SAESpec], list[SAE]]:
    """Return the SAEs of a place that learnt to the end, and note which did not."""
    specs, saes = [], []
    for spec in run.config.saes:
        if run.config.place(spec) != place:
            continue
        sae = load_sae(trained_folder(run, spec.name))
        check_width(sae, model.width(place.site), name=spec.name, hook_name=place.hook_name)
        if (reason := run.sae_metadata(spec.name).get("stopped")) is not None:
            run.add_event("not evaluated", sae=spec.name, why=reason)
            continue
        specs.append(spec)
        saes.append(sae.to(model.device))
    return specs, saes


def _median_norm(run: Run, specs: Sequence[SAESpec], held_out: Harvest) -> float | None:
    """Return the median of |x| that was met in training, or, where none was noted, is here."""
    if not specs or not held_out.sequences.n_tokens:
        return None
    if (noted := run.sae_metadata(specs[0].name).get("median_norm")) is not None:
        return noted
    which = np.arange(n_sequences(held_out.sequences, SCALE_VECTORS))
    return lengths(torch.cat([x.cpu() for x in held_out.vectors(which)])).median


def _share(
    steps: Generator[Progress, None, list[Evaluation]], number: int, n: int
) -> Generator[Progress, None, list[Evaluation]]:
    """Yield the progress of one of `n` equal parts of an evaluation as that of the whole."""
    while True:
        try:
            now = next(steps)
        except StopIteration as end:
            return end.value
        yield now._replace(done=(number * now.total + now.done) // n)


def _write_measured(folder: Path, evaluation: Evaluation) -> None:
    """Write what an evaluation measured of each latent and of each tenth of the tokens."""
    metrics = evaluation.metrics
    fired = metrics.firings.numpy()
    opened = None if metrics.sums is None else metrics.sums.gate_open
    columns = {
        "fired": fired,
        "gate_open": fired if opened is None else opened.cpu().numpy(),
        "density": metrics.density.numpy(),
        "gamma": metrics.gamma_per_feature.numpy(),
    }
    write_arrays(folder / "feature_stats.safetensors", columns)
    deciles = [decile._asdict() for decile in evaluation.norms.deciles()]
    write_json(folder / "norm_deciles.json", {"deciles": deciles})


# Why fewer were measured than asked for: vectors, or tokens.
NO_MORE = ("the folder holds out no more", "the held-out text has no more")


def _eval_row(
    cfg: RunConfig, spec: SAESpec, d_in: int, evaluation: Evaluation, wanted: EvalConfig
) -> EvalRow:
    losses, metrics = evaluation.fidelity, evaluation.metrics
    found, ratio = evaluation.outliers, cfg.max_norm_ratio
    told = found and {
        "n_outliers": found.n,
        "outlier_share": found.share,
        "fvu_ordinary": found.fvu,
    }
    n_read = metrics.n_tokens + (found.n if found and ratio else 0)
    of_losses = ("loss_recovered", "ce_clean", "ce_sae", "ce_zero", "kl")
    of_metrics = ("l0", "gamma", "gamma_gate", "fvu", "cosine", "alive_fraction", "n_tokens")
    return EvalRow(
        **spec.model_dump(include={"name", "architecture", "sparsity", "d_sae"}),
        **cfg.place(spec)._asdict(),
        **{name: getattr(losses, name) for name in of_losses},
        **{name: getattr(metrics, name) for name in of_metrics},
        d_in=d_in,
        n_tokens_asked=wanted.n_tokens,
        shortage=NO_MORE[losses.n_tokens > 0] if n_read < wanted.n_tokens else None,
        n_predictions=losses.n_tokens,
        zeroed="all",
        replaced=wanted.replace,
        max_norm_ratio=ratio,
        **(told or {}),
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
