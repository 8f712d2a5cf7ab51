"""Near misses: silent contexts that resemble firing ones, so that a label must say more than the obvious.

Three sorts (records.Foil): the token on which the latent mostly fires stands there, and it is silent; a latent fires
that often fires together with it; the latent fires whose decoder row is nearest. Drawn from the same split as the
contexts that they go with, and like those one of a sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch

from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.spool import Spool
from autointerp.evidence.survey import AFTER, BEFORE, MIN_SILENT, SPLITS, Pick, Survey, activations, silent_for
from autointerp.records import Context, Foil, Split

PER_SPLIT: dict[Foil, int] = {"token": 5, "cofiring": 3, "neighbour": 3}
"""Near misses of each sort in each split."""
N_TOKENS = 3
"""Tokens on which a latent fires most often that are looked for elsewhere."""
SPARE = 2
"""Sequences read for each context wanted, where the latent is silent in a part of them only."""


Partners = Mapping[Foil, int]
"""The latents that one is easily taken for, by sort."""


class Candidate(NamedTuple):
    """A sequence in which a near miss may lie: where a token stands, or where another latent peaks."""

    latent: int
    split: Split
    foil: Foil
    sequence: int
    token: int | None
    partner: int | None


def partners(fitted: FittedMap, latents: Sequence[int]) -> dict[int, Partners]:
    """For each latent, the one whose activations correlate most with its own, among those of the map, and the live one
    whose decoder row has the largest cosine with its own."""
    if not latents:
        return {}
    chosen, rows = list(latents), fitted.W_dec
    fired = torch.from_numpy((fitted.statistics.base.fired > 0) | (fitted.statistics.adapted.fired > 0))
    cosines = (rows[chosen] @ rows.T) / rows.norm(dim=1).clamp_min(1e-30)
    cosines.masked_fill_(~fired, -torch.inf)
    cosines[torch.arange(len(chosen)), torch.tensor(chosen)] = -torch.inf
    nearest = cosines.max(dim=1)
    at = {int(latent): place for place, latent in enumerate(fitted.tracked)}
    G = fitted.all_tokens.G
    scale = G.diagonal().clamp_min(1e-30).sqrt()
    found: dict[int, Partners] = {}
    for latent, cosine, neighbour in zip(chosen, nearest.values.tolist(), nearest.indices.tolist(), strict=True):
        mine: dict[Foil, int] = {"neighbour": neighbour} if cosine > 0 else {}
        if latent in at and len(at) > 1:
            together = G[at[latent]] / scale
            together[at[latent]] = -torch.inf
            best = int(together.argmax())
            if together[best] > 0:
                mine["cofiring"] = int(fitted.tracked[best])
        found[latent] = mine
    return found


def near_misses(
    spool: Spool,
    dictionary: Dictionary,
    found: Survey,
    strengths: Mapping[int, np.ndarray],
    picks: Mapping[int, Sequence[Pick]],
    contexts: Mapping[int, Sequence[Context]],
    partnered: Mapping[int, Partners],
    decode: Callable[[int], str],
    seed: int,
) -> dict[int, list[Context]]:
    """The near misses of a group of latents; each of their sequences is read once.

    found: survey of the latents. strengths: largest base activation of each of them and of their partners in each
    sequence [S], −inf where it was not looked for. picks, contexts: what was collected of each latent of the group,
    in the same order.
    """
    columns = {latent: at for at, latent in enumerate(found.latents)}
    wanted: dict[int, list[Candidate]] = {}
    for latent, mine in picks.items():
        pairs = list(zip(mine, contexts[latent], strict=True))
        wanted[latent] = _candidates(spool, found, strengths, columns, latent, pairs, partnered.get(latent, {}), seed)
    everything = [candidate for candidates in wanted.values() for candidate in candidates]
    shown = sorted({*picks, *(c.partner for c in everything if c.partner is not None)})
    codes = _codes(spool, dictionary, shown, sorted({candidate.sequence for candidate in everything}))
    place = {latent: at for at, latent in enumerate(shown)}
    return {
        latent: _chosen(spool, codes, place, latent, candidates, contexts[latent], decode)
        for latent, candidates in wanted.items()
    }


def _candidates(
    spool: Spool,
    found: Survey,
    strengths: Mapping[int, np.ndarray],
    columns: Mapping[int, int],
    latent: int,
    pairs: Sequence[tuple[Pick, Context]],
    partner: Partners,
    seed: int,
) -> list[Candidate]:
    """Sequences to look into, those in which the latent is silent throughout first."""
    at = columns[latent]
    silent = np.isfinite(found.base[:, at]) & (found.base[:, at] <= 0) & (found.adapted[:, at] <= 0)
    partly = ~silent & (found.silence[:, at] >= MIN_SILENT)
    draw = np.random.default_rng((seed, latent, 1))
    candidates: list[Candidate] = []
    for parity, split in enumerate(SPLITS):
        free = spool.orders % 2 == parity
        free[[pick.sequence for pick, _ in pairs if pick.kind == "silent" and pick.split == split]] = False
        places: list[tuple[Foil, np.ndarray, int | None, int | None]] = [
            ("token", draw.permutation(spool.holding(token)), token, None)
            for token in _peak_tokens(spool, [pair for pair in pairs if pair[0].split == split])
        ]
        for foil, other in partner.items():
            strength = strengths[other]
            strongest = np.argsort(-strength, kind="stable")[: int((strength > 0).sum())]
            places.append((foil, strongest, None, other))
        for foil, ranked, token, other in places:
            ranked, n = ranked[free[ranked]], PER_SPLIT[foil]
            whole, part = ranked[silent[ranked]][:n], ranked[partly[ranked]]
            chosen = [*whole, *part[: SPARE * (n - len(whole))]]
            candidates += [Candidate(latent, split, foil, int(s), token, other) for s in chosen]
    return candidates


def _peak_tokens(spool: Spool, pairs: Sequence[tuple[Pick, Context]]) -> list[int]:
    """Ids of the tokens at which the latent peaks most often."""
    peaks = Counter(
        int(spool.ids(pick.sequence)[context.position - spool.place(pick.sequence)[2]])
        for pick, context in pairs
        if pick.kind != "silent"
    )
    return [token for token, _ in peaks.most_common(N_TOKENS)]


def _codes(
    spool: Spool, dictionary: Dictionary, latents: Sequence[int], sequences: Sequence[int]
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """(z_base, z_adapted), each [t, k], of the latents in each sequence."""
    columns = torch.as_tensor(list(latents), device=dictionary.W_dec.device)
    codes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for part in np.array_split(np.array(sequences, dtype=np.int64), max(1, len(sequences) // 64)):
        stretch = spool.read(part)
        base = activations(stretch.x_base, stretch.counted, dictionary, columns)
        adapted = activations(stretch.x_adapted, stretch.counted, dictionary, columns)
        for s, begin, end in zip(part, stretch.bounds[:-1], stretch.bounds[1:], strict=True):
            codes[int(s)] = base[begin:end], adapted[begin:end]
    return codes


def _chosen(
    spool: Spool,
    codes: Mapping[int, tuple[np.ndarray, np.ndarray]],
    place: Mapping[int, int],
    latent: int,
    candidates: Sequence[Candidate],
    contexts: Sequence[Context],
    decode: Callable[[int], str],
) -> list[Context]:
    """The first candidates of each sort and split that hold a near miss; the sorts in turn."""
    taken: set[int] = set()
    kept: dict[tuple[Split, Foil], list[tuple[Candidate, int, int, int]]] = {
        (split, foil): [] for split in SPLITS for foil in PER_SPLIT
    }
    for candidate in candidates:
        chosen = kept[candidate.split, candidate.foil]
        if len(chosen) < PER_SPLIT[candidate.foil] and candidate.sequence not in taken:
            window = _window(spool, codes[candidate.sequence], place, candidate)
            if window is not None:
                taken.add(candidate.sequence)
                chosen.append((candidate, *window))
    rank = sum(context.kind == "silent" for context in contexts)
    number = len(contexts)
    misses: list[Context] = []
    for split in SPLITS:
        turns = zip_longest(*(kept[split, foil] for foil in PER_SPLIT))
        for candidate, begin, peak, end in (item for turn in turns for item in turn if item is not None):
            doc, _, start = spool.place(candidate.sequence)
            base, adapted = (z[begin:end, place[latent]] for z in codes[candidate.sequence])
            tokens = tuple(decode(int(i)) for i in spool.ids(candidate.sequence)[begin:end])
            misses.append(
                Context(
                    latent=latent,
                    context_id=number + len(misses),
                    kind="silent",
                    rank=rank + len(misses) + 1,
                    split=split,
                    doc=doc,
                    position=start + peak,
                    tokens=tokens,
                    act_base=tuple(base.tolist()),
                    act_adapted=tuple(adapted.tolist()),
                    peak=peak - begin,
                    foil=candidate.foil,
                )
            )
    return misses


def _window(
    spool: Spool, codes: tuple[np.ndarray, np.ndarray], place: Mapping[int, int], candidate: Candidate
) -> tuple[int, int, int] | None:
    """(begin, peak, end) of the near miss in its sequence, the latent silent throughout; None where it is not."""
    base, adapted = codes
    own = place[candidate.latent]
    fires = (base[:, own] > 0) | (adapted[:, own] > 0)
    if candidate.token is not None:
        places = np.flatnonzero((spool.ids(candidate.sequence) == candidate.token) & ~fires)
    else:
        other = base[:, place[candidate.partner or 0]]
        places = np.flatnonzero((other == other.max()) & (other > 0) & ~fires)
    if not len(places):
        return None
    before = silent_for(fires[:, None], np.array([0, len(fires)]))[:, 0]
    after = silent_for(fires[::-1, None], np.array([0, len(fires)]))[::-1, 0]
    # Where the silence around is longest, the context is most of its own and least the tail of a firing.
    peak = int(places[np.minimum(before[places], BEFORE + 1).argmax()])
    begin, end = peak + 1 - min(int(before[peak]), BEFORE + 1), peak + min(int(after[peak]), AFTER + 1)
    return (begin, peak, end) if end - begin >= MIN_SILENT else None
