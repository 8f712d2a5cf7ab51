"""`intruder`: a judge who sees only the label finds the one window in which the latent does not fire.

As intruder detection, but with the label in hand, so that it is the label that is scored: a wrong label's score says
how far the windows betray the intruder by themselves.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autointerp.labeling.base import SCORERS
from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.scoring.intervals import Estimate, wilson
from autointerp.labeling.scoring.judged import JudgedScorer
from autointerp.labeling.windows import firing_windows, silent_windows
from autointerp.records import Label, LatentEvidence

N_SETS = 8
N_SHOWN = 4
"""Windows of a set, the intruder among them."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"intruder": {"type": "integer", "enum": list(range(1, N_SHOWN + 1))}},
    "required": ["intruder"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Lineup:
    """Windows of the score split, one of which does not belong."""

    windows: tuple[str, ...]
    intruder: int
    """Its number, from 1."""


@SCORERS.register("intruder")
class IntruderScorer(JudgedScorer[Lineup, int]):
    """Share of intruders found. No window is shown twice; half of the intruders are near misses."""

    name = "intruder"
    chance = 1 / N_SHOWN
    per_call = 1
    per_look = 4
    typical_output_tokens = 8

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Lineup]:
        draw = random.Random(f"intrude {seed} {evidence.latent}")
        firing = [w.plain() for w in firing_windows(evidence, "score", N_SETS * (N_SHOWN - 1), N_SETS)]
        silent = [w.plain() for w in silent_windows(evidence, "score", N_SETS)]
        draw.shuffle(firing)
        lineups: list[Lineup] = []
        places: list[int] = []
        for intruder in silent[: len(firing) // (N_SHOWN - 1)]:
            # Every place as often as the others: always naming one is worth no more than chance.
            places = places or draw.sample(range(N_SHOWN), N_SHOWN)
            place = places.pop()
            others, firing = firing[: N_SHOWN - 1], firing[N_SHOWN - 1 :]
            lineups.append(Lineup((*others[:place], intruder, *others[place:]), place + 1))
        return lineups

    @staticmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[Lineup]) -> Request:
        (lineup,) = batch
        prompt = prompts.render(
            "intrude",
            label=quote(label.label or ""),
            explanation=quote(label.explanation or ""),
            windows=list(lineup.windows),
        )
        return Request(prompt.system, prompt.user, "intruder", SCHEMA, 32, prompt.template_sha256)

    @staticmethod
    def parse(answer: dict[str, Any], batch: Sequence[Lineup]) -> list[int | None]:
        if "intruder" not in answer:
            raise ValueError("'intruder' must be the number of a window")
        said = answer["intruder"]
        return [said if isinstance(said, int) and said in range(1, N_SHOWN + 1) else None]

    @staticmethod
    def measure(examples: Sequence[Lineup], answers: Sequence[int | None], z: float) -> Estimate | None:
        judged = [said == lineup.intruder for lineup, said in zip(examples, answers, strict=True) if said is not None]
        return wilson(sum(judged), len(judged), z) if judged else None
