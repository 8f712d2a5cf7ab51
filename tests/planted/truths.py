"""Changes whose cause is known, on the real activations of a `Recording`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from autointerp.evidence.change_map import decompose
from autointerp.evidence.fitted import FittedMap
from tests.planted.recording import Recording

N_PLANTED = 20


def planted(recording: Recording, seed: int, n: int = N_PLANTED) -> np.ndarray:
    """n latents that fire neither rarely nor always."""
    rate = recording.rate()
    pool = np.flatnonzero((rate > 0.002) & (rate < 0.05))
    return np.random.default_rng(seed).permutation(pool)[:n]


def gained(recording: Recording, latents: np.ndarray, gain: float) -> np.ndarray:
    """Δx [n, d] of latents that write so much more along their own directions."""
    return gain * (recording.z[:, latents] @ recording.W_dec[latents])


def paired(recording: Recording, readers: np.ndarray, partners: np.ndarray, proportional: bool) -> np.ndarray:
    """Δx [n, d] where each reader's firing writes its partner's direction.

    `proportional`: as strongly as the reader fires (c_j = d_i, an amplitude of one); else with the partner's mean
    firing activation, however strongly the reader fires, which is no multiple of z, so not quite what the map can say.
    """
    if proportional:
        return recording.z[:, readers] @ recording.W_dec[partners]
    z = recording.z.tocsc()
    strength = np.array([z[:, j].data.mean() for j in partners])
    fires = (recording.z[:, readers] > 0).astype(np.float32)
    return fires @ (strength[:, None] * recording.W_dec[partners])


def beyond_mean(recording: Recording, readers: np.ndarray, partners: np.ndarray) -> np.ndarray:
    """Δx [n, d] where each reader writes its partner's direction by how much it exceeds its mean firing."""
    z = recording.z.tocsc()[:, readers]
    mean = np.array([z[:, at].data.mean() for at in range(len(readers))])
    z.data = np.maximum(z.data - np.repeat(mean, np.diff(z.indptr)), 0).astype(np.float32)
    return z @ recording.W_dec[partners]


def recovered(fitted: FittedMap, latents: Sequence[int], readers: np.ndarray, partners: np.ndarray) -> int:
    """Pairs of which the reader is among `latents` and its row is first of all the partner's direction."""
    rows = fitted.rows_of(latents)
    found = 0
    for j, partner in zip(readers.tolist(), partners.tolist(), strict=True):
        if j in rows:
            (first, size), *_ = [*decompose(rows[j], fitted.W_dec, 6, own=j)[1:], (-1, 0.0)]
            found += first == partner and size > 0
    return found


def false_share(found: set[int], truth: set[int]) -> float:
    """False discovery proportion: the share of `found` that was not planted; 0 where nothing was found."""
    return len(found - truth) / max(len(found), 1)
