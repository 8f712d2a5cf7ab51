"""Adapters on latents and on the stream: shares add up, terms sum to the whole, and no gauge changes a rank."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autointerp.demo import ORGANISM
from autointerp.evidence import pullback
from autointerp.evidence.dictionaries import load_dictionary

SEEDS = st.integers(0, 100_000)
checked = settings(max_examples=30, deadline=None)


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def ranks(values: Tensor) -> list[int]:
    return values.argsort(stable=True).tolist()


@given(SEEDS, st.integers(2, 9), st.integers(2, 30))
@checked
def test_shares_of_a_bias_sum_to_one(seed: int, d: int, m: int) -> None:
    bias, W_dec = draw(seed, (m,), (m, d))
    shares = pullback.bias_shares(bias, W_dec)
    assert float(shares.sum()) == pytest.approx(1)
    v = bias @ W_dec
    for i in range(m):  # the part of ‖v‖² that would be gone with this latent's push alone
        assert float(shares[i]) == pytest.approx(float(bias[i] * W_dec[i] @ v / v.square().sum()))
    torch.testing.assert_close(shares, pullback.bias_shares(-3 * bias, W_dec))
    assert not pullback.bias_shares(0 * bias, W_dec).any()


def test_a_planted_bias_comes_first_in_spite_of_null_space_noise() -> None:
    """Five latents of the demo's dictionary are pushed; on top, a bias twice as large that writes nothing."""
    W_dec = load_dictionary(ORGANISM / "sae").W_dec.double()
    m = len(W_dec)
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(m, generator=generator)[:5]
        bias = torch.zeros(m, dtype=torch.float64)
        bias[chosen] = 1 / W_dec[chosen].norm(dim=1)
        noise = torch.randn(m, generator=generator, dtype=torch.float64)
        noise -= torch.linalg.lstsq(W_dec.T, (noise @ W_dec)[:, None], driver="gelsd").solution[:, 0]
        assert float((noise @ W_dec).norm()) < 1e-6 * float((bias @ W_dec).norm())
        noise *= 2 * bias.norm() / noise.norm()
        shares = pullback.bias_shares(bias + noise, W_dec)
        assert len(set(shares.topk(5).indices.tolist()) & set(chosen.tolist())) >= 4
        assert float(shares[chosen].sum()) > 0.5


def test_a_scaling_matters_by_what_it_scales() -> None:
    s, W_dec, mean = draw(0, (20,), (20, 5), (20,))
    mean = mean.abs()
    torch.testing.assert_close(pullback.scaling_sizes(s, W_dec), s.abs())
    sizes = pullback.scaling_sizes(s, W_dec, mean)
    assert float(sizes[3]) == pytest.approx(float((s[3] * mean[3] * W_dec[3]).norm()))


@given(SEEDS, st.integers(1, 4))
@checked
def test_a_linear_adapter_is_read_by_its_product(seed: int, rank: int) -> None:
    m = 25
    down, up, R = draw(seed, (rank, m), (m, rank), (rank, rank))
    R = R + 3 * torch.eye(rank)
    sides, W = pullback.linear_sides(down, up), up @ down
    torch.testing.assert_close(sides.read, W.norm(dim=0))
    torch.testing.assert_close(sides.write, W.norm(dim=1))
    other = pullback.linear_sides(torch.linalg.solve(R, down), up @ R)
    assert [ranks(side) for side in other] == [ranks(side) for side in sides]


def test_a_sparse_adapter_is_read_by_its_rows_and_columns() -> None:
    (W,) = draw(0, (12, 12))
    W = torch.where(W.abs() > 1, W, 0)
    indices = W.nonzero().T
    sides = pullback.sparse_sides(indices, W[*indices], 12)
    torch.testing.assert_close(sides.read, W.norm(dim=0))
    torch.testing.assert_close(sides.write, W.norm(dim=1))


@given(SEEDS, st.integers(1, 6))
@checked
def test_scaling_a_relu_unit_changes_no_rank(seed: int, h: int) -> None:
    m, d = 20, 6
    W1, b1, W2, W_dec, log = draw(seed, (h, m), (h,), (m, h), (m, d), (h,))
    scale = log.exp()
    one = pullback.network_sides(W1, b1, W2)
    other = pullback.network_sides(W1 * scale[:, None], b1 * scale, W2 / scale)
    for before, after in zip(one, other, strict=True):
        torch.testing.assert_close(before, after)
        assert ranks(before) == ranks(after)
    order = torch.randperm(h)
    torch.testing.assert_close(one.write, pullback.network_sides(W1[order], b1[order], W2[:, order]).write)
    # The same for an adapter on the stream, unit by unit.
    W_in, b_in, W_out = draw(seed + 1, (h, d), (h,), (d, h))
    regauged = (W_in * scale[:, None], b_in * scale, W_out / scale)
    torch.testing.assert_close(
        pullback.residual_reads(W_in, b_in, W_out, W_dec), pullback.residual_reads(*regauged, W_dec)
    )
    torch.testing.assert_close(pullback.unit_writes(W_in, b_in, W_out), pullback.unit_writes(*regauged))


def test_planted_units_are_found() -> None:
    """Ten units i → j among a thousand latents, under weak noise, re-gauged."""
    m, h = 1000, 10
    for seed in range(5):
        W1, b1, W2, log = draw(seed, (h, m), (h,), (m, h), (h,))
        W1, W2, scale = 0.01 * W1, 0.01 * W2, (2 * log).exp()
        picked = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
        read, written = picked[:h], picked[h : 2 * h]
        W1[torch.arange(h), read] = 1
        W2[written, torch.arange(h)] = 1
        sides = pullback.network_sides(W1 * scale[:, None], b1 * scale, W2 / scale)
        assert set(sides.read.topk(h).indices.tolist()) == set(read.tolist())
        assert set(sides.write.topk(h).indices.tolist()) == set(written.tolist())


@given(SEEDS, st.integers(1, 5), st.integers(1, 9), st.integers(1, 30))
@checked
def test_all_three_terms_sum_to_the_pre_activation(seed: int, h: int, d: int, m: int) -> None:
    W_in, b_in, W_dec, b_dec, x, z = draw(seed, (h, d), (h,), (m, d), (d,), (7, d), (7, m))
    z = z.relu()
    error = x - (z @ W_dec + b_dec)
    terms = pullback.pre_activation(W_in, b_in, W_dec, b_dec, z, error)
    torch.testing.assert_close(terms.total, x @ W_in.T + b_in)
    assert terms.latents.shape == terms.error.shape == (7, h)


def test_the_terms_on_real_codes() -> None:
    """On the demo's dictionary, in float32: none of the three can be left out."""
    dictionary = load_dictionary(ORGANISM / "sae")
    generator = torch.Generator().manual_seed(0)
    d = dictionary.d_in
    x = dictionary.b_dec + 5 * torch.randn(50, d, generator=generator)
    z = dictionary.encode(x)
    error = x - dictionary.decode(z)
    W_in, b_in = torch.randn(8, d, generator=generator), torch.randn(8, generator=generator)
    terms = pullback.pre_activation(W_in, b_in, dictionary.W_dec, dictionary.b_dec, z, error)
    whole = x @ W_in.T + b_in
    torch.testing.assert_close(terms.total, whole, rtol=1e-4, atol=1e-3)
    for part in terms:
        assert np.abs((terms.total - part - whole).numpy()).max() > 0.1
