"""An adapter's hidden units by the latents they read and write: the components of a LoRA, or units of a network.

The rank-one terms of B A are not units: R R⁻¹ between the factors mixes them at will. The singular directions of ΔW, as
the stream sees it, are the same for every factoring, up to a sign that is fixed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autointerp.evidence.change_map import decompose
from autointerp.evidence.directions import Block, Directions
from autointerp.evidence.weight_change import WeightChanges
from autointerp.evidence.weights_only import Streamer
from autointerp.records import Unit, UnitSide

N_UNITS = 64
"""Units kept of an adapter, those with the largest share of what it changes on their side."""
N_LATENTS = 6
"""Latents kept of each side of a unit."""
CANDIDATES = 64
"""Latents by cosine among which what a unit writes is decomposed."""
MIN_SHARE = 1e-3
"""Of the largest component of its side, squared: below it lies rounding."""


@dataclass(frozen=True)
class Component:
    """A direction of the stream that a unit writes or reads; its length says how strongly."""

    name: str
    side: UnitSide
    direction: Tensor
    """[d]"""
    unit: int | None = None
    """Which unit it is a side of; None where each component is a unit in itself."""
    signed: bool = False
    """Whether its sign means something, as in a ReLU network; else the strongest latent is made positive."""


def lora_components(changes: WeightChanges, streamer: Streamer) -> list[Component]:
    """The strongest singular directions of every low-rank change that meets the stream, largest share first.

    A matrix before the hook has a side that it writes, one behind it a side that it reads; the other side of either is
    no direction of this stream.
    """
    found: list[tuple[float, Component]] = []
    total = {"reads": 0.0, "writes": 0.0}
    for change in changes:
        side = streamer.wiring.side(change.module)
        if change.right is None or side is None or not change:
            continue
        kind: UnitSide = "reads" if side == "reads" else "writes"
        if side == "values":
            P = streamer.through_attention(change)
            if P is None:
                continue
        else:
            P = streamer.read(change) if side == "reads" else streamer.written(change)
        U, S, _ = torch.linalg.svd(P.double(), full_matrices=False)
        total[kind] += float(S.square().sum())
        for k, size in enumerate(S.tolist(), start=1):
            component = Component(f"{change.module} {k}", kind, (U[:, k - 1] * size).float())
            found.append((size**2, component))
    found = [(size / total[part.side], part) for size, part in found]
    largest = max((share for share, _ in found), default=0.0)
    kept = sorted((pair for pair in found if pair[0] > MIN_SHARE * largest), key=lambda pair: -pair[0])
    return [part for _, part in kept[:N_UNITS]]


def describe(components: Sequence[Component], directions: Directions) -> list[Unit]:
    """What each component says in latents; one pass over the decoder for each side.

    Read: the latents to whose activation it answers most, ⟨p, d_i⟩ each. Written: p ≈ Σ a_i d_i, by orthogonal matching
    pursuit among the latents nearest in direction. The strongest latent of a unit has a positive weight, unless its
    sign means something.
    """
    units: list[Unit] = []
    for at, part, pairs in (*_answers(components, directions), *_parts(components, directions)):
        unit = at if part.unit is None else part.unit
        units += unit_rows(unit, part.name, part.side, pairs, part.signed)
    return sorted(units, key=lambda unit: unit.unit)


def strongest(sizes: Tensor) -> list[int]:
    """The N_UNITS units of largest size [h], largest first; those without any are left out."""
    order = sizes.argsort(descending=True, stable=True)[:N_UNITS].tolist()
    return [unit for unit in order if sizes[unit] > 0]


Described = Iterator[tuple[int, Component, list[tuple[int, float]]]]
"""Place of a component among all, itself, and (latent, weight)."""


def _answers(components: Sequence[Component], directions: Directions) -> Described:
    readers = [(at, part) for at, part in enumerate(components) if part.side == "reads"]
    if not readers:
        return
    P = torch.stack([part.direction for _, part in readers])
    near = nearest(P, directions.decoder_blocks(), N_LATENTS, cosine=False)
    for (at, part), (latents, weights) in zip(readers, near, strict=True):
        yield at, part, list(zip(latents, weights, strict=True))


def _parts(components: Sequence[Component], directions: Directions) -> Described:
    writers = [(at, part) for at, part in enumerate(components) if part.side == "writes"]
    if not writers:
        return
    P = torch.stack([part.direction for _, part in writers])
    near = nearest(P, directions.decoder_blocks(), CANDIDATES, cosine=True)
    rows = sorted({latent for latents, _ in near for latent in latents})
    place, W = {latent: row for row, latent in enumerate(rows)}, directions.decoder_rows(rows)
    for (at, part), (latents, _) in zip(writers, near, strict=True):
        mine = W[[place[latent] for latent in latents]]
        yield at, part, [(latents[i], a) for i, a in decompose(part.direction, mine, N_LATENTS)]


def unit_rows(
    unit: int, name: str, side: UnitSide, pairs: Iterable[tuple[int, float]], signed: bool = False
) -> list[Unit]:
    """Rows of the table for one side of a unit of which (latent, weight) are known, strongest first; that one is made
    positive, unless the signs mean something."""
    ranked = sorted((pair for pair in pairs if pair[1]), key=lambda pair: -abs(pair[1]))
    sign = 1 if signed or not ranked or ranked[0][1] > 0 else -1
    return [Unit(unit, name, side, j, sign * weight, rank) for rank, (j, weight) in enumerate(ranked, start=1)]


def network_rows(reads: Tensor, writes: Tensor, numbers: Sequence[int] | None = None, name: str = "unit") -> list[Unit]:
    """Units that read and write latents: reads, writes [h, m], signed as they are; see pullback.py. `numbers`: what
    they are called in the adapter's own weights."""
    rows: list[Unit] = []
    for unit, number in enumerate(range(len(reads)) if numbers is None else numbers):
        sides: tuple[tuple[UnitSide, Tensor], ...] = (("reads", reads[unit]), ("writes", writes[unit]))
        for side, weights in sides:
            order = weights.abs().topk(min(N_LATENTS, len(weights))).indices.tolist()
            pairs = [(j, float(weights[j])) for j in order]
            rows += unit_rows(unit, f"{name} {number}", side, pairs, signed=True)
    return rows


def nearest(P: Tensor, blocks: Iterator[Block], k: int, cosine: bool) -> list[tuple[list[int], list[float]]]:
    """For each row of P [u, d], the k latents of largest |⟨p, d_i⟩|, over ‖d_i‖ if `cosine`, and these products."""
    best, latents = P.new_zeros(len(P), 0), torch.zeros(len(P), 0, dtype=torch.long)
    for at, V in blocks:
        found = P @ (V / V.norm(dim=0).clamp_min(1e-30) if cosine else V)
        best = torch.cat([best, found], 1)
        latents = torch.cat([latents, torch.arange(at.start, at.start + V.shape[1]).expand(len(P), -1)], 1)
        order = best.abs().topk(min(k, best.shape[1]), dim=1).indices
        best, latents = best.gather(1, order), latents.gather(1, order)
    return list(zip(latents.tolist(), best.tolist(), strict=True))
