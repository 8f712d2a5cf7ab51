"""The change map: what an adapter writes into the residual stream when each base latent fires.

Model, per counted token t:  Δx_t ≈ δ̄ + Σ_j (z_tj − z̄_j) c_j,  where z are the latents of the BASE model and z̄ their
means, Δx = x_adapted − x_base, δ̄ is the mean of Δx (the static part) and c_j [d] is the row of latent j. Everything
here is a pure function of the sufficient statistics (`Moments`); nothing reads text, models or activations. Shapes: p
tracked latents, d residual width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg.lapack import dpotri  # pyright: ignore[reportAttributeAccessIssue] - made at import
from torch import Tensor

RIDGE = 1e-2
"""Ridge relative to the diagonal of G (and to its mean): large enough for latents that always fire together, small
against one."""


@dataclass(frozen=True)
class Moments:
    """Second moments of base latents and the change over one set of tokens, both centred. Additive before centring; see
    `statistics.py`. Codes that were not centred would have every latent that fires help to stand for Σ z̄_j c_j."""

    n: int
    """Counted tokens."""
    G: Tensor
    """Σ (z − z̄)(z − z̄)ᵀ [p, p], float64."""
    B: Tensor
    """Σ (z − z̄)(Δx − δ̄)ᵀ [p, d], float64."""
    S: Tensor
    """Σ (Δx − δ̄)(Δx − δ̄)ᵀ [d, d], float64."""

    @property
    def energy(self) -> float:
        """Σ ‖Δx − δ̄‖², what coverage is a share of."""
        return float(self.S.trace())


def ridge(G: Tensor) -> Tensor:
    """Diagonal of Λ [p] = RIDGE · (diag G + mean diag G)."""
    diagonal = G.diagonal()
    return RIDGE * (diagonal + diagonal.mean()) + torch.finfo(G.dtype).tiny


def ridged(G: Tensor) -> Tensor:
    """G + Λ."""
    A = G.clone()
    A.diagonal().add_(ridge(G))
    return A


def fit(moments: Moments) -> Tensor:
    """All rows C [p, d] by ridge regression of Δx on z."""
    return torch.cholesky_solve(moments.B, torch.linalg.cholesky(ridged(moments.G)))


def refit(moments: Moments, rows: Sequence[int] | Tensor) -> Tensor:
    """Rows [k, d] fitted jointly for the given latents alone (the others' rows are zero)."""
    rows = torch.as_tensor(rows, dtype=torch.long)
    return solved(moments.G[rows][:, rows], moments.B[rows], float(RIDGE * moments.G.diagonal().mean()))


def solved(G: Tensor, B: Tensor, shrink: float) -> Tensor:
    """(G + shrink · 1)⁻¹ B [k, d]."""
    return torch.linalg.solve(G + shrink * torch.eye(len(G), dtype=G.dtype), B)


def explained(moments: Moments, rows: Sequence[int] | Tensor, C: Tensor) -> float:
    """Share of Σ‖Δx − δ̄‖² explained by Σ_j∈rows (z_j − z̄_j) c_j on the tokens of `moments`; may be negative."""
    if not len(rows) or moments.energy == 0:
        return 0.0
    G, B = moments.G, moments.B
    if len(rows) < len(G) or list(rows) != list(range(len(G))):
        at = torch.as_tensor(rows, dtype=torch.long)
        G, B = G[at][:, at], B[at]
    return explained_energy(G, B, C) / moments.energy


def explained_energy(G: Tensor, B: Tensor, C: Tensor) -> float:
    """Σ‖Δx − δ̄‖² less what the rows C [k, d] leave of it, given G [k, k] and B [k, d] of the same latents."""
    cross, square = (C * B).sum(), ((G @ C) * C).sum()
    return float(2 * cross - square)


def _inverse(A: Tensor) -> Tensor:
    """A⁻¹ of a positive definite A. LAPACK's own routine: torch.cholesky_inverse takes several times as long."""
    factor = torch.linalg.cholesky(A).numpy().T  # an upper triangle in the column order that LAPACK works in, in place
    upper, failed = dpotri(factor, lower=0, overwrite_c=1)
    if failed:
        raise np.linalg.LinAlgError(f"potri: {failed}")
    half = torch.from_numpy(upper.T)
    return half + half.tril(-1).T


def _whitening(covariance: Tensor) -> Tensor:
    """Inverse of a covariance [d, d]; the floor keeps directions in which nothing varies from dividing by zero."""
    floor = 1e-6 * covariance.diagonal().mean() + torch.finfo(covariance.dtype).tiny
    floored = covariance + floor * torch.eye(len(covariance), dtype=covariance.dtype)
    factor, failed = torch.linalg.cholesky_ex(floored)
    if not failed:
        return torch.cholesky_inverse(factor)
    # With fewer tokens than latents a map leaves next to nothing, and rounding makes that negative.
    values, vectors = torch.linalg.eigh(floored)
    return (vectors / values.clamp_min(float(floor.abs()))) @ vectors.T


class RowTest:
    """T_j = c_jᵀ Σ̂⁻¹ c_j / [(G+Λ)⁻¹]_jj, Σ̂ the residual covariance. One inverse serves targets and decoys."""

    def __init__(self, G: Tensor):
        self.inverse = _inverse(ridged(G))
        self.ridge = ridge(G)

    def __call__(self, many: Sequence[Moments]) -> list[Tensor]:
        """Statistic of every row, [p], non-negative, of each of `many` that share G."""
        widths = [moments.B.shape[1] for moments in many]
        rows = (self.inverse @ torch.cat([moments.B for moments in many], 1)).split(widths, 1)
        return [self._statistic(moments, C) for moments, C in zip(many, rows, strict=True)]

    def _statistic(self, moments: Moments, C: Tensor) -> Tensor:
        # (G + Λ) C = B, so Σ‖Δx − Cᵀz‖² = S − CᵀB − BᵀC + CᵀGC = S − BᵀC − CᵀΛC.
        residual = moments.S - moments.B.T @ C - C.T @ (self.ridge[:, None] * C)
        whitened = C @ _whitening(residual / max(moments.n - 1, 1))
        return (whitened * C).sum(1) / self.inverse.diagonal()


class GainTest:
    """Joint regression of Δx on all z_j d_j at once, whitened by L = cov(Δx)⁻¹; one degree of freedom for each latent.

    Normal matrix G ∘ (W L Wᵀ), right side Σ_t z_tj ⟨d_j, L Δx_t⟩. Without the whitening it finds nothing: most of Δx
    lies in a few directions that all rows share.
    """

    def __init__(self, moments: Moments, W_dec: Tensor, S: Tensor):
        """S: Σ (Δx − δ̄)(Δx − δ̄)ᵀ [d, d] of all the change that is in the decoys, what `without` took out included."""
        L = _whitening(S / max(moments.n - 1, 1))
        self.whitened = W_dec @ L
        self.inverse = _inverse(ridged(moments.G * (self.whitened @ W_dec.T)))

    def gains(self, moments: Moments) -> Tensor:
        """g [p]: signed change along each latent's own direction; +0.25 means that it writes 25 % more."""
        return self.inverse @ (moments.B * self.whitened).sum(1)

    def __call__(self, many: Sequence[Moments]) -> list[Tensor]:
        """|g_j| / se_j of every latent, [p], of each of `many` that share G."""
        return [self.gains(moments).abs() / self.inverse.diagonal().sqrt() for moments in many]


def without(many: Sequence[Moments], rows: Sequence[int] | np.ndarray) -> tuple[list[Moments], np.ndarray]:
    """Each of `many`, which share one G, with all that the given rows explain of codes and change taken out of both.

    Returns them, over the other latents alone, and which latents those are. A joint fit of the others is then one with
    free rows for these (Frisch & Waugh 1933).
    """
    G, out = many[0].G, torch.as_tensor(rows, dtype=torch.long)
    others = torch.ones(len(G), dtype=torch.bool)
    others[out] = False
    cross, shrink = G[out][:, others], ridge(G)[out, None]
    factor = torch.linalg.cholesky(G[out][:, out] + torch.diag(shrink[:, 0]))
    sides = [cross, *(moments.B[out] for moments in many)]
    A, *solved = torch.cholesky_solve(torch.cat(sides, 1), factor).split([side.shape[1] for side in sides], 1)
    left_G = G[others][:, others] - cross.T @ A
    left = []
    for moments, X in zip(many, solved, strict=True):
        S = moments.S - moments.B[out].T @ X - X.T @ (shrink * X)
        left.append(Moments(moments.n, left_G, moments.B[others] - A.T @ moments.B[out], S))
    return left, np.flatnonzero(others.numpy())


def q_values(target: np.ndarray, decoys: np.ndarray, found: int = 0) -> np.ndarray:
    """q-value of each target in competition with its own decoys; `found` discoveries were made before, by another test.

    target [p]; decoys [R, p]. A latent wins where it exceeds all its decoys. Without an effect it wins once in R + 1
    times, however unevenly it fires over documents, so beyond a threshold τ the wins by chance are about 1/R of the
    losses: the rate is (1 + #losses ≥ τ)/R over the wins ≥ τ, and q the least rate at any τ up to the latent's own
    (Barber & Candès 2015; with several decoys Emery et al. 2020). Losers have q = 1.
    """
    best = decoys.max(0)
    wins = target > best
    order = np.argsort(-np.maximum(target, best), kind="stable")
    losses = np.cumsum(~wins[order])
    rate = (1 + losses) / len(decoys) / np.maximum(found + np.cumsum(wins[order]), 1)
    q = np.empty(len(target))
    q[order] = np.minimum(np.minimum.accumulate(rate[::-1])[::-1], 1.0)
    q[~wins] = 1.0
    return q


def pursue(moments: Moments, candidates: np.ndarray, k: int, least: float = 0.0) -> list[int]:
    """Greedy group pursuit: the row that explains most of what is left, refit of all chosen rows, repeat. At most k of
    `candidates`, and none that would explain less than the share `least` of what the first explains.

    What k chosen rows leave is B − VᵀU with V = L⁻¹G[chosen], U = L⁻¹B[chosen], LLᵀ the Cholesky factorisation of their
    ridged Gram matrix (see `refit`): each choice adds a row to V and U, and takes one outer product off the rest.
    """
    G, shrink = moments.G, float(RIDGE * moments.G.diagonal().mean())
    scale = G.diagonal() + shrink
    allowed = torch.zeros(len(G), dtype=torch.bool)
    allowed[torch.as_tensor(candidates, dtype=torch.long)] = True
    n = min(k, int(allowed.sum()))
    V, U = G.new_zeros(n, len(G)), G.new_zeros(n, moments.B.shape[1])
    chosen: list[int] = []
    left, first = moments.B.clone(), 0.0
    for at in range(n):
        gain = torch.einsum("pd,pd->p", left, left) / scale
        gain[~allowed] = -1
        best = int(gain.argmax())
        first = first or float(gain[best])
        if gain[best] <= least * first:
            break
        chosen.append(best)
        allowed[best] = False
        mine = V[:at, best].clone()
        pivot = (scale[best] - mine @ mine).sqrt()
        V[at] = (G[best] - mine @ V[:at]) / pivot  # G is symmetric; rows are read faster
        U[at] = (moments.B[best] - mine @ U[:at]) / pivot
        left.addr_(V[at], U[at], alpha=-1)
    return chosen


def decompose(
    row: Tensor, W_dec: Tensor, n: int, own: int | None = None, stop: float = 0.02
) -> list[tuple[int, float]]:
    """A direction as a few decoder directions, row ≈ Σ a_i d_i: [(latent, a_i)]; see `decompose_all`."""
    return decompose_all(row[None], W_dec, n, None if own is None else [own], stop)[0]


def decompose_all(
    rows: Tensor, W_dec: Tensor, n: int, own: Sequence[int] | None = None, stop: float = 0.02
) -> list[list[tuple[int, float]]]:
    """Each row as a few decoder directions, row ≈ Σ a_i d_i, by orthogonal matching pursuit: [(latent, a_i)] a row.

    rows [r, d], W_dec [m, d]. At most n directions, besides the row's own, which is always first when given. Stops when
    the next direction would lower the squared residual by less than `stop` of ‖row‖². Empty for a row of zeros.
    """
    total = rows.square().sum(1)
    norms = W_dec.norm(dim=1).clamp_min(torch.finfo(W_dec.dtype).tiny)
    found: list[list[tuple[int, float]]] = [[] for _ in range(len(rows))]
    going = total.nonzero()[:, 0]
    chosen = going.new_zeros(len(going), 0) if own is None else torch.as_tensor(own, dtype=torch.long)[going][:, None]
    for step in range(n + 1):
        # All rows at once, which have as many directions each: W_dec is larger than any cache, and reading it costs.
        coefficients, left = _project(rows[going], W_dec[chosen])
        for row, mine, a in zip(going.tolist(), chosen.tolist(), coefficients.tolist(), strict=True):
            found[row] = list(zip(mine, a, strict=True))
        if step == n or not len(going):
            break
        fits = (left @ W_dec.T).abs_().div_(norms).scatter_(1, chosen, -1)
        best, latent = fits.max(1)
        on = best.square() >= stop * total[going]
        going, chosen = going[on], torch.cat([chosen, latent[:, None]], 1)[on]
    return found


def _project(rows: Tensor, D: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares coefficients [r, n] of rows [r, d] on directions D [r, n, d], and what they leave [r, d]."""
    if not D.numel():
        return rows.new_zeros(len(rows), 0), rows
    coefficients = torch.linalg.lstsq(D.mT, rows[..., None], driver="gelsd").solution  # directions may be the same
    return coefficients[..., 0], rows - (D.mT @ coefficients)[..., 0]
