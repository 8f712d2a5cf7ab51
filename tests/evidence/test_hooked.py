"""Functions inserted at hook points, against plain transformers with the arithmetic written out."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from autointerp.errors import InputError
from autointerp.evidence.hooked import HookedPair, Insertion, stream_after
from autointerp.evidence.hookpoints import POINTS, Layout, resolve
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import replicas
from tests import tiny
from tests.evidence.test_paired import plainly

TOKENIZER = tiny.tokenizer()


class Bend(nn.Module):
    """x + tanh(x A) B: neither linear nor small."""

    def __init__(self, scale: float = 0.5, seed: int = 0):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.A = nn.Parameter(torch.randn(tiny.WIDTH, 3, generator=draw), requires_grad=False)
        self.B = nn.Parameter(scale * torch.randn(3, tiny.WIDTH, generator=draw), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + (torch.tanh(x.float() @ self.A) @ self.B).to(x.dtype)

    def has_effect(self) -> bool:
        return bool(self.B.any())


def hooked(model: PreTrainedModel, at: str, read: str, function: Bend | None = None) -> PairedModel:
    pair = HookedPair(model, [Insertion(resolve(at, model), function or Bend())])
    return PairedModel(pair, read, TOKENIZER)


def by_hand(model: PreTrainedModel, at: str, function: Callable[[Tensor], Tensor]) -> ExitStack:
    """`function` in `model`, as TransformerLens means it, until the stack is closed."""
    stack, point, layout = ExitStack(), resolve(at, model), Layout.of(model)
    kept: list[Tensor] = []
    if at.endswith("hook_resid_mid"):  # resid_mid = resid_pre + attn_out; both ways on go through what attn_out becomes
        assert layout.family
        block = model.get_submodule(f"{layout.blocks}.{point.layer}")
        attention = block.get_submodule(layout.family.attention[-1])

        def remember(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            kept[:] = [args[0] if args else kwargs["hidden_states"]]

        def shift(_module: nn.Module, _args: tuple, output) -> object:
            whole = isinstance(output, tuple)
            out = function(kept[0] + (output[0] if whole else output)) - kept[0]
            return (out, *output[1:]) if whole else out

        stack.callback(block.register_forward_pre_hook(remember, with_kwargs=True).remove)
        stack.callback(attention.register_forward_hook(shift).remove)
    elif point.where == "input":

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> tuple:
            if args:
                return (function(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": function(kwargs["hidden_states"])}

        pre = model.get_submodule(point.module_path).register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(pre.remove)
    else:

        def after(_module: nn.Module, _args: tuple, output: Any) -> Any:
            return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

        stack.callback(model.get_submodule(point.module_path).register_forward_hook(after).remove)
    return stack


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_point_read_from_every_point(family):
    ids, plain, function = tiny.token_ids(), tiny.model(family), Bend()
    layout = Layout.of(plain)
    points = [point for point in POINTS if not (layout.parallel and point == "hook_resid_mid")]
    reads = [f"blocks.{layer}.{point}" for layer in (0, 2) for point in points]
    reads += ["blocks.1.hook_resid_post", "blocks.3.hook_resid_post"]
    untouched = {}
    for read in reads:
        point = resolve(read, plain)
        untouched[read] = plainly(plain, point.module_path, point.where, ids)
    inner = tiny.model(family)
    for at in [f"blocks.{layer}.{point}" for layer in (0, 2) for point in points]:
        for read in reads:
            model = hooked(inner, at, read, function)
            x_base, x_adapted = model.activations(ids)
            path, where = model.hook.module_path, model.hook.where
            assert torch.equal(x_base, untouched[read]), (at, read)
            with by_hand(plain, at, function):
                wanted = plainly(plain, path, where, ids)
            if at.endswith("hook_resid_mid") and read.endswith(at[7] + ".hook_attn_out"):
                wanted = x_base  # by hand it is attn_out that carries the change; in the model it is not touched
            if at == "blocks.2.hook_resid_pre" and read == "blocks.1.hook_resid_post":
                continue  # one place under two names: by hand only the second is changed
            assert torch.allclose(x_adapted, wanted, atol=2e-4), (at, read)
            assert torch.equal(x_base, x_adapted) == torch.equal(x_base, wanted), (at, read)
            assert any(model.hook.sees(*place) for place in model.pair.changed_places) == (
                not torch.equal(x_base, wanted)
            ), (at, read)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits(family):
    ids, plain, function = tiny.token_ids(), tiny.model(family), Bend()
    for at in ("blocks.1.hook_resid_pre", "blocks.1.hook_mlp_out", "blocks.3.hook_resid_post"):
        base, adapted = hooked(tiny.model(family), at, "blocks.3.hook_resid_post", function).logits(ids)
        with torch.inference_mode():
            assert torch.equal(base, plain(ids).logits)
            with by_hand(plain, at, function):
                assert torch.allclose(adapted, plain(ids).logits, atol=2e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_patching_what_is_at_the_hook_is_inserting_there(family):
    """Whichever point it is, skip connection and all: `check` and `attribution` patch, an adapter is inserted."""
    ids, plain, function = tiny.token_ids(), tiny.model(family), Bend()
    points = [point for point in POINTS if not (Layout.of(plain).parallel and point == "hook_resid_mid")]
    for at in [f"blocks.{layer}.{point}" for layer in (0, 2) for point in points]:
        model = hooked(tiny.model(family), at, at, function)
        base, adapted = model.logits(ids)
        edited, _ = model.patched_logits("base", ids, function)
        assert torch.allclose(edited, adapted, atol=2e-4), at
        assert not torch.allclose(edited, base, atol=1e-2), at


def test_the_stream_between_two_blocks_is_one_place():
    ids = tiny.token_ids()
    for at in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
        for read in ("blocks.1.hook_resid_post", "blocks.2.hook_resid_pre"):
            x_base, x_adapted = hooked(tiny.model("llama"), at, read).activations(ids)
            assert torch.equal(x_adapted, Bend()(x_base))


def test_several_insertions_act_in_order():
    model, ids = tiny.model("gpt2"), tiny.token_ids()
    points = [resolve(name, model) for name in ("blocks.1.hook_resid_post", "blocks.1.hook_resid_post")]
    one, two = Bend(), Bend(scale=2.0, seed=1)
    pair = HookedPair(model, [Insertion(points[0], one), Insertion(points[1], two)])
    x_base, x_adapted = PairedModel(pair, "blocks.1.hook_resid_post", TOKENIZER).activations(ids)
    assert torch.equal(x_adapted, two(one(x_base)))
    assert not torch.allclose(x_adapted, one(two(x_base)), atol=1e-2)


def test_shared_blocks_run_once_and_nothing_above_the_hook_runs():
    model = hooked(tiny.model("llama"), "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post")
    calls: Counter[str] = Counter()
    for name, module in model.pair.model.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: calls.update([name]))
    model.activations(tiny.token_ids())
    assert [calls[f"model.layers.{layer}.mlp.down_proj"] for layer in range(4)] == [1, 2, 2, 0]


@pytest.mark.parametrize(
    ("at", "read", "remedy"),
    [
        ("blocks.2.hook_resid_post", "blocks.2.hook_mlp_out", "use blocks.2.hook_resid_post"),
        ("blocks.2.hook_resid_mid", "blocks.2.hook_attn_out", "blocks.2.hook_resid_mid or blocks.2.hook_mlp_out"),
        ("blocks.2.hook_mlp_out", "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out or blocks.2.hook_resid_post"),
        ("blocks.2.hook_resid_pre", "blocks.1.hook_mlp_out", "use blocks.1.hook_resid_post"),
        ("transformer.h.2.ln_2", "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out"),
        ("blocks.0.hook_resid_pre", "blocks.0.hook_resid_pre", None),
        ("transformer.h.2.mlp", "blocks.2.hook_mlp_out", None),
    ],
)
def test_a_hook_that_does_not_see_the_adapter_is_refused(at, read, remedy):
    model = hooked(tiny.model("gpt2"), at, read)
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert torch.equal(x_base, x_adapted) == (remedy is not None)
    if remedy is None:
        model.check_sees_adapter()
    else:
        with pytest.raises(InputError, match=remedy):
            model.check_sees_adapter()


def test_a_function_without_effect_changes_nothing():
    model = hooked(tiny.model("gpt2"), "blocks.1.hook_resid_post", "blocks.3.hook_resid_post", Bend(scale=0.0))
    assert model.pair.first_changed_layer is None
    model.check_sees_adapter()
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert torch.equal(x_base, x_adapted)


def test_replicas_share_every_tensor_and_are_hooked_alone():
    model = hooked(tiny.model("gpt2"), "blocks.1.hook_resid_mid", "blocks.2.hook_resid_post")
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        several = replicas(model)
    finally:
        torch.set_num_threads(threads)
    assert len(several) == 3
    pointers = [{p.data_ptr() for p in each.pair.model.parameters()} for each in several]
    assert pointers[0] == pointers[1] == pointers[2]
    assert several[0].pair.model is not several[1].pair.model
    assert several[0].pair._insertions is several[1].pair._insertions  # pyright: ignore[reportAttributeAccessIssue]
    ids = [tiny.token_ids(seed=seed) for seed in range(12)]
    wanted = [model.activations(batch) for batch in ids]
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def work(first: int) -> None:
        for at in range(first, len(ids), 3):
            found[at] = several[first].activations(ids[at])

    workers = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for at, (x_base, x_adapted) in enumerate(wanted):
        assert torch.equal(found[at][0], x_base)
        assert torch.equal(found[at][1], x_adapted)


def test_the_model_is_left_as_it_was():
    plain = tiny.model("gpt2").train()
    before = {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in plain.named_modules()}
    model = hooked(plain, "blocks.0.hook_resid_mid", "blocks.2.hook_resid_post")
    model.activations(tiny.token_ids())
    with pytest.raises(IndexError):
        model.activations(tiny.token_ids() + tiny.VOCAB)
    assert {name: len(m._forward_hooks) + len(m._forward_pre_hooks) for name, m in plain.named_modules()} == before
    assert plain.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    plain = tiny.model("qwen3").to(dtype)
    x_base, x_adapted = hooked(plain, "blocks.2.hook_resid_post", "blocks.2.hook_resid_post").activations(
        tiny.token_ids()
    )
    assert x_base.dtype == x_adapted.dtype == dtype
    assert torch.equal(x_adapted, Bend()(x_base))


def test_an_architecture_outside_the_table():
    settings = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 16, "vocab_size": 320}
    config = AutoConfig.for_model("opt", word_embed_proj_dim=32, max_position_embeddings=64, **settings)
    opt = AutoModelForCausalLM.from_config(config).eval()
    point = stream_after(Layout.of(opt), 1)
    assert point.name == "model.decoder.layers.1"
    pair = HookedPair(opt, [Insertion(point, Bend())])
    x_base, x_adapted = PairedModel(pair, "model.decoder.layers.1", TOKENIZER).activations(tiny.token_ids())
    assert torch.equal(x_adapted, Bend()(x_base))
    with pytest.raises(InputError, match="after layer 3, the model has 0 to 2"):
        stream_after(Layout.of(opt), 3)


def test_gradients_reach_what_is_inserted():
    model, function = tiny.model("llama").requires_grad_(False), Bend().requires_grad_(True)
    ids = tiny.token_ids()
    for at in [f"blocks.1.{point}" for point in POINTS] + ["blocks.0.hook_resid_pre"]:
        pair = HookedPair(model, [Insertion(resolve(at, model), function)])
        with pair.adapted() as adapted:
            adapted(ids, labels=ids).loss.backward()
        assert function.B.grad is not None, at
        grad, step = function.B.grad.clone(), 1e-3
        with torch.no_grad():
            losses = []
            for sign in (1, -1):
                function.B.add_(sign * step * grad / grad.norm())
                with pair.adapted() as adapted:
                    losses.append(float(adapted(ids, labels=ids).loss.double()))
                function.B.sub_(sign * step * grad / grad.norm())
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(grad.norm()), rel=0.05), at
        function.B.grad = None
