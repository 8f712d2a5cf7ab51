"""`lexical`, the embedded labeler: finds what a latent fires on without a model, a key or a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from autointerp.labeling.base import LABELERS
from autointerp.labeling.effect import effect_sentence
from autointerp.labeling.lexical import NO_RULE
from autointerp.labeling.lexical.choice import Found, choose
from autointerp.labeling.lexical.overview import overview
from autointerp.labeling.lexical.positions import Positions, gather
from autointerp.labeling.lexical.wording import explain, explain_nothing, fixed_ngram, short_label
from autointerp.records import Change, Label, LatentEvidence, RunSummary

KNOWN_ACCURACY = 0.95


@LABELERS.register("lexical")
class LexicalLabeler:
    """States a rule that tells firing from silent positions of the explain split, or that there is none.

    Status `known` when one token, bigram or trigram is nearly all of it; `ok` for every other rule and for none.
    """

    name = "lexical"
    default_scorer = "rule"

    def __init__(self, names: Mapping[int, str] | None = None):
        """Args: names: labels of other latents, to name what this one raises and lowers."""
        self.names = dict(names or {})

    async def label(self, evidence: LatentEvidence) -> Label:
        """The label of one latent. Uses the split `explain` only; never raises on what a context may hold."""
        return self.label_now(evidence)

    async def summarise(self, changes: Sequence[Change]) -> RunSummary:
        """Counted from the rows, in fixed words: what is pushed, what is suppressed, where, and what faded."""
        return RunSummary(self.name, "ok", tuple(overview(changes)))

    def label_now(self, evidence: LatentEvidence) -> Label:
        """`label` outside of an event loop; tens of milliseconds of CPU."""
        positions = gather(evidence, "explain")
        frequency = evidence.freq_adapted if evidence.state == "revived" else evidence.freq_base
        found = choose(positions, frequency)
        effect = effect_sentence(evidence, self.names)
        if found.rule is None or not found.believed:
            explanation = explain_nothing(found, positions)
            return Label(evidence.latent, self.name, "ok", NO_RULE, explanation, effect)
        return self._state(evidence.latent, found, positions, effect)

    def _state(self, latent: int, found: Found, positions: Positions, effect: str) -> Label:
        assert found.rule is not None
        known = fixed_ngram(found.rule) if found.accuracy >= KNOWN_ACCURACY else None
        return Label(
            latent=latent,
            labeler=self.name,
            status="known" if known else "ok",
            label=short_label(found.rule),
            explanation=explain(found, positions) + (f" A {known} feature." if known else ""),
            effect=effect,
            rule=found.rule.to_json(),
        )
