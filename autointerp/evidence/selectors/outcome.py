"""`outcome`: where the change goes with something known of each document: a grade, a class, a reward."""

from __future__ import annotations

import numpy as np
from scipy import stats

from autointerp.evidence.extras import DocumentSums
from autointerp.evidence.selection import SELECTORS, Question, Ranking, largest, needs

MIN_DOCUMENTS = 5
"""Documents in which a latent must have changed: with fewer, one of them decides the correlation."""


@SELECTORS.register("outcome")
@needs(DocumentSums, "outcome")
def outcome(question: Question) -> Ranking:
    """Latents by |r|, the correlation over documents of the column with mean z_adapted − mean z_base.

    Only those whose r differs from 0 by a t-test, Benjamini–Hochberg at `fdr` over the latents that changed in
    MIN_DOCUMENTS or more. `statistic` is r with its sign.
    """
    if question.given.outcome is None:
        raise RuntimeError("the outcome column was not read")
    sums = question.fitted.statistics.extra(DocumentSums)
    r, n = correlations(sums, question.given.outcome[sums.documents[0]])
    q = np.full(len(r), np.nan)
    tested = np.isfinite(r)
    with np.errstate(divide="ignore"):
        t = np.abs(r[tested]) * np.sqrt((n - 2) / np.maximum(1 - r[tested] ** 2, 0))
    if tested.any():
        q[tested] = stats.false_discovery_control(2 * stats.t.sf(t, n - 2))
    change = np.abs(r)
    passed = np.nan_to_num(q, nan=1.0) <= question.fdr
    chosen = largest(np.where(passed, change, np.nan), question.top)
    columns = {"statistic": r, "q_value": q}
    return Ranking(chosen, ["read"] * len(chosen), change, columns, int(passed.sum()))


def correlations(sums: DocumentSums, outcome: np.ndarray) -> tuple[np.ndarray, int]:
    """(r [m], documents that count). outcome: a number for each of `sums.documents`, NaN where it has none.

    r is NaN where the outcome does not vary, and for latents that changed in fewer than MIN_DOCUMENTS documents.
    """
    known = np.isfinite(outcome)
    n, m = int(known.sum()), sums.m
    if n < 3 or np.ptp(outcome[known]) == 0:
        return np.full(m, np.nan), n
    document, latent, difference = (part[known[sums.differences()[0]]] for part in sums.differences())
    y = outcome - outcome[known].mean()
    y /= np.sqrt(np.square(y[known]).sum())
    total, square, product = (
        np.bincount(latent, weights=w, minlength=m) for w in (difference, difference**2, difference * y[document])
    )
    changed = np.bincount(latent[difference != 0], minlength=m)
    spread = square - total**2 / n
    with np.errstate(invalid="ignore", divide="ignore"):
        r = product / np.sqrt(spread)
    r[(changed < MIN_DOCUMENTS) | (spread <= 1e-12 * square)] = np.nan
    return r.clip(-1, 1), n
