"""What a run may be made of: selectors, architectures, corpora, checkpoints and run.yaml, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..tiny import tokenizer
from .world import M, Shell, World, build, read, texts


def test_select_stops_before_contexts_and_label_goes_on(world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "new.duckdb"
    says = shell(*world.args("select", db=db))
    assert says.status == 0
    assert [read(db, f"SELECT count(*) AS n FROM {t}")[0]["n"] for t in ("latents", "contexts", "labels")] == [M, 0, 0]
    columns = "latent, state, rank, role, round(change, 6), round(coverage, 6), round(mean_base, 6)"
    both = [read(place, f"SELECT {columns} FROM latents ORDER BY latent") for place in (db, world.db)]
    assert both[0] == both[1]
    before = read(db, "SELECT created_at FROM runs")
    assert shell(*world.args("select", db=db)).status == 0
    assert read(db, "SELECT created_at FROM runs") == before, "it stands: nothing is read again"
    assert shell(*world.args(db=db)).status == 0
    assert len(read(db, "SELECT * FROM changed_latents WHERE label IS NOT NULL")) == 4


@pytest.mark.parametrize("selector", ["mean-shift", "random"])
def test_other_selectors(selector: str, world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "new.duckdb"
    assert shell(*world.args(db=db, selector=selector, top=3)).status == 0
    assert read(db, "SELECT selector, status FROM runs") == [{"selector": selector, "status": "done"}]
    assert len(read(db, "SELECT * FROM changed_latents")) == 3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_other_architectures(family: str, tmp_path: Path, shell: Shell) -> None:
    other = build(tmp_path / "w", family)
    assert shell(*other.args()).status == 0
    rows = read(other.db, "SELECT label, effect FROM changed_latents")
    assert len(rows) == 4
    assert all(row["label"] and row["effect"] for row in rows)


def save_as(kind: str, folder: Path) -> Path:
    """The world's texts as another kind of corpus."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    match kind:
        case "parquet":
            pq.write_table(pa.table({"text": texts()}), folder / "c.parquet")
            return folder / "c.parquet"
        case "folder of txt":
            (folder / "c").mkdir()
            for at, text in enumerate(texts()):
                (folder / "c" / f"{at:04d}.txt").write_text(text)
            return folder / "c"
        case "mixed folder":
            (folder / "c" / "deep").mkdir(parents=True)
            lines = "".join(json.dumps({"text": text}) + "\n" for text in texts()[:60])
            (folder / "c" / "a.jsonl").write_text(lines)
            (folder / "c" / "notes.md").write_text("not a document")
            pq.write_table(pa.table({"text": texts()[60:]}), folder / "c" / "deep" / "b.parquet")
            return folder / "c"
        case _:
            datasets.Dataset.from_dict({"text": texts()}).save_to_disk(folder / "c")
            return folder / "c"


@pytest.mark.parametrize("kind", ["parquet", "folder of txt", "mixed folder", "saved dataset"])
def test_one_corpus_in_many_forms_gives_one_result(kind: str, world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "new.duckdb"
    assert shell(*world.args("select", db=db, corpus=save_as(kind, tmp_path))).status == 0
    columns = "n_docs, n_tokens, round(fvu_base, 6) AS fvu, round(change_r2, 4) AS r2"
    assert read(db, f"SELECT {columns} FROM runs") == read(world.db, f"SELECT {columns} FROM runs")


def test_a_chat_column_goes_through_the_template(world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    own = tokenizer()
    own.chat_template = template
    own.save_pretrained(copied.base)
    with copied.corpus.open("w") as file:
        for text in texts():
            half = len(text) // 2
            turns = [{"role": "user", "content": text[:half]}, {"role": "assistant", "content": text[half:]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    db = tmp_path / "new.duckdb"
    assert shell(*copied.args(base=copied.base, db=db, text_column="messages")).status == 0
    shown = {"".join(row["tokens"]) for row in read(db, "SELECT tokens FROM contexts")}
    assert any("[user] " in text for text in shown)
    assert any("\n[assistant] " in text for text in shown)


def test_a_full_checkpoint_gives_what_its_adapter_gives(world: World, tmp_path: Path, shell: Shell) -> None:
    base: Any = AutoModelForCausalLM.from_pretrained(world.base)
    PeftModel.from_pretrained(base, world.adapter).merge_and_unload().save_pretrained(tmp_path / "merged")  # pyright: ignore
    AutoTokenizer.from_pretrained(world.base).save_pretrained(tmp_path / "merged")
    db = tmp_path / "new.duckdb"
    assert shell(*world.args(run=tmp_path / "merged", base=world.base, db=db)).status == 0
    assert read(db, "SELECT adapter_format, status FROM runs") == [{"adapter_format": "checkpoint", "status": "done"}]
    columns = "rank, latent, role, round(change, 3) AS change, round(coverage, 3) AS coverage, label"
    both = [read(place, f"SELECT {columns} FROM changed_latents ORDER BY rank") for place in (db, world.db)]
    assert both[0] == both[1]


def test_run_yaml_is_relative_to_itself_and_flags_win(
    world: World, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = world.copy(tmp_path / "w")
    look = copied.path / "look"
    look.mkdir()
    (copied.path / "other.jsonl").write_text(json.dumps({"story": " ".join(texts()[:30])}) + "\n")
    (look / "run.yaml").write_text(
        "base: ../base\nadapter: ../adapter\nsae: ../sae\nhook: blocks.2.hook_resid_post\ncorpus: ../other.jsonl\n"
        "text_column: story\ncontext_length: 16\nmax_tokens: 400\n"
    )
    monkeypatch.chdir(tmp_path)
    db = ["--db", "new.duckdb", "--top", "2"]
    for path in ("w/look", "w/look/run.yaml"):
        assert shell("select", "--run", path, *db).status == 0
    (run,) = read(tmp_path / "new.duckdb", "SELECT * FROM runs")
    assert (run["path"], run["base"], run["sae"]) == (str(look), str(copied.base), str(copied.sae))
    assert (run["n_docs"], run["corpus"]) == (1, str(copied.path / "other.jsonl"))
    assert 392 < run["n_tokens"] <= 400
    flags = [
        "--corpus",
        "w/corpus.jsonl",
        "--text-column",
        "text",
        "--max-tokens",
        "800",
        "--hook",
        "blocks.3.hook_resid_pre",
    ]
    assert shell("select", "--run", "w/look", *flags, *db).status == 0
    won = read(tmp_path / "new.duckdb", "SELECT corpus, n_tokens, hook FROM runs ORDER BY created_at DESC")[0]
    assert (won["corpus"], won["hook"]) == (str(copied.corpus), "blocks.3.hook_resid_pre")
    assert 792 < won["n_tokens"] <= 800
