"""Weight changes of PEFT adapters: what peft itself makes of the base's matrices when it merges them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from autointerp.errors import InputError
from autointerp.evidence.adapters import detect
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.weight_change import WeightChange
from tests import tiny
from tests.evidence.test_weights_only import dense

ALL = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
}
LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.o_proj": 5, "h.1.attn.c_proj": 5},
    "alpha_pattern": {"v_proj": 32, "attn.c_proj": 32, "1.mlp.*": 7},
}
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "r": 3},
    "patterns": PATTERNS,
    "rslora with patterns": {"use_rslora": True, **PATTERNS},
    "dora": {"use_dora": True},
    "dora with patterns": {"use_dora": True, "use_rslora": True, **PATTERNS},
}
IA3 = {
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
}
"""Modules scaled, and those of them whose input is, as in the paper."""


def targets(family: str) -> list[str]:
    return ALL.get(family, LLAMA)


def merged_changes(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """Module → W_adapted − W_base [out, in], as peft itself merges the adapter."""
    before = AutoModelForCausalLM.from_pretrained(base)
    after = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    old, found = dict(before.named_modules()), {}
    for name, module in after.named_modules():
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim == 2:
            change = (module.weight - old[name].weight).detach()
            if change.any():
                flipped = isinstance(module, Conv1D | torch.nn.Embedding)
                found[name] = change.T if flipped else change
    return found


def check_merged(base: Path, adapter: Path) -> dict[str, WeightChange]:
    """All changes that are read, if they are those that peft merges."""
    changes = detect(adapter).weight_changes(adapter, BaseWeights.at(str(base)))
    expected = merged_changes(base, adapter)
    found = {change.module: change for change in changes}
    assert found.keys() == expected.keys()
    assert found.keys() <= set(changes.modules)
    for module, change in expected.items():
        torch.testing.assert_close(dense(found[module]), change, rtol=1e-4, atol=2e-5)
    return found


def save_ia3(path: Path, base: Path, targets: list[str], feedforward: list[str], **options: Any) -> Path:
    """An IA3 folder with random scales."""
    config = IA3Config(target_modules=targets, feedforward_modules=feedforward, task_type="CAUSAL_LM", **options)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model, "ia3_l")
    model.save_pretrained(str(path))
    return path


@torch.no_grad()
def shake(model: torch.nn.Module, part: str) -> None:
    """Adds noise to every parameter of this kind."""
    draw = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if part in name:
            weight.add_(torch.randn(weight.shape, generator=draw))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_changes_are_what_peft_merges(tmp_path: Path, family: str, kind: str) -> None:
    base = tiny.save_model(tmp_path / "base", family)
    found = check_merged(base, tiny.save_lora(tmp_path / "lora", base, [0, 1], targets(family), **KINDS[kind]))
    assert len(found) == 2 * len(set(targets(family))) + 2 * (family == "gpt2")  # c_proj twice in each layer


@pytest.mark.parametrize("family", list(IA3))
def test_ia3_scales_rows_and_columns_of_the_base(tmp_path: Path, family: str) -> None:
    base = tiny.save_model(tmp_path / "base", family)
    adapter = save_ia3(tmp_path / "ia3", base, *IA3[family])
    assert len(check_merged(base, adapter)) == tiny.DEPTH * len(IA3[family][0])
    changes = detect(adapter).weight_changes(adapter, BaseWeights.at(str(base)))
    assert not changes.low_rank
    for _ in changes:
        pass
    # The bias of a module whose output is scaled is scaled too; Llama has none.
    assert changes.left_out == ({} if family == "llama" else {"bias or norm": tiny.DEPTH})


def test_ia3_without_its_base_is_bad_input(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", "llama")
    adapter = save_ia3(tmp_path / "ia3", base, *IA3["llama"])
    with pytest.raises(InputError, match=r"IA3 rescales the base's own weights: give --base a folder with them, or"):
        list(detect(adapter).weight_changes(adapter, None))
    other = tiny.save_model(tmp_path / "other", "llama", intermediate_size=48)
    with pytest.raises(InputError, match=r"does not fit base .*down_proj: scales \[1, 64\] for a matrix \[32, 48\]"):
        list(detect(adapter).weight_changes(adapter, BaseWeights.at(str(other))))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_unembedding_is_a_linear_map_of_its_own_kind(tmp_path: Path, family: str, tied: bool) -> None:
    """In GPT-2 it is stored [out, in], unlike the maps of the blocks; tied, its matrix is the embedding's."""
    base = tiny.save_model(tmp_path / "base", family, tie_word_embeddings=tied)
    square = "attn.c_proj" if family == "gpt2" else "o_proj"
    options = {"layers_to_transform": None, "use_dora": True}
    lora = tiny.add_lora(AutoModelForCausalLM.from_pretrained(base), [], ["lm_head", square], **options)
    lora.save_pretrained(str(tmp_path / "dora"), save_embedding_layers=False)
    changes = detect(tmp_path / "dora").weight_changes(tmp_path / "dora", BaseWeights.at(str(base)))
    found = {change.module: dense(change) for change in changes}
    expected = merged_changes(base, tmp_path / "dora")
    embedding = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
    assert expected.keys() - found.keys() == ({embedding} if tied else set())  # peft merges into both ends
    for module, change in found.items():
        torch.testing.assert_close(change, expected[module], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("kind", ["lora", "ia3"])
@pytest.mark.parametrize(("family", "whole"), [("gpt2", "c_fc"), ("gpt2", "lm_head"), ("llama", "lm_head")])
def test_modules_saved_whole(tmp_path: Path, family: str, whole: str, kind: str) -> None:
    """Conv1D and an unembedding that is tied in the base among them."""
    base = tiny.save_model(tmp_path / "base", family, tie_word_embeddings=True)
    if kind == "ia3":
        config: Any = IA3Config(
            target_modules=IA3[family][0], feedforward_modules=IA3[family][1], modules_to_save=[whole]
        )
    else:
        config = LoraConfig(target_modules=["o_proj", "c_attn"], init_lora_weights=False, modules_to_save=[whole])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    shake(model, "ia3_l")
    shake(model, "modules_to_save")
    model.save_pretrained(str(tmp_path / "adapter"))
    assert any(module.endswith(whole) for module in check_merged(base, tmp_path / "adapter"))


def test_embeddings_and_modules_saved_whole(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", "llama")
    model = tiny.add_lora(
        AutoModelForCausalLM.from_pretrained(base), [1], ["o_proj"], modules_to_save=["lm_head", "embed_tokens"]
    )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(str(tmp_path / "lora"))
    changes = detect(tmp_path / "lora").weight_changes(tmp_path / "lora", BaseWeights.at(str(base)))
    expected = merged_changes(base, tmp_path / "lora")
    found = {change.module: change for change in changes}
    assert found.keys() == expected.keys() == {
        "lm_head", "model.embed_tokens", "model.layers.1.self_attn.o_proj"
    }  # fmt: skip
    for module, change in expected.items():
        torch.testing.assert_close(dense(found[module]), change, rtol=1e-4, atol=2e-5)
    embedding = found["model.embed_tokens"]
    torch.testing.assert_close(
        embedding.outputs @ embedding.outputs.T, dense(embedding) @ dense(embedding).T / tiny.VOCAB
    )
    without = detect(tmp_path / "lora").weight_changes(tmp_path / "lora", None)
    assert [change.module for change in without] == ["model.layers.1.self_attn.o_proj"]
    assert sorted(without.left_out) == [f"{m} (saved whole; needs --base)" for m in ("lm_head", "model.embed_tokens")]


def test_lora_on_an_embedding(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", "gpt2", tie_word_embeddings=False)
    model = tiny.add_lora(AutoModelForCausalLM.from_pretrained(base), [], ["wte"], layers_to_transform=None)
    model.save_pretrained(str(tmp_path / "lora"), save_embedding_layers=False)
    (change,) = detect(tmp_path / "lora").weight_changes(tmp_path / "lora", None)
    torch.testing.assert_close(dense(change), merged_changes(base, tmp_path / "lora")["transformer.wte"])
    assert change.vocabulary == tiny.VOCAB


def test_biases_and_tokens_that_are_left_out_are_counted(tmp_path: Path) -> None:
    """Only those that changed, where the base is at hand."""
    base = tiny.save_model(tmp_path / "base", "gpt2")
    model = tiny.add_lora(
        AutoModelForCausalLM.from_pretrained(base), [1], ["c_proj"], bias="all", trainable_token_indices=[5, 7]
    )
    shake(model, "h.2.ln_1.bias")
    shake(model, "trainable_tokens_delta")
    model.save_pretrained(str(tmp_path / "lora"))
    counted = []
    for at in (BaseWeights.at(str(base)), None):
        changes = detect(tmp_path / "lora").weight_changes(tmp_path / "lora", at)
        assert {change.module for change in changes} == {f"transformer.h.1.{part}.c_proj" for part in ("attn", "mlp")}
        counted.append(dict(changes.left_out))
    n_biases = sum(name.endswith("bias") for name, _ in AutoModelForCausalLM.from_pretrained(base).named_parameters())
    assert counted == [{"bias or norm": n, "trainable tokens": 1} for n in (1, n_biases)]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "VERA"}, "VERA has no weight change of its own"),
        ({"target_parameters": ["mlp.experts.down_proj"]}, "with target_parameters, B A is not what was changed"),
        ({"layer_replication": [[0, 2], [1, 4]]}, "with layer_replication, B A is not"),
        ({"init_lora_weights": "pissa_niter_4"}, "with init_lora_weights=pissa_niter_4, B A is not"),
    ],
)
def test_what_weights_do_not_say(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    base = tiny.save_model(tmp_path / "base", "llama")
    adapter = tiny.save_lora(tmp_path / "lora", base, [1])
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    with pytest.raises(InputError, match=rf"{said}.*use --selector change"):
        detect(adapter).weight_changes(adapter, BaseWeights.at(str(base)))
