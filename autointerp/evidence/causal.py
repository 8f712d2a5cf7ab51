"""Does the change that the map describes matter? Rows added to the base model, and taken out of the adapted one.

On documents that neither the rows nor their choice have seen, x_base at the hook becomes x_base + δ̄ + Σ (z_j − z̄_j)
c_j over k latents (`added`), and x_adapted loses the same (`removed`); z is the base model's in both, as in the map.
What the models then predict is held against patching the whole of Δx there: an edit's effect is a share of that, since
a hook in the middle does not carry what the adapter does above it.

    loss   Σ (loss of the unedited model − loss of the edited one) / the same for the whole Δx
    KL     added: of KL(adapted ‖ edited base), removed: of KL(edited adapted ‖ base); both begin at KL(adapted ‖ base)

Controls: as many random live latents, with rows of their own fitted jointly on the same tokens (`random`), and those
rows stretched until they write as much as the selected ones (`matched`). The same with the static part alone and with
every row of the map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence import change_map
from autointerp.evidence.change_map import Moments
from autointerp.evidence.corpus import by_length, fit_rows
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import MIN_FIRINGS, FittedMap
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order, tokens_per_batch
from autointerp.evidence.spool import Spool
from autointerp.records import CausalEffect

Part = Literal["none", "whole", "static", "selected", "random", "matched", "all", "directions", "random directions"]
Edit = Literal["added", "removed"]
EDITS: tuple[Edit, ...] = ("added", "removed")
METRICS = ("loss", "kl")

HELD_TOKENS = 16_384
"""Held-out tokens that the edits are measured on."""
DRAWS = 5
"""Sets of random latents."""
SIZES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
"""Numbers of rows at which the selection is measured, besides all of it."""
MAX_LOGITS = 1 << 25
"""Logits held at once, of one of the models."""
CLEAR = 2.0
"""Standard errors by which the effect of the whole Δx must differ from nothing, for shares of it to mean anything."""


@dataclass(frozen=True)
class RowSet:
    """Rows that are written together. p latents in the map, d residual width."""

    part: Part
    k: int
    """Rows."""
    draw: int
    """Number of the random draw; 0 for what is not drawn."""
    columns: Tensor
    """Positions of the latents in the map [k]."""
    rows: Tensor
    """[k, d] float32."""
    constant: Tensor
    """What is written whether or not a latent fires, δ̄ − Σ z̄_j c_j [d] float32."""

    def written(self, z: Tensor) -> Tensor:
        """What the rows write [n, d] at tokens with base codes z [n, p] of the map."""
        return self.constant + z[:, self.columns] @ self.rows


@dataclass(frozen=True)
class HeldOut:
    """Sequences of the held-out half, as the models read them."""

    sequences: list[int]
    """Indices in the spool."""
    spool: Spool
    bos: np.ndarray
    """Ids put before each sequence, none or one."""

    @classmethod
    def of(cls, spool: Spool, bos: np.ndarray, tokens: int = HELD_TOKENS) -> HeldOut:
        """The first held-out documents in shuffled order, as many as hold `tokens` tokens, the last one whole."""
        orders = spool.orders
        held = np.flatnonzero(~fit_rows(orders))
        held = held[np.lexsort((held, orders[held]))]
        chosen: list[int] = []
        n, last = 0, -1
        for s in held.tolist():
            if n >= tokens and orders[s] != last:
                break
            chosen.append(s)
            n, last = n + len(spool.ids(s)), int(orders[s])
        return cls(chosen, spool, bos)

    def batches(self, limit: int) -> Iterator[HeldBatch]:
        """All sequences, at most `limit` positions in a batch or one sequence."""
        groups = by_length(self.sequences, lambda s: len(self.spool.ids(s)) + len(self.bos), limit)
        for group in groups:
            yield self.batch(group)

    def batch(self, group: Sequence[int]) -> HeldBatch:
        """These sequences, right-padded."""
        ids, counted = self.spool.padded(group, self.bos)
        return HeldBatch(ids, counted, np.array([self.spool.place(s)[1] for s in group]))


@dataclass(frozen=True)
class HeldBatch:
    """b sequences of t positions."""

    ids: Tensor
    """[b, t]."""
    counted: Tensor
    """Where edits are made and predictions measured [b, t]."""
    orders: np.ndarray
    """Place of each sequence's document in the shuffled corpus [b]."""


def row_sets(
    fitted: FittedMap,
    latents: Sequence[int],
    sizes: Iterable[int],
    draws: int,
    seed: int,
    random_sizes: Iterable[int] = (),
) -> list[RowSet]:
    """The selection's first rows at each of `sizes` and all of them, with its controls; all fitted on the fit half.

    latents: selected, by rank; those outside the map have no row and are passed over. Draws are made for all of it, and
    their first latents stand at each of `random_sizes`.
    """
    chosen = fitted.positions([j for j in latents if fitted.in_map(j)]) if fitted.changed else []
    half, p = fitted.fit_half, len(fitted.tracked)
    sets = [_row_set(fitted, "static", [], 0)]
    for k in _cut(sizes, len(chosen)):
        sets.append(_row_set(fitted, "selected", chosen[:k], 0))
    if not chosen:
        return sets
    target = _written_energy(half, chosen, sets[-1].rows.double())
    live = np.flatnonzero(fitted.statistics.fit_fired() >= MIN_FIRINGS)
    generator = np.random.default_rng(seed)
    for draw in range(1, draws + 1):
        picked = generator.choice(live, min(len(chosen), len(live)), replace=False).tolist()
        sets += [_row_set(fitted, "random", picked[:k], draw) for k in _cut(random_sizes, len(picked))]
        energy = _written_energy(half, picked, sets[-1].rows.double())
        stretch = float(np.sqrt(target / energy)) if energy > 0 else 0.0
        sets.append(_row_set(fitted, "matched", picked, draw, stretch))
    return [*sets, _row_set(fitted, "all", range(p), 0)]


def _cut(sizes: Iterable[int], most: int) -> list[int]:
    """The sizes as far as there are so many, and all there are."""
    return sorted({min(k, most) for k in (*sizes, most)} - {0})


def _row_set(fitted: FittedMap, part: Part, at: Sequence[int], draw: int, stretch: float = 1.0) -> RowSet:
    mean, static = fitted.centre
    columns = torch.as_tensor(at, dtype=torch.long)
    rows = torch.zeros(0, len(static), dtype=torch.float64)
    if len(at):
        whole = part == "all"
        rows = stretch * (change_map.fit(fitted.fit_half) if whole else change_map.refit(fitted.fit_half, columns))
    constant = torch.from_numpy(static) - torch.from_numpy(mean)[columns] @ rows
    return RowSet(part, len(at), draw, columns, rows.float(), constant.float())


def _written_energy(moments: Moments, at: Sequence[int], rows: Tensor) -> float:
    """Σ‖Σ_j (z_j − z̄_j) c_j‖² over the tokens of the moments."""
    columns = torch.as_tensor(at, dtype=torch.long)
    return float(((moments.G[columns][:, columns] @ rows) * rows).sum())


class Sums:
    """Loss and KL of every edit, summed by document: set × edit × metric, with `none` and `whole` before the sets."""

    def __init__(self, n_sets: int):
        self._shape = (n_sets + 2, len(EDITS), len(METRICS))
        self._by_order: dict[int, np.ndarray] = {}
        self._tokens: dict[int, int] = {}

    def add(self, orders: np.ndarray, sums: np.ndarray, tokens: np.ndarray) -> None:
        """orders [b], sums [b, n_sets + 2, edits, metrics], tokens [b]."""
        for order, total, n in zip(orders.tolist(), sums, tokens.tolist(), strict=True):
            self._by_order.setdefault(order, np.zeros(self._shape))
            self._by_order[order] += total
            self._tokens[order] = self._tokens.get(order, 0) + n

    @property
    def n_tokens(self) -> int:
        return sum(self._tokens.values())

    @property
    def by_document(self) -> np.ndarray:
        """[n_docs, n_sets + 2, edits, metrics]."""
        return np.stack(list(self._by_order.values())) if self._by_order else np.zeros((0, *self._shape))

    def whole(self) -> np.ndarray:
        """Effect of the whole Δx, Σ (none − whole) [edits, metrics]; NaN where it is not clear."""
        totals = self.by_document
        effect = (totals[:, 0] - totals[:, 1]).sum(0)
        for e in range(len(EDITS)):
            for m in range(len(METRICS)):
                if share_of(totals[:, :, e, m], 1)[0] is None:
                    effect[e, m] = np.nan
        return effect

    def effects(self, sets: Sequence[RowSet]) -> list[CausalEffect]:
        """One row for each edit of each set, `none` and `whole` among them."""
        totals = self.by_document
        names: list[tuple[Part, int, int]] = [("none", 0, 0), ("whole", 0, 0), *((s.part, s.k, s.draw) for s in sets)]
        found: list[CausalEffect] = []
        for at, (part, k, draw) in enumerate(names):
            for e, edit in enumerate(EDITS):
                means = totals[:, at, e].sum(0) / max(self.n_tokens, 1)
                shares = [share_of(totals[:, :, e, m], at) for m in range(len(METRICS))]
                (loss_share, loss_se), (kl_share, kl_se) = shares
                found.append(
                    CausalEffect(
                        edit, part, k, draw, float(means[0]), float(means[1]), loss_share, loss_se, kl_share, kl_se,
                        self.n_tokens, len(totals),
                    )
                )  # fmt: skip
        return found


def share_of(totals: np.ndarray, at: int) -> tuple[float | None, float | None]:
    """Share of the whole's effect that edit `at` has, and its standard error over documents; None where the whole has
    no clear effect.

    totals [n_docs, sets]: none, whole, and the rest. The error is that of a ratio of sums, linearised.
    """
    n = len(totals)
    whole, mine = totals[:, 0] - totals[:, 1], totals[:, 0] - totals[:, at]
    total = float(whole.sum())
    if n < 2 or abs(total) <= CLEAR * np.sqrt(n * whole.var(ddof=1)) or total == 0:
        return None, None
    share = float(mine.sum()) / total
    error = np.sqrt(n * (mine - share * whole).var(ddof=1)) / abs(total)
    return share, float(error)


class Restoration:
    """Runs both models with what is at the hook edited, over the held-out sequences."""

    def __init__(self, models: Sequence[PairedModel], dictionary: Dictionary, fitted: FittedMap, held: HeldOut):
        self.models, self.dictionary, self.held = models, dictionary, held
        self.tracked = torch.as_tensor(fitted.tracked, device=dictionary.W_dec.device)

    def limit(self) -> int:
        """Positions of a batch: what suits the device, as long as the logits fit."""
        model = self.models[0]
        return max(1, min(tokens_per_batch(model.device), MAX_LOGITS // model.vocab_size))

    def together(self, sets: Sequence[RowSet], progress: Callable[[int], None] = lambda _n: None) -> Sums:
        """Every set, added and removed; `progress` hears of the tokens of each batch."""
        sums = Sums(len(sets))

        def work(model: PairedModel, batch: HeldBatch) -> tuple[HeldBatch, np.ndarray, np.ndarray]:
            return batch, *self._edited(model, batch, sets)

        def then(done: tuple[HeldBatch, np.ndarray, np.ndarray]) -> None:
            batch, found, tokens = done
            sums.add(batch.orders, found, tokens)
            progress(int(batch.counted.sum()))

        in_order(work, then, self.models, self.held.batches(self.limit()))
        return sums

    @torch.inference_mode()
    def _edited(self, model: PairedModel, batch: HeldBatch, sets: Sequence[RowSet]) -> tuple[np.ndarray, np.ndarray]:
        """(sums [b, n_sets + 2, edits, metrics], tokens [b]) of one batch."""
        sides = Sides.of(model, batch)
        z = self.codes(sides.encoded[sides.counted])
        found = np.zeros((len(batch.ids), len(sets) + 2, len(EDITS), len(METRICS)))
        for e, edit in enumerate(EDITS):
            found[:, 0, e] = sides.unedited(edit)
            found[:, 1, e] = sides.measure(edit, lambda _x, edit=edit: sides.other(edit))
        for at, rows in enumerate(sets, start=2):
            written = rows.written(z).to(sides.x_base.device)
            for e, edit in enumerate(EDITS):
                found[:, at, e] = sides.measure(edit, sides.shifted(written if edit == "added" else -written))
        return found, sides.tokens()

    def codes(self, x: Tensor) -> Tensor:
        """Base codes z [n, p] of the map's latents at activations x [n, width], on the CPU."""
        return self.dictionary.encode_columns(x.to(self.dictionary.W_dec.device).float(), self.tracked).float().cpu()


class Sides:
    """One batch through both models unedited: what the edits start from and are held against."""

    def __init__(
        self,
        model: PairedModel,
        ids: Tensor,
        counted: Tensor,
        kept: dict[str, tuple[Tensor, Tensor, Any]],
        encoded: Tensor | None = None,
    ):
        """encoded: the base's activations as the dictionary reads them [b, t, width], where that is not x."""
        self.model, self.ids = model, ids
        self.counted = counted.to(model.device)
        self._next = ids[:, 1:].to(model.device)
        self._log_p = {side: logits.float().log_softmax(-1) for side, (_x, logits, _below) in kept.items()}
        self._below = {side: below for side, (_x, _logits, below) in kept.items()}
        self.x_base, self.x_adapted = kept["base"][0], kept["adapted"][0]
        self.encoded = self.x_base if encoded is None else encoded

    @classmethod
    def of(cls, model: PairedModel, batch: HeldBatch) -> Sides:
        kept: dict[str, tuple[Tensor, Tensor, Any]] = {}
        for side in ("base", "adapted"):
            seen: list[Tensor] = []
            logits, below = model.patched_logits(side, batch.ids, lambda x, seen=seen: (seen.append(x), x)[1])
            kept[side] = seen[0], logits, below
        # A transcoder reads at another hook than it writes at, and edits are made where it writes.
        encoded = None if model.hook_in is None else model.activations_of("base", batch.ids)
        return cls(model, batch.ids, batch.counted, kept, encoded)

    def tokens(self) -> np.ndarray:
        """Counted tokens of each sequence [b]."""
        return self.counted.sum(1).cpu().numpy()

    def other(self, edit: Edit) -> Tensor:
        """x of the other side [b, t, d]: the whole of Δx at every position."""
        return self.x_adapted if edit == "added" else self.x_base

    def shifted(self, written: Tensor) -> Callable[[Tensor], Tensor]:
        """Adds `written` [n, d] at the counted tokens."""

        def shift(x: Tensor) -> Tensor:
            moved = x.clone()
            moved[self.counted] = (x[self.counted].float() + written).to(x.dtype)
            return moved

        return shift

    def measure(self, edit: Edit, patch: Callable[[Tensor], Tensor]) -> np.ndarray:
        """Sums [b, metrics] of one side with the patch."""
        side = "base" if edit == "added" else "adapted"
        logits, _ = self.model.patched_logits(side, self.ids, patch, self._below[side])
        return self._metrics(edit, logits.float().log_softmax(-1))

    def unedited(self, edit: Edit) -> np.ndarray:
        """The same without an edit."""
        return self._metrics(edit, self._log_p["base" if edit == "added" else "adapted"])

    def _metrics(self, edit: Edit, log_q: Tensor) -> np.ndarray:
        p, q = (self._log_p["adapted"], log_q) if edit == "added" else (log_q, self._log_p["base"])
        kl = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
        loss = -log_q[:, :-1].gather(-1, self._next[..., None])[..., 0]
        both = self.counted[:, :-1] & self.counted[:, 1:]
        sums = torch.stack([(loss * both).double().sum(1), (kl * self.counted).double().sum(1)], 1)
        return sums.cpu().numpy()
