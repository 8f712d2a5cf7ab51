"""`contrast`: a judge who sees only the stated effect says which of two next-token lists is the adapted model's.

The other scorers test what a label says of the latent; this one tests what it says of the adapter. The lists are those
of both models after the peak of contexts in which the latent fires, of documents that the labeler never saw. A wrong
label's effect shows how far the lists themselves betray the adapted model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autointerp.labeling.base import SCORERS
from autointerp.labeling.effect import NOTHING
from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, mark, quote
from autointerp.labeling.scoring.intervals import Estimate, balanced_accuracy
from autointerp.labeling.scoring.judged import JudgedScorer
from autointerp.labeling.scoring.verdicts import MAX_OUTPUT_TOKENS, deal
from autointerp.labeling.windows import cut, likeliest
from autointerp.records import Label, LatentEvidence, Prediction

N_TOKENS = 5

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"after": {"type": "array", "items": {"type": "string", "enum": ["A", "B"]}}},
    "required": ["after"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Pair:
    """A text up to a peak, and what the two models predict after it."""

    text: str
    base: str
    adapted: str
    adapted_first: bool = False

    def shown(self) -> dict[str, str]:
        first, second = (self.adapted, self.base) if self.adapted_first else (self.base, self.adapted)
        return {"text": self.text, "first": first, "second": second}


@SCORERS.register("contrast")
class ContrastScorer(JudgedScorer[Pair, bool]):
    """Balanced accuracy of the judge over pairs of lists, each order as often as the other."""

    name = "contrast"
    per_call = 5
    per_look = 10
    typical_output_tokens = 22

    @staticmethod
    def claims(label: Label) -> bool:
        """A stated effect is enough: a latent without a clear pattern may well have one."""
        return label.status in ("ok", "known") and bool(label.effect) and label.effect != NOTHING

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Pair]:
        pairs = pairs_of(evidence)
        first = [Pair(p.text, p.base, p.adapted, True) for p in pairs[::2]]
        return deal(first, pairs[1::2], ContrastScorer.per_look, f"{seed} {evidence.latent}")

    @staticmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[Pair]) -> Request:
        prompt = prompts.render("contrast", effect=quote(label.effect or ""), pairs=[pair.shown() for pair in batch])
        return Request(prompt.system, prompt.user, "choices", SCHEMA, MAX_OUTPUT_TOKENS, prompt.template_sha256)

    @staticmethod
    def parse(answer: dict[str, Any], batch: Sequence[Pair]) -> list[bool | None]:
        said = answer.get("after")
        if not isinstance(said, list):
            raise ValueError('\'after\' must be a list of "A" and "B"')
        return [choice == "A" if choice in ("A", "B") else None for choice in said]

    @staticmethod
    def measure(examples: Sequence[Pair], answers: Sequence[bool | None], z: float) -> Estimate | None:
        return balanced_accuracy([pair.adapted_first for pair in examples], answers, z)


def pairs_of(evidence: LatentEvidence) -> list[Pair]:
    """One pair for each context of the score split whose predictions are stored. Where both sides predict the same,
    to the percent, there is nothing to tell apart: those are left out."""
    sides: dict[int, dict[str, list[Prediction]]] = {}
    for prediction in evidence.predictions:
        sides.setdefault(prediction.context_id, {"base": [], "adapted": []})[prediction.side].append(prediction)
    pairs: list[Pair] = []
    for context in evidence.of("score"):
        found = sides.get(context.context_id)
        if found and all(found.values()):
            window = cut(context)
            upto = window.tokens[: window.peak + 1]
            base, adapted = (likeliest(found[side], N_TOKENS) for side in ("base", "adapted"))
            if base != adapted:
                pairs.append(Pair(mark(upto, [i == window.peak for i in range(len(upto))]), base, adapted))
    return pairs
