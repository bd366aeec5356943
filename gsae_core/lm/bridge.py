"""MLP and attention sites that TransformerLens names, each held to the sums of its block.

Of a Hugging Face model of a family without a table of ours (`lm.catalog.FAMILIES`) its architecture
adapters say which modules attention, MLP and their output projections are; no bridge is built, and
the forward pass stays transformers' own. A `TransformerBridge` given as an object has hook points.
"""

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gsae_core.config import Site, hook_name
from gsae_core.errors import InputError, extra
from gsae_core.lm.taps import BlockSites, Tap, evaluating, hooked

_STREAM: tuple[Site, Site] = ("resid_pre", "resid_post")
_INNER: tuple[Site, Site] = ("attn_z", "mlp_hidden")
_ADDED: tuple[Site, Site] = ("attn_out", "mlp_out")


class _Writer(NamedTuple):
    """Attention or the MLP of a block: the modules on its way to the residual stream."""

    block: nn.Module
    module: nn.Module | None
    """None where it is no module of its own (OPT's MLP)."""
    projection: nn.Module | None
    norm: nn.Module | None
    """Between `module` and the residual stream, as in OLMo 2."""
    scale: float

    def out(self, module: nn.Module) -> Tap:
        return Tap(module, "output", self.block, self.scale)

    def outs(self) -> list[Tap]:
        """Return what may be the added tensor: BLOOM's modules return the sum with it."""
        modules = (self.norm, self.module, self.projection)
        return [self.out(module) for module in modules if module is not None]

    def inner(self, out: Tap, seen: Mapping[Tap, Tensor]) -> Tap | None:
        """Return the input of the projection whose output is `out`, or what its norm reads."""
        if self.projection is None or (mine := self.out(self.projection)) not in seen:
            return None
        whole = out if out.module is not self.norm or self.module is None else self.out(self.module)
        same = whole in seen and torch.equal(seen[mine], seen[whole])
        return Tap(self.projection, "input", self.block) if same else None

    def skipped(self, out: Tap | None = None) -> tuple[nn.Module, ...]:
        """Return what need not run again where `out` is replaced: not what `out` lies in."""
        whole = self.module
        lies_in = out is not None and whole is not None and out.module in [*whole.modules()][1:]
        return () if whole is None or lies_in else (whole,)


def find_sites(hf: Any, blocks: Sequence[BlockSites]) -> list[BlockSites]:
    """Return the blocks of a Hugging Face causal LM with the MLP and attention sites they have.

    Held to a short pass over the model: `attn_out` and `mlp_out` are what the block adds to its
    input, and `attn_z` and `mlp_hidden` what is projected to them (to what the last norm reads,
    where there is one). A site that cannot be told so is left out.

    Raises:
        InputError: if TransformerLens is not installed.
    """
    named = _named(hf)
    if named is None:
        return list(blocks)
    writers = [_writers(named, each.block) for each in blocks]
    outs = {tap for of in writers for writer in of for tap in writer.outs()}
    seen = _seen(lambda ids: hf(input_ids=ids, use_cache=False), hf, blocks, outs)
    eps = torch.finfo(next(hf.parameters()).dtype).eps
    return [_with_sites(each, *of, seen, eps) for each, of in zip(blocks, writers, strict=True)]


def _named(hf: Any) -> Any:
    """Return TransformerLens' description of a model's blocks; None where it knows none."""
    try:
        with extra("lens"):
            from transformer_lens.factories import architecture_adapter_factory as adapters
            from transformer_lens.model_bridge.sources import _bridge_builder as builder
    except InputError as error:
        without = "or choose a site that is found without it, resid_pre or resid_post"
        raise InputError(f"{error}, {without}") from error
    kind, weight = type(hf).__name__, next(hf.parameters())
    try:
        config = copy.deepcopy(hf.config)
        config = builder.build_bridge_config_from_hf(config, kind, kind, weight.dtype)
        adapter = adapters.ArchitectureAdapterFactory.select_architecture_adapter(config)
    except (ValueError, AttributeError, LookupError, TypeError, ImportError):
        return None  # it has no adapter for the architecture
    return adapter.get_component_mapping().get("blocks")


def _writers(named: Any, block: nn.Module) -> tuple[_Writer, _Writer]:
    """Return a block's attention and MLP, whose modules go by their names in TransformerLens."""
    parts = named.submodules
    # Granite multiplies what it adds; TransformerLens' sites are the products, and ours too.
    scale = float(getattr(named, "residual_contribution_scale", 1.0))

    def module(parent: nn.Module | None, component: Any) -> nn.Module | None:
        if parent is None or component is None:
            return None
        try:
            return parent.get_submodule(component.name or "")
        except AttributeError:  # a layer of another kind
            return None

    def writer(name: str, norm: str, *projections: str) -> _Writer:
        component = parts.get(name)
        whole = module(block, component)
        inside = component.submodules if component else {}
        found = [module(whole, inside.get(each)) for each in projections]
        projection = next(filter(None, found), None)
        mine = None if whole is block else whole
        # TransformerLens 3 has one name for a norm before and after; the sums say which it is.
        after = module(block, parts.get(f"{norm}_post", parts.get(norm)))
        return _Writer(block, mine, projection, after, scale)

    return writer("attn", "ln1", "o"), writer("mlp", "ln2", "out", "dense_out")


def _seen(
    run: Callable[[Tensor], Any], model: Any, blocks: Sequence[BlockSites], outs: Iterable[Tap]
) -> dict[Tap, Tensor]:
    """Return what taps show in a pass over a few tokens; those that see nothing are left out."""
    seen: dict[Tap, Tensor] = {}

    def keep(tap: Tap, x: Tensor) -> None:
        # A copy: Falcon adds to its MLP's output in place.
        seen[tap] = x.detach().to("cpu", torch.float64, copy=True)

    ids = torch.arange(1, 7, device=next(model.parameters()).device).view(2, 3)
    with ExitStack() as hooks, evaluating(model):
        for tap in {tap for each in blocks for tap in each.taps.values()} | set(outs):
            hooks.enter_context(hooked(tap, partial(keep, tap)))
        run(ids)
    return seen


def _is_sum(total: Tensor, terms: Sequence[Tensor], eps: float) -> bool:
    """Return whether terms, rounded as the model rounds them, sum up to `total`."""
    if any(term.shape != total.shape for term in terms):
        return False
    size = total.abs() + sum(term.abs() for term in terms)
    return bool(((total - sum(terms)).abs() <= 8 * eps * size).all())


def _with_sites(
    each: BlockSites, attn: _Writer, mlp: _Writer, seen: Mapping[Tap, Tensor], eps: float
) -> BlockSites:
    """Return a block with those of the named sites that are what they should be."""
    pre, post = (seen[each.taps[site]] for site in _STREAM)
    outs = [[tap for tap in writer.outs() if tap in seen] or [None] for writer in (attn, mlp)]
    for a, m in itertools.product(*outs):
        if _is_sum(post, [pre, *(seen[tap] for tap in (a, m) if tap)], eps):
            break
    else:
        return each
    new: dict[Site, tuple[Tap | None, tuple[nn.Module, ...]]] = {
        "attn_z": (a and attn.inner(a, seen), ()),
        "attn_out": (a, attn.skipped(a)),
        "mlp_hidden": (m and mlp.inner(m, seen), attn.skipped()),
        "mlp_out": (m, attn.skipped() + mlp.skipped(m)),
    }
    taps, before = dict(each.taps), dict(each.before)
    for site, (tap, earlier) in new.items():
        if tap is not None:
            taps[site], before[site] = tap, earlier
    return BlockSites(each.block, taps, before)


def bridge_blocks(bridge: Any) -> list[BlockSites]:
    """Return the residual sites of every block of a TransformerBridge.

    A hook point is a module that passes its input through, so a plain forward hook reads it and
    edits it in either mode of the bridge.
    """
    found = []
    for layer, block in enumerate(bridge.blocks):
        taps: dict[Site, Tap] = {}
        for site in _STREAM:
            if (point := bridge.hook_dict.get(hook_name(layer, site))) is not None:
                taps[site] = Tap(point, "output")
        # A bridge's hook points lie inside the modules whose output they show.
        found.append(BlockSites(block, taps, {"resid_post": _parts(block, "attn", "mlp")}))
    return found


def _parts(block: Any, *names: str) -> tuple[nn.Module, ...]:
    parts = dict(block.named_children())  # an attention-only model has no mlp
    return tuple(parts[name] for name in names if name in parts)


def bridge_sites(bridge: Any, blocks: Sequence[BlockSites]) -> list[BlockSites]:
    """Return the blocks of a TransformerBridge with what MLP and attention sites they have.

    Those of its hook points that a short pass goes through, `attn_out` and `mlp_out` only if they
    are what the block adds to its input.
    """
    points = [_points(bridge, layer, each.block) for layer, each in enumerate(blocks)]
    every = {tap for taps in points for tap in taps.values()}
    seen = _seen(lambda ids: bridge(ids, return_type="logits"), bridge, blocks, every)
    eps = torch.finfo(next(bridge.parameters()).dtype).eps
    found = []
    for each, named in zip(blocks, points, strict=True):
        mine = {site: tap for site, tap in named.items() if tap in seen}
        pre, post = (seen.get(each.taps[site]) for site in _STREAM)
        added = [pre, *(seen[mine[site]] for site in _ADDED if site in mine)]
        held = post is not None and _is_sum(post, added, eps)
        sites = (*_INNER, *_ADDED) if held else _INNER
        taps: dict[Site, Tap] = dict(each.taps)
        taps |= {site: mine[site] for site in sites if site in mine}
        before: dict[Site, tuple[nn.Module, ...]] = dict(each.before)
        before["mlp_hidden"] = before["mlp_out"] = _parts(each.block, "attn")
        found.append(BlockSites(each.block, taps, before))
    return found


def _points(bridge: Any, layer: int, block: Any) -> dict[Site, Tap]:
    """Return a block's hook points of MLP and attention."""
    taps: dict[Site, Tap] = {}
    for site in (*_INNER, *_ADDED):
        if (point := bridge.hook_dict.get(hook_name(layer, site))) is not None:
            taps[site] = Tap(point, "output", block)
    # What a mixture of experts calls hidden is its output: it has no hidden layer of its own.
    if "mlp_hidden" in taps and taps["mlp_hidden"].module is getattr(block.mlp, "hook_out", None):
        del taps["mlp_hidden"]
    # Granite's own hook points of the products only see a pass with TransformerLens' hooks.
    if (scale := getattr(block, "residual_contribution_scale", None)) is not None:
        for site, part in zip(_ADDED, ("attn", "mlp"), strict=True):
            if site in taps:
                taps[site] = Tap(getattr(block, part).hook_out, "output", block, scale)
    return taps
