"""Further sums: they add up over any split of the tokens, and each is what its name says."""

from __future__ import annotations

from functools import reduce
from operator import add

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.evidence import extras
from autointerp.evidence.extras import DocumentSums, ScalingSums
from autointerp.evidence.statistics import ChangeStatistics
from tests.evidence import synthetic

STREAM = synthetic.stream(gain=0.8, n_docs=8, tokens=40)
KINDS = (DocumentSums, ScalingSums)
N = len(STREAM.order)
WHOLE = STREAM.statistics(extras=KINDS)


def assert_same(a: ChangeStatistics, b: ChangeStatistics) -> None:
    x, y = a.extra(DocumentSums), b.extra(DocumentSums)
    for mine, theirs in zip(x.documents, y.documents, strict=True):
        assert np.array_equal(mine, theirs)
    for side in ("base", "adapted"):
        assert np.array_equal(x.fired_in(side), y.fired_in(side))
    assert np.allclose(dense(x), dense(y), atol=1e-6)
    for name in ("square", "base", "adapted"):
        assert np.allclose(getattr(a.extra(ScalingSums), name), getattr(b.extra(ScalingSums), name), rtol=1e-4)


def dense(sums: DocumentSums) -> np.ndarray:
    """`differences` as [documents, m]."""
    document, latent, value = sums.differences()
    out = np.zeros((len(sums.documents[0]), sums.m))
    out[document, latent] = value
    return out


@given(part_of=st.lists(st.integers(0, 3), min_size=N, max_size=N), order=st.permutations(range(4)), tree=st.booleans())
@settings(max_examples=15, deadline=None)
def test_any_split_of_the_tokens_gives_the_same(part_of: list[int], order: list[int], tree: bool) -> None:
    """Not only of the documents: a document's sequences lie in different batches."""
    parts = [np.flatnonzero(np.array(part_of) == part) for part in order]
    a, b, c, d = (STREAM.statistics(part, extras=KINDS) for part in parts)
    assert_same((a + b) + (c + d) if tree else reduce(add, (a, b, c, d)), WHOLE)
    assert_same(STREAM.statistics(*parts, extras=KINDS), WHOLE)
    assert_same(WHOLE + STREAM.statistics(np.arange(0), extras=KINDS), WHOLE)


def test_sums_merge_when_too_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extras, "SETTLE_AT", 50)
    assert_same(STREAM.statistics(*np.array_split(np.arange(N), 20), extras=KINDS), WHOLE)


def test_other_extras_do_not_add_up_and_none_is_the_default() -> None:
    assert STREAM.statistics().extras == {}
    with pytest.raises(ValueError, match="do not add up"):
        add(WHOLE, STREAM.statistics())


def test_brute_force() -> None:
    s = STREAM
    docs = [s.order == doc for doc in range(8)]
    sums = WHOLE.extra(DocumentSums)
    assert np.array_equal(sums.documents[1], [mine.sum() for mine in docs])
    for side, z in (("base", s.z), ("adapted", s.z_adapted)):
        assert np.array_equal(sums.fired_in(side), np.sum([(z[mine] > 0).any(0) for mine in docs], 0))
    means = np.stack([s.z_adapted[mine].mean(0) - s.z[mine].mean(0) for mine in docs])
    assert np.allclose(dense(sums), means, atol=1e-6)
    scaling = WHOLE.extra(ScalingSums)
    assert np.allclose(scaling.square, (s.z**2).sum(0), rtol=1e-4)
    for name, x in (("base", s.x), ("adapted", s.x + s.change)):
        assert np.allclose(getattr(scaling, name), (s.z * (x @ s.W_dec.T)).sum(0), rtol=1e-3, atol=1e-2)
