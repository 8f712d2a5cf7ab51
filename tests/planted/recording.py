"""One pass over a real corpus kept in memory, and the same tokens with another change instead of the adapter's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import csr_matrix

from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.extras import Extra
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.gather import Evidence
from autointerp.evidence.screening import Screen
from autointerp.evidence.spool import Spool
from autointerp.evidence.stand_ins import Reread
from autointerp.evidence.statistics import ChangeStatistics, PairedCodes, place_of
from autointerp.evidence.stream import Measured, measure, to_codes
from autointerp.run import Run

CHUNK = 8192
"""Tokens added at a time."""


@dataclass(frozen=True)
class Recording:
    """The counted tokens of one pass, in the order of the pass. n tokens, d residual width, m latents."""

    evidence: Evidence
    """Model, dictionary and corpus."""
    measured: Measured
    """What the pass itself left; its spool is open."""
    z: csr_matrix
    """Base codes [n, m]."""
    x_base: np.ndarray
    """[n, d]."""
    change: np.ndarray
    """Real Δx [n, d]."""
    order: np.ndarray
    """Index of each token's document in the shuffled corpus [n]."""
    position: np.ndarray
    """Index of each token in its document [n]."""
    place: np.ndarray
    """Part of its sequence that each token stands in [n]."""

    @property
    def dictionary(self) -> Dictionary:
        return self.evidence.dictionary

    @property
    def W_dec(self) -> np.ndarray:
        return self.dictionary.W_dec.float().cpu().numpy()

    @property
    def noise(self) -> np.ndarray:
        """The real Δx rolled by a third of the tokens: realistic in every way, but for what it hangs on [n, d]."""
        return np.roll(self.change, len(self.change) // 3, axis=0)

    def rate(self) -> np.ndarray:
        """Share of tokens at which each latent fires in the base model [m]."""
        return np.diff(self.z.tocsc().indptr) / len(self.change)

    def statistics(
        self,
        change: np.ndarray,
        tracked: np.ndarray | None = None,
        seed: int = 0,
        encode: bool = True,
        extras: Iterable[type[Extra]] = (),
    ) -> ChangeStatistics:
        """The statistics of this text had the adapter written `change` [n, d]; see `ChangeStatistics` for `extras`.

        The adapted side, which the change map does not ask for, is encoded anew or, without `encode`, left as base.
        """
        m, d = self.dictionary.W_dec.shape
        tracked = np.arange(m) if tracked is None else tracked
        statistics = ChangeStatistics(m, d, tracked, seed, extras)
        W_dec, b_dec = self.W_dec, self.dictionary.b_dec.float().cpu().numpy()
        for begin in range(0, len(change), CHUNK):
            at = slice(begin, begin + CHUNK)
            x_adapted = (self.x_base[at] + change[at]).astype(np.float32)
            codes = PairedCodes(
                base=self.z[at],
                adapted=to_codes(self.dictionary, torch.from_numpy(x_adapted)) if encode else self.z[at],
                x_base=self.x_base[at],
                x_adapted=x_adapted,
                order=self.order[at],
                position=self.position[at],
                place=self.place[at],
            )
            statistics.add(codes, W_dec, b_dec)
        return statistics

    def fitted(
        self, change: np.ndarray, seed: int = 0, encode: bool = True, extras: Iterable[type[Extra]] = ()
    ) -> FittedMap:
        """The change map of `statistics(change)`."""
        statistics = self.statistics(change, seed=seed, encode=encode, extras=extras)
        return FittedMap(statistics, self.dictionary.W_dec)

    def reread(self, change: np.ndarray) -> Reread:
        """What `fitted(change)` is made of, once more."""
        fit = fit_rows(self.order)

        def reread(latents: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            yield self.z[fit][:, list(latents)].toarray(), change[fit].astype(np.float32)

        return reread


def record(run: Run, max_tokens: int, scratch: Path | None = None) -> Recording:
    """Runs the whole pass of `run` over at most `max_tokens` tokens and keeps every counted token of it."""
    evidence = Evidence.load(replace(run, max_tokens=max_tokens))
    dictionary, model = evidence.dictionary, evidence.model
    m, d = dictionary.W_dec.shape
    spool = Spool(d, model.dtype, scratch)
    measured = measure([model], dictionary, evidence.corpus, Screen(m, d, max_tokens), spool)
    stretch = spool.read(np.arange(len(spool)))
    counted, lengths = stretch.counted, np.diff(stretch.bounds)
    starts = np.array([spool.place(s)[2] for s in range(len(spool))])
    position = (np.repeat(starts - stretch.bounds[:-1], lengths) + np.arange(len(counted)))[counted]
    x_base = stretch.x_base[torch.from_numpy(counted)].float()
    return Recording(
        evidence=evidence,
        measured=measured,
        z=to_codes(dictionary, x_base),
        x_base=x_base.numpy(),
        change=(stretch.x_adapted[torch.from_numpy(counted)].float() - x_base).numpy(),
        order=np.repeat(spool.orders, lengths)[counted],
        position=position,
        place=place_of(position, evidence.corpus.piece),
    )
