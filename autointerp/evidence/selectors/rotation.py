"""`rotation`: how far fine-tuning the dictionary itself on the adapted model has turned each latent's direction.

It needs that second dictionary, trained on from the first so that latent i is still latent i: `--sae-adapted`.
"""

from __future__ import annotations

import numpy as np
from torch.nn.functional import cosine_similarity

from autointerp.evidence.selection import SELECTORS, Question, Ranking, largest, needs


@SELECTORS.register("rotation")
@needs("adapted dictionary")
def rotation(question: Question) -> Ranking:
    """Latents by 1 − cos(d_i before, d_i after); `statistic` is the cosine. Latents that fire nowhere are left out."""
    if question.given.adapted_W_dec is None:
        raise RuntimeError("the adapted dictionary was not loaded")
    statistics = question.fitted.statistics
    cosine = cosine_similarity(question.fitted.W_dec, question.given.adapted_W_dec.double().cpu(), dim=1).numpy()
    change = np.where(statistics.base.fired + statistics.adapted.fired > 0, 1 - cosine, np.nan).clip(0)
    chosen = largest(change, question.top)
    return Ranking(chosen, ["read"] * len(chosen), change, {"statistic": cosine})
