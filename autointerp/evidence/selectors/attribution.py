"""`attribution`: by how much each latent's share of the change brings the base model's predictions to the adapted's."""

from __future__ import annotations

import numpy as np
import torch

from autointerp.evidence.selection import SELECTORS, Question, Ranking, largest, needs


@SELECTORS.register("attribution")
@needs("gradients")
def attribution(question: Question) -> Ranking:
    """Latents by |Σ_t (z_tj − z̄_j)⟨c_j, g_t⟩| over the rows of the change map, g the gradient of KL(adapted ‖ base).

    In nats a token; positive where the row takes KL away. `statistic` is the same of the difference of two encodings,
    Σ_t Δz_ti ⟨d_i, g_t⟩. What neither accounts for is in the figures, as shares of Σ_t ⟨g_t, Δx_t⟩.
    """
    fitted, sums = question.fitted, question.given.gradients
    if sums is None:
        raise RuntimeError("the gradients were not measured")
    n = max(sums.n, 1)
    mean, static = (side[0] for side in fitted.statistics.centre(by_place=False))
    share = np.zeros(len(fitted.tracked))
    if fitted.changed:
        centred = torch.from_numpy(sums.base - mean[:, None] * sums.change)
        share = -(centred * fitted.rows).sum(1).numpy() / n
    total = -sums.total / n
    differences = -sums.differences / n
    figures = {
        "kl": sums.kl / n,
        "kl_removed": total,
        "by_map": float(share.sum()) / total if total else None,
        "by_static_part": float(-(static @ sums.change) / n) / total if total else None,
        "by_encodings": float(differences.sum()) / total if total else None,
    }
    if figures["by_map"] is not None and figures["by_static_part"] is not None:
        figures["outside_map"] = 1 - figures["by_map"] - figures["by_static_part"]
    spread = fitted.spread(share)
    change = np.abs(spread)
    chosen = largest(change, question.top)
    columns = {"attribution": spread, "statistic": differences}
    return Ranking(chosen, ["read"] * len(chosen), change, columns, figures=figures)
