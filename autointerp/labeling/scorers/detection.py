"""`detection`: a judge who sees only the label says in which unseen windows the latent fires."""

from __future__ import annotations

from autointerp.labeling.base import SCORERS
from autointerp.labeling.scoring.verdicts import Example, VerdictScorer, deal
from autointerp.labeling.windows import firing_windows, silent_windows
from autointerp.records import LatentEvidence

N_EACH = 20
"""Firing and silent windows at most: as many of the one as of the other."""
N_TOP = 4


@SCORERS.register("detection")
class DetectionScorer(VerdictScorer):
    """Balanced accuracy of the judge. Half of the silent windows are near misses, where the store holds some."""

    name = "detection"
    template = "detect"
    answer = "fires"

    @staticmethod
    def examples(evidence: LatentEvidence, seed: int) -> list[Example]:
        firing = [Example(w.plain(), True) for w in firing_windows(evidence, "score", N_EACH, N_TOP)]
        silent = [Example(w.plain(), False) for w in silent_windows(evidence, "score", N_EACH)]
        return deal(firing, silent, DetectionScorer.per_look, f"{seed} {evidence.latent}")
