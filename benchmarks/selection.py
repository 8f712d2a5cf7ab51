"""How the selectors do against planted truth.

    python -m benchmarks.selection [--run PATH] [--tokens N] [--seeds N] [--parts …] [--write results/selection.md]

On the real activations of a run (the demo's by default), 20 latents get a gain along their own directions, or write
another latent's direction whenever they fire (`--parts latents`), or an adapter of which it is known what it does is
written to disk and run (`--parts adapters`); under the run's own change, rolled over the tokens so that it hangs on
nothing, or without any noise. Each cell: recall and false discovery proportion, the median over seeds and, in brackets,
the worst.
"""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

from autointerp.evidence.change_map import decompose
from autointerp.evidence.extras import DocumentSums, Extra, ScalingSums
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import SELECTORS, Given, Question
from autointerp.evidence.statistics import PairedCodes
from autointerp.evidence.weights_evidence import WeightsEvidence
from benchmarks.planted_adapters import (
    ADAPTERS,
    N_STATIC,
    N_WRITTEN,
    NULL_SPACE,
    RANDOM_READS,
    STATIC,
    STATIC_ENERGY,
    carried_out,
    run_of,
)
from benchmarks.planting import publish, recorded
from tests.planted.recording import Recording
from tests.planted.truths import N_PLANTED, beyond_mean, false_share, gained, paired, planted, recovered

LEVEL = 0.05
TOP = 50
"""Places that `change` may fill."""
GAINS = (0.1, 0.25, 0.5, -1.0)
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
    Planting("pairs, all or nothing", lambda r, j, i: paired(r, j, i, False), pairs=True),
    Planting("pairs, beyond the mean", beyond_mean, pairs=True),
]


@dataclass
class Scores:
    """One cell: a value of each for every seed."""

    recall: list[float] = field(default_factory=list)
    fdp: list[float] = field(default_factory=list)
    found: list[int] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)

    def add(self, found: Sequence[int], truth: set[int]) -> None:
        self.found.append(len(found))
        self.fdp.append(false_share(set(found), truth))
        self.recall.append(len(set(found) & truth) / max(len(truth), 1))

    def text(self, planting: Planting) -> str:
        if planting.make is None:
            return f"{np.median(self.found):.0f} selected ({max(self.found)})"
        return self.shares()

    def shares(self) -> str:
        shown = f"{_median(self.recall)} ({min(self.recall):.2f}), {_median(self.fdp)} ({max(self.fdp):.2f})"
        return shown + (f"; {np.median(self.pairs):.0f} pairs ({min(self.pairs)})" if self.pairs else "")


def _median(values: Iterable[float]) -> str:
    return f"{np.median(list(values)):.2f}"


def score(recording: Recording, planting: Planting, noise: bool, seed: int, cells: dict[str, Scores]) -> None:
    """Plants, asks every method, and adds to its cell."""
    both = planted(recording, seed, 2 * N_PLANTED)
    readers, partners = both[:N_PLANTED], both[N_PLANTED:]
    change = rolled(recording, seed) if noise else np.zeros_like(recording.change)
    if planting.make is not None:
        change = change + planting.make(recording, readers, partners)
    fitted = recording.fitted(change.astype(np.float32), seed, extras=(DocumentSums, ScalingSums, Differences))
    truth = set((both if planting.pairs else readers).tolist()) if planting.make is not None else set()
    given = Given(reread=recording.reread(change))
    for method in METHODS:
        found = ask(method, fitted, seed, max(len(truth), N_PLANTED), given)
        mine = set(readers.tolist()) if method == "change" and planting.pairs else truth
        cell = cells.setdefault(method, Scores())
        cell.add(found, mine)
        if method == "change" and planting.pairs:
            cell.pairs.append(recovered(fitted, found, readers, partners))


def ask(method: str, fitted: FittedMap, seed: int, k: int, given: Given) -> list[int]:
    """What the method selects. Those without a test of their own are told how many there are to find."""
    if method == "t-test + BH":
        return sorted(fitted.statistics.extra(Differences).rejected(LEVEL))
    top = TOP if method == "change" else k
    return SELECTORS.get(method)(Question(fitted, top, LEVEL, seed, given)).latents


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


def rolled(recording: Recording, seed: int) -> np.ndarray:
    """The run's own Δx [n, d], rolled over the tokens by an offset of this seed."""
    n = len(recording.change)
    return np.roll(recording.change, n // 3 + seed * n // 17, axis=0)


def score_adapter(recording: Recording, name: str, seed: int, cells: dict[bool, dict[str, Scores]]) -> None:
    """Writes the adapter, runs it, asks every method, and adds to the cells with noise and without."""
    with tempfile.TemporaryDirectory() as folder:
        truth = ADAPTERS[name](recording, seed, Path(folder))
        own = carried_out(recording, Path(folder))
        with WeightsEvidence.load(run_of(recording, Path(folder))) as evidence:
            by_weights = evidence.select()[0].latents
    if name == RANDOM_READS:  # linear in its weights: a scale of them
        own = own * np.sqrt(np.square(recording.change).sum() / np.square(own).sum())
    k = len(truth.latents)
    for noise in (True, False):
        change = (own + rolled(recording, seed) * noise).astype(np.float32)
        fitted = recording.fitted(change, seed, extras=(DocumentSums, ScalingSums, Differences))
        given = Given(reread=recording.reread(change))
        others = [method for method in METHODS if method != "change"]
        asked = {method: (ask(method, fitted, seed, k, given), truth.latents) for method in others}
        asked["weights"] = by_weights, truth.latents
        asked["raw weights"] = np.argsort(-truth.raw)[:k].tolist(), truth.latents
        # The static part has no test: there `change` is told how many there are, as the others are.
        found = SELECTORS.get("change")(Question(fitted, k if name == STATIC else TOP, LEVEL, seed, given))
        read = [j for j, role in zip(found.latents, found.roles, strict=True) if role == "read"]
        if name == RANDOM_READS:
            asked["change"] = written_by(fitted, read), truth.latents
        else:
            asked["change"] = (found.latents, truth.latents) if name == STATIC else (read, set(truth.read))
        for method, (found, wanted) in asked.items():
            cells[noise].setdefault(method, Scores()).add(found, wanted)
        if truth.read:
            pairs = recovered(fitted, read, np.array(truth.read), np.array(truth.written))
            cells[noise]["change"].pairs.append(pairs)


def written_by(fitted: FittedMap, latents: Sequence[int]) -> list[int]:
    """Latents that three rows or more of these, and a tenth of them, raise or lower."""
    rows = fitted.rows_of(latents)
    targets = Counter(target for j, row in rows.items() for target, _ in decompose(row, fitted.W_dec, 6, own=j)[1:])
    return [target for target, n in targets.most_common() if n >= max(3, len(rows) / 10)]


def adapter_table(recording: Recording, seeds: int) -> str:
    """The same comparison for adapters on disk, by what they do and by their weights."""
    methods = (*METHODS, "weights", "raw weights")
    lines = ["| adapter | noise | " + " | ".join(methods) + " |", "|---|---|" + "---|" * len(methods)]
    for name in ADAPTERS:
        cells: dict[bool, dict[str, Scores]] = {True: {}, False: {}}
        for seed in range(seeds):
            score_adapter(recording, name, seed, cells)
        for noise in (True, False):
            row = " | ".join(cells[noise][method].shares() for method in methods)
            lines.append(f"| {name} | {'real Δx, rolled' if noise else 'none'} | {row} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def goals(cells: dict[tuple[str, bool], dict[str, Scores]]) -> str:
    """What `change` is held to, and whether it gets there in the median and in every seed."""
    quarter, quiet = (cells["+25% gain", noise]["change"] for noise in (True, False))
    pairs = cells["pairs, amplitude 1", True]["change"].pairs
    silent = [fdp for (_, noise), row in cells.items() if not noise for fdp in row["change"].fdp]
    rows = [
        ("recall ≥ .95 at +25 %", quarter.recall, lambda v: v >= 0.95),
        ("FDP ≤ .10 at +25 %", quarter.fdp, lambda v: v <= 0.10),
        ("recall ≥ .95 at +25 % without noise", quiet.recall, lambda v: v >= 0.95),
        ("≥ 18 of 20 pairs at amplitude 1", pairs, lambda v: v >= 18),
        ("FDP ≤ .10 without noise", silent, lambda v: v <= 0.10),
        ("nothing from noise alone", cells["nothing", True]["change"].found, lambda v: v == 0),
    ]
    lines = ["| goal for `change` | median | worst | met in |", "|---|---|---|---|"]
    for name, values, met in rows:
        worst = min(values) if "≥" in name else max(values)
        share = f"{sum(map(met, values))} of {len(values)}"
        lines.append(f"| {name} | {np.median(values):.2f} | {worst:.2f} | {share} |")
    return "\n".join(lines)


def main() -> None:
    args, recording = recorded(__doc__, tokens=60_000, seeds=5, parts=("latents", "adapters"))
    size = f"{len(recording.change):,} tokens of {len(np.unique(recording.order))} documents, {len(recording.W_dec):,}"
    command = f"python -m benchmarks.selection --seeds {args.seeds} --tokens {args.tokens}"
    parts: list[str] = []
    if "latents" in args.parts:
        compared, cells = table(recording, args.seeds)
        parts.append(f"""# Selectors against planted truth

`{command} --parts latents`: {size} latents, {N_PLANTED} planted. Each cell: recall, false discovery \
proportion; the median over {args.seeds} seeds (the worst). `change` at a false discovery rate of {LEVEL:.0%} and \
--top {TOP}; the t-test at the same rate, over tokens. The others have no test: they are told how many there are to \
find, so that their FDP is 1 − recall.

Pairs: when one of {N_PLANTED} latents fires, another's direction is written. `change` is asked for the readers, and \
its pairs are those whose row is first of all the partner's direction; the others, who see no rows, are asked for \
readers and partners alike. Amplitude 1: written as strongly as the reader fires. All or nothing: with the partner's \
mean activation, however strongly the reader fires. Beyond the mean: by how much the reader exceeds its mean \
activation. These two are no multiples of z, and latents that fire along with a reader truly help to say them; they \
count as false here.

{compared}

{goals(cells)}
""")
    if "adapters" in args.parts:
        parts.append(f"""## Adapters of which it is known what they do

`{command} --parts adapters`: {size} latents. Each adapter is written to disk, run over the text, and its Δx stands in \
the place of the run's own, under that rolled or without noise; `weights` reads its files at the same rate and no \
text, and `raw weights` takes the largest entries of the files as they stand. Medians over {args.seeds} seeds (the \
worst).

- FFNN: {N_PLANTED} units on latents, each fires beyond half of one latent's mean activation and writes another; small \
weights everywhere else, every unit scaled at random. `change` is asked for the readers and its pairs, the others for \
readers and partners. What a threshold lets through is no multiple of z: latents that fire along with a reader truly \
help to say it; they count as false here.
- LoRA: on the last matrix before the hook, B the directions of {N_WRITTEN} latents, A at random, R R⁻¹ between them; \
as large as the run's own change. No latent in particular is read, so `change` is asked for what a tenth of its rows, \
and three or more, raise or lower.
- Bias: on {N_STATIC} latents, {NULL_SPACE:.0f} times as much that adds up to nothing in the stream beside it; its \
energy {STATIC_ENERGY} times that of the run's own change. The static part has no test: `change` is told how many \
there are.

{adapter_table(recording, args.seeds)}
""")
    recording.measured.spool.close()
    publish("\n".join(parts), args.write)


if __name__ == "__main__":
    main()
