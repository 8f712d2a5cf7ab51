"""What base and adapted model predict next at the peaks of a latent's strongest contexts."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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


@dataclass
class Text:
    """A sequence of the spool up to the last of the peaks in it, which one pass serves."""

    sequence: int
    peaks: dict[int, list[Context]]
    """By place among its document tokens: the contexts, of one latent or several, that peak there."""

    @property
    def length(self) -> int:
        """Document tokens."""
        return max(self.peaks) + 1


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
        """Predictions for the strongest contexts of each latent in both splits. Those of a context stand together."""
        strongest: dict[tuple[int, Split], list[Context]] = defaultdict(list)
        for context in sorted(contexts, key=lambda c: (c.kind != "top", c.rank)):
            mine = strongest[context.latent, context.split]
            same = not mine or mine[0].kind == context.kind
            if context.kind in ("top", "top_base") and same and len(mine) < N_CONTEXTS[context.split]:
                mine.append(context)
        texts: dict[int, Text] = {}
        for context in (context for shown in strongest.values() for context in shown):
            sequence, place = self._place(context)
            texts.setdefault(sequence, Text(sequence, {})).peaks.setdefault(place, []).append(context)
        limit = tokens_per_batch(self.models[0].device)
        batches = by_length(texts.values(), lambda text: len(self.bos) + text.length, limit)
        found: list[Prediction] = []
        in_order(partial(self._at, self._bos_streams), found.extend, self.models, batches)
        return found

    def _place(self, context: Context) -> tuple[int, int]:
        """Sequence of the spool in which a context peaks, and where in it."""
        places = self._starts[context.doc]
        start, sequence = places[bisect.bisect_right(places, (context.position, len(self.spool))) - 1]
        return sequence, context.position - start

    def _at(self, bos: tuple[Tensor, Tensor], model: PairedModel, batch: list[Text]) -> list[Prediction]:
        ids = [self.spool.ids(text.sequence)[: text.length] for text in batch]
        padded = right_padded([np.concatenate([self.bos, text]) for text in ids])
        peaks = [(row, place, mine) for row, text in enumerate(batch) for place, mine in text.peaks.items()]
        at = torch.tensor([(row, len(self.bos) + place) for row, place, _ in peaks])
        logits_of_both = model.logits_from(self._streams(bos, batch, padded.shape[1]), padded, at)
        tops = [logits.float().softmax(-1).topk(N_TOKENS) for logits in logits_of_both]
        likeliest = [zip(top.values.tolist(), top.indices.tolist(), strict=True) for top in tops]
        return [
            Prediction(context.latent, context.context_id, side, rank, self.decode(token), p)
            for (_, _, mine), *both in zip(peaks, *likeliest, strict=True)
            for context in mine
            for side, (probabilities, tokens) in zip(SIDES, both, strict=True)
            for rank, (p, token) in enumerate(zip(probabilities, tokens, strict=True), start=1)
        ]

    def _streams(self, bos: tuple[Tensor, Tensor], batch: list[Text], width: int) -> tuple[Tensor, Tensor]:
        """What is at the hook, (base, adapted), each [b, width, d]: the corpus pass left it in the spool."""
        n_bos = len(self.bos)
        x_base = torch.zeros(len(batch), width, self.spool.d, dtype=self.spool.dtype)
        x_adapted = torch.zeros_like(x_base)
        sides = (x_base, x_adapted)
        for side, x in zip(sides, bos, strict=True):
            side[:, :n_bos] = x
        for row, text in enumerate(batch):
            stretch = self.spool.read(np.array([text.sequence]))
            for side, x in zip(sides, (stretch.x_base, stretch.x_adapted), strict=True):
                side[row, n_bos : n_bos + text.length] = x[: text.length]
        return sides

    @cached_property
    def _bos_streams(self) -> tuple[Tensor, Tensor]:
        """What is at the hook where BOS stands, (base, adapted), each [0 or 1, d]. It is not in the spool; as nothing
        stands before it, it is the same in every sequence."""
        if not len(self.bos):
            none = torch.zeros(0, self.spool.d, dtype=self.spool.dtype)
            return none, none
        x_base, x_adapted = self.models[0].activations(torch.from_numpy(self.bos)[None])
        return x_base[0].cpu(), x_adapted[0].cpu()
