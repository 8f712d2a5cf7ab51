"""`change`, the default: the latents whose firing the adapter's writing hangs on, by the change map.

Rows that pass the tests are chosen greedily (role `read`). A tenth of the places goes to latents that many chosen rows
write to, or that fire only since the training (role `written`). Where most of the change is the same on every token
(bias and steering adapters), the latents that the static part is made of get their share (role `static`).
"""

from __future__ import annotations

from collections import Counter
from itertools import zip_longest

import numpy as np
import torch

from autointerp.evidence.change_map import decompose, decompose_all
from autointerp.evidence.fitted import MIN_FIRINGS, FittedMap
from autointerp.evidence.selection import SELECTORS, Question, Ranking
from autointerp.evidence.selectors.mean_shift import mean_shift_size
from autointerp.evidence.stand_ins import stand_ins

N_TARGETS = 5
"""Directions read off a row when counting what it writes to."""
MIN_WRITERS = 3
"""Rows that must write to a latent before it is selected for that."""
MIN_PREDICTED = 0.1
"""Held-out share of the change along a revived latent's direction that the map must predict."""
MAX_ROUNDS = 5
"""Readings of the text in search of latents that only stand in for others."""
N_STATIC = 20
"""Directions that the static part is decomposed into."""


@SELECTORS.register("change")
def change(question: Question) -> Ranking:
    """The map's choice: tests at `fdr`, greedy pursuit, then written and static latents; at most `top` in all."""
    fitted, top = question.fitted, question.top
    m = fitted.statistics.m
    static = static_shares(fitted)
    columns = {"static_share": static}
    if not fitted.changed:
        latents = _strongest(static, top if fitted.statistics.stream.square_change else 0)
        return Ranking(latents, ["static"] * len(latents), np.abs(static) * _static_norm(fitted), columns, 0)
    statistic, q = fitted.tests(question.fdr)
    passing = fitted.passing(q, question.fdr)
    columns |= {"statistic": fitted.spread(statistic), "q_value": fitted.spread(q)}
    read, away = _pursued(question, passing)
    revived = _revived(fitted)
    written = _written(fitted, read, revived, top // 10)
    n_static = _static_places(fitted, top, len(read))
    read = read[: top - len(written) - n_static]
    fixed = [latent for latent in _strongest(static, top) if latent not in read + written][:n_static]
    latents = read + written + fixed
    roles = ["read"] * len(read) + ["written"] * len(written) + ["static"] * len(fixed)
    size = np.full(m, np.nan)
    size[fitted.tracked] = fitted.size
    size[revived] = mean_shift_size(fitted)[revived]  # no row: they never fire in the base model
    figures = {"explained_away": float(len(away))} if away else {}
    return Ranking(latents, roles, size, columns, len(passing), figures=figures)  # pyright: ignore[reportArgumentType]


def _pursued(question: Question, passing: np.ndarray) -> tuple[list[int], list[int]]:
    """Latents by greedy pursuit among `passing`, and those that were chosen first but only stand in for others: their
    places, where there were too few, go to the next."""
    fitted, reread = question.fitted, question.given.reread
    away, rounds = list[int](), 0
    while True:
        left = passing[~np.isin(fitted.tracked[passing], away)]
        read = [int(fitted.tracked[at]) for at in fitted.pursue(left, question.top)]
        if reread is None:
            return read, away
        found, rounds = stand_ins(reread, read, fitted.mean_firing[read]), rounds + 1
        away += found
        if not found or len(read) < question.top or rounds == MAX_ROUNDS:
            return [latent for latent in read if latent not in found], away


def static_shares(fitted: FittedMap) -> np.ndarray:
    """c_i = a_i⟨d_i, δ̄⟩/‖δ̄‖² [m] over a sparse decomposition of the static part δ̄ in latents that fire on either side;
    0 outside it. A latent that fires nowhere has no contexts to say what it is."""
    statistics = fitted.statistics
    shares = np.zeros(statistics.m)
    static = torch.from_numpy(statistics.static)
    square = float(static.square().sum())
    alive = np.flatnonzero(statistics.base.fired + statistics.adapted.fired)
    directions = fitted.W_dec[torch.from_numpy(alive)]
    if square and len(alive):
        for at, a in decompose(static, directions, N_STATIC):
            shares[alive[at]] = a * float(directions[at] @ static) / square
    return shares


def _static_norm(fitted: FittedMap) -> float:
    return float(np.linalg.norm(fitted.statistics.static))


def _strongest(shares: np.ndarray, k: int) -> list[int]:
    order = np.argsort(-np.abs(shares), kind="stable")[:k]
    return [int(latent) for latent in order if shares[latent]]


def _static_places(fitted: FittedMap, top: int, n_read: int) -> int:
    """Places for the static part: its share of them where it is the greater part of the change, else none."""
    return max(top - n_read, int(top * fitted.static_share)) if fitted.mostly_static else 0


def _written(fitted: FittedMap, read: list[int], revived: np.ndarray, places: int) -> list[int]:
    """Latents outside `read` that fire only since the training, and that MIN_WRITERS rows of `read` write to, in turn:
    neither sort, of which there may be many, is to leave the other without a place."""
    revived = revived[np.argsort(-mean_shift_size(fitted)[revived])]
    writers: Counter[int] = Counter()
    for targets in decompose_all(fitted.rows[fitted.positions(read)], fitted.W_dec, N_TARGETS, own=read):
        writers.update(target for target, _ in targets[1:])
    needed = max(MIN_WRITERS, len(read) // 10)
    hubs = [target for target, n in writers.most_common() if n >= needed]
    sorts = ([latent for latent in sort if latent not in read] for sort in (revived.tolist(), hubs))
    ranked = (latent for turn in zip_longest(*sorts) for latent in turn if latent is not None)
    return list(dict.fromkeys(ranked))[:places]


def _revived(fitted: FittedMap) -> np.ndarray:
    """Latents that never fired in base and fire in adapted, where what is written along their direction is in answer to
    the text: a change that falls anywhere wakes latents too."""
    statistics = fitted.statistics
    woken = np.flatnonzero((statistics.base.fired == 0) & (statistics.adapted.fired >= MIN_FIRINGS))
    return woken[fitted.predicted(woken) >= MIN_PREDICTED]
