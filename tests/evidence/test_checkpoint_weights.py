"""Whole checkpoints: the difference of the files is the change; the same latents as from the adapter merged into it."""

from __future__ import annotations

import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from autointerp.demo import ORGANISM
from autointerp.errors import InputError
from autointerp.evidence.adapters import detect
from autointerp.evidence.tensor_files import BaseWeights, Tensors
from tests import tiny
from tests.evidence.test_weights_only import dense, organism_run, scores_of


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's adapter merged into its base, in shards."""
    path = tmp_path_factory.mktemp("merged") / "model"
    base = AutoModelForCausalLM.from_pretrained(ORGANISM / "model")
    model = PeftModel.from_pretrained(base, str(ORGANISM / "adapter")).merge_and_unload()
    model.save_pretrained(path, max_shard_size="1MB")  # pyright: ignore[reportCallIssue]
    return path


def test_a_merged_adapter_gives_what_the_adapter_gives(merged: Path) -> None:
    assert len(list(merged.glob("model-*.safetensors"))) > 1
    lora, whole = scores_of(organism_run(ORGANISM / "adapter")), scores_of(organism_run(merged))
    for field in ("writes", "reads", "statistic"):
        np.testing.assert_allclose(getattr(whole, field), getattr(lora, field), rtol=1e-2, atol=1e-3)
    top = [set(np.argsort(-scores.statistic)[:50].tolist()) for scores in (lora, whole)]
    assert len(top[0] & top[1]) >= 49


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("form", ["safetensors", "bin", "without the first component"])
def test_changes_are_the_differences(tmp_path: Path, family: str, form: str) -> None:
    base = tiny.save_model(tmp_path / "base", family)
    model = AutoModelForCausalLM.from_pretrained(base)
    changed = ["c_fc", "wte", "ln_1"] if family == "gpt2" else ["gate_proj", "embed_tokens", "input_layernorm"]
    expected = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            module, _, kind = name.rpartition(".")
            if kind == "weight" and any(part in name for part in changed) and ".2." not in name:
                step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(name)))
                weight.add_(step)
                if weight.ndim == 2:
                    expected[module] = step.T if family == "gpt2" or "embed" in name else step
                if name.endswith("wte.weight"):  # tied
                    expected["lm_head"] = step
    adapted = tmp_path / "adapted"
    model.save_pretrained(adapted)
    if form != "safetensors":
        tensors = load_file(adapted / "model.safetensors")
        if form == "bin":
            torch.save(tensors, adapted / "pytorch_model.bin")
        else:
            prefix = "transformer." if family == "gpt2" else "model."
            torch.save({k.removeprefix(prefix): v for k, v in tensors.items()}, adapted / "pytorch_model.bin")
        (adapted / "model.safetensors").unlink()
    changes = detect(adapted).weight_changes(adapted, BaseWeights.at(str(base)))
    found = {change.module: dense(change) for change in changes}
    assert found.keys() == expected.keys()
    for module, change in expected.items():
        torch.testing.assert_close(found[module], change, rtol=1e-4, atol=1e-5)
    assert changes.left_out == {"bias or norm": 3}


def test_vocabularies_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding's forms add up over blocks of tokens; tokens that were added have no counterpart."""
    base = tiny.save_model(tmp_path / "base", "llama")
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(tiny.VOCAB + 7, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)  # pyright: ignore[reportCallIssue]
    model.save_pretrained(tmp_path / "adapted")
    plain = Tensors.blocks
    monkeypatch.setattr(Tensors, "blocks", lambda self, name: plain(self, name, 100 * tiny.WIDTH))
    found = list(detect(tmp_path / "adapted").weight_changes(tmp_path / "adapted", BaseWeights.at(str(base))))
    assert {change.module for change in found} == {"model.embed_tokens"}
    assert [change.left.shape[1] for change in found] == [100, 100, 100, 20]
    E = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    total = sum((change.outputs @ change.outputs.T for change in found), torch.zeros(()))
    torch.testing.assert_close(total, 0.25 * E.T @ E / tiny.VOCAB, rtol=1e-3, atol=1e-5)


def test_one_matrix_of_each_side_is_in_memory_at_a_time(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that were read and not yet let go, at every read."""
    alive: dict[int, int] = {}
    most = 0
    plain = Tensors.read

    def read(self: Tensors, name: str, rows: slice = slice(None)) -> torch.Tensor:
        nonlocal most
        found = plain(self, name, rows)
        key, storage = id(found), found.untyped_storage()
        alive[key] = storage.nbytes()
        weakref.finalize(found, alive.pop, key)
        most = max(most, sum(alive.values()))
        return found

    monkeypatch.setattr(Tensors, "read", read)
    for _ in detect(merged).weight_changes(merged, BaseWeights.at(str(ORGANISM / "model"))):
        pass
    largest = 4096 * 128 * 4  # the embedding
    assert 0 < most <= 2 * largest


def test_what_does_not_fit_is_bad_input(tmp_path: Path, merged: Path) -> None:
    with pytest.raises(InputError, match=r"is a whole model.*give --base a folder, or use --selector change"):
        scores_of(organism_run(merged, base="nobody/has-this"))
    other = tiny.save_model(tmp_path / "other", "llama")
    with pytest.raises(InputError, match=r"is a gpt2, base .* a llama: give --base"):
        scores_of(organism_run(merged, base=str(other)))
    small = tiny.save_model(tmp_path / "small", "gpt2")
    with pytest.raises(InputError, match=r"has shape .*, in the base .*: give --base the model it came from"):
        scores_of(organism_run(merged, base=str(small)))
    poisoned = Path(shutil.copytree(merged, tmp_path / "poisoned"))
    index = json.loads((poisoned / "model.safetensors.index.json").read_text())["weight_map"]
    name = "transformer.h.2.mlp.c_proj.weight"
    tensors = load_file(poisoned / index[name])
    tensors[name][3, 3] = float("inf")
    save_file(tensors, poisoned / index[name], {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} holds NaN or infinite weights"):
        scores_of(organism_run(poisoned))
