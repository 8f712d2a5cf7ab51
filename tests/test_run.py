"""Run: run.yaml, flags and detection, and the id that a repeated command finds again."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from autointerp.errors import InputError
from autointerp.run import Run

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an adapter `run/`, its base model, a SAE and a corpus."""
    monkeypatch.chdir(tmp_path)
    for folder in ("run", "base", "sae"):
        (tmp_path / folder).mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(tmp_path / "base"),
        "r": 2,
        "target_modules": ["c_attn"],
    }
    (tmp_path / "run/adapter_config.json").write_text(json.dumps(config))
    prefix = "base_model.model.transformer.h.0.attn.c_attn.lora"
    weights = {f"{prefix}_A.weight": torch.ones(2, 4), f"{prefix}_B.weight": torch.ones(12, 2)}
    save_file(weights, tmp_path / "run/adapter_model.safetensors")
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "sae/cfg.json").write_text(json.dumps({"d_in": 4, "d_sae": 8, "metadata": {"hook_name": HOOK}}))
    save_file({"W_enc": torch.ones(4, 8)}, tmp_path / "sae/sae_weights.safetensors")
    (tmp_path / "corpus.jsonl").write_text('{"text": "hello"}\n')
    return tmp_path


def test_flags_alone(home: Path) -> None:
    run = Run.load("run", sae="sae", corpus="corpus.jsonl", context_length=64, top=7, selector="random", seed=None)
    assert run.path == home / "run"
    assert (run.base, run.adapter, run.adapter_format) == (str(home / "base"), str(home / "run"), "peft")
    assert (run.sae, run.corpus, run.hook) == (str(home / "sae"), str(home / "corpus.jsonl"), HOOK)
    assert (run.text_column, run.context_length, run.max_tokens) == ("text", 64, 1_000_000)
    assert (run.settings.top, run.settings.selector, run.settings.seed) == (7, ("random",), 0)
    assert len(run.adapter_sha256) == 64


def test_yaml_paths_are_relative_to_it_and_a_flag_wins(home: Path) -> None:
    (home / "look").mkdir()
    (home / "look/texts.txt").write_text("hello")
    text = "adapter: ../run\nsae: ../sae\ncorpus: texts.txt\ncontext_length: 32\nhook:\nbase: some-org/base\n"
    (home / "look/run.yaml").write_text(text)
    for path in ("look", "look/run.yaml", home / "look"):
        run = Run.load(path)
        assert (run.adapter, run.corpus) == (str(home / "run"), str(home / "look/texts.txt"))
        assert (run.context_length, run.hook, run.base) == (32, HOOK, "some-org/base")
    run = Run.load("look", corpus="corpus.jsonl", context_length=16, hook="blocks.0.hook_resid_post", base="gpt2")
    assert (run.corpus, run.context_length, run.base) == (str(home / "corpus.jsonl"), 16, "gpt2")
    assert run.hook == "blocks.0.hook_resid_post"


def test_run_id_depends_on_content_and_settings_not_on_place_or_time(home: Path) -> None:
    def run_id(root: Path = home, **flags: Any) -> str:
        return Run.load(
            root / "run", **({"sae": root / "sae", "corpus": root / "corpus.jsonl", "base": "gpt2"} | flags)
        ).run_id

    first = run_id()
    assert len(first) == 12
    assert run_id() == first
    assert run_id(device="cpu", scratch=home) == first
    changes: list[dict[str, Any]] = [
        {"top": 3},
        {"seed": 1},
        {"fdr": 0.1},
        {"dtype": "bfloat16"},
        {"selector": "random"},
    ]
    changes += [
        {"max_tokens": 999},
        {"context_length": 64},
        {"hook": "blocks.0.hook_resid_post"},
        {"base": "distilgpt2"},
    ]
    assert len({run_id(**change) for change in changes} | {first}) == len(changes) + 1
    copy = home / "elsewhere"
    shutil.copytree(home / "sae", copy / "sae")
    shutil.copytree(home / "run", copy / "run")
    shutil.copy(home / "corpus.jsonl", copy / "corpus.jsonl")
    assert run_id(copy) == first
    save_file({"W_enc": torch.zeros(4, 8)}, copy / "sae/sae_weights.safetensors")  # trained anew, same size
    assert run_id(copy) != first


def test_weights_only_needs_neither_corpus_nor_base(home: Path) -> None:
    config = json.loads((home / "run/adapter_config.json").read_text())
    (home / "run/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    run = Run.load("run", sae="sae", need=())
    assert run.corpus is None
    assert run.base is None
    with pytest.raises(InputError, match=r"no base model.*--base"):
        Run.load("run", sae="sae", corpus="corpus.jsonl")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({}, "no SAE .*--sae"),
        ({"sae": "sae"}, "no corpus .*--corpus"),
        ({"sae": "./none", "corpus": "corpus.jsonl"}, r"sae \./none: no such file.*--sae"),
        ({"sae": "sae", "corpus": "none.jsonl"}, r"corpus none\.jsonl: no such file.*--corpus"),
        ({"sae": "sae", "corpus": "data/none.jsonl"}, r"corpus data/none\.jsonl: no such file.*--corpus"),
        ({"sae": "sae", "corpus": "/none/at/all"}, "corpus /none/at/all: no such file"),
        ({"sae": "sae", "corpus": "corpus.jsonl", "base": "/none"}, "base /none: no such file.*--base"),
        ({"sae": "sae", "corpus": "corpus.jsonl", "adapter": "none"}, "adapter none: no such file.*--adapter"),
        (
            {"sae": "sae", "corpus": "corpus.jsonl", "context_length": "long"},
            "context_length 'long': .*--context-length",
        ),
        ({"sae": "sae", "corpus": "corpus.jsonl", "fdr": 1.5}, "fdr 1.5: .*--fdr"),
        ({"sae": "sae", "corpus": "corpus.jsonl", "top": 0}, "top 0: .*--top"),
        ({"sae": "sae", "corpus": "corpus.jsonl", "colour": 1}, "unknown option 'colour': choose from base, .*seed"),
    ],
)
def test_bad_flags_are_one_line(home: Path, flags: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as caught:
        Run.load("run", **flags)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("saes: ../sae\n", "run.yaml: unknown key 'saes'; the keys are base, adapter, since, sae, hook"),
        ("sae: [\n", "run.yaml: not readable YAML"),
        ("just words\n", "run.yaml: a str, want lines of key: value"),
        ("sae: 3\n", "sae 3: want a path"),
        ("sae: ./nowhere\n", r"sae \./nowhere: no such file"),
    ],
)
def test_bad_yaml_is_one_line(home: Path, text: str, says: str) -> None:
    (home / "run/run.yaml").write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        Run.load("run")
    assert "\n" not in str(caught.value)


def test_bad_run_directory(home: Path) -> None:
    with pytest.raises(InputError, match=r"run nowhere: no such directory.*--run"):
        Run.load("nowhere")
    with pytest.raises(InputError, match=r"is a file"):
        Run.load("corpus.jsonl")


def test_a_hook_is_asked_for_when_nothing_names_one(home: Path) -> None:
    (home / "sae/cfg.json").write_text(json.dumps({"d_in": 4, "d_sae": 8}))
    run = Run.load("run", sae="sae", corpus="corpus.jsonl")
    assert run.hook is None
    assert run.with_hook(HOOK).hook == HOOK
    with pytest.raises(InputError, match=r"--hook"):
        run.with_hook(None)


def test_importing_it_loads_no_torch() -> None:
    code = "import sys, autointerp.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
