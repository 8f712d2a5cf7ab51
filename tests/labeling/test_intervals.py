"""Intervals cover at their level, stay inside their range, and do not shrink to a point where little was seen."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import numpy as np
import pytest

from autointerp.labeling.scoring.intervals import area_under_roc, balanced_accuracy, correlation, wilson
from autointerp.labeling.scoring.looks import POCOCK, buy, decided, line
from autointerp.labeling.scoring.verdicts import Example, measure_verdicts


def test_wilson_against_a_published_value():
    assert wilson(81, 263) == pytest.approx((0.3080, 0.2553, 0.3662), abs=5e-5)  # Newcombe 1998, table I


def test_the_interval_of_a_balanced_accuracy_covers_at_its_level():
    rng = random.Random(0)
    truths = [True] * 10 + [False] * 10
    covered = 0
    for _ in range(2000):
        verdicts = [rng.random() < 0.9 for _ in range(10)] + [rng.random() >= 0.7 for _ in range(10)]
        found = balanced_accuracy(truths, verdicts)
        assert found is not None
        assert 0 <= found.low <= found.value <= found.high <= 1
        covered += found.low <= 0.8 <= found.high
    assert 0.93 <= covered / 2000 <= 0.985


def test_missing_verdicts_are_left_out_of_the_value():
    truths = [True] * 2 + [False] * 2
    found = balanced_accuracy(truths, [True, None, False, True])
    assert found is not None
    assert found.value == 0.75
    assert balanced_accuracy(truths, [None, None, False, True]) is None


def test_the_area_under_a_roc_curve():
    rng = np.random.default_rng(0)
    assert area_under_roc([], [1.0]) is None
    perfect = area_under_roc([3, 4, 5, 6], [0, 1, 2, 2])
    assert perfect is not None
    assert perfect.value == perfect.high == 1
    assert 0.4 < perfect.low < 0.9, "four against four do not prove perfection"
    assert area_under_roc([1, 1], [1, 1]).value == 0.5  # type: ignore[union-attr]
    truth = 0.7602  # of two normals one standard deviation apart: Φ(1/√2)
    covered = 0
    for _ in range(600):
        found = area_under_roc(rng.normal(1, 1, 20).tolist(), rng.normal(0, 1, 20).tolist())
        assert found is not None
        assert found.low <= found.value <= found.high
        covered += found.low <= truth <= found.high
    assert 0.92 <= covered / 600 <= 0.985


def test_a_correlation_over_windows_is_that_of_all_tokens():
    rng = np.random.default_rng(1)
    actual = rng.gamma(1.0, size=(12, 20)) * (rng.random((12, 20)) < 0.2)
    simulated = actual + rng.normal(0, 0.5, actual.shape)
    found = correlation(simulated.tolist(), actual.tolist())
    assert found is not None
    assert found.value == pytest.approx(np.corrcoef(simulated.ravel(), actual.ravel())[0, 1])
    assert found.low < found.value < found.high
    wide = correlation(simulated.tolist(), actual.tolist(), z=POCOCK[3])
    assert wide is not None
    assert wide.low < found.low < found.high < wide.high
    constant = correlation(np.ones_like(actual).tolist(), actual.tolist())
    assert constant is not None
    assert constant.value == 0
    assert correlation(simulated.tolist(), np.zeros_like(actual).tolist()) is None, "nothing fires"
    assert correlation(simulated[:2].tolist(), actual[:2].tolist()) is None


def simulate_buying(p: float, seed: int, n_looks: int = 4) -> tuple[float, float, int]:
    """(low, high, n examples) of a judge who is right with probability p."""
    rng = random.Random(seed)
    looks = [[Example("", i % 2 == 0) for i in range(10)] for _ in range(n_looks)]

    async def judge(look: Sequence[Example]) -> list[bool | None]:
        return [example.truth == (rng.random() < p) for example in look]

    bought = asyncio.run(buy(looks, judge, None, measure_verdicts, line(0.5)))
    assert bought.estimate is not None
    assert bought.nulls == []
    return bought.estimate.low, bought.estimate.high, len(bought.examples)


def test_buying_stops_when_the_interval_has_decided_and_still_covers():
    at = line(0.5)
    assert at == pytest.approx(0.7)
    found = {p: [simulate_buying(p, seed) for seed in range(1000)] for p in (0.5, 0.7, 0.97)}
    for p, ends in found.items():
        assert np.mean([low <= p <= high for low, high, _ in ends]) > 0.94, "looking often does not spoil the interval"
    spent = {p: np.mean([n for *_, n in ends]) for p, ends in found.items()}
    assert spent[0.97] < 28
    assert spent[0.5] < 30
    assert spent[0.7] > 38, "on the line nothing is decided until all is bought"
    wrongly = [low > at or high < at for low, high, _ in found[0.7]]
    assert np.mean(wrongly) < 0.06


def test_what_cannot_be_measured_yet_is_bought_on():
    async def judge(look: Sequence[Example]) -> list[bool | None]:
        return [None] * len(look)

    async def null(look: Sequence[Example]) -> list[bool | None]:
        return [True] * len(look)

    looks = [[Example("", True), Example("", False)]] * 3
    bought = asyncio.run(buy(looks, judge, null, measure_verdicts, 0.7))
    assert (bought.estimate, bought.n_missing, len(bought.nulls)) == (None, 6, 6)
    assert bought.null is not None
    assert bought.null.value == 0.5
    assert not decided(None, 0.7)
