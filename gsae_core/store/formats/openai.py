"""OpenAI's sparse_autoencoder: a pickled state dict that names its activation function."""

from typing import Any

from torch import Tensor

from gsae_core.errors import InputError
from gsae_core.store.formats.found import Found
from gsae_core.store.formats.parts import Parts


def read(found: Found, tensors: dict[str, Tensor], config: dict[str, Any]) -> Parts:
    """Read a ReLU autoencoder.

    Raises:
        InputError: for TopK, which layer-normalises every token on its way in and undoes it on its
            way out: no SAE of raw activations computes that.
    """
    activation = str(config.get("activation", "ReLU"))
    if activation == "TopK":
        raise InputError(
            f"expected an SAE that takes raw activations in {found.weights}, found OpenAI's TopK, "
            "which layer-normalises every token and undoes it on its reconstruction; no SAE here "
            "computes that, so take the release's ReLU autoencoders"
        )
    if activation != "ReLU":
        raise InputError(
            f"expected the activation ReLU or TopK in {found.weights}, found {activation[:40]!r}"
        )
    weights = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors["decoder.weight"].T,
        "b_dec": tensors["pre_bias"],
    }
    parts = Parts("relu", weights, centred=True)
    parts.assumed.append(
        "Takes raw activations: nothing in the file says so, but the library normalises for TopK "
        "alone."
    )
    if "activation" not in config:
        parts.assumed.append("The file names no activation function: ReLU, the library's default.")
    return parts
