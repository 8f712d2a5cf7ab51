"""Estimates with intervals: rates, balanced accuracy, the area under a ROC curve, a correlation over windows.

Every function takes `z`, the half-width of the interval in standard errors, so that the same formula serves a single
look (1.96 for 95 %) and repeated ones (looks.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

Z_95 = 1.959963984540054
DRAWS = 1000


class Estimate(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float


def wilson(right: int, total: int, z: float = Z_95) -> Estimate:
    """The rate of `right` out of `total` > 0 (Wilson, JASA 22, 1927)."""
    rate = right / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return Estimate(rate, max(0.0, centre - half), min(1.0, centre + half))


def balanced_accuracy(truths: Sequence[bool], verdicts: Sequence[bool | None], z: float = Z_95) -> Estimate | None:
    """The mean of sensitivity and specificity over the answered examples; None unless there are some of both sorts.

    The interval is Agresti and Caffo's for a difference of two rates (American Statistician 54, 2000), here sensitivity
    less false alarms: z²/4 right and wrong answers are added to each sort. Unlike a pair of Wilson intervals combined,
    it keeps its level with five examples of a sort.
    """
    right, total = {True: 0, False: 0}, {True: 0, False: 0}
    for truth, verdict in zip(truths, verdicts, strict=True):
        if verdict is not None:
            total[truth] += 1
            right[truth] += verdict == truth
    if not all(total.values()):
        return None
    value = sum(right[sort] / total[sort] for sort in total) / 2
    added = z * z / 4
    rates = {sort: (right[sort] + added) / (total[sort] + 2 * added) for sort in total}
    variance = sum(rate * (1 - rate) / (total[sort] + 2 * added) for sort, rate in rates.items())
    centre, half = sum(rates.values()) / 2, z * math.sqrt(variance) / 2
    return Estimate(value, max(0.0, min(value, centre - half)), min(1.0, max(value, centre + half)))


def area_under_roc(firing: Sequence[float], silent: Sequence[float], z: float = Z_95) -> Estimate | None:
    """Chance that a firing example scores above a silent one, ties counted half; None unless there are both.

    The interval holds all areas A with |Â − A| ≤ z·σ(A), where σ is Hanley and McNeil's standard error with the
    exponential terms averaged over both sorts (Newcombe, Statistics in Medicine 25, 2006, method 5): like Wilson's for
    a rate, it does not shrink to a point at 0 and 1.
    """
    if not len(firing) or not len(silent):
        return None
    difference = np.subtract.outer(np.asarray(firing, float), np.asarray(silent, float))
    area = float(((difference > 0) + 0.5 * (difference == 0)).mean())
    m, n = difference.shape
    spread = (m + n) / 2 - 1

    def inside(other: float) -> bool:
        terms = (1 - other) / (2 - other) + other / (1 + other)
        variance = other * (1 - other) * (1 + spread * terms) / (m * n)
        return abs(area - other) <= z * math.sqrt(max(variance, 0.0))

    return Estimate(area, _edge(inside, area, 0.0), _edge(inside, area, 1.0))


def correlation(
    simulated: Sequence[Sequence[float]], actual: Sequence[Sequence[float]], z: float = Z_95, seed: int = 0
) -> Estimate | None:
    """Pearson's r over the tokens of all windows together; None where nothing fires or there are fewer than 3 windows.

    A simulation that is the same on every token says nothing: r is 0 there. The interval draws whole windows with
    replacement (tokens of one window are not independent), percentiles at the level of `z`.
    """
    if len(simulated) < 3:
        return None
    moments = np.array([_moments(x, y) for x, y in zip(simulated, actual, strict=True)])
    value = _pearson(moments.sum(0))
    if math.isnan(value):
        return None
    drawn = np.random.default_rng(seed).integers(len(moments), size=(DRAWS, len(moments)))
    values = np.array([_pearson(total) for total in moments[drawn].sum(1)])
    values = values[~np.isnan(values)]  # draws of silent windows alone
    tail = 1 - NormalDist().cdf(z)
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value, float(min(low, value)), float(max(high, value)))


def _moments(x: Sequence[float], y: Sequence[float]) -> list[float]:
    """n, Σx, Σy, Σx², Σy², Σxy: windows add up."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    return [len(a), float(a.sum()), float(b.sum()), float(a @ a), float(b @ b), float(a @ b)]


def _pearson(total: np.ndarray) -> float:
    """NaN where the actual activations do not vary, 0 where the simulated ones do not."""
    n, sx, sy, sxx, syy, sxy = total
    vx, vy = sxx - sx * sx / n, syy - sy * sy / n
    if vy <= 1e-12 * max(syy, 1e-300):
        return math.nan
    return 0.0 if vx <= 1e-12 * max(sxx, 1e-300) else float(np.clip((sxy - sx * sy / n) / math.sqrt(vx * vy), -1, 1))


def _edge(inside: Callable[[float], bool], start: float, end: float) -> float:
    """The point farthest from `start` towards `end` at which `inside` still holds, by bisection."""
    if inside(end):
        return end
    near, far = start, end
    for _ in range(50):
        middle = (near + far) / 2
        near, far = (middle, far) if inside(middle) else (near, middle)
    return near
