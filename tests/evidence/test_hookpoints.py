"""Hook names: what they read, per architecture, and what is refused before any forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from autointerp.errors import InputError
from autointerp.evidence.hookpoints import FAMILIES, POINTS, Layout, resolve
from tests import tiny


def read_points(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """What each hook point of the block reads in one plain forward pass."""
    seen: dict[str, Tensor] = {}

    def keep(point: str, value):
        seen[point] = value[0] if isinstance(value, tuple) else value

    for point in POINTS:
        if point == "hook_resid_mid" and Layout.of(model).parallel:
            continue
        hook = resolve(f"blocks.{layer}.{point}", model)
        module: nn.Module = model.get_submodule(hook.module_path)
        if hook.where == "input":
            module.register_forward_pre_hook(
                lambda _m, args, kwargs, p=point: keep(p, args[0] if args else kwargs["hidden_states"]),
                with_kwargs=True,
            )
        else:
            module.register_forward_hook(lambda _m, _args, output, p=point: keep(p, output))
    with torch.inference_mode():
        states = model(tiny.token_ids(), use_cache=False, output_hidden_states=True).hidden_states
    return seen | {"before": states[layer], "after": states[layer + 1]}


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outputs_are_what_is_added_to_the_stream(family):
    seen = read_points(tiny.model(family), layer=1)
    assert torch.equal(seen["hook_resid_pre"], seen["before"])
    assert torch.equal(seen["hook_resid_post"], seen["after"])
    added = seen["hook_attn_out"] + seen["hook_mlp_out"]
    assert torch.allclose(seen["hook_resid_pre"] + added, seen["hook_resid_post"], atol=1e-4)
    if family != "gpt_neox":
        assert torch.allclose(seen["hook_resid_pre"] + seen["hook_attn_out"], seen["hook_resid_mid"], atol=1e-4)


def test_sequential_gpt_neox_has_a_point_between():
    seen = read_points(tiny.model("gpt_neox", use_parallel_residual=False), layer=2)
    assert torch.allclose(seen["hook_resid_mid"] + seen["hook_mlp_out"], seen["hook_resid_post"], atol=1e-4)


@pytest.mark.parametrize("family", [*tiny.FAMILIES, "gemma3"])
def test_a_config_is_enough(family):
    assert family in FAMILIES
    if family == "gemma3":
        text = tiny.CONFIGS["gemma3_text"] | {"vocab_size": tiny.VOCAB}
        vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
        config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision | {"image_size": 28})
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    else:
        model = tiny.model(family)
    layout = Layout.of(model.config)
    for name in ("blocks.0.hook_resid_pre", "blocks.3.hook_mlp_out", f"{layout.blocks}.2", f"{layout.blocks}.2.mlp"):
        hook = resolve(name, model.config)
        assert hook == resolve(name, model)
        assert hook.module_path in dict(model.named_modules())
    assert resolve(f"{layout.blocks}.2", model).on_stream
    assert not resolve(f"{layout.blocks}.2.mlp", model).on_stream


@pytest.mark.parametrize(
    ("family", "name", "said"),
    [
        ("gpt2", "blocks.9.hook_resid_post", "the model has 4 layers; the last is blocks.3.hook_resid_post"),
        ("gpt2", "transformer.h.4", "the model has 4 layers; the last is transformer.h.3"),
        ("gpt2", "model.layers.1", "blocks.0.hook_resid_pre to blocks.3.hook_resid_post"),
        ("llama", "transformer.h.1", "modules such as model.layers.0 to model.layers.3"),
        ("llama", "blocks.1.hook_resid", "choose one of hook_resid_pre"),
        ("llama", "blocks.1.attn.hook_z", "choose one of hook_resid_pre"),
        ("llama", "ln_final.hook_normalized", "no such point"),
        ("llama", "", "no such point"),
        ("llama", "model.layers", "a list of modules"),
        ("gpt_neox", "blocks.1.hook_resid_mid", "use blocks.1.hook_resid_pre or blocks.1.hook_resid_post"),
        ("opt", "blocks.1.hook_resid_post", "give --hook a module path of the model, e.g. model.decoder.layers.1"),
    ],
)
def test_refused_in_one_line_from_the_config(family, name, said):
    if family == "opt":
        config = AutoConfig.for_model("opt", hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=16)
    else:
        config = tiny.model(family).config
    with pytest.raises(InputError) as refusal:
        resolve(name, config)
    assert said in str(refusal.value)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("family", "module", "place"),
    [
        ("gpt2", "transformer.wpe", (-1, "transformer.wpe")),
        ("gpt2", "transformer.h.2.attn.c_attn", (2, "attn")),
        ("gpt2", "transformer.h.2", (2, "")),
        ("gpt2", "transformer.ln_f", (4, "transformer.ln_f")),
        ("llama", "lm_head", (4, "lm_head")),
        ("gpt_neox", "gpt_neox.final_layer_norm", (4, "gpt_neox.final_layer_norm")),
    ],
)
def test_where_a_module_stands(family, module, place):
    assert Layout.of(tiny.model(family)).place(module) == place
