"""Which latents enter the change map when the dictionary is too large for all of them (G is p × p).

The first part of the corpus ranks latents by ‖B_j‖²/G_jj, the energy of the change that each alone would explain; the
best p get their G on the rest, so that the data which chose them is not the data which tests them.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

MAX_TRACKED = 4096
"""Latents in the map at most: G takes 8 · p² bytes, twice."""


class Screen:
    """Collects ‖B_j‖²/G_jj until `budget` tokens were seen; with m ≤ max_tracked all are tracked from the start."""

    def __init__(self, m: int, d: int, budget: int, max_tracked: int = MAX_TRACKED):
        """m latents, d residual width, `budget` counted tokens to screen on."""
        self.max_tracked, self.budget = max_tracked, budget
        self.left_out = 0.0
        """Share of Σ_j ‖B_j‖²/G_jj that belongs to latents outside the map."""
        self._tracked = np.arange(m) if m <= max_tracked else None
        self.seen = 0
        """Counted tokens that were screened on."""
        if self._tracked is None:
            self._z, self._change = np.zeros(m), np.zeros(d)
            self._G, self._B = np.zeros(m), np.zeros((m, d), dtype=np.float32)

    @property
    def done(self) -> bool:
        return self._tracked is not None

    @property
    def tracked(self) -> np.ndarray:
        """Latents of the map, ascending [p]."""
        if self._tracked is None:
            raise RuntimeError("the screen has not chosen yet")
        return self._tracked

    def add(self, z: csr_matrix, change: np.ndarray) -> None:
        """z [n, m] of the base model, change [n, d]."""
        self.seen += len(change)
        self._z += np.asarray(z.sum(0)).ravel()
        self._change += change.sum(0, dtype=np.float64)
        self._G += np.bincount(z.indices, weights=z.data.astype(np.float64) ** 2, minlength=len(self._G))
        touched = np.unique(z.indices)
        self._B[touched] += z[:, touched].T.tocsr() @ change
        if self.seen >= self.budget:
            self.finish()

    def finish(self) -> np.ndarray:
        """Chooses on what was seen."""
        static = (self._change / max(self.seen, 1)).astype(np.float32)
        B = self._B - self._z[:, None].astype(np.float32) * static
        energy = np.einsum("ij,ij->i", B, B) / np.maximum(self._G, 1e-30)
        energy[self._G == 0] = 0
        best = np.argsort(-energy, kind="stable")[: self.max_tracked]
        self.left_out = float(1 - energy[best].sum() / max(energy.sum(), 1e-30)) if energy.sum() else 0.0
        self._tracked = np.sort(best)
        del self._G, self._B
        return self._tracked
