"""What a run takes against what there is, from its config, before anything is loaded.

Memory, disk and time; what does not fit, and the change that mends it; the L0 to expect.
"""

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch

from gsae_core.config import Place, RunConfig, SAESpec, Site
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import ModelFacts, ModelShape, check_family
from gsae_core.lm.stream import default_chunk_vectors
from gsae_core.machine import Machine

FLOAT32 = 4
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Weights, their gradients, and Adam's two moments.
COPIES_IN_TRAINING = 4
# Weights and both moments are what a resumed run needs.
COPIES_IN_STATE = 3
# What a step holds beyond gradients, in float32 matrices (batch, d_sae), measured at 256 x 16384.
# Autograd's dense step, which GPUs take while much is active; a TopK SAE's with dead latents:
DENSE_MATRICES = {"gated": 8.2, "relu": 3.4, "jumprelu": 7.0, "topk": 6.6}
# A sparse step's entries near the crossover, or the blocks of rows of a step by hand, whichever is
# more; a JumpReLU's or TopK's dense step is autograd's. Blocks are as large for small batches.
SPARSE_MATRICES = {"gated": 3.5, "relu": 3.5, "jumprelu": 6.5, "topk": 4.0}
LEAST_ROWS = 512
# Of the end-to-end loss in float32: logits of both passes, their logarithms and derivatives;
# 9.2 were measured at 4 x 128 x 8192.
COPIES_OF_LOGITS = 10
# Encoder-sized products in a training step, forward and backward.
PRODUCTS_PER_STEP = 8
# Guesses for a machine that has trained nothing yet, in operations a second of a step that computes
# every latent. Sparse steps do less: the quick preset takes 3 to 6 minutes on 2 cores,
# and is expected to take 4.
CORE_SPEED = 100e9
GPU_SPEED = 20e12
# Weights on the Hub have 2 bytes a number, older ones 4.
LEAST_HUB_BYTES = 2
# English, code: three to five bytes of text a token.
TEXT_BYTES = 4


Width = Callable[[Site], int]
"""The d_in of a site."""


def n_parameters(spec: SAESpec, d_in: int) -> int:
    """Return how many numbers an SAE learns."""
    matrices = 3 if spec.architecture == "gated" and spec.tie == "untied" else 2
    # A bias each; JumpReLU thresholds; b_gate, b_mag and r_mag.
    vectors = {"gated": 3 if spec.tie == "r_mag" else 2, "relu": 1, "jumprelu": 2, "topk": 1}
    return matrices * d_in * spec.d_sae + vectors[spec.architecture] * spec.d_sae + d_in


def all_parameters(cfg: RunConfig, width: Width) -> int:
    """Return how many numbers all SAEs learn."""
    return sum(n_parameters(spec, width(cfg.place(spec).site)) for spec in cfg.saes)


def widths(cfg: RunConfig, width: Width) -> list[int]:
    """Return d_in of each place that the SAEs read."""
    return [width(place.site) for place in cfg.places]


def memory_parts(
    cfg: RunConfig, width: Width, *, chunk_vectors: int, n_cores: int | None, n_logits: int = 0
) -> dict[str, int]:
    """Return about how many bytes training takes, the model left out.

    Args:
        n_cores: None on a GPU.
        n_logits: computed at a time for the end-to-end loss.
    """
    learnt = COPIES_IN_TRAINING * all_parameters(cfg, width)
    rows, matrices = cfg.train.batch_size, DENSE_MATRICES
    if n_cores is not None:
        rows, matrices = max(rows, LEAST_ROWS), SPARSE_MATRICES
    sizes = sorted((matrices[spec.architecture] * spec.d_sae for spec in cfg.saes), reverse=True)
    step = round(rows * sum(sizes[: n_cores or 1]))
    chunks = chunk_vectors * sum(widths(cfg, width))  # of every place
    return {
        "weights, gradients, moments": FLOAT32 * learnt,
        "one step": FLOAT32 * step,
        "chunk of activations": FLOAT32 * 2 * chunks,  # with its shuffled copy
        **({"predictions": FLOAT32 * COPIES_OF_LOGITS * n_logits} if n_logits else {}),
    }


def state_bytes(cfg: RunConfig, width: Width) -> int:
    """Return about how large a resumable state is."""
    return FLOAT32 * COPIES_IN_STATE * all_parameters(cfg, width)


def operations(cfg: RunConfig, shape: ModelShape) -> float:
    """Return about how many floating-point operations training takes, evaluation left out."""
    products = sum(shape.width(cfg.place(spec).site) * spec.d_sae for spec in cfg.saes)
    saes = 2 * PRODUCTS_PER_STEP * products
    n_blocks = 0 if cfg.activations else max(place.layer for place in cfg.places) + 1
    blocks = n_blocks * 2 * 12 * shape.d_model**2
    return float(cfg.train.n_tokens * (saes + blocks))


class Pace(NamedTuple):
    """How fast this machine trains."""

    operations_per_second: float
    source: str | None
    """Id of the run it was measured on; None for a guess."""


def guessed_pace(*, n_cores: int, has_gpu: bool) -> Pace:
    """Return the speed to expect of the hardware."""
    return Pace(GPU_SPEED if has_gpu else CORE_SPEED * n_cores, None)


def resolve_device(name: str) -> torch.device:
    """Return the device a config means; `auto` is CUDA, then Apple's, then the CPU."""
    has_mps = torch.backends.mps.is_available()
    n_cuda = torch.cuda.device_count()
    if name == "auto":
        return torch.device("cuda" if n_cuda else "mps" if has_mps else "cpu")
    available = ["cpu", *(f"cuda:{i}" for i in range(n_cuda)), *(["mps"] if has_mps else [])]
    if name.removesuffix(":0") not in (*available, *(["cuda"] if n_cuda else [])):
        raise InputError(
            f"expected a device of this machine (auto, {', '.join(available)}), got {name!r}"
        )
    return torch.device(name)


def device_here(named: str) -> str:
    """Return the device that a run names, or `auto` where this machine lacks it."""
    try:
        resolve_device(named)
    except InputError:
        return "auto"
    return named


def free_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device, by its own account."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Apple's GPUs share the machine's memory.
    return psutil.virtual_memory().available


def check_memory(
    cfg: RunConfig, width: Width, device: torch.device, *, chunk_vectors: int, n_logits: int = 0
) -> None:
    """Refuse training that does not fit in memory; `n_logits` as `memory_parts`."""
    n_cores = torch.get_num_threads() if device.type == "cpu" else None
    sizes = {"chunk_vectors": chunk_vectors, "n_logits": n_logits}
    parts = memory_parts(cfg, width, **sizes, n_cores=n_cores)
    need = sum(parts.values())
    free = free_memory(device)
    if need > free:
        widest = max(spec.d_sae for spec in cfg.saes)
        raise InputError(
            f"expected about {readable(need)} of memory on {device} for {len(cfg.saes)} SAEs of up "
            f"to {widest} latents, found {readable(free)} free; lower the width, the batch size "
            "or the number of SAEs"
        )


class Bar(NamedTuple):
    """Something needed, of something there is; in bytes."""

    label: str
    parts: dict[str, int]
    available: int

    @property
    def needed(self) -> int:
        """The sum of the parts, in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether there is as much as is needed."""
        return self.needed <= self.available


class Fix(NamedTuple):
    """One field to change, to what, so that the run can start."""

    flag: str
    value: str


class Refusal(NamedTuple):
    """Why a run cannot start, and the changes each of which would let it."""

    sentence: str
    fixes: tuple[Fix, ...]


class Preflight(NamedTuple):
    """The whole of it; `bars` is empty where nothing is known of the model's size."""

    bars: tuple[Bar, ...]
    download: int
    """Bytes of the model and the text that come from the Hub, about."""
    seconds: float | None
    """Training time, evaluation and downloads left out."""
    refusals: tuple[Refusal, ...]


def preflight(config: RunConfig, facts: ModelFacts, here: Machine, pace: Pace) -> Preflight:
    """Return what a run takes of this machine, and why it cannot start, if it cannot."""
    refusals = [*_wrong_choices(config, facts)]
    download = _model_download(facts)
    if config.activations is None and streamed(config.data.source):
        download += TEXT_BYTES * config.train.n_tokens
    if facts.shape is None:
        return Preflight((), download, None, tuple(refusals))
    bars = []
    for measure in (_memory, _disk):
        bar = functools.partial(measure, width=facts.shape.width, facts=facts, here=here)
        bars.append(found := bar(config))
        if not found.fits:
            what = found.label[0].lower() + found.label[1:]
            need, free = readable(found.needed), readable(found.available)
            sentence = f"expected {what} for about {need}, found {free} free"
            refusals.append(Refusal(sentence, tuple(_remedies(config, bar))))
    seconds = operations(config, facts.shape) / pace.operations_per_second
    return Preflight(tuple(bars), download, seconds, tuple(refusals))


def gpu_memory(here: Machine, device: str) -> tuple[str, int] | None:
    """Return the name and memory (bytes) of the GPU a device means; None: the machine's memory."""
    number = device.partition(":")[2]
    index = int(number) if number.isdecimal() else 0
    if device in ("cpu", "mps") or index >= len(here.gpus):
        return None
    name, _, size = here.gpus[index].rpartition(",")
    mebibytes = size.strip().removesuffix("MiB").strip()
    return (name.strip(), int(mebibytes) * 2**20) if mebibytes.isdecimal() else None


def _memory(config: RunConfig, width: Width, facts: ModelFacts, here: Machine) -> Bar:
    chunk = default_chunk_vectors(max(widths(config, width)), config.train.n_tokens)
    gpu = gpu_memory(here, config.device)
    n_cores = here.n_cores if gpu is None else None
    needed = memory_parts(config, width, chunk_vectors=chunk, n_cores=n_cores)
    needed["language model"] = (facts.parameters or 0) * DTYPE_BYTES[config.model.dtype]
    if gpu is None:
        return Bar("Memory", needed, here.memory_free)
    return Bar(f"Memory of {gpu[0]}", needed, gpu[1])


def _disk(config: RunConfig, width: Width, facts: ModelFacts, here: Machine) -> Bar:
    state = state_bytes(config, width)
    n_cached = config.train.n_steps * config.train.batch_size if config.cache_activations else 0
    needed = {
        "resumable state": 2 * state,  # a new one is written beside the old one
        "SAEs": state // 3,
        "tokens": 0 if config.activations else 2 * config.train.n_tokens,
        "model": _model_download(facts),
        # At most.
        "activations": DTYPE_BYTES[config.model.dtype] * n_cached * sum(widths(config, width)),
    }
    return Bar("Disk", needed, here.disk_free)


def _model_download(facts: ModelFacts) -> int:
    return LEAST_HUB_BYTES * (facts.parameters or 0) if facts.where == "hub" else 0


def streamed(source: str) -> bool:
    """Whether a corpus comes from the Hub, as its name has it."""
    return source != "stdlib" and not os.path.exists(os.path.expanduser(source))


def _wrong_choices(config: RunConfig, facts: ModelFacts) -> Iterator[Refusal]:
    """Yield what no machine could train, or not this one."""
    try:
        check_family(facts.name, facts.family)
    except InputError as error:
        yield Refusal(f"--model: {error}", (Fix("model", "bundled"),))
    if config.activations is not None and facts.shape is None:
        found = f"found none that can be read in {config.activations}"
        yield Refusal(f"--activations: expected a folder of vectors, {found}", ())
    layers, shape = list(dict.fromkeys(place.layer for place in config.places)), facts.shape
    if shape is not None and max(layers) >= (n := shape.n_layers):
        known = [str(layer) for layer in layers if layer < n] or [f"{n - 1}"]
        sentence = f"--layer: expected 0 to {n - 1}, got {max(layers)}; the model has {n} blocks"
        yield Refusal(sentence, (Fix("layer", " ".join(known)),))
    try:
        resolve_device(config.device)
    except InputError as error:
        yield Refusal(f"--device: {error}", (Fix("device", "auto"),))


def _remedies(config: RunConfig, bar: Callable[[RunConfig], Bar]) -> Iterator[Fix]:
    """Yield the smallest change of each field after which the run fits."""
    mended: set[str] = set()
    for fix, change in _changes(config):
        if fix.flag not in mended and bar(config.model_copy(update=change)).fits:
            mended.add(fix.flag)
            yield fix


def _changes(config: RunConfig) -> Iterator[tuple[Fix, dict[str, Any]]]:
    """Yield changes of one field each, as the form and as the config has them, gentlest first."""
    if config.cache_activations:
        yield Fix("cache_activations", "off"), {"cache_activations": False}
    lambdas = list(dict.fromkeys(spec.sparsity for spec in config.saes))
    for n in range(len(lambdas) - 1, 0, -1):
        kept = [lambdas[i * len(lambdas) // n] for i in range(n)]  # evenly spread
        saes = tuple(spec for spec in config.saes if spec.sparsity in kept)
        yield Fix("sparsity", " ".join(f"{coeff:g}" for coeff in kept)), {"saes": saes}
    narrowest = min(spec.d_sae for spec in config.saes)
    for halvings in range(1, narrowest.bit_length() - 5):
        share = 2**halvings
        saes = tuple(s.model_copy(update={"d_sae": s.d_sae // share}) for s in config.saes)
        yield Fix("width", str(gated_width(config) // share)), {"saes": saes}
    for batch_size in (2048, 1024, 512, 256):
        if batch_size < config.train.batch_size:
            train = config.train.model_copy(update={"batch_size": batch_size})
            yield Fix("batch_size", str(batch_size)), {"train": train}
    if DTYPE_BYTES[config.model.dtype] == FLOAT32:
        model = config.model.model_copy(update={"dtype": "bfloat16"})
        yield Fix("dtype", "bfloat16"), {"model": model}


def gated_width(config: RunConfig) -> int:
    """Return the width that `--width` means for this run: that of its Gated SAEs."""
    gated = [spec.d_sae for spec in config.saes if spec.architecture != "relu"]
    return gated[0] if gated else config.saes[0].d_sae * 2 // 3


class Expected(NamedTuple):
    """The L0 that earlier runs at the same place had around one lambda, and their ids."""

    low: float
    high: float
    runs: tuple[str, ...]


class Finished(NamedTuple):
    """A run with its held-out evaluation."""

    id: str
    config: RunConfig
    evals: list[dict[str, Any]]


def alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether lambda means the same in both runs: one model, place and scale of activations.

    Of several places they need to share one.
    """
    same = attrgetter("activations", "model.name", "activation_scale")
    shared = {*config.places} & {*other.places}
    # Other libraries average and scale in ways of their own.
    return other.imported is None and same(config) == same(other) and bool(shared)


def expected_l0(spec: SAESpec, place: Place, finished: Iterable[Finished]) -> Expected | None:
    """Return the range of L0 of a place over `alike` runs; None where none reaches the lambda.

    In each run log L0 is taken as linear in log lambda between neighbouring SAEs of the same
    architecture, loss norm and recipe, and never beyond the ends.
    """
    found = {run.id: l0 for run in finished if (l0 := _l0_of(spec, place, run)) is not None}
    return Expected(min(found.values()), max(found.values()), tuple(found)) if found else None


def _l0_of(spec: SAESpec, place: Place, run: Finished) -> float | None:
    """Return what a run lets expect of an SAE; None where it says nothing."""
    kind = attrgetter("architecture", "loss_norm", "recipe")
    there = (other for other in run.config.saes if run.config.place(other) == place)
    like = {other.name for other in there if kind(other) == kind(spec)}
    curve = sorted(
        (row["sparsity"], row["l0"])
        for row in run.evals
        # An SAE that fires on nothing has no logarithm, one that could not be measured no L0.
        if row["name"] in like and row["l0"] and math.isfinite(row["l0"])
    )
    if not curve or not curve[0][0] <= spec.sparsity <= curve[-1][0]:
        return None
    lambdas, l0s = np.log(curve).T
    return math.exp(np.interp(math.log(spec.sparsity), lambdas, l0s))
