"""Bad input: exit status 2, one line on standard error that names the input and the mend, and nothing changed."""

# ruff: noqa: E501 (a table of cases reads best with a case on a line)
from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from ..tiny import save_lora, save_model
from .world import Shell, World, save_sae

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
    "sae is a file": (give(sae="@corpus.jsonl"), r"SAE .*: is a file; give the folder"),
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
    "selector unknown": (give(selector="magic"), r"unknown selector 'magic': choose one of change, mean-shift, random"),
    "labeler unknown": (give(labeler="gpt-7"), r"unknown labeler 'gpt-7': choose one of anthropic:MODEL, lexical, openai:MODEL"),
    "labeler without model": (give(labeler="openai"), r"unknown labeler 'openai': choose one of"),
    "labeler without key": (give(labeler="openai:gpt-6-luna"), r"set OPENAI_API_KEY .*--labeler lexical"),
    "other labeler without key": (give(labeler="anthropic:claude-haiku-5-5"), r"set ANTHROPIC_API_KEY, or use --labeler lexical"),
    "scorer unknown": (give(scorer="magic"), r"unknown scorer 'magic': choose one of detection, rule"),
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
        assert not absent.exists()


def refused(says: Any, wanted: str) -> None:
    import re

    assert says.status == 2, says
    assert says.out == ""
    assert says.err.count("\n") == 1, says.err
    assert says.err.startswith("autointerp: ")
    assert says.err.endswith("\n")
    assert re.search(wanted, says.err), says.err


def test_a_read_only_store(world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    copied.db.chmod(0o444)
    before = copied.db.read_bytes()
    refused(
        shell(*copied.args(labeler="lexical", seed=5)),
        r"the file .*store.duckdb is read-only: make it writable, or name another --db",
    )
    assert copied.db.read_bytes() == before
    assert shell("query", "select 1 as one", "--db", copied.db, "--format", "csv").out == '"one"\n1\n'
    copied.db.chmod(0o644)


def test_a_read_only_folder(world: World, tmp_path: Path, shell: Shell) -> None:
    (tmp_path / "locked").mkdir(mode=0o555)
    refused(shell(*world.args(db=tmp_path / "locked" / "x.duckdb")), r"the folder .*locked is read-only")
    refused(shell(*world.args(db=tmp_path / "locked" / "new" / "x.duckdb")), r"the folder .*locked is read-only")


def test_somebody_elses_database(world: World, tmp_path: Path, shell: Shell) -> None:
    with duckdb.connect(str(tmp_path / "foreign.duckdb")) as connection:
        connection.execute("CREATE TABLE runs (name VARCHAR)")
    with sqlite3.connect(tmp_path / "foreign.sqlite") as lite:
        lite.execute("CREATE TABLE runs (name TEXT)")
    for name in ("foreign.duckdb", "foreign.sqlite"):
        path = tmp_path / name
        before = path.read_bytes()
        for words in (world.args(db=path), ["query", "select * from runs", "--db", path], ["show", "--db", path]):
            refused(shell(*words), r"not an autointerp store: name another (--db|file with --db)")
        assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"foreign.duckdb", "foreign.sqlite"}


WRITING = [
    "insert into runs (run_id) values ('x')", "update labels set label = 'x'", "delete from runs", "drop table runs",
    "create table t (a int)", "create view v as select 1", "alter table runs add column x int", "attach 'x.db' as x",
    "copy runs to 'runs.csv'", "install json", "load json", "set threads = 1", "pragma database_list", "checkpoint",
    "begin", "call pragma_version()", "export database 'x'", "vacuum", "select 1; delete from runs",
    "with x as (select 1) insert into runs (run_id) select 'x' from x", "explain analyze delete from runs", "use memory",
    "truncate runs", "call force_checkpoint()", "select * from force_checkpoint()", "explain delete from runs",
]  # fmt: skip


@pytest.mark.parametrize("sql", WRITING)
def test_sql_that_writes(sql: str, world: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    before = world.db.read_bytes()
    says = shell("query", sql, "--db", world.db)
    if says.status:
        refused(says, r"the query")
    else:
        assert sql.startswith(("explain", "call", "select"))
    assert world.db.read_bytes() == before
    assert list(tmp_path.iterdir()) == []


READING_ELSEWHERE = [
    "select * from read_text('{file}')", "select * from '{file}'", "select * from glob('/*')",
    "select * from read_csv('{file}')", "select getenv('HOME')", "select * from sqlite_scan('{file}', 't')",
]  # fmt: skip


@pytest.mark.parametrize("sql", READING_ELSEWHERE)
def test_sql_that_reads_other_files(sql: str, world: World, shell: Shell) -> None:
    refused(shell("query", sql.format(file=world.corpus), "--db", world.db), r"the query failed: ")


OTHER_COMMANDS: dict[str, tuple[list[str], str]] = {
    "no command of that name": (["lable"], r"No such command 'lable'"),
    "a later command": (["serve"], r"No such command 'serve'"),
    "no run": (["label"], r"Missing option '--run'"),
    "no value": (["label", "--run"], r"'--run' requires an argument"),
    "no number": (["label", "--run", ".", "--top", "many"], r"'many' is not a valid integer"),
    "query without sql": (["query"], r"Missing argument 'SQL'"),
    "query empty": (["query", " ; "], r"the query is empty: give one SELECT"),
    "query wrong": (["query", "select nothing from changed_latents"], r"the query failed: Binder Error.*nothing"),
    "query not sql": (["query", "what changed?"], r"the query failed: Parser Error"),
    "query format": (["query", "select 1", "--format", "xml"], r"'xml' is not one of 'table', 'csv', 'json', 'parquet'"),
    "query out": (["query", "select 1", "--out", "/no/such/folder/x"], r"cannot write /no/such/folder/x: No such file"),
    "query without store": (["query", "select 1", "--db", "@none.duckdb"], r"there is no store at .*none.duckdb: run"),
    "show without store": (["show", "--db", "@none.duckdb"], r"there is no store at .*none.duckdb: run `autointerp label`"),
    "show of no latent": (["show", "4800"], r"has no latent 4800: `autointerp show` lists"),
    "show of no number": (["show", "first"], r"'first' is not a valid integer"),
    "show of no run": (["show", "--run-id", "zz"], r"there is no run 'zz': choose one of"),
    "json of no latent": (["show", "4800", "--json"], r"selected no latent 4800: `autointerp show` lists"),
    "export format": (["export", "--format", "neuronpedia", "--out", "@x"], r"unknown export format 'neuronpedia': choose"),
    "export over a file": (["export", "--out", "@corpus.jsonl"], r"corpus.jsonl exists already: name another file, or say --force"),
    "export nowhere": (["export", "--out", "@corpus.jsonl/x"], r"cannot export to .*corpus.jsonl/x"),
    "export of no run": (["export", "--out", "@x", "--run-id", "zz"], r"there is no run 'zz'"),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_COMMANDS)
def test_bad_input_of_other_commands(case: str, world: World, shell: Shell) -> None:
    given, wanted = OTHER_COMMANDS[case]
    words = [str(world.path / word[1:]) if word.startswith("@") else word for word in given]
    if words[0] in ("query", "show", "export") and "--db" not in words:
        words += ["--db", str(world.db)]
    before = sorted(world.path.rglob("*"))
    refused(shell(*words), wanted)
    assert sorted(world.path.rglob("*")) == before


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
