"""The change map of one run: fitted, tested and measured on held-out documents, from `ChangeStatistics` alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence import change_map
from autointerp.evidence.change_map import GainTest, Moments, RowTest
from autointerp.evidence.statistics import ChangeStatistics

MIN_FIRINGS = 20
"""A latent that fired less often in the fit half is not tested: its row is mostly ridge."""
MIN_SHARE = 1e-3
"""Smallest share of what the first row of a pursuit explains that a further one must explain. Without noise everything
is significant, also what the ridge leaves of large rows to latents that fire with them: some 1e-4 of those rows."""
MIN_VARYING = 1e-5
"""Smallest share of the change's energy that must vary with the text; sums of float32 products err by 1e-6."""
MIN_SIZE = 1e-3
"""Smallest write that counts, as a share of the root mean square change: below it lie rounding and ridge leaks."""


class FittedMap:
    """Everything that the change map says, computed when first asked for. Latents are numbered as in the dictionary."""

    def __init__(self, statistics: ChangeStatistics, W_dec: Tensor):
        """W_dec [m, d]."""
        self.statistics = statistics
        self.tracked = statistics.tracked
        self.W_dec = W_dec.detach().double().cpu()
        centre = statistics.centre(by_place=False)
        self.centre: tuple[np.ndarray, np.ndarray] = centre[0][0], centre[1][0]
        """Means of the base codes z̄ [p] and of the change δ̄ [d] over the tokens of the map."""
        self.fit_half = statistics.fit.moments(*centre)
        self.held_half = statistics.held.moments(*centre)
        self._index = {int(latent): at for at, latent in enumerate(self.tracked)}

    @cached_property
    def all_tokens(self) -> Moments:
        """Both halves: what the reported rows are fitted on."""
        a, b = self.fit_half, self.held_half
        return Moments(a.n + b.n, a.G + b.G, a.B + b.B, a.S + b.S)

    @property
    def changed(self) -> bool:
        """Whether the change varies with the text at all, beyond rounding."""
        return self.all_tokens.energy > MIN_VARYING * self.statistics.stream.square_change > 0

    @property
    def mean_firing(self) -> np.ndarray:
        """Mean z_base of each latent of the dictionary over the tokens where it fires [m]."""
        base = self.statistics.base
        return base.total / np.maximum(base.fired, 1)

    @property
    def static_share(self) -> float:
        """Share of the change that is the same on every token."""
        return self.statistics.stream.static_share(self.statistics.n_tokens)

    @property
    def mostly_static(self) -> bool:
        """Whether that is the greater part."""
        return self.static_share > 0.5

    @cached_property
    def rows(self) -> Tensor:
        """C [p, d], all rows fitted jointly on all tokens."""
        return change_map.fit(self.all_tokens)

    @cached_property
    def r2(self) -> float | None:
        """Held-out R² of the map with all its latents; None when no document was held out."""
        if not self.held_half.n or not self.fit_half.n or not self.changed:
            return None
        return change_map.explained(self.held_half, range(len(self.tracked)), self._fit_rows)

    @cached_property
    def _fit_rows(self) -> Tensor:
        """C [p, d] fitted on the fit half alone, for held-out figures."""
        return change_map.fit(self.fit_half)

    @cached_property
    def size(self) -> np.ndarray:
        """change [p]: ‖c_j‖ · √E[z_j²], root mean square norm of what the row writes, in residual-norm units."""
        mean_square = self.all_tokens.G.diagonal() / max(self.all_tokens.n, 1) + torch.from_numpy(self.centre[0] ** 2)
        return (self.rows.norm(dim=1) * mean_square.sqrt()).numpy()

    @cached_property
    def gains(self) -> np.ndarray:
        """g_j = ⟨c_j, d_j⟩/‖d_j‖² [p]: +0.25 means that the latent writes 25 % more along its own direction.

        Read off the row, not off the whitened regression of the gain test: whitening finds small gains, but weighs the
        direction by where nothing else changes, and so says little of how much a latent's own use grew or faded.
        """
        directions = self.W_dec[self.tracked]
        return ((self.rows * directions).sum(1) / directions.square().sum(1).clamp_min(1e-30)).numpy()

    def tests(self, level: float) -> tuple[np.ndarray, np.ndarray]:
        """(statistic, q-value) [p] of the better of the two tests at `level`; NaN for latents too rare to test.

        Row test and gain test each get half the level, so a q-value is twice the smaller of the two. The gain test
        knows no writes but a latent's own: what the rows that passed write is taken out before it, lest it leak into
        the gains of latents that fire with them. It whitens by the change with those writes in it, as the decoys have
        them: flipped, they are no longer what the rows explain. Both tests see the fit half only, which leaves the
        held-out figures untouched, and centre it place by place: where in a sequence a token stands says by itself
        much of how it is changed, since early tokens have little context, and that is no latent's doing.
        """
        statistic, q = np.full((2, len(self.tracked)), np.nan)
        tested = self.statistics.fit_fired() >= MIN_FIRINGS
        if not self.changed or not tested.any():
            return statistic, q
        half, centre = self.statistics.fit, self.statistics.centre(by_place=True)
        target = half.moments(*centre)
        moments = [target, *half.decoys(target, *centre)]
        row, *decoys = (found.numpy()[tested] for found in RowTest(target.G)(moments))
        statistic[tested], q[tested] = row, change_map.q_values(row, np.stack(decoys))
        passed = np.flatnonzero(q <= level / 2)
        moments, others = change_map.without(moments, passed)
        at = others[tested[others]]
        if len(at):
            gain_test = GainTest(moments[0], self.W_dec[self.tracked[others]], target.S)
            gain, *decoys = (found.numpy()[tested[others]] for found in gain_test(moments))
            gain_q = change_map.q_values(gain, np.stack(decoys), len(passed))
            statistic[at] = np.where(gain_q < q[at], gain, statistic[at])
            q[at] = np.minimum(q[at], gain_q)
        return statistic, np.minimum(2 * q, 1.0)

    def passing(self, q: np.ndarray, level: float) -> np.ndarray:
        """Tracked positions that pass the tests at `level` and write enough to matter."""
        rms = np.sqrt(self.statistics.stream.square_change / max(self.statistics.n_tokens, 1))
        return np.flatnonzero((np.nan_to_num(q, nan=1.0) <= level) & (self.size >= MIN_SIZE * rms))

    def pursue(self, candidates: np.ndarray, k: int) -> list[int]:
        """Up to k tracked positions, greedily, each explaining most of what the ones before it leave (fit half), and
        enough of it to matter."""
        return change_map.pursue(self.fit_half, candidates, k, MIN_SHARE)

    def coverage(self, latents: Sequence[int]) -> list[float]:
        """Held-out share of Δx explained by the first 1, 2, … of `latents`; those outside the map add nothing."""
        if not self.held_half.n or not self.fit_half.n:
            return [float("nan")] * len(latents)
        curve, rows = [], []
        for latent in latents:
            if latent in self._index:
                rows.append(self._index[latent])
            fitted = change_map.refit(self.fit_half, rows) if rows else torch.zeros(0, self.statistics.d)
            curve.append(change_map.explained(self.held_half, rows, fitted) if rows else 0.0)
        return curve

    def random_coverage(self, k: int, seed: int, draws: int = 5) -> float | None:
        """Mean held-out coverage of k random live latents: the control that the selection must beat."""
        live = np.flatnonzero(self.statistics.fit_fired() >= MIN_FIRINGS)
        if not k or not self.changed or not self.held_half.n or not len(live):
            return None
        generator = np.random.default_rng(seed)
        picks = [generator.choice(live, min(k, len(live)), replace=False).tolist() for _ in range(draws)]
        return float(
            np.mean([change_map.explained(self.held_half, p, change_map.refit(self.fit_half, p)) for p in picks])
        )

    def predicted(self, latents: np.ndarray) -> np.ndarray:
        """Held-out share [k] of the change along each latent's decoder direction that the map predicts; the latents
        need not be of the map. Near 0 or below where the change has nothing to do with the text."""
        directions = self.W_dec[torch.as_tensor(latents, dtype=torch.long)].T
        held, written = self.held_half, self._fit_rows @ directions
        explained = 2 * (written * (held.B @ directions)).sum(0) - (written * (held.G @ written)).sum(0)
        return (explained / (directions * (held.S @ directions)).sum(0).clamp_min(1e-30)).numpy()

    def in_map(self, latent: int) -> bool:
        """Whether a latent has a row."""
        return latent in self._index

    def positions(self, latents: Sequence[int]) -> list[int]:
        """Which of `rows` belong to these latents, all of the map."""
        return [self._index[latent] for latent in latents]

    def position(self, latent: int) -> int | None:
        """Which of `rows` is a latent's; None where it is not of the map."""
        return self._index.get(latent)

    def rows_of(self, latents: Sequence[int]) -> dict[int, Tensor]:
        """c_j [d] of each latent of the map among `latents`, fitted jointly for these alone: the k-row map whose
        coverage is reported, in which each row also carries what it shares with latents left out."""
        kept = [latent for latent in latents if latent in self._index]
        if not kept or not self.changed:
            return {}
        return dict(zip(kept, change_map.refit(self.all_tokens, [self._index[j] for j in kept]), strict=True))

    def spread(self, values: np.ndarray) -> np.ndarray:
        """[p] values of the tracked latents as [m], NaN elsewhere."""
        out = np.full(self.statistics.m, np.nan)
        out[self.tracked] = values
        return out
