"""What base and adapted model predict next at the peaks of a latent's strongest contexts."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from autointerp.evidence.paired import PairedModel
from autointerp.evidence.spool import Spool
from autointerp.records import Context, Prediction

N_CONTEXTS = 2
"""Contexts of each latent, the strongest of its explain split."""
N_TOKENS = 5
SIDES: tuple[Literal["base", "adapted"], ...] = ("base", "adapted")


class Predictor:
    """Runs both models to the end on the text up to a peak."""

    def __init__(self, model: PairedModel, spool: Spool, bos: np.ndarray, decode: Callable[[int], str]):
        """`bos`: ids put before every sequence, none or one."""
        self.model, self.spool, self.bos, self.decode = model, spool, bos, decode
        self._starts: dict[int, list[tuple[int, int]]] = defaultdict(list)
        for sequence in range(len(spool)):
            doc, _, start = spool.place(sequence)
            self._starts[doc].append((start, sequence))
        for places in self._starts.values():
            places.sort()

    def predict(self, contexts: Sequence[Context]) -> list[Prediction]:
        """Predictions for the strongest `top` contexts of the explain split."""
        shown = sorted((c for c in contexts if c.kind == "top" and c.split == "explain"), key=lambda c: c.rank)
        return [p for context in shown[:N_CONTEXTS] for p in self._at(context)]

    def _at(self, context: Context) -> list[Prediction]:
        places = self._starts[context.doc]
        start, sequence = places[bisect.bisect_right(places, (context.position, len(self.spool))) - 1]
        text = self.spool.ids(sequence)[: context.position - start + 1]
        ids = torch.from_numpy(np.concatenate([self.bos, text]).astype(np.int64))[None]
        found: list[Prediction] = []
        for side, logits in zip(SIDES, self.model.logits(ids, last=True), strict=True):
            best = logits[0, -1].float().softmax(-1).topk(N_TOKENS)
            for rank, (p, token) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True), start=1):
                found.append(Prediction(context.latent, context.context_id, side, rank, self.decode(token), p))
        return found
