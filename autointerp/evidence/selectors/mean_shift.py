"""`mean-shift`: the difference of two encodings, what most people try first. Kept for comparison: on a real LoRA the
difference of encodings explains less than nothing of the change (see the documentation on selection)."""

from __future__ import annotations

import numpy as np

from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import SELECTORS, Question, Ranking


@SELECTORS.register("mean-shift")
def mean_shift(question: Question) -> Ranking:
    """Latents by |mean(z_adapted − z_base)| · ‖d_i‖, in residual-norm units."""
    change = mean_shift_size(question.fitted)
    order = np.argsort(-change, kind="stable")[: question.top]
    order = order[change[order] > 0]
    return Ranking(order.tolist(), ["read"] * len(order), change)


def mean_shift_size(fitted: FittedMap) -> np.ndarray:
    """|mean(z_adapted − z_base)| · ‖d_i‖ [m]."""
    statistics = fitted.statistics
    difference = np.abs(statistics.adapted.total - statistics.base.total) / max(statistics.n_tokens, 1)
    return difference * fitted.W_dec.norm(dim=1).numpy()
