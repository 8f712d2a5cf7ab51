"""Latents that an adapter's weights write or read, without a corpus and without running a model.

What a module before the hook adds to the stream reaches latent i as far as its encoder column e_i sees it,
S_i = ‖e_iᵀΔW‖; what a module behind the hook reads differently of latent i is ‖ΔW(γ⊙d_i)‖, γ the norm in between. Both
are compared with what a direction chosen at random would get (see `energy`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.adapters import ADAPTERS, detect
from autointerp.evidence.directions import Block, Directions
from autointerp.evidence.energy import Energy, Standardised, relative, standardise
from autointerp.evidence.selection import Ranking
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.weight_change import INSTEAD, WeightChange, WeightChanges, less
from autointerp.evidence.wiring import WRITERS, Side, Wiring
from autointerp.records import Role
from autointerp.run import Run


@dataclass
class Change:
    """What the weights change around one hook: forms over directions of the stream, and what they are made of."""

    writes: Energy
    reads: Energy
    used: Counter[Side] = field(default_factory=Counter)
    """Matrices that count on each side."""
    left_out: Counter[str] = field(default_factory=Counter)
    """Changed matrices that do not, by why."""

    @property
    def note(self) -> str:
        """What was read and what could not be, for people."""
        n_writes, n_reads = self.used["writes"] + self.used["values"], self.used["reads"]
        parts = [
            f"{n_writes} matrices write before the hook{_spread(self.writes)}, {n_reads} read behind it"
            f"{_spread(self.reads)}"
        ]
        if self.left_out:
            parts.append("left out: " + ", ".join(f"{n} × {why}" for why, n in sorted(self.left_out.items())))
        return "; ".join(parts)


def _spread(energy: Energy) -> str:
    return f" (in about {energy.degrees:.0f} directions)" if energy.trace else ""


class Streamer:
    """Brings weight changes into the residual stream: through W_O, and past the norms."""

    def __init__(self, wiring: Wiring, base: BaseWeights | None):
        self.wiring, self.base = wiring, base

    def written(self, change: WeightChange) -> Tensor:
        """P [d, k] of what the module adds to the stream, P Pᵀ = ΔW ΔWᵀ."""
        return self._scaled(change.outputs, self.wiring.norm_after(change.module))

    def read(self, change: WeightChange) -> Tensor:
        """P [d, k] of what the module reads, P Pᵀ = Γ ΔWᵀ ΔW Γ; without the mean under LayerNorm."""
        P = self._scaled(change.inputs, self.wiring.norm_before(change.module))
        return P - P.mean(0) if self.wiring.layer_norm else P

    def through_attention(self, change: WeightChange) -> Tensor | None:
        """P [d, k] of what changed values add to the stream, W_O ΔW_V, the heads of a group each with the group's own.

        As if all heads looked at one place; to first order in the change. None where W_O is not at hand.
        """
        wiring, heads, P = self.wiring, self.wiring.heads, change.outputs
        place = wiring.values_among(change.module, len(P))
        W_O = self._output_matrix(change.module)
        if W_O is None or heads is None or place is None or W_O.shape[1] != heads.n * heads.width:
            return None
        if place == "interleaved":
            values = P.reshape(heads.n, 3, heads.width, -1)[:, 2]
        else:
            values = P[-heads.n_kv * heads.width :].reshape(heads.n_kv, heads.width, -1)
        values = values.repeat_interleave(heads.n // len(values), 0).flatten(0, 1)
        return self._scaled(W_O.to(values) @ values, wiring.norm_after(change.module))

    def has_norms(self, module: str) -> bool:
        """Whether the scales of the norm that `module` reads through are at hand."""
        name = self.wiring.norm_before(module)
        return name is not None and self._norm(name) is not None

    def _scaled(self, P: Tensor, norm: str | None) -> Tensor:
        gamma = None if norm is None else self._norm(norm)
        return P if gamma is None or len(gamma) != len(P) else gamma.to(P)[:, None] * P

    def _norm(self, name: str) -> Tensor | None:
        weight = None if self.base is None else self.base.weight(f"{name}.weight")
        return weight if weight is None or not self.wiring.norms_count_from_one else 1 + weight

    def _output_matrix(self, module: str) -> Tensor | None:
        """W_O [d, heads · width] of the attention that `module` belongs to."""
        attention = module.rpartition(".")[0]
        for leaf in WRITERS:
            weight = None if self.base is None else self.base.matrix(f"{attention}.{leaf}")
            if weight is not None:
                return weight
        return None


def sum_up(changes: WeightChanges, streamer: Streamer, d: int) -> Change:
    """The forms of all changes, which stream by. InputError where a matrix is of another width than `d`."""
    found = Change(Energy(d), Energy(d))
    for change in changes:
        if not change:
            continue
        side = streamer.wiring.side(change.module)
        leaf = change.module.rpartition(".")[2]
        if side == "writes":
            _add(found.writes, streamer.written(change), change.module)
        elif side == "values":
            P = streamer.through_attention(change)
            if P is None:
                found.left_out[f"values of {leaf} (need W_O: give --base a folder)"] += 1
                continue
            _add(found.writes, P, change.module)
        elif side == "reads":
            _add(found.reads, streamer.read(change), change.module)
            if not streamer.has_norms(change.module):
                found.left_out["scales of the norm before (need --base)"] += 1
        else:
            found.left_out[f"{leaf} (neither writes to the stream before the hook nor reads it behind)"] += 1
            continue
        found.used[side] += 1
    found.left_out.update(changes.left_out)
    return found


def _add(energy: Energy, P: Tensor, module: str) -> None:
    if len(P) != energy.d:
        raise InputError(
            f"the SAE has d_in {energy.d}, {module} of the adapter is {len(P)} wide: it belongs to another model; give"
            " --sae one for this base"
        )
    energy.add(P)


@dataclass(frozen=True)
class WeightScores:
    """What the weights say of every latent."""

    writes: np.ndarray
    """√ρ [m]: how strongly the latent is written, 1 for a random direction; NaN where nothing is."""
    reads: np.ndarray
    """√ρ [m] of how differently it is read."""
    statistic: np.ndarray
    """Robust standard deviations [m] of the side that stands out more."""
    q_value: np.ndarray
    """[m]"""
    written: np.ndarray
    """Whether that is the write side [m]."""

    @property
    def change(self) -> np.ndarray:
        """√ρ of that side [m]."""
        return np.where(self.written, self.writes, self.reads)


def score(change: Change, directions: Directions, layer_norm: bool = False) -> WeightScores:
    """Both sides of every latent."""
    nothing = np.full(directions.m, np.nan)
    sides: list[tuple[np.ndarray, Standardised]] = []
    for energy, blocks, centred in (
        (change.writes, directions.encoder_blocks(), directions.layer_norm),
        (change.reads, directions.decoder_blocks(), layer_norm),
    ):
        if energy.trace:
            rho = _relative(energy, blocks, directions.m, centred)
            sides.append((np.sqrt(rho), standardise(rho)))
        else:
            sides.append((nothing, Standardised(nothing, np.ones(directions.m))))
    (writes, w), (reads, r) = sides
    return better_side((writes, w.z, w.q), (reads, r.z, r.q))


Tested = tuple[np.ndarray, np.ndarray, np.ndarray]
"""√ρ, standard deviations and q-values of one side, [m] each."""


def better_side(write: Tested, read: Tested) -> WeightScores:
    """The side of each latent that stands out more. Where both are there, each is tested at half the level."""
    (writes, w_z, w_q), (reads, r_z, r_q) = write, read
    written = np.nan_to_num(w_z, nan=-np.inf) >= np.nan_to_num(r_z, nan=-np.inf)
    tests = sum(bool(np.isfinite(sizes).any()) for sizes in (writes, reads))
    q = np.minimum(max(tests, 1) * np.minimum(w_q, r_q), 1.0)
    return WeightScores(writes, reads, np.where(written, w_z, r_z), q, written)


def _relative(energy: Energy, blocks: Iterator[Block], m: int, centred: bool) -> np.ndarray:
    """ρ [m] of one side."""
    found, square = np.zeros((2, m))
    for at, V in blocks:
        V = V - V.mean(0) if centred else V
        found[at] = energy(V).numpy()
        square[at] = V.square().sum(0).numpy()
    return relative(found, square, energy.trace, energy.d - centred)


def changes_of(run: Run, base: BaseWeights | None) -> WeightChanges:
    """What the run's adapter changes of the base's matrices, or of the base with the adapter that the run is since.
    InputError, in one line, where weights do not say it."""
    changes = ADAPTERS.get(run.adapter_format).weight_changes(run.adapter, base)
    if run.since is None:
        return changes
    before = detect(run.since).weight_changes(run.since, base)
    if not before.low_rank:
        raise InputError(f"since {run.since}: its weight changes are no LoRA's; {INSTEAD}")
    return less(changes, before)


@torch.no_grad()
def read_weights(run: Run, directions: Directions) -> tuple[Change, Streamer]:
    """What the adapter of `run`, whose hook is known, changes around it. InputError, in one line, where its weights do
    not say."""
    base = BaseWeights.at(run.base)
    changes = changes_of(run, base)
    config = None if base is None else base.config
    streamer = Streamer(Wiring.of(run.hook or "", config, changes.modules), base)
    change = sum_up(changes, streamer, directions.d)
    if change.left_out and not change.used:
        raise InputError(
            f"adapter {run.adapter}: nothing of it can be read by its weights at {run.hook} ({change.note}); {INSTEAD}"
        )
    return change, streamer


def rank(scores: WeightScores, note: str, top: int, fdr: float) -> Ranking:
    """The latents that pass at `fdr`, those that stand out most first; at most `top`."""
    passing = np.flatnonzero((scores.q_value <= fdr) & np.isfinite(scores.statistic))
    latents = passing[np.argsort(-scores.statistic[passing], kind="stable")][:top].tolist()
    roles: list[Role] = ["written" if scores.written[latent] else "read" for latent in latents]
    columns = {
        "statistic": scores.statistic,
        "q_value": np.where(np.isfinite(scores.statistic), scores.q_value, np.nan),
        "write_weight": scores.writes,
        "read_weight": scores.reads,
    }
    return Ranking(latents, roles, scores.change, columns, len(passing), note)
