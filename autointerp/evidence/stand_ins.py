"""Chosen latents that only stand in for what others' rows cannot say.

The change map is linear in z. An adapter that writes beyond a threshold, or as strongly whenever a latent fires, writes
no multiple of z; latents that fire along with it then truly help a linear map, and where there is little noise they
pass every test. Given a bent curve for each chosen latent, nothing is left for those to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix, hstack

from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.spool import Spool
from autointerp.evidence.statistics import product

HINGES = (0.0, 0.5, 1.0, 2.0)
"""Where a curve may bend, in mean firings of its latent: max(z − h, 0). At 0 that is z itself."""
MIN_LEFT = 0.1
"""Of what a latent adds to the others' lines: the share that it must add to their curves."""
MOST_TOKENS = 50_000
"""Read once more at most: the documents are in shuffled order, and some dictionaries encode all latents or none."""
RIDGE = 1e-3
"""Relative to each column's energy: curves of one latent are close to each other."""

Reread = Callable[[Sequence[int]], Iterator[tuple[np.ndarray, np.ndarray]]]
"""Base codes [n, k] of some latents and Δx [n, d], both float32, some counted tokens of the fit half at a time."""


def rereading(spool: Spool, dictionary: Dictionary) -> Reread:
    """From the residual stream of the pass, MOST_TOKENS of it at most."""

    def reread(latents: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        columns, read = torch.as_tensor(list(latents), device=dictionary.W_dec.device), 0
        for stretch in spool.stretches(which=fit_rows(spool.orders)):
            x_base, change = stretch.counted_change(dictionary.W_dec.shape[1])
            yield dictionary.encode_columns(x_base.to(columns.device), columns).float().cpu().numpy(), change
            read += len(change)
            if read >= MOST_TOKENS:
                return

    return reread


def stand_ins(reread: Reread, latents: Sequence[int], mean_firing: np.ndarray) -> list[int]:
    """Those of the chosen `latents` that add to the others' curves less than MIN_LEFT of what they add to their lines.

    mean_firing: mean z of each over the tokens where it fires [k].

    What a latent adds is the energy of Δx that goes unexplained when it is taken out of the joint fit of all. Noise
    adds to both, and to the curves more, as they have more columns: under noise fewer are found.
    """
    k = len(latents)
    if k < 2:
        return []
    sums = _Sums()
    for z, change in reread(latents):
        sums.add(curves(z, mean_firing), change)
    if not sums.n:
        return []
    lines = sums.added(np.arange(k)[:, None])
    bent = sums.added(np.arange(k * (1 + len(HINGES))).reshape(-1, k).T)
    return [latent for latent, line, curve in zip(latents, lines, bent, strict=True) if curve < MIN_LEFT * line]


def curves(z: np.ndarray, mean_firing: np.ndarray) -> csr_matrix:
    """Columns [n, (1 + hinges)·k] of codes z [n, k]: their lines, their other hinges, and whether each fires."""
    fired = csr_matrix(z)
    hinged = [_where(fired, np.maximum(fired.data - h * mean_firing[fired.indices], 0)) for h in HINGES[1:]]
    return csr_matrix(hstack([fired, *hinged, _where(fired, np.ones_like(fired.data))]))


def _where(fired: csr_matrix, values: np.ndarray) -> csr_matrix:
    return csr_matrix((values.astype(np.float32), fired.indices, fired.indptr), shape=fired.shape)


class _Sums:
    """n, Σ f, Σ f fᵀ, Σ Δx, Σ f Δxᵀ of columns f [n, q] and the change [n, d]."""

    def __init__(self) -> None:
        self.n = 0
        self.f = self.ff = self.change = self.fc = np.zeros(())

    def add(self, f: csr_matrix, change: np.ndarray) -> None:
        by_column = csr_matrix(f.T)
        pairs = csr_matrix(by_column @ f)
        self.n += len(change)
        self.f = self.f + np.asarray(f.sum(0, dtype=np.float64)).ravel()
        self.ff = self.ff + pairs.toarray().astype(np.float64)
        self.change = self.change + change.sum(0, dtype=np.float64)
        self.fc = self.fc + product(by_column, np.ascontiguousarray(change)).astype(np.float64)

    def added(self, groups: np.ndarray) -> np.ndarray:
        """Energy of Δx lost by leaving each group of columns out of the joint fit of all of them. groups [k, g]."""
        at = groups.ravel()
        f = self.f[at]
        G = self.ff[np.ix_(at, at)] - np.outer(f, f) / self.n
        B = self.fc[at] - np.outer(f, self.change) / self.n
        scale = np.sqrt(np.maximum(G.diagonal(), np.finfo(float).tiny))
        inverse = np.linalg.inv(G / np.outer(scale, scale) + RIDGE * np.eye(len(at)))
        C = (inverse @ (B / scale[:, None])).reshape(*groups.shape, -1)
        size = groups.shape[1]
        own = np.stack([inverse[i : i + size, i : i + size] for i in range(0, len(at), size)])
        return np.einsum("kgd,kgd->k", C, np.linalg.solve(own, C))
