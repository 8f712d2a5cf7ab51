"""Several PEFT adapters active together: what peft does with them in memory, from disk, by the model and by weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from autointerp import in_memory
from autointerp.errors import InputError
from autointerp.evidence.adapters import ADAPTERS, detect, together
from autointerp.evidence.model_pair import PeftPair, TwoModels
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.series import resolve
from autointerp.evidence.tensor_files import BaseWeights
from tests import tiny
from tests.evidence.test_weights_only import dense

HOOK = "blocks.3.hook_resid_post"


def lora(layers: list[int], **options: Any) -> LoraConfig:
    options = {"r": 2, "lora_alpha": 4, "target_modules": tiny.LINEAR["gpt2"], "task_type": "CAUSAL_LM"} | options
    return LoraConfig(layers_to_transform=layers, **options)


def with_adapters(base: Path, configs: dict[str, Any]) -> PeftModel:
    """All of them active, none of them without effect."""
    first, *others = configs
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(base), configs[first], first)
    for name in others:
        model.add_adapter(name, configs[name])
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name or "ia3_" in name:
                weight.copy_(torch.randn(weight.shape, generator=draw))
    model.base_model.set_adapter([*configs])
    return model.eval()


@pytest.fixture
def saved(tmp_path: Path, gpt2_base: Path) -> Path:
    """Adapters `default` (layer 1) and `lora` (layers 1 and 2), as peft saves them."""
    with_adapters(gpt2_base, {"default": lora([1]), "lora": lora([1, 2], r=3)}).save_pretrained(str(tmp_path / "out"))
    return tmp_path / "out"


def outputs(folder: Path | str, base: Path) -> tuple[torch.Tensor, torch.Tensor]:
    return PairedModel.load(folder, base, HOOK, device="cpu").logits(tiny.token_ids())


@pytest.mark.parametrize("names", [("default", "lora"), ("first", "second", "third")])
def test_they_do_what_peft_has_them_do(tmp_path: Path, gpt2_base: Path, names: tuple[str, ...]) -> None:
    """Names that are part of peft's own parameter names among them."""
    model = with_adapters(gpt2_base, {name: lora([1, k], r=k + 1) for k, name in enumerate(names, start=1)})
    model.save_pretrained(str(tmp_path / "out"))
    assert detect(tmp_path / "out").name == "peft-several"
    pair = PairedModel.load(tmp_path / "out", gpt2_base, HOOK, device="cpu").pair
    assert isinstance(pair, PeftPair)
    base, adapted = outputs(tmp_path / "out", gpt2_base)
    with torch.inference_mode():
        torch.testing.assert_close(adapted, model(tiny.token_ids()).logits)
        assert torch.equal(base, AutoModelForCausalLM.from_pretrained(gpt2_base).eval()(tiny.token_ids()).logits)


def test_one_folder_and_its_parts_one_by_one(saved: Path, gpt2_base: Path, tmp_path: Path) -> None:
    format = ADAPTERS.get("peft-several")
    for name in ("default", "other"):
        (tmp_path / name).mkdir()
    for file in saved.glob("adapter_*"):
        shutil.copy(file, tmp_path / "default" / file.name)
    shutil.copytree(saved / "lora", tmp_path / "other", dirs_exist_ok=True)
    parts = together([str(tmp_path / "default"), str(tmp_path / "other")])
    assert detect(parts).name == "peft-several"
    assert torch.equal(outputs(parts, gpt2_base)[1], outputs(saved, gpt2_base)[1])
    assert format.sha256(parts) == format.sha256(saved) != ADAPTERS.get("peft").sha256(saved)
    assert format.base_of(parts) == format.base_of(saved) == str(gpt2_base)
    names = [[member.name for member in format.members(spec)] for spec in (saved, parts)]
    assert names == [["default", "lora"], ["default", "other"]]
    assert format.members(saved)[1].sha256 == ADAPTERS.get("peft").sha256(tmp_path / "other")
    assert "default and lora are taken as active together" in str(format.assumed(saved))
    assert format.assumed(parts) is None


@pytest.mark.parametrize(("trained", "reference"), [("default", "ref"), ("trainable", "reference")])
def test_the_reference_of_a_preference_training_is_left_out(
    tmp_path: Path, gpt2_base: Path, trained: str, reference: str
) -> None:
    """As TRL leaves it: the adapter trained further, and beside it the frozen copy that it began as."""
    model = with_adapters(gpt2_base, {trained: lora([1]), reference: lora([1])})
    model.save_pretrained(str(tmp_path / "out"))
    alone = tmp_path / "out" / ("" if trained == "default" else trained)
    found = detect(tmp_path / "out")
    assert torch.equal(outputs(tmp_path / "out", gpt2_base)[1], outputs(alone, gpt2_base)[1])
    assert found.members(tmp_path / "out") == []
    assert found.sha256(tmp_path / "out") == ADAPTERS.get("peft").sha256(alone)
    assert f"{reference}, taken for the frozen reference" in str(found.assumed(tmp_path / "out"))
    both = together([str(alone), str(tmp_path / "out" / reference)])
    assert [member.name for member in detect(both).members(both)][1:] == [reference]
    assert not torch.equal(outputs(both, gpt2_base)[1], outputs(alone, gpt2_base)[1])
    shutil.rmtree(tmp_path / "out" / reference)
    assert detect(alone).assumed(alone) is None


def test_several_beside_a_reference(tmp_path: Path, gpt2_base: Path) -> None:
    configs = {"default": lora([1]), "other": lora([2]), "ref": lora([1])}
    with_adapters(gpt2_base, configs).save_pretrained(str(tmp_path / "out"))
    found = detect(tmp_path / "out")
    assert [member.name for member in found.members(tmp_path / "out")] == ["default", "other"]
    said = str(found.assumed(tmp_path / "out"))
    assert "default and other are taken as active together" in said
    assert "ref, taken for the frozen reference" in said


def test_changes_of_one_module_add_up(saved: Path, gpt2_base: Path) -> None:
    base = BaseWeights.at(str(gpt2_base))
    changes = detect(saved).weight_changes(saved, base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(gpt2_base), str(saved), "one")
    model.load_adapter(str(saved / "lora"), "two")
    model.base_model.set_adapter(["one", "two"])  # pyright: ignore
    merged = dict(model.merge_and_unload().named_parameters())  # pyright: ignore
    plain = dict(AutoModelForCausalLM.from_pretrained(gpt2_base).named_parameters())
    expected = {
        name.removesuffix(".weight"): (weight - plain[name]).T.detach()
        for name, weight in merged.items()
        if not torch.equal(weight, plain[name])
    }
    found = {change.module: change for change in changes}
    assert found.keys() == expected.keys() == set(changes.modules)
    assert sum(change.right is not None and len(change.right) == 5 for change in found.values()) == 2
    for module, change in expected.items():
        torch.testing.assert_close(dense(found[module]), change, rtol=1e-4, atol=2e-5)
    assert len(list(changes)) == len(found), "they can be gone through again"


def test_one_that_writes_into_the_base_leaves_the_base_side_alone(tmp_path: Path, gpt2_base: Path) -> None:
    model = with_adapters(gpt2_base, {"a": lora([1], bias="lora_only"), "b": lora([2])})
    torch.nn.init.normal_(model.get_parameter("base_model.model.transformer.h.1.mlp.c_fc.base_layer.bias"))
    model.save_pretrained(str(tmp_path / "out"))
    assert isinstance(PairedModel.load(tmp_path / "out", gpt2_base, HOOK, device="cpu").pair, TwoModels)
    base, adapted = outputs(tmp_path / "out", gpt2_base)
    with torch.inference_mode():
        assert torch.equal(base, AutoModelForCausalLM.from_pretrained(gpt2_base).eval()(tiny.token_ids()).logits)
        torch.testing.assert_close(adapted, model(tiny.token_ids()).logits, rtol=1e-3, atol=1e-3)


def test_adapters_that_were_saved_by_themselves_are_not_taken_together(
    saved: Path, gpt2_lora: Path, tmp_path: Path
) -> None:
    """Each with a model card of its own, as those of several trainings; and what a trainer kept beneath its last."""
    for name in ("monday", "tuesday"):
        shutil.copytree(gpt2_lora, tmp_path / "runs" / name)
    with pytest.raises(InputError, match=r"give --adapter .*tuesday, or --adapter once for each of those"):
        detect(tmp_path / "runs")
    shutil.copytree(tmp_path / "runs" / "monday", saved / "best")
    assert [member.name for member in ADAPTERS.get("peft-several").members(saved)] == ["default", "lora"]
    shutil.rmtree(saved / "lora")
    shutil.copytree(gpt2_lora, saved / "checkpoint-5")
    (saved / "checkpoint-5" / "README.md").unlink()
    assert detect(saved).name == "peft"


def test_a_series_of_them(saved: Path) -> None:
    """Trainers save all adapters at each checkpoint."""
    out = saved.parent / "training"
    for step in (10, 20):
        shutil.copytree(saved, out / f"checkpoint-{step}")
    final, series = resolve(str(out), 20)
    assert Path(final).name == "checkpoint-20"
    assert [checkpoint.step for checkpoint in series] == [10, 20]
    shutil.copytree(saved, out, dirs_exist_ok=True)
    assert resolve(str(out), 20)[0] == str(out)
    shutil.rmtree(out / "checkpoint-10" / "lora")
    with pytest.raises(InputError, match=r"holds several adapters, its checkpoint-10 one: .*--checkpoints 0"):
        resolve(str(out), 20)
    assert resolve(str(out), 0) == (str(out), ())


def edit(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_active_together(saved: Path, gpt2_base: Path, tmp_path: Path) -> None:
    several = ADAPTERS.get("peft-several")
    edit(saved / "lora", base_model_name_or_path="nobody/another")
    with pytest.raises(InputError, match=r"out names base .*, .*lora names nobody/another: .*give it with --base"):
        several.base_of(saved)
    edit(saved / "lora", base_model_name_or_path=None)
    assert several.base_of(saved) == str(gpt2_base)
    edit(saved / "lora", peft_type="LOHA")
    with pytest.raises(InputError, match=r"out is of PEFT type LORA, .*lora of LOHA: only adapters of one type"):
        detect(saved)
    (saved / "lora" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"lora: adapter_config\.json without adapter_model\.safetensors"):
        detect(saved)
    base_and_series = [str(saved), str(tmp_path / "series")]
    (tmp_path / "series" / "checkpoint-10").mkdir(parents=True)
    (tmp_path / "series" / "checkpoint-9").mkdir()
    with pytest.raises(InputError, match=r"only PEFT adapters .*--adapter one of its checkpoints, .*checkpoint-10$"):
        detect(together(base_and_series))
    with pytest.raises(InputError, match="is named twice"):
        together([str(saved), str(saved)])
    with pytest.raises(InputError, match="stands between adapters; rename"):
        together([str(saved), "a + b"])


@pytest.mark.parametrize(
    ("configs", "said"),
    [
        ({"a": lora([1]), "b": lora([2], use_dora=True)}, "b: DoRA rescales what the other adapters add, too"),
        (
            {name: IA3Config(target_modules=["c_attn"], feedforward_modules=[]) for name in "ab"},
            "a: IA3 rescales what the other adapters add, too",
        ),
    ],
)
def test_weights_that_do_not_add_up(tmp_path: Path, gpt2_base: Path, configs: dict[str, Any], said: str) -> None:
    model = with_adapters(gpt2_base, configs)
    model.save_pretrained(str(tmp_path / "out"))
    with pytest.raises(InputError, match=rf"{said}; use --selector change"):
        detect(tmp_path / "out").weight_changes(tmp_path / "out", BaseWeights.at(str(gpt2_base)))
    with torch.inference_mode():
        torch.testing.assert_close(outputs(tmp_path / "out", gpt2_base)[1], model(tiny.token_ids()).logits)


def test_modules_of_which_only_one_can_be_active(tmp_path: Path, gpt2_base: Path) -> None:
    for name in "ab":
        config = lora([1], modules_to_save=["lm_head"])
        get_peft_model(AutoModelForCausalLM.from_pretrained(gpt2_base), config).save_pretrained(str(tmp_path / name))
    spec = together([str(tmp_path / name) for name in "ab"])
    with pytest.raises(InputError, match=r"both hold a lm_head of their own; give --adapter one of them"):
        detect(spec).weight_changes(spec, BaseWeights.at(str(gpt2_base)))
    with pytest.raises(InputError, match=r"cannot be active together .*Only one .*give --adapter one of them"):
        PairedModel.load(spec, gpt2_base, HOOK, device="cpu")


def test_a_model_in_memory_is_saved_as_it_acts(tmp_path: Path, gpt2_base: Path) -> None:
    """Into a folder that held others, too."""
    model = with_adapters(gpt2_base, {"default": lora([1]), "b": lora([2]), "c": lora([3])})
    folder = tmp_path / "adapter"
    for active in (["default", "b"], ["b", "c"], ["default"], ["c"], ["b", "c"]):
        model.base_model.set_adapter(active)  # pyright: ignore
        written = in_memory.save(model, folder)
        with torch.inference_mode():
            torch.testing.assert_close(outputs(written, gpt2_base)[1], model(tiny.token_ids()).logits)
        found = [member.name for member in detect(written).members(written)]
        assert found == (active if len(active) > 1 else [])
