"""The contract, to the letter: tables, columns and what they hold; Python; what loads no torch."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import autointerp
from autointerp.errors import InputError

from ..tiny import tokenizer
from .world import CONTEXT, M, World, read, texts

TABLES = {
    "runs": """run_id path status base adapter adapter_format adapter_sha256 sae sae_format hook d_model d_sae corpus
        n_docs n_tokens selector seed fvu_base fvu_adapted delta_fvu l0_base l0_adapted static_share change_r2 coverage
        settings versions created_at finished_at""",
    "latents": """run_id latent state mean_base mean_adapted freq_base freq_adapted max_base max_adapted delta
        static_share gain statistic q_value write_size write_weight attribution change selected role rank coverage""",
    "writes": "run_id latent kind target_latent target_token weight rank",
    "contexts": "run_id latent context_id kind rank split doc position tokens act_base act_adapted peak",
    "labels": "run_id latent labeler label explanation effect status error prompt_sha256 created_at",
    "scores": "run_id latent labeler scorer value ci_low ci_high null_value n_examples n_missing created_at",
    "units": "run_id unit side latent weight rank",
    "calls": """call_id run_id latent purpose provider model status http_status request_sha256 input_tokens
        cached_tokens output_tokens usd usd_estimated attempt started_at seconds""",
    "changed_latents": """run_id rank latent role change gain coverage label effect explanation status labeler scorer
        score null_score""",
}
KEYS = {"runs": ["run_id"], "latents": ["run_id", "latent"], "labels": ["run_id", "latent", "labeler"]}


@pytest.mark.parametrize("table", TABLES)
def test_tables_have_the_contracts_columns(table: str, world: World) -> None:
    have = [row["column_name"] for row in read(world.db, f"DESCRIBE {table}")]
    wanted = TABLES[table].split()
    assert [name for name in have if name in wanted] == wanted, "names and order"
    types = {row["column_name"]: row["column_type"] for row in read(world.db, f"DESCRIBE {table}")}
    if table == "contexts":
        assert (types["tokens"], types["act_base"], types["act_adapted"]) == ("VARCHAR[]", "FLOAT[]", "FLOAT[]")
    if table == "runs":
        assert (types["settings"], types["versions"]) == ("JSON", "JSON")


def test_keys(world: World) -> None:
    found = {
        row["table_name"]: row["constraint_column_names"]
        for row in read(world.db, "SELECT * FROM duckdb_constraints() WHERE constraint_type = 'PRIMARY KEY'")
    }
    assert {table: found[table] for table in KEYS} == KEYS


def test_a_run_says_what_it_was(world: World) -> None:
    (run,) = read(world.db, "SELECT * FROM runs")
    empty = {name for name, value in run.items() if value is None}
    assert empty <= {"notes", "assumed", "adapters", "since", "since_sha256"}
    assert (run["path"], run["adapter"], run["base"]) == (str(world.adapter), str(world.adapter), str(world.base))
    assert (run["status"], run["adapter_format"], run["sae_format"]) == ("done", "peft", "saelens/topk")
    assert (run["hook"], run["d_model"], run["d_sae"]) == ("blocks.2.hook_resid_post", 32, M)
    assert (run["selector"], run["seed"], run["n_docs"]) == ("change", 0, len(texts()))
    settings = json.loads(run["settings"])
    assert settings["top"] == 4
    assert settings["context_length"] == CONTEXT
    assert {"torch", "transformers", "peft", "sae-lens"} <= set(json.loads(run["versions"]))
    n_tokens = sum(len(tokenizer()(text, add_special_tokens=False)["input_ids"]) for text in texts())
    assert n_tokens - len(texts()) * 8 < run["n_tokens"] <= n_tokens
    assert run["created_at"] <= run["finished_at"]


def test_every_latent_has_its_row(world: World) -> None:
    rows = read(world.db, "SELECT * FROM latents ORDER BY latent")
    assert [row["latent"] for row in rows] == list(range(M))
    assert {row["state"] for row in rows} <= {"live", "dead", "revived", "silenced"}
    for row in rows:
        assert row["delta"] == pytest.approx(row["mean_adapted"] - row["mean_base"], abs=1e-9)
        assert row["change"] is None or row["change"] >= 0
        fires = row["freq_base"] > 0, row["freq_adapted"] > 0
        wanted = {(True, True): "live", (False, False): "dead", (False, True): "revived", (True, False): "silenced"}
        assert row["state"] == wanted[fires]
        assert (row["max_base"] > 0, row["max_adapted"] > 0) == fires
        assert row["selected"] == (row["rank"] is not None) == (row["role"] is not None)
    chosen = sorted((row for row in rows if row["selected"]), key=lambda row: row["rank"])
    assert [row["rank"] for row in chosen] == [1, 2, 3, 4]
    assert {row["role"] for row in chosen} <= {"read", "written", "static"}
    assert all(row["coverage"] is not None for row in chosen)
    (run,) = read(world.db, "SELECT coverage FROM runs")
    assert chosen[-1]["coverage"] == pytest.approx(run["coverage"])


def test_contexts_are_of_the_selected_only_and_splits_share_no_document(world: World) -> None:
    contexts = read(world.db, "SELECT * FROM contexts")
    selected = {row["latent"] for row in read(world.db, "SELECT latent FROM latents WHERE selected")}
    assert {c["latent"] for c in contexts} == selected
    assert {c["kind"] for c in contexts} == {"top", "top_base", "gain", "loss", "quantile", "silent"}
    documents = [tokenizer()(text, add_special_tokens=False)["input_ids"] for text in texts()]
    for latent in selected:
        mine = [c for c in contexts if c["latent"] == latent]
        docs = {split: {c["doc"] for c in mine if c["split"] == split} for split in ("explain", "score")}
        assert docs["explain"]
        assert docs["score"]
        assert not docs["explain"] & docs["score"]
        assert len({c["context_id"] for c in mine}) == len(mine)
        sequences = [(c["kind"], c["doc"], c["position"] // (CONTEXT - 1)) for c in mine]
        assert len(set(sequences)) == len(sequences), "one context per sequence and kind"
        for c in mine:
            n = len(c["tokens"])
            assert n == len(c["act_base"]) == len(c["act_adapted"])
            assert 0 <= c["peak"] < n
            begin = c["position"] - c["peak"]
            window = documents[c["doc"]][begin : begin + n]
            assert "".join(c["tokens"]) == tokenizer().decode(window), "position counts document tokens"
            if c["kind"] == "silent":
                assert not any(c["act_base"])
                assert not any(c["act_adapted"])
            elif c["kind"] == "top":
                assert c["act_adapted"][c["peak"]] == max(c["act_adapted"])
        for kind in ("top", "top_base"):
            side = "act_adapted" if kind == "top" else "act_base"
            ranked = sorted((c for c in mine if c["kind"] == kind), key=lambda c: c["rank"])
            peaks = [c[side][c["peak"]] for c in ranked]
            assert [c["rank"] for c in ranked] == list(range(1, len(ranked) + 1))
            assert peaks == sorted(peaks, reverse=True)


def test_labels_scores_and_writes(world: World) -> None:
    rows = read(world.db, "SELECT * FROM changed_latents ORDER BY rank")
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert {row["labeler"] for row in rows} == {"lexical"}
    assert {row["status"] for row in rows} <= {"ok", "known"}
    assert all(row["label"] and row["effect"] and row["explanation"] for row in rows)
    scored = [row for row in rows if row["score"] is not None]
    assert scored
    assert all(0 <= row["score"] <= 1 for row in scored)
    for score in read(world.db, "SELECT * FROM scores WHERE value IS NOT NULL"):
        assert score["ci_low"] <= score["value"] <= score["ci_high"]
        assert score["n_examples"] > 0
    kinds = {row["kind"] for row in read(world.db, "SELECT DISTINCT kind FROM writes")}
    assert kinds <= {"raises", "lowers", "promotes", "suppresses"}
    assert {"promotes", "suppresses"} <= kinds
    for write in read(world.db, "SELECT * FROM writes"):
        assert (write["target_token"] is None) == (write["kind"] in ("raises", "lowers"))
        assert (write["target_latent"] is None) == (write["kind"] in ("promotes", "suppresses"))
        assert (write["weight"] > 0) == (write["kind"] in ("raises", "promotes"))
    assert read(world.db, "SELECT * FROM calls") == []


def test_the_python_api(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options: dict[str, Any] = {"sae": world.sae, "corpus": world.corpus, "context_length": CONTEXT, "top": 4}
    results = autointerp.label(world.adapter, **options)
    assert (results.status, results.exit_status) == ("done", 0)
    assert (tmp_path / "results" / "autointerp.duckdb").exists()
    frame = results.sql("select latent, label, effect, change from changed_latents order by rank").df()
    assert list(frame.columns) == ["latent", "label", "effect", "change"]
    assert len(frame) == 4
    assert list(results.df()["rank"]) == [1, 2, 3, 4]

    async def inside() -> Any:
        return await autointerp.alabel(world.adapter, db=world.db, **options)

    again = asyncio.run(inside())
    assert again.run_id == results.run_id
    opened = autointerp.open("results/autointerp.duckdb")
    assert opened.sql("select count(*) from latents where run_id = ?", [results.run_id]).fetchone() == (M,)
    with pytest.raises(InputError, match="queries only read"):
        opened.sql("delete from runs")
    with pytest.raises(InputError, match="no such directory"):
        autointerp.label(tmp_path / "nowhere", **options)
    with pytest.raises(InputError, match="unknown option 'colour'"):
        autointerp.label(world.adapter, colour="red", **options)


LIGHT = """
import sys
import autointerp
from autointerp import cli
db, out, *label = sys.argv[1:]
for words in (
    label, [*label, "--dry-run", "--labeler", "openai:gpt-6-luna"],
    ["--help"], ["label", "--help"], ["--version"], ["query", "select * from changed_latents", "--db", db],
    ["show", "--db", db], ["show", "{latent}", "--db", db], ["export", "--db", db, "--out", out + ".jsonl"],
    ["export", "--db", db, "--format", "parquet", "--out", out], ["label"], ["nothing"],
):
    status = cli.run(words)
    assert status == (2 if words in (["label"], ["nothing"]) else 0), words
heavy = sorted({{"torch", "transformers", "sae_lens", "openai", "anthropic", "datasets"}} & set(sys.modules))
assert not heavy, heavy
"""


def test_reading_and_labelling_what_stands_load_no_torch(world: World, tmp_path: Path) -> None:
    latent = read(world.db, "SELECT latent FROM changed_latents")[0]["latent"]
    script = LIGHT.format(latent=latent)
    words = [sys.executable, "-c", script, world.db, tmp_path / "out", *world.args()]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
