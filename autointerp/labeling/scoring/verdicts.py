"""Scorers whose judge says yes or no about each of a few windows: the question, the reading, the measure."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.scoring.intervals import Estimate, balanced_accuracy
from autointerp.labeling.scoring.judged import JudgedScorer
from autointerp.records import Label

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


class VerdictScorer(JudgedScorer[Example, bool]):
    """Balanced accuracy of a judge who sees the label and windows. What is asked of a window is the template's."""

    template: ClassVar[str]
    answer: ClassVar[str]
    """Key of the list of 0 and 1 in the judge's answer."""
    per_call = 5
    per_look = 10
    typical_output_tokens = 18

    @classmethod
    def request(cls, prompts: Prompts, label: Label, batch: Sequence[Example]) -> Request:
        prompt = prompts.render(
            cls.template,
            label=quote(label.label or ""),
            explanation=quote(label.explanation or ""),
            windows=[example.text for example in batch],
        )
        schema = verdict_schema(cls.answer)
        return Request(prompt.system, prompt.user, "verdicts", schema, MAX_OUTPUT_TOKENS, prompt.template_sha256)

    @classmethod
    def parse(cls, answer: dict[str, Any], batch: Sequence[Example]) -> list[bool | None]:
        return parse_verdicts(answer, cls.answer)

    measure = staticmethod(measure_verdicts)
