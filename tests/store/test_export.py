"""What is handed on is complete, and nothing is overwritten unasked."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from autointerp.errors import InputError
from autointerp.store.export import export

from .planted import make_store


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("export") / "a.duckdb", "run-1", "run-2")


def test_jsonl_has_one_object_per_selected_latent(path: Path, tmp_path: Path):
    out = export(path, "jsonl", tmp_path / "a.jsonl", run_id="run-1")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["run_id"], row["latent"]) for row in rows] == [("run-1", 0), ("run-1", 1), ("run-1", 2)]
    first = rows[0]
    assert (first["effect"], first["score"], len(first["contexts"])) == ("promotes ‘ test’", 0.93, 3)
    assert first["scores"][0]["n_missing"] == 1
    assert {write["target_token"] for write in first["writes"]} == {" test", None}
    assert len((export(path, "jsonl", tmp_path / "all.jsonl")).read_text().splitlines()) == 6


def test_parquet_is_the_view_or_a_folder_of_tables(path: Path, tmp_path: Path):
    view = pq.read_table(export(path, "parquet", tmp_path / "a.parquet", run_id="run-2"))
    assert view.column("latent").to_pylist() == [0, 1, 2]
    assert set(view.column("base").to_pylist()) == {"tiny"}
    folder = export(path, "parquet", tmp_path / "tables")
    assert pq.read_table(folder / "latents.parquet").num_rows == 32
    assert pq.read_table(folder / "contexts.parquet").column("tokens").to_pylist()[0][1] == " Foo"


def test_nothing_is_replaced_without_force(path: Path, tmp_path: Path):
    out = tmp_path / "a.jsonl"
    out.write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        export(path, "jsonl", out)
    assert out.read_text() == "mine"
    export(path, "jsonl", out, force=True)
    assert len(out.read_text().splitlines()) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_bad_input_is_named(path: Path, tmp_path: Path):
    with pytest.raises(InputError, match="'xml': choose one of jsonl, parquet"):
        export(path, "xml", tmp_path / "a.xml")
    with pytest.raises(InputError, match="there is no run 'x'"):
        export(path, "jsonl", tmp_path / "a.jsonl", run_id="x")
    with pytest.raises(InputError, match="cannot export"):
        export(path, "jsonl", path / "a.jsonl")
    assert list(tmp_path.iterdir()) == []
