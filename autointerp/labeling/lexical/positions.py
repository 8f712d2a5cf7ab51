"""The token positions of a latent's contexts, each once: where it fires and where it does not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autointerp.labeling.lexical.reading import Reading
from autointerp.records import Context, LatentEvidence, Split


@dataclass(frozen=True, slots=True)
class Positions:
    """Positions of one split. The same position often stands in windows of several kinds; it is counted once, in the
    window that shows most of what stood before it."""

    contexts: tuple[Context, ...]
    """Those that can be read: with tokens, and as many activations as tokens."""
    n_unreadable: int
    reading: Reading
    """All positions of all readable contexts."""
    chosen: np.ndarray
    """[n] indices into the reading."""
    activation: np.ndarray
    """[n] of the base model; of the adapted one for a latent that fires only there."""
    fires: np.ndarray
    """[n] bool."""
    document: np.ndarray
    """[n] index of the position's document among `documents`."""
    documents: tuple[int, ...]


def gather(evidence: LatentEvidence, split: Split) -> Positions:
    """The positions of one split of a latent's contexts."""
    # Near misses were looked for: among the positions of a random sample they would count too much.
    every = tuple(c for c in evidence.of(split) if c.foil is None)
    contexts = tuple(c for c in every if c.tokens and len(_activations(evidence, c)) == len(c.tokens))
    starts = [c.position - c.peak if c.position >= c.peak else None for c in contexts]
    reading = Reading([c.tokens for c in contexts], starts)
    activation = np.array([a for c in contexts for a in _activations(evidence, c)], dtype=np.float64)
    document = np.array([c.doc for c in contexts], dtype=np.int64)[reading.window]
    offset = np.array([c.position - c.peak for c in contexts], dtype=np.int64)[reading.window] + reading.index
    order = np.lexsort((-reading.index, offset, document))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(document[order]) != 0) | (np.diff(offset[order]) != 0)
    chosen = np.sort(order[new])
    documents, index = np.unique(document[chosen], return_inverse=True)
    act = np.nan_to_num(activation[chosen], nan=0.0, posinf=1.0, neginf=0.0)
    return Positions(
        contexts=contexts,
        n_unreadable=len(every) - len(contexts),
        reading=reading,
        chosen=chosen,
        activation=act,
        fires=act > 0,
        document=index.reshape(-1),
        documents=tuple(documents.tolist()),
    )


def _activations(evidence: LatentEvidence, context: Context) -> tuple[float, ...]:
    return context.act_adapted if evidence.state == "revived" else context.act_base
