"""What is known of an SAE in somebody's files: before it is read, and with it afterwards.

Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from gsae_core.config import Site

Format = Literal[
    "gsae_core",
    "sae_lens",
    "sae_lens_legacy",
    "dictionary_learning",
    "sae_bench",
    "sparsify",
    "gemma_scope",
    "gemma_scope_2",
    "openai",
    "batch_topk",
    "llama_scope",
]
Export = Literal["gsae_core", "saelens", "jumprelu", "dictionary_learning"]
Shape = tuple[int, ...]

FORMATS: dict[Format, str] = {
    "gsae_core": "our own",
    "sae_lens": "SAELens 6",
    "sae_lens_legacy": "SAELens 5 or older",
    "dictionary_learning": "dictionary_learning",
    "sae_bench": "SAEBench",
    "sparsify": "sparsify",
    "gemma_scope": "Gemma Scope",
    "gemma_scope_2": "Gemma Scope 2",
    "openai": "OpenAI sparse_autoencoder",
    "batch_topk": "BatchTopK",
    "llama_scope": "Llama Scope",
}
"""What a page calls each format that can be read."""

EXPORTS: dict[Export, str] = {
    "saelens": "SAELens 6, of the same architecture",
    "jumprelu": "SAELens 6, as the JumpReLU SAE that computes the same",
    "dictionary_learning": "dictionary_learning: ae.pt and config.json",
    "gsae_core": "our own, which SAELens 6 opens too",
}
"""What a page calls each format that can be written."""


@dataclass(frozen=True)
class Place:
    """Where in which language model an SAE belongs, as far as its files say; None where not."""

    model: str | None = None
    """Name on the Hub, or as the files spell it."""

    layer: int | None = None
    site: Site | None = None
    hook_name: str | None = None
    """The site as the files spell it."""


@dataclass(frozen=True)
class Found:
    """An SAE in a folder or file, recognised by its tensors' names and its config; not read yet."""

    name: str
    """A name for it that can be a folder's, made from where it lies."""

    format: Format
    architecture: str
    """In the words of its own library, such as `BatchTopKSAE` or `standard`."""

    weights: Path
    config: Path | None
    """The JSON file that describes it; None where the format has none, or it is missing."""

    keys: Mapping[str, Shape | None]
    """Tensors and their shapes. A pickle tells names alone before torch reads it."""

    d_in: int | None
    d_sae: int | None
    """None where neither shapes nor the config say."""

    n_bytes: int
    """Of the weights, on disk."""

    place: Place

    @property
    def files(self) -> tuple[Path, ...]:
        """The weights, and the config if there is one."""
        return (self.weights,) if self.config is None else (self.weights, self.config)

    @property
    def library(self) -> str:
        """What a page calls the format."""
        return FORMATS[self.format]


@dataclass(frozen=True)
class Provenance:
    """Where an SAE came from, and what was assumed to make it ours; kept in its `cfg.json`."""

    format: Format
    library: str
    architecture: str
    """As its own library calls it."""

    place: Place
    files: tuple[tuple[str, str], ...]
    """Name and SHA-256 of each file it was read from."""

    assumed: tuple[str, ...]
    """Sentences: what the files do not say, and every conversion that was made."""

    sparsity: float | None = None
    """lambda it was trained with, in its own library's units (k of a TopK SAE); None: not said."""

    l0: float | None = None
    """Latents per token that its files claim; None: not said."""

    def as_metadata(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)
