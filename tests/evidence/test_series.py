"""Which folders make a series, in which order, and which of them is the adapter that is selected on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp.errors import InputError
from autointerp.evidence.adapters import detect
from autointerp.evidence.series import STATE, evenly, resolve
from tests import tiny

WEIGHTS = "adapter_model.safetensors"


def scaled(adapter: Path, path: Path, factor: float) -> Path:
    """A copy of a LoRA that writes `factor` times as much."""
    shutil.copytree(adapter, path)
    weights = load_file(adapter / WEIGHTS)
    save_file({key: w * factor if "lora_B" in key else w for key, w in weights.items()}, path / WEIGHTS)
    return path


@pytest.fixture
def out(tmp_path: Path, gpt2_lora: Path) -> Path:
    """Checkpoints at the steps 2, 10 and 100, as a trainer leaves them."""
    for step in (2, 10, 100):
        folder = scaled(gpt2_lora, tmp_path / "out" / f"checkpoint-{step}", step / 100)
        (folder / STATE).write_text(json.dumps({"global_step": step}))
        torch.save({}, folder / "optimizer.pt")
        torch.save({}, folder / "rng_state.pth")
    (tmp_path / "out" / "runs").mkdir()
    return tmp_path / "out"


def found(path: Path, most: int = 20) -> tuple[str, list[tuple[str, int | None]]]:
    adapter, series = resolve(str(path), most)
    assert not series or adapter in [checkpoint.path for checkpoint in series]
    return Path(adapter).name, [(checkpoint.name, checkpoint.step) for checkpoint in series]


SERIES = [("checkpoint-2", 2), ("checkpoint-10", 10), ("checkpoint-100", 100)]


def test_the_last_checkpoint_is_the_adapter_where_the_folder_holds_none(out: Path):
    assert found(out) == ("checkpoint-100", SERIES), "by number, not by name"


def test_a_checkpoint_is_that_one_alone(out: Path):
    assert found(out / "checkpoint-10") == ("checkpoint-10", [])


@pytest.mark.parametrize("same", ["checkpoint-100", "checkpoint-10"], ids=["the last", "the best"])
def test_a_final_adapter_that_is_one_of_the_checkpoints(out: Path, same: str):
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(out / same / name, out / name)
    (out / "adapter_config.json").write_text(json.dumps(json.loads((out / "adapter_config.json").read_text())))
    assert found(out) == ("out", SERIES)
    _, series = resolve(str(out), 20)
    assert [checkpoint.name for checkpoint in series if checkpoint.path == str(out)] == [same]


@pytest.mark.parametrize("step", [None, 120])
def test_a_final_adapter_of_its_own(out: Path, tmp_path: Path, gpt2_lora: Path, step: int | None):
    for file in scaled(gpt2_lora, tmp_path / "own", 1.2).iterdir():
        shutil.copy(file, out / file.name)
    if step is not None:
        (out / STATE).write_text(json.dumps({"global_step": step}))
    assert found(out) == ("out", [*SERIES, ("final", step)])


def test_a_config_alone_is_no_adapter(out: Path):
    """Some trainers leave it above the checkpoints."""
    shutil.copy(out / "checkpoint-2" / "adapter_config.json", out / "adapter_config.json")
    assert found(out) == ("checkpoint-100", SERIES)


def test_the_layout_of_isaerft(tmp_path: Path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "ISAERFT", "target_hooks": []}')
    (tmp_path / "blocks_manifest.json").write_text('{"block_names": ["blocks_2_hook_resid_post"]}')
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        block = {"sequential.0.bias": torch.full((4,), float(step))}
        torch.save(block, tmp_path / f"checkpoint-{step}" / "blocks_2_hook_resid_post.pt")
    assert found(tmp_path) == ("checkpoint-10", [("checkpoint-9", 9), ("checkpoint-10", 10)])


def test_other_folders_are_no_series(out: Path, gpt2_lora: Path, tmp_path: Path):
    assert found(gpt2_lora) == ("lora", [])
    assert found(tmp_path) == (tmp_path.name, [])
    assert resolve("nobody/such-an-adapter", 20) == ("nobody/such-an-adapter", ())
    for step in (2, 10):
        shutil.rmtree(out / f"checkpoint-{step}")
    assert found(out) == ("checkpoint-100", []), "one is no series, and still the adapter"


def test_many_are_thinned_out(out: Path):
    assert found(out, 2) == ("checkpoint-100", [SERIES[0], SERIES[2]])
    assert found(out, 1) == found(out, 0) == ("checkpoint-100", [])
    assert evenly(range(101), 5, kept=100) == [0, 25, 50, 75, 100]
    assert evenly(range(101), 5, kept=40) == [0, 25, 40, 75, 100]
    for n in range(2, 30):
        for most in range(2, n + 3):
            for kept in range(n):
                chosen = evenly(range(n), most, kept)
                assert chosen == sorted(set(chosen))
                assert len(chosen) == min(n, most)
                assert kept in chosen


def test_a_checkpoint_that_was_cut_off_is_named(out: Path):
    (out / "checkpoint-10" / WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"checkpoint-10.*--checkpoints 0"):
        resolve(str(out), 20)
    assert found(out, 2)[1] == [SERIES[0], SERIES[2]], "one that is not read may be anything"


def test_checkpoints_in_formats_that_nobody_reads(out: Path, gpt2_lora: Path, tmp_path: Path):
    """Such as a sharded trainer's own: the adapter that was saved in the end is labelled all the same."""
    for step in (2, 10, 100):
        for file in (WEIGHTS, "adapter_config.json"):
            (out / f"checkpoint-{step}" / file).unlink()
    with pytest.raises(InputError, match=r"checkpoint-100: no adapter_config\.json"):
        detect(resolve(str(out), 20)[0])
    shutil.copytree(gpt2_lora, out, dirs_exist_ok=True)
    assert found(out) == ("out", [])


def test_whole_models(tmp_path: Path):
    for step in (1, 2):
        tiny.model("gpt2", seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
    assert found(tmp_path) == ("checkpoint-2", [("checkpoint-1", 1), ("checkpoint-2", 2)])
