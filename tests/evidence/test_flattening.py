"""`--top auto`: where a coverage curve is cut."""

from __future__ import annotations

import numpy as np
import pytest

from autointerp.evidence.flattening import FLAT, STEP, cut, flattens_at
from autointerp.evidence.selection import Ranking
from autointerp.records import Role
from autointerp.run import DEFAULT_TOP


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_a_plateau_is_cut_where_it_begins_whatever_its_height(scale: float) -> None:
    rise = np.linspace(0, 1, 21)[1:]
    assert flattens_at(scale * np.concatenate([rise, np.ones(100)])) == 20
    assert flattens_at(scale * np.concatenate([rise, 1 - 0.001 * np.arange(100)])) == 20, "held-out curves sink, too"


def test_a_curve_that_goes_on_rising_is_kept_whole() -> None:
    assert flattens_at(np.linspace(0, 0.5, 31)[1:]) == 30
    assert flattens_at(np.linspace(0, 0.5, 201)[1:]) == 200
    assert flattens_at([0.4]) == 1


def test_a_long_tail_is_cut_where_its_slope_falls_below_the_rule() -> None:
    curve = 1 - np.exp(-np.arange(1, 201) / 25)
    k = flattens_at(curve)
    heights = np.concatenate([[0], curve])
    assert heights[k + STEP] - heights[k] < FLAT * curve[-1] <= heights[k - 1 + STEP] - heights[k - 1]
    assert 50 < k < 100


def test_nothing_rises_or_nothing_was_held_out() -> None:
    assert flattens_at([]) == 0
    assert flattens_at([0.0] * 30) == 0
    assert flattens_at([-0.1, -0.2, -0.3]) == 0
    assert flattens_at([float("nan")] * 120) == DEFAULT_TOP


def test_written_latents_keep_their_tenth_and_static_ones_stay() -> None:
    roles: list[Role] = [*["read"] * 60, *["written"] * 5, *["static"] * 3]  # pyright: ignore[reportAssignmentType]
    ranking = Ranking(list(range(100, 168)), roles, np.zeros(200), n_pass=77)
    short = cut(ranking, [*np.linspace(0, 1, 31)[1:], *np.ones(38)])
    assert short.latents == [*range(100, 130), 160, 161, 162, 165, 166, 167]
    assert short.roles == ["read"] * 30 + ["written"] * 3 + ["static"] * 3
    assert short.n_pass == 77
