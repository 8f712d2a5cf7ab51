"""Counterparts by decoder cosine: planted ones are found, chance is what it is, and the rows are read in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from autointerp.evidence import counterparts as module
from autointerp.evidence.counterparts import chance, counterparts, nearest
from autointerp.evidence.directions import Block, Directions

M, D = 300, 64


class Rows(Directions):
    """Decoder rows in memory, a few at a time."""

    def __init__(self, rows: Tensor):
        self.rows, (self.m, self.d), self.format, self.hook = rows, rows.shape, "test", None

    def encoder_blocks(self) -> Iterator[Block]:
        raise AssertionError("not asked for")

    def decoder_blocks(self) -> Iterator[Block]:
        for at in range(0, self.m, 64):
            block = slice(at, min(at + 64, self.m))
            yield block, self.rows[block].T

    def decoder_rows(self, latents: list[int]) -> Tensor:
        return self.rows[latents]


def random_rows(seed: int, m: int = M, d: int = D) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=draw) * torch.rand(m, 1, generator=draw)


def test_planted_counterparts_are_found_through_a_permutation():
    """Half of the rows are shared, permuted, of other lengths and under noise; a turned sign is no counterpart."""
    a, b = random_rows(0), random_rows(1)
    to = torch.randperm(M, generator=torch.Generator().manual_seed(2))[:150]
    noise = 0.3 * torch.nn.functional.normalize(random_rows(3, 150), dim=1)
    b[to] = 5 * (torch.nn.functional.normalize(a[:150], dim=1) + noise)
    a[7] = -a[7]
    found = counterparts(list(range(M)), Rows(a), Rows(b))
    for latent in range(150):
        target, cosine, mutual = found.found[latent]
        if latent == 7:
            assert cosine < 0.6
        else:
            assert (target, mutual) == (int(to[latent]), True)
            assert cosine == pytest.approx(1 / 1.09**0.5, abs=0.05)
    by_chance = [cosine > found.chance.limit for latent, (_, cosine, _) in found.found.items() if latent >= 150]
    assert np.mean(by_chance) < 0.05
    assert min(cosine for latent, (_, cosine, _) in found.found.items() if latent < 150 and latent != 7) > (
        found.chance.limit
    )


def test_it_is_the_brute_force_answer():
    a, b = random_rows(4), random_rows(5)
    cosine = torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    found = nearest(a[[3, 99, 250]], Rows(b))
    assert found.latent.tolist() == cosine[[3, 99, 250]].argmax(1).tolist()
    assert found.cosine == pytest.approx(cosine[[3, 99, 250]].max(1).values.numpy(), abs=1e-6)
    both = counterparts([3, 99, 250], Rows(a), Rows(b)).found
    back = cosine.argmax(0)
    assert {j: mutual for j, (_, _, mutual) in both.items()} == {
        j: int(back[target]) == j for j, (target, _, _) in both.items()
    }
    assert nearest(torch.zeros(1, D), Rows(b)).cosine[0] == 0


@pytest.mark.parametrize("d", [16, 64, 512])
def test_chance_depends_on_the_width(d: int):
    """The largest of m cosines of independent isotropic directions: P(cos ≤ c)^m, cos ~ Beta on [−1, 1]."""
    from scipy.stats import beta

    def quantile(level: float) -> float:
        return 2 * float(beta.ppf(level ** (1 / M), (d - 1) / 2, (d - 1) / 2)) - 1

    found = chance(Rows(random_rows(6, 20 * d, d)), Rows(random_rows(7, M, d)))
    assert found.median == pytest.approx(quantile(0.5), abs=0.02)
    assert found.limit == pytest.approx(quantile(module.LEVEL), abs=0.05)


def test_rows_that_crowd_are_near_by_chance():
    """All rows near one direction: isotropic directions would call everything a counterpart."""
    crowd = 3 * torch.nn.functional.normalize(torch.ones(D), dim=0)
    a, b = (torch.nn.functional.normalize(random_rows(seed), dim=1) + crowd for seed in (8, 9))
    found = counterparts(list(range(50)), Rows(a), Rows(b))
    assert found.chance.median > 0.9
    assert np.mean([cosine > found.chance.limit for _, cosine, _ in found.found.values()]) < 0.2
