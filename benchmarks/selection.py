"""How the selectors do against planted truth.

    python -m benchmarks.selection [--run PATH] [--tokens N] [--seeds N] [--write results/selection.md]

On the real activations of a run (the demo's by default), 20 latents get a gain along their own directions, or write
another latent's direction whenever they fire; under the run's own change, rolled over the tokens so that it hangs on
nothing, or without any noise. Each cell: recall and false discovery proportion, the median over seeds and, in brackets,
the worst.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from autointerp.evidence.extras import DocumentSums, Extra, ScalingSums
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import SELECTORS, Question
from autointerp.evidence.statistics import PairedCodes
from benchmarks.planting import publish, recorded
from tests.planted.recording import Recording
from tests.planted.truths import N_PLANTED, false_share, gained, paired, planted, recovered

LEVEL = 0.05
TOP = 50
"""Places that `change` may fill."""
GAINS = (0.1, 0.25, 0.5, -1.0)
LOOSE = "pairs, all or nothing"
METHODS = ("change", "mean-shift", "frequency", "latent-scaling", "t-test + BH", "random")


class Differences(Extra):
    """Σ Δz and Σ Δz² over tokens: what a paired t-test is made of. [m] each."""

    def __init__(self, m: int):
        super().__init__(m)
        self.n = 0
        self.total, self.square = np.zeros((2, m))

    def add(self, codes: PairedCodes, W_dec: np.ndarray) -> None:
        moved = (codes.adapted - codes.base).tocsr()
        self.n += len(codes.order)
        self.total += np.bincount(moved.indices, weights=moved.data, minlength=self.m)
        self.square += np.bincount(moved.indices, weights=moved.data.astype(np.float64) ** 2, minlength=self.m)

    def __add__(self, other: Differences) -> Differences:
        result = Differences(self.m)
        result.n, result.total = self.n + other.n, self.total + other.total
        result.square = self.square + other.square
        return result

    def rejected(self, level: float) -> set[int]:
        """Latents whose mean Δz differs from 0 by a paired t-test over tokens, Benjamini–Hochberg at `level`."""
        variance = (self.square - self.total**2 / self.n) / (self.n - 1)
        live = np.flatnonzero(variance > 0)
        t = self.total[live] / np.sqrt(self.n * variance[live])
        q = stats.false_discovery_control(2 * stats.t.sf(np.abs(t), self.n - 1))
        return set(live[q <= level].tolist())


@dataclass(frozen=True)
class Planting:
    """One kind of truth."""

    name: str
    make: Callable[[Recording, np.ndarray, np.ndarray], np.ndarray] | None
    """(recording, planted latents, their partners) → Δx; None: nothing planted."""
    pairs: bool = False


PLANTINGS = [
    Planting("nothing", None),
    *(Planting(f"{gain:+.0%} gain", lambda r, j, _i, gain=gain: gained(r, j, gain)) for gain in GAINS),
    Planting("pairs, amplitude 1", lambda r, j, i: paired(r, j, i, True), pairs=True),
    Planting(LOOSE, lambda r, j, i: paired(r, j, i, False), pairs=True),
]


@dataclass
class Scores:
    """One cell: a value of each for every seed."""

    recall: list[float] = field(default_factory=list)
    fdp: list[float] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    def text(self, planting: Planting) -> str:
        if planting.make is None:
            return f"{np.median(self.found):.0f} selected ({max(self.found)})"
        shown = f"{_median(self.recall)} ({min(self.recall):.2f}), {_median(self.fdp)} ({max(self.fdp):.2f})"
        return shown + (f"; {np.median(self.pairs):.0f} pairs ({min(self.pairs)})" if self.pairs else "")


def _median(values: Iterable[float]) -> str:
    return f"{np.median(list(values)):.2f}"


def score(recording: Recording, planting: Planting, noise: bool, seed: int, cells: dict[str, Scores]) -> None:
    """Plants, asks every method, and adds to its cell."""
    both = planted(recording, seed, 2 * N_PLANTED)
    readers, partners = both[:N_PLANTED], both[N_PLANTED:]
    n = len(recording.change)
    change = np.roll(recording.change, n // 3 + seed * n // 17, axis=0) if noise else np.zeros_like(recording.change)
    if planting.make is not None:
        change = change + planting.make(recording, readers, partners)
    fitted = recording.fitted(change.astype(np.float32), seed, extras=(DocumentSums, ScalingSums, Differences))
    truth = set((both if planting.pairs else readers).tolist()) if planting.make is not None else set()
    for method in METHODS:
        found = ask(method, fitted, seed, max(len(truth), N_PLANTED))
        mine = set(readers.tolist()) if method == "change" and planting.pairs else truth
        cell = cells.setdefault(method, Scores())
        cell.found.append(len(found))
        cell.fdp.append(false_share(set(found), mine))
        cell.recall.append(len(set(found) & mine) / max(len(mine), 1))
        if method == "change" and planting.pairs:
            cell.pairs.append(recovered(fitted, found, readers, partners))


def ask(method: str, fitted: FittedMap, seed: int, k: int) -> list[int]:
    """What the method selects. Those without a test of their own are told how many there are to find."""
    if method == "t-test + BH":
        return sorted(fitted.statistics.extra(Differences).rejected(LEVEL))
    top = TOP if method == "change" else k
    return SELECTORS.get(method)(Question(fitted, top, LEVEL, seed)).latents


def table(recording: Recording, seeds: int) -> tuple[str, dict[tuple[str, bool], dict[str, Scores]]]:
    """The comparison as a Markdown table, and its cells by (planting, noise)."""
    lines = ["| planted | noise | " + " | ".join(METHODS) + " |", "|---|---|" + "---|" * len(METHODS)]
    everything: dict[tuple[str, bool], dict[str, Scores]] = {}
    for planting in PLANTINGS:
        for noise in (True, False) if planting.make is not None else (True,):
            cells = everything.setdefault((planting.name, noise), {})
            for seed in range(seeds):
                score(recording, planting, noise, seed, cells)
            row = " | ".join(cells[method].text(planting) for method in METHODS)
            lines.append(f"| {planting.name} | {'real Δx, rolled' if noise else 'none'} | {row} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines), everything


def goals(cells: dict[tuple[str, bool], dict[str, Scores]]) -> str:
    """What `change` is held to, and whether it gets there in the median and in every seed."""
    quarter, quiet = (cells["+25% gain", noise]["change"] for noise in (True, False))
    pairs = cells["pairs, amplitude 1", True]["change"].pairs
    silent = {name: row["change"].fdp for (name, noise), row in cells.items() if not noise}
    loose = silent.pop(LOOSE)
    rows = [
        ("recall ≥ .95 at +25 %", quarter.recall, lambda v: v >= 0.95),
        ("FDP ≤ .10 at +25 %", quarter.fdp, lambda v: v <= 0.10),
        ("recall ≥ .95 at +25 % without noise", quiet.recall, lambda v: v >= 0.95),
        ("≥ 18 of 20 pairs at amplitude 1", pairs, lambda v: v >= 18),
        (
            "FDP ≤ .10 without noise: gains, and pairs at amplitude 1",
            [fdp for values in silent.values() for fdp in values],
            lambda v: v <= 0.10,
        ),
        ("FDP ≤ .10 without noise: pairs, all or nothing", loose, lambda v: v <= 0.10),
        ("nothing from noise alone", cells["nothing", True]["change"].found, lambda v: v == 0),
    ]
    lines = ["| goal for `change` | median | worst | met in |", "|---|---|---|---|"]
    for name, values, met in rows:
        worst = min(values) if "≥" in name else max(values)
        share = f"{sum(map(met, values))} of {len(values)}"
        lines.append(f"| {name} | {np.median(values):.2f} | {worst:.2f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    args, recording = recorded(__doc__, tokens=60_000, seeds=5)
    n_docs = len(np.unique(recording.order))
    compared, cells = table(recording, args.seeds)
    text = f"""# Selectors against planted truth

`python -m benchmarks.selection --seeds {args.seeds} --tokens {args.tokens}`: {len(recording.change):,} tokens of \
{n_docs} documents, {len(recording.W_dec):,} latents, {N_PLANTED} planted. Each cell: recall, false discovery \
proportion; the median over {args.seeds} seeds (the worst). `change` at a false discovery rate of {LEVEL:.0%} and \
--top {TOP}; the t-test at the same rate, over tokens. The others have no test: they are told how many there are to \
find, so that their FDP is 1 − recall.

Pairs: when one of {N_PLANTED} latents fires, another's direction is written. `change` is asked for the readers, and \
its pairs are those whose row is first of all the partner's direction; the others, who see no rows, are asked for \
readers and partners alike. Amplitude 1: written as strongly as the reader fires. All or nothing: with the partner's \
mean activation, however strongly the reader fires. That is no multiple of z, and latents that fire along with a \
reader truly help to say it; they count as false here.

{compared}

{goals(cells)}
"""
    recording.measured.spool.close()
    publish(text, args.write)


if __name__ == "__main__":
    main()
