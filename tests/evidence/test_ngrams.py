"""n-gram tables: planted tokens, bigrams and trigrams are found, context is not taken for one; parity by hand."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.ngrams import PRIOR, ngrams
from autointerp.evidence.spool import Spool
from autointerp.records import Ngrams

M, DOCS, LENGTH, VOCABULARY = 6, 60, 100, 12
TOKEN, BIGRAM, TRIGRAM, COUNTER, CLASS, NEVER = range(M)


class Columns(Dictionary):
    """Activations are the stream itself, so that a test says what they are."""

    d_in, d_sae, format = M, M, "test/columns"

    def __init__(self) -> None:
        self.W_dec, self.b_dec = torch.eye(M), torch.zeros(M)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def decode(self, z: torch.Tensor, x: torch.Tensor | None = None) -> torch.Tensor:
        return z


@dataclass(frozen=True)
class Text:
    spool: Spool
    ids: list[np.ndarray]
    z: list[np.ndarray]


@pytest.fixture(scope="module")
def text() -> Text:
    draw = np.random.default_rng(0)
    spool = Spool(M, torch.float32)
    all_ids, all_z = [], []
    for doc in range(DOCS):
        ids = draw.integers(0, VOCABULARY, LENGTH)
        z = np.zeros((LENGTH, M), np.float32)
        before, earlier = np.r_[-1, ids[:-1]], np.r_[-1, -1, ids[:-2]]
        z[:, TOKEN] = (ids == 3) * 2 + (ids == 4)
        z[:, BIGRAM] = (ids == 3) & (before == 5)
        z[:, TRIGRAM] = ((ids == 1) & (before == 2) & (earlier == 0)) * 4
        z[:, COUNTER] = np.arange(LENGTH) % 10 == 0
        z[:, CLASS] = ids < VOCABULARY - 1
        z *= 1 + 0.05 * draw.standard_normal(z.shape).astype(np.float32)
        x = torch.from_numpy(z)
        spool.append(x, x, ids, np.arange(LENGTH) != 50, doc, doc, 0)
        all_ids.append(ids)
        all_z.append(z)
    return Text(spool, all_ids, all_z)


@pytest.fixture(scope="module")
def found(text: Text) -> dict[int, Ngrams]:
    return {row.latent: row for row in ngrams(text.spool, Columns(), range(M), set(), lambda i: f"t{i}")}


def test_planted_ngrams_are_known_and_named(found: dict[int, Ngrams]) -> None:
    assert (found[TOKEN].length, found[TOKEN].grams) == (1, (("t3",), ("t4",)))
    assert (found[BIGRAM].length, found[BIGRAM].grams) == (2, (("t5", "t3"),))
    assert (found[TRIGRAM].length, found[TRIGRAM].grams) == (3, (("t0", "t2", "t1"),))


def test_what_context_or_a_whole_class_explains_is_not_known(found: dict[int, Ngrams]) -> None:
    assert found[COUNTER].length is None
    assert found[COUNTER].r2_trigram < 0.2
    assert found[CLASS].r2_token > 0.9
    assert found[CLASS].length is None  # eleven tokens: a class, not a token
    assert NEVER not in found


def test_r2_by_hand(text: Text, found: dict[int, Ngrams]) -> None:
    fit = [doc for doc in range(DOCS) if doc // 2 % 2 == 0]
    totals: list[dict[tuple[int, ...], list[float]]] = [defaultdict(lambda: [0.0, 0.0]) for _ in range(3)]

    def grams(doc: int, t: int) -> list[tuple[int, ...]]:
        return [tuple(int(text.ids[doc][i]) if i >= 0 else -1 for i in range(t - n, t + 1)) for n in range(3)]

    def mean(t: list[tuple[int, ...]]) -> list[float]:
        values, shorter = [], 0.0
        for n, gram in enumerate(t):
            total, count = totals[n].get(gram, (0.0, 0.0))
            shorter = (total + PRIOR * shorter) / (count + PRIOR) if count else shorter
            values.append(shorter)
        return values

    counted = [t for t in range(LENGTH) if t != 50]
    for doc in fit:
        for t in counted:
            for n, gram in enumerate(grams(doc, t)):
                totals[n][gram][0] += float(text.z[doc][t, TRIGRAM])
                totals[n][gram][1] += 1
    held = [(doc, t) for doc in range(DOCS) if doc not in fit for t in counted]
    truth = np.array([text.z[doc][t, TRIGRAM] for doc, t in held])
    said = np.array([mean(grams(doc, t)) for doc, t in held])
    want = 1 - ((truth[:, None] - said) ** 2).sum(0) / ((truth - truth.mean()) ** 2).sum()
    got = found[TRIGRAM]
    assert (got.r2_token, got.r2_bigram, got.r2_trigram) == pytest.approx(tuple(want), abs=1e-4)


def test_revived_latents_are_read_on_the_adapted_side() -> None:
    spool = Spool(M, torch.float32)
    draw = np.random.default_rng(1)
    for doc in range(20):
        ids = draw.integers(0, VOCABULARY, LENGTH)
        late = torch.zeros(LENGTH, M)
        late[:, NEVER] = torch.from_numpy((ids == 7).astype(np.float32))
        spool.append(torch.zeros(LENGTH, M), late, ids, np.ones(LENGTH, bool), doc, doc, 0)
    assert ngrams(spool, Columns(), [NEVER], set(), str) == []
    (row,) = ngrams(spool, Columns(), [NEVER], {NEVER}, str)
    assert (row.length, row.grams) == (1, (("7",),))
