"""`--top auto`: as many latents as it takes until the coverage curve flattens.

The curve is the held-out share of Δx that the first k latents explain. It is followed to AUTO_TOP latents, and cut at
the first k from which on a step of STEP latents adds less than FLAT of all that the curve ever reaches. The measure is
the curve's own height, not all of Δx, so that a small change and a large one are treated alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from autointerp.run import DEFAULT_TOP

if TYPE_CHECKING:
    from autointerp.evidence.selection import Ranking

STEP = 10
"""Latents over which the curve's slope is measured: single latents add unevenly."""
FLAT = 0.03
"""Share of the curve's height that STEP further latents must add."""


def flattens_at(curve: Sequence[float] | np.ndarray) -> int:
    """The k at which a coverage curve [n], of 1 … n latents, is cut; the default --top where it was not measured."""
    heights = np.concatenate([[0.0], np.maximum.accumulate(np.asarray(curve, dtype=np.float64))])
    if not np.isfinite(heights).all():
        return min(len(curve), DEFAULT_TOP)
    for k in range(len(curve)):
        ahead = min(k + STEP, len(curve))
        if (heights[ahead] - heights[k]) / (ahead - k) * STEP < FLAT * heights[-1] or not heights[-1]:
            return k
    return len(curve)


def cut(ranking: Ranking, curve: Sequence[float]) -> Ranking:
    """The ranking up to where its curve flattens.

    That counts the latents of role `read`; those `written` take a tenth of as many places at most, as under any --top,
    and the `static` ones, which add nothing to the curve, stay.
    """
    n_read = ranking.roles.count("read")
    k = flattens_at(curve[:n_read])
    places = {"read": k, "written": k // 10, "static": len(ranking.roles)}
    latents, roles = [], []
    for latent, role in zip(ranking.latents, ranking.roles, strict=True):
        if places[role] > 0:
            places[role] -= 1
            latents.append(latent)
            roles.append(role)
    return replace(ranking, latents=latents, roles=roles)
