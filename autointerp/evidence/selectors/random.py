"""`random`: live latents drawn at random, the control that every other selector must beat."""

from __future__ import annotations

import numpy as np

from autointerp.evidence.selection import SELECTORS, Question, Ranking


@SELECTORS.register("random")
def random(question: Question) -> Ranking:
    """`top` latents drawn evenly among those that fire on either side."""
    statistics = question.fitted.statistics
    live = np.flatnonzero(statistics.base.fired + statistics.adapted.fired)
    drawn = np.random.default_rng(question.seed).permutation(live)[: question.top]
    return Ranking(drawn.tolist(), ["read"] * len(drawn), np.full(statistics.m, np.nan))
