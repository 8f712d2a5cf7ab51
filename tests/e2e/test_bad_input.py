"""Bad input: exit status 2, one line on standard error that names the input and the mend, and nothing changed."""

# ruff: noqa: E501 (a table of cases reads best with a case on a line)
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ..tiny import save_lora, save_model
from .world import Shell, World, refused, save_sae

ADAPTER_WEIGHTS, SAE_WEIGHTS = "adapter/adapter_model.safetensors", "sae/sae_weights.safetensors"
BASE_WEIGHTS = "base/model.safetensors"

Damage = Callable[[World], dict[str, Any]]
"""Damages a world and says which options to give."""


def remove(*patterns: str, **options: str) -> Damage:
    def damage(world: World) -> dict[str, Any]:
        found = [file for pattern in patterns for file in world.path.glob(pattern)]
        assert found
        for file in found:
            file.unlink()
        return _located(world, options)

    return damage


def write(file: str, content: str | bytes, **options: Any) -> Damage:
    def damage(world: World) -> dict[str, Any]:
        path = world.path / file
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return _located(world, options)

    return damage


def truncate(file: str, keep: float = 0.5, **options: str) -> Damage:
    def damage(world: World) -> dict[str, Any]:
        path = world.path / file
        content = path.read_bytes()
        path.write_bytes(content[: int(keep * len(content))])
        return _located(world, options)

    return damage


def poison(file: str, key: str, value: float = float("nan"), **options: str) -> Damage:
    """One weight of the first tensor whose name holds `key` becomes `value`."""

    def damage(world: World) -> dict[str, Any]:
        weights = load_file(world.path / file)
        tensor = next(tensor for name, tensor in sorted(weights.items()) if key in name)
        tensor.flatten()[1] = value
        save_file(weights, world.path / file, {"format": "pt"})
        return _located(world, options)

    return damage


def edit(file: str, **options: Any) -> Callable[..., Damage]:
    """Changes keys of a JSON file."""

    def with_keys(**keys: Any) -> Damage:
        def damage(world: World) -> dict[str, Any]:
            path = world.path / file
            path.write_text(json.dumps(json.loads(path.read_text()) | keys))
            return _located(world, options)

        return damage

    return with_keys


def give(**options: Any) -> Damage:
    return lambda world: _located(world, options)


def _located(world: World, options: dict[str, Any]) -> dict[str, Any]:
    """`@x` is a path in the world."""
    return {
        key: world.path / value[1:] if isinstance(value, str) and value.startswith("@") else value
        for key, value in options.items()
    }


def other_width(world: World) -> dict[str, Any]:
    shutil.rmtree(world.sae)
    save_sae(world.sae, d_in=16)
    return {}


def acts_above(world: World) -> dict[str, Any]:
    shutil.rmtree(world.adapter)
    save_lora(world.adapter, world.base, [3])
    return {}


def other_base(world: World) -> dict[str, Any]:
    save_model(world.path / "llama", "llama")
    return {"base": world.path / "llama"}


def wider_base(world: World) -> dict[str, Any]:
    save_model(world.path / "wide", "gpt2", n_embd=64)
    return {"base": world.path / "wide"}


def not_causal(world: World) -> dict[str, Any]:
    return write("base/config.json", json.dumps({"model_type": "t5", "d_model": 32}), base="@base")(world)


def checkpoint_of_other_family(world: World) -> dict[str, Any]:
    save_model(world.path / "checkpoint", "llama")
    return {"run": world.path / "checkpoint", "base": world.base}


def checkpoint_with_nan(world: World) -> dict[str, Any]:
    shutil.copytree(world.base, world.path / "checkpoint")
    poison("checkpoint/model.safetensors", "h.1.mlp")(world)
    return {"run": world.path / "checkpoint", "base": world.base}


def broken_parquet(world: World) -> dict[str, Any]:
    return write("corpus.parquet", b"PAR1 no more", corpus="@corpus.parquet")(world)


def parquet_without_text(world: World) -> dict[str, Any]:
    path = world.path / "corpus.parquet"
    pq.write_table(pa.table({"story": ["a long story"]}), path)
    return {"corpus": path}


def late_line(world: World) -> dict[str, Any]:
    with world.corpus.open("a") as file:
        file.write("{not json\n")
    return {}


def beside_run_yaml(content: str) -> Damage:
    return write("adapter/run.yaml", content, sae=None, corpus=None)


CASES: dict[str, tuple[Damage, str]] = {
    # what to look at
    "run missing": (give(run="@nowhere"), r"run .*nowhere: no such directory; give --run"),
    "run is a file": (give(run="@corpus.jsonl"), r"corpus.jsonl: is a file; give --run a directory"),
    "run empty": (lambda w: (w.path / "void").mkdir() or {"run": w.path / "void"}, r"void: no adapter_config.json"),
    "run holds checkpoints": (give(run="@"), r"no adapter_config.json.*give --adapter .*adapter"),
    "no sae": (give(sae=None), r"no SAE for .*: give --sae"),
    "no corpus": (give(corpus=None), r"no corpus for .*: give --corpus"),
    "unknown key": (beside_run_yaml("layers: 3\n"), r"run.yaml: unknown key 'layers'; the keys are base, adapter"),
    "not yaml": (beside_run_yaml("sae: [\n"), r"run.yaml: not readable YAML"),
    "yaml list": (beside_run_yaml("- sae\n"), r"run.yaml: a list, want lines of key: value"),
    "yaml value": (
        write("adapter/run.yaml", "sae: ../sae\ncorpus: ../corpus.jsonl\ncontext_length: long\n", context_length=None),
        r"context_length 'long'.*; give another --context-length",
    ),
    "yaml path": (beside_run_yaml("sae: ./nowhere\ncorpus: ../corpus.jsonl\n"), r"sae ./nowhere: no such file"),
    # the adapter
    "adapter missing": (give(adapter="@nowhere"), r"adapter .*nowhere: no such file or folder.*give --adapter"),
    "adapter without config": (remove("adapter/adapter_config.json"), r"adapter .*without adapter_config.json; copy"),
    "adapter without weights": (remove(ADAPTER_WEIGHTS), r"adapter_config.json without adapter_model.safetensors; copy"),
    "adapter config damaged": (truncate("adapter/adapter_config.json"), r"adapter_config.json: not readable JSON"),
    "adapter config foreign": (edit("adapter/adapter_config.json")(peft_type="NOVEL"), r"adapter_config.json is not one.*update peft"),
    "adapter corrupt": (truncate(ADAPTER_WEIGHTS), r"adapter .*safetensors: damaged .*; copy or save it again"),
    "adapter header corrupt": (write(ADAPTER_WEIGHTS, b"\xff" * 64), r"adapter .*safetensors: damaged"),
    "adapter NaN": (poison(ADAPTER_WEIGHTS, "lora_B"), r"adapter .*lora_B.* holds NaN or infinite weights; save"),
    "adapter infinite": (poison(ADAPTER_WEIGHTS, "lora_A", float("inf")), r"adapter .*lora_A.* NaN or infinite"),
    "adapter of another base": (other_base, r"adapter .* does not fit base .*llama .*; it was trained on another model"),
    "adapter of another width": (wider_base, r"adapter .* does not fit base .*wide .*; it was trained on another model"),
    "adapter above the hook": (
        acts_above,
        r"hook blocks.2.hook_resid_post does not see the adapter.* layer 3: use blocks.3.hook_attn_out or .*blocks.3.hook_resid_post",
    ),
    "checkpoint of another family": (checkpoint_of_other_family, r"is a llama, base .* a gpt2: give --base"),
    "checkpoint NaN": (checkpoint_with_nan, r"adapter .*checkpoint: .*h.1.mlp.* NaN or infinite"),
    # the base model
    "base missing": (give(base="@nowhere"), r"base .*nowhere: no such file or folder"),
    "base named by the adapter missing": (
        edit("adapter/adapter_config.json")(base_model_name_or_path="/no/such/model"),
        r"base /no/such/model: no such folder; give --base",
    ),
    "adapter names no base": (edit("adapter/adapter_config.json")(base_model_name_or_path=None), r"names none; give --base"),
    "base without config": (remove("base/config.json", base="@base"), r"base .*: no config.json in it; give --base"),
    "base config damaged": (truncate("base/config.json", base="@base"), r"base .*config.json: not readable JSON"),
    "base not causal": (not_causal, r"model_type t5: not a causal language model; give --base"),
    "base without weights": (remove(BASE_WEIGHTS, base="@base"), r"base .*base: cannot be loaded .*; give --base"),
    "base corrupt": (truncate(BASE_WEIGHTS, base="@base"), r"base .*model.safetensors: damaged .*; copy or save it again"),
    "base NaN": (poison(BASE_WEIGHTS, "h.0.mlp", base="@base"), r"base .*h.0.mlp.* holds NaN or infinite"),
    "tokenizer missing": (remove("base/tokenizer*", base="@base"), r"no tokenizer in .*base: save it there"),
    "tokenizer damaged": (truncate("base/tokenizer.json", base="@base"), r"tokenizer of .*base: cannot be loaded"),
    # the SAE and the hook
    "sae missing": (give(sae="@nowhere"), r"sae .*nowhere: no such file or folder.*give --sae"),
    "sae of another width": (other_width, r"SAE .* has d_in 16, the model's residual width is 32.*; give --sae"),
    "sae without weights": (remove(SAE_WEIGHTS), r"SAE .*: no sae_weights.safetensors beside cfg.json"),
    "sae without config": (remove("sae/cfg.json"), r"SAE .*: no cfg.json beside its weights"),
    "sae config damaged": (truncate("sae/cfg.json"), r"SAE .*cfg.json is not readable JSON"),
    "sae corrupt": (truncate(SAE_WEIGHTS), r"SAE .*sae_weights.safetensors is corrupt .*; copy or save it again"),
    "sae NaN": (poison(SAE_WEIGHTS, "W_dec"), r"SAE .*W_dec holds NaN or infinite weights"),
    "sae bias infinite": (poison(SAE_WEIGHTS, "b_enc", float("inf")), r"SAE .*b_enc holds NaN or infinite weights"),
    "sae is a file": (give(sae="@corpus.jsonl"), r"SAE .*: is a file of no format we read .*; give the folder"),
    "hook beyond the last layer": (give(hook="blocks.9.hook_resid_post"), r"the model has 4 layers; the last is blocks.3"),
    "hook of another architecture": (give(hook="model.layers.1"), r"hook model.layers.1: no such point in this model \(gpt2\); it has"),
    "hook unknown": (give(hook="blocks.1.hook_z"), r"hook blocks.1.hook_z: no point hook_z; choose one of"),
    # the corpus
    "corpus missing": (give(corpus="@nowhere.jsonl"), r"corpus .*nowhere.jsonl: no such file or folder"),
    "corpus empty": (write("corpus.jsonl", ""), r"corpus .* is empty"),
    "corpus blank": (write("corpus.jsonl", '{"text": ""}\n{"text": null}\n'), r"corpus .* is empty"),
    "corpus folder empty": (lambda w: (w.path / "void").mkdir() or {"corpus": w.path / "void"}, r"corpus .*void is empty"),
    "corpus of a foreign kind": (write("corpus.docx", "x", corpus="@corpus.docx"), r"cannot read .docx; give one of"),
    "text column missing": (give(text_column="story"), r"no column 'story'; give --text-column one of text"),
    "text column no text": (write("corpus.jsonl", '{"text": 3}\n'), r"column 'text' is of type int"),
    "chat without template": (
        write("corpus.jsonl", '{"text": [{"role": "user", "content": "the cat sat"}]}\n'),
        r"the tokenizer has no chat template",
    ),
    "corpus shorter than a context": (write("corpus.jsonl", '{"text": "the cat sat on the mat the cat sat on"}\n'), r"fewer than one context of 32"),
    "corpus of crumbs": (write("corpus.jsonl", '{"text": "the cat"}\n' * 99), r"is shorter than a context"),
    "corpus line damaged": (late_line, r"corpus .*corpus.jsonl:121: not a line of JSON .*; mend or remove it"),
    "parquet damaged": (broken_parquet, r"corpus .*corpus.parquet.*"),
    "parquet without text": (parquet_without_text, r"no column 'text'; give --text-column one of story"),
    # choices
    "context longer than the model": (give(context_length=65), r"context length 65: the model has 64 positions; give --context"),
    "context too short": (give(context_length=4), r"context-length"),
    "context too short with BOS": (give(context_length=8), r"context length 8: give --context-length 9 or more"),
    "selector unknown": (give(selector="magic"), r"unknown selector 'magic': choose one of .*change, .*mean-shift, .*random"),
    "labeler unknown": (give(labeler="gpt-7"), r"unknown labeler 'gpt-7': choose one of anthropic:MODEL, lexical, openai:MODEL"),
    "labeler without model": (give(labeler="openai"), r"unknown labeler 'openai': choose one of"),
    "labeler without key": (give(labeler="openai:gpt-6-luna"), r"set OPENAI_API_KEY .*--labeler lexical"),
    "other labeler without key": (give(labeler="anthropic:claude-haiku-5-5"), r"set ANTHROPIC_API_KEY, or use --labeler lexical"),
    "scorer unknown": (give(scorer="magic"), r"unknown scorer 'magic': choose one of .*detection, .*rule"),
    "scorer without model": (give(scorer="detection"), r"scorer 'detection' asks a language model"),
    "fdr": (give(fdr=1.5), r"fdr 1.5: .*; give another --fdr"),
    "device": (give(seed=1, device="gpu7"), r"device gpu7: not usable here .*; give --device"),
    "dtype": (give(dtype="int3"), r"dtype 'int3'.*--dtype"),
    "top": (give(top=0), r"--top"),
    "seed": (give(seed=-1), r"--seed"),
    "seed too large": (give(seed=1 << 63), r"seed 9223372036854775808: .*; give another --seed"),
    "concurrency": (give(concurrency=0), r"--concurrency 0 must be above 0"),
    "scratch": (give(seed=1, scratch="@corpus.jsonl"), r"scratch .*corpus.jsonl: .*; give --scratch a folder"),
    "option unknown": (give(colour="red"), r"No such option.*--colour"),
    # the store
    "store is a folder": (give(db="@sae"), r"sae cannot be read: Is a directory; name another file with --db"),
    "store in a file": (give(db="@corpus.jsonl/x.duckdb"), r"--db"),
    "store is text": (give(db="@corpus.jsonl"), r"is not an autointerp store: name another file with --db"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: str, world: World, tmp_path: Path, shell: Shell) -> None:
    damage, wanted = CASES[case]
    damaged = world.copy(tmp_path / "w")
    before = damaged.db.read_bytes()
    options = damage(damaged)
    says = shell(*damaged.args(**options))
    refused(says, wanted)
    if "db" not in options:
        assert damaged.db.read_bytes() == before
        assert sorted(damaged.path.glob("store*")) == [damaged.db]
        absent = tmp_path / "new" / "store.duckdb"
        assert shell(*damaged.args(**{**options, "db": absent})) == says
        assert not absent.parent.exists()


LABELING: dict[str, tuple[dict[str, Any], str]] = {
    "budget zero": ({"max_usd": 0}, r"--max-usd 0.* must be above 0"),
    "budget without price": (
        {"max_usd": 1, "labeler": "openai:own"},
        r"--max-usd needs the price of own.*--prices FILE",
    ),
    "rpm": ({"rpm": -1}, r"--rpm -1 must be above 0"),
    "tpm": ({"tpm": 0}, r"--tpm 0 must be above 0"),
    "prompts missing": ({"prompts": "@nowhere"}, r"prompts .*nowhere|nowhere.*prompts"),
    "prompts broken": ({"prompts": "@prompts"}, r"prompts.*explain"),
    "prices missing": ({"prices": "@nowhere.json"}, r"nowhere.json.*"),
    "prices broken": ({"prices": "@corpus.jsonl"}, r"corpus.jsonl.*"),
}


@pytest.mark.parametrize("case", LABELING)
def test_bad_labeling_options(
    case: str, world: World, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-none")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/v1")
    copied = world.copy(tmp_path / "w")
    (copied.path / "prompts").mkdir()
    (copied.path / "prompts" / "explain.j2").write_text("{% for %}")
    options, wanted = LABELING[case]
    before = copied.db.read_bytes()
    options = {"labeler": "openai:gpt-6-luna"} | _located(copied, options)
    refused(shell(*copied.args(**options)), wanted)
    if case != "budget without price":  # an estimate says that there is none
        refused(shell(*copied.args(**options, dry_run=True)), wanted)
    assert copied.db.read_bytes() == before


@pytest.mark.parametrize("kind", ["lora_B zero", "same checkpoint"])
def test_an_adapter_that_changes_nothing_is_no_mistake(kind: str, world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    options: dict[str, Any] = {"db": tmp_path / "new.duckdb"}
    if kind == "same checkpoint":
        shutil.copytree(world.base, copied.path / "checkpoint")
        options |= {"run": copied.path / "checkpoint", "base": world.base}
    else:
        weights = load_file(copied.path / ADAPTER_WEIGHTS)
        zeroed = {name: torch.zeros_like(w) if "lora_B" in name else w for name, w in weights.items()}
        save_file(zeroed, copied.path / ADAPTER_WEIGHTS, {"format": "pt"})
    for _ in range(2):
        says = shell(*copied.args(**options))
        assert says.status == 0
        assert (says.out + says.err).count("no latent was selected: the adapter changes nothing at this hook\n") == 1
    rows = json.loads(
        shell(
            "query", "select count(*) n, count_if(selected) k from latents", "--db", options["db"], "--format", "json"
        ).out
    )
    assert rows == [{"n": 64, "k": 0}]
    says = shell(*copied.args(**options, selector="mean-shift"))
    assert says.status == 0
    assert json.loads(
        shell("query", "select count(*) n from changed_latents", "--db", options["db"], "--format", "json").out
    ) == [{"n": 0}]
