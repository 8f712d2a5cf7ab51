"""How selectors agree, against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from autointerp.evidence.agreement import overlap, rank_columns, spearman
from autointerp.evidence.selection import Ranking


def test_spearman_is_scipys_where_both_say_something() -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 9, 40).astype(float)
    b = a + rng.normal(size=40) * 3
    a[3], b[7] = np.nan, np.nan
    both = np.isfinite(a) & np.isfinite(b)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a[both], b[both])[0])
    assert spearman(a, -a) == pytest.approx(-1)
    assert spearman(a, np.full(40, np.nan)) is None
    assert spearman(a, np.ones(40)) is None


def test_overlap_is_a_share_of_the_first() -> None:
    assert overlap([1, 2, 3, 4], [9, 4, 1]) == 0.5
    assert overlap([], [1]) is None


def test_a_selector_says_nothing_of_latents_without_a_size_or_a_rank() -> None:
    ranking = Ranking([2], ["read"], np.array([0.5, np.nan, np.nan]), {"statistic": np.array([-0.5, 1, 2])})
    columns = rank_columns({"x": ranking})["x"]
    np.testing.assert_array_equal(columns["latent"], [0, 2])
    np.testing.assert_array_equal(columns["rank"], [np.nan, 1])
    np.testing.assert_array_equal(columns["statistic"], [-0.5, 2])
