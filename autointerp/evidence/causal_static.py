"""By cause, for what a change writes on every token alike (a bias, a steering vector): it has no rows, but directions.

The static part δ̄ is pursued onto decoder directions, as the shares of latents in it are. The first k of them hold the
best that they can of δ̄; as many random directions, what they can.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.causal import Part, RowSet
from autointerp.evidence.change_map import decompose
from autointerp.evidence.fitted import MIN_FIRINGS, FittedMap

SIZES = (1, 2, 5, 10, 20)
"""Numbers of directions at which the static part is measured."""


def direction_sets(fitted: FittedMap, sizes: Iterable[int], draws: int, seed: int) -> list[RowSet]:
    """The first k directions of δ̄'s pursuit at each of `sizes`, each with `draws` sets of k random ones, all of latents
    that fire. None where δ̄ is zero or nothing fires."""
    static = torch.from_numpy(fitted.statistics.static)
    live = np.flatnonzero(fitted.statistics.base.fired >= MIN_FIRINGS)
    directions, generator = fitted.W_dec[live], np.random.default_rng(seed)
    sizes = sorted({min(k, len(live)) for k in sizes} - {0})
    if not sizes or not static.any():
        return []
    pursued = [at for at, _ in decompose(static, directions, sizes[-1], stop=0.0)]
    orders = [generator.permutation(len(live)).tolist() for _ in range(draws)]
    sets: list[RowSet] = []
    for k in sizes:
        sets.append(_constant("directions", k, 0, projected(static, directions[pursued[:k]])))
        for draw, order in enumerate(orders, start=1):
            sets.append(_constant("random directions", k, draw, projected(static, directions[order[:k]])))
    return sets


def projected(v: Tensor, directions: Tensor) -> Tensor:
    """What of v [d] lies in the span of directions [k, d]."""
    solved = torch.linalg.lstsq(directions.T, v[:, None], driver="gelsd").solution
    return (directions.T @ solved)[:, 0]


def _constant(part: Part, k: int, draw: int, written: Tensor) -> RowSet:
    """Writes the same [d] on every token."""
    return RowSet(part, k, draw, torch.zeros(0, dtype=torch.long), torch.zeros(0, len(written)), written.float())
