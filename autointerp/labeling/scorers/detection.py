"""`detection`: a judge who sees only the label says in which unseen windows the latent fires."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autointerp.labeling.base import SCORERS, LabelingSettings
from autointerp.labeling.llm.engine import Engine
from autointerp.labeling.llm.faults import Terminal
from autointerp.labeling.llm.provider import Planned, Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.windows import firing_windows, silent_windows
from autointerp.records import Label, LatentEvidence, Score

N_EACH = 10
"""Firing and silent windows asked about: as many of the one as of the other."""
N_TOP = 3
PER_CALL = 5
MAX_OUTPUT_TOKENS = 64
TYPICAL_OUTPUT_TOKENS = 18
UNTESTABLE = ("no clear pattern", "no simple rule found")
"""Labels that claim nothing: asking about them would buy noise."""
Z_95 = 1.959963984540054

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"fires": {"type": "array", "items": {"type": "integer", "enum": [0, 1]}}},
    "required": ["fires"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Example:
    """A window of the score split, as the judge sees it, and the truth about it."""

    text: str
    fires: bool


@SCORERS.register("detection")
class DetectionScorer:
    """Balanced accuracy of the judge, with a 95 % interval; the null is the same with another latent's label."""

    name = "detection"
    needs_engine = True

    def __init__(self, engine: Engine, settings: LabelingSettings):
        self._engine = engine
        self._prompts = Prompts(settings.prompts_dir)
        self._seed = settings.seed

    @staticmethod
    def plan(prompts: Prompts, evidence: LatentEvidence) -> list[Planned]:
        """The questions that `score` would ask of a label and of a wrong one, for an estimate."""
        texts = [example.text for example in examples_of(evidence, seed=0)]
        batches = [texts[i : i + PER_CALL] for i in range(0, len(texts), PER_CALL)]
        asked = [detect_request(prompts, "x" * 40, "x" * 160, batch) for batch in batches]
        # The second time with a wrong label, where the labels leave one to ask about.
        return [Planned(request, TYPICAL_OUTPUT_TOKENS, certain) for certain in (True, False) for request in asked]

    async def score(self, evidence: LatentEvidence, label: Label, wrong: Label | None) -> Score:
        """`n_examples` windows were judged; `n_missing` more were asked about without a usable answer.

        `value` is None when nothing could be judged: a label that claims nothing, or windows of one sort only. Raises
        what stops every other question too: BudgetError, ProviderError, Interrupted, StoreError.
        """
        examples = examples_of(evidence, self._seed)
        testable = {example.fires for example in examples} == {True, False} and _claims(label)
        if not testable:
            return Score(label.latent, label.labeler, self.name, None, None, None, None, 0, 0)
        judge_wrong = wrong is not None and _claims(wrong)
        verdicts, nulls = await asyncio.gather(
            self._judge(label, evidence.latent, examples),
            self._judge(wrong, evidence.latent, examples) if judge_wrong and wrong else _nothing(),
        )
        value, low, high = balanced_accuracy(examples, verdicts)
        n_missing = verdicts.count(None)
        return Score(
            latent=label.latent,
            labeler=label.labeler,
            scorer=self.name,
            value=value,
            ci_low=low,
            ci_high=high,
            null_value=balanced_accuracy(examples, nulls)[0] if nulls else None,
            n_examples=len(examples) - n_missing,
            n_missing=n_missing,
        )

    async def _judge(self, label: Label, latent: int, examples: Sequence[Example]) -> list[bool | None]:
        """What the judge says of each example; None where no usable answer came."""
        batches = [examples[i : i + PER_CALL] for i in range(0, len(examples), PER_CALL)]
        answers = await asyncio.gather(*(self._ask(label, latent, batch) for batch in batches))
        return [verdict for answer in answers for verdict in answer]

    async def _ask(self, label: Label, latent: int, batch: Sequence[Example]) -> list[bool | None]:
        request = detect_request(self._prompts, label.label or "", label.explanation or "", [e.text for e in batch])
        try:
            reply = await self._engine.ask(request, parse_verdicts, latent=latent, purpose="score")
        except Terminal:
            return [None] * len(batch)  # `calls` has the reason
        verdicts = reply.value
        if len(verdicts) > len(batch):
            return [None] * len(batch)  # nobody knows which of them belong to which window
        return verdicts + [None] * (len(batch) - len(verdicts))


def examples_of(evidence: LatentEvidence, seed: int) -> list[Example]:
    """At most N_EACH firing and N_EACH silent windows of the score split, shuffled by the seed and the latent."""
    firing = [Example(w.plain(), True) for w in firing_windows(evidence, "score", N_EACH, N_TOP)]
    silent = [Example(w.plain(), False) for w in silent_windows(evidence, "score", N_EACH)]
    examples = firing + silent
    random.Random(f"{seed} {evidence.latent}").shuffle(examples)
    return examples


def detect_request(prompts: Prompts, label: str, explanation: str, texts: Sequence[str]) -> Request:
    """The question about PER_CALL windows or fewer."""
    prompt = prompts.render("detect", label=quote(label), explanation=quote(explanation), windows=list(texts))
    return Request(prompt.system, prompt.user, "verdicts", SCHEMA, MAX_OUTPUT_TOKENS, prompt.template_sha256)


def parse_verdicts(answer: dict[str, Any]) -> list[bool | None]:
    """One verdict per number; None for what is neither 0 nor 1. ValueError when there is no list at all."""
    said = answer.get("fires")
    if not isinstance(said, list):
        raise ValueError("'fires' must be a list of 0 and 1")
    return [bool(value) if isinstance(value, int) and value in (0, 1) else None for value in said]


def balanced_accuracy(
    examples: Sequence[Example], verdicts: Sequence[bool | None]
) -> tuple[float | None, float | None, float | None]:
    """(value, low, high): the mean of sensitivity and specificity over the answered examples; None without both sorts.

    The interval combines the two rates' Wilson intervals (Newcombe, Statistics in Medicine 17, 1998, method 10).
    """
    right = {True: 0, False: 0}
    total = {True: 0, False: 0}
    for example, verdict in zip(examples, verdicts, strict=True):
        if verdict is not None:
            total[example.fires] += 1
            right[example.fires] += verdict == example.fires
    if not all(total.values()):
        return None, None, None
    (p, p_low, p_high), (q, q_low, q_high) = (wilson(right[sort], total[sort]) for sort in (True, False))
    value = (p + q) / 2
    low = value - math.hypot(p - p_low, q - q_low) / 2
    high = value + math.hypot(p_high - p, q_high - q) / 2
    return value, max(0.0, low), min(1.0, high)


def wilson(right: int, total: int, z: float = Z_95) -> tuple[float, float, float]:
    """(rate, low, high) of `right` out of `total` > 0 (Wilson, JASA 22, 1927)."""
    rate = right / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return rate, max(0.0, centre - half), min(1.0, centre + half)


def _claims(label: Label) -> bool:
    return label.status in ("ok", "known") and bool(label.label) and label.label not in UNTESTABLE


async def _nothing() -> list[bool | None]:
    return []
