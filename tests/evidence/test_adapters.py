"""Adapter formats: what is recognised, what is loaded, and what is refused in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from peft.tuners.lora.config import KasaConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.model_pair import PeftPair, TwoModels
from autointerp.evidence.paired import PairedModel
from tests import tiny

HOOK = "blocks.3.hook_resid_post"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def lora(tmp_path: Path, gpt2_lora: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(gpt2_lora, tmp_path / "lora"))


@pytest.fixture
def base(tmp_path: Path, gpt2_base: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(gpt2_base, tmp_path / "base"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensor(file: Path, part: str, edit: Callable[[torch.Tensor], object] | None) -> None:
    """Edits the first tensor whose name contains `part`; None drops it."""
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if part in name)
    if edit is None:
        del tensors[name]
    else:
        edit(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def test_peft_from_disk_is_what_peft_loads(gpt2_base, gpt2_lora):
    assert adapters.detect(gpt2_lora).name == "peft"
    model = PairedModel.load(gpt2_lora, gpt2_base, HOOK, device="cpu")
    assert isinstance(model.pair, PeftPair)
    assert model.pair.first_changed_layer == 1
    plain = AutoModelForCausalLM.from_pretrained(gpt2_base).eval()
    ids = tiny.token_ids()
    base, adapted = model.logits(ids)
    with torch.inference_mode():
        assert torch.equal(base, plain(ids).logits)
        assert torch.equal(adapted, PeftModel.from_pretrained(plain, str(gpt2_lora)).eval()(ids).logits)
    assert not any(parameter.requires_grad for parameter in model.pair.model.parameters())


def test_peft_in_a_bin_file(lora, gpt2_base):
    torch.save(load_file(lora / WEIGHTS), lora / "adapter_model.bin")
    (lora / WEIGHTS).unlink()
    model = PairedModel.load(lora, gpt2_base, HOOK, device="cpu")
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert not torch.equal(x_base, x_adapted)


@pytest.mark.parametrize("options", [{"bias": "all"}, {"init_lora_weights": "pissa"}], ids=["bias", "pissa"])
def test_an_adapter_that_writes_into_the_base_leaves_the_base_side_alone(tmp_path, gpt2_base, options):
    peft = tiny.add_lora(AutoModelForCausalLM.from_pretrained(gpt2_base), [2], **options).eval()
    if "bias" in options:
        torch.nn.init.normal_(peft.get_parameter("base_model.model.transformer.h.1.mlp.c_proj.bias"))
    peft.save_pretrained(str(tmp_path / "lora"))
    model = PairedModel.load(tmp_path / "lora", gpt2_base, HOOK, device="cpu")
    assert isinstance(model.pair, TwoModels)
    assert model.pair.first_changed_layer == (1 if "bias" in options else 2)
    ids = tiny.token_ids()
    base, adapted = model.logits(ids)
    with torch.inference_mode():
        assert torch.equal(base, AutoModelForCausalLM.from_pretrained(gpt2_base).eval()(ids).logits)
        assert torch.allclose(adapted, peft(ids).logits, atol=1e-4)


def test_kasa_truncates_the_base_and_not_the_base_side(tmp_path):
    """PEFT does so whenever such an adapter is put in, also when one is loaded."""
    base = tiny.save_model(tmp_path / "base", "llama")
    tiny.save_lora(tmp_path / "lora", base, [2], kasa_config=KasaConfig())
    model = PairedModel.load(tmp_path / "lora", base, HOOK, device="cpu")
    ids = tiny.token_ids()
    with torch.inference_mode():
        assert torch.equal(model.logits(ids)[0], AutoModelForCausalLM.from_pretrained(base).eval()(ids).logits)
    assert model.pair.first_changed_layer == 2


def test_a_checkpoint_keeps_equal_weights_once(tmp_path, gpt2_base):
    tuned = AutoModelForCausalLM.from_pretrained(gpt2_base).eval()
    torch.nn.init.normal_(tuned.get_parameter("transformer.h.2.mlp.c_fc.weight"))
    tuned.save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    assert (tmp_path / "tuned" / "model.safetensors.index.json").is_file()
    assert adapters.detect(tmp_path / "tuned").name == "checkpoint"
    model = PairedModel.load(tmp_path / "tuned", gpt2_base, HOOK, device="cpu")
    assert model.pair.changed_modules == {"transformer.h.2.mlp.c_fc"}
    assert model.pair.first_changed_layer == 2
    ids = tiny.token_ids()
    base, adapted = model.logits(ids)
    with torch.inference_mode():
        assert torch.equal(base, AutoModelForCausalLM.from_pretrained(gpt2_base).eval()(ids).logits)
        assert torch.equal(adapted, tuned(ids).logits)
    with model.pair.base() as ours, model.pair.adapted() as theirs:
        own = {name for name, weight in theirs.named_parameters() if weight is not ours.get_parameter(name)
               and weight.data_ptr() != ours.get_parameter(name).data_ptr()}  # fmt: skip
    assert own == {"transformer.h.2.mlp.c_fc.weight"}


def test_a_checkpoint_equal_to_its_base_changes_nothing(gpt2_base, base):
    assert PairedModel.load(base, gpt2_base, HOOK, device="cpu").pair.first_changed_layer is None


def test_a_checkpoint_with_added_tokens(tmp_path, gpt2_base):
    tuned = AutoModelForCausalLM.from_pretrained(gpt2_base)
    tuned.resize_token_embeddings(tiny.VOCAB + 8)
    torch.nn.init.normal_(tuned.get_parameter("transformer.h.1.mlp.c_fc.weight"))
    tuned.save_pretrained(tmp_path / "tuned")
    model = PairedModel.load(tmp_path / "tuned", gpt2_base, HOOK, device="cpu")
    assert model.pair.first_changed_layer == 1
    base, adapted = model.logits(tiny.token_ids())
    assert base.shape == adapted.shape


def test_the_base_that_an_adapter_names(lora, base, monkeypatch):
    peft = adapters.ADAPTERS.get("peft")
    for written, found in [
        (str(base), str(base.resolve())),
        ("../base", str(base.resolve())),
        ("openai-community/gpt2", "openai-community/gpt2"),
        (None, None),
    ]:
        edit_json(lora / "adapter_config.json", base_model_name_or_path=written)
        assert peft.base_of(lora) == found
    monkeypatch.chdir(base.parent)
    edit_json(lora / "adapter_config.json", base_model_name_or_path="base")
    assert peft.base_of(lora) == str(base.resolve())
    checkpoint = adapters.ADAPTERS.get("checkpoint")
    assert checkpoint.base_of(base) is None
    edit_json(base / "config.json", _name_or_path="openai-community/gpt2")
    assert checkpoint.base_of(base) == "openai-community/gpt2"


def test_the_hash_is_of_the_content(gpt2_lora, lora):
    peft = adapters.ADAPTERS.get("peft")
    (lora / "README.md").write_text("another")
    assert peft.sha256(lora) == peft.sha256(gpt2_lora)
    edit_tensor(lora / WEIGHTS, "lora_B", lambda weight: weight[0, 0].add_(1))
    assert peft.sha256(lora) != peft.sha256(gpt2_lora)


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def cut(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def as_bin(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04cos\nsystem\n.")


def nested(folder: Path) -> None:
    shutil.copytree(folder, folder / "checkpoint-20")
    (folder / "adapter_config.json").unlink()
    (folder / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("adapter_config.json"), f"{WEIGHTS} without adapter_config.json"),
        (without(WEIGHTS), f"adapter_config.json without {WEIGHTS}"),
        (cut(WEIGHTS), f"{WEIGHTS}: damaged"),
        (cut("adapter_config.json"), "adapter_config.json: not readable JSON"),
        (lambda folder: (folder / "adapter_config.json").write_text("{}"), "no peft_type"),
        (
            lambda folder: edit_tensor(folder / WEIGHTS, "lora_B", lambda w: w.fill_(torch.nan)),
            "lora_B.weight holds NaN",
        ),
        (
            lambda folder: edit_tensor(folder / WEIGHTS, "lora_A", lambda w: w[0].fill_(torch.inf)),
            "lora_A.weight holds",
        ),
        (as_bin, "damaged, or not plain tensors"),
        (nested, "checkpoint-20"),
    ],
)
def test_damaged_adapters_are_refused_when_detected(lora, damage, said):
    damage(lora)
    refused(lambda: adapters.detect(lora), said)


def test_folders_that_hold_no_adapter(tmp_path, lora, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    refused(lambda: adapters.detect(tmp_path / "empty"), "no adapter_config.json")
    refused(lambda: adapters.detect(tmp_path / "missing"), "no such folder")
    refused(lambda: adapters.detect(lora / WEIGHTS), "is a file")
    refused(lambda: adapters.detect("nobody/such-an-adapter"), "not to be had from the hub")


def test_damaged_checkpoints_are_refused_when_detected(tmp_path, base):
    sharded = tmp_path / "sharded"
    tiny.model("gpt2").save_pretrained(sharded, max_shard_size="60KB")
    (first := sorted(sharded.glob("*.safetensors"))[0]).unlink()
    refused(lambda: adapters.detect(sharded), f"names {first.name}, which is missing")
    cut("model.safetensors")(base)
    refused(lambda: adapters.detect(base), "model.safetensors: damaged")
    (base / "model.safetensors").unlink()
    refused(lambda: adapters.detect(base), "config.json without model.safetensors")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "NOT_YET"}, "not one that this peft reads"),
        ({"target_modules": ["q_proj"]}, "does not fit base"),
        ({"r": 3, "rank_pattern": {}}, "size mismatch"),
        ({"layers_to_transform": [0, 1, 3]}, "some of its layers have no weights"),
        ({"alora_invocation_tokens": [1, 2]}, "activated LoRA"),
    ],
)
def test_adapters_that_cannot_be_loaded(lora, gpt2_base, changes, said):
    edit_json(lora / "adapter_config.json", **changes)
    refused(lambda: PairedModel.load(lora, gpt2_base, HOOK, device="cpu"), said)


def test_adapters_of_prompts_are_refused(tmp_path, gpt2_base):
    config = PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")  # pyright: ignore[reportArgumentType]
    get_peft_model(tiny.model("gpt2"), config).save_pretrained(str(tmp_path / "prefix"))
    refused(lambda: PairedModel.load(tmp_path / "prefix", gpt2_base, HOOK, device="cpu"), "PREFIX_TUNING")


def test_another_models_adapter_or_checkpoint(tmp_path, gpt2_base, gpt2_lora):
    llama = tiny.save_model(tmp_path / "llama", "llama")
    wide = tiny.save_model(tmp_path / "wide", "gpt2", n_embd=64)
    refused(lambda: PairedModel.load(gpt2_lora, llama, HOOK, device="cpu"), "does not fit base")
    refused(lambda: PairedModel.load(gpt2_base, llama, HOOK, device="cpu"), "is a gpt2, base")
    refused(lambda: PairedModel.load(gpt2_base, wide, HOOK, device="cpu"), "has shape [320, 32], in the base [320, 64]")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("config.json"), "no config.json"),
        (cut("config.json"), "not readable JSON"),
        (without("model.safetensors"), "no file named model.safetensors"),
        (cut("model.safetensors"), "damaged"),
        (
            lambda folder: edit_tensor(folder / "model.safetensors", "c_fc", lambda w: w[0].fill_(torch.nan)),
            "holds NaN",
        ),
        (lambda folder: edit_tensor(folder / "model.safetensors", "c_fc", None), "1 missing"),
        (lambda folder: edit_json(folder / "config.json", model_type="novel"), "novel"),
        (without("tokenizer.json"), "no tokenizer in"),
        (cut("tokenizer.json"), "tokenizer of"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_damaged_bases_are_refused(lora, base, damage, said):
    damage(base)
    refused(lambda: PairedModel.load(lora, base, HOOK, device="cpu"), said)


def test_hooks_dtypes_devices_and_hub_ids_are_refused_before_weights_are_read(gpt2_lora, base, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(lambda: PairedModel.load(gpt2_lora, "nobody/such-a-base", HOOK), "base nobody/such-a-base")
    refused(lambda: PairedModel.load(gpt2_lora, base, HOOK, dtype="int8"), "dtype 'int8'")
    refused(lambda: PairedModel.load(gpt2_lora, base, HOOK, device="gpu"), "device gpu")
    (base / "model.safetensors").unlink()
    refused(lambda: PairedModel.load(gpt2_lora, base, "blocks.4.hook_resid_pre"), "the last is blocks.3.hook_resid_pre")


def test_the_tokenizer_beside_the_adapter(lora, base):
    for file in base.glob("tokenizer*"):
        shutil.move(file, lora / file.name)
    model = PairedModel.load(lora, base, HOOK, device="cpu")
    assert len(model.tokenizer) == tiny.VOCAB


def test_only_the_adapter_has_a_chat_template(lora, gpt2_base):
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(lora)
    model = PairedModel.load(lora, gpt2_base, HOOK, device="cpu")
    assert model.tokenizer.chat_template == tokenizer.chat_template


def refused(action: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError) as refusal:
        action()
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)
