"""One changed weight matrix, ΔW = left @ right, whatever the adapter's format; and all of them, as they stream by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

INSTEAD = "use --selector change, which runs the models over a corpus"
"""What a user can do where weights do not say what was changed."""


class Singular(NamedTuple):
    """ΔW = U diag(S) Vᵀ, float64."""

    U: Tensor
    """[out, k]"""
    S: Tensor
    """[k], falling."""
    V: Tensor
    """[in, k]"""


@dataclass(frozen=True)
class WeightChange:
    """ΔW [out, in] of the linear map y = W x of one module; an embedding is the map from one-hot tokens."""

    module: str
    """Path in the Hugging Face model."""
    left: Tensor
    """[out, k]"""
    right: Tensor | None = None
    """[k, in]; None where `left` is ΔW itself."""
    vocabulary: int = 1
    """Of an embedding: the number of tokens, of which a position sees one. 1 for maps whose inputs are dense."""

    @cached_property
    def singular(self) -> Singular:
        """The singular value decomposition: unlike the factors, it does not change when R R⁻¹ comes between them."""
        left = self.left.double()
        if self.right is None:
            U, S, Vh = torch.linalg.svd(left, full_matrices=False)
            return Singular(U, S, Vh.T)
        Q_out, R_out = torch.linalg.qr(left)
        Q_in, R_in = torch.linalg.qr(self.right.double().T)
        U, S, Vh = torch.linalg.svd(R_out @ R_in.T)
        return Singular(Q_out @ U, S, Q_in @ Vh.T)

    @property
    def outputs(self) -> Tensor:
        """P [out, ·] with P Pᵀ = ΔW ΔWᵀ, over the number of tokens for an embedding: the mean over inputs of norm 1."""
        P = self.left if self.right is None else self.singular.U * self.singular.S
        return P / self.vocabulary**0.5

    @property
    def inputs(self) -> Tensor:
        """P [in, ·] with P Pᵀ = ΔWᵀ ΔW."""
        return self.left.T if self.right is None else self.singular.V * self.singular.S

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.left), (self.left if self.right is None else self.right).shape[1]

    def __bool__(self) -> bool:
        """Whether anything is changed."""
        return bool(self.left.any()) and (self.right is None or bool(self.right.any()))


def added_up(changes: Sequence[WeightChange]) -> WeightChange:
    """The sum of changes of one module, all of them products of thin factors where there are several."""
    first, *others = changes
    rights = [change.right for change in changes if change.right is not None]
    if not others:
        return first
    left = torch.cat([change.left for change in changes], dim=1)
    return WeightChange(first.module, left, torch.cat(rights), first.vocabulary)


def less(end: WeightChanges, start: WeightChanges) -> WeightChanges:
    """What there is to `end` beyond `start`, whose factors are held in memory."""

    def read() -> Iterator[WeightChange]:
        before = {change.module: change for change in start}
        for change in end:
            other = before.pop(change.module, None)
            yield change if other is None else _less(change, other)
        yield from (WeightChange(c.module, -c.left, c.right, c.vocabulary) for c in before.values())
        changes.left_out.update(end.left_out + start.left_out)

    modules = sorted({*end.modules, *start.modules})
    changes = WeightChanges(modules, read, end.low_rank and start.low_rank)
    return changes


def _less(end: WeightChange, start: WeightChange) -> WeightChange:
    """Of one module."""
    if end.right is not None and start.right is not None:
        left = torch.cat([end.left, -start.left], dim=1)
        return WeightChange(end.module, left, torch.cat([end.right, start.right]), end.vocabulary)
    whole = [change.left if change.right is None else change.left @ change.right for change in (end, start)]
    return WeightChange(end.module, whole[0] - whole[1], None, end.vocabulary)


@dataclass
class WeightChanges:
    """The changed matrices of an adapter, read one by one; can be gone through again."""

    modules: list[str]
    """All modules that may be changed, known before any weight is read."""
    read: Callable[[], Iterator[WeightChange]]
    low_rank: bool = False
    """Whether they are products of thin factors, so that there are units to speak of."""
    left_out: Counter[str] = field(default_factory=Counter)
    """What is not a weight matrix and so not read: kind → how many."""

    def __iter__(self) -> Iterator[WeightChange]:
        self.left_out.clear()
        return self.read()
