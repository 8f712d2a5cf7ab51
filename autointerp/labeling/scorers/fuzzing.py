"""`fuzzing`: a judge who sees only the label says whether the marked tokens are those on which the latent fires.

Where detection asks whether a text is right, fuzzing asks whether the place in it is (Paulo et al., Automatically
Interpreting Millions of Features, 2024). Wrong marks are of two sorts: in a text in which the latent does fire, other
tokens are marked, as many and in as many runs as fire; and in a near miss the very token that misleads is marked.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

from autointerp.labeling.base import SCORERS
from autointerp.labeling.llm.provider import Request
from autointerp.labeling.prompts import Prompts, mark, quote
from autointerp.labeling.scoring.judged import JudgedScorer
from autointerp.labeling.scoring.verdicts import (
    MAX_OUTPUT_TOKENS,
    Example,
    deal,
    measure_verdicts,
    parse_verdicts,
    verdict_schema,
)
from autointerp.labeling.windows import Window, firing_windows, near_misses
from autointerp.records import Label, LatentEvidence

N_EACH = 20
N_TOP = 4


@SCORERS.register("fuzzing")
class FuzzingScorer(JudgedScorer[Example, bool]):
    """Balanced accuracy of the judge over windows with right and with wrong marks."""

    name = "fuzzing"
    per_call = 5
    per_look = 10
    typical_output_tokens = 18

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Example]:
        firing = firing_windows(evidence, "score", 2 * N_EACH, N_TOP)
        # Every other window, so that both halves see the whole range of strengths, and none is seen twice.
        right = [Example(w.marked(), True) for w in firing[::2]][:N_EACH]
        draw = random.Random(f"fuzz {seed} {evidence.latent}")
        moved = [Example(marks, False) for w in firing[1::2] if (marks := mark_others(w, draw))]
        misses = [
            Example(mark(w.tokens, [i == w.peak for i in range(len(w.tokens))]), False)
            for w in near_misses(evidence, "score", N_EACH, "token", "neighbour")
        ]
        wrong = [example for pair in itertools.zip_longest(moved, misses) for example in pair if example][:N_EACH]
        return deal(right, wrong, FuzzingScorer.per_look, f"{seed} {evidence.latent}")

    @staticmethod
    def request(prompts: Prompts, label: Label, batch: Sequence[Example]) -> Request:
        prompt = prompts.render(
            "fuzz",
            label=quote(label.label or ""),
            explanation=quote(label.explanation or ""),
            windows=[example.text for example in batch],
        )
        schema = verdict_schema("right")
        return Request(prompt.system, prompt.user, "verdicts", schema, MAX_OUTPUT_TOKENS, prompt.template_sha256)

    @staticmethod
    def parse(answer: dict[str, Any], batch: Sequence[Example]) -> list[bool | None]:
        return parse_verdicts(answer, "right")

    measure = staticmethod(measure_verdicts)


def mark_others(window: Window, draw: random.Random) -> str | None:
    """The window with marks on tokens that do not fire: runs as long as those that do, at random places.

    None where the silent tokens leave no room for them.
    """
    fires = [activation > 0 for activation in window.activations]
    marked = [False] * len(fires)
    # Tokens without a letter are poor bait in a text of words; where there is nothing else they will do.
    worded = [any(char.isalnum() for char in token) for token in window.tokens]
    for length in sorted(_run_lengths(fires), reverse=True):
        places = [i for i in range(len(fires) - length + 1) if _free(fires, marked, i, length)]
        better = [i for i in places if any(worded[i : i + length])]
        if not places:
            return None
        start = draw.choice(better or places)
        marked[start : start + length] = [True] * length
    return mark(window.tokens, marked)


def _run_lengths(fires: Iterable[bool]) -> list[int]:
    return [len(list(run)) for firing, run in itertools.groupby(fires) if firing]


def _free(fires: Sequence[bool], marked: Sequence[bool], start: int, length: int) -> bool:
    """Whether nothing fires there, and no mark touches: two runs side by side would read as one."""
    around = slice(max(0, start - 1), start + length + 1)
    return not any(fires[start : start + length]) and not any(marked[around])
