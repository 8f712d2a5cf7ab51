"""`simulation`: a judge who sees only the label says of each token how strongly the latent fires; r with the truth.

The protocol of Bills et al., Language models can explain neurons in language models (2023): the simulated activation
of a token is the expected value of the digit that the judge gives it, Σ p·digit / Σ p over the digits among the most
probable tokens in that place, all tokens of a window in one call; the score is Pearson's r with the activations over
the tokens of all windows together. (A linear calibration of the simulated values would not change it.) Where a server
does not say how probable its tokens are, the digits themselves are taken.

Chat APIs tell probabilities only of what the model writes, so the judge writes its digits, seeing those before, where
the paper put them into the prompt as unknown. They are asked for in short rows, each under its number, so that a
miscounted row makes its window missing instead of shifting the rest. Digits go to 9, not to 10: every tokeniser
writes them with one token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autointerp.labeling.base import SCORERS
from autointerp.labeling.llm.logprobs import Spoken, expected_digits
from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.scoring.intervals import Estimate, correlation
from autointerp.labeling.scoring.judged import JudgedScorer, chunks
from autointerp.labeling.scoring.verdicts import deal
from autointerp.labeling.windows import Window, firing_windows, silent_windows
from autointerp.records import Label, LatentEvidence

N_EACH = 10
N_TOP = 3
LARGEST = 9
ROW = 6
"""Tokens in a row."""
ALTERNATIVES = 15
"""As in the published protocol."""
_TOKENS_PER_DIGIT, _TOKENS_PER_ROW = 4, 12
"""Output tokens at most, however the JSON is spaced."""
_ROW = re.compile(r'"(\d+)"\s*:\s*\[([\d,\s]*)\]')


@dataclass(frozen=True)
class Passage:
    """A window of the score split, token by token, and the larger of the two sides' activations at each."""

    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    def rows(self) -> dict[str, list[str]]:
        """The tokens in rows, by the number of the row."""
        return {str(number): row for number, row in enumerate(chunks(self.tokens, ROW), start=1)}


@SCORERS.register("simulation")
class SimulationScorer(JudgedScorer[Passage, tuple[float, ...]]):
    """Correlation over the tokens of firing and silent windows, as many of the one as of the other."""

    name = "simulation"
    chance = 0.0
    per_call = 1
    per_look = 10
    typical_output_tokens = 64

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Passage]:
        firing = [_passage(w) for w in firing_windows(evidence, "score", N_EACH, N_TOP)]
        silent = [_passage(w) for w in silent_windows(evidence, "score", N_EACH)]
        return deal(firing, silent, SimulationScorer.per_look, f"{seed} {evidence.latent}")

    @staticmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[Passage]) -> Request:
        (passage,) = batch
        rows = [[quote(token) for token in row] for row in passage.rows().values()]
        label_text, explanation = quote(label.label or ""), quote(label.explanation or "")
        prompt = prompts.render("simulate", label=label_text, explanation=explanation, rows=rows)
        room = _TOKENS_PER_DIGIT * len(passage.tokens) + _TOKENS_PER_ROW * len(rows) + 32
        return Request(
            prompt.system, prompt.user, "activations", _schema(len(rows)), room, prompt.template_sha256,
            top_logprobs=ALTERNATIVES,
        )  # fmt: skip

    @staticmethod
    def parse(answer: dict[str, Any], batch: Sequence[Passage]) -> list[tuple[float, ...] | None]:
        """A window is missing when one of its tokens has no digit."""
        (passage,) = batch
        rows = passage.rows()
        if not any(isinstance(answer.get(key), list) for key in rows):
            raise ValueError('there must be a list of digits for the number of each row, {"1":[0,0,7],"2":[0]}')
        digits: list[float] = []
        for key, row in rows.items():
            said = answer.get(key)
            if not isinstance(said, list) or len(said) != len(row) or not all(map(_is_digit, said)):
                return [None]
            digits += map(float, said)
        return [tuple(digits)]

    @staticmethod
    def weigh(
        answers: Sequence[tuple[float, ...] | None], spoken: Sequence[Spoken], batch: Sequence[Passage]
    ) -> list[tuple[float, ...] | None]:
        """The expected value of each digit in its place, where its probabilities are known."""
        (said,), (passage,) = answers, batch
        if said is None or not spoken:
            return list(answers)
        text, expected = "".join(token for token, _ in spoken), expected_digits(spoken)
        # Of two rows with one number the last is the answer: a model may think aloud before it.
        written = {match[1]: match for match in _ROW.finditer(text)}
        places: list[int] = []
        for key in passage.rows():
            row = written.get(key)
            places += [row.start(2) + digit.start() for digit in re.finditer(r"\d", row[2])] if row else []
        if [float(text[place]) for place in places] != list(said):
            return list(answers)  # the tokens are not those of this answer
        return [tuple(expected.get(place, digit) for place, digit in zip(places, said, strict=True))]

    @staticmethod
    def measure(examples: Sequence[Passage], answers: Sequence[tuple[float, ...] | None], z: float) -> Estimate | None:
        pairs = [(said, passage.activations) for passage, said in zip(examples, answers, strict=True) if said]
        return correlation([said for said, _ in pairs], [actual for _, actual in pairs], z)


def _passage(window: Window) -> Passage:
    return Passage(window.tokens, window.activations)


def _is_digit(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST


def _schema(n: int) -> dict[str, Any]:
    """{"1": [digit, …], …}: every row must be answered, under its own number."""
    keys = [str(number) for number in range(1, n + 1)]
    digit = {"type": "integer", "enum": list(range(LARGEST + 1))}
    return {
        "type": "object",
        "properties": {key: {"$ref": "#/$defs/row"} for key in keys},
        "required": keys,
        "additionalProperties": False,
        "$defs": {"row": {"type": "array", "items": digit}},
    }
