"""`rule`: scores a lexical label by running its rule on documents that the labeler never saw."""

from __future__ import annotations

import math

import numpy as np

from autointerp.errors import InputError
from autointerp.labeling.base import SCORERS
from autointerp.labeling.lexical.choice import bootstrap, group_counts, rates
from autointerp.labeling.lexical.positions import Positions, gather
from autointerp.labeling.lexical.rule import Rule, parse_rule
from autointerp.records import Label, LatentEvidence, Score

DRAWS = 1000


@SCORERS.register("rule")
class RuleScorer:
    """Balanced accuracy over the token positions of the score split, each position once, with a 95 % interval from
    documents drawn with replacement. The null is another latent's rule on the same positions."""

    name = "rule"

    async def score(self, evidence: LatentEvidence, label: Label, wrong: Label | None = None) -> Score:
        """The score of one label. `value` is None where there is no rule, or no position that fires or none that is
        silent; `n_missing` counts the contexts that were not scored."""
        return self.score_now(evidence, label, wrong)

    def score_now(self, evidence: LatentEvidence, label: Label, wrong: Label | None = None) -> Score:
        """`score` outside of an event loop."""
        positions = gather(evidence, "score")
        n_contexts = len(positions.contexts) + positions.n_unreadable
        rule, null = _rule(label), _rule(wrong)
        value = _accuracy(_counts(rule, positions)) if rule else None
        if rule is None or value is None:
            return Score(label.latent, label.labeler, self.name, None, None, None, None, 0, n_contexts)
        low, high = self._interval(evidence.latent, _counts(rule, positions))
        return Score(
            latent=label.latent,
            labeler=label.labeler,
            scorer=self.name,
            value=value,
            ci_low=low,
            ci_high=high,
            null_value=_accuracy(_counts(null, positions)) if null else None,
            n_examples=len(positions.contexts),
            n_missing=positions.n_unreadable,
        )

    def _interval(self, latent: int, counts: np.ndarray) -> tuple[float | None, float | None]:
        """None where one document is all there is: nothing says how others would differ."""
        if len(counts) < 2:
            return None, None
        low, high = bootstrap(counts, np.random.default_rng(latent), DRAWS)
        return (None, None) if math.isnan(low) else (low, high)


def _rule(label: Label | None) -> Rule | None:
    """The label's rule; None where it has none, or one of a version that cannot be run."""
    if label is None or label.rule is None:
        return None
    try:
        return parse_rule(label.rule)
    except InputError:
        return None


def _counts(rule: Rule, positions: Positions) -> np.ndarray:
    said = rule.holds(positions.reading)[positions.chosen]
    return group_counts(said, positions.fires, positions.document)


def _accuracy(counts: np.ndarray) -> float | None:
    recall, fallout = rates(counts.sum(axis=0)[None])
    accuracy = float((recall[0] + 1 - fallout[0]) / 2)
    return accuracy if math.isfinite(accuracy) else None
