"""The selectors that are there for comparison: each against a plain computation or a planted truth."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from autointerp.evidence.selection import SELECTORS, Given, Question, Ranking, needs_of
from tests.evidence import synthetic

STREAM = synthetic.stream(gain=0.8, n_docs=40, tokens=60)
M, D = STREAM.W_dec.shape
DOCS = int(STREAM.order.max()) + 1


def ask(name: str, stream: synthetic.Stream = STREAM, top: int = 50, given: Given | None = None) -> Ranking:
    extras = [need for need in needs_of([name]) if isinstance(need, type)]
    fitted = stream.fitted(stream.statistics(extras=extras))
    return SELECTORS.get(name)(Question(fitted, top, 0.05, 0, given or Given()))


def test_frequency() -> None:
    """Latent 3 falls silent, 40 and 41 wake in a half and a quarter of the documents."""
    z, z_adapted = STREAM.z.copy(), STREAM.z.copy()
    z[:, 40:42] = z_adapted[:, 3] = 0
    z_adapted[:, 40] = STREAM.order % 2 == 0
    z_adapted[:, 41] = (STREAM.order % 4 == 0) & (np.arange(len(STREAM.order)) % 5 == 0)
    ranking = ask("frequency", replace(STREAM, z=z, z_adapted=z_adapted))
    fired = [np.mean([(side[STREAM.order == doc] > 0).any(0) for doc in range(DOCS)], 0) for side in (z, z_adapted)]
    np.testing.assert_allclose(ranking.columns["statistic"], fired[1] - fired[0], atol=1e-9)
    assert ranking.latents == [3, 40, 41]
    assert ranking.columns["statistic"][[3, 40, 41]].tolist() == pytest.approx([-1, 0.5, 0.25], abs=0.05)


def test_latent_scaling() -> None:
    """The gain of .8 shows as ν = β_base / β_adapted below 1, as for no other latent."""
    ranking = ask("latent-scaling", top=16)
    z, x = STREAM.z.astype(np.float64), STREAM.x.astype(np.float64)
    scale = [(z * (side @ STREAM.W_dec.T)).sum(0) / np.square(z).sum(0) for side in (x, x + STREAM.change)]
    np.testing.assert_allclose(ranking.columns["statistic"], scale[0] / scale[1], rtol=1e-3)
    wanted = np.abs(scale[0] - scale[1]) / np.maximum(np.abs(scale[0]), np.abs(scale[1]))
    np.testing.assert_allclose(ranking.change, wanted, rtol=2e-3)
    assert ranking.latents == np.argsort(-ranking.change)[:16].tolist()
    assert len(set(ranking.latents) & set(range(16))) >= 12
    rare = STREAM.z.copy()
    rare[np.flatnonzero(rare[:, 0])[5:], 0] = 0
    assert np.isnan(ask("latent-scaling", replace(STREAM, z=rare)).change[0])


def test_rotation() -> None:
    turned = torch.from_numpy(STREAM.W_dec).clone()
    turned[5] = -turned[5]
    turned[11] += 0.5 * turned[12]
    turned[20] *= 3  # a length is no direction
    ranking = ask("rotation", top=2, given=Given(adapted_W_dec=turned))
    assert ranking.latents == [5, 11]
    assert ranking.columns["statistic"][[5, 20]] == pytest.approx([-1, 1], abs=1e-6)
    assert ask("rotation", given=Given(adapted_W_dec=torch.from_numpy(STREAM.W_dec))).change.max() < 1e-6


def test_outcome() -> None:
    """Latents 2 and 7 gain, and lose, where the documents' outcome is high; all others by chance."""
    rng = np.random.default_rng(0)
    y = rng.normal(size=DOCS)
    z_adapted = STREAM.z * (1 + 0.05 * rng.normal(size=(DOCS, M)))[STREAM.order].astype(np.float32)
    for latent, sign in ((2, 1), (7, -1)):
        z_adapted[:, latent] = STREAM.z[:, latent] * (1 + sign * 0.2 * y[STREAM.order])
    y[3] = np.nan  # one document has none
    stream = replace(STREAM, z_adapted=z_adapted.astype(np.float32))
    ranking = ask("outcome", stream, given=Given(outcome=y))
    assert set(ranking.latents) == {2, 7}
    assert ranking.n_pass == 2
    means = np.stack([(z_adapted - STREAM.z)[STREAM.order == doc].mean(0) for doc in range(DOCS)])
    known = np.isfinite(y)
    r, p = np.array([tuple(stats.pearsonr(means[known, j], y[known])) for j in range(M)]).T
    np.testing.assert_allclose(ranking.columns["statistic"], r, atol=1e-5)
    q = stats.false_discovery_control(p)
    np.testing.assert_allclose(ranking.columns["q_value"], q, rtol=1e-3, atol=1e-12)
    shuffled = np.roll(y, 11)
    assert len(ask("outcome", stream, given=Given(outcome=shuffled)).latents) <= 1


def test_an_outcome_that_does_not_vary_among_what_was_read_selects_nothing() -> None:
    ranking = ask("outcome", given=Given(outcome=np.ones(DOCS)))
    assert (ranking.latents, ranking.n_pass) == ([], 0)
    assert np.isnan(ranking.change).all()


@pytest.mark.parametrize("name", ["frequency", "latent-scaling"])
def test_a_change_of_nothing_selects_nothing(name: str) -> None:
    same = replace(STREAM, change=np.zeros_like(STREAM.change), z_adapted=STREAM.z)
    assert ask(name, same).latents == []
