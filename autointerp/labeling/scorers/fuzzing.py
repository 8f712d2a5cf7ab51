"""`fuzzing`: a judge who sees only the label says whether the marked tokens are those on which the latent fires.

Where detection asks whether a text is right, fuzzing asks whether the place in it is (Paulo et al., Automatically
Interpreting Millions of Features, 2024). Wrong marks are of two sorts: in a text in which the latent does fire, other
tokens are marked, as many and in as many runs as fire; and in a near miss the very token that misleads is marked.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

from autointerp.labeling.base import SCORERS
from autointerp.labeling.prompts import mark
from autointerp.labeling.scoring.verdicts import Example, VerdictScorer, deal
from autointerp.labeling.windows import Window, firing_windows, near_misses
from autointerp.records import LatentEvidence

N_EACH = 20
N_TOP = 4


@SCORERS.register("fuzzing")
class FuzzingScorer(VerdictScorer):
    """Balanced accuracy of the judge over windows with right and with wrong marks."""

    name = "fuzzing"
    template = "fuzz"
    answer = "right"

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
