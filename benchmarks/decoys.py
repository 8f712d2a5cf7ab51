"""How the tests of the change map do against planted truth, by the kind of decoy they compete with.

    python -m benchmarks.decoys [--run PATH] [--tokens N] [--seeds N] [--write results/decoys.md]

On the real activations of a run (the demo's by default), 20 latents get a gain along their own directions, under the
run's own change rolled by a third of the tokens. Decoys are either that change rolled against the latents by random
offsets, or with its sign flipped at random for each stretch of each document, as the tool does it. Each cell: recall
and false discovery proportion, the median over seeds and, in brackets, the worst.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from autointerp.evidence import change_map
from autointerp.evidence.change_map import GainTest, Moments, RowTest
from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.fitted import MIN_FIRINGS
from autointerp.evidence.statistics import N_DECOYS, N_PLACES, decoy_signs
from benchmarks.planting import publish, recorded
from tests.planted.recording import Recording

GAINS = (0.0, 0.1, 0.25, 0.5, -1.0)
N_PLANTED = 20
LEVEL = 0.05
TESTS = ("row", "gain", "both")


@dataclass(frozen=True)
class Half:
    """The tokens that the tests see, and their Gram matrix, centred place by place."""

    z: csr_matrix
    place: np.ndarray
    order: np.ndarray
    position: np.ndarray
    W_dec: torch.Tensor
    tested: np.ndarray
    """Latents that fire often enough [m]."""
    G: torch.Tensor
    row_test: RowTest

    @classmethod
    def of(cls, recording: Recording) -> Half:
        rows = fit_rows(recording.order)
        z, place = csr_matrix(recording.z[rows]), recording.place[rows]
        at = csr_matrix((np.ones(len(place)), (place, np.arange(len(place)))), shape=(N_PLACES, len(place)))
        sums = csr_matrix(at @ z).toarray()
        counts = np.bincount(place, minlength=N_PLACES)[:, None]
        G = torch.from_numpy((z.T @ z).toarray().astype(np.float64) - sums.T @ (sums / np.maximum(counts, 1)))
        tested = np.bincount(z.indices, minlength=recording.W_dec.shape[0]) >= MIN_FIRINGS
        position = recording.position[rows]
        W_dec = torch.from_numpy(recording.W_dec).double()
        return cls(z, place, recording.order[rows], position, W_dec, tested, G, RowTest(G))

    def moments(self, change: np.ndarray) -> Moments:
        """Of these codes with `change` [n, d], which is centred first."""
        means = np.stack([change[self.place == p].mean(0) for p in range(N_PLACES)])
        centred = change - means[self.place]
        B, S = self.z.T @ centred, centred.T @ centred
        return Moments(len(change), self.G, torch.from_numpy(B.astype(np.float64)), torch.from_numpy(S).double())


def rolled(half: Half, change: np.ndarray, seed: int) -> list[np.ndarray]:
    offsets = np.random.default_rng(seed).integers(len(change) // 20, len(change) * 19 // 20, N_DECOYS)
    return [np.roll(change, offset, axis=0) for offset in offsets]


def flipped(half: Half, change: np.ndarray, seed: int) -> list[np.ndarray]:
    return [change * sign[:, None] for sign in decoy_signs(half.order, half.position, seed).T]


DECOYS: dict[str, Callable[[Half, np.ndarray, int], list[np.ndarray]]] = {"rolled": rolled, "sign-flipped": flipped}


def passing(half: Half, moments: list[Moments], test: str) -> set[int]:
    """Latents that pass `test`; `moments` are the target's and its decoys'."""
    level = LEVEL / 2 if test == "both" else LEVEL
    passed = np.zeros(0, np.int64)
    if test != "gain":
        passed = _discoveries(half, half.row_test, moments, np.arange(len(half.tested)), level)
    if test == "row":
        return set(passed.tolist())
    left, others = change_map.without(moments, passed)
    gain_test = GainTest(left[0], half.W_dec[others], moments[0].S)
    return set(passed.tolist()) | set(_discoveries(half, gain_test, left, others, level, len(passed)).tolist())


def _discoveries(
    half: Half, test: RowTest | GainTest, moments: list[Moments], latents: np.ndarray, level: float, found: int = 0
) -> np.ndarray:
    tested = half.tested[latents]
    target, *decoys = (found.numpy()[tested] for found in test(moments))
    return latents[tested][change_map.q_values(target, np.stack(decoys), found) <= level]


def table(recording: Recording, seeds: int) -> str:
    """The comparison as a Markdown table."""
    half, fit, rate = Half.of(recording), fit_rows(recording.order), recording.rate()
    pool = np.flatnonzero((rate > 0.002) & (rate < 0.05))
    lines = ["| planted | decoys | " + " | ".join(f"{test} test" for test in TESTS) + " |", "|---|---|" + "---|" * 3]
    for gain in GAINS:
        cells: dict[tuple[str, str], list[tuple[float, float, int]]] = {}
        for seed in range(seeds):
            truth = np.random.default_rng(seed).choice(pool, N_PLANTED, replace=False)
            change = (recording.noise + gain * (recording.z[:, truth] @ recording.W_dec[truth]))[fit]
            target = half.moments(change)
            for kind, decoys in DECOYS.items():
                moments = [target, *(half.moments(false) for false in decoys(half, change, seed))]
                for test in TESTS:
                    found = passing(half, moments, test)
                    hits = len(found & set(truth.tolist()))
                    score = (hits / N_PLANTED, 1 - hits / max(len(found), 1) if found else 0.0, len(found))
                    cells.setdefault((kind, test), []).append(score)
        for kind in DECOYS:
            row = " | ".join(_cell(cells[kind, test], gain) for test in TESTS)
            lines.append(f"| {f'{gain:+.0%}' if gain else 'nothing'} | {kind} | {row} |")
            print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def _cell(scores: list[tuple[float, float, int]], gain: float) -> str:
    recall, fdp, found = (np.array(column) for column in zip(*scores, strict=True))
    if not gain:
        return f"{np.median(found):.0f} selected ({found.max()})"
    return f"recall {np.median(recall):.2f} ({recall.min():.2f}), FDP {np.median(fdp):.2f} ({fdp.max():.2f})"


def main() -> None:
    args, recording = recorded(__doc__, tokens=90_000, seeds=3)
    n_docs = len(np.unique(recording.order))
    text = f"""# Decoys

`python -m benchmarks.decoys --seeds {args.seeds} --tokens {args.tokens}`: {len(recording.change):,} tokens of \
{n_docs} documents, {len(recording.W_dec):,} latents, {N_PLANTED} of them planted, {N_DECOYS} decoys, rate \
{LEVEL:.0%}. Median over {args.seeds} seeds (worst). "Both" is what the tool does: row test and gain test at half the \
rate each, the rows that pass the first taken out before the second.

{table(recording, args.seeds)}
"""
    recording.measured.spool.close()
    publish(text, args.write)


if __name__ == "__main__":
    main()
