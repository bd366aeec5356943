"""Tensors on their way through modules: where a block's sites are tapped, to read, edit or skip."""

import inspect
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from gsae_core.config import Site


class Tap(NamedTuple):
    """A tensor on its way through a module: the first input, or the (first) output."""

    module: nn.Module
    end: Literal["input", "output"]
    block: nn.Module | None = None
    """Reads (rows, pos, d) where the module may see rows and positions as one axis (OPT's MLP)."""
    scale: float = 1.0
    """What the model multiplies the tensor by before it is used (Granite)."""


class BlockSites(NamedTuple):
    """Where each site of a block is tapped."""

    block: nn.Module
    taps: Mapping[Site, Tap]
    before: Mapping[Site, tuple[nn.Module, ...]]
    """Modules of this block that a pass continued from the site may skip; none if absent."""


@contextmanager
def hooked(tap: Tap, see: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Within, show `see` the tapped tensor of every pass; what it returns, if any, replaces it."""
    rows = threading.local()  # hooks serve several threads' passes

    def told(module: nn.Module, args: Any, kwargs: Any) -> None:
        rows.shape = (args[0] if args else kwargs[named_input(module)]).shape[:2]

    def seen(x: Tensor) -> Tensor | None:
        if tap.block is None:
            return see(x)
        y = x.view(*rows.shape, -1) * tap.scale
        if (new := see(y)) is None and tap.scale != 1:
            return None
        # What is seen or given stays as it is: Falcon adds to its MLP's output in place.
        return ((y if new is None else new) / tap.scale).view(x.shape)

    def shown(value: Any) -> Any:
        if not isinstance(value, tuple | list):
            return seen(value)
        new = seen(value[0])
        return None if new is None else type(value)((new, *value[1:]))

    # A deep copy of the module, made within, keeps the hook.
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if module is not tap.module:
            return None
        if args:
            new = shown(args)
            return None if new is None else (new, kwargs)
        new = seen(kwargs[name := named_input(module)])
        return None if new is None else (args, kwargs | {name: new})

    def after(module: nn.Module, _args: Any, output: Any) -> Any:
        return shown(output) if module is tap.module else None

    with ExitStack() as hooks:
        if tap.block is not None:
            hooks.enter_context(tap.block.register_forward_pre_hook(told, with_kwargs=True))
        hooks.enter_context(
            tap.module.register_forward_pre_hook(before, with_kwargs=True)
            if tap.end == "input"
            else tap.module.register_forward_hook(after)
        )
        yield


def named_input(module: nn.Module) -> str:
    """Return what a module calls its first input, where a model gives all of them by name."""
    return list(inspect.signature(type(module).forward).parameters)[1]


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Within, a model runs uncompiled, without dropout or gradients; modes come back."""
    training = [module for module in model.modules() if module.training]
    # Compiled code sees no hooks. Where nothing is compiled, asking would import Dynamo: seconds.
    is_compiled = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()
    try:
        for module in training:
            module.training = False
        with torch.no_grad(), eager:
            yield
    finally:
        for module in training:
            module.training = True
