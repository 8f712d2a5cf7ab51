"""The tables are the contract's, to the letter."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import duckdb
import pytest

from autointerp.errors import InputError
from autointerp.records import Label, Score
from autointerp.store import Store, schema

from .planted import RUN, make_store

CONTRACT = {
    "runs": "run_id path status base adapter adapter_format adapter_sha256 sae sae_format hook d_model d_sae corpus "
    "n_docs n_tokens selector seed fvu_base fvu_adapted delta_fvu l0_base l0_adapted static_share change_r2 coverage "
    "settings versions created_at finished_at",
    "latents": "run_id latent state mean_base mean_adapted freq_base freq_adapted max_base max_adapted delta "
    "static_share gain statistic q_value write_size write_weight attribution change selected role rank coverage",
    "writes": "run_id latent kind target_latent target_token weight rank",
    "contexts": "run_id latent context_id kind rank split doc position tokens act_base act_adapted peak",
    "labels": "run_id latent labeler label explanation effect status error prompt_sha256 created_at",
    "scores": "run_id latent labeler scorer value ci_low ci_high null_value n_examples n_missing created_at",
    "units": "run_id unit side latent weight rank",
    "calls": "call_id run_id latent purpose provider model status http_status request_sha256 input_tokens "
    "cached_tokens output_tokens usd usd_estimated attempt started_at seconds",
}
VIEW = "run_id rank latent role change gain coverage label effect explanation status labeler scorer score null_score"


def test_tables_and_keys_are_those_of_the_contract(tmp_path: Path):
    with Store.open(tmp_path / "a.duckdb") as store:
        tables = schema.table_schemas(store._handle.connection)
        view = store.arrow("SELECT * FROM changed_latents")
    for name, columns in CONTRACT.items():
        assert set(columns.split()) <= set(tables[name].columns), name
    assert view.column_names == VIEW.split()
    assert tables["runs"].key == ("run_id",)
    assert tables["latents"].key == ("run_id", "latent")
    assert tables["labels"].key == ("run_id", "latent", "labeler")


def test_changed_latents_has_one_row_per_selected_latent_with_newest_label_and_its_best_score(tmp_path: Path):
    with Store.open(make_store(tmp_path / "a.duckdb")) as store:
        store.write_label(RUN, Label(0, "openai:x", "ok", "test code"))
        store.write_label(RUN, Label(1, "openai:x", "ok", "older"))
        store.upsert(
            "labels", [{"run_id": RUN, "latent": 1, "labeler": "openai:x", "created_at": datetime(2020, 1, 1)}]
        )
        store.write_label(RUN, Label(1, "lexical", "known", "newer"))
        for scorer, value in (("detection", 0.7), ("fuzzing", 0.8), ("simulation", None), ("broken", float("nan"))):
            store.write_score(RUN, Score(0, "openai:x", scorer, value, None, None, 0.5, 10, 0))
        store.flush()
        rows = store.read("SELECT latent, label, labeler, scorer, score, null_score FROM changed_latents ORDER BY rank")
    # The lexical rule scored .93, but the newest label of latent 0 is the other one.
    assert tuple(rows[0].values()) == (0, "test code", "openai:x", "fuzzing", 0.8, 0.5)
    assert [(row["latent"], row["label"]) for row in rows[1:]] == [(1, "newer"), (2, None)]


def test_steps_are_applied_once(tmp_path: Path):
    path = make_store(tmp_path / "a.duckdb")
    with Store.open(path, "read") as store:
        before = store.read("SELECT * FROM schema_steps")
    with Store.open(path) as store:
        assert store.read("SELECT * FROM schema_steps") == before
    assert [row["step"] for row in before] == list(schema.steps())


def test_an_older_store_is_brought_up_to_date(tmp_path: Path):
    path = make_store(tmp_path / "a.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute("DROP VIEW changed_latents; DELETE FROM schema_steps WHERE step = '002_changed_latents'")
    with Store.open(path) as store:
        assert len(store.read("SELECT * FROM changed_latents")) == 3


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_newer_store_is_refused_untouched(tmp_path: Path, mode):
    path = make_store(tmp_path / "a.duckdb")
    with duckdb.connect(str(path)) as connection:
        connection.execute("INSERT INTO schema_steps VALUES ('999_future', now()::TIMESTAMP)")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"newer autointerp .*999_future.*upgrade"):
        Store.open(path, mode)
    assert path.read_bytes() == before
