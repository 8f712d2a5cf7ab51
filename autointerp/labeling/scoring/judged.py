"""A scorer that asks a judge: which examples, what is asked of them, and what the answers amount to."""

from __future__ import annotations

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.engine import Engine
from autointerp.labeling.llm.faults import Terminal
from autointerp.labeling.llm.logprobs import Spoken
from autointerp.labeling.llm.provider import Planned, Request
from autointerp.labeling.prompts import Prompts
from autointerp.labeling.scoring.intervals import Estimate
from autointerp.labeling.scoring.looks import POCOCK, buy, line
from autointerp.records import Label, LatentEvidence, Score

E = TypeVar("E")
A = TypeVar("A")
T = TypeVar("T")

UNTESTABLE = ("no clear pattern", "no simple rule found")
"""Labels that claim nothing: asking about them would buy noise."""
LOOKS_IN_BATCHES = 2


class JudgedScorer(ABC, Generic[E, A]):
    """Asks about examples of the score split, a few in one question, look by look until the interval has decided.

    `value` is None when nothing could be judged: a label that claims nothing, or too few examples. `n_examples` were
    judged; `n_missing` more were asked about without a usable answer.
    """

    name: ClassVar[str]
    needs_engine = True
    chance: ClassVar[float] = 0.5
    """Score of a judge who knows nothing."""
    per_call: ClassVar[int]
    """Examples in one question."""
    per_look: ClassVar[int]
    """Examples bought before the interval is looked at again."""
    typical_output_tokens: ClassVar[int]

    def __init__(self, engine: Engine, settings: LabelingSettings):
        self._engine = engine
        self._prompts = Prompts(settings.prompts_dir)
        self._seed = settings.seed
        self._batch = settings.batch

    @staticmethod
    @abstractmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[E]:
        """Examples in the order in which they are bought, each look a fair sample; empty where none can be made."""

    @staticmethod
    @abstractmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[E]) -> Request:
        """The question about a few examples."""

    @staticmethod
    @abstractmethod
    def parse(answer: dict[str, Any], batch: Sequence[E]) -> list[A | None]:
        """One answer for each example of the batch, None where there is none. ValueError when it answers nothing."""

    @staticmethod
    def weigh(answers: Sequence[A | None], spoken: Sequence[Spoken], batch: Sequence[E]) -> list[A | None]:
        """The answers in the light of what else could have been said; `spoken` is empty where that is not known."""
        return list(answers)

    @staticmethod
    @abstractmethod
    def measure(examples: Sequence[E], answers: Sequence[A | None], z: float) -> Estimate | None:
        """The score over the answered examples."""

    @staticmethod
    def claims(label: Label) -> bool:
        """Whether the label says something that this scorer can test."""
        return label.status in ("ok", "known") and bool(label.label) and label.label not in UNTESTABLE

    @classmethod
    def looks(cls, evidence: LatentEvidence, seed: int, batch: bool = False) -> list[list[E]]:
        """The examples by look; what is left over after the last planned look is not bought.

        In batches, where each look may take a day, looks are drawn together into at most LOOKS_IN_BATCHES.
        """
        looks = chunks(cls.examples(evidence, seed), cls.per_look)[: len(POCOCK)]
        together = math.ceil(len(looks) / LOOKS_IN_BATCHES) if batch else 1
        return [[example for look in some for example in look] for some in chunks(looks, max(1, together))]

    @classmethod
    def plan(cls, prompts: Prompts, evidence: LatentEvidence, batch: bool = False) -> list[Planned]:
        """The questions that `score` would ask of a label and of a wrong one, for an estimate."""
        stand_in = Label(evidence.latent, "", "ok", "x" * 40, "x" * 160, "x" * 100)
        planned: list[Planned] = []
        for number, look in enumerate(cls.looks(evidence, 0, batch)):
            for examples in chunks(look, cls.per_call):
                request = cls.request(prompts, stand_in, examples)
                # Later looks come only while nothing is decided, the wrong label where the labels leave one.
                for certain in (number == 0, False):
                    planned.append(Planned(request, cls.typical_output_tokens, certain))
        return planned

    async def score(self, evidence: LatentEvidence, label: Label, wrong: Label | None) -> Score:
        """Raises what stops every other question too: BudgetError, ProviderError, Interrupted, StoreError."""
        looks = self.looks(evidence, self._seed, self._batch) if self.claims(label) else []
        if not looks:
            return Score(label.latent, label.labeler, self.name, None, None, None, None, 0, 0)

        async def judge(look: Sequence[E]) -> list[A | None]:
            return await self._judge(label, evidence.latent, look)

        async def judge_null(look: Sequence[E]) -> list[A | None]:
            return await self._judge(wrong, evidence.latent, look) if wrong else []

        asked = judge_null if wrong is not None and self.claims(wrong) else None
        bought = await buy(looks, judge, asked, self.measure, line(self.chance))
        value, low, high = bought.estimate or (None, None, None)
        return Score(
            latent=label.latent,
            labeler=label.labeler,
            scorer=self.name,
            value=value,
            ci_low=low,
            ci_high=high,
            null_value=bought.null.value if bought.null else None,
            n_examples=len(bought.answers) - bought.n_missing,
            n_missing=bought.n_missing,
        )

    async def _judge(self, label: Label, latent: int, look: Sequence[E]) -> list[A | None]:
        answers = await asyncio.gather(*(self._ask(label, latent, batch) for batch in chunks(look, self.per_call)))
        return [answer for some in answers for answer in some]

    async def _ask(self, label: Label, latent: int, batch: Sequence[E]) -> list[A | None]:
        request = self.request(self._prompts, label, batch)
        try:
            reply = await self._engine.ask(
                request, lambda answer: self.parse(answer, batch), latent=latent, purpose="score"
            )
        except Terminal:
            return [None] * len(batch)  # `calls` has the reason
        return self.weigh(aligned(reply.value, len(batch)), reply.spoken, batch)


def chunks(items: Sequence[T], n: int) -> list[list[T]]:
    """Runs of at most `n` of them, in order."""
    return [list(items[i : i + n]) for i in range(0, len(items), n)]


def aligned(answers: list[A | None], n: int) -> list[A | None]:
    """`n` answers: the missing ones of a short list are None; of one too long nobody knows which belongs where."""
    return [None] * n if len(answers) > n else answers + [None] * (n - len(answers))
