"""Commands, options and what they print: every name of the contract, formats, 80 columns, quiet and JSON modes."""

from __future__ import annotations

import csv
import io
import json
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len

from autointerp import cli
from autointerp.demo import ORGANISM

from .world import M, Shell, World

COMMON = (
    "--base --adapter --sae --hook --corpus --text-column --context-length --max-tokens --top --selector --fdr --db"
)
LABELING = "--labeler --scorer --max-usd --rpm --tpm --concurrency --dry-run --yes"
OPTIONS = {
    "label": f"--run {COMMON} {LABELING} --device --dtype --seed --json --quiet",
    "select": f"--run {COMMON} --device --dtype --seed --json --quiet",
    "query": "--format --db",
    "show": "--db",
    "export": "--format --db",
    "demo": "--db --labeler",
}


def strict(text: str) -> Any:
    """JSON without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_option_of_the_contract_exists(command: str, shell: Shell) -> None:
    says = shell(command, "--help")
    assert (says.status, says.err) == (0, "")
    have = set(re.findall(r"--[a-z][a-z-]*", says.out))
    assert set(OPTIONS[command].split()) <= have
    assert shell("--help").out.count(f"\n  {command} ") == 1


def test_no_arguments_is_help_and_version_is_one_line(shell: Shell) -> None:
    assert shell().status == 0
    assert "Commands:" in shell().out
    assert re.fullmatch(r"autointerp, version \d+\.\d+\.\d+\S*\n", shell("--version").out)


def test_help_is_quick() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "autointerp", "--help"], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5, "seconds of CPU"


def test_query_formats(world: World, tmp_path: Path, shell: Shell) -> None:
    sql = "select rank, label, change, [1, 2] as pair, null as nothing from changed_latents order by rank"
    table = shell("query", sql, "--db", world.db)
    assert "rank" in table.out
    assert table.out.endswith("4 rows\n")
    rows = strict(shell("query", sql, "--db", world.db, "--format", "json").out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["pair"] == [1, 2]
    read = list(csv.DictReader(io.StringIO(shell("query", sql, "--db", world.db, "--format", "csv").out)))
    assert [row["label"] for row in read] == [row["label"] for row in rows]
    assert [float(row["change"]) for row in read] == [row["change"] for row in rows]
    out = tmp_path / "answer.parquet"
    assert shell("query", sql, "--db", world.db, "--format", "parquet", "--out", out).status == 0
    assert [row["label"] for row in pq.read_table(out).to_pylist()] == [row["label"] for row in rows]


def test_show_and_export(world: World, tmp_path: Path, shell: Shell) -> None:
    items = [strict(line) for line in shell("show", "--json", "--db", world.db).out.splitlines()]
    assert [item["rank"] for item in items] == [1, 2, 3, 4]
    first = items[0]
    assert first["contexts"]
    assert first["writes"]
    shown = shell("show", first["latent"], "--db", world.db)
    assert shown.status == 0
    assert f"latent {first['latent']}" in shown.out
    assert first["label"] in " ".join(shown.out.split())
    assert strict(shell("show", first["latent"], "--json", "--db", world.db).out) == first

    jsonl, folder, file = tmp_path / "x.jsonl", tmp_path / "tables", tmp_path / "x.parquet"
    assert shell("export", "--out", jsonl, "--db", world.db).out.strip() == str(jsonl)
    assert [strict(line) for line in jsonl.read_text().splitlines()] == items
    for out in (folder, file):
        assert shell("export", "--format", "parquet", "--out", out, "--db", world.db).status == 0
    assert pq.read_table(folder / "latents.parquet").num_rows == M
    assert {path.stem for path in folder.iterdir()} >= {"runs", "latents", "writes", "contexts", "labels", "scores"}
    assert pq.read_table(file).num_rows == 4
    assert shell("export", "--format", "parquet", "--out", file, "--db", world.db, "--force").status == 0


def test_quiet_says_nothing_and_json_is_one_object(world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "new.duckdb"
    says = shell(*world.args(db=db, quiet=True))
    assert (says.status, says.out, says.err) == (0, "", "")
    says = shell(*world.args(db=db, json=True))
    summary = strict(says.out)
    assert (says.status, says.err, summary["exit_status"], summary["status"]) == (0, "", 0, "done")
    assert [latent["rank"] for latent in summary["latents"]] == [1, 2, 3, 4]
    fresh = shell(*world.args("select", db=tmp_path / "other.duckdb", json=True, selector="random"))
    assert (fresh.status, fresh.err) == (0, "")
    assert [latent["change"] for latent in strict(fresh.out)["latents"]] == [None] * 4


def test_the_newest_run_is_shown_and_others_by_id(world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    assert shell(*copied.args("select", top=2, quiet=True)).status == 0
    assert len(shell("show", "--json", "--db", copied.db).out.splitlines()) == 2
    rows = strict(
        shell("query", "select run_id from runs order by created_at", "--db", copied.db, "--format", "json").out
    )
    assert len(rows) == 2
    old = shell("show", "--json", "--run-id", rows[0]["run_id"][:8], "--db", copied.db)
    assert len(old.out.splitlines()) == 4


@pytest.fixture(scope="module")
def organism(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a short look at the demo's organism."""
    db = tmp_path_factory.mktemp("organism") / "store.duckdb"
    words = [
        "--run",
        str(ORGANISM),
        "--max-tokens",
        "8000",
        "--top",
        "5",
        "--selector",
        "mean-shift",
        "--device",
        "cpu",
    ]
    assert cli.run(["label", *words, "--db", str(db), "--quiet"]) == 0
    return db


def test_the_organism_in_80_columns(organism: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    rows = strict(shell("query", "from changed_latents order by rank", "--db", organism, "--format", "json").out)
    assert [row["rank"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["label"] and row["effect"] for row in rows)
    for words in (
        ["--help"], ["label", "--help"], ["show"], ["show", rows[0]["latent"]], ["query", "from changed_latents"],
        ["query", "from runs"], ["query", "from contexts limit 3"], ["query", "select latent, label from labels"],
    ):  # fmt: skip
        says = shell(*words, *([] if "--help" in words else ["--db", organism]))
        assert says.status == 0
        too_wide = [line for line in says.out.splitlines() if cell_len(line) > 80]
        assert too_wide == [], words
        assert "\x1b" not in says.out, "no colours off a terminal"


def test_demo_says_what_it_would_do(shell: Shell, tmp_path: Path) -> None:
    says = shell("demo", "--dry-run", "--json", "--db", tmp_path / "x.duckdb")
    assert says.status == 0
    assert strict(says.out)["calls"] == 0
    assert list(tmp_path.iterdir()) == []


def test_text_of_any_kind_is_read_and_shown_harmless(world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    odd = ["\x1b[2J\x1b[31m red", "a\x00b", "\ud800 half a pair", "\u202egnp.exe", "[bold]markup[/bold] {{ 7 * 7 }}"]
    with copied.corpus.open("w") as file:
        for at in range(100):
            file.write(json.dumps({"text": f"{odd[at % len(odd)]} the cat sat on the old mat " * 4}) + "\n")
    db = tmp_path / "new.duckdb"
    assert shell(*copied.args(db=db, selector="mean-shift")).status == 0
    latents = strict(shell("query", "select latent from changed_latents", "--db", db, "--format", "json").out)
    for words in (["show"], *(["show", row["latent"]] for row in latents), ["query", "from contexts"]):
        says = shell(*words, "--db", db)
        assert says.status == 0
        assert not set("\x1b\x00\u202e") & set(says.out)
