"""Language models from a Hugging Face folder or the Hub; their own Python is never run."""

import contextlib
import os
import pickle
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from gsae_core.errors import HUB_NAME, InputError, hub_sentence, is_hub_trouble
from gsae_core.lm.catalog import check_family, model_folder, not_causal

# Masks, positions and rotary tables that earlier versions of transformers saved with the weights;
# it knows most of them itself.
_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|position_ids|inv_freq|original_inv_freq|cos_cached|sin_cached)$"
)


def _check_keys(name: str, hf: Any, loaded: Mapping[str, Any]) -> None:
    """Raise InputError with the keys of model and checkpoint that do not fit.

    Weights that are tied to others are not missing in `loaded`, which `from_pretrained` returns.
    """
    wrong = {
        "missing": loaded["missing_keys"],
        "of another shape": [
            f"{key}: {tuple(came)}, not {tuple(want)}"
            for key, came, want in loaded["mismatched_keys"]
        ],
        "unexpected": [key for key in loaded["unexpected_keys"] if not _BUFFERS.search(key)],
    }
    found = [
        f"{len(keys):,} {what} ({', '.join(sorted(keys)[:3])}{', ...' * (len(keys) > 3)})"
        for what, keys in wrong.items()
        if keys
    ]
    if found:
        raise InputError(
            f"expected the weights of a {type(hf).__name__} in {name!r}, got keys that do not fit, "
            f"{', '.join(found)}; save the whole model again with save_pretrained(), out of any "
            "wrapper and with adapters merged, or choose another checkpoint of it"
        )


_LFS_POINTER = b"version https://git-lfs"


class _Origin(NamedTuple):
    """Where a model's files come from."""

    name: str
    folder: Path | None
    """None: on the Hub."""
    revision: str

    def load(
        self, auto: Any, expected: str, todo: str, *kinds: type[Exception], **options: Any
    ) -> Any:
        """Return what a class of transformers reads there.

        An error of `kinds` is a sentence: of the Hub, of Git LFS's notes in the place of files, or
        of what was `expected`, the reason and what to do.
        """
        # Left out, transformers asks at a terminal whether to run the folder's own Python.
        options |= {"revision": self.revision, "trust_remote_code": False}
        try:
            return auto.from_pretrained(str(self.folder or self.name), **options)
        except kinds as error:
            sentence = f"{expected} ({reason(error)}); {todo}"
            if is_hub_trouble(error):
                sentence = hub_sentence(error, self.name, what="model", revision=self.revision)
            elif pointer := self._pointer():
                sentence = (
                    f"expected the file itself in {pointer}, got Git LFS's pointer to it; fetch it "
                    "with `git lfs pull`"
                )
            raise InputError(sentence) from error

    def _pointer(self) -> Path | None:
        for path in sorted(self.folder.iterdir()) if self.folder is not None else ():
            if path.suffix in (".json", ".safetensors", ".bin", ".model") and path.is_file():
                with path.open("rb") as file:
                    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                        return path
        return None


def open_model(name: str, *, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """Return the Hugging Face causal LM and the tokenizer that `name` stands for."""
    import torch
    from transformers import AutoConfig

    folder = model_folder(name)
    if folder is None and (not HUB_NAME.fullmatch(name) or os.path.exists(name)):
        raise InputError(
            f"expected a Hugging Face model folder with a config.json, found none in {name!r}; "
            "give a folder written by save_pretrained(), a name on the Hub, or 'bundled'"
        )
    origin = _Origin(name, folder, revision or "main")
    config = origin.load(
        AutoConfig,
        "expected the config.json of a causal language model that transformers knows in "
        f"{name!r}, got one that cannot be used",
        "choose another model, or download or save this one again",
        Exception,  # of many kinds, for a value of the wrong kind
    )
    check_config(name, config, headless=True)
    if folder is not None and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"expected the weights of one model, got an adapter beside them in {name!r} "
            "(adapter_config.json); merge the two with merge_and_unload() and save the result"
        )
    tokenizer = _tokenizer(origin)
    with _if_quantised(origin, config):
        hf = _model(origin, config, getattr(torch, dtype)).to(torch.device(device))
    if dtype == "float32":
        _fuse_gelu(hf)
    return hf, tokenizer


def check_config(name: str, config: Any, *, headless: bool = False) -> None:
    """Raise InputError if a Hugging Face config is of no causal LM.

    `headless`: a model saved without its output layer will do; tied to the embedding, it is whole.
    """
    from transformers.models.auto import modeling_auto

    kind = config.model_type
    check_family(name, kind)
    # One that was trained with masks reads both ways, unless it says that it does not.
    masked = kind in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if (masked and not getattr(config, "is_decoder", False)) or not (wanted := _classes(kind)):
        raise not_causal(name, kind)
    came = config.architectures or [*wanted]
    if not set(came) & set(wanted) and not (
        headless and modeling_auto.MODEL_MAPPING_NAMES.get(kind) in came
    ):
        raise InputError(
            f"expected a causal language model ({' or '.join(wanted)}), got {came[0]} in {name!r}; "
            "choose a checkpoint that predicts the next token"
        )


def _classes(kind: str) -> dict[str, Any]:
    """Return the classes of a model type that predict the next token -> what loads them.

    A model that reads images too is loaded whole, as it was saved; text alone leaves them idle.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    names = {
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(kind): "ImageTextToText",
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind): "CausalLM",
    }
    return {
        str(name): getattr(transformers, f"AutoModelFor{auto}")
        for name, auto in reversed(names.items())
        if name is not None
    }


def open_tokenizer(name: str, *, revision: str | None = None) -> Any:
    """Return the tokenizer of the language model that `name` stands for."""
    return _tokenizer(_Origin(name, model_folder(name), revision or "main"))


def _tokenizer(origin: _Origin) -> Any:
    from transformers import AutoTokenizer

    expected = f"expected a tokenizer (tokenizer.json) beside the model in {origin.name!r}, found"
    again = "save it there with tokenizer.save_pretrained()"
    unreadable = f"{expected} none that can be read"
    tokenizer = origin.load(AutoTokenizer, unreadable, again, OSError, ValueError, ImportError)
    # Where the files are missing, most tokenizer classes start out empty and say nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{expected} none; {again}")
    return tokenizer


def _model(origin: _Origin, config: Any, dtype: Any) -> Any:
    import httpx2

    classes = _classes(config.model_type)
    saved = next((name for name in config.architectures or () if name in classes), None)
    auto = classes[saved] if saved is not None else next(iter(classes.values()))
    # Damaged files, weights or settings that make no model, packages that are not here.
    unusable = (OSError, EOFError, ValueError, LookupError, TypeError, ArithmeticError, ImportError)
    # Attention is transformers' choice: SDPA wherever it is exact (Gemma-2 caps its attention
    # scores, which SDPA cannot).
    with _quiet(bar=origin.folder is None):
        hf, keys = origin.load(
            auto,
            "expected weights (model.safetensors) and a config.json that make a model in "
            f"{origin.name!r}, got some that do not",
            "download or save the model again, or install the package that it needs",
            *(*unusable, SafetensorError, pickle.UnpicklingError, httpx2.HTTPError),
            dtype=dtype,
            output_loading_info=True,
            # Told like the other keys that do not fit, by _check_keys.
            ignore_mismatched_sizes=True,
        )
    _check_keys(origin.name, hf, keys)
    return hf


@contextlib.contextmanager
def _if_quantised(origin: _Origin, config: Any) -> Iterator[None]:
    """Say in a sentence what quantised weights raise, of any kind, where they cannot be used."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        settings = getattr(config, "quantization_config", None)
        if settings is None:
            raise
        get = settings.get if isinstance(settings, dict) else vars(settings).get
        raise InputError(
            f"expected a model that can be computed with here, got {origin.name!r}, quantised by "
            f"{get('quant_method')} ({reason(error)}); choose the model that it was made from, or "
            "another machine"
        ) from error


def reason(error: Exception) -> str:
    """Return an error's kind and how its text begins."""
    kind = type(error).__name__
    if isinstance(error, pickle.UnpicklingError):
        return f"{kind}: a file of more than tensors, or damaged"  # torch's own text: ten lines
    said = textwrap.shorten(str(error), 200, placeholder=" ...")
    return f"{kind}: {said.rstrip('.')}" if said else kind


@contextlib.contextmanager
def _quiet(*, bar: bool) -> Iterator[None]:
    """Within, transformers reports no keys that do not fit: our sentence does. `bar`: it may draw.

    Bars over a local folder's weights would only end up in logs; those of downloads stay on.
    """
    from transformers.utils import logging

    with contextlib.ExitStack() as afterwards:
        afterwards.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity_error()
        if not bar and logging.is_progress_bar_enabled():
            afterwards.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
        yield


def _fuse_gelu(hf: Any) -> None:
    """Replace GPT-2's GELU, eight passes over memory, by torch's one: 1.14 times as fast on a CPU.

    In float32 only: in half precision eight passes round eight times, and so it was published.
    """
    from torch import nn
    from transformers.activations import NewGELUActivation

    for module in hf.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))
