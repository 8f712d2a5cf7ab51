"""Several selectors asked about one run: what each says, and how far each agrees with the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from scipy import stats

from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import Ranking


def agreement(rankings: Mapping[str, Ranking], fitted: FittedMap) -> list[dict[str, Any]]:
    """Rows of the store's `selectors`, the first selector's first.

    Spearman is over the latents of which both give a size; the overlap is the share of the first's latents that the
    other selects too.
    """
    first = next(iter(rankings.values()))
    rows = []
    for position, (name, ranking) in enumerate(rankings.items(), start=1):
        coverage = fitted.coverage(ranking.latents)[-1:]
        rows.append(
            {
                "selector": name,
                "position": position,
                "n_selected": len(ranking.latents),
                "n_pass": ranking.n_pass,
                "coverage": coverage[0] if coverage and not np.isnan(coverage[0]) else None,
                "spearman": spearman(first.change, ranking.change) if position > 1 else None,
                "overlap": overlap(first.latents, ranking.latents) if position > 1 else None,
                "figures": ranking.figures,
            }
        )
    return rows


def spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    """Rank correlation of two sizes [m] where both are known; None where that is undefined."""
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(stats.rankdata(a), stats.rankdata(b))[0, 1])


def overlap(first: list[int], other: list[int]) -> float | None:
    """Share of `first` that is in `other`; None where the first selected nothing."""
    return len(set(first) & set(other)) / len(first) if first else None


def rank_columns(rankings: Mapping[str, Ranking]) -> dict[str, dict[str, np.ndarray]]:
    """By selector, columns of the store's `selector_ranks`: the latents that it says anything of."""
    return {name: _ranks(ranking) for name, ranking in rankings.items()}


def _ranks(ranking: Ranking) -> dict[str, np.ndarray]:
    rank = np.full(len(ranking.change), np.nan)
    rank[ranking.latents] = np.arange(1, len(ranking.latents) + 1)
    statistic = ranking.columns.get("statistic", np.full_like(rank, np.nan))
    columns = {"latent": np.arange(len(rank)), "change": ranking.change, "statistic": statistic, "rank": rank}
    said = np.isfinite(ranking.change) | np.isfinite(rank)
    return {name: column[said] for name, column in columns.items()}
