"""Tensors on their way through modules: where a block's sites are tapped, to read, edit or skip."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from gsae_core.config import Site


class Tap(NamedTuple):
    """A tensor on its way through a module: the first input, or the (first) output."""

    module: nn.Module
    end: Literal["input", "output"]


class BlockSites(NamedTuple):
    """Where each site of a block is tapped."""

    block: nn.Module
    taps: Mapping[Site, Tap]
    before: Mapping[Site, tuple[nn.Module, ...]]
    """Modules of this block that a pass continued from the site may skip; none if absent."""


@contextmanager
def hooked(tap: Tap, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within, show `see` the tapped tensor of every pass; what it returns, if any, replaces it."""

    def shown(value: Any) -> Any:
        several = isinstance(value, tuple)
        new = see(value[0] if several else value)
        return (new, *value[1:]) if several and new is not None else new

    def own(module: nn.Module, *values: Any) -> Any:
        # A deep copy of the module, made within, keeps the hook.
        return shown(values[-1]) if module is tap.module else None

    module, of_input = tap.module, tap.end == "input"
    register = module.register_forward_pre_hook if of_input else module.register_forward_hook
    with register(own):
        yield


@contextmanager
def recording(modules: tuple[nn.Module, ...]) -> Iterator[dict[nn.Module, Any]]:
    """Within, the yielded dict fills with what each module returned last."""
    outputs: dict[nn.Module, Any] = {}
    with ExitStack() as hooks:
        for module in modules:
            keep = module.register_forward_hook(lambda m, _args, out: outputs.update({m: out}))
            hooks.enter_context(keep)
        yield outputs


class Replayed(NamedTuple):
    """A module's `forward` that returns a recorded output."""

    output: Any

    def __call__(self, *_: Any, **__: Any) -> Any:
        return self.output


@contextmanager
def replaying(outputs: Mapping[nn.Module, Any]) -> Iterator[None]:
    """Within, each module returns its recorded output and computes nothing; its hooks still run."""
    own = {module: vars(module).get("forward") for module in outputs}
    try:
        for module, output in outputs.items():
            # Through __dict__: a bridge's __setattr__ would pass it on to the module it wraps.
            vars(module)["forward"] = Replayed(output)
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = forward
