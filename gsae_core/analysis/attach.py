"""An SAE at its place in a language model that somebody else runs.

    with sae.attach(hf, 8, "resid_pre") as attached:
        hf(**tokenizer("The cat sat", return_tensors="pt"))
        attached.features  # f (rows, pos, d_sae)

Nothing of the model's output changes unless asked. With `replace` the model reads x_hat, as in an
evaluation; with `steer` it reads x' of `analysis.steering`, as on the page.

Positions that do not count, special tokens and padding, are what they are in every number of this
package: no features there, and the model reads its own activations.
"""

import inspect
import operator
import textwrap
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from gsae_core.analysis.steering import Intervention, Steering
from gsae_core.config import Site, hook_name
from gsae_core.errors import InputError
from gsae_core.lm.corpus import special_ids as tokenizers_special_ids
from gsae_core.lm.model import LanguageModel, model_of
from gsae_core.lm.taps import Replayed, hooked
from gsae_core.sae.base import SAE, check_width
from gsae_core.sae.sparse.codes import SparseCodes, encode_sparse


@contextmanager
def attach(
    sae: SAE,
    model: Any,
    layer: int,
    site: Site,
    *,
    replace: bool = False,
    steer: Sequence[Intervention] = (),
    tokenizer: Any = None,
    special_ids: Iterable[int] | None = None,
) -> Iterator["Attached"]:
    """Within the `with` block, hook an SAE into a language model and yield what it sees.

    The model is run by its own `forward` and `generate`, with a KV cache or without, in any batch.
    Hooks are gone after the block, however it ends; compiled models run uncompiled inside it, as
    compiled code sees no hooks. Several SAEs may be attached, also to one place: there, what was
    attached later reads what the earlier one wrote. Threads may share the model: in a thread that
    attached SAEs only those act, in a thread that attached none all of them do. (On a GPU, use
    gradient checkpointing in one such thread at a time.)

    Gradients flow where the caller's grad mode lets them: to the model, to the SAE's parameters
    and, with `replace`, from the logits to `features`.

    Args:
        sae: takes raw activations; on the device on which the model computes the site. Its
            arithmetic is in its own dtype, and what the model reads in the model's.
        model: a Hugging Face causal LM, a `LanguageModel` or a `TransformerBridge`; used as it is.
        layer: from 0.
        replace: whether the model reads x_hat in place of x; with `steer`, f' decoded.
        steer: at most three interventions, as on the page Steer. `analysis.steering.intervention`
            makes one in the feature's own scale; `Intervention(latent, mode, 2.0, unit=10.0)` is
            one of 2 x 10 in units of f. A strength is from -20 to 20 units.
        tokenizer: tells special tokens (BOS, EOS, padding) as the pages do; that of a
            `LanguageModel` or a bridge is known. Without one, the model's `config` and
            `generation_config` tell them, which may name more than one EOS.
        special_ids: the ids that do not count, if they are others; `()`: every token counts.
            Padding, by the `attention_mask`, never does.

    Raises:
        InputError: on entering, if an argument is of another kind, the model, layer, site or width
            does not fit or `steer` cannot be done; in the model's pass, if the SAE is on another
            device.
    """
    if isinstance(model, str):
        raise InputError(
            f"expected a language model to attach to, got the name {model!r}; load it first, with "
            "gsae_core.load_model() or transformers"
        )
    changes = tuple(steer) if isinstance(steer, Iterable) else (steer,)
    for fits, wanted, got in (
        (isinstance(sae, SAE), "an SAE, as gsae_core.load_sae() returns it", sae),
        (isinstance(replace, bool), "replace=True or replace=False", replace),
        (all(isinstance(each, Intervention) for each in changes), "a list of Intervention", steer),
        (tokenizer is None or hasattr(tokenizer, "bos_token_id"), "a loaded tokenizer", tokenizer),
    ):
        if not fits:
            shown = textwrap.shorten(repr(got), 60)
            raise InputError(f"expected {wanted}, got {shown}; see help(gsae_core.attach)")
    found = model if isinstance(model, LanguageModel) else model_of(model, tokenizer)
    tap = found._tap(layer, site)
    check_width(sae, found.width(site), name=type(sae).__name__, hook_name=hook_name(layer, site))
    special = _special(found, tokenizer, special_ids)
    attached = Attached(Steering(sae, changes, keep_error=not replace), layer, site, special)
    # The headless model: users, and the model with its head, call it.
    attached._entry = entry = getattr(found.hf, "base_model", found.hf)
    attached._signature = inspect.signature(entry.forward)

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        if module is entry:  # and no deep copy
            attached._begin(args, kwargs)

    with (
        _opened(attached),
        entry.register_forward_pre_hook(begin, with_kwargs=True),
        hooked(tap, lambda x: attached._see(x, tap.module)),
    ):
        yield attached


_OPEN: list["Attached"] = []
_LOCK, _EAGER = threading.Lock(), ExitStack()


@contextmanager
def _opened(attached: "Attached") -> Iterator[None]:
    """Within the first of the blocks that are open to the end of the last, nothing is compiled.

    The stance is the process's, and blocks of several threads end in any order.
    """
    with _LOCK:
        if not _OPEN:
            _EAGER.enter_context(torch.compiler.set_stance("force_eager"))
        _OPEN.append(attached)
    try:
        yield
    finally:
        with _LOCK:
            _OPEN.remove(attached)
            if not _OPEN:
                _EAGER.close()


def _special(
    model: LanguageModel, tokenizer: Any, special_ids: Iterable[int] | None
) -> frozenset[int]:
    """Return the ids that do not count: those said, the tokenizer's, or the model's settings'."""
    if special_ids is not None:
        try:
            return frozenset(int(np.int64(operator.index(each))) for each in special_ids)
        except (TypeError, OverflowError) as error:
            raise InputError(
                f"expected token ids in special_ids, got something else ({error}); give numbers, "
                "as tokenizer.convert_tokens_to_ids() returns them"
            ) from error
    if (known := model.tokenizer if tokenizer is None else tokenizer) is not None:
        return frozenset(tokenizers_special_ids(known))
    found: list[int | None] = []
    for settings in ("config", "generation_config"):
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = getattr(getattr(model.hf, settings, None), name, None)
            found += value if isinstance(value, list) else [value]
    named = frozenset(each for each in found if each is not None)
    if not named:
        raise InputError(
            f"expected to learn which tokens of {model.name} are special, got neither a tokenizer "
            "nor ids in the model's own settings; pass tokenizer=..., or special_ids=() if every "
            "token counts"
        )
    return named


class Attached:
    """What an SAE sees of a model's passes, from `attach`.

    `activations`, `features`, `counted` and `codes` are those of the last pass, and stay readable
    after the block: InputError if there was none. A thread that ran the model reads of its own last
    pass; one that did not, of the last one. In `generate` each new token is a pass. To read
    features of all tokens, call the model on what it wrote.
    """

    def __init__(self, steering: Steering, layer: int, site: Site, special: frozenset[int]) -> None:
        self.sae: SAE = steering.sae
        self.steering: Steering = steering
        self.layer: int = layer
        self.site: Site = site
        self.special_ids: frozenset[int] = special
        self._signature = inspect.Signature()
        self._entry: nn.Module | None = None
        self._thread = threading.get_ident()
        # Threads may run the model side by side. Autograd's own thread may repeat a part of the
        # last pass (gradient checkpointing), and began none.
        self._own = threading.local()
        self._latest: tuple[Any, Any] = (None, None)
        self._pass: _Pass | None = None

    @property
    def activations(self) -> Float[Tensor, "rows pos d_in"]:
        """x: the very tensor that the model computed at the site, in its own dtype."""
        return self._last.x

    @property
    def counted(self) -> Bool[Tensor, "rows pos"]:
        """False for special tokens and padding."""
        return self._last.counted

    @property
    def features(self) -> Float[Tensor, "rows pos d_sae"]:
        """f of `activations`, in the SAE's dtype; 0 where a position does not count.

        It has a gradient function if gradients were on in the pass. Computed when first read, or
        in the pass by what needs it: `replace`, `clamp` and `ablate`.
        """
        return self._last.features

    def codes(self) -> SparseCodes:
        """Return the active features of the counted positions, row after row, without a gradient.

        It takes the memory of what fires, where `features` of a wide SAE would take too much.
        """
        return encode_sparse(self.sae, self._last.vectors())

    @property
    def _last(self) -> "_Pass":
        seen = getattr(self._own, "seen", self._pass)
        if seen is None:
            raise InputError(
                f"expected a pass of the model up to {hook_name(self.layer, self.site)} since the "
                "SAE was attached, got none; call the model first"
            )
        return seen

    def _concerned(self) -> bool:
        """Return whether this thread attached this SAE, or none to this model."""
        threads = {each._thread for each in tuple(_OPEN) if each._entry is self._entry}
        return (me := threading.get_ident()) == self._thread or me not in threads

    def _begin(self, args: Any, kwargs: Any) -> None:
        if not self._concerned():
            return
        said = self._signature.bind_partial(*args, **kwargs).arguments
        mask = _padding(said.get("attention_mask"), said.get("past_key_values", said.get("cache")))
        self._own.tokens = self._latest = (said.get("input_ids"), mask)
        self._own.seen = self._pass = None

    def _see(self, x: Tensor, module: nn.Module) -> Tensor | None:
        if not self._concerned():
            return None
        if isinstance(vars(module).get("forward"), Replayed):
            return None  # `Splice` gives back what this hook returned before
        if x.device != self.sae.W_dec.device:
            raise InputError(
                f"expected the SAE on {x.device}, where the model computes "
                f"{hook_name(self.layer, self.site)}, got it on {self.sae.W_dec.device}; "
                f"move it with sae.to({str(x.device)!r})"
            )
        ids, mask = getattr(self._own, "tokens", self._latest)
        seen = self._pass = _Pass(self.sae, x, ids, mask, self.special_ids)
        if hasattr(self._own, "tokens"):
            self._own.seen = seen
        return None if self.steering.is_identity else seen.edited(self.steering)


def _padding(mask: Any, cache: Any) -> Tensor | None:
    """Return a pass's attention mask in two dimensions; a static cache's has four."""
    if isinstance(mask, dict):  # one for each kind of layer
        mask = next(iter(mask.values()))
    if mask is None or (isinstance(mask, Tensor) and mask.ndim == 2):
        return mask
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise InputError(
            "expected an attention_mask of two or four dimensions, to tell padding by, got "
            f"{type(mask).__name__}; load the model with attn_implementation='sdpa'"
        )
    # (rows, heads, pos, keys). Padding may not even attend to itself; its own key comes after
    # those of earlier passes, of which a sliding window keeps the last.
    before = 0 if cache is None else int(cache.get_seq_length())
    attends = mask == 0 if mask.is_floating_point() else mask.bool()
    return attends.any(1).diagonal(min(before, mask.shape[3] - mask.shape[2]), 1, 2)


class _Pass:
    """What one pass shows: nothing is computed before it is read."""

    def __init__(self, sae: SAE, x: Tensor, ids: Any, mask: Any, special: frozenset[int]) -> None:
        self.x, self._sae, self._ids, self._mask, self._special = x, sae, ids, mask, special
        self._grad = torch.is_grad_enabled()

    @cached_property
    def counted(self) -> Bool[Tensor, "rows pos"]:
        rows, pos = self.x.shape[:2]
        counted = torch.ones(rows, pos, dtype=torch.bool, device=self.x.device)
        if self._special:
            if self._ids is None or self._ids.shape != counted.shape:
                raise InputError(
                    "expected a pass that starts from input_ids, to tell special tokens by, got "
                    "one from embeddings or of a part of the model; pass special_ids=() to count "
                    "every position"
                )
            for each in self._special:
                counted &= self._ids.to(counted.device) != each
        # With a KV cache the mask begins before the new tokens.
        if self._mask is not None:
            counted &= self._mask[:, -pos:].bool().to(counted.device)
        return counted

    def vectors(self) -> Float[Tensor, "n d_in"]:
        """Return x of the counted positions in the SAE's dtype."""
        return self.x[self.counted].to(self._sae.W_dec)

    @cached_property
    def features(self) -> Float[Tensor, "rows pos d_sae"]:
        with torch.set_grad_enabled(self._grad):
            f = self._sae.encode(self.vectors())
            whole = f.new_zeros(*self.counted.shape, self._sae.d_sae)
            return whole.index_put((self.counted,), f)

    def edited(self, steering: Steering) -> Tensor:
        """Return what the model reads instead of x, in its dtype."""
        # Half precision rounds once, at the end; what does not count keeps its bits.
        x = self.x.to(torch.promote_types(self.x.dtype, torch.float32))
        edit = steering.edit(self.counted, self.features if steering.reads_latents else None)
        assert edit is not None
        return edit(x).to(self.x)
