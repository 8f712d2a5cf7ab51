"""Two runs on one dictionary side by side: do their adapters add, cancel or interfere? Reads the store, nothing else.

For each latent j that either run selected, c_j^A and c_j^B are the rows of the two change maps: what each adapter
writes when j fires. Adapters that are added (task arithmetic: Ilharco et al. 2023) write about c_j^A + c_j^B, of which
the first finds 1 + cos · ‖c^B‖/‖c^A‖ of its own write left along its row, and the second likewise. Where both have half
or more left, the latent *adds*; where neither has, it *cancels*; where one has, it *interferes*.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from autointerp.errors import InputError
from autointerp.store import Store

Relation = Literal["adds", "cancels", "interferes", "only first", "only second"]

HALF = 0.5
"""Share of its own write that an adapter must have left."""
SMALL = 0.1
"""Share of the larger row's size below which the other does not count."""


@dataclass(frozen=True)
class Pair:
    """One latent in both runs. None: that run's map has no row for it, or none large enough to be kept."""

    latent: int
    label: str | None
    """Of the first run that has one."""
    size_first: float | None
    """Root mean square norm of what the adapter writes when the latent fires, in residual-norm units."""
    size_second: float | None
    gain_first: float | None
    """Signed change along the latent's own direction: +0.25 is 25 % stronger."""
    gain_second: float | None
    cosine: float | None
    """Of the two rows."""
    left_first: float | None
    """Share of the first's own write that is left when both adapters act."""
    left_second: float | None
    relation: Relation


@dataclass(frozen=True)
class Comparison:
    """What `autointerp compare` prints."""

    first: str
    """Run ids."""
    second: str
    pairs: list[Pair]
    """Latents that either run selected, the largest first."""
    combined: float | None
    """Σ‖c^A + c^B‖² E z² / Σ(‖c^A‖² + ‖c^B‖²) E z² over the rows that both keep: 0 where the adapters cancel, 1 where
    they have nothing to do with each other, 2 where they do the same."""

    def counts(self) -> dict[str, int]:
        """Latents by relation."""
        relations = [pair.relation for pair in self.pairs]
        return {name: relations.count(name) for name in ("adds", "cancels", "interferes", "only first", "only second")}

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "runs": [self.first, self.second],
            "combined": self.combined,
            "counts": self.counts(),
            "latents": [asdict(pair) for pair in self.pairs],
        }


@dataclass(frozen=True)
class _Row:
    size: float
    gain: float
    vector: np.ndarray


def compare(store: Store, first: str, second: str) -> Comparison:
    """Of two runs, each by its id or the beginning of one.

    InputError where they are not on one dictionary at one hook, and where one keeps no rows of its map.
    """
    ids = store.run_id(first), store.run_id(second)
    _check(store, *ids)
    a, b = (_rows(store, run_id) for run_id in ids)
    labels = {**_labels(store, ids[1]), **_labels(store, ids[0])}
    selected = dict.fromkeys([*store.selected(ids[0]), *store.selected(ids[1])])
    pairs = [_pair(latent, labels.get(latent), a.get(latent), b.get(latent)) for latent in selected]
    known = [pair for pair in pairs if pair is not None]
    known.sort(key=lambda pair: -max(pair.size_first or 0, pair.size_second or 0))
    return Comparison(*ids, known, _combined(a, b))


def _check(store: Store, first: str, second: str) -> None:
    sql = "SELECT run_id, sae, hook, d_sae, d_model FROM runs WHERE run_id IN (?, ?)"
    runs = {row["run_id"]: row for row in store.read(sql, [first, second])}
    for what in ("sae", "hook", "d_sae", "d_model"):
        if runs[first][what] != runs[second][what]:
            raise InputError(
                f"runs {first} and {second} cannot be compared: {what} is {runs[first][what]} in one,"
                f" {runs[second][what]} in the other; run both on one dictionary at one hook"
            )
    for run_id in (first, second):
        if not store.read("SELECT 1 FROM map_rows WHERE run_id = ? LIMIT 1", [run_id]):
            raise InputError(
                f"run {run_id} keeps no rows of a change map: nothing changes there, or it was selected without a"
                " corpus or by an older autointerp; select it again with a corpus"
            )


def _rows(store: Store, run_id: str) -> dict[int, _Row]:
    rows = store.read("SELECT * FROM map_rows WHERE run_id = ?", [run_id])
    return {row["latent"]: _Row(row["size"], row["gain"], np.array(row["row"])) for row in rows}


def _labels(store: Store, run_id: str) -> dict[int, str]:
    rows = store.read("SELECT latent, label FROM changed_latents WHERE run_id = ? AND label IS NOT NULL", [run_id])
    return {row["latent"]: row["label"] for row in rows}


def _pair(latent: int, label: str | None, a: _Row | None, b: _Row | None) -> Pair | None:
    """None for a latent that neither map has a row for: revived ones, and those of the static part alone."""
    if a is None or b is None:
        if (only := a or b) is None:
            return None
        if b is None:
            return Pair(latent, label, only.size, None, only.gain, None, None, None, None, "only first")
        return Pair(latent, label, None, only.size, None, only.gain, None, None, None, "only second")
    cosine = _cosine(a.vector, b.vector)
    left = 1 + cosine * b.size / a.size, 1 + cosine * a.size / b.size
    return Pair(latent, label, a.size, b.size, a.gain, b.gain, cosine, *left, _relation(a.size, b.size, left))


def _relation(first: float, second: float, left: tuple[float, float]) -> Relation:
    if min(first, second) < SMALL * max(first, second):
        return "only first" if first > second else "only second"
    kept = sum(share >= HALF for share in left)
    return ("cancels", "interferes", "adds")[kept]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-30))


def _combined(a: dict[int, _Row], b: dict[int, _Row]) -> float | None:
    """size² is ‖c‖² E z², so 2⟨c^A, c^B⟩ E z² is 2 · size · size · cosine (E z² is the base model's in both)."""
    both = a.keys() & b.keys()
    alone = sum(a[j].size ** 2 + b[j].size ** 2 for j in both)
    shared = sum(2 * a[j].size * b[j].size * _cosine(a[j].vector, b[j].vector) for j in both)
    return 1 + shared / alone if alone else None
