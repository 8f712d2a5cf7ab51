"""The selected rows one by one: what each latent's row alone carries of the adapter's effect.

A row without its mean, z_j c_j, writes nothing where its latent does not fire, so that only sequences with a firing
need the models: a few drawn at random stand for all of them. The estimate is unbiased; with few firings it is rough.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence import change_map
from autointerp.evidence.causal import EDITS, METRICS, HeldBatch, Restoration, Sides
from autointerp.evidence.collector import activations
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order
from autointerp.records import LatentEffect

N_SEQUENCES = 8
"""Sequences that stand for all in which a latent fires."""


@dataclass(frozen=True)
class Drawn:
    """The sequences that stand for a latent's."""

    latent: int
    sequences: list[int]
    n_firing: int
    """Held-out sequences in which it fires."""

    @property
    def weight(self) -> float:
        """Sequences that each of the drawn stands for."""
        return self.n_firing / max(len(self.sequences), 1)


def one_by_one(
    restoration: Restoration,
    fitted: FittedMap,
    latents: Sequence[int],
    whole: np.ndarray,
    seed: int,
    progress: Callable[[int], None] = lambda _n: None,
) -> list[LatentEffect]:
    """The effect of each selected latent of the map, as a share of the whole's.

    whole [edits, metrics]: Σ (unedited − whole Δx patched) over the held-out tokens, from `Sums`; NaN where that is no
    clear effect. `progress` hears of each sequence.
    """
    chosen = [j for j in latents if fitted.in_map(j)] if fitted.changed else []
    if not chosen:
        return []
    rows = change_map.refit(fitted.fit_half, fitted.positions(chosen)).float()
    drawn = _draw(restoration, chosen, seed)
    of_sequence: dict[int, list[int]] = defaultdict(list)
    for at, latent in enumerate(drawn):
        for s in latent.sequences:
            of_sequence[s].append(at)
    sums = np.zeros((len(chosen), len(EDITS), len(METRICS)))

    def work(model: PairedModel, item: tuple[int, list[int]]) -> tuple[list[int], np.ndarray]:
        sequence, group = item
        columns = torch.as_tensor(fitted.positions([chosen[at] for at in group]))
        return group, _alone(restoration, model, restoration.held.batch([sequence]), columns, rows[group])

    def then(done: tuple[list[int], np.ndarray]) -> None:
        group, found = done
        sums[group] += found
        progress(1)

    in_order(work, then, restoration.models, _groups(of_sequence, restoration))
    weights = np.array([latent.weight for latent in drawn])
    shares = sums * weights[:, None, None] / whole
    return [_effect(latent, share) for latent, share in zip(drawn, shares, strict=True)]


def _draw(restoration: Restoration, latents: list[int], seed: int) -> list[Drawn]:
    """Sequences for each latent, drawn among those held-out ones in which it fires."""
    held, dictionary = restoration.held, restoration.dictionary
    columns = torch.as_tensor(latents, device=dictionary.W_dec.device)
    generator = np.random.default_rng(seed)
    fires: list[np.ndarray] = []
    for part in np.array_split(np.array(sorted(held.sequences)), max(1, len(held.sequences) // 64)):
        stretch = held.spool.read(part)
        z = activations(stretch.x_base, stretch.counted, dictionary, columns) != 0
        fires += [z[begin:end].any(0) for begin, end in zip(stretch.bounds[:-1], stretch.bounds[1:], strict=True)]
    firing = np.stack(fires)
    found: list[Drawn] = []
    for at, latent in enumerate(latents):
        where = np.array(sorted(held.sequences))[firing[:, at]]
        found.append(Drawn(latent, generator.permutation(where)[:N_SEQUENCES].tolist(), len(where)))
    return found


def _groups(of_sequence: dict[int, list[int]], restoration: Restoration) -> Iterator[tuple[int, list[int]]]:
    """(sequence, latents edited in copies of it), as many copies as suit a batch."""
    for sequence, group in of_sequence.items():
        length = len(restoration.held.spool.ids(sequence)) + len(restoration.held.bos)
        n = max(1, restoration.limit() // length)
        for begin in range(0, len(group), n):
            yield sequence, group[begin : begin + n]


@torch.inference_mode()
def _alone(restoration: Restoration, model: PairedModel, batch: HeldBatch, columns: Tensor, rows: Tensor) -> np.ndarray:
    """Σ (unedited − edited) [g, edits, metrics] of one sequence, a copy for each of g rows [g, d]; columns [g]."""
    g = len(rows)
    copies = HeldBatch(
        batch.ids.expand(g, -1).contiguous(), batch.counted.expand(g, -1).contiguous(), batch.orders.repeat(g)
    )
    sides = Sides.of(model, copies)
    z = restoration.codes(sides.encoded[:1][sides.counted[:1]])[:, columns]  # [n, g]
    written = (z.T[:, :, None] * rows[:, None]).flatten(0, 1).to(sides.x_base.device)
    found = np.zeros((g, len(EDITS), len(METRICS)))
    for e, edit in enumerate(EDITS):
        edited = sides.measure(edit, sides.shifted(written if edit == "added" else -written))
        found[:, e] = sides.unedited(edit) - edited
    return found


def _effect(drawn: Drawn, shares: np.ndarray) -> LatentEffect:
    """shares [edits, metrics]."""
    (added_loss, added_kl), (removed_loss, removed_kl) = (
        [None if np.isnan(value) else float(value) for value in row] for row in shares
    )
    return LatentEffect(
        drawn.latent, added_loss, added_kl, removed_loss, removed_kl, drawn.n_firing, len(drawn.sequences)
    )
