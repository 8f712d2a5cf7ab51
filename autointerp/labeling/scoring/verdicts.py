"""Examples about which a judge says yes or no, and the reading of such answers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from autointerp.labeling.scoring.intervals import Estimate, balanced_accuracy

T = TypeVar("T")

SCHEMA_ITEMS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "enum": [0, 1]}}
MAX_OUTPUT_TOKENS = 64


@dataclass(frozen=True)
class Example:
    """A window of the score split, as the judge sees it, and the truth about it."""

    text: str
    truth: bool


def verdict_schema(key: str) -> dict[str, Any]:
    """JSON schema of {key: [0, 1, …]}."""
    return {"type": "object", "properties": {key: SCHEMA_ITEMS}, "required": [key], "additionalProperties": False}


def parse_verdicts(answer: dict[str, Any], key: str) -> list[bool | None]:
    """One verdict per number; None for what is neither 0 nor 1. ValueError when there is no list at all."""
    said = answer.get(key)
    if not isinstance(said, list):
        raise ValueError(f"{key!r} must be a list of 0 and 1")
    return [bool(value) if isinstance(value, int) and value in (0, 1) else None for value in said]


def deal(positive: Sequence[T], negative: Sequence[T], per_look: int, key: str) -> list[T]:
    """As many of the one as of the other, ordered so that every look holds half of each, shuffled within.

    key: what the shuffles depend on, so that a repeated command asks the same.
    """
    shuffled = random.Random(key)
    yes, no = list(positive), list(negative)
    shuffled.shuffle(yes)  # firing windows come by strength: every look must see the whole range
    n, half = min(len(yes), len(no)), per_look // 2
    dealt: list[T] = []
    for first in range(0, n, half):
        look = yes[first : min(first + half, n)] + no[first : min(first + half, n)]
        shuffled.shuffle(look)
        dealt += look
    return dealt


def measure_verdicts(examples: Sequence[Example], answers: Sequence[bool | None], z: float) -> Estimate | None:
    """Balanced accuracy over the answered examples."""
    return balanced_accuracy([example.truth for example in examples], answers, z)
