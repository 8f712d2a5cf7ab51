"""What base and adapted model predict next at the peaks of a latent's strongest contexts."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.corpus import by_length, right_padded
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order, tokens_per_batch
from autointerp.evidence.spool import Spool
from autointerp.records import Context, Prediction, Split

N_CONTEXTS: dict[Split, int] = {"explain": 2, "score": 10}
"""Contexts of each latent in each split: the strongest in the adapted model, in the base model where it has none."""
N_TOKENS = 5
SIDES: tuple[Literal["base", "adapted"], ...] = ("base", "adapted")


@dataclass(frozen=True)
class Peak:
    """A context, and its sequence up to the peak."""

    context: Context
    sequence: int
    """In the spool."""
    length: int
    """Document tokens."""


class Predictor:
    """Runs both models from the hook to the end on the text up to a peak."""

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
        peaks = [self._peak(context) for shown in strongest.values() for context in shown]
        limit = tokens_per_batch(self.models[0].device)
        batches = by_length(peaks, lambda peak: len(self.bos) + peak.length, limit)
        found: list[Prediction] = []
        in_order(self._at, found.extend, self.models, batches)
        return found

    def _peak(self, context: Context) -> Peak:
        places = self._starts[context.doc]
        start, sequence = places[bisect.bisect_right(places, (context.position, len(self.spool))) - 1]
        return Peak(context, sequence, context.position - start + 1)

    def _at(self, model: PairedModel, batch: list[Peak]) -> list[Prediction]:
        texts = [self.spool.ids(peak.sequence)[: peak.length] for peak in batch]
        ids = right_padded([np.concatenate([self.bos, text]) for text in texts])
        last = torch.tensor([len(self.bos) + peak.length - 1 for peak in batch])
        logits_of_both = model.logits_from(self._streams(model, batch, ids.shape[1]), ids, last)
        tops = [logits.float().softmax(-1).topk(N_TOKENS) for logits in logits_of_both]
        return [
            Prediction(context.latent, context.context_id, side, rank, self.decode(token), p)
            for row, context in enumerate(peak.context for peak in batch)
            for side, top in zip(SIDES, tops, strict=True)
            for rank, (p, token) in enumerate(
                zip(top.values[row].tolist(), top.indices[row].tolist(), strict=True), start=1
            )
        ]

    def _streams(self, model: PairedModel, batch: list[Peak], width: int) -> tuple[Tensor, Tensor]:
        """What is at the hook, (base, adapted), each [b, width, d]: the corpus pass left it in the spool."""
        n_bos = len(self.bos)
        x_base = torch.zeros(len(batch), width, self.spool.d, dtype=self.spool.dtype)
        x_adapted = torch.zeros_like(x_base)
        sides = (x_base, x_adapted)
        if n_bos:  # not in the spool; as nothing stands before it, it is the same in every sequence
            for side, x in zip(sides, model.activations(torch.from_numpy(self.bos)[None]), strict=True):
                side[:, :n_bos] = x.cpu()
        for row, peak in enumerate(batch):
            stretch = self.spool.read(np.array([peak.sequence]))
            for side, x in zip(sides, (stretch.x_base, stretch.x_adapted), strict=True):
                side[row, n_bos : n_bos + peak.length] = x[: peak.length]
        return sides
