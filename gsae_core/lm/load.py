"""Language models from a Hugging Face folder or the Hub; their own Python is never run."""

import contextlib
import json
import logging
import pickle
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from gsae_core.errors import HUB_NAME, InputError, hub_sentence, is_hub_trouble
from gsae_core.lm.catalog import FAMILIES, model_folder

# Parts of keys that a wrapper around a model, or around part of it, leaves in them.
WRAPPERS = {
    "_orig_mod": "torch.compile",
    "module": "DataParallel or DistributedDataParallel",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
}

# Masks, positions and rotary tables that earlier versions of transformers saved with the weights;
# it knows most of them itself.
_BUFFERS = re.compile(
    r"(^|\.)(masked_bias|position_ids|inv_freq|original_inv_freq|cos_cached|sin_cached)$"
)
SHOWN = 3


def _check_keys(name: str, hf: Any, loaded: Mapping[str, Any]) -> None:
    """Raise InputError with the keys of model and checkpoint that do not fit.

    Weights that are tied to others are not missing in `loaded`, which `from_pretrained` returns.
    """
    missing = sorted(loaded["missing_keys"])
    unexpected = sorted(key for key in loaded["unexpected_keys"] if not _BUFFERS.search(key))
    mismatched = sorted(loaded["mismatched_keys"])
    shapes = [f"{key}: {tuple(came)}, not {tuple(want)}" for key, came, want in mismatched]
    found = [
        *([f"none for {_counted(missing)} of its own"] if missing else []),
        *([f"another shape for {_counted(shapes)}"] if shapes else []),
        *([f"{_counted(unexpected)} that it does not have"] if unexpected else []),
    ]
    if found:
        raise InputError(
            f"expected the weights of a {type(hf).__name__} in {name!r}, found "
            f"{' and '.join(found)}; {_advice(hf, missing, unexpected, mismatched)}"
        )


def _counted(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - SHOWN:,} more" if len(keys) > SHOWN else ""
    return f"{len(keys):,} key{'s' * (len(keys) > 1)} ({', '.join(keys[:SHOWN])}{more})"


def _advice(
    hf: Any, missing: Sequence[str], unexpected: Sequence[str], mismatched: Sequence[Any]
) -> str:
    known = set(hf.state_dict())
    known |= {key.removeprefix(f"{hf.base_model_prefix}.") for key in known}
    # Without which the keys would be the model's: wrappers' names, or one thing in front of all.
    wrappers, prefixes = dict[str, str](), set[str]()
    for key in unexpected:
        parts = key.split(".")
        if ".".join(part for part in parts if part not in WRAPPERS) in known:
            wrappers |= {part: WRAPPERS[part] for part in parts if part in WRAPPERS}
        n = next((n for n in range(1, len(parts)) if ".".join(parts[n:]) in known), 0)
        prefixes.add("".join(f"{part}." for part in parts[:n]))
    if wrappers:
        names = " and ".join(f"'{part}.' of {wrapper}" for part, wrapper in wrappers.items())
        return f"save the model that is inside the wrapper, or take {names} out of the keys"
    if len(prefixes) == 1 and (prefix := prefixes.pop()):
        return f"take {prefix!r} out of the keys"
    if not missing and not mismatched:
        return (
            f"save the model again as a {type(hf).__name__} alone, with adapters merged, or let "
            "its config.json say what it is"
        )
    head = set(hf.get_output_embeddings().parameters())
    own = {key for key, weight in hf.named_parameters(remove_duplicate=False) if weight in head}
    if own.issuperset(missing) and not mismatched:
        return "choose a checkpoint that has the output layer, for it predicts the next token"
    return "save the model again with save_pretrained(), weights and config.json together"


_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_LFS_POINTER = b"version https://git-lfs"
# How transformers reports keys that do not fit.
_TOLD = ("LOAD REPORT", "This checkpoint seem corrupted")
# What damaged files of weights and of shards raise beside OSError.
_UNREADABLE = (SafetensorError, pickle.UnpicklingError, json.JSONDecodeError)


class _Origin(NamedTuple):
    name: str
    folder: Path | None
    """None: on the Hub."""
    options: dict[str, Any]
    """For every `from_pretrained`."""

    def load(self, auto: Any, **options: Any) -> Any:
        return auto.from_pretrained(str(self.folder or self.name), **self.options, **options)

    def hub_mistake(self, error: Exception) -> InputError:
        revision = self.options.get("revision")
        return InputError(hub_sentence(error, self.name, what="model", revision=revision))

    def mistake(self, error: Exception, sentence: str) -> InputError:
        """Return why files could not be read: the Hub, Git LFS's notes in their place, or else."""
        if is_hub_trouble(error):
            return self.hub_mistake(error)
        for path in sorted(self.folder.iterdir()) if self.folder is not None else ():
            if path.suffix in (".json", ".safetensors", ".bin", ".model") and path.is_file():
                with path.open("rb") as file:
                    if file.read(len(_LFS_POINTER)) == _LFS_POINTER:
                        sentence = (
                            f"expected the file itself in {path}, got Git LFS's pointer to it; "
                            "fetch it with `git lfs pull`"
                        )
        return InputError(sentence)


def open_model(name: str, *, revision: str | None, device: str, dtype: str) -> tuple[Any, Any]:
    """Return the Hugging Face causal LM and the tokenizer that `name` stands for."""
    import torch

    folder = model_folder(name)
    if folder is None and (not HUB_NAME.fullmatch(name) or Path(name).exists()):
        raise InputError(
            f"expected a Hugging Face model folder with a config.json, found none in {name!r}; "
            "give a folder written by save_pretrained(), a name on the Hub, or 'bundled'"
        )
    # Left out, transformers asks at a terminal whether to run the folder's own Python.
    options: dict[str, Any] = {"trust_remote_code": False}
    if folder is None and revision:
        options["revision"] = revision
    origin = _Origin(name, folder, options)
    check_config(name, _config(origin), headless=True)
    if folder is not None and (folder / "adapter_config.json").is_file():
        raise InputError(
            f"expected the weights of one model, got an adapter beside them in {name!r} "
            "(adapter_config.json); merge the two with merge_and_unload() and save the result"
        )
    tokenizer = _tokenizer(origin)
    hf = _model(origin, getattr(torch, dtype))
    if dtype == "float32":
        _fuse_gelu(hf)
    return hf.to(torch.device(device)), tokenizer


def _config(origin: _Origin) -> Any:
    from transformers import AutoConfig

    try:
        return origin.load(AutoConfig)
    except Exception as error:
        # transformers' word for a file that is no JSON, too.
        is_missing = isinstance(error, OSError) and not isinstance(error.__context__, ValueError)
        if origin.folder is None and is_missing:
            raise origin.hub_mistake(error) from error
        # Its word for a model_type that it has never heard of.
        if isinstance(error, ValueError) and not isinstance(error, OSError):
            raise InputError(_unsupported(origin.name, _stranger(origin))) from error
        # A value of the wrong kind leads to errors of many kinds, huggingface_hub's own too.
        sentence = (
            f"expected a config.json that describes a model in {origin.name!r}, got one that "
            f"cannot be used ({_reason(error)}); download or save the model again"
        )
        raise origin.mistake(error, sentence) from error


def _stranger(origin: _Origin) -> str:
    """Return what a config.json says of a model that transformers has no code for."""
    from transformers import PreTrainedConfig

    where = str(origin.folder or origin.name)
    fields: Any = PreTrainedConfig.get_config_dict(where, **origin.options)[0]
    kind = fields.get("model_type") if isinstance(fields, dict) else None
    if kind is None:
        return "a config.json without a model_type"
    if "auto_map" in fields:
        return f"{kind!r}, whose code is Python that comes with it (auto_map) and is never run,"
    return f"{kind!r}, which is unknown to transformers,"


def check_config(name: str, config: Any, *, headless: bool = False) -> None:
    """Raise InputError if a Hugging Face config is of no causal LM of a supported family.

    `headless`: a model saved without its output layer will do; tied to the embedding, it is whole.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_MAPPING_NAMES,
    )

    kind = config.model_type
    if kind not in FAMILIES:
        raise InputError(_unsupported(name, repr(kind)))
    wanted = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    came = config.architectures or [wanted]
    if wanted not in came and not (headless and MODEL_MAPPING_NAMES[kind] in came):
        raise InputError(
            f"expected a causal language model ({wanted}), got {came[0]} in {name!r}; "
            "choose a checkpoint that predicts the next token"
        )


def _unsupported(name: str, family: str) -> str:
    return (
        f"expected a model of a supported family ({', '.join(FAMILIES)}), got {family} "
        f"in {name!r}; choose another model or pass it as a TransformerBridge"
    )


def _tokenizer(origin: _Origin) -> Any:
    from transformers import AutoTokenizer

    name = repr(origin.name)
    missing = (
        f"expected a tokenizer (tokenizer.json) beside the model, found none in {name}; "
        "save it there with tokenizer.save_pretrained()"
    )
    try:
        tokenizer = origin.load(AutoTokenizer)
    except (OSError, ValueError, ImportError) as error:
        sentence = missing
        if "custom code" in str(error):
            sentence = (
                f"expected a tokenizer that transformers has the code of, got one in {name} whose "
                "code is Python that comes with it (auto_map) and is never run; save its "
                "tokenizer.json with PreTrainedTokenizerFast.save_pretrained()"
            )
        elif origin.folder and any((origin.folder / file).is_file() for file in _TOKENIZERS):
            sentence = (
                f"expected a tokenizer that can be read beside the model, got one in {name} that "
                f"cannot ({_reason(error)}); save it again with tokenizer.save_pretrained()"
            )
        raise origin.mistake(error, sentence) from error
    # Where the files are missing, most tokenizer classes start out empty and say nothing.
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(missing)
    return tokenizer


def _model(origin: _Origin, dtype: Any) -> Any:
    import httpx2
    from transformers import AutoModelForCausalLM

    try:
        # Attention is transformers' choice: SDPA wherever it is exact (Gemma-2 caps its attention
        # scores, which SDPA cannot).
        with _quiet(bar=origin.folder is None):
            hf, keys = origin.load(
                AutoModelForCausalLM,
                dtype=dtype,
                output_loading_info=True,
                # Told like the other keys that do not fit, by _check_keys.
                ignore_mismatched_sizes=True,
            )
    except ImportError as error:
        raise InputError(
            f"expected a model that loads with the packages that are here, got {origin.name!r}, "
            f"which needs another ({_reason(error)}); install it, or choose a copy of the model "
            "that does without, not quantised"
        ) from error
    except (OSError, httpx2.HTTPError, EOFError, *_UNREADABLE) as error:
        sentence = (
            f"expected model weights (model.safetensors) beside the config of {origin.name!r}, "
            f"found none that could be read ({_reason(error)}); download or save the model again"
        )
        raise origin.mistake(error, sentence) from error
    except (ValueError, LookupError, TypeError, ArithmeticError) as error:
        # An activation function that there is none of, no heads, a list where tensors were.
        raise InputError(
            f"expected a config.json and weights that make a model in {origin.name!r}, got some "
            f"that do not ({_reason(error)}); download or save the model again"
        ) from error
    _check_keys(origin.name, hf, keys)
    return hf


def _reason(error: Exception) -> str:
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
    from transformers.utils import logging as library

    def is_other(record: logging.LogRecord) -> bool:
        return not any(words in record.getMessage() for words in _TOLD)

    with contextlib.ExitStack() as after:
        log = logging.getLogger("transformers.modeling_utils")
        log.addFilter(is_other)
        after.callback(log.removeFilter, is_other)
        if not bar and library.is_progress_bar_enabled():
            library.disable_progress_bar()
            after.callback(library.enable_progress_bar)
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
