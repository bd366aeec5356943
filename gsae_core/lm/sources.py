"""Where a language model comes from: a Hugging Face folder, the Hub, or an object in memory."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gsae_core.errors import InputError
from gsae_core.hub_errors import hub_sentence, is_hub_trouble
from gsae_core.lm.sites import FAMILIES

BUNDLED = Path(__file__).parent.parent / "assets" / "stdlib-gpt2"
"""Folder of the model that ships with the package."""

_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


def open_source(name: str, *, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """Return the Hugging Face causal LM and the tokenizer that `name` stands for.

    Args:
        name: `bundled`, a local folder, or a name on the Hub.
        revision: branch, tag or commit; read for Hub names only.

    Raises:
        InputError: if there is no such model, its kind is unsupported, or it lacks a tokenizer.
    """
    import httpx2
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = _folder(name)
    found = name if where is None else str(where)
    options = {"revision": revision} if where is None and revision else {}
    try:
        config = AutoConfig.from_pretrained(found, **options)
    except OSError as error:
        raise InputError(hub_sentence(error, name, what="model", revision=revision)) from error
    except ValueError as error:  # transformers' word for a model_type that it has never heard of
        raise InputError(_unsupported(name, "unknown to transformers")) from error
    check_config(name, config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found, **options)
    except (OSError, ValueError) as error:
        raise InputError(_no_tokenizer(name)) from error
    # Where the files are missing, most tokenizer classes start out empty and say nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(_no_tokenizer(name))
    try:
        # Attention is transformers' choice: SDPA wherever it is exact (Gemma-2 caps its attention
        # scores, which SDPA cannot).
        with contextlib.nullcontext() if where is None else _no_bar():
            hf: Any = AutoModelForCausalLM.from_pretrained(
                found, dtype=getattr(torch, dtype), **options
            )
    except (OSError, httpx2.HTTPError) as error:
        if is_hub_trouble(error):
            raise InputError(hub_sentence(error, name, what="model", revision=revision)) from error
        raise InputError(
            f"expected model weights (model.safetensors) beside the config of {name!r}, "
            "found none that could be read; download or save the model again"
        ) from error
    if dtype == "float32":
        _fuse_gelu(hf)
    return hf.to(torch.device(device)), tokenizer


def _fuse_gelu(hf: Any) -> None:
    """Replace GPT-2's GELU, eight passes over memory, by torch's one: equal up to rounding.

    The bundled model harvests 1.14 times as fast on a CPU. In float32 only: in half precision the
    eight passes round eight times, which is how the model was published.
    """
    from torch import nn
    from transformers.activations import NewGELUActivation

    for module in hf.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


@contextlib.contextmanager
def _no_bar() -> Iterator[None]:
    # A bar over weights that load in a blink would only end up in logs; the Hub's bars, which the
    # same switch controls, stay on for models that are downloaded.
    from transformers.utils import logging

    drawn = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if drawn:
            logging.enable_progress_bar()


def check_config(name: str, config: Any) -> None:
    """Check that a Hugging Face config describes a causal LM of a supported family.

    Raises:
        InputError: if it does not.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if config.model_type not in FAMILIES:
        raise InputError(_unsupported(name, f"{config.model_type!r}"))
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]
    came = config.architectures or [wanted]
    if wanted not in came:
        raise InputError(
            f"expected a causal language model ({wanted}), got {came[0]} in {name!r}; "
            "choose a checkpoint that predicts the next token"
        )


def _folder(name: str) -> Path | None:
    """Return the folder that `name` stands for, or None if it is a name on the Hub."""
    if name == "bundled":
        return BUNDLED
    folder = Path(name).expanduser()
    if not folder.exists() and _HUB_NAME.fullmatch(name) and name[0] not in "./~":
        return None
    if not (folder / "config.json").is_file():
        raise InputError(
            f"expected a Hugging Face model folder with a config.json, found none in {name!r}; "
            "give a folder written by save_pretrained(), a name on the Hub, or 'bundled'"
        )
    return folder


def _unsupported(name: str, family: str) -> str:
    return (
        f"expected a model of a supported family ({', '.join(FAMILIES)}), got {family} "
        f"in {name!r}; choose another model or pass it as a TransformerBridge"
    )


def _no_tokenizer(name: str) -> str:
    return (
        f"expected a tokenizer (tokenizer.json) beside the model, found none in {name!r}; "
        "save it there with tokenizer.save_pretrained()"
    )
