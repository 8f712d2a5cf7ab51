"""The statistics are a monoid, and each of them is what its name says."""

from __future__ import annotations

import pickle
from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.statistics import N_DECOYS, ChangeStatistics, decoy_signs
from tests.evidence import synthetic

STREAM = synthetic.stream(gain=0.8)
DOCS = int(STREAM.order.max()) + 1
WHOLE = STREAM.statistics()
CHOSEN = synthetic.choose(STREAM.fitted(WHOLE))


def close(a: np.ndarray | float, b: np.ndarray | float) -> bool:
    """Equal up to the order in which float32 batches were added."""
    return np.allclose(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(np.abs(np.asarray(b)).max(initial=0))))


def assert_same(a: ChangeStatistics, b: ChangeStatistics) -> None:
    assert a.n_tokens == b.n_tokens
    for side in ("base", "adapted"):
        x, y = getattr(a, side), getattr(b, side)
        assert close(x.total, y.total)
        assert np.array_equal(x.fired, y.fired)
        assert np.array_equal(x.largest, y.largest)
    for name, value in vars(a.stream).items():
        assert close(value, getattr(b.stream, name)), name
    for half in ("fit", "held"):
        x, y = getattr(a, half), getattr(b, half)
        assert x.n == y.n
        assert np.array_equal(x.fired, y.fired)
        for name in x._SUMS:
            assert close(getattr(x, name), getattr(y, name)), (half, name)


def tokens_of(docs: list[int]) -> np.ndarray:
    return np.flatnonzero(np.isin(STREAM.order, docs))


@given(
    shard_of=st.lists(st.integers(0, 4), min_size=DOCS, max_size=DOCS),
    order=st.permutations(range(5)),
    n_batches=st.integers(1, 4),
    tree=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_any_split_of_the_documents_gives_the_same(
    shard_of: list[int], order: list[int], n_batches: int, tree: bool
) -> None:
    shards = []
    for shard in order:  # some are empty, and the neutral element
        tokens = tokens_of([doc for doc in range(DOCS) if shard_of[doc] == shard])
        shards.append(STREAM.statistics(*np.array_split(tokens, n_batches)))
    a, b, c, d, e = shards
    merged = (a + (b + (c + d))) + e if tree else reduce(add, shards)
    assert_same(merged, WHOLE)
    chosen = synthetic.choose(STREAM.fitted(merged))
    assert (chosen.latents, chosen.roles, chosen.n_pass) == (CHOSEN.latents, CHOSEN.roles, CHOSEN.n_pass)


def test_the_selection_that_is_compared_is_not_empty() -> None:
    assert set(range(16)) <= set(CHOSEN.latents)
    assert len(CHOSEN.latents) <= 18


def test_empty_is_neutral_and_strangers_do_not_add_up() -> None:
    m, d = STREAM.W_dec.shape
    zero = ChangeStatistics(m, d, np.arange(m), 0)
    assert_same(zero + WHOLE, WHOLE)
    assert_same(WHOLE + zero, WHOLE)
    assert_same(STREAM.statistics(np.arange(0), np.arange(len(STREAM.order))), WHOLE)
    for other in (
        ChangeStatistics(m + 1, d, np.arange(m), 0),
        ChangeStatistics(m, d, np.arange(m - 1), 0),
        ChangeStatistics(m, d, np.arange(m), 1),
    ):
        with pytest.raises(ValueError, match="do not add up"):
            add(WHOLE, other)


def test_a_sum_leaves_its_parts_as_they_were() -> None:
    half = len(STREAM.order) // 2
    a, b = STREAM.statistics(np.arange(half)), STREAM.statistics(np.arange(half, len(STREAM.order)))
    before = a.fit.B.copy()
    total = a + b
    total.add(STREAM.codes(np.arange(half)), STREAM.W_dec, np.zeros(STREAM.W_dec.shape[1], np.float32))
    assert np.array_equal(a.fit.B, before)
    assert a.n_tokens == half
    assert_same(a + b, WHOLE)


def test_brute_force() -> None:
    s, n = STREAM, len(STREAM.order)
    z, z_adapted, change = (v.astype(np.float64) for v in (s.z, s.z_adapted, s.change))
    for moments, codes in ((WHOLE.base, z), (WHOLE.adapted, z_adapted)):
        assert close(moments.total, codes.sum(0))
        assert np.array_equal(moments.fired, (codes > 0).sum(0))
        assert close(moments.largest, codes.max(0))
    static = change.mean(0)
    assert close(WHOLE.static, static)
    assert WHOLE.stream.static_share(n) == pytest.approx((static**2).sum() / (change**2).sum(1).mean(), rel=1e-4)
    x = s.x.astype(np.float64)
    error = ((x - z @ s.W_dec) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert WHOLE.stream.fvu(n)[0] == pytest.approx(error, rel=1e-4)
    naive = ((change - (z_adapted - z) @ s.W_dec) ** 2).sum() / (change**2).sum()
    assert WHOLE.stream.error_change / WHOLE.stream.square_change == pytest.approx(naive, rel=1e-3)
    fit = fit_rows(s.order)
    batch = s.codes(np.arange(n))
    signs = decoy_signs(batch.order, batch.position, seed=0)
    for by_place in (False, True):
        groups = batch.place if by_place else np.zeros(n, int)
        z0, change0 = centred(z, groups), centred(change, groups)
        mean, static = WHOLE.centre(by_place)
        assert close(z - mean[batch.place], z0)
        assert close(change - static[batch.place], change0)
        for half, rows in ((WHOLE.fit, fit), (WHOLE.held, ~fit)):
            moments = half.moments(mean, static)
            assert moments.n == rows.sum()
            assert close(moments.G.numpy(), z0[rows].T @ z0[rows])
            assert close(moments.B.numpy(), z0[rows].T @ change0[rows])
            assert close(moments.S.numpy(), change0[rows].T @ change0[rows])
        decoys = WHOLE.fit.decoys(WHOLE.fit.moments(mean, static), mean, static)
        for decoy, sign in zip(decoys, signs[fit].T, strict=True):
            flipped = change0[fit] * sign[:, None]
            assert close(decoy.B.numpy(), z0[fit].T @ flipped)
            assert close(decoy.S.numpy(), flipped.T @ flipped)


def centred(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """`values` [n, k] without the mean of their group."""
    means = np.stack([values[groups == g].mean(0) for g in range(groups.max() + 1)])
    return values - means[groups]


def test_decoy_signs_are_fair_and_hang_on_the_document_alone() -> None:
    order = np.repeat(np.arange(4000), 3)
    position = np.tile([0, 1023, 1024], 4000)
    signs = decoy_signs(order, position, seed=0)
    assert signs.shape == (12000, N_DECOYS)
    assert set(np.unique(signs)) == {-1, 1}
    by_doc = signs.reshape(4000, 3, N_DECOYS)
    assert (by_doc[:, 0] == by_doc[:, 1]).all()  # one stretch of 1024 tokens
    stretches = by_doc[:, [0, 2]].reshape(8000, N_DECOYS)
    assert np.abs(stretches.mean(0)).max() < 4 / np.sqrt(8000)
    correlation = stretches.T @ stretches / 8000 - np.eye(N_DECOYS)
    assert np.abs(correlation).max() < 4 / np.sqrt(8000)
    assert abs((by_doc[:, 0] * by_doc[:, 2]).mean()) < 4 / np.sqrt(4000 * N_DECOYS)
    assert np.array_equal(signs[5:9], decoy_signs(order[5:9], position[5:9], seed=0))
    assert (signs != decoy_signs(order, position, seed=1)).any()


def test_size_does_not_grow_with_the_tokens() -> None:
    m, d = STREAM.W_dec.shape
    statistics = ChangeStatistics(m, d, np.arange(m), 0)
    codes, sizes = STREAM.codes(np.arange(len(STREAM.order))), []
    for _ in range(40):
        statistics.add(codes, STREAM.W_dec, np.zeros(d, np.float32))
        sizes.append(len(pickle.dumps(statistics)))
    assert max(sizes[20:]) <= max(sizes[:20]) + 100  # what waits to be added comes and goes
    assert len(pickle.dumps(statistics + statistics)) < min(sizes) + 100
