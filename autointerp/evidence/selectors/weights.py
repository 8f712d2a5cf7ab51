"""`weights`: the latents that the adapter's weights write or read most, beyond what a random direction gets. Needs no
corpus and no model; asked beside a corpus, the change map measures how much of the change its latents carry."""

from __future__ import annotations

import torch

from autointerp.evidence.directions import InMemory
from autointerp.evidence.selection import SELECTORS, Question, Ranking
from autointerp.evidence.weights_evidence import reading_of


@SELECTORS.register("weights")
def weights(question: Question) -> Ranking:
    """By the adapter's files; InputError, in one line, where its weights do not say."""
    run, dictionary = question.given.run, question.given.dictionary
    if run is None or dictionary is None:
        raise ValueError("the weights selector reads the run's adapter and dictionary")
    statistics = question.fitted.statistics
    mean = torch.from_numpy(statistics.base.total / max(statistics.n_tokens, 1))
    return reading_of(run, InMemory(dictionary), mean).ranking(question.top, question.fdr)
