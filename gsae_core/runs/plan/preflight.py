"""What a run takes against what there is, before it starts; what does not fit, and its remedy."""

import itertools
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gsae_core.config import RunConfig, SAESpec
from gsae_core.errors import InputError
from gsae_core.files import readable
from gsae_core.lm.catalog import ModelFacts, check_family
from gsae_core.lm.stream import default_chunk_vectors
from gsae_core.machine import Machine
from gsae_core.runs.plan.cost import (
    FLOAT32,
    Pace,
    cache_bytes,
    memory_parts,
    operations,
    state_bytes,
)

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Weights on the Hub have 2 bytes a number, older ones 4.
LEAST_HUB_BYTES = 2
# English, code: three to five bytes of text a token.
TEXT_BYTES = 4
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class Part(NamedTuple):
    """A share of a bar."""

    label: str
    size: int


class Bar(NamedTuple):
    """Something needed, of something there is; in bytes."""

    label: str
    parts: tuple[Part, ...]
    available: int

    @property
    def needed(self) -> int:
        return sum(part.size for part in self.parts)

    @property
    def fits(self) -> bool:
        return self.needed <= self.available


class Fix(NamedTuple):
    """One field to change, to what, so that the run can start."""

    flag: str
    value: str


class Refusal(NamedTuple):
    """Why a run cannot start."""

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
    refusals = [*_wrong_choices(config, facts, here)]
    if facts.shape is None:
        return Preflight((), _download(config, facts), None, tuple(refusals))
    memory, disk = _memory(config, facts, here), _disk(config, facts, here)
    for bar, smaller in ((memory, _memory), (disk, _disk)):
        if not bar.fits:

            def fits(
                config: RunConfig, bar: Callable[..., Bar] = smaller, facts: ModelFacts = facts
            ) -> bool:
                return bar(config, facts, here).fits

            refusals.append(_too_much(config, bar, fits))
    seconds = operations(config, facts.shape) / pace.operations_per_second
    return Preflight((memory, disk), _download(config, facts), seconds, tuple(refusals))


def gpu_memory(here: Machine, device: str) -> tuple[str, int] | None:
    """Return the name and memory (bytes) of the GPU a device means; None: the machine's memory."""
    if device in ("cpu", "mps") or not here.gpus:
        return None
    index = _index(device)
    if index >= len(here.gpus):
        return None
    name, _, size = here.gpus[index].rpartition(",")
    mebibytes = size.strip().removesuffix("MiB").strip()
    return (name.strip(), int(mebibytes) * 2**20) if mebibytes.isdecimal() else None


def _index(device: str) -> int:
    number = device.partition(":")[2]
    return int(number) if number.isdecimal() else 0


def _memory(config: RunConfig, facts: ModelFacts, here: Machine) -> Bar:
    assert facts.shape is not None
    d_in = facts.shape.width(config.model.site)
    chunk = default_chunk_vectors(d_in, config.train.n_tokens)
    model = (facts.parameters or 0) * DTYPE_BYTES[config.model.dtype]
    gpu = gpu_memory(here, config.device)
    n_cores = here.n_cores if gpu is None else None
    parts = memory_parts(config, d_in, chunk_vectors=chunk, n_cores=n_cores)
    return Bar(
        "Memory" if gpu is None else f"Memory of {gpu[0]}",
        (
            Part("weights, gradients, moments", parts.learnt),
            Part("one step", parts.step),
            Part("chunk of activations", parts.chunk),
            Part("language model", model),
        ),
        here.memory_free if gpu is None else gpu[1],
    )


def _disk(config: RunConfig, facts: ModelFacts, here: Machine) -> Bar:
    assert facts.shape is not None
    d_in = facts.shape.width(config.model.site)
    state = state_bytes(config, d_in)
    parts = (
        # A new state is written beside the old one.
        Part("resumable state", 2 * state),
        Part("SAEs", state // 3),
        Part("tokens", 2 * config.train.n_tokens),
        Part("model", _model_download(facts)),
        Part("activations", cache_bytes(config, d_in)),
    )
    return Bar("Disk", parts, here.disk_free)


def _model_download(facts: ModelFacts) -> int:
    return LEAST_HUB_BYTES * (facts.parameters or 0) if facts.where == "hub" else 0


def _download(config: RunConfig, facts: ModelFacts) -> int:
    text = TEXT_BYTES * config.train.n_tokens if streamed(config.data.source) else 0
    return _model_download(facts) + text


def streamed(source: str) -> bool:
    """Whether a corpus comes from the Hub, as its name has it."""
    try:
        return source != "stdlib" and not Path(source).expanduser().exists()
    except (OSError, RuntimeError):
        return True


def _wrong_choices(config: RunConfig, facts: ModelFacts, here: Machine) -> Iterator[Refusal]:
    """Yield what no machine could train, or not this one."""
    try:
        check_family(facts)
    except InputError as error:
        yield Refusal(str(error), (Fix("model", "bundled"),))
    if facts.shape is not None and config.model.layer >= facts.shape.n_layers:
        last = facts.shape.n_layers - 1
        yield Refusal(
            f"--layer: expected 0 to {last}, got {config.model.layer}; the model has "
            f"{facts.shape.n_layers} blocks",
            (Fix("layer", str(last)),),
        )
    wanted = config.device
    index = _index(wanted)
    apple = platform.system() == "Darwin"
    if DEVICE.fullmatch(wanted) is None:
        yield Refusal(
            f"--device: expected auto, cpu, cuda, cuda:1 or mps, got {wanted!r}",
            (Fix("device", "auto"),),
        )
    elif (wanted.startswith("cuda") and index >= len(here.gpus)) or (wanted == "mps" and not apple):
        found = f"{len(here.gpus)} NVIDIA GPUs" if here.gpus else "no GPU"
        yield Refusal(
            f"--device: expected a device of this machine, got {wanted!r}; it has {found}",
            (Fix("device", "auto"),),
        )


def _too_much(config: RunConfig, bar: Bar, fits: Callable[[RunConfig], bool]) -> Refusal:
    what = bar.label[0].lower() + bar.label[1:]
    return Refusal(
        f"expected {what} for about {readable(bar.needed)}, found {readable(bar.available)} free",
        tuple(_remedies(config, fits)),
    )


def _remedies(config: RunConfig, fits: Callable[[RunConfig], bool]) -> Iterator[Fix]:
    """Yield single changes after which the run fits, the gentlest first."""
    if config.cache_activations and fits(config.model_copy(update={"cache_activations": False})):
        yield Fix("cache_activations", "off")
    lambdas = list(dict.fromkeys(spec.sparsity for spec in config.saes))
    for n in range(len(lambdas) - 1, 0, -1):
        kept = _spread(lambdas, n)
        saes = tuple(spec for spec in config.saes if spec.sparsity in kept)
        if fits(config.model_copy(update={"saes": saes})):
            yield Fix("sparsity", " ".join(f"{coeff:g}" for coeff in kept))
            break
    narrowest = min(spec.d_sae for spec in config.saes)
    for halvings in range(1, narrowest.bit_length() - 5):
        share = 2**halvings
        saes = tuple(s.model_copy(update={"d_sae": s.d_sae // share}) for s in config.saes)
        if fits(config.model_copy(update={"saes": saes})):
            yield Fix("width", str(gated_width(config) // share))
            break
    for batch_size in (2048, 1024, 512, 256):
        train = config.train.model_copy(update={"batch_size": batch_size})
        smaller = batch_size < config.train.batch_size
        if smaller and fits(config.model_copy(update={"train": train})):
            yield Fix("batch_size", str(batch_size))
            break
    model = config.model.model_copy(update={"dtype": "bfloat16"})
    if DTYPE_BYTES[config.model.dtype] == FLOAT32 and fits(
        config.model_copy(update={"model": model})
    ):
        yield Fix("dtype", "bfloat16")


def _spread(values: list[float], n: int) -> list[float]:
    """Return `n` of the values, evenly spread."""
    return [values[i * len(values) // n] for i in range(n)]


def gated_width(config: RunConfig) -> int:
    """Return the width that `--width` means for this run: that of its Gated SAEs."""
    gated = [spec.d_sae for spec in config.saes if spec.architecture != "relu"]
    return gated[0] if gated else config.saes[0].d_sae * 2 // 3


class Expected(NamedTuple):
    """The L0 that earlier runs at the same place had around one lambda."""

    low: float
    high: float
    runs: tuple[str, ...]
    """Ids of the runs it was interpolated in."""


class Finished(NamedTuple):
    """A run with its held-out evaluation."""

    id: str
    config: RunConfig
    evals: list[dict[str, Any]]


def alike(config: RunConfig, other: RunConfig) -> bool:
    """Whether lambda means the same in both runs: one model, place and scale of activations.

    Of an imported run it does not: other libraries average and scale in ways of their own.
    """
    return (
        other.imported is None
        and config.model.name == other.model.name
        and config.model.layer == other.model.layer
        and config.model.site == other.model.site
        and config.activation_scale == other.activation_scale
    )


def expected_l0(spec: SAESpec, config: RunConfig, finished: Iterable[Finished]) -> Expected | None:
    """Return the range of L0 to expect of an SAE; None where no earlier run reaches its lambda.

    In each alike run log L0 is taken as linear in log lambda between neighbouring SAEs of the same
    architecture, loss norm and recipe, and never beyond the ends. The range is over the runs.
    """
    found = {}
    for run in finished:
        if alike(config, run.config):
            l0 = _interpolated(spec.sparsity, _curve(spec, run))
            if l0 is not None:
                found[run.id] = l0
    if not found:
        return None
    return Expected(min(found.values()), max(found.values()), tuple(found))


def _curve(spec: SAESpec, run: Finished) -> list[tuple[float, float]]:
    """Return (lambda, L0) of a run's SAEs that are like `spec`, by rising lambda."""
    like = {
        other.name
        for other in run.config.saes
        if (other.architecture, other.loss_norm, other.recipe)
        == (spec.architecture, spec.loss_norm, spec.recipe)
    }
    return sorted(
        (row["sparsity"], row["l0"])
        for row in run.evals
        # An SAE that fires on nothing has no logarithm, one that could not be measured no L0.
        if row["name"] in like and row["l0"] and math.isfinite(row["l0"])
    )


def _interpolated(sparsity: float, curve: list[tuple[float, float]]) -> float | None:
    for at, l0 in curve:
        if math.isclose(at, sparsity, rel_tol=1e-6):
            return float(l0)
    for (left, l0_left), (right, l0_right) in itertools.pairwise(curve):
        if left < sparsity < right:
            t = math.log(sparsity / left) / math.log(right / left)
            return math.exp((1 - t) * math.log(l0_left) + t * math.log(l0_right))
    return None
