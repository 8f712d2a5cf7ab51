"""Does a base latent still live in the adapted model? Probes of the adapted stream, taught by the base model.

For each selected latent i, ReLU(x_adapted · w_i + c_i) ≈ z_i of the base model at the same token: fitted on documents
of the fit half, measured on held-out ones. What such a probe reaches on x_base is the mark to compare with (a TopK
dictionary is no ReLU of a line, so that it need not be 1), and on shuffled pairs it must reach nothing.

    R²      on held-out tokens; near that of the base: the feature is there, if perhaps in another direction
    AUC     of telling z > 0
    cosine  of w_i with the latent's own encoder column: whether it is read where it was
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.collector import activations
from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import MIN_FIRINGS
from autointerp.evidence.spool import Spool
from autointerp.records import Transfer

MAX_TOKENS = 1 << 15
"""Tokens of each half."""
MAX_NUMBERS = 1 << 26
"""Numbers of the stream held at once for one half and side."""
STEPS, BATCH, RATE = 600, 4096, 0.02
FLOOR = 1e-4
"""Smallest variance that is whitened, relative to the mean one."""


@dataclass(frozen=True)
class Pairs:
    """Counted tokens of one half: n tokens, d residual width, k latents."""

    x_base: Tensor
    """[n, d] float32."""
    x_adapted: Tensor
    """[n, d] float32."""
    z: Tensor
    """Base activations [n, k]; negative ones, which some dictionaries have, count as silent."""


@dataclass(frozen=True)
class Probe:
    """k probes side by side."""

    w: Tensor
    """[d, k]."""
    c: Tensor
    """[k]."""

    def score(self, x: Tensor) -> Tensor:
        """x · w + c [n, k]."""
        return x @ self.w + self.c


def transfer(
    spool: Spool,
    dictionary: Dictionary,
    latents: Sequence[int],
    seed: int,
    progress: Callable[[int], None] = lambda _n: None,
) -> list[Transfer]:
    """The probes of each latent that fires MIN_FIRINGS times or more in both halves; the others are left out.

    `progress` hears of each step of the training, three times STEPS in all.
    """
    if not latents:
        return []
    fit, held = (_pairs(spool, dictionary, latents, half) for half in (True, False))
    enough = [n for n in range(len(latents)) if all(int((p.z[:, n] > 0).sum()) >= MIN_FIRINGS for p in (fit, held))]
    if not enough:
        return []
    fit, held = (Pairs(pairs.x_base, pairs.x_adapted, pairs.z[:, enough]) for pairs in (fit, held))
    adapted = train(fit.x_adapted, fit.z, seed, progress)
    base = train(fit.x_base, fit.z, seed, progress)
    shuffled = train(fit.x_adapted, _rolled(fit.z), seed, progress)
    cosines = _cosines(adapted, dictionary, [latents[n] for n in enough])
    r2, area = measured(adapted, held.x_adapted, held.z)
    r2_base, area_base = measured(base, held.x_base, held.z)
    r2_shuffled, area_shuffled = measured(shuffled, held.x_adapted, _rolled(held.z))
    return [
        Transfer(
            latent=latents[n],
            r2=float(r2[at]),
            auc=float(area[at]),
            r2_base=float(r2_base[at]),
            auc_base=float(area_base[at]),
            r2_shuffled=float(r2_shuffled[at]),
            auc_shuffled=float(area_shuffled[at]),
            cosine=cosines[at],
            n_tokens=len(held.z),
            n_firing=int((held.z[:, at] > 0).sum()),
        )
        for at, n in enumerate(enough)
    ]


def _pairs(spool: Spool, dictionary: Dictionary, latents: Sequence[int], fit: bool) -> Pairs:
    """Whole sequences spread evenly over the half, as many as the limits allow."""
    mine = np.flatnonzero(fit_rows(spool.orders) == fit)
    limit = min(MAX_TOKENS, MAX_NUMBERS // spool.d)
    lengths = np.array([len(spool.counted(int(s))) for s in mine])
    n = max(1, int(len(mine) * min(1.0, limit / max(lengths.sum(), 1))))
    chosen = mine[np.unique(np.linspace(0, len(mine) - 1, n).astype(int))] if len(mine) else mine
    columns = torch.as_tensor(list(latents), device=dictionary.W_dec.device)
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for some in np.array_split(chosen, max(1, len(chosen) // 64)):
        stretch = spool.read(some)
        counted = torch.from_numpy(stretch.counted)
        z = torch.from_numpy(activations(stretch.x_base, stretch.counted, dictionary, columns))[counted]
        base, adapted = (dictionary.read_part(x[counted]).float() for x in (stretch.x_base, stretch.x_adapted))
        parts.append((base, adapted, z.clamp_min(0)))
    return Pairs(*(torch.cat(side) for side in zip(*parts, strict=True)))


def _rolled(z: Tensor) -> Tensor:
    """Activations of other tokens: nothing about x says what they are."""
    return z.roll(max(1, len(z) // 3), 0)


def train(x: Tensor, z: Tensor, seed: int, progress: Callable[[int], None] = lambda _n: None) -> Probe:
    """Probes of z [n, k] ≥ 0 on x [n, d], by least squares of the rectified line.

    On whitened x, so that every direction is learnt at the same rate; each latent in units of its own root mean square.
    They begin at the linear regression, with the bias at which they fire as often as z does.
    """
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(x.T).double())
    root = (values.clamp_min(FLOOR * float(values.mean())) + 1e-30).rsqrt()
    whitening = ((vectors * root) @ vectors.T).float()
    u = (x - mean) @ whitening
    scale = z.square().mean(0).sqrt().clamp_min(1e-30)
    target = z / scale
    w = u.T @ (target - target.mean(0)) / len(u)
    line = u @ w
    at = ((1 - (z > 0).float().mean(0)) * (len(z) - 1)).long()
    c = -line.sort(0).values.gather(0, at[None])[0]
    stretch = target.mean(0) / (line + c).clamp_min(0).mean(0).clamp_min(1e-30)
    w, c = (w * stretch).requires_grad_(), (c * stretch).requires_grad_()
    optimizer = torch.optim.Adam([w, c], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for step in range(STEPS):
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            rows = torch.randint(len(u), (min(BATCH, len(u)),), generator=generator)
            optimizer.zero_grad()
            (torch.relu(u[rows] @ w + c) - target[rows]).square().mean(0).sum().backward()
            optimizer.step()
            progress(1)
    w, c = w.detach() * scale, c.detach() * scale
    real = whitening @ w
    return Probe(real, c - mean @ real)


def measured(probe: Probe, x: Tensor, z: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(R² of ReLU(score), AUC of the score for z > 0), each [k], NaN where z is constant."""
    score = probe.score(x)
    left = (torch.relu(score) - z).square().sum(0)
    spread = (z - z.mean(0)).square().sum(0)
    return (1 - left / spread).numpy(), auc(score, z > 0).numpy()


def auc(score: Tensor, fires: Tensor) -> Tensor:
    """Probability that a firing token scores above a silent one [k]; score and fires [n, k]."""
    rank = score.argsort(0).argsort(0).double() + 1
    n = fires.sum(0).double()
    above = (rank * fires).sum(0) - n * (n + 1) / 2
    return above / (n * (len(fires) - n))


def _cosines(probe: Probe, dictionary: Dictionary, latents: Sequence[int]) -> list[float | None]:
    if dictionary.W_enc is None:
        return [None] * len(latents)
    encoder = dictionary.W_enc[:, list(latents)].float().cpu()
    return torch.nn.functional.cosine_similarity(probe.w, encoder, dim=0).tolist()
