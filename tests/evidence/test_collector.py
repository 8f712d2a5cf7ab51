"""Statistics and contexts of every latent, of all kinds, against a plain computation on a tiny model."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch

from autointerp.evidence.collector import AFTER, BEFORE, MIN_SILENT, PER_SPLIT, SPLITS, Survey, collect, pick
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.foils import PER_SPLIT as FOILS
from autointerp.evidence.foils import Partners, partners
from autointerp.evidence.gather import Evidence
from autointerp.evidence.screening import Screen
from autointerp.evidence.spool import Spool
from autointerp.evidence.stream import Measured, measure
from autointerp.records import Context
from tests.evidence import world

assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
"""Activations of the tiny models are of order 10."""


PARTNERS: dict[int, Partners] = {
    j: {"cofiring": (j + 1) % world.LATENTS, "neighbour": (j + 2) % world.LATENTS} for j in range(world.LATENTS)
}


@dataclass(frozen=True)
class Collected:
    measured: Measured
    contexts: dict[int, list[Context]]
    split_of: dict[int, str]
    """By document."""
    plain: world.Plain
    text: dict[int, str]
    """Of each token id."""


@pytest.fixture(scope="module", params=["jumprelu", "topk with bos"])
def collected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Collected:
    folder = tmp_path_factory.mktemp("world")
    base, adapter = world.saved_model(folder)
    topk = request.param != "jumprelu"
    small = world.build(folder, base, adapter, topk=topk, bos=topk)
    with Evidence.load(small.run) as evidence:
        m, d = evidence.dictionary.W_dec.shape
        spool = Spool(d, torch.float32, folder)
        measured = measure(
            [evidence.model], evidence.dictionary, evidence.corpus, Screen(m, d, 0), spool, tokens_per_batch=256
        )
        fired = measured.statistics.base.fired, measured.statistics.adapted.fired
        revived = set(np.flatnonzero((fired[0] == 0) & (fired[1] > 0)).tolist())

        async def gather() -> dict[int, list[Context]]:
            found = collect(spool, evidence.dictionary, list(range(m)), revived, evidence.decode, 0, PARTNERS)
            return {latent: contexts async for group in found for latent, contexts in group.items()}

        contexts = asyncio.run(gather())
        orders = {sequence.doc: sequence.order for sequence in evidence.corpus.sequences()}
        spool.close()
        text = {i: evidence.decode(i) for i in range(evidence.model.vocab_size)}
    split_of = {doc: SPLITS[order % 2] for doc, order in orders.items()}
    return Collected(measured, contexts, split_of, world.plainly(small), text)


def test_statistics_of_every_latent(collected: Collected) -> None:
    statistics = collected.measured.statistics
    for moments, side in ((statistics.base, collected.plain.base), (statistics.adapted, collected.plain.adapted)):
        z = np.concatenate(list(side.values()))
        assert statistics.n_tokens == len(z)
        assert_close(moments.total / len(z), z.mean(0, dtype=np.float64))
        np.testing.assert_allclose(moments.fired, (z > 0).sum(0), atol=2)  # rounding at the threshold
        assert_close(moments.largest, z.max(0))
    assert collected.measured.n_docs == len({doc for doc, _ in collected.plain.ids})


def test_latents_come_in_the_order_asked_for(collected: Collected) -> None:
    assert list(collected.contexts) == list(range(world.LATENTS))


def test_every_context_is_what_it_says(collected: Collected) -> None:
    plain = collected.plain
    starts: dict[int, list[int]] = defaultdict(list)
    for doc, start in plain.ids:
        starts[doc].append(start)
    for latent, contexts in collected.contexts.items():
        assert [c.context_id for c in contexts] == list(range(len(contexts)))
        places = set()
        for c in contexts:
            start = max(s for s in starts[c.doc] if s <= c.position)
            at = c.position - start
            first, ids = at - c.peak, plain.ids[c.doc, start]
            window = slice(first, first + len(c.tokens))
            assert c.latent == latent
            assert c.split == collected.split_of[c.doc]
            assert first >= 0
            assert first + len(c.tokens) <= len(ids)
            assert c.tokens == tuple(collected.text[i] for i in ids[window])
            base, adapted = plain.base[c.doc, start][:, latent], plain.adapted[c.doc, start][:, latent]
            assert_close(c.act_base, base[window])
            assert_close(c.act_adapted, adapted[window])
            places.add((c.kind, c.doc, start))
            if c.kind == "silent":
                assert not any(c.act_base)
                assert not any(c.act_adapted)
                assert len(c.tokens) >= MIN_SILENT
            else:
                assert first == max(0, at - BEFORE)
                assert first + len(c.tokens) == min(len(ids), at + AFTER + 1)
        assert len(places) == len(contexts), "one context per sequence and kind"


def peak_of(context: Context) -> float:
    base, adapted = context.act_base[context.peak], context.act_adapted[context.peak]
    values = {"top": adapted, "top_base": base, "gain": adapted - base, "loss": base - adapted}
    return values.get(context.kind, base if base > 0 else adapted)


@pytest.mark.parametrize("kind", ["top", "top_base", "gain", "loss", "quantile"])
def test_peaks_of_every_latent_and_kind(collected: Collected, kind: str) -> None:
    """The largest sequence peaks of each split, in order of rank; `quantile` takes even steps through all of them."""
    plain, n_checked = collected.plain, 0
    for latent, contexts in collected.contexts.items():
        revived = collected.measured.statistics.base.fired[latent] == 0
        of_kind = sorted((c for c in contexts if c.kind == kind), key=lambda c: c.rank)
        assert [c.rank for c in of_kind] == list(range(1, len(of_kind) + 1))
        found_peaks = [peak_of(c) for c in of_kind]
        assert found_peaks == sorted(found_peaks, reverse=True)
        for split in SPLITS:
            peaks = []
            for key, base in plain.base.items():
                if collected.split_of[key[0]] == split:
                    b, a = base[:, latent].astype(np.float64), plain.adapted[key][:, latent].astype(np.float64)
                    of = {"top": a, "top_base": b, "gain": a - b, "loss": b - a, "quantile": a if revived else b}
                    peaks.append(of[kind].max())
            want = np.sort([p for p in peaks if p > 1e-4])[::-1]
            n = PER_SPLIT[kind]  # pyright: ignore[reportArgumentType]
            if kind == "quantile" and len(want) > n:
                want = want[((np.arange(n) + 0.5) * len(want) / n).astype(int)]
            found = np.array([peak_of(c) for c in of_kind if c.split == split])
            found = found[found > 1e-4]
            assert_close(found[: len(want)], want[: min(n, len(found))])
            assert abs(len(found) - min(n, len(want))) <= 1  # a peak at the threshold may fall on either side
            n_checked += len(found)
    assert n_checked > 25 * PER_SPLIT[kind]  # pyright: ignore[reportArgumentType]


def test_silent_contexts_fill_up_from_silent_stretches(collected: Collected) -> None:
    """A latent that fires in every sequence has contexts in which it is silent nonetheless, if it ever is for long."""
    n_partial = 0
    for latent, contexts in collected.contexts.items():
        for split in SPLITS:
            silences = [
                (_longest(~((base[:, latent] > 0) | (collected.plain.adapted[key][:, latent] > 0))), len(base))
                for key, base in collected.plain.base.items()
                if collected.split_of[key[0]] == split
            ]
            able = sum(longest >= MIN_SILENT for longest, _ in silences)
            whole = sum(longest == length for longest, length in silences)
            found = [c for c in contexts if c.kind == "silent" and c.split == split and not c.foil]
            assert len(found) == min(PER_SPLIT["silent"], able)
            n_partial += max(0, len(found) - whole)
    assert n_partial > 20


def test_near_misses_mislead_as_they_say(collected: Collected) -> None:
    """At the peak stands a token on which the latent fires elsewhere, or another latent has its peak."""
    plain, n_found = collected.plain, dict.fromkeys(FOILS, 0)
    for latent, contexts in collected.contexts.items():
        for c in (c for c in contexts if c.foil is not None):
            assert c.kind == "silent", "that it is silent is checked with the others"
            assert c.foil is not None
            n_found[c.foil] += 1
            if c.foil == "token":
                peaks = {o.tokens[o.peak] for o in contexts if o.split == c.split and o.kind != "silent"}
                assert c.tokens[c.peak] in peaks
            else:
                start = max(s for doc, s in plain.ids if doc == c.doc and s <= c.position)
                other = plain.base[c.doc, start][:, PARTNERS[latent][c.foil]]
                assert other[c.position - start] == pytest.approx(other.max(), rel=1e-4)
                assert other.max() > 0
        for split in SPLITS:
            for foil, n in FOILS.items():
                assert sum((c.foil, c.split) == (foil, split) for c in contexts) <= n
    assert all(n > 20 for n in n_found.values()), n_found


def test_partners_are_those_of_a_plain_computation(collected: Collected) -> None:
    statistics = collected.measured.statistics
    rows = torch.randn(world.LATENTS, statistics.d, generator=torch.Generator().manual_seed(0))
    found = partners(FittedMap(statistics, rows), [3, 0, 7])
    z = np.concatenate(list(collected.plain.base.values()))
    fired = (statistics.base.fired > 0) | (statistics.adapted.fired > 0)
    unit = (rows / rows.norm(dim=1, keepdim=True)).numpy()
    assert list(found) == [3, 0, 7]
    for latent, mine in found.items():
        cosines = np.where(fired, unit @ unit[latent], -1)
        cosines[latent] = -1
        assert mine.get("neighbour") == cosines.argmax()
        if "cofiring" in mine:
            with np.errstate(invalid="ignore", divide="ignore"):
                r = np.nan_to_num(np.corrcoef(z.T)[latent], nan=-1.0)
            r[latent] = -1
            assert r[mine["cofiring"]] == pytest.approx(r.max(), abs=0.02)
    assert any("cofiring" in mine for mine in found.values())
    assert partners(FittedMap(statistics, rows), []) == {}


def _longest(silent: np.ndarray) -> int:
    """Length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], silent, [False]]).astype(int)))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def test_silent_sequences_come_before_silent_stretches() -> None:
    """Sequences 0–3 are silent as a whole, 4–7 only for long, 8–11 never, the last holds no counted token."""
    peaks = np.array([0] * 4 + [5] * 8 + [-np.inf], np.float32)[:, None]
    silence = np.array([50] * 4 + [MIN_SILENT] * 4 + [MIN_SILENT - 1] * 4 + [50], np.int32)[:, None]
    found = Survey([7], peaks, peaks, peaks, peaks, silence)
    picks = pick(found, 0, np.arange(13), revived=False, seed=0)
    silent = [p.sequence for p in picks if p.kind == "silent" and p.split == "explain"]
    assert set(silent[:2]) == {0, 2}
    assert set(silent[2:]) == {4, 6}
    assert not {p.sequence for p in picks if p.kind == "top"} & {0, 1, 2, 3, 12}


def test_the_same_seed_gives_the_same_contexts() -> None:
    rng = np.random.default_rng(0)
    peaks = rng.normal(size=(400, 1)).astype(np.float32).clip(0)
    found = Survey([7], peaks, peaks, peaks, peaks, np.full((400, 1), 9, np.int32))
    orders = np.arange(400) // 3
    assert pick(found, 0, orders, False, 0) == pick(found, 0, orders, False, 0)
    assert pick(found, 0, orders, False, 0) != pick(found, 0, orders, False, 1)
