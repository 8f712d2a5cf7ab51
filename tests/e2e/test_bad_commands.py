# ruff: noqa: E501 (a table of cases reads best with a case on a line)
"""Bad input of the other commands, and stores that are not ours to write: one line, exit status 2, nothing changed."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import duckdb
import pytest

from .world import Shell, World, refused


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
