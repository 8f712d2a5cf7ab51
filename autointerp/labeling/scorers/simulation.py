"""`simulation`: a judge who sees only the label says of each token how strongly the latent fires; r with the truth.

The protocol of Bills et al., Language models can explain neurons in language models (2023): the simulated activation
is the expected value of the digit that the judge gives, and the score is the correlation with the activations over the
tokens of all windows together. Each token is answered under its number, so that a miscounted answer is missing instead
of shifted. Digits go to 9, not to 10: every tokeniser writes them with one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autointerp.labeling.base import SCORERS
from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.scoring.intervals import Estimate, correlation
from autointerp.labeling.scoring.judged import JudgedScorer
from autointerp.labeling.scoring.verdicts import deal
from autointerp.labeling.windows import Window, firing_windows, silent_windows
from autointerp.records import Label, LatentEvidence

N_EACH = 10
N_TOP = 3
LARGEST = 9
_TOKENS_PER_ENTRY = 8
"""Output tokens of `"12": 0, `, at most."""


@dataclass(frozen=True)
class Passage:
    """A window of the score split, token by token, and the larger of the two sides' activations at each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]


@SCORERS.register("simulation")
class SimulationScorer(JudgedScorer[Passage, tuple[float, ...]]):
    """Correlation over the tokens of firing and silent windows, as many of the one as of the other."""

    name = "simulation"
    chance = 0.0
    per_call = 1
    per_look = 10
    typical_output_tokens = 135

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Passage]:
        firing = [_passage(w) for w in firing_windows(evidence, "score", N_EACH, N_TOP)]
        silent = [_passage(w) for w in silent_windows(evidence, "score", N_EACH)]
        return deal(firing, silent, SimulationScorer.per_look, f"{seed} {evidence.latent}")

    @staticmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[Passage]) -> Request:
        (passage,) = batch
        tokens = [quote(token) for token in passage.tokens]
        label_text, explanation = quote(label.label or ""), quote(label.explanation or "")
        prompt = prompts.render("simulate", label=label_text, explanation=explanation, tokens=tokens)
        room = _TOKENS_PER_ENTRY * len(tokens) + 32
        return Request(prompt.system, prompt.user, "activations", _schema(len(tokens)), room, prompt.template_sha256)

    @staticmethod
    def parse(answer: dict[str, Any], batch: Sequence[Passage]) -> list[tuple[float, ...] | None]:
        """A window is missing when one of its tokens has no digit."""
        (passage,) = batch
        keys = _keys(len(passage.tokens))
        if not any(key in answer for key in keys):
            raise ValueError('there must be a digit for the number of each token, {"1": 0, "2": 3, …}')
        digits = [answer.get(key) for key in keys]
        known = [d for d in digits if isinstance(d, int) and not isinstance(d, bool) and 0 <= d <= LARGEST]
        return [tuple(map(float, known)) if len(known) == len(digits) else None]

    @staticmethod
    def measure(examples: Sequence[Passage], answers: Sequence[tuple[float, ...] | None], z: float) -> Estimate | None:
        pairs = [(said, passage.activations) for passage, said in zip(examples, answers, strict=True) if said]
        return correlation([said for said, _ in pairs], [actual for _, actual in pairs], z)


def _passage(window: Window) -> Passage:
    return Passage(window.tokens, window.activations)


def _keys(n: int) -> list[str]:
    return [str(number) for number in range(1, n + 1)]


def _schema(n: int) -> dict[str, Any]:
    """{"1": digit, …}: every token must be answered, under its own number."""
    digit = {"type": "integer", "enum": list(range(LARGEST + 1))}
    return {
        "type": "object",
        "properties": {key: {"$ref": "#/$defs/digit"} for key in _keys(n)},
        "required": _keys(n),
        "additionalProperties": False,
        "$defs": {"digit": digit},
    }
