"""Latents that a token, bigram or trigram explains alone: what a table of n-grams predicts of their activation.

The table holds, for every n-gram of the fit documents, the mean activation at its last token; on held-out documents its
R² says how much of the latent it is. A table of longer n-grams leans on that of shorter ones where it has seen little.
A latent that a few n-grams tell needs no language model to be named. Only firings are kept, so that memory goes with
their number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_matrix, diags, vstack

from autointerp.evidence.collector import activations
from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.spool import Spool
from autointerp.records import Ngrams

LONGEST = 3
KNOWN_R2 = 0.9
"""Held-out R² from which a latent is its n-grams. Of two lengths that reach it, the shorter one is meant."""
PRIOR = 1.0
"""Occurrences that the table of shorter n-grams counts for."""
MASS = 0.9
"""Share of the latent's activation that the n-grams named make up."""
MAX_GRAMS = 8
"""A latent that takes more n-grams than this is a class of them, and a model may have a word for it."""


def ngrams(
    spool: Spool, dictionary: Dictionary, latents: Sequence[int], revived: set[int], decode: Callable[[int], str]
) -> list[Ngrams]:
    """R² of each n-gram table for each latent, and the n-grams of those that one explains.

    The activation is the base model's; for `revived` latents the adapted one's. Latents whose activation does not vary
    over either half are left out.
    """
    if not latents or not len(spool):
        return []
    ids, z, fit = _firings(spool, dictionary, latents, revived)
    tables = [Table(ids[:, :n], fit, z) for n in range(1, LONGEST + 1)]
    predicted = csr_matrix((int((~fit).sum()), len(latents)), dtype=np.float32)
    shrunk: Table | None = None
    r2: list[np.ndarray] = []
    held = csr_matrix(z[~fit])
    for table in tables:
        table.lean_on(shrunk)
        predicted = table.predict(ids[~fit], predicted)
        r2.append(_r2(held, predicted, int((~fit).sum())))
        shrunk = table
    return [
        _verdict(latent, at, [float(values[at]) for values in r2], tables, decode)
        for at, latent in enumerate(latents)
        if all(np.isfinite(values[at]) for values in r2)
    ]


def _firings(
    spool: Spool, dictionary: Dictionary, latents: Sequence[int], revived: set[int]
) -> tuple[np.ndarray, csr_matrix, np.ndarray]:
    """(token ids [n, LONGEST], the last one first and −1 beyond the start of a sequence; z [n, k]; fit half or not [n])
    of the counted tokens."""
    columns = torch.as_tensor(list(latents), device=dictionary.W_dec.device)
    late = np.array([latent in revived for latent in latents])
    ids: list[np.ndarray] = []
    codes: list[csr_matrix] = []
    fit: list[np.ndarray] = []
    fits = fit_rows(spool.orders)
    for stretch in spool.stretches():
        z = activations(stretch.x_base, stretch.counted, dictionary, columns)
        if late.any():
            z[:, late] = activations(stretch.x_adapted, stretch.counted, dictionary, columns[torch.from_numpy(late)])
        codes.append(csr_matrix(z[stretch.counted]))
        ids.append(np.concatenate([_histories(spool.ids(int(s))) for s in stretch.sequences])[stretch.counted])
        fit.append(np.repeat(fits[stretch.sequences], np.diff(stretch.bounds))[stretch.counted])
    return np.concatenate(ids), csr_matrix(vstack(codes)), np.concatenate(fit)


def _histories(ids: np.ndarray) -> np.ndarray:
    """[t, LONGEST]: each token and those before it, −1 where there are none."""
    found = np.full((len(ids), LONGEST), -1, np.int64)
    for back in range(LONGEST):
        found[back:, back] = ids[: len(ids) - back]
    return found


class Table:
    """Mean activations of the n-grams of one length in the fit half. u distinct n-grams, k latents."""

    def __init__(self, ids: np.ndarray, fit: np.ndarray, z: csr_matrix):
        """ids [n, length], the last token first; fit [n]; z [n, k]."""
        self.length = ids.shape[1]
        self._size = int(ids.max(initial=0)) + 2
        mine, first, inverse = np.unique(self._keys(ids[fit]), return_index=True, return_inverse=True)
        self.keys, self.grams = mine, ids[fit][first]
        """Keys [u], ascending, and the token ids of each [u, length]."""
        self.counts = np.bincount(inverse, minlength=len(mine)).astype(np.float64)
        n = len(inverse)
        where = csr_matrix((np.ones(n, np.float32), (inverse.ravel(), np.arange(n))), shape=(len(mine), n))
        self.sums = csr_matrix(where @ csr_matrix(z[fit]))
        """Σ z [u, k]."""
        self.means: csr_matrix = self.sums

    def _keys(self, ids: np.ndarray) -> np.ndarray:
        keys = np.zeros(len(ids), np.int64)
        for back in range(self.length):
            keys = keys * self._size + ids[:, back] + 1
        return keys

    def lean_on(self, shorter: Table | None) -> None:
        """Means [u, k], shrunk towards those of the n-grams one token shorter, the shortest towards 0."""
        sums = self.sums
        if shorter is not None:
            sums = sums + PRIOR * shorter.means[np.searchsorted(shorter.keys, shorter._keys(self.grams))]
        self.means = csr_matrix(diags(1 / (self.counts + PRIOR)) @ sums)

    def predict(self, ids: np.ndarray, otherwise: csr_matrix) -> csr_matrix:
        """Means [n, k] at tokens with histories ids [n, LONGEST]; `otherwise` [n, k] where the n-gram is new."""
        keys = self._keys(ids[:, : self.length])
        at = np.minimum(np.searchsorted(self.keys, keys), max(len(self.keys) - 1, 0))
        known = self.keys[at] == keys if len(self.keys) else np.zeros(len(keys), bool)
        rows = np.flatnonzero(known)
        pick = csr_matrix((np.ones(len(rows), np.float32), (rows, at[rows])), shape=(len(keys), len(self.keys)))
        return csr_matrix(pick @ self.means + diags((~known).astype(np.float32)) @ otherwise)


def _r2(z: csr_matrix, predicted: csr_matrix, n: int) -> np.ndarray:
    """[k], of n tokens; NaN where z does not vary."""
    left = np.asarray((z - predicted).power(2).sum(0)).ravel()
    spread = np.asarray(z.power(2).sum(0)).ravel() - np.asarray(z.sum(0)).ravel() ** 2 / max(n, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 1e-12, 1 - left / spread, np.nan)


def _verdict(latent: int, at: int, r2: list[float], tables: list[Table], decode: Callable[[int], str]) -> Ngrams:
    for length, value in enumerate(r2, start=1):
        if value >= KNOWN_R2 and (named := _strongest(tables[length - 1], at)) is not None:
            grams = tuple(tuple(decode(int(i)) if i >= 0 else "" for i in gram) for gram in named)
            return Ngrams(latent, r2[0], r2[1], r2[2], length, grams)
    return Ngrams(latent, r2[0], r2[1], r2[2], None)


def _strongest(table: Table, at: int) -> list[np.ndarray] | None:
    """Token ids, in the order of the text, of the n-grams that make up MASS of latent `at`, strongest first; None where
    those are more than MAX_GRAMS."""
    mass = np.asarray(table.sums[:, [at]].todense()).ravel()
    order = np.argsort(-mass, kind="stable")
    enough = int(np.searchsorted(np.cumsum(mass[order]), MASS * mass.sum())) + 1
    return None if enough > MAX_GRAMS else [table.grams[u][::-1] for u in order[:enough]]
