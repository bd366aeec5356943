"""An SAE of ours -> files of another library, read back and compared before they are there.

gsae_core, saelens     cfg.json, sae_weights.safetensors
jumprelu               the same layout; a Gated SAE as the JumpReLU SAE that computes the same
dictionary_learning    ae.pt, config.json
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from gsae_core.checkpoints.checkpoint import file_tensors, save_sae
from gsae_core.checkpoints.formats.build import BIASES
from gsae_core.checkpoints.formats.libraries import Export, layer_and_site
from gsae_core.checkpoints.formats.read import OUR_NAMES, read_sae
from gsae_core.config import Architecture
from gsae_core.errors import InputError
from gsae_core.files import sync, write_json, writing
from gsae_core.sae.architectures import GatedSAE, JumpReluSAE, ReluSAE, TopKSAE
from gsae_core.sae.base import SAE, SinglePathSAE

TOKENS = 512
LARGEST_DIFFERENCE = 1e-6
# Of the largest pre-activation. Weights rounded to float32 move one by 1e-7 or so; which side of
# its threshold a latent is on decides nothing so near to it.
AT_THRESHOLD = 1e-6


class Parity(NamedTuple):
    """How far apart two SAEs are on the same activations, relative to the largest number."""

    latents: float
    reconstructions: float
    n_tokens: int
    n_active: int  # latents that fire, over all tokens; where none does, nothing is compared
    n_at_threshold: int  # latents that fire in one alone and lie on the threshold to 1e-6: left out

    @property
    def largest(self) -> float:
        """The larger of the two differences."""
        return max(self.latents, self.reconstructions)

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        edge = f"; {self.n_at_threshold} lie on their threshold" * bool(self.n_at_threshold)
        return (
            f"latents within {self.latents:.1e} and reconstructions within "
            f"{self.reconstructions:.1e} on {self.n_tokens} random activations, "
            f"{self.n_active / self.n_tokens:.3g} latents a token{edge}"
        )


@torch.no_grad()
def parity(sae: SAE, other: SAE) -> Parity:
    """Return how closely `other` computes what `sae` does, in double precision.

    Single precision would compare orders of summation: a latent whose pre-activation is a rounding
    error away from its threshold fires in one and not in the other.
    """
    sae, other = copy.deepcopy(sae).cpu().double(), copy.deepcopy(other).cpu().double()
    x = telling_activations(sae)
    largest: list[list[float]] = []
    n_active = n_edge = 0
    for rows in x.split(max(1, 2**22 // sae.d_sae)):
        f, g = sae.encode(rows), other.encode(rows)
        edge = ((f > 0) != (g > 0)) & _at_threshold(sae, rows)
        x_hat = sae.normalised(rows).undo(sae.decode(f))
        x_hat_other = other.normalised(rows).undo(other.decode(g))
        kept = ~edge.any(dim=1)
        compared = (f - g).masked_fill(edge, 0.0), (x_hat - x_hat_other)[kept], f, x_hat
        largest.append([float(v.abs().amax()) if v.numel() else 0.0 for v in compared])
        n_active, n_edge = n_active + int((f > 0).sum()), n_edge + int(edge.sum())
    # NaN survives amax, and is no number that any bound lets through.
    found = torch.tensor(largest, dtype=torch.float64).amax(dim=0)
    latents, reconstructions, f_max, x_max = found.tolist()
    return Parity(
        latents=latents / (f_max or 1.0),
        reconstructions=reconstructions / (x_max or 1.0),
        n_tokens=len(x),
        n_active=n_active,
        n_at_threshold=n_edge,
    )


def telling_activations(sae: SAE) -> Float[Tensor, "n_tokens d_in"]:
    """Return random activations, from some that leave most latents silent to some that do not.

    Around b_dec, in four sizes about the one at which products are as large as the biases.
    """
    generator = torch.Generator().manual_seed(0)
    tensors = dict[str, Tensor](sae.named_parameters())
    W = tensors["W_gate" if isinstance(sae, GatedSAE) else "W_enc"]
    # r_mag is a logarithm.
    named = [tensors[name] for name in BIASES[sae.architecture] if name != "r_mag"]
    biases = torch.stack(named).abs().sum(dim=0)
    size = float(biases.abs().mean() / W.norm(dim=0).mean().clamp(min=1e-12)) or 1.0
    noise = torch.randn(TOKENS, sae.d_in, generator=generator, dtype=sae.W_dec.dtype)
    sizes = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=noise.dtype)
    return sae.b_dec + size * sizes[torch.arange(TOKENS) % 4, None] * noise


def _at_threshold(sae: SAE, x: Float[Tensor, "batch d_in"]) -> Tensor:
    """Return where a pre-activation lies within rounding of what decides whether it fires."""
    if isinstance(sae, GatedSAE):
        pi_gate, z = sae.pre_activations(x)
        margin = torch.minimum(pi_gate.abs(), z.abs())
    else:
        assert isinstance(sae, SinglePathSAE)
        z = sae.pre_activations(x)
        margin = z.abs()
        if isinstance(sae, JumpReluSAE):
            margin = (z - sae.threshold).abs()
        if isinstance(sae, TopKSAE):
            margin = torch.minimum(margin, (z - z.topk(sae.k).values[:, -1:]).abs())
    return margin <= AT_THRESHOLD * z.abs().amax()


DICTIONARY_LEARNING: dict[Architecture, tuple[str, str, str]] = {
    "gated": (
        "GatedAutoEncoder",
        "GatedSAETrainer",
        "decoder.weight encoder.weight decoder_bias gate_bias mag_bias r_mag",
    ),
    "relu": ("AutoEncoder", "StandardTrainer", "decoder.weight encoder.weight encoder.bias bias"),
    "jumprelu": ("JumpReluAutoEncoder", "JumpReluTrainer", "W_enc b_enc W_dec b_dec threshold"),
    "topk": (
        "AutoEncoderTopK",
        "TopKTrainer",
        "decoder.weight encoder.weight encoder.bias b_dec k threshold",
    ),
}
"""Names of the library's class, its trainer and its tensors."""


class Exported(NamedTuple):
    """Files that are there, and how closely they compute what the SAE does."""

    files: tuple[Path, ...]
    parity: Parity


def write_sae(
    sae: SAE, folder: Path | str, *, format: Export | str, metadata: dict[str, Any]
) -> Exported:
    """Write an SAE of raw activations, once it was read back and found to compute the same.

    Args:
        folder: new or empty; the SAE is there whole or not at all.
        format: one of `EXPORTS`.
        metadata: of the SAE's cfg.json: model, site, data and how it was trained.

    Raises:
        InputError: if the folder is taken or cannot be written, the format has no such SAE, or what
            was written computes something else.
    """
    folder = Path(folder).absolute()
    if format not in get_args(Export):
        raise InputError(f"expected a format of {', '.join(get_args(Export))}, got {format!r}")
    _refuse_if_unknown_there(sae, format)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(
            f"expected a new or empty folder for the SAE, found files at {folder}; choose another, "
            "or remove it"
        )
    unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    with writing(folder, sum(p.nbytes for p in sae.parameters())):
        try:
            unfinished.mkdir(parents=True)
            if format == "dictionary_learning":
                _write_dictionary_learning(sae, unfinished, metadata)
            elif format == "jumprelu":
                save_sae(to_jumprelu(sae), unfinished, metadata=metadata, dtype=torch.float32)
            else:
                save_sae(sae, unfinished, metadata=metadata)
            found = parity(sae, read_sae(unfinished).sae)
            check_parity(found)
            if folder.exists():
                folder.rmdir()
            os.replace(unfinished, folder)
            sync(folder.parent)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return Exported(tuple(sorted(folder.iterdir())), found)


def check_parity(found: Parity) -> None:
    """Raise InputError unless the two SAEs that were compared agree."""
    # Each by itself: of 0 and NaN, max() takes 0.
    if not all(each <= LARGEST_DIFFERENCE for each in (found.latents, found.reconstructions)):
        raise InputError(
            f"expected the written files to compute the same within {LARGEST_DIFFERENCE:g}, found "
            f"{found.sentence}; nothing was written"
        )


def _refuse_if_unknown_there(sae: SAE, format: str) -> None:
    if isinstance(sae, GatedSAE) and sae.tie == "untied" and format != "gsae_core":
        raise InputError(
            "expected a Gated SAE whose paths share directions, got one with tie 'untied', which "
            "no other library has; export it as gsae_core"
        )
    if isinstance(sae, TopKSAE) and format == "jumprelu":
        raise InputError(
            "expected an SAE whose latents have thresholds of their own, got TopK, whose threshold "
            "depends on the token; export it as saelens"
        )
    if sae.input_norm is not None and format == "dictionary_learning":
        raise InputError(
            f"expected an SAE whose inputs are not normalised token by token, got one that does so "
            f"({sae.input_norm}), which dictionary_learning cannot say; export it as saelens"
        )


@torch.no_grad()
def to_jumprelu(sae: SAE) -> JumpReluSAE:
    """Return the JumpReLU SAE that computes the same, in double precision.

        W_enc = W_gate exp(r_mag),  b_enc = b_mag,  theta = max(0, b_mag - exp(r_mag) b_gate)

    arXiv:2404.16014v2, section 3.2: pi_mag > theta is pi_gate > 0, times a positive number. A ReLU
    SAE is one with theta = 0. TopK and untied paths have no such threshold: InputError.
    """
    _refuse_if_unknown_there(sae, "jumprelu")
    sae = copy.deepcopy(sae).double()
    state = dict[str, Tensor](sae.named_parameters())
    if isinstance(sae, GatedSAE):
        gain = 1.0 if sae.r_mag is None else sae.r_mag.exp()
        state |= {"W_enc": sae.W_gate * gain, "b_enc": sae.b_mag}
        state["threshold"] = sae.jumprelu_threshold()
    elif isinstance(sae, ReluSAE):
        state["threshold"] = torch.zeros_like(state["b_enc"])
    settings = sae.settings if isinstance(sae, JumpReluSAE) else {}
    jump = JumpReluSAE(sae.d_in, sae.d_sae, **settings).double()
    jump.input_norm = sae.input_norm
    jump.load_state_dict({name: state[name] for name, _ in jump.named_parameters()})
    return jump


def _write_dictionary_learning(sae: SAE, folder: Path, metadata: dict[str, Any]) -> None:
    kind, trainer, names = DICTIONARY_LEARNING[sae.architecture]
    tensors = file_tensors(sae)
    if isinstance(sae, JumpReluSAE):
        # The only one that reads x and not x - b_dec. Of double precision, for a difference of
        # large numbers is rounded here.
        shift = tensors["b_dec"].double() @ tensors["W_enc"].double()
        tensors["b_enc"] = tensors["b_enc"].double() - shift
    if isinstance(sae, TopKSAE):
        # A threshold that was never set: the library then counts, as ours does.
        tensors["k"], tensors["threshold"] = torch.tensor(sae.k), torch.tensor(-1.0)
    state = {name: tensors[OUR_NAMES.get(name, name)] for name in names.split()}
    state = {name: t.T.contiguous() if name.endswith(".weight") else t for name, t in state.items()}
    state = {name: t.to(torch.int32 if name == "k" else torch.float32) for name, t in state.items()}
    torch.save(state, folder / "ae.pt")
    layer, site = layer_and_site(str(metadata.get("hook_name")))
    coeff = metadata.get("sparsity_coeff_raw", metadata.get("sparsity"))
    write_json(
        folder / "config.json",
        {
            "trainer": {
                "dict_class": kind,
                "trainer_class": trainer,
                "activation_dim": sae.d_in,
                "dict_size": sae.d_sae,
                "layer": layer,
                "lm_name": metadata.get("model_name"),
                "submodule_name": None if site is None else f"{site}_layer_{layer}",
                "wandb_name": metadata.get("name", kind),
                "device": "cpu",
            }
            | ({"k": sae.k} if isinstance(sae, TopKSAE) else {"l1_penalty": coeff}),
            "buffer": {
                "d_submodule": sae.d_in,
                "io": "out",
                "ctx_len": metadata.get("context_size"),
                "device": "cpu",
            },
            "gsae_core": metadata,
        },
    )
