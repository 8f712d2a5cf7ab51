"""`latent-scaling`: how strongly a latent's direction is present in either model at the tokens where it fires.

β_i^M = Σ_t f_ti ⟨d_i, x_t^M⟩ / (‖d_i‖² Σ_t f_ti²) is the least-squares scale of f_i d_i in x^M; ν is that of base over
that of adapted (Minder et al. 2025, https://arxiv.org/abs/2504.02922). f is the activation in the base model; of a
crosscoder, its own code, which reads both models at once, and d the longer of the latent's two decoder rows, x scaled
as in its training.
"""

from __future__ import annotations

import numpy as np

from autointerp.evidence.extras import ScalingSums
from autointerp.evidence.fitted import MIN_FIRINGS
from autointerp.evidence.selection import SELECTORS, Question, Ranking, largest, needs


@SELECTORS.register("latent-scaling")
@needs(ScalingSums)
def latent_scaling(question: Question) -> Ranking:
    """Latents by |β_base − β_adapted| / max(|β_base|, |β_adapted|): 0 where ν = 1, 1 where either is 0, more where the
    sign turns. `statistic` is ν. Latents that fire at fewer than MIN_FIRINGS tokens are left out."""
    sums = question.fitted.statistics.extra(ScalingSums)
    base, adapted = sums.base, sums.adapted  # β but for ‖d‖² Σf², which both have in common
    larger = np.maximum(np.abs(base), np.abs(adapted))
    with np.errstate(invalid="ignore", divide="ignore"):
        change = np.where(larger > 0, np.abs(base - adapted) / larger, np.nan)
        ratio = np.where(adapted != 0, base / adapted, np.nan)
    change[sums.fired < MIN_FIRINGS] = np.nan
    chosen = largest(change, question.top)
    return Ranking(chosen, ["read"] * len(chosen), change, {"statistic": ratio})
