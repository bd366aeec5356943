"""Where the six sites lie in a language model's modules, and hooks that read, edit or skip them.

`attn_out` and `mlp_out` are always the tensors that are added to the residual stream, as in
TransformerLens; tests hold every site of every family equal to its cache.
"""

import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gsae_core.config import SITES, Site, hook_name
from gsae_core.errors import InputError
from gsae_core.lm.catalog import FAMILIES


class Tap(NamedTuple):
    """A tensor on its way through a module: the first input, or the (first) output."""

    module: nn.Module
    end: Literal["input", "output"]


class BlockSites(NamedTuple):
    """One block: where each site is tapped, and what has run once the site's value exists."""

    block: nn.Module
    taps: Mapping[Site, Tap]
    before: Mapping[Site, tuple[nn.Module, ...]]
    """Modules of this block that a pass continued from the site may skip; none if absent."""


def hf_blocks(hf: Any) -> list[BlockSites]:
    """Return the sites of every block of a Hugging Face causal LM of a family in `FAMILIES`."""
    family = FAMILIES[hf.config.model_type]
    found = []
    for block in hf.base_model.get_submodule(family.blocks):
        attn, mlp = block.get_submodule(family.attn), block.get_submodule(family.mlp)
        taps: dict[Site, Tap] = {
            "resid_pre": Tap(block, "input"),
            "resid_post": Tap(block, "output"),
            # The projections' inputs: after the non-linearity, and the heads side by side.
            "mlp_hidden": Tap(block.get_submodule(family.mlp_proj), "input"),
            "attn_z": Tap(block.get_submodule(family.attn_proj), "input"),
            "mlp_out": Tap(block.get_submodule(family.mlp_out), "output"),
            "attn_out": Tap(block.get_submodule(family.attn_out), "output"),
        }
        before: dict[Site, tuple[nn.Module, ...]] = {
            "attn_out": (attn,),
            "mlp_hidden": (attn,),
            "mlp_out": (attn, mlp),
            "resid_post": (block,),
        }
        found.append(BlockSites(block, taps, before))
    return found


def bridge_blocks(bridge: Any) -> list[BlockSites]:
    """Return the sites of every block of a TransformerBridge, as its own hook points name them.

    A hook point is a module that passes its input through, so a plain forward hook reads it and
    edits it in either mode of the bridge.
    """
    found = []
    for layer, block in enumerate(bridge.blocks):
        taps: dict[Site, Tap] = {}
        for site in SITES:
            if (point := bridge.hook_dict.get(hook_name(layer, site))) is not None:
                taps[site] = Tap(point, "output")
        # A bridge's hook points lie inside the modules whose output they show.
        parts = dict(block.named_children())  # an attention-only model has no mlp
        attn, mlp = ((parts[name],) if name in parts else () for name in ("attn", "mlp"))
        before: dict[Site, tuple[nn.Module, ...]] = {
            "mlp_hidden": attn,
            "mlp_out": attn,
            "resid_post": attn + mlp,
        }
        found.append(BlockSites(block, taps, before))
    return found


@contextmanager
def hooked(tap: Tap, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within, show `see` the tapped tensor of every pass; what it returns, if any, replaces it."""

    def shown(value: Any) -> Any:
        several = isinstance(value, tuple)
        new = see(value[0] if several else value)
        return (new, *value[1:]) if several and new is not None else new

    if tap.end == "input":
        handle = tap.module.register_forward_pre_hook(lambda _, args: shown(args))
    else:
        handle = tap.module.register_forward_hook(lambda _, _args, output: shown(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def recording(modules: tuple[nn.Module, ...]) -> Iterator[dict[nn.Module, Any]]:
    """Within, the yielded dict fills with what each module returned last."""
    outputs: dict[nn.Module, Any] = {}
    handles = [
        module.register_forward_hook(lambda m, _args, output: outputs.update({m: output}))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaying(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within, each module returns its recorded output and computes nothing; its hooks still run."""
    own = {module: vars(module).get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            # Through __dict__: a bridge's __setattr__ would pass it on to the module it wraps.
            vars(module)["forward"] = lambda *_, _output=output, **__: _output
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward


class ModelLock:
    """Hooks and replayed outputs belong to the modules, which threads share.

    A setting (a hook, say) that serves many passes at once is made when the first of them comes and
    undone when the last one has left: never while a pass runs, which would see its hooks change.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._key: Hashable = None
        self._setting: AbstractContextManager[None] = nullcontext()
        self._inside: set[int] = set()

    @contextmanager
    def shared(
        self, key: Hashable, setting: Callable[[], AbstractContextManager[None]]
    ) -> Iterator[None]:
        """Within, `setting` holds, and only threads that came with the same key are there too."""
        me = threading.get_ident()
        with self._changed:
            if me in self._inside:
                raise InputError(
                    "expected an edit that leaves the language model alone, got one that runs it; "
                    "harvest first and edit with what was found"
                )
            self._changed.wait_for(lambda: self._key is None or self._key == key)
            if self._key is None:
                entered = setting()
                entered.__enter__()
                self._key, self._setting = key, entered
            self._inside.add(me)
        try:
            yield
        finally:
            with self._changed:
                self._inside.remove(me)
                if not self._inside:
                    self._key = None
                    self._setting.__exit__(None, None, None)
                    self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Within, no other thread is there."""
        with self.shared(object(), nullcontext):
            yield
