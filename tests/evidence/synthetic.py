"""Small made-up streams: sparse latents, a change with planted writes, documents of different lengths. No models."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from autointerp.evidence.extras import Extra
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import SELECTORS, Question, Ranking
from autointerp.evidence.statistics import ChangeStatistics, PairedCodes, place_of

PIECE = 64
"""Tokens of a sequence."""


@dataclass(frozen=True)
class Stream:
    """n tokens, d residual width, m latents."""

    z: np.ndarray
    """[n, m] float32, base side."""
    z_adapted: np.ndarray
    """[n, m] float32."""
    x: np.ndarray
    """[n, d] float32, base side."""
    change: np.ndarray
    """[n, d] float32."""
    order: np.ndarray
    """Document of each token [n]."""
    W_dec: np.ndarray
    """[m, d] float32, rows of norm one."""

    def codes(self, tokens: np.ndarray) -> PairedCodes:
        """The tokens at these indices, as one batch."""
        first = np.searchsorted(self.order, self.order[tokens])
        return PairedCodes(
            base=csr_matrix(self.z[tokens]),
            adapted=csr_matrix(self.z_adapted[tokens]),
            x_base=self.x[tokens],
            x_adapted=self.x[tokens] + self.change[tokens],
            order=self.order[tokens],
            position=tokens - first,
            place=place_of(tokens - first, PIECE),
        )

    def statistics(
        self, *batches: np.ndarray, tracked: np.ndarray | None = None, extras: Iterable[type[Extra]] = ()
    ) -> ChangeStatistics:
        """Statistics of the tokens in `batches`, added one after the other; of all in one when none is given."""
        m, d = self.W_dec.shape
        statistics = ChangeStatistics(m, d, np.arange(m) if tracked is None else tracked, 0, extras)
        for tokens in batches or (np.arange(len(self.order)),):
            statistics.add(self.codes(tokens), self.W_dec, np.zeros(d, np.float32))
        return statistics

    def fitted(self, statistics: ChangeStatistics | None = None) -> FittedMap:
        return FittedMap(statistics or self.statistics(), torch.from_numpy(self.W_dec))


def choose(fitted: FittedMap, top: int = 50, fdr: float = 0.05) -> Ranking:
    """What the `change` selector says."""
    return SELECTORS.get("change")(Question(fitted, top, fdr, 0))


def stream(
    seed: int = 0,
    n_docs: int = 24,
    tokens: int = 120,
    m: int = 48,
    d: int = 16,
    gain: float = 0.0,
    n_planted: int = 16,
    noise: float = 0.3,
    shift: float = 0.0,
) -> Stream:
    """Latents 0 … n_planted − 1 write `gain` more along their own direction; all else is noise and shift."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(tokens // 2, tokens * 3 // 2, n_docs)
    order = np.repeat(np.arange(n_docs), lengths)
    n = len(order)
    fires = rng.random((n, m)) < 0.12
    z = (fires * rng.gamma(4, 0.5, (n, m))).astype(np.float32)
    W_dec = rng.normal(size=(m, d)).astype(np.float32)
    W_dec /= np.linalg.norm(W_dec, axis=1, keepdims=True)
    change = noise * rng.normal(size=(n, d)) + shift * np.ones(d)
    change += gain * z[:, :n_planted] @ W_dec[:n_planted]
    z_adapted = z.copy()
    z_adapted[:, :n_planted] *= 1 + gain
    x = (z @ W_dec + 0.1 * rng.normal(size=(n, d))).astype(np.float32)
    return Stream(z, z_adapted, x, change.astype(np.float32), order, W_dec)
