"""`frequency`: in how many more, or fewer, documents a latent fires at all."""

from __future__ import annotations

import numpy as np

from autointerp.evidence.extras import DocumentSums
from autointerp.evidence.selection import SELECTORS, Question, Ranking, largest, needs


@SELECTORS.register("frequency")
@needs(DocumentSums)
def frequency(question: Question) -> Ranking:
    """Latents by |P_doc(max z_adapted > 0) − P_doc(max z_base > 0)|; `statistic` is the difference with its sign."""
    sums = question.fitted.statistics.extra(DocumentSums)
    n = max(len(sums.documents[0]), 1)
    difference = (sums.fired_in("adapted") - sums.fired_in("base")) / n
    change = np.abs(difference)
    chosen = largest(change, question.top)
    return Ranking(chosen, ["read"] * len(chosen), change, {"statistic": difference})
