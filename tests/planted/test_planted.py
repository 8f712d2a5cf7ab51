"""Planted truths on real activations of the demo model, under realistic noise: the real Δx, rolled by a third."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from autointerp.demo import ORGANISM
from autointerp.evidence.change_map import decompose
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import SELECTORS, Question, Ranking
from autointerp.run import Run
from tests.planted.recording import Recording, record

TOKENS = 100_000
N_PLANTED = 20
SEEDS = (0, 1)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    scratch: Path = tmp_path_factory.mktemp("spool")
    recorded = record(Run.load(ORGANISM, device="cpu"), TOKENS, scratch)
    yield recorded
    recorded.measured.spool.close()


def planted(recording: Recording, seed: int, n: int = N_PLANTED) -> np.ndarray:
    """Latents that fire neither rarely nor always."""
    rate = recording.rate()
    pool = np.flatnonzero((rate > 0.002) & (rate < 0.05))
    return np.random.default_rng(seed).permutation(pool)[:n]


def chosen(recording: Recording, change: np.ndarray, seed: int) -> tuple[Ranking, FittedMap]:
    fitted = recording.fitted(change.astype(np.float32), seed)
    return SELECTORS.get("change")(Question(fitted, 50, 0.05, seed)), fitted


def read(ranking: Ranking) -> set[int]:
    return {latent for latent, role in zip(ranking.latents, ranking.roles, strict=True) if role == "read"}


@pytest.mark.parametrize("seed", SEEDS)
def test_gain(recording: Recording, seed: int) -> None:
    """+50 % on 20 latents."""
    truth = planted(recording, seed)
    change = recording.noise + 0.5 * (recording.z[:, truth] @ recording.W_dec[truth])
    found = read(chosen(recording, change, seed)[0])
    assert len(found & set(truth.tolist())) >= 0.95 * N_PLANTED
    assert len(found - set(truth.tolist())) <= 0.1 * max(len(found), 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_writes(recording: Recording, seed: int) -> None:
    """When latent j fires, its partner's direction is written with the partner's mean firing activation."""
    both = planted(recording, seed, 2 * N_PLANTED)
    readers, partners = both[:N_PLANTED], both[N_PLANTED:]
    z = recording.z.tocsc()
    strength = np.array([z[:, j].data.mean() for j in partners])
    fires = (recording.z[:, readers] > 0).astype(np.float32)
    change = recording.noise + fires @ (strength[:, None] * recording.W_dec[partners])
    ranking, fitted = chosen(recording, change, seed)
    rows = fitted.rows_of(ranking.latents)
    recovered = 0
    for j, partner in zip(readers.tolist(), partners.tolist(), strict=True):
        if j in rows:
            raised = [(t, a) for t, a in decompose(rows[j], fitted.W_dec, 3, own=j)[1:] if a > 0]
            recovered += bool(raised) and max(raised, key=lambda pair: pair[1])[0] == partner
    assert recovered >= 15


@pytest.mark.parametrize("seed", SEEDS)
def test_noise_alone_selects_nothing(recording: Recording, seed: int) -> None:
    change = np.roll(recording.change, (seed + 2) * len(recording.change) // 7, axis=0)
    assert not read(chosen(recording, change, seed)[0])


def test_a_constant_shift_is_static_and_nothing_else(recording: Recording) -> None:
    shift = recording.W_dec[planted(recording, 0, 3)].sum(0)
    pure, fitted = chosen(recording, np.broadcast_to(shift, recording.change.shape).copy(), 0)
    statistics = fitted.statistics
    assert statistics.stream.static_share(statistics.n_tokens) == pytest.approx(1, abs=1e-4)
    assert not read(pure)
    assert set(planted(recording, 0, 3).tolist()) <= set(pure.latents)
    noise = recording.noise - recording.noise.mean(0)
    under_noise, fitted = chosen(recording, noise + 3 * shift, 0)
    assert not read(under_noise)
    share = fitted.statistics.stream.static_share(fitted.statistics.n_tokens)
    assert share == pytest.approx(9 * (shift @ shift) / np.square(noise + 3 * shift).sum(1).mean(), rel=1e-3)
