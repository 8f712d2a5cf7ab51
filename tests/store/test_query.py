"""A user's SQL reads the store and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from autointerp.errors import InputError
from autointerp.results import Results
from autointerp.store.query import run_query

from .planted import RUN, make_store


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("query") / "a.duckdb")


@pytest.mark.parametrize(
    ("sql", "n_rows"),
    [
        ("SELECT latent FROM changed_latents ORDER BY rank;", 3),
        ("FROM runs", 1),
        ("WITH a AS (SELECT 1) SELECT * FROM a", 1),
        ("SHOW TABLES", 14),
        ("DESCRIBE changed_latents", 15),
        ("EXPLAIN SELECT 1", 1),
        ("PIVOT (SELECT state, role, latent FROM latents) ON state USING sum(latent)", 1),
        ("SELECT settings->>'$.top' FROM runs", 1),
    ],
)
def test_what_reads_is_answered(path: Path, sql: str, n_rows: int):
    assert run_query(path, sql).num_rows == n_rows


@pytest.mark.parametrize(
    ("sql", "says"),
    [
        ("INSERT INTO runs (run_id) VALUES ('x')", "INSERT"),
        ("DELETE FROM runs", "DELETE"),
        ("UPDATE runs SET status = 'x'", "UPDATE"),
        ("DROP TABLE runs", "DROP"),
        ("CREATE TABLE x (a INTEGER)", "CREATE"),
        ("COPY runs TO 'stolen.csv'", "COPY"),
        ("EXPORT DATABASE 'stolen'", "EXPORT"),
        ("ATTACH 'other.duckdb'", "ATTACH"),
        ("SET enable_external_access = true", "SET"),
        ("PRAGMA threads = 1", "(SET|PRAGMA)"),
        ("INSTALL httpfs", "LOAD"),
        ("CHECKPOINT", "CALL"),
        ("EXPLAIN ANALYZE DELETE FROM runs", "read-only"),
        ("SELECT * FROM 'secret.csv'", "disabled by configuration"),
        ("SELECT * FROM read_text('secret.csv')", "disabled by configuration"),
        ("SELECT * FROM glob('*')", "disabled by configuration"),
        ("SELECT 1; SELECT 2", "2 statements"),
        ("SELECT 1; DROP TABLE runs", "2 statements"),
        ("", "empty"),
        ("-- nothing", "empty"),
        ("SELEC 1", "syntax error"),
        ("SELECT * FROM labelz", "labelz does not exist"),
        ("SELECT nope FROM labels", "nope"),
        ("SELECT 'x'::INTEGER", "Could not convert"),
    ],
)
def test_what_does_not_is_refused_in_one_line_and_changes_nothing(path: Path, tmp_path: Path, monkeypatch, sql, says):
    monkeypatch.chdir(tmp_path)
    Path("secret.csv").write_text("a\n1\n")
    before = path.read_bytes()
    with pytest.raises(InputError, match=says) as caught:
        run_query(path, sql)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["secret.csv"]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_a_python_variable_is_not_a_table(path: Path):
    import pyarrow as pa

    labelz = pa.table({"a": [1]})
    with pytest.raises(InputError, match="labelz"):
        run_query(path, "SELECT * FROM labelz")
    del labelz


def test_columns_of_one_name_are_all_kept(path: Path):
    answer = Results(path).sql("SELECT 1 AS a, 2 AS a, 3 AS b")
    assert (answer.columns, answer.fetchall()) == (["a", "a_1", "b"], [(1, 2, 3)])


def test_results_know_their_run_and_give_frames(path: Path):
    results = Results(path, "run", exit_status=3)
    assert (results.run_id, results.status, results.exit_status) == (RUN, "done", 3)
    assert list(results.df()["latent"]) == [0, 1, 2]
    answer = results.sql("SELECT latent, label FROM changed_latents WHERE rank = ?", [1])
    assert list(answer.df().columns) == ["latent", "label"]
    assert "after def" in repr(answer)
    assert "\x1b" not in repr(answer)
    with pytest.raises(InputError, match=f"no run 'other': choose one of {RUN}"):
        Results(path, "other")
