"""Adapters that are functions inserted at hook points of one base model: steering vectors, SAE-basis adapters, ReFT.

There is one set of weights. The adapted side is the base model with forward hooks that put `function(x)` in the place
of the activation x; the base side is the model as it is, bit for bit.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from autointerp.errors import InputError
from autointerp.evidence.at_hook import at_output, register
from autointerp.evidence.hookpoints import MID, HookPoint, Layout
from autointerp.evidence.model_pair import Evaluation, ModelPair


class HookFunction(Protocol):
    """What is inserted. A pure function of the activation, position by position: replicas in other threads share it."""

    def __call__(self, x: Tensor) -> Tensor:
        """The activation [..., d] that takes the place of x [..., d], in its dtype; x is not written into."""
        ...

    def has_effect(self) -> bool:
        """Whether it changes anything at all; True in doubt."""
        ...


@dataclass(frozen=True)
class Insertion:
    """A function at a hook point."""

    point: HookPoint
    function: HookFunction


class HookedPair(ModelPair):
    """A base model, and the same with functions inserted. Of two at one place, the first given acts first."""

    def __init__(self, model: PreTrainedModel, insertions: Sequence[Insertion]):
        self._model, self._insertions = model, list(insertions)
        self._evaluation = Evaluation(model)
        self.layout = Layout.of(model)
        self.changed_modules = frozenset(
            _place(insertion.point, model, self.layout)
            for insertion in self._insertions
            if insertion.function.has_effect()
        )

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return (self._model,)

    def replica(self) -> Self:
        return copy.deepcopy(self, self.shared_tensors() | {id(self._insertions): self._insertions})

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        with self._evaluation():
            yield self._model

    @contextmanager
    def adapted(self) -> Iterator[PreTrainedModel]:
        with self._evaluation(), inserted(self._model, self._insertions):
            yield self._model


@contextmanager
def inserted(model: PreTrainedModel, insertions: Sequence[Insertion]) -> Iterator[None]:
    """The model with the functions in it; as it was, afterwards."""
    with ExitStack() as held:
        layout = Layout.of(model)
        for insertion in insertions:
            held.callback(insert(model, insertion, layout).remove)
        yield


def insert(model: PreTrainedModel, insertion: Insertion, layout: Layout | None = None) -> RemovableHandle:
    """Puts a function into the model until the handle's `remove` is called. InputError where it never fits."""
    point, layout = insertion.point, layout or Layout.of(model)
    block = f"{layout.blocks}.{point.layer}"
    if point.where == "input" and point.module_path == block and point.layer > 0:
        # The stream between two blocks is one place, whichever of its names was given.
        before = model.get_submodule(f"{layout.blocks}.{point.layer - 1}")
        return before.register_forward_hook(at_output(insertion.function))
    return register(model, point, insertion.function)


def stream_after(layout: Layout, layer: int) -> HookPoint:
    """The residual stream after block `layer`; InputError where the model has no such block."""
    if not 0 <= layer < layout.n_layers:
        raise InputError(
            f"the adapter acts after layer {layer}, the model has 0 to {layout.n_layers - 1}: give --base its own"
        )
    if layout.family is None:
        return layout.located(f"{layout.blocks}.{layer}")
    return layout.named(f"blocks.{layer}.hook_resid_post", layer, "hook_resid_post")


def _place(point: HookPoint, model: PreTrainedModel, layout: Layout) -> str:
    """The path by which `Layout.place` finds what first sees the function."""
    if point.where == "output":
        return point.module_path
    if point.module_path != f"{layout.blocks}.{point.layer}":
        return f"{layout.blocks}.{point.layer}.{MID}"
    if point.layer > 0:
        return f"{layout.blocks}.{point.layer - 1}"
    return next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
