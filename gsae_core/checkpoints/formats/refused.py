"""What has features and is no SAE of one activation: called by its name where it is refused.

Nothing here imports torch.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gsae_core.checkpoints.formats.libraries import mapping

# Told by a word, the narrower ones first.
KINDS: dict[str, str] = {
    r"temporal": "a temporal SAE, whose attention layers read the positions before each, where a "
    "latent here depends on one activation; gsae_core.checkpoints.formats.temporal.read_temporal "
    "gives its features of sequences",
    r"crosscoder": "a crosscoder, which reads and writes several layers at once; take an SAE of "
    "one of them instead",
    r"\bclt\b|cross.?layer": "a cross-layer transcoder (CLT), which reads one layer and writes "
    "those above; take an SAE of one layer instead",
    r"transcoder": "a transcoder, which writes other activations than it reads; take an SAE of "
    "either side instead",
}
# Repositories whose files say nothing of it, and folders in those of Gemma Scope 2.
_PLACES = r"gemma-scope-[^/]+-transcoders|gemma-scope-2-.*/(transcoder|clt|crosscoder)[^/]*/"


def refusal(weights: Path, names: Iterable[str], config: Mapping[str, Any]) -> str | None:
    """Return the sentence that names such a one by a file's tensors, config or place, if it is."""
    words = " ".join(_words(weights, frozenset(names), dict(config))).lower()
    kind = next((kind for word, kind in KINDS.items() if re.search(word, words)), None)
    return kind and f"expected an SAE in {weights}, found {kind}"


def _words(weights: Path, names: frozenset[str], config: dict[str, Any]) -> list[str]:
    said = config | mapping(config, "metadata") | mapping(config, "trainer")
    words = [str(said.get(key)) for key in ("architecture", "sae_type", "dict_class")]
    if place := re.search(_PLACES, weights.absolute().as_posix()):
        words.append(place[0])
    if {"D", "b"} <= names and any(name.startswith("attn_layers.") for name in names):
        words.append("temporal")
    if any(re.fullmatch(r"[Ww]_(enc|dec)_\d+", name) for name in names):
        words.append("clt")
    outward = (
        said.get("hook_point_out") or said.get("hook_name_out") or said.get("hf_hook_point_out")
    )
    inward = said.get("hook_point_in") or said.get("hook_name") or said.get("hf_hook_point_in")
    if (
        (outward and outward != inward)
        or any(map(config.get, ("transcode", "skip_connection")))
        or mapping(config, "buffer").get("io") == "in_and_out"
        or names & {"affine_skip_connection", "W_skip"}
    ):
        words.append("transcoder")
    return [*words, *_words_of_circuit_tracer(weights.parent / "config.yaml")]


def _words_of_circuit_tracer(path: Path) -> list[str]:
    """Return what a `config.yaml` of sets of transcoders calls them."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", errors="replace") as file:
        return re.findall(r"(?m)^model_kind:.*|^transcoders:", file.read(2**16))
