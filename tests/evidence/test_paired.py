"""PairedModel against plain transformers and peft: the same bits, for less work."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from peft import IA3Config, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, Cache

from autointerp.errors import InputError
from autointerp.evidence.hookpoints import POINTS, resolve
from autointerp.evidence.model_pair import ModelPair
from autointerp.evidence.paired import PairedModel
from tests import tiny

TOKENIZER = tiny.tokenizer()


def paired(peft, hook: str) -> PairedModel:
    return PairedModel(ModelPair.from_peft(peft), hook, TOKENIZER)


def plainly(model: nn.Module, module_path: str, where: str, ids: Tensor, run=None) -> Tensor:
    """What a forward hook at the module sees in one whole forward pass of `run` (default: the model itself)."""
    seen: list = []
    module = model.get_submodule(module_path)
    if where == "input":
        handle = module.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    else:
        handle = module.register_forward_hook(
            lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out)
        )
    with torch.inference_mode():
        (run or model)(ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_bit_equal_to_the_plain_model_and_to_peft(family):
    ids, plain, peft = tiny.token_ids(), tiny.model(family), tiny.add_lora(tiny.model(family), [1, 3])
    peft.eval()
    pair = ModelPair.from_peft(peft)
    assert pair.first_changed_layer == 1
    points = [point for point in POINTS if not (pair.layout.parallel and point == "hook_resid_mid")]
    for layer in (0, 1, 2):
        for point in points:
            model = PairedModel(pair, f"blocks.{layer}.{point}", TOKENIZER)
            x_base, x_adapted = model.activations(ids)
            path, where = model.hook.module_path, model.hook.where
            assert torch.equal(x_base, plainly(plain, path, where, ids)), model.hook.name
            assert torch.equal(x_adapted, plainly(peft.get_base_model(), path, where, ids, peft)), model.hook.name
            with peft.disable_adapter():
                assert torch.equal(x_base, plainly(peft.get_base_model(), path, where, ids, peft)), model.hook.name
            seen = layer > 1 or (layer == 1 and point != "hook_resid_pre")
            assert torch.equal(x_base, x_adapted) == (not seen)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_and_unembedding_are_the_models_own(family):
    ids, plain, peft = tiny.token_ids(), tiny.model(family), tiny.add_lora(tiny.model(family), [2]).eval()
    model = paired(peft, "blocks.3.hook_resid_post")
    base, adapted = model.logits(ids)
    with torch.inference_mode():
        assert torch.equal(base, plain(ids).logits)
        assert torch.equal(adapted, peft(ids).logits)
    at = torch.tensor([(len(ids) - 1, 3), (0, 7), (0, 0), (1, 7)])
    for whole, some in zip((base, adapted), model.logits(ids, at), strict=True):
        assert torch.allclose(some, whole[at[:, 0], at[:, 1]], atol=1e-5)
    x_base, _ = model.activations(ids)
    assert torch.allclose(model.unembed(x_base.flatten(0, 1)), base.flatten(0, 1), atol=1e-5)
    assert base.abs().max() < 3 or family != "gemma2"  # soft-capped
    assert (model.n_layers, model.d_model, model.vocab_size) == (tiny.DEPTH, tiny.WIDTH, tiny.VOCAB)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("point", ["hook_resid_pre", "hook_mlp_out", "hook_resid_post"])
def test_logits_from_the_hook_on(family, point):
    ids, peft = tiny.token_ids(), tiny.add_lora(tiny.model(family), [1, 2, 3]).eval()
    model = paired(peft, f"blocks.2.{point}")
    at = torch.tensor([(len(ids) - 1, 3), (0, 7), (0, 0), (1, 7)])
    want, streams = model.logits(ids, at), model.activations(ids)
    calls: Counter[int] = Counter()
    for name, module in peft.get_base_model().named_modules():
        if name.endswith(("mlp", "self_attn", "attn", "attention")):
            module.register_forward_hook(lambda _m, _a, _o, name=name: calls.update([model.pair.layout.place(name)[0]]))
    got = model.logits_from(streams, ids, at)
    for ours, theirs in zip(got, want, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    first = {"hook_resid_pre": 2, "hook_mlp_out": 0, "hook_resid_post": 3}[point]
    assert set(calls) == set(range(first, 4))


def test_logits_from_the_hook_on_where_a_block_below_is_hooked():
    model = paired(tiny.add_lora(tiny.model("llama"), [1]).eval(), "blocks.2.hook_resid_post")
    model.pair.model.get_submodule("model.layers.2").register_forward_hook(
        lambda _m, _a, out: out + 0.1 * out.roll(1, -1)
    )
    ids = tiny.token_ids()
    at = torch.tensor([(0, 5), (1, 5)])
    for ours, theirs in zip(model.logits_from(model.activations(ids), ids, at), model.logits(ids, at), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_padding_to_the_right_changes_nothing_before_it(family):
    ids, plain = tiny.token_ids(length=20), tiny.model(family)
    model = paired(tiny.add_lora(tiny.model(family), [1]), "blocks.3.hook_resid_post")
    x_base, x_adapted = model.activations(ids)
    alone_base, alone_adapted = model.activations(ids[1:2, :10])
    assert torch.allclose(x_base[1, :10], alone_base[0], atol=1e-4)
    assert torch.allclose(x_adapted[1, :10], alone_adapted[0], atol=1e-4)
    mask = torch.ones_like(ids)
    mask[1, 10:] = 0
    seen: list = []
    plain.get_submodule(model.hook.module_path).register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.inference_mode():
        plain(ids, attention_mask=mask)
    assert torch.allclose(seen[0][1, :10], x_base[1, :10], atol=1e-4)


def test_shared_blocks_run_once_and_nothing_above_the_hook_runs():
    peft = tiny.add_lora(tiny.model("llama"), [2])
    model = paired(peft, "blocks.2.hook_resid_post")
    calls: Counter[str] = Counter()
    given: list = []
    inner = peft.get_base_model()
    for name, module in inner.named_modules():
        module.register_forward_hook(lambda _m, _a, _o, name=name: calls.update([name]))
    inner.get_submodule("model.layers.2").register_forward_pre_hook(
        lambda _m, _a, kwargs: given.extend(kwargs.values()), with_kwargs=True
    )
    model.activations(tiny.token_ids())
    assert [calls[f"model.layers.{layer}.mlp.down_proj"] for layer in range(4)] == [1, 1, 2, 0]
    assert calls["lm_head"] == calls["model.norm"] == 0
    assert given
    assert not any(isinstance(value, Cache) for value in given)
    calls.clear()
    model.logits(tiny.token_ids())
    assert [calls[f"model.layers.{layer}.mlp.down_proj"] for layer in range(4)] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("targets", "layers", "hook", "remedy"),
    [
        (["c_fc"], [2], "blocks.2.hook_resid_pre", "blocks.2.hook_mlp_out or blocks.2.hook_resid_post"),
        (["c_fc"], [2], "blocks.2.hook_attn_out", "blocks.2.hook_mlp_out or blocks.2.hook_resid_post"),
        (["c_fc"], [2], "blocks.2.hook_resid_mid", "blocks.2.hook_mlp_out or blocks.2.hook_resid_post"),
        (["c_fc"], [2], "transformer.h.2.ln_2", "blocks.2.hook_mlp_out"),
        (["c_fc"], [2], "blocks.2.hook_mlp_out", None),
        (["c_fc"], [2], "transformer.h.2", None),
        (["c_attn"], [2, 3], "blocks.1.hook_resid_post", "blocks.2.hook_attn_out or blocks.2.hook_resid_mid"),
        (["c_attn"], [2, 3], "blocks.2.hook_resid_pre", "first changes layer 2"),
        (["c_attn"], [2, 3], "blocks.2.hook_attn_out", None),
        (["c_attn"], [2, 3], "blocks.2.hook_resid_mid", None),
        (["wte"], None, "blocks.0.hook_resid_pre", None),
        (["lm_head"], None, "blocks.3.hook_resid_post", "lm_head, above the blocks"),
    ],
)
def test_a_hook_that_does_not_see_the_adapter_is_refused(targets, layers, hook, remedy):
    peft = tiny.add_lora(tiny.model("gpt2", tie_word_embeddings=False), layers, targets).eval()
    model = paired(peft, hook)
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert torch.equal(x_base, x_adapted) == (remedy is not None)  # the verdict is true
    if remedy is None:
        model.check_sees_adapter()
    else:
        with pytest.raises(InputError, match=remedy):
            model.check_sees_adapter()


def test_parallel_mlp_does_not_see_the_attention():
    peft = tiny.add_lora(tiny.model("gpt_neox"), [1], ["query_key_value"]).eval()
    model = paired(peft, "blocks.1.hook_mlp_out")
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert torch.equal(x_base, x_adapted)
    with pytest.raises(InputError, match=r"blocks\.1\.hook_attn_out or blocks\.1\.hook_resid_post"):
        model.check_sees_adapter()


def test_an_adapter_that_changes_nothing_is_no_mistake():
    peft = tiny.add_lora(tiny.model("llama"), [1, 2])
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.zeros_(parameter)
    model = paired(peft, "blocks.3.hook_resid_post")
    assert model.pair.first_changed_layer is None
    model.check_sees_adapter()
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert torch.equal(x_base, x_adapted)
    nn.init.ones_(peft.get_parameter("base_model.model.model.layers.2.mlp.up_proj.lora_B.default.weight"))
    assert ModelPair.from_peft(peft).first_changed_layer == 2


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["ln_2"]}, {"lora_bias": True}],
    ids=lambda options: next(iter(options)),
)
def test_other_kinds_of_lora(options):
    peft = tiny.add_lora(tiny.model("gpt2"), [1], ["c_fc"], **options).eval()
    for name, parameter in peft.named_parameters():
        if "modules_to_save" in name and ".h.3." in name:  # the other copies are as they were
            nn.init.normal_(parameter)
    model = paired(peft, "blocks.3.hook_resid_post")
    changed = {"transformer.h.1.mlp.c_fc"} | ({"transformer.h.3.ln_2"} if "modules_to_save" in options else set())
    assert model.pair.changed_modules == changed
    check_against_peft(model, peft)


def test_ia3():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    peft = get_peft_model(tiny.model("llama"), config).eval()  # pyright: ignore[reportArgumentType]
    assert ModelPair.from_peft(peft).first_changed_layer is None
    nn.init.normal_(peft.get_base_model().get_submodule("model.layers.2.mlp.down_proj").ia3_l["default"])  # pyright: ignore
    model = paired(peft, "blocks.2.hook_mlp_out")
    assert model.pair.changed_modules == {"model.layers.2.mlp.down_proj"}
    check_against_peft(model, peft)


def check_against_peft(model: PairedModel, peft) -> None:
    ids, path, where = tiny.token_ids(), model.hook.module_path, model.hook.where
    x_base, x_adapted = model.activations(ids)
    assert torch.equal(x_adapted, plainly(peft.get_base_model(), path, where, ids, peft))
    with peft.disable_adapter():
        assert torch.equal(x_base, plainly(peft.get_base_model(), path, where, ids, peft))
    assert not torch.equal(x_base, x_adapted)


def test_a_model_in_training_is_left_as_it_was():
    peft = tiny.add_lora(tiny.model("gpt2"), [1, 2], lora_dropout=0.5)
    peft.gradient_checkpointing_enable()
    peft.enable_input_require_grads()
    peft.train()
    peft.get_submodule("base_model.model.transformer.drop").eval()  # a mixed state, to be kept as it is
    frozen = peft.get_parameter("base_model.model.transformer.h.1.mlp.c_fc.lora_A.default.weight").requires_grad_(False)

    def state():
        modes = {name: module.training for name, module in peft.named_modules()}
        flags = {name: parameter.requires_grad for name, parameter in peft.named_parameters()}
        hooks = {name: len(module._forward_hooks) for name, module in peft.named_modules()}
        return modes, flags, hooks, {name: "forward" in vars(module) for name, module in peft.named_modules()}

    before, weights = state(), {name: value.clone() for name, value in peft.state_dict().items()}
    model = paired(peft, "blocks.2.hook_resid_post")
    first, second = model.activations(tiny.token_ids()), model.activations(tiny.token_ids())
    assert torch.equal(first[1], second[1])  # no dropout
    model.logits(tiny.token_ids())
    with pytest.raises(IndexError):  # a token that the model does not have
        model.activations(tiny.token_ids() + tiny.VOCAB)
    assert state() == before
    assert not frozen.requires_grad
    assert all(torch.equal(value, weights[name]) for name, value in peft.state_dict().items())
    peft(tiny.token_ids(), labels=tiny.token_ids()).loss.backward()  # training goes on


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    ids, plain = tiny.token_ids(), tiny.model("qwen3").to(dtype)
    peft = tiny.add_lora(tiny.model("qwen3").to(dtype), [2]).eval()
    model = paired(peft, "blocks.2.hook_resid_post")
    x_base, x_adapted = model.activations(ids)
    assert x_base.dtype == x_adapted.dtype == model.dtype == dtype
    assert torch.equal(x_base, plainly(plain, "model.layers.2", "output", ids))
    assert torch.equal(x_adapted, plainly(peft.get_base_model(), "model.layers.2", "output", ids, peft))


def test_an_architecture_outside_the_table_by_its_module_path():
    settings = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "ffn_dim": 16, "vocab_size": 320}
    config = AutoConfig.for_model("opt", word_embed_proj_dim=16, max_position_embeddings=64, **settings)
    peft = tiny.add_lora(AutoModelForCausalLM.from_config(config).eval(), [1], ["fc1"]).eval()
    model = paired(peft, "model.decoder.layers.1")
    assert model.pair.layout.blocks == "model.decoder.layers"
    check_against_peft(model, peft)
    assert model.unembed(model.activations(tiny.token_ids())[0][0]).shape == (20, 320)
    with pytest.raises(InputError, match=r"use model\.decoder\.layers\.1, or any later"):
        paired(peft, "model.decoder.layers.0").check_sees_adapter()


def test_refusals():
    peft = tiny.add_lora(tiny.model("gpt2"), [1])
    model = paired(peft, "blocks.1.hook_mlp_out")
    with pytest.raises(InputError, match=f"{tiny.POSITIONS} positions"):
        model.activations(tiny.token_ids(length=tiny.POSITIONS + 1))
    with pytest.raises(InputError, match="not on the residual stream"):
        model.unembed(torch.zeros(2, tiny.WIDTH))
    with pytest.raises(InputError, match="never calls"):
        paired(peft, "transformer.h.1.attn.c_attn.lora_A.default").activations(tiny.token_ids())
    with pytest.raises(InputError, match="320 tokens, the base model embeds 100"):
        paired(tiny.add_lora(tiny.model("gpt2", vocab_size=100), [1]), "blocks.1.hook_resid_post")
    with pytest.raises(InputError, match="bias='all'"):
        ModelPair.from_peft(tiny.add_lora(tiny.model("gpt2"), [1], bias="all"))
    peft.merge_adapter()
    with pytest.raises(InputError, match="unmerge_adapter"):
        ModelPair.from_peft(peft)
    assert resolve("blocks.1.hook_resid_pre", tiny.model("gpt2")).layer == 1


def test_adapters_in_memory_that_do_more_than_change_modules():
    with pytest.raises(InputError, match="activated LoRA"):
        ModelPair.from_peft(tiny.add_lora(tiny.model("gpt2"), [1], alora_invocation_tokens=[1, 2]))
    prompt = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="PROMPT_TUNING"):
        ModelPair.from_peft(get_peft_model(tiny.model("gpt2"), prompt))  # pyright: ignore[reportArgumentType]
