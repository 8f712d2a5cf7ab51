"""`detection`: a judge who sees only the label says in which unseen windows the latent fires."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autointerp.labeling.base import SCORERS
from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.scoring.judged import JudgedScorer
from autointerp.labeling.scoring.verdicts import (
    MAX_OUTPUT_TOKENS,
    Example,
    deal,
    measure_verdicts,
    parse_verdicts,
    verdict_schema,
)
from autointerp.labeling.windows import firing_windows, silent_windows
from autointerp.records import Label, LatentEvidence

N_EACH = 20
"""Firing and silent windows at most: as many of the one as of the other."""
N_TOP = 4


@SCORERS.register("detection")
class DetectionScorer(JudgedScorer[Example, bool]):
    """Balanced accuracy of the judge. Half of the silent windows are near misses, where the store holds some."""

    name = "detection"
    per_call = 5
    per_look = 10
    typical_output_tokens = 18

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Example]:
        firing = [Example(w.plain(), True) for w in firing_windows(evidence, "score", N_EACH, N_TOP)]
        silent = [Example(w.plain(), False) for w in silent_windows(evidence, "score", N_EACH)]
        return deal(firing, silent, DetectionScorer.per_look, f"{seed} {evidence.latent}")

    @staticmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[Example]) -> Request:
        prompt = prompts.render(
            "detect",
            label=quote(label.label or ""),
            explanation=quote(label.explanation or ""),
            windows=[example.text for example in batch],
        )
        schema = verdict_schema("fires")
        return Request(prompt.system, prompt.user, "verdicts", schema, MAX_OUTPUT_TOKENS, prompt.template_sha256)

    @staticmethod
    def parse(answer: dict[str, Any], batch: Sequence[Example]) -> list[bool | None]:
        return parse_verdicts(answer, "fires")

    measure = staticmethod(measure_verdicts)
