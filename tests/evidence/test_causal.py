"""Restoration by cause: parity with plain hooks, and an adapter whose rows are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from autointerp.evidence import causal_single
from autointerp.evidence.causal import HeldOut, Restoration, RowSet, row_sets, share_of
from autointerp.evidence.causal_single import one_by_one
from autointerp.evidence.causal_static import direction_sets
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import MIN_FIRINGS, FittedMap
from autointerp.evidence.gather import Evidence
from autointerp.evidence.hookpoints import Layout
from autointerp.evidence.model_pair import ModelPair
from autointerp.evidence.paired import PairedModel
from autointerp.run import Run
from tests import tiny
from tests.e2e import world as calm_world
from tests.e2e.test_transcoder import save_transcoder
from tests.evidence.test_hooked import by_hand
from tests.evidence.world import CONTEXT, World, build, saved_model

PLANTED = [8, 10, 30]


class Writing(ModelPair):
    """One model, and the same with rows written after block 2 whenever their latents fire."""

    def __init__(self, model: PreTrainedModel, dictionary: Dictionary, rows: Tensor):
        self._model, self._dictionary, self._rows = model, dictionary, rows
        self.layout = Layout.of(model)
        self.changed_modules = frozenset({"transformer.h.2"})

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return (self._model,)

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        yield self._model

    @contextmanager
    def adapted(self) -> Iterator[PreTrainedModel]:
        def write(_module: Any, _args: Any, x: Tensor) -> Tensor:
            return x + (self._dictionary.encode(x.flatten(0, 1))[:, PLANTED] @ self._rows).view(x.shape)

        handle = self._model.get_submodule("transformer.h.2").register_forward_hook(write)
        yield self._model
        handle.remove()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("causal")
    return build(folder, *saved_model(folder), topk=False, bos=True)


def fit(evidence: Evidence) -> tuple[FittedMap, Restoration]:
    fitted, spool = evidence.fit(lambda _n: None)
    held = HeldOut.of(spool, evidence.corpus.bos)
    return fitted, Restoration(evidence.models, evidence.dictionary, fitted, held)


def test_an_adapter_that_writes_known_rows_is_restored_by_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calm = calm_world.build(tmp_path / "calm")
    run = Run.load(
        calm.adapter, sae=str(calm.sae), corpus=str(calm.corpus), context_length=calm_world.CONTEXT, device="cpu"
    )
    with Evidence.load(run) as evidence:
        model, dictionary = evidence.model.pair.model, evidence.dictionary
        rows = torch.randn(len(PLANTED), tiny.WIDTH, generator=torch.Generator().manual_seed(2))
        evidence.model = PairedModel(Writing(model, dictionary, rows), run.hook or "", evidence.model.tokenizer)
        fitted, restoration = fit(evidence)
        never = int(np.flatnonzero(fitted.statistics.base.fired == 0)[0])
        sets = row_sets(fitted, PLANTED, (1,), draws=3, seed=0)
        sums = restoration.together(sets)
        effects = {(e.part, e.k, e.draw, e.edit): e for e in sums.effects(sets)}
        few = one_by_one(restoration, fitted, [*PLANTED, never], sums.whole(), seed=0)
        monkeypatch.setattr(causal_single, "N_SEQUENCES", 10**6)
        alone = one_by_one(restoration, fitted, [*PLANTED, never], sums.whole(), seed=0)
        (three,) = [s for s in sets if (s.part, s.k) == ("selected", 3)]
        nothing = torch.zeros(tiny.WIDTH)
        singles = [RowSet("selected", 1, at, three.columns[[at]], three.rows[[at]], nothing) for at in range(3)]
        exact = [e for e in restoration.together(singles).effects(singles) if (e.part, e.edit) == ("selected", "added")]
    for edit in ("added", "removed"):
        assert effects["whole", 0, 0, edit].kl == pytest.approx(0, abs=1e-5)
        shares = {key[:3]: effect.kl_share or 0 for key, effect in effects.items() if key[3] == edit}
        assert shares["selected", 3, 0] > 0.95
        assert shares["selected", 1, 0] < 0.8
        assert all(shares["random", 3, draw] < 0.5 for draw in (1, 2, 3))
        assert shares["static", 0, 0] < 0.5
    assert [effect.latent for effect in alone] == [*PLANTED, never]
    assert [effect.added_kl for effect in alone[:3]] == pytest.approx([effect.kl_share for effect in exact], abs=2e-3)
    assert alone[3].added_kl == 0
    assert (alone[3].n_firing, alone[3].n_sequences) == (0, 0)
    assert [effect.n_sequences for effect in few] == [min(8, effect.n_firing) for effect in alone]
    assert [effect.n_firing for effect in few] == [effect.n_sequences for effect in alone]


@pytest.mark.parametrize(
    ("family", "hook"),
    [
        ("gpt2", "blocks.2.hook_resid_post"),
        ("gpt2", "blocks.2.hook_resid_pre"),
        ("gpt2", "blocks.2.hook_resid_mid"),
        ("gpt_neox", "blocks.1.hook_mlp_out"),
        ("gemma2", "blocks.2.hook_attn_out"),
        ("llama", "model.norm"),
    ],
)
def test_parity_with_plain_hooks(family: str, hook: str, tmp_path: Path) -> None:
    """Every hook kind: loss and KL of each edit, against whole forward passes with a hook on the module."""
    base = tiny.save_model(tmp_path / "base", family)
    adapter = tiny.save_lora(tmp_path / "lora", base, [0, 1])
    made = build(tmp_path, base, adapter, topk=True, bos=False)
    with Evidence.load(replace(made.run, hook=hook)) as evidence:
        fitted, restoration = fit(evidence)
        (batch,) = [restoration.held.batch(restoration.held.sequences[:4])]
        (chosen,) = [s for s in row_sets(fitted, list(range(9, 17)), (), draws=0, seed=0) if s.part == "selected"]
        got, tokens = restoration._edited(evidence.model, batch, [chosen])
        want = Plainly(evidence, chosen, fitted)(batch.ids, batch.counted)
    assert tokens.sum() == int(batch.counted.sum())
    np.testing.assert_allclose(got.sum(0), want, rtol=2e-3, atol=2e-3)


def test_a_transcoder_is_edited_where_it_writes_by_what_it_reads(world: World, tmp_path: Path) -> None:
    run = Run.load(
        world.run.adapter,
        base=str(world.base),
        sae=str(save_transcoder(tmp_path / "t")),
        corpus=str(world.run.corpus),
        context_length=CONTEXT,
        device="cpu",
    )
    with Evidence.load(run) as evidence:
        fitted, restoration = fit(evidence)
        batch = restoration.held.batch(restoration.held.sequences[:4])
        firing = np.argsort(-fitted.statistics.base.fired)[:6].tolist()
        (chosen,) = [s for s in row_sets(fitted, firing, (), draws=0, seed=0) if s.part == "selected"]
        got, _ = restoration._edited(evidence.model, batch, [chosen])
        want = Plainly(evidence, chosen, fitted, read_at="transformer.h.2.ln_2")(batch.ids, batch.counted)
        alone = one_by_one(restoration, fitted, firing, restoration.together([chosen]).whole(), seed=0)
    np.testing.assert_allclose(got.sum(0), want, rtol=2e-3, atol=2e-3)
    assert abs(want[0] - want[2]).min() > 1e-2, "the edits do something"
    assert {effect.latent for effect in alone} == set(firing)
    assert all(effect.n_firing for effect in alone)


class Plainly:
    """The same sums by whole forward passes."""

    def __init__(self, evidence: Evidence, rows: RowSet, fitted: FittedMap, read_at: str | None = None):
        """read_at: the hook of what a transcoder encodes."""
        self.evidence, self.rows, self.fitted, self.read_at = evidence, rows, fitted, read_at
        self.pair, self.hook = evidence.model.pair, evidence.model.hook

    @torch.no_grad()
    def __call__(self, ids: Tensor, counted: Tensor) -> np.ndarray:
        seen: dict[str, Tensor] = {}
        plain = {s: self.run(s, ids, lambda x, s=s: seen.setdefault(s, x)) for s in ("base", "adapted")}
        mean, static = (torch.from_numpy(part) for part in self.fitted.centre)
        if self.read_at is None:
            encoded = seen["base"]
        else:
            with self.pair.base() as model, by_hand(model, self.read_at, lambda u: seen.setdefault("read", u)):
                model(ids, use_cache=False)
            encoded = seen["read"]
        codes = self.evidence.dictionary.encode(encoded.flatten(0, 1))[:, self.rows.columns]
        z = codes.double() - mean[self.rows.columns]
        delta = (static + z @ self.rows.rows.double()).float().view(seen["base"].shape) * counted[..., None]
        out = np.zeros((3, 2, 2))
        for e, (side, other, sign) in enumerate((("base", "adapted", 1), ("adapted", "base", -1))):
            edits: list[Callable[[Tensor], Tensor]] = [
                lambda x: x,
                lambda _x, other=other: seen[other],
                lambda x, sign=sign: x + sign * delta,
            ]
            for at, edit in enumerate(edits):
                logits = self.run(side, ids, edit)
                p, q = (plain["adapted"], logits) if side == "base" else (logits, plain["base"])
                where = counted[:, :-1] & counted[:, 1:]
                out[at, e, 0] = cross_entropy(logits[:, :-1][where], ids[:, 1:][where], reduction="sum")
                out[at, e, 1] = kl_div(
                    q[counted].log_softmax(-1), p[counted].log_softmax(-1), log_target=True, reduction="sum"
                )
        return out

    def run(self, side: str, ids: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
        with self.pair.base() if side == "base" else self.pair.adapted() as model, by_hand(model, self.hook.name, edit):
            return model(ids, use_cache=False).logits


def test_held_out_documents_only_and_whole(world: World) -> None:
    with Evidence.load(world.run) as evidence:
        _, spool = evidence.fit(lambda _n: None)
        held = HeldOut.of(spool, evidence.corpus.bos, tokens=300)
        orders = [spool.place(s)[1] for s in held.sequences]
        assert all(order // 2 % 2 == 1 for order in orders)
        every = HeldOut.of(spool, evidence.corpus.bos, tokens=10**9)
        assert {spool.place(s)[1] for s in every.sequences} == {o for o in spool.orders.tolist() if o // 2 % 2 == 1}
        whole = [s for s in every.sequences if spool.place(s)[1] in orders]
        assert sorted(held.sequences) == sorted(whole)
        batches = list(held.batches(64))
        assert sum(int(batch.counted.sum()) for batch in batches) == sum(spool.counted(s).sum() for s in held.sequences)
        assert not any(batch.counted[:, 0].any() for batch in batches)  # BOS


def test_shares() -> None:
    draw = np.random.default_rng(0)
    none, whole = 10 + draw.normal(size=40), 8 + draw.normal(size=40)
    half = none - (none - whole) / 2
    totals = np.stack([none, whole, half], 1)
    assert [share_of(totals, at)[0] for at in (0, 1, 2)] == pytest.approx([0, 1, 0.5])
    assert share_of(totals, 2)[1] == pytest.approx(0, abs=1e-9)
    noisy = np.stack([none, none + draw.normal(size=40) * 10, half], 1)
    assert share_of(noisy, 2) == (None, None)
    assert share_of(np.ones((40, 3)), 2) == (None, None)


def test_rows_outside_the_map_are_passed_over(world: World) -> None:
    with Evidence.load(world.run) as evidence:
        fitted, _ = fit(evidence)
        del fitted._index[5]
        sets = row_sets(fitted, [5, 6], (1, 2, 50), draws=1, seed=0)
    assert [(s.part, s.k) for s in sets] == [("static", 0), ("selected", 1), ("random", 1), ("matched", 1), ("all", 48)]


def test_random_rows_beside_every_number_of_selected_ones(world: World) -> None:
    with Evidence.load(world.run) as evidence:
        fitted, _ = fit(evidence)
        sets = row_sets(fitted, [5, 6, 7], (1,), draws=2, seed=0, random_sizes=(1, 2, 50))
    drawn = [s for s in sets if s.part == "random"]
    assert [(s.draw, s.k) for s in drawn] == [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (2, 3)]
    for one, next_one in pairwise(drawn[:3]):  # the same draw, taken further
        assert next_one.columns[: one.k].tolist() == one.columns.tolist()
    assert [s.k for s in sets if s.part == "matched"] == [3, 3]


def test_directions_of_a_constant_change(world: World) -> None:
    """A bias of three planted directions: three of the pursuit's are all of it, random ones next to nothing."""
    with Evidence.load(world.run) as evidence:
        fitted, _ = fit(evidence)
    live = np.flatnonzero(fitted.statistics.base.fired >= MIN_FIRINGS)
    planted = live[[3, 9, 20]]
    static = torch.tensor([3.0, 2.0, -1.0]).double() @ fitted.W_dec[planted]
    fitted.statistics.stream.sum_change[:] = (static * fitted.statistics.n_tokens).numpy()
    sets = direction_sets(fitted, (1, 2, 3, 100), draws=2, seed=0)
    assert [(s.part, s.k, s.draw) for s in sets[:6]] == [
        (part, k, draw)
        for k in (1, 2)
        for part, draw in (("directions", 0), *(("random directions", d) for d in (1, 2)))
    ]
    assert sets[-1].k == len(live)
    left = {(s.k, s.draw): float((s.constant - static).norm() / static.norm()) for s in sets}
    assert left[1, 0] > left[2, 0] > left[3, 0]
    assert left[3, 0] < 1e-5
    assert all(left[k, draw] > left[k, 0] + 0.2 for k in (1, 2, 3) for draw in (1, 2))
    assert all(left[k, draw] > left[k + 1, draw] for k in (1, 2) for draw in (1, 2)), "one draw, taken further"
    z = torch.rand(7, 48)
    assert torch.equal(sets[0].written(z), sets[0].constant.expand(7, -1)), "the same on every token"
    fitted.statistics.stream.sum_change[:] = 0
    assert direction_sets(fitted, (1, 2), draws=1, seed=0) == []
