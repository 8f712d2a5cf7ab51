"""Screening: which latents enter the map of a dictionary that is too large, and what that costs."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix

from autointerp.evidence.gather import Evidence
from autointerp.evidence.screening import Screen
from autointerp.evidence.spool import Spool
from autointerp.evidence.stream import Measured, measure
from tests.evidence import synthetic, world

STREAM = synthetic.stream(gain=0.8)
M, D = STREAM.W_dec.shape


def screened(budget: int, keep: int, stream: synthetic.Stream = STREAM) -> Screen:
    screen = Screen(M, D, budget, keep)
    for tokens in np.array_split(np.arange(len(stream.order)), 12):
        if not screen.done:
            screen.add(csr_matrix(stream.z[tokens]), stream.change[tokens])
    return screen


def test_it_keeps_the_latents_that_explain_most_alone() -> None:
    screen = screened(len(STREAM.order), 20)
    z, change = STREAM.z.astype(np.float64), STREAM.change - STREAM.change.mean(0)
    energy = ((z.T @ change) ** 2).sum(1) / (z**2).sum(0)
    assert screen.tracked.tolist() == sorted(np.argsort(-energy)[:20].tolist())
    assert set(range(16)) <= set(screen.tracked.tolist())
    assert screen.left_out == pytest.approx(1 - np.sort(energy)[-20:].sum() / energy.sum(), abs=1e-4)


def test_it_chooses_once_the_budget_is_spent_and_then_forgets() -> None:
    screen = screened(300, 20)
    assert screen.done
    assert 300 <= screen.seen < 600
    assert len(pickle.dumps(screen)) < 2000
    with pytest.raises(RuntimeError, match="not chosen"):
        _ = Screen(M, D, 300, 20).tracked


def test_small_dictionaries_are_tracked_whole() -> None:
    screen = Screen(M, D, 300, M)
    assert screen.done
    assert (screen.tracked.tolist(), screen.left_out, screen.seen) == (list(range(M)), 0.0, 0)


def test_the_map_of_the_kept_is_the_map_of_those_latents_alone() -> None:
    tracked = screened(600, 20).tracked
    fitted = STREAM.fitted(STREAM.statistics(tracked=tracked))
    whole = STREAM.fitted()
    chosen = synthetic.choose(fitted)
    assert set(range(16)) <= set(chosen.latents) <= set(tracked.tolist())
    assert fitted.coverage(chosen.latents)[-1] == pytest.approx(whole.coverage(chosen.latents)[-1], abs=0.01)
    outside = [j for j in range(M) if j not in tracked]
    assert fitted.coverage(outside[:3]) == [0.0, 0.0, 0.0]
    assert np.isnan(fitted.spread(fitted.size)[outside]).all()
    assert fitted.rows_of(outside) == {}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> world.World:
    folder = tmp_path_factory.mktemp("world")
    return world.build(folder, *world.saved_model(folder), topk=True, bos=True)


def passed(small: world.World, budget: int, keep: int, folder: Path) -> Measured:
    with Evidence.load(small.run) as evidence:
        m, d = evidence.dictionary.W_dec.shape
        screen = Screen(m, d, budget, keep)
        with Spool(d, torch.float32, folder) as spool:
            return measure([evidence.model], evidence.dictionary, evidence.corpus, screen, spool, tokens_per_batch=256)


def test_a_corpus_shorter_than_the_budget_is_read_back(small: world.World, tmp_path: Path) -> None:
    """Most of the text must be left for the map, whatever the budget was meant for."""
    everything = passed(small, 0, world.LATENTS, tmp_path).statistics
    n = everything.n_tokens
    for budget in (10**9, int(0.7 * n)):
        measured = passed(small, budget, 16, tmp_path)
        statistics = measured.statistics
        assert statistics.n_tokens == n
        mapped = statistics.fit.n + statistics.held.n
        assert 0.7 * n < mapped < 0.95 * n
        assert len(statistics.tracked) == 16
        assert 0 < measured.left_out < 1
        np.testing.assert_array_equal(statistics.base.fired, everything.base.fired)
    tracked = statistics.tracked
    rest = everything.fit.fired[tracked] + everything.held.fired[tracked]
    seen = statistics.fit.fired + statistics.held.fired
    assert (seen <= rest).all()
    assert seen.sum() > 0.6 * rest.sum()
