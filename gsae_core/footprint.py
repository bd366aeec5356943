"""How much memory, disk and time a run takes, from its config: asked before anything is loaded."""

import json
from collections.abc import Callable, Iterable
from importlib import resources
from pathlib import Path
from typing import NamedTuple

from gsae_core.config import RunConfig, SAESpec, Site

FLOAT32 = 4
# Weights, their gradients, and Adam's two moments.
COPIES_IN_TRAINING = 4
# Weights and both moments are what a resumed run needs.
COPIES_IN_STATE = 3
# What a step holds beyond gradients, in float32 matrices (batch, d_sae), measured at 256 x 16384.
# Autograd's dense step, which GPUs take while much is active; a TopK SAE's with dead latents:
DENSE_MATRICES = {"gated": 8.2, "relu": 3.4, "jumprelu": 7.0, "topk": 6.6}
# A sparse step's entries near the crossover, or the blocks of rows of a step by hand, whichever is
# more; a TopK SAE's entries have one number each. Blocks are as large for small batches.
SPARSE_MATRICES = {"gated": 3.5, "relu": 3.5, "jumprelu": 3.5, "topk": 2.8}
LEAST_ROWS = 512
# Encoder-sized products in a training step, forward and backward.
PRODUCTS_PER_STEP = 8
# 2^20 vectors mix thousands of sequences; 2 GiB of them leave room for the rest on a laptop.
MAX_CHUNK_VECTORS, MAX_CHUNK_BYTES = 2**20, 2**31

# A short run is cut into 8 chunks, so that its first step need not wait for half of its harvest,
# but never below 2^16 vectors: 16 of the usual batches, a few hundred sequences.
CHUNKS_PER_RUN, MIN_CHUNK_VECTORS = 8, 2**16
# Guesses for a machine that has trained nothing yet, in floating-point operations a second.
CORE_SPEED = 25e9
GPU_SPEED = 20e12


class ModelShape(NamedTuple):
    """What a model folder's config.json says of its size."""

    d_model: int
    d_mlp: int
    d_attn: int
    """Heads times head width: what attn_z holds."""
    n_layers: int

    def width(self, site: Site) -> int:
        """Return how wide the activations at a site are."""
        return {"mlp_hidden": self.d_mlp, "attn_z": self.d_attn}.get(site, self.d_model)


def model_folder(name: str) -> Path | None:
    """Return the folder of the bundled model or of a local one; None for a name on the Hub."""
    if name == "bundled":
        return Path(str(resources.files("gsae_core").joinpath("assets/stdlib-gpt2")))
    try:
        folder = Path(name).expanduser()
        return folder if (folder / "config.json").is_file() else None
    except (OSError, RuntimeError):  # too long for a path, or the home of a user there is not
        return None


def model_shape(name: str) -> ModelShape | None:
    """Return the shape of the bundled model or of a local folder; None for a name on the Hub."""
    folder = model_folder(name)
    return None if folder is None else read_shape(folder / "config.json")


def read_shape(path: Path) -> ModelShape | None:
    """Return the shape that a Hugging Face config.json gives; None where it gives none."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8-sig"))
        fields = fields.get("text_config", fields)
        d_model = fields.get("hidden_size") or fields.get("n_embd")
        n_layers = fields.get("num_hidden_layers") or fields.get("n_layer")
        n_heads = fields.get("num_attention_heads") or fields.get("n_head") or 1
        d_mlp = fields.get("intermediate_size") or fields.get("n_inner") or 4 * d_model
        d_head = fields.get("head_dim") or d_model // n_heads
    except (ValueError, AttributeError, TypeError):  # no JSON, or JSON of another kind
        return None
    numbers = (d_model, n_layers, n_heads, d_mlp, d_head)
    if not all(isinstance(number, int) and number > 0 for number in numbers):
        return None
    return ModelShape(d_model=d_model, d_mlp=d_mlp, d_attn=n_heads * d_head, n_layers=n_layers)


def n_parameters(spec: SAESpec, d_in: int) -> int:
    """Return how many numbers an SAE learns."""
    matrices = 3 if spec.architecture == "gated" and spec.tie == "untied" else 2
    # A bias each; JumpReLU thresholds; b_gate, b_mag and r_mag.
    vectors = {"gated": 3 if spec.tie == "r_mag" else 2, "relu": 1, "jumprelu": 2, "topk": 1}
    return matrices * d_in * spec.d_sae + vectors[spec.architecture] * spec.d_sae + d_in


class Memory(NamedTuple):
    """What training keeps in memory, in bytes; the language model left out."""

    learnt: int
    """Weights, gradients and both of Adam's moments, of every SAE."""
    step: int
    """What the steps taken at once hold: one on a GPU, one a core on a CPU."""
    chunk: int
    """A chunk of activations and its shuffled copy."""


def memory_parts(cfg: RunConfig, d_in: int, *, chunk_vectors: int, n_cores: int | None) -> Memory:
    """Return about how much memory each part of training takes.

    Args:
        cfg: the run.
        d_in: width of the activations.
        chunk_vectors: activations that are shuffled at a time.
        n_cores: cores that take steps at once; None on a GPU.
    """
    learnt = COPIES_IN_TRAINING * sum(n_parameters(spec, d_in) for spec in cfg.saes)
    step = _step_numbers(cfg, n_cores)
    return Memory(FLOAT32 * learnt, FLOAT32 * step, FLOAT32 * 2 * chunk_vectors * d_in)


def _step_numbers(cfg: RunConfig, n_cores: int | None) -> int:
    rows = cfg.train.batch_size
    if n_cores is None:
        return max(
            round(DENSE_MATRICES[spec.architecture] * rows * spec.d_sae) for spec in cfg.saes
        )
    widths = (SPARSE_MATRICES[spec.architecture] * spec.d_sae for spec in cfg.saes)
    return round(max(rows, LEAST_ROWS) * sum(sorted(widths, reverse=True)[:n_cores]))


def training_bytes(cfg: RunConfig, d_in: int, *, chunk_vectors: int, n_cores: int | None) -> int:
    """Return about how much memory training takes, the language model left out."""
    return sum(memory_parts(cfg, d_in, chunk_vectors=chunk_vectors, n_cores=n_cores))


def state_bytes(cfg: RunConfig, d_in: int) -> int:
    """Return about how large a resumable state is."""
    return FLOAT32 * COPIES_IN_STATE * sum(n_parameters(spec, d_in) for spec in cfg.saes)


def cache_bytes(cfg: RunConfig, d_in: int) -> int:
    """Return about how large the run's activation cache gets; 0 without one.

    An upper bound where the text is shorter than the run and is read more than once.
    """
    if not cfg.cache_activations:
        return 0
    each = FLOAT32 if cfg.model.dtype == "float32" else FLOAT32 // 2
    return each * cfg.train.n_steps * cfg.train.batch_size * d_in


def default_chunk_vectors(d_in: int, n_vectors: int) -> int:
    """Return how many vectors to shuffle at a time: a function of the run's size, not the machine.

    Args:
        d_in: width of a vector, kept as float32.
        n_vectors: vectors of the whole run.
    """
    fitting = max(1, MAX_CHUNK_BYTES // (4 * d_in))
    share = max(MIN_CHUNK_VECTORS, n_vectors // CHUNKS_PER_RUN)
    return min(MAX_CHUNK_VECTORS, fitting, share)


def operations(cfg: RunConfig, shape: ModelShape) -> float:
    """Return about how many floating-point operations training takes, evaluation left out."""
    d_in = shape.width(cfg.model.site)
    saes = sum(2 * PRODUCTS_PER_STEP * d_in * spec.d_sae for spec in cfg.saes)
    blocks = (cfg.model.layer + 1) * 2 * 12 * shape.d_model**2
    return float(cfg.train.n_tokens * (saes + blocks))


class Pace(NamedTuple):
    """How fast this machine trains."""

    operations_per_second: float
    source: str | None
    """Id of the run it was measured on; None for a guess."""


class Measured(NamedTuple):
    """A run that says how fast this machine is."""

    id: str
    config: RunConfig
    share: float
    """Steps done over steps planned."""
    seconds: float | int
    """Training time of those steps."""


def pace(
    measured: Iterable[Measured],
    *,
    n_cores: int,
    has_gpu: bool,
    shapes: Callable[[str], ModelShape | None] = model_shape,
) -> Pace:
    """Return the speed of the first run that can tell, or a guess from the hardware.

    Args:
        shapes: returns the shape of a model by its name.
    """
    for run in measured:
        shape = shapes(run.config.model.name)
        if shape is not None and run.seconds > 0 and run.share > 0:
            return Pace(operations(run.config, shape) * run.share / run.seconds, run.id)
    return Pace(GPU_SPEED if has_gpu else CORE_SPEED * n_cores, None)
