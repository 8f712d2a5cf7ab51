"""Counterparts of latents in another dictionary, by the cosine of their decoder rows, and what chance would give.

Rows of a few latents are held against all rows of the other dictionary, block by block; no matrix of both dictionaries
is ever made.

The nearest of m rows is near by chance already, the nearer the smaller the width and the more the rows crowd into a few
directions. So random directions are asked the same: Gaussian ones with the mean and the covariance of the rows (of unit
length) that they stand for, which crowd as those do. k latents, d residual width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.directions import Directions

N_RANDOM = 1000
"""Random directions."""
LEVEL = 0.99
"""Share of them whose nearest row is less near than a counterpart must be."""


@dataclass(frozen=True)
class Nearest:
    """The nearest row of a dictionary to each of some directions."""

    latent: np.ndarray
    """[k]."""
    cosine: np.ndarray
    """Of the directions, not of lines: latents do not fire negatively [k]."""


@dataclass(frozen=True)
class Chance:
    """How near a row of a dictionary random directions find."""

    median: float
    limit: float
    """The nearest row of a share LEVEL of them is less near."""


@dataclass(frozen=True)
class Counterparts:
    """Of some latents of one dictionary, in another."""

    found: dict[int, tuple[int, float, bool]]
    """Latent → (the nearest in the other, cosine, whether each is the other's nearest)."""
    chance: Chance


def counterparts(latents: list[int], mine: Directions, other: Directions, seed: int = 0) -> Counterparts:
    """Of `latents` of the dictionary `mine` in `other`, with the chance of the way there."""
    there = nearest(mine.decoder_rows(latents), other)
    targets = sorted(set(there.latent.tolist()))
    back = dict(zip(targets, nearest(other.decoder_rows(targets), mine).latent.tolist(), strict=True))
    found = {
        latent: (target, cosine, back[target] == latent)
        for latent, target, cosine in zip(latents, there.latent.tolist(), there.cosine.tolist(), strict=True)
    }
    return Counterparts(found, chance(mine, other, seed))


def nearest(directions: Tensor, dictionary: Directions) -> Nearest:
    """Of directions [k, d] among the dictionary's decoder rows; −1 where a row of zeros has no direction."""
    unit = _unit(directions)
    best, latent = torch.full((len(unit),), -1.0), torch.zeros(len(unit), dtype=torch.long)
    for at, columns in dictionary.decoder_blocks():
        cosine, index = (unit @ _unit(columns.T).T).max(1)
        nearer = cosine > best
        best[nearer], latent[nearer] = cosine[nearer], index[nearer] + at.start
    return Nearest(latent.numpy(), best.numpy())


def chance(mine: Directions, other: Directions, seed: int = 0) -> Chance:
    """Of random directions like `mine`'s decoder rows among `other`'s: ū + Σ_i ε_i (u_i − ū) / √m, ε_i ~ N(0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    drawn, weight, total = torch.zeros(N_RANDOM, mine.d), torch.zeros(N_RANDOM, 1), torch.zeros(mine.d)
    for _, columns in mine.decoder_blocks():
        unit = _unit(columns.T)
        draws = torch.randn(N_RANDOM, len(unit), generator=generator)
        drawn += draws @ unit
        weight += draws.sum(1, keepdim=True)
        total += unit.sum(0)
    mean = total / mine.m
    cosine = nearest(mean + (drawn - weight * mean) / mine.m**0.5, other).cosine
    return Chance(float(np.median(cosine)), float(np.quantile(cosine, LEVEL)))


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)
