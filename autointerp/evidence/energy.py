"""How strongly a weight change acts along directions: v ↦ Σ ‖Pᵀv‖², and how far that is from what chance gives.

Everything here depends on ΔW alone, not on how it is factored: S² = vᵀ M v with M = ΔW ΔWᵀ (write side, v an encoder
column) or ΔWᵀ ΔW (read side, v a decoder row). Where v points anywhere, ρ = d·S²/(‖v‖² tr M) has mean 1 and, for ν well
below d, νρ is close to χ² with ν = (tr M)²/tr M² degrees of freedom (Welch–Satterthwaite; ν = 1/Σλ², λ = σ²/Σσ²).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy.special import iti0k0
from scipy.stats import false_discovery_control, norm
from torch import Tensor

_FAR = 20.0
"""From where on the tail of a product of normals is taken from its asymptote: within 1 %."""
_NORMAL_MAD = 1.4826
"""Standard deviation of a normal variable over its median absolute deviation."""


class Energy:
    """The quadratic form of several weight changes on the same space of width d. Sums; the order does not matter."""

    def __init__(self, d: int, dtype: torch.dtype = torch.float32):
        self.d = d
        self.dtype = dtype
        self._thin: list[Tensor] = []
        self._gram: Tensor | None = None

    def add(self, P: Tensor) -> None:
        """Adds ‖Pᵀv‖², P [d, k]. Thin ones are kept as they are until together they have d columns or more."""
        if len(P) != self.d:
            raise ValueError(f"P has {len(P)} rows, want {self.d}")
        self._thin.append(P.to(self.dtype))
        if self._gram is not None or sum(part.shape[1] for part in self._thin) >= self.d:
            gram = P.new_zeros(self.d, self.d, dtype=self.dtype) if self._gram is None else self._gram
            for part in self._thin:
                gram.addmm_(part, part.T)
            self._gram, self._thin = gram, []

    def __call__(self, V: Tensor) -> Tensor:
        """Σ ‖Pᵀv‖² [n] of each column of V [d, n]."""
        V = V.to(self.dtype)
        if self._gram is not None:
            return (self._gram @ V).mul_(V).sum(0).clamp_min_(0)
        if not self._thin:
            return V.new_zeros(V.shape[1])
        return (self._stacked.T @ V).square_().sum(0)

    @property
    def trace(self) -> float:
        """tr M = Σ ‖ΔW‖_F²; 0 where nothing is changed."""
        if self._gram is not None:
            return float(self._gram.diagonal().sum(dtype=torch.float64))
        return float(sum(part.square().sum(dtype=torch.float64) for part in self._thin))

    @property
    def degrees(self) -> float:
        """ν, the number of directions that the change is spread over; 0 where nothing is changed."""
        if not self.trace:
            return 0.0
        M = self._gram if self._gram is not None else self._stacked.T @ self._stacked
        scale = float(M.abs().max())  # so that squares of small weights do not vanish
        return (self.trace / scale) ** 2 / float((M / scale).square().sum(dtype=torch.float64))

    @property
    def _stacked(self) -> Tensor:
        if len(self._thin) > 1:
            self._thin = [torch.cat(self._thin, 1)]
        return self._thin[0]


def relative(energy: np.ndarray, square_norm: np.ndarray, trace: float, d: int) -> np.ndarray:
    """ρ [m] = d·S²/(‖v‖² tr M): 1 is what a random direction gets. NaN for directions of norm 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return (
            np.where(square_norm > 0, d * energy / (square_norm * trace), np.nan)
            if trace
            else np.full(len(energy), np.nan)
        )


class Standardised(NamedTuple):
    """How each latent stands out among all of the dictionary."""

    z: np.ndarray
    """[m], in robust standard deviations."""
    q: np.ndarray
    """Benjamini–Hochberg q-value [m] of z being large; 1 where there is nothing to say."""


def standardise(rho: np.ndarray) -> Standardised:
    """Against the empirical null: the cube roots of ρ, which for χ² are close to normal (Wilson and Hilferty 1931),
    centred by their median and scaled by their median absolute deviation.

    Encoders of real dictionaries do not point anywhere: the χ² holds for ρ only up to a scale and a spread that most
    latents share, and these are what median and MAD take out.
    """
    root = np.cbrt(rho)
    finite = np.isfinite(root)
    z, q = np.full(len(rho), np.nan), np.ones(len(rho))
    if not finite.any():
        return Standardised(z, q)
    median = np.median(root[finite])
    spread = _NORMAL_MAD * np.median(np.abs(root[finite] - median))
    if not spread:
        return Standardised(np.where(finite, 0.0, np.nan), q)
    z[finite] = (root[finite] - median) / spread
    q[finite] = false_discovery_control(norm.sf(z[finite]))
    return Standardised(z, q)


def standardise_product(one: np.ndarray, other: np.ndarray) -> Standardised:
    """Of |x y| for two factors [m] that, by chance, know nothing of each other: z in products of the factors' robust
    standard deviations, against the product of two normals, whose density is K₀(|t|)/π.

    The tail of such a product is so much heavier than a normal's that `standardise` would select chance itself.
    """
    z = np.abs(one * other) / (_spread(one) * _spread(other) or np.inf)
    return Standardised(z, false_discovery_control(_product_tail(z)))


def _spread(factor: np.ndarray) -> float:
    """Its standard deviation around 0, but for a few that stand out."""
    return _NORMAL_MAD * float(np.median(np.abs(factor)))


def _product_tail(t: np.ndarray) -> np.ndarray:
    """P(|X Y| > t) of independent standard normals: 1 − (2/π)∫₀ᵗ K₀; beyond where that rounds to nothing, as K₀ goes
    asymptotically."""
    far = np.sqrt(2 / (np.pi * np.maximum(t, 1))) * np.exp(-t)
    return np.where(t > _FAR, far, 1 - 2 / np.pi * iti0k0(np.minimum(t, _FAR))[1])
