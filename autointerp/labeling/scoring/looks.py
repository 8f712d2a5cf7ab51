"""Sequential stopping: examples are bought look by look, until the interval has decided or all are bought.

Who looks several times and stops when the result pleases has no 95 % interval. So the interval at every look is drawn
wider, by Pocock's constant for the number of looks planned: such repeated confidence intervals hold at all looks
together with 95 %, whenever one stops (Pocock, Biometrika 64, 1977; Jennison & Turnbull, Statistical Science 5, 1990).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from autointerp.labeling.scoring.intervals import Estimate

E = TypeVar("E")
A = TypeVar("A")

POCOCK = (1.960, 2.178, 2.289, 2.361, 2.413)
"""Standard errors of a repeated 95 % interval with 1, 2, … looks planned."""
WORTH = 0.4
"""How far from chance to perfect a score must lie for its label to hold: the line that an interval decides about."""

Judge = Callable[[Sequence[E]], Awaitable[list[A | None]]]
"""One answer for each example, None where none came."""
Measure = Callable[[Sequence[E], Sequence[A | None], float], Estimate | None]
"""(examples, answers, z) → the estimate; None where they do not allow one."""


class Bought(NamedTuple, Generic[E, A]):
    """What was bought, and what came of it."""

    examples: list[E]
    answers: list[A | None]
    nulls: list[A | None]
    """Answers with the wrong label on the same examples; empty without one."""
    estimate: Estimate | None
    null: Estimate | None

    @property
    def n_missing(self) -> int:
        """Examples asked about without a usable answer."""
        return self.answers.count(None)


def line(chance: float) -> float:
    """The score from which on a label holds."""
    return chance + WORTH * (1 - chance)


def decided(estimate: Estimate | None, at: float) -> bool:
    """Whether the whole interval lies on one side of the line."""
    return estimate is not None and (estimate.low > at or estimate.high < at)


async def buy(
    looks: Sequence[Sequence[E]],
    judge: Judge[E, A],
    judge_null: Judge[E, A] | None,
    measure: Measure[E, A],
    at: float,
) -> Bought[E, A]:
    """Asks about one look after the other until the interval lies on one side of the line `at`.

    looks: examples of each, at most len(POCOCK) looks. The wrong label is asked about the same examples: its score has
    no interval, so it decides nothing.
    """
    z = POCOCK[max(1, len(looks)) - 1]
    examples: list[E] = []
    answers: list[A | None] = []
    nulls: list[A | None] = []
    estimate = None
    for look in looks:
        said, null = await asyncio.gather(judge(look), judge_null(look) if judge_null else _nothing())
        examples += look
        answers += said
        nulls += null
        estimate = measure(examples, answers, z)
        if decided(estimate, at):
            break
    return Bought(examples, answers, nulls, estimate, measure(examples, nulls, z) if nulls else None)


async def _nothing() -> list:
    return []
