"""Torch hooks at a hook point: a function of the activation there, in the place where the module takes or gives it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autointerp.evidence.hookpoints import HookPoint

Patch = Callable[[Tensor], Tensor]
"""x [b, t, d] → what takes its place. May raise, which ends the forward pass."""


@contextmanager
def patched(model: nn.Module, point: HookPoint, patch: Patch) -> Iterator[None]:
    """While the block lasts, what is at `point` of the model is replaced by `patch` of it."""
    handle = register(model, point, patch)
    try:
        yield
    finally:
        handle.remove()


def register(model: nn.Module, point: HookPoint, patch: Patch) -> RemovableHandle:
    """As `patched`, until the handle's `remove` is called."""
    module = model.get_submodule(point.module_path)
    if point.where == "output":
        return module.register_forward_hook(at_output(patch))
    # Within a block the skip connection takes what the norm takes.
    hook = in_place(patch) if point.reads else at_input(patch)
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def at_output(patch: Patch) -> Callable[..., Any]:
    """A forward hook: the module's output, or the first of its outputs, becomes `patch` of it."""

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple | list):
            return type(output)((patch(output[0]), *output[1:]))
        return patch(output)

    return hook


def at_input(patch: Patch) -> Callable[..., Any]:
    """A forward pre-hook `with_kwargs`: the module's first input, or its `hidden_states`, becomes `patch` of it."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (patch(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": patch(kwargs["hidden_states"])}

    return hook


def in_place(patch: Patch) -> Callable[..., Any]:
    """A forward pre-hook `with_kwargs` for the stream between attention and MLP: norm and skip connection hold one
    tensor, which no module returns, so it is changed where it lies. `patch` gets a copy, which autograd may keep."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        x.copy_(patch(x.clone()))

    return hook
