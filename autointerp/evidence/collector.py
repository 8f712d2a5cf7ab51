"""The contexts in which the selected latents fire, read back from the spool while labels are already being made.

Two steps. `survey` reads the spool once, encoding the k selected columns alone, and keeps each sequence's peaks: S × k
numbers a kind. `collect` then picks the sequences of every kind from the peaks, reads just those, and hands out latent
after latent in rank order.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence

import numpy as np
import torch

from autointerp.evidence.corpus import context_split
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.foils import Partners, near_misses
from autointerp.evidence.spool import Spool
from autointerp.evidence.survey import (
    AFTER,
    BEFORE,
    MIN_SILENT,
    SPLITS,
    Pick,
    Survey,
    activations,
    base_peaks,
    silent_for,
    survey,
)
from autointerp.records import Context, ContextKind

GROUP = 16
"""Latents whose contexts are read together."""
PARTNER_TOKENS = 200_000
"""Tokens searched for near misses where another latent fires: a few of the strongest are wanted, not the strongest."""
PER_SPLIT: dict[ContextKind, int] = {"top": 10, "top_base": 5, "gain": 5, "loss": 5, "quantile": 20, "silent": 20}
"""Contexts of each kind in each split."""


def pick(found: Survey, at: int, orders: np.ndarray, revived: bool, seed: int) -> list[Pick]:
    """The contexts of the latent at column `at`: each split's best of every kind, one context per sequence and kind.

    orders [S]: place of each sequence's document in the shuffled corpus, which decides its split. `quantile` spreads
    evenly over the ranks of the activating sequences (by the adapted peak for latents that base never fires). A latent
    so dense that too few sequences are silent as a whole takes silent stretches of others, MIN_SILENT tokens or longer.
    """
    base, adapted = found.base[:, at], found.adapted[:, at]
    values: dict[ContextKind, np.ndarray] = {
        "top": adapted,
        "top_base": base,
        "gain": found.gain[:, at],
        "loss": found.loss[:, at],
        "quantile": adapted if revived else base,
    }
    silent = np.isfinite(base) & (base <= 0) & (adapted <= 0)
    partly = (base > 0) | (adapted > 0)
    partly &= found.silence[:, at] >= MIN_SILENT
    generator = np.random.default_rng((seed, found.latents[at]))
    picks: list[Pick] = []
    for parity, split in enumerate(SPLITS):
        mine = np.flatnonzero(orders % 2 == parity)
        for kind, peak in values.items():
            chosen = (
                _spread(mine, peak, PER_SPLIT[kind]) if kind == "quantile" else _largest(mine, peak, PER_SPLIT[kind])
            )
            picks += [Pick(kind, split, int(s), float(peak[s])) for s in chosen]
        drawn = np.concatenate([generator.permutation(mine[which[mine]]) for which in (silent, partly)])
        picks += [Pick("silent", split, int(s), 0.0) for s in drawn[: PER_SPLIT["silent"]]]
    return picks


def _largest(mine: np.ndarray, peak: np.ndarray, n: int) -> np.ndarray:
    """Up to n of the sequences `mine` with the largest positive peak, largest first; ties by place in the spool."""
    positive = mine[peak[mine] > 0]
    return positive[np.argsort(-peak[positive], kind="stable")][:n]


def _spread(mine: np.ndarray, peak: np.ndarray, n: int) -> np.ndarray:
    """Up to n activating sequences at evenly spaced ranks of their peaks."""
    ranked = _largest(mine, peak, len(mine))
    if len(ranked) <= n:
        return ranked
    return ranked[((np.arange(n) + 0.5) * len(ranked) / n).astype(int)]


async def collect(
    spool: Spool,
    dictionary: Dictionary,
    latents: Sequence[int],
    revived: set[int],
    decode: Callable[[int], str],
    seed: int,
    partnered: Mapping[int, Partners] | None = None,
) -> AsyncIterator[dict[int, list[Context]]]:
    """The contexts of each latent, GROUP latents at a time in the given order, as soon as they stand.

    partnered: latents that each is easily taken for, of foils.py: near misses are collected too, with or without them.
    The work is done in threads.
    """
    if not latents:
        return
    partnered = partnered or {}
    others = {p for mine in partnered.values() for p in mine.values()} - set(latents)
    found = await asyncio.to_thread(survey, spool, dictionary, latents)
    strengths = await asyncio.to_thread(base_peaks, spool, dictionary, sorted(others), PARTNER_TOKENS)
    strengths |= {latent: found.base[:, at] for at, latent in enumerate(latents)}
    orders = spool.orders
    for first in range(0, len(latents), GROUP):
        group = range(first, min(first + GROUP, len(latents)))
        picks = {at: pick(found, at, orders, latents[at] in revived, seed) for at in group}
        contexts = await asyncio.to_thread(_read, spool, dictionary, found.latents, picks, decode)
        mine = {latents[at]: contexts[at] for at in group}
        ranked = {latents[at]: [pick for _, pick in _ranked(picks[at])] for at in group}
        near = await asyncio.to_thread(
            near_misses, spool, dictionary, found, strengths, ranked, mine, partnered, decode, seed
        )
        yield {latent: [*mine[latent], *near[latent]] for latent in mine}


def _read(
    spool: Spool, dictionary: Dictionary, latents: list[int], picks: dict[int, list[Pick]], decode: Callable[[int], str]
) -> dict[int, list[Context]]:
    """Reads the picked sequences of a group of latents, each sequence once."""
    columns = torch.as_tensor([latents[at] for at in picks], device=dictionary.W_dec.device)
    sequences = np.unique([p.sequence for chosen in picks.values() for p in chosen]).astype(np.int64)
    base: dict[int, np.ndarray] = {}
    adapted: dict[int, np.ndarray] = {}
    for part in np.array_split(sequences, max(1, len(sequences) // 64)):
        stretch = spool.read(part)
        z_base = activations(stretch.x_base, stretch.counted, dictionary, columns)
        z_adapted = activations(stretch.x_adapted, stretch.counted, dictionary, columns)
        for s, begin, end in zip(part, stretch.bounds[:-1], stretch.bounds[1:], strict=True):
            base[int(s)], adapted[int(s)] = z_base[begin:end], z_adapted[begin:end]
    contexts: dict[int, list[Context]] = {}
    for column, (at, chosen) in enumerate(picks.items()):
        contexts[at] = [
            _context(
                latents[at], n, rank, p, base[p.sequence][:, column], adapted[p.sequence][:, column], spool, decode
            )
            for n, (rank, p) in enumerate(_ranked(chosen))
        ]
    return contexts


def _ranked(chosen: list[Pick]) -> list[tuple[int, Pick]]:
    """(rank within its kind, both splits together; pick), kind by kind; silent ones in drawing order."""
    ranked: list[tuple[int, Pick]] = []
    for kind in PER_SPLIT:
        of_kind = sorted((p for p in chosen if p.kind == kind), key=lambda p: -p.peak)
        ranked += list(enumerate(of_kind, start=1))
    return ranked


def _context(
    latent: int,
    context_id: int,
    rank: int,
    pick: Pick,
    base: np.ndarray,
    adapted: np.ndarray,
    spool: Spool,
    decode: Callable[[int], str],
) -> Context:
    """The window of a pick; base and adapted are the latent's activations over its whole sequence [t]."""
    doc, order, start = spool.place(pick.sequence)
    first, last = _longest_silence(base, adapted) if pick.kind == "silent" else (0, len(base))
    peak = (first + last) // 2 if pick.kind == "silent" else _peak(pick.kind, base, adapted)
    begin, end = max(first, peak - BEFORE), min(last, peak + AFTER + 1)
    return Context(
        latent=latent,
        context_id=context_id,
        kind=pick.kind,
        rank=rank,
        split=context_split(order),
        doc=doc,
        position=start + peak,
        tokens=tuple(decode(int(i)) for i in spool.ids(pick.sequence)[begin:end]),
        act_base=tuple(base[begin:end].tolist()),
        act_adapted=tuple(adapted[begin:end].tolist()),
        peak=peak - begin,
    )


def _longest_silence(base: np.ndarray, adapted: np.ndarray) -> tuple[int, int]:
    """(first token, end) of the longest stretch silent on both sides; the whole sequence where nothing fires."""
    lengths = silent_for(((base > 0) | (adapted > 0))[:, None], np.array([0, len(base)]))[:, 0]
    end = int(lengths.argmax()) + 1
    return end - int(lengths[end - 1]), end


def _peak(kind: ContextKind, base: np.ndarray, adapted: np.ndarray) -> int:
    """Where the peak of an activating context lies in its sequence."""
    if kind == "quantile":
        return int((base if base.max() > 0 else adapted).argmax())
    return int({"top": adapted, "top_base": base, "gain": adapted - base, "loss": base - adapted}[kind].argmax())
