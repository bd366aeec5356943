"""What two language models share if they compute the same activations."""

from hashlib import sha256

import torch

from gsae_core.lm.model import LanguageModel

# Fields of a Hugging Face config that say where a model came from, not what it computes.
ORIGIN = ("_name_or_path", "transformers_version", "architectures")


def fingerprint(model: LanguageModel) -> str:
    """Return a hash of the weights, the config, the precision and the numerics.

    Names and revisions do not enter: two folders with the same weights have one fingerprint.
    """
    config = getattr(model.hf, "config", None)
    fields = config.to_dict() if config is not None and hasattr(config, "to_dict") else {}
    settings = sorted((name, repr(v)) for name, v in fields.items() if name not in ORIGIN)
    # Eager attention and SDPA round differently; so do two ways of computing one activation
    # function, which the tree of modules shows.
    attention = getattr(config, "_attn_implementation", None)
    module = model.hf if model._bridge is None else model._bridge
    head = (repr(module), model.numerics, attention, settings)
    digest = sha256(repr(head).encode())
    for name, weight in module.state_dict().items():
        data = weight.detach().cpu().contiguous()
        digest.update(repr((name, data.dtype, tuple(data.shape))).encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
