"""Latents that only stand in for what a linear map cannot say of others: made-up codes, and the spool's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch

from autointerp.demo import ORGANISM
from autointerp.evidence.corpus import fit_rows
from autointerp.evidence.dictionaries.base import load_dictionary
from autointerp.evidence.spool import Spool
from autointerp.evidence.stand_ins import HINGES, Reread, curves, rereading, stand_ins

N, D = 4000, 12
COLUMNS = {10: 0, 20: 1, 30: 2}
"""Latent → column of the codes below."""


def codes(seed: int = 0) -> np.ndarray:
    """z [N, 3]: the first two fire apart; the third often fires with the first, all the stronger the weaker that is."""
    draw = np.random.default_rng(seed)
    fires = draw.random((N, 2)) < 0.2
    strength = draw.gamma(3.0, 1 / 3, (N, 2))
    third = fires[:, 0] * (draw.random(N) < 0.6) * np.maximum(2.0 - strength[:, 0], 0) * draw.uniform(0.7, 1.3, N)
    return np.column_stack([fires * strength, third]).astype(np.float32)


def of(z: np.ndarray, change: np.ndarray, chunk: int = 700) -> Reread:
    def reread(latents: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for begin in range(0, len(z), chunk):
            at = slice(begin, begin + chunk)
            yield z[at][:, [COLUMNS[j] for j in latents]], change[at].astype(np.float32)

    return reread


def found(z: np.ndarray, change: np.ndarray, latents: Sequence[int] = (10, 20, 30)) -> list[int]:
    firing = np.array([z[z[:, COLUMNS[j]] > 0, COLUMNS[j]].mean() for j in latents])
    return stand_ins(of(z, change), latents, firing)


DIRECTIONS = np.linalg.qr(np.random.default_rng(1).normal(size=(D, 3)))[0].T


@pytest.mark.parametrize(
    "bent",
    [
        lambda z: 1.0 * (z > 0),
        lambda z: np.maximum(z - 0.5 * z[z > 0].mean(), 0),
        lambda z: np.minimum(z, z[z > 0].mean()),
    ],
    ids=["as strongly whenever it fires", "beyond a threshold", "up to a ceiling"],
)
def test_who_helps_a_line_to_bend_is_found(bent) -> None:
    """What is written hangs on the first latent alone, and on the second: the third has no part in it."""
    z = codes()
    change = np.outer(bent(z[:, 0]), DIRECTIONS[0]) + np.outer(z[:, 1], DIRECTIONS[1])
    assert found(z, change) == [30]


def test_who_writes_is_not_found() -> None:
    """Neither the same latents where each writes, bent or straight, nor where noise is all that there is."""
    z = codes()
    assert found(z, (z > 0) @ DIRECTIONS) == []
    assert found(z, z @ DIRECTIONS) == []
    assert found(z, np.random.default_rng(2).normal(size=(N, D))) == []


def test_a_bend_under_noise_stays_in_doubt() -> None:
    """Noise as large as what the third latent could have written: it is not known to stand in for the first."""
    z = codes()
    quiet = np.outer(z[:, 0] > 0, DIRECTIONS[0])
    assert found(z, quiet + 3.0 * np.random.default_rng(3).normal(size=(N, D))) == []


def test_of_one_or_of_no_text_nothing_is_said() -> None:
    z = codes()
    assert found(z, z @ DIRECTIONS, [10]) == []
    assert stand_ins(lambda _: iter(()), [10, 20], np.ones(2)) == []


def test_curves_are_hinges_and_a_step() -> None:
    z = np.array([[0.0, 3.0], [1.0, 0.0], [5.0, 2.0]], np.float32)
    f = curves(z, np.array([2.0, 1.0])).toarray()
    want = [np.maximum(z - h * np.array([2.0, 1.0]), 0) for h in HINGES]
    np.testing.assert_allclose(f, np.hstack([*want, z > 0]))


def test_rereading_gives_the_fit_half() -> None:
    """Counted tokens of the fit half alone, as they were encoded, whatever the spool's dtype."""
    dictionary = load_dictionary(ORGANISM / "sae")
    draw = torch.Generator().manual_seed(0)
    latents, wanted = [0, 2], []
    with Spool(dictionary.d_in, torch.float32) as spool:
        for order in range(8):
            x = torch.randn(5, 2, dictionary.d_in, generator=draw)
            counted = np.array([True, False, True, True, True])
            spool.append(x[:, 0], x[:, 1], np.arange(5), counted, order, order, 0)
            if fit_rows(np.array([order]))[0]:
                x = x[torch.from_numpy(counted)]
                wanted.append((dictionary.encode(x[:, 0])[:, latents], x[:, 1] - x[:, 0]))
        z, change = (np.concatenate(parts) for parts in zip(*rereading(spool, dictionary)(latents), strict=True))
    for got, want in ((z, 0), (change, 1)):
        np.testing.assert_allclose(got, torch.cat([pair[want] for pair in wanted]).numpy(), atol=1e-5)


def test_a_long_text_is_not_reread_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autointerp.evidence.stand_ins.MOST_TOKENS", 10_000)
    dictionary, n = load_dictionary(ORGANISM / "sae"), 9_000
    x = torch.zeros(n, dictionary.d_in)
    with Spool(dictionary.d_in, torch.float32) as spool:
        for order in (0, 1, 4, 5):  # all of them in the fit half
            spool.append(x, x, np.arange(n), np.ones(n, bool), order, order, 0)
        assert sum(len(change) for _, change in rereading(spool, dictionary)([0])) == 2 * n
