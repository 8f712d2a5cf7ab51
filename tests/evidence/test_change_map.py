"""The algebra of the change map, against plain linear algebra on the same tokens."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from autointerp.evidence import change_map
from autointerp.evidence.change_map import GainTest, Moments, RowTest
from autointerp.evidence.corpus import fit_rows
from tests.evidence import synthetic

STREAM = synthetic.stream(gain=0.5, n_docs=40)
FITTED = STREAM.fitted()
M, D = STREAM.W_dec.shape


def tokens(half: str) -> tuple[np.ndarray, np.ndarray]:
    """Centred codes and change of a half, in float64."""
    rows = fit_rows(STREAM.order) == (half == "fit")
    z, change = STREAM.z.astype(np.float64), STREAM.change.astype(np.float64)
    return (z - z.mean(0))[rows], (change - change.mean(0))[rows]


def share(z: np.ndarray, change: np.ndarray, rows: np.ndarray) -> float:
    return 1 - float(((change - z @ rows) ** 2).sum() / (change**2).sum())


def test_rows_are_a_ridge_regression_and_r2_is_held_out() -> None:
    z, change = tokens("fit")
    G = z.T @ z
    ridge = change_map.RIDGE * (np.diag(G) + np.diag(G).mean())
    C = np.linalg.solve(G + np.diag(ridge), z.T @ change)
    np.testing.assert_allclose(change_map.fit(FITTED.fit_half).numpy(), C, rtol=1e-4, atol=1e-6)
    assert FITTED.r2 == pytest.approx(share(*tokens("held"), C), abs=1e-5)
    size = np.linalg.norm(FITTED.rows.numpy(), axis=1) * np.sqrt((STREAM.z.astype(np.float64) ** 2).mean(0))
    np.testing.assert_allclose(FITTED.size, size, rtol=1e-4)


def test_coverage_is_the_held_out_share_of_the_first_rows() -> None:
    order = change_map.pursue(FITTED.fit_half, np.arange(M), 6)
    curve = FITTED.coverage(order)
    for k in (1, 3, 6):
        (z, change), (held_z, held_change) = tokens("fit"), tokens("held")
        chosen = order[:k]
        G = z[:, chosen].T @ z[:, chosen] + change_map.RIDGE * np.diag(z.T @ z).mean() * np.eye(k)
        rows = np.linalg.solve(G, z[:, chosen].T @ change)
        assert curve[k - 1] == pytest.approx(share(held_z[:, chosen], held_change, rows), abs=1e-5)
    assert curve == sorted(curve)
    assert set(order) <= set(range(16))  # the planted ones


def test_pursuit_takes_what_explains_most_and_only_candidates() -> None:
    alone = [FITTED.fit_half.B[j].square().sum() / FITTED.fit_half.G[j, j] for j in range(M)]
    assert change_map.pursue(FITTED.fit_half, np.arange(M), 1) == [int(np.argmax(alone))]
    few = np.array([40, 3, 41])
    assert set(change_map.pursue(FITTED.fit_half, few, 9)) <= {40, 3, 41}
    assert change_map.pursue(FITTED.fit_half, np.array([], int), 9) == []


def test_the_row_test_is_the_wald_statistic() -> None:
    z, change = tokens("fit")
    G = z.T @ z
    inverse = np.linalg.inv(G + np.diag(change_map.RIDGE * (np.diag(G) + np.diag(G).mean())))
    C = inverse @ z.T @ change
    covariance = (change - z @ C).T @ (change - z @ C) / (len(z) - 1)
    expected = np.einsum("jd,de,je->j", C, np.linalg.inv(covariance), C) / np.diag(inverse)
    np.testing.assert_allclose(RowTest(FITTED.fit_half.G)([FITTED.fit_half])[0].numpy(), expected, rtol=1e-3)


def test_the_gain_test_finds_the_gains() -> None:
    z, change = tokens("fit")
    W = STREAM.W_dec.astype(np.float64)
    L = np.linalg.inv(change.T @ change / (len(z) - 1))
    A = (z.T @ z) * (W @ L @ W.T)
    A += np.diag(change_map.RIDGE * (np.diag(A) + np.diag(A).mean()))
    test = GainTest(FITTED.fit_half, torch.from_numpy(W), FITTED.fit_half.S)
    gains = np.linalg.solve(A, np.einsum("nj,jd,nd->j", z, W @ L, change))
    np.testing.assert_allclose(test.gains(FITTED.fit_half).numpy(), gains, rtol=1e-3, atol=1e-4)
    assert np.abs(gains[:16] - 0.5).max() < 0.1
    assert np.abs(gains[16:]).max() < 0.1


def test_without_is_the_joint_fit_of_the_others() -> None:
    """Taking latents out first and fitting the rest gives the rows of the fit of all (Frisch & Waugh)."""
    out = np.array([0, 5, 40])
    (left, other), others = change_map.without([FITTED.fit_half, FITTED.fit_half], out)
    assert list(others) == [j for j in range(M) if j not in out]
    assert torch.equal(left.B, other.B)
    ridge = change_map.ridge(FITTED.fit_half.G)[torch.from_numpy(others)]
    rows = torch.linalg.solve(left.G + torch.diag(ridge), left.B)
    torch.testing.assert_close(rows, change_map.fit(FITTED.fit_half)[others], rtol=1e-8, atol=1e-10)
    z, change = tokens("fit")
    shrink = np.diag(change_map.ridge(FITTED.fit_half.G).numpy()[out])
    X = np.linalg.solve(z[:, out].T @ z[:, out] + shrink, z[:, out].T @ change)
    residual = change - z[:, out] @ X
    np.testing.assert_allclose(left.S.numpy(), residual.T @ residual, rtol=1e-4, atol=1e-3)
    same, everyone = change_map.without([FITTED.fit_half], [])
    assert torch.equal(same[0].B, FITTED.fit_half.B)
    assert len(everyone) == M


def q(target: list[float], *decoys: list[float], found: int = 0) -> list[float]:
    return change_map.q_values(np.array(target), np.array(decoys), found).tolist()


def test_q_values_count_losses_over_wins() -> None:
    assert q([5, 4, 3, 1], [0, 0, 0, 2]) == [1 / 3, 1 / 3, 1 / 3, 1.0]  # (1 + 0) / 1 over 3 wins, the loser out
    assert q([5, 4, 3, 1], [0, 0, 0, 2], [0, 0, 0, 0]) == [1 / 6, 1 / 6, 1 / 6, 1.0]  # two decoys: half the step
    assert q([5, 4, 3, 1], [9, 0, 0, 0])[1] == pytest.approx(2 / 3)  # a decoy above all
    assert q([5, 4, 3, 1], [0, 0, 0, 2], found=3)[0] == pytest.approx(1 / 6)
    assert q([1, 1], [1, 1]) == [1.0, 1.0]  # a tie is a loss


@pytest.mark.parametrize("n_effects", [0, 40])
def test_q_values_hold_the_rate(n_effects: int) -> None:
    """Mean share of false discoveries over many draws, in latents of different spread."""
    rng = np.random.default_rng(0)
    shares, found = [], []
    for _ in range(200):
        spread = rng.lognormal(0, 0.3, 300)
        target, decoys = np.abs(rng.normal(size=300)) * spread, np.abs(rng.normal(size=(8, 300))) * spread
        target[:n_effects] += 8 * spread[:n_effects]
        passed = np.flatnonzero(change_map.q_values(target, decoys) <= 0.1)
        shares.append((passed >= n_effects).sum() / max(len(passed), 1))
        found.append((passed < n_effects).sum())
    assert np.mean(shares) < 0.1 + 2 * np.std(shares) / np.sqrt(200)
    assert np.mean(found) >= 0.95 * n_effects


def test_decompose_finds_the_directions() -> None:
    W = torch.from_numpy(STREAM.W_dec).double()
    read = partial(change_map.decompose, W_dec=W, n=4)
    parts = dict(read(2.0 * W[7] - 0.8 * W[30]))
    assert set(parts) == {7, 30}
    assert parts == pytest.approx({7: 2.0, 30: -0.8}, abs=1e-6)
    own_first = read(0.1 * W[3] + W[20], own=3)
    assert [latent for latent, _ in own_first] == [3, 20]
    assert dict(own_first) == pytest.approx({3: 0.1, 20: 1.0}, abs=1e-6)
    assert read(torch.zeros(D, dtype=torch.float64)) == []
    assert len(read(torch.randn(D, dtype=torch.float64), stop=0.0)) == 4


def test_degenerate_moments_do_not_break() -> None:
    """A dictionary that is dead on the text, and a change of nothing."""
    dead = Moments(10, torch.zeros(4, 4).double(), torch.zeros(4, 3).double(), torch.eye(3).double())
    assert change_map.fit(dead).abs().max() == 0
    assert RowTest(dead.G)([dead])[0].abs().max() == 0
    still = Moments(10, torch.eye(4).double(), torch.zeros(4, 3).double(), torch.zeros(3, 3).double())
    assert change_map.explained(still, [0, 1], torch.ones(2, 3).double()) == 0.0
