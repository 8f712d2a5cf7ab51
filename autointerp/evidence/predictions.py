"""What base and adapted model predict next at the peaks of a latent's strongest contexts."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from autointerp.evidence.corpus import by_length, right_padded
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order, tokens_per_batch
from autointerp.evidence.spool import Spool
from autointerp.records import Context, Prediction, Split

N_CONTEXTS: dict[Split, int] = {"explain": 2, "score": 10}
"""Contexts of each latent in each split: the strongest in the adapted model, in the base model where it has none."""
N_TOKENS = 5
SIDES: tuple[Literal["base", "adapted"], ...] = ("base", "adapted")

Peak = tuple[Context, np.ndarray]
"""A context, and the token ids of its sequence up to the peak."""


class Predictor:
    """Runs both models to the end on the text up to a peak."""

    def __init__(self, models: Sequence[PairedModel], spool: Spool, bos: np.ndarray, decode: Callable[[int], str]):
        """`models`: replicas of one pair. `bos`: ids put before every sequence, none or one."""
        self.models, self.spool, self.bos, self.decode = models, spool, bos, decode
        self._starts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for sequence in range(len(spool)):
            doc, _, start = spool.place(sequence)
            self._starts[doc].append((start, sequence))
        for places in self._starts.values():
            places.sort()

    def predict(self, contexts: Sequence[Context]) -> list[Prediction]:
        """Predictions for the strongest contexts of each latent in both splits, one context after the other."""
        strongest: dict[tuple[int, Split], list[Context]] = defaultdict(list)
        for context in sorted(contexts, key=lambda c: (c.kind != "top", c.rank)):
            mine = strongest[context.latent, context.split]
            same = not mine or mine[0].kind == context.kind
            if context.kind in ("top", "top_base") and same and len(mine) < N_CONTEXTS[context.split]:
                mine.append(context)
        peaks = [(context, self._text(context)) for shown in strongest.values() for context in shown]
        limit = tokens_per_batch(self.models[0].device)
        batches = by_length(peaks, lambda peak: len(peak[1]), limit)
        found: list[Prediction] = []
        in_order(self._at, found.extend, self.models, batches)
        return found

    def _text(self, context: Context) -> np.ndarray:
        places = self._starts[context.doc]
        start, sequence = places[bisect.bisect_right(places, (context.position, len(self.spool))) - 1]
        text = self.spool.ids(sequence)[: context.position - start + 1]
        return np.concatenate([self.bos, text])

    def _at(self, model: PairedModel, batch: list[Peak]) -> list[Prediction]:
        ids = right_padded([text for _, text in batch])
        last = torch.tensor([len(text) - 1 for _, text in batch])
        tops = [logits.float().softmax(-1).topk(N_TOKENS) for logits in model.logits(ids, last)]
        return [
            Prediction(context.latent, context.context_id, side, rank, self.decode(token), p)
            for row, (context, _) in enumerate(batch)
            for side, top in zip(SIDES, tops, strict=True)
            for rank, (p, token) in enumerate(
                zip(top.values[row].tolist(), top.indices[row].tolist(), strict=True), start=1
            )
        ]
