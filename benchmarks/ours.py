"""Our own ways of doing each benchmark's work: `python -m benchmarks.ours JOB`."""

import importlib
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.serve import Job, Work, serve
from gsae_core.analysis.features.build import Part, build_index
from gsae_core.analysis.features.index import open_index
from gsae_core.checkpoints.checkpoint import load_sae
from gsae_core.config import Place, RunConfig, TrainConfig
from gsae_core.lm.corpus import SequenceSet
from gsae_core.lm.harvest import Harvest
from gsae_core.lm.model import LanguageModel, load_model
from gsae_core.lm.stream import ActivationStream
from gsae_core.runs.run import Run
from gsae_core.runs.work.train import train_run
from gsae_core.sae.architectures import BuiltinSAE, GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE
from gsae_core.sae.gpu.step import capacity_for, kernel_step
from gsae_core.sae.losses import StepResult, dense_step
from gsae_core.sae.sparse.codes import encode_sparse
from gsae_core.sae.sparse.dense import manual_dense_step
from gsae_core.sae.sparse.step import sparse_step
from gsae_core.training.trainer import Trainer

SITE = "resid_post"


def _sequences(job: Job) -> SequenceSet:
    return SequenceSet(load_file(job["tokens_file"])["ids"].numpy())


def harvest_and_encode(job: Job) -> Work:
    """Read every token and find what fires on it, and keep nothing."""
    model, sequences = load_model(job["model"], device=job["device"]), _sequences(job)
    sae = load_sae(job["sae_folder"]).to(job["device"])
    source = Harvest(model, sequences, layer=job["layer"], site=SITE)

    def run() -> dict[str, Any]:
        n, fired, began = 0, 0, time.process_time()
        encoded = source.through(lambda x: encode_sparse(sae, x), np.arange(len(sequences)))
        for codes in encoded:
            n, fired = n + len(codes.row_offsets) - 1, fired + codes.latent.numel()
        return {"l0": fired / n, "processor_s": time.process_time() - began}

    return Work(run)


def index(job: Job) -> Work:
    """Build the whole index, and open it."""
    model, sequences = load_model(job["model"], device=job["device"]), _sequences(job)
    sae = load_sae(job["sae_folder"]).to(job["device"])
    part = Part("train", sequences, len(sequences))

    def run() -> dict[str, Any]:
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            steps = build_index(
                model,
                sae,
                [part],
                Path(folder),
                layer=job["layer"],
                site=SITE,
                name="bench",
                text="stdlib",
                weights_sha256="0" * 64,
            )
            for _ in steps:
                pass
            manifest = open_index(folder).manifest
        seconds = time.process_time() - began
        return {"l0": manifest.l0, "disk_bytes": manifest.n_bytes, "processor_s": seconds}

    return Work(run)


# Pre-activations looked at at once: 128 MB of them.
CHUNK = 2**25


class Problem(NamedTuple):
    """A batch and the weights that every way starts from, magnitude path and gate alike."""

    x: Tensor
    """(batch, d_in), E|x|^2 = 1."""
    W_dec: Tensor
    """(d_sae, d_in), unit rows; the encoder is its transpose."""
    bias: Tensor
    """(d_sae,), of the gate and of the magnitudes: what keeps L0 where it is wanted."""


def make_problem(*, batch: int, d_in: int, d_sae: int, l0: float, seed: int = 0) -> Problem:
    """Return Gaussian inputs, random directions, and the one bias at which L0 is `l0`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, d_in, generator=generator) / d_in**0.5
    directions = torch.randn(d_sae, d_in, generator=generator)
    W_dec = directions / directions.norm(dim=1, keepdim=True)
    # A sample where the batch is wide: tables show the L0 of the whole batch, measured.
    some = x[: max(1, CHUNK // d_sae)]
    pre = (some @ W_dec.T).flatten()
    n_open = min(max(1, round(l0 * len(some))), len(pre) - 1)
    # The largest value that stays shut.
    threshold = pre.kthvalue(len(pre) - n_open).values
    return Problem(x=x, W_dec=W_dec, bias=-threshold.expand(d_sae).clone())


def measured_l0(x: Tensor, W_gate: Tensor, b_gate: Tensor) -> float:
    """Return the mean number of open gates, b_dec being zero."""
    rows = max(1, CHUNK // len(b_gate))
    n_open = sum(int((part @ W_gate + b_gate > 0).sum()) for part in x.split(rows))
    return n_open / len(x)


def save_problem(problem: Problem, path: Path) -> None:
    save_file(problem._asdict(), path)


def load_problem(path: str, device: str) -> Problem:
    return Problem(**load_file(path, device=device))


# So small that no weight of this size moves in float32: L0 stays what the problem sets it to, and
# every operation of a step is done all the same.
LR = 1e-12
SPARSITY = 0.1


def product(job: Job) -> Work:
    """The encoder's matrix product alone: the unit of the tables."""
    problem = load_problem(job["problem"], job["device"])
    W_gate = problem.W_dec.T.contiguous()

    def run() -> None:
        torch.mm(problem.x, W_gate)

    return Work(run)


def whole_step(job: Job) -> Work:
    """A step of the trainer: gradients, projection, Adam, renormalisation, counters."""
    problem = load_problem(job["problem"], job["device"])
    saes = [_sae(problem, job) for _ in range(job["saes"])]
    recipe = TrainConfig(
        # More steps than anybody waits for; none of them revives.
        n_tokens=10**6 * len(problem.x),
        batch_size=len(problem.x),
        lr=LR,
        lr_warmup_steps=0,
        sparsity_warmup_steps=0,
        revive_every=0,
        sparsity=(SPARSITY,),
        screened=job.get("screened", False),
    )
    trainer = Trainer(saes, recipe)

    def run() -> None:
        trainer.step(problem.x)

    def tidy() -> None:
        for sae in saes:
            sae.zero_grad(set_to_none=True)

    return Work(run, tidy, lambda: _l0(saes[0], problem))


def gradients(take_step: Callable[..., StepResult]) -> Callable[[Job], Work]:
    """Return the way that takes `take_step` alone: loss and gradients, no optimiser."""

    def prepare(job: Job) -> Work:
        problem = load_problem(job["problem"], job["device"])
        sae = _sae(problem, job)

        def run() -> None:
            take_step(sae, problem.x, sparsity_coeff=SPARSITY)

        return Work(run, lambda: sae.zero_grad(set_to_none=True), lambda: _l0(sae, problem))

    return prepare


def _sparse(sae: SAE, x: Tensor, *, sparsity_coeff: float) -> StepResult:
    if x.is_cuda:
        assert isinstance(sae, BuiltinSAE)  # the kernels know no others
        room = capacity_for(len(x) * sae.d_sae / 20)
        result = kernel_step(sae, x, sparsity_coeff=sparsity_coeff, capacity=room)
        if bool(result.overflowed):
            raise RuntimeError(f"expected at most {room} open gates, got {int(result.n_entries)}")
        return result
    return sparse_step(sae, x, sparsity_coeff=sparsity_coeff)


def _sae(problem: Problem, job: Job) -> SAE:
    """Return the problem's SAE, of the job's architecture; `half` opens half of its gates."""
    d_sae, d_in = problem.W_dec.shape
    bias = torch.zeros_like(problem.bias) if job.get("half") else problem.bias
    match job.get("architecture", "gated"):
        case "jumprelu":
            # Entries reach half a bandwidth below a threshold. In the default window lie 2 to 6
            # times as many as fire of an SAE trained on the bundled model, and some 20 times as
            # many of Gaussian products, which are dense there; with this one, 2.6 times.
            sae = JumpReluSAE(d_in, d_sae, bandwidth=0.03, threshold_unit=1.0)
            # It fires above its threshold instead of above zero.
            bias = bias + sae.threshold.detach().to(bias)
        case "topk":
            sae = TopKSAE(d_in, d_sae, k=max(1, round(job["l0"])))
            bias = torch.zeros_like(bias)  # rank decides
        case "relu":
            sae = ReluSAE(d_in, d_sae)
        case _:
            sae = GatedSAE(d_in, d_sae)
    values = {"W_dec": problem.W_dec, "W_gate": problem.W_dec.T, "W_enc": problem.W_dec.T}
    values |= dict.fromkeys(("b_gate", "b_mag", "b_enc"), bias)
    sae.to(problem.x.device)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return sae


def _l0(sae: SAE, problem: Problem) -> dict[str, Any]:
    return {"l0": encode_sparse(sae, problem.x).latent.numel() / len(problem.x)}


def harvest(job: Job) -> Work:
    """A run's own harvest of the job's sequences: side by side on a CPU, so many rows a pass."""
    model = load_model(job["model"], device=job["device"])
    ids = _ids(job)
    n_ctx = ids.shape[1]
    reader = _reader(job, model, SequenceSet(ids.numpy()))
    which = np.arange(len(ids))

    def run() -> None:
        n_vectors = sum(len(found[0]) for found in reader.parts(which))
        assert n_vectors == len(ids) * n_ctx

    return Work(run, look=lambda: {"rows": reader.rows})


def bare(job: Job) -> Work:
    """The Hugging Face model itself, stopped by a hook that raises: no package of ours in it."""
    hf = load_model(job["model"], device=job["device"]).hf
    lists = [module for module in hf.modules() if isinstance(module, nn.ModuleList)]
    block: Any = max(lists, key=len)[job["layer"]]
    passes = _ids(job).to(job["device"]).split(job["rows"])

    class Reached(Exception):
        pass

    def stop(*_: Any) -> None:
        raise Reached

    block.register_forward_hook(stop)

    @torch.inference_mode()
    def run() -> None:
        for ids in passes:
            try:
                hf(input_ids=ids, use_cache=False)
            except Reached:
                continue
            raise RuntimeError("the model computed its logits without passing the site")

    return Work(run)


def stream(job: Job) -> Work:
    """Batches as training reads them: harvested, shuffled, scaled; an epoch is one chunk."""
    model = load_model(job["model"], device=job["device"])
    sequences = SequenceSet(_ids(job).numpy())
    n = sequences.n_tokens
    batches = ActivationStream(
        _reader(job, model, sequences),
        batch_size=job["batch"],
        seed=0,
        n_batches=10**6 * (n // job["batch"]),
        chunk_vectors=n,
    ).batches_of_each()

    def run() -> None:
        for _ in range(n // job["batch"]):
            next(batches)

    return Work(run)


def _reader(job: Job, model: LanguageModel, sequences: SequenceSet) -> Harvest:
    """Return a harvest of the job's place, and of further sites of its layer in the same pass."""
    layer = job["layer"]
    beside = [Place(layer, site) for site in job.get("beside", [])]
    return Harvest(model, sequences, layer=layer, site=SITE, beside=beside)


def _ids(job: Job) -> Tensor:
    return load_file(job["tokens_file"])["ids"]


def train(job: Job) -> Work:
    """A whole run, as `gsae_core train` makes it: loading, stream, steps, log, files."""
    config = RunConfig.model_validate_json(job["config"])
    # SAELens' runner has imported its own before its time begins.
    importlib.import_module("transformers.models.gpt2.modeling_gpt2")

    def run() -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            made = Run.create(Path(folder) / "run", config)
            for _ in train_run(made):
                pass
            rows = made.metrics()
        last = [row["l0"] for row in rows if row["step"] == rows[-1]["step"]]
        return {"l0": sum(last) / len(last)}

    return Work(run)


WAYS: dict[str, Callable[[Job], Work]] = {
    "product": product,
    "whole step": whole_step,
    "sparse": gradients(_sparse),
    "dense by hand": gradients(manual_dense_step),
    "autograd": gradients(dense_step),
    "harvest": harvest,
    "bare": bare,
    "stream": stream,
    "train": train,
    "harvest and encode": harvest_and_encode,
    "index": index,
}


def prepare(job: Job) -> Work:
    return WAYS[job["way"]](job)


if __name__ == "__main__":
    serve(prepare)
