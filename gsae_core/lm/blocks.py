"""The blocks of a Hugging Face decoder, found in its module tree and held to its hidden states.

Block l reads r_l and hands on r_{l+1}, the residual stream: resid_pre and resid_post of layer l.
No list of families says which modules these are. A pass over a few tokens does: what goes into the
blocks and comes out must be what `output_hidden_states` shows, bit for bit.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from gsae_core.errors import InputError
from gsae_core.lm.catalog import FAMILIES
from gsae_core.lm.load import reason
from gsae_core.lm.taps import evaluating, named_input, replaying


class Decoder(NamedTuple):
    """What stands between a model's embedding and its unembedding."""

    blocks: tuple[nn.Module, ...]
    after: tuple[nn.Module, ...]
    """What the last residual stream goes through, one by one: as a rule the final norm."""
    d_model: int
    replays: bool
    """Whether blocks need nothing of earlier ones but the residual stream."""
    logit_scale: float | None
    """Logits per output of the unembedding, before a cap; None: they come of it in another way."""


UNLIMITED = 2**20
"""The context of models that take any length, such as Mamba and BLOOM."""
FINAL_NORMS = ("ln_f", "final_layer_norm", "norm")
"""Names of the final norm in the headless models of `FAMILIES`."""
_CHECKED: WeakKeyDictionary[Any, Decoder] = WeakKeyDictionary()


def text_config(hf: Any) -> Any:
    """Return the part of a model's config that is its language model's."""
    return hf.config.get_text_config(decoder=True)


def context_length(config: Any) -> int:
    """Return the most tokens a sequence may have, by a text config."""
    for name in ("max_position_embeddings", "max_seq_len", "seq_length"):
        if isinstance(n := getattr(config, name, None), int) and n > 0:
            return n
    return UNLIMITED


def find_decoder(hf: Any) -> Decoder:
    """Return the blocks of a Hugging Face causal LM.

    Those of a family in `FAMILIES` stand in its table; others are checked once, by passes that
    leave no trace.

    Raises:
        InputError: if no list of modules hands on one residual stream that is the model's hidden
            states, or a token's depends on later ones.
    """
    if (family := FAMILIES.get(hf.config.model_type)) is not None:
        blocks = tuple(hf.base_model.get_submodule(family.blocks))
        named = hf.base_model.named_children()
        norm = next((module for name, module in named if name in FINAL_NORMS), None)
        after, scale = ((), None) if norm is None else ((norm,), 1.0)
        return Decoder(blocks, after, hf.config.hidden_size, replays=True, logit_scale=scale)
    n_layers = getattr(text_config(hf), "num_hidden_layers", None)
    named = ((name.count("."), m) for name, m in hf.named_modules() if isinstance(m, nn.ModuleList))
    outermost = sorted(named, key=lambda each: each[0])
    lists = [tuple(found) for _, found in outermost if len(found) == n_layers]
    known = _CHECKED.get(hf)
    if known is None or known.blocks not in lists:
        known = _CHECKED[hf] = _checked(hf, lists)
    return known


class _Call(NamedTuple):
    module: nn.Module
    x: Tensor | None
    """The first thing it read, if that was a tensor of floats."""
    given: tuple[Any, ...]
    output: Any
    y: Tensor | None
    """The first thing it returned, likewise."""


def _checked(hf: Any, lists: Sequence[tuple[nn.Module, ...]]) -> Decoder:
    kind = f"{type(hf).__name__} ({hf.config.model_type})"
    wanted = "expected a decoder whose blocks hand on one residual stream"
    other = "choose another model"
    if not lists:
        raise InputError(f"{wanted}, found no list of blocks in {kind}; {other}")
    ids = _few_tokens(hf)
    within = {module for blocks in lists for block in blocks for module in block.modules()}
    watched = {block for blocks in lists for block in blocks} | set(hf.modules()) - within
    try:
        with _calls(watched) as calls:
            out = _pass(hf, ids, output_hidden_states=True)
        states, logits = tuple(out.hidden_states), out.logits
    except Exception as error:  # of many kinds: the model's own
        raise InputError(
            f"{wanted}, got {kind}, which gives no hidden states and logits "
            f"for text alone ({reason(error)}); {other}"
        ) from error
    problem = ""
    for blocks in lists:
        found = _decoder(hf, blocks, calls, states, logits)
        if isinstance(found, Decoder):
            return found._replace(replays=_replays(hf, ids, found.blocks, calls, logits))
        problem = problem or found
    raise InputError(f"{wanted}, got {kind}, in which {problem}; {other}")


def _decoder(
    hf: Any,
    blocks: tuple[nn.Module, ...],
    calls: list[_Call],
    states: tuple[Tensor, ...],
    logits: Tensor,
) -> Decoder | str:
    """Return the decoder of which these are the blocks, or why they are not."""
    at = [i for i, call in enumerate(calls) if call.module in blocks]
    mine = [calls[i] for i in at]
    if [call.module for call in mine] != list(blocks) or len({*blocks}) < len(blocks):
        return "the blocks do not run once each, one after the other"
    stream = [mine[0].x, *(call.y for call in mine)]
    shape = states[0].shape
    for layer, x in enumerate(stream):
        if x is None or x.shape != shape or x.ndim != 3:
            came = "no tensor" if x is None else f"a tensor of shape {tuple(x.shape)}"
            return f"block {max(0, layer - 1)} has {came} where a vector a token was expected"
    for layer in range(1, len(mine)):
        if not _same(mine[layer].x, mine[layer - 1].y):
            return f"block {layer} reads something else than block {layer - 1} hands on"
    # Mamba shows no embedding but the last block's output; all show the final norm's at the end.
    if len(states) != len(stream) or not any(
        all(map(_same, stream[start:], states[:-1])) for start in (0, 1)
    ):
        return "the blocks hand on other tensors than output_hidden_states shows"
    last = stream[-1]
    if last is None or not _close(last[0, :-1], last[1, :-1]):
        return "a token's hidden states depend on later tokens"
    # From module to module, by the tensor that one returned and the next one reads.
    x, after, shown, scale = last, [], _same(last, states[-1]), None
    for call in calls[at[-1] + 1 :]:
        if call.y is None or not _same(call.x, x):
            continue
        if call.module is hf.get_output_embeddings():
            scale = _scale(call.y, logits, cap=logit_cap(hf))
            break
        x, after = call.y, [*after, call.module]
        shown = shown or _same(x, states[-1])
    if not shown:
        return "what follows the last block is not the last one that output_hidden_states shows"
    return Decoder(blocks, tuple(after), shape[-1], replays=False, logit_scale=scale)


def _scale(y: Tensor, logits: Tensor, *, cap: float | None) -> float | None:
    """Return what the unembedding's output is multiplied by to be the logits, before the cap."""
    if y.shape != logits.shape or not y.any():
        return None
    if cap is not None:
        return 1.0 if _close(cap * torch.tanh(y / cap), logits) else None
    wide, wanted = (x.cpu().double().flatten() for x in (y, logits))  # MPS has no float64
    scale = float(wanted @ wide / (wide @ wide))
    return scale if _close(y * scale, logits) else None


def logit_cap(hf: Any) -> float | None:
    """Return the bound that a tanh keeps the logits within; None: none does."""
    return getattr(text_config(hf), "final_logit_softcapping", None)


def _replays(
    hf: Any, ids: Tensor, blocks: tuple[nn.Module, ...], calls: list[_Call], logits: Tensor
) -> bool:
    """Return whether the last block needs only what the one before it returned."""
    mine = {call.module: call for call in calls}
    said = [mine[block].output for block in blocks]
    # Of what a block returns besides, attention weights say, nothing goes into another one.
    besides = {
        id(each) for output in said if isinstance(output, tuple | list) for each in output[1:]
    }
    if any(
        id(each) in besides for block in blocks for each in mine[block].given if each is not None
    ):
        return False
    try:
        with replaying({block: said[-2] for block in blocks[:-1]}):
            again = _pass(hf, ids).logits
    except Exception:  # what an earlier block leaves for a later one, besides
        return False
    return _close(again, logits)


def _pass(hf: Any, ids: Tensor, **options: Any) -> Any:
    with evaluating(hf):
        return hf(input_ids=ids, use_cache=False, **options)


def _few_tokens(hf: Any) -> Int64[Tensor, "rows pos"]:
    """Return two rows that differ in their last token; none stands for padding or an image."""
    settings = (hf.config.to_dict(), text_config(hf).to_dict())
    special = {v for each in settings for k, v in each.items() if "token" in k and type(v) is int}
    plain = [i for i in range(text_config(hf).vocab_size) if i not in special][:5]
    a, b, c, d, e = (plain + 5 * [0])[:5]
    return torch.tensor([[a, b, c, d], [a, b, c, e]], device=next(hf.parameters()).device)


@contextmanager
def _calls(modules: set[nn.Module]) -> Iterator[list[_Call]]:
    """Within, the yielded list fills with what modules read and returned, as they return."""
    calls: list[_Call] = []
    read: dict[nn.Module, tuple[Tensor | None, tuple[Any, ...]]] = {}

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        first = args or (kwargs.get(named_input(module)) if kwargs else None)
        read[module] = _copy(first), (*args, *kwargs.values())

    def after(module: nn.Module, _args: Any, output: Any) -> None:
        calls.append(_Call(module, *read[module], output, _copy(output)))

    with ExitStack() as hooks:
        for module in modules:
            hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(after))
        yield calls


def _copy(value: Any) -> Tensor | None:
    first = value[0] if isinstance(value, tuple | list) and value else value
    return first.clone() if isinstance(first, Tensor) and first.is_floating_point() else None


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a.shape != b.shape:
        return False
    return torch.allclose(a, b.to(a), rtol=0, atol=0, equal_nan=True)


def _close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same up to rounding, wherever both are finite."""
    eps = max(torch.finfo(x.dtype).eps for x in (a, b))
    a, b = (x.nan_to_num(0, 0, 0).float() for x in (a, b))
    tolerance = eps**0.5 * float(b.abs().max())
    return torch.allclose(a, b, rtol=0, atol=tolerance)
