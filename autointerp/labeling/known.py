"""Labels of latents that a token, bigram or trigram explains alone: read off the table of n-grams, asked of nobody."""

from __future__ import annotations

from collections.abc import Mapping

from autointerp.labeling.effect import effect_sentence
from autointerp.labeling.lexical.rule import Atom, Clause, Rule
from autointerp.labeling.lexical.wording import describe, short_label
from autointerp.records import Label, LatentEvidence, Ngrams

NOUNS = {1: "token", 2: "bigram", 3: "trigram"}


def known_label(
    evidence: LatentEvidence, ngrams: Ngrams | None, labeler: str, names: Mapping[int, str] | None = None
) -> Label | None:
    """The label of a latent that its n-grams explain, with the rule they make; None for any other latent.

    labeler: in whose name it is given. names: labels of other latents, for the effect.
    """
    if ngrams is None or ngrams.length is None:
        return None
    grams = [gram for gram in ngrams.grams if all(gram)]
    if not grams:
        return None
    noun = NOUNS[ngrams.length]
    values = [gram[0] for gram in grams] if ngrams.length == 1 else grams
    rule = Rule((Clause((Atom(noun, tuple(values)),)),))
    r2 = (ngrams.r2_token, ngrams.r2_bigram, ngrams.r2_trigram)[ngrams.length - 1]
    return Label(
        latent=evidence.latent,
        labeler=labeler,
        status="known",
        label=short_label(rule),
        explanation=(
            f"Fires on {describe(rule)}. A {noun} feature: on held-out documents, the {noun} that ends at a position"
            f" tells its activation there with R² {r2:.2f}."
        ),
        effect=effect_sentence(evidence, names),
        rule=rule.to_json(),
    )
