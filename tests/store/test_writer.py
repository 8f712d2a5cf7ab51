"""What is acknowledged is committed, in order, in groups, whatever else goes wrong."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from autointerp.records import Label
from autointerp.store import Store

from .planted import RUN, context, write_run


@pytest.fixture
def store(tmp_path: Path):
    with Store.open(tmp_path / "a.duckdb") as store:
        yield store


def test_an_upsert_changes_just_the_given_columns(store: Store):
    store.upsert("runs", [{"run_id": "a", "status": "running", "seed": 3}, {"run_id": "b", "status": "running"}])
    store.upsert("runs", [{"run_id": "a", "status": "done"}]).result()
    rows = store.read("SELECT run_id, status, seed FROM runs ORDER BY run_id")
    assert [tuple(row.values()) for row in rows] == [("a", "done", 3), ("b", "running", None)]


def test_of_rows_with_one_key_the_last_stands(store: Store):
    store.upsert("runs", [{"run_id": "a", "status": s} for s in ("1", "2", "3")])
    for status in ("4", "5"):  # lands in one group, hence in one statement
        store.upsert("runs", [{"run_id": "a", "status": status}])
    store.flush()
    assert store.read("SELECT status FROM runs") == [{"status": "5"}]


def test_an_insert_is_committed_without_waiting_for_company_and_takes_no_known_key(store: Store):
    waiting = store.upsert("runs", [{"run_id": "a"}])
    store.insert("runs", [{"run_id": "b", "status": "done"}]).result()
    assert waiting.done(), "what came before it is in its group"
    twice = store.insert("runs", [{"run_id": "c"}, {"run_id": "b", "status": "again"}])
    beside = store.upsert("runs", [{"run_id": "d"}])
    with pytest.raises(duckdb.ConstraintException):
        twice.result()
    beside.result()
    rows = [tuple(row.values()) for row in store.read("SELECT run_id, status FROM runs ORDER BY run_id")]
    assert rows == [("a", None), ("b", "done"), ("d", None)]
    with pytest.raises(duckdb.ConstraintException):
        store.flush()


def test_values_of_every_kind_come_back(store: Store):
    now = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    settings = {"top": 50, "nan": float("nan"), "path": Path("x"), "lone": "\ud800"}
    store.upsert("runs", [{"run_id": "a\ud800", "settings": settings, "created_at": now, "n_tokens": np.int64(5)}])
    store.upsert("contexts", pa.table({"run_id": ["a"], "latent": [1], "context_id": [2], "act_base": [[0.5, 1.0]]}))
    store.flush()
    (run,) = store.read("SELECT run_id, settings->>'$.top' AS top, settings->'$.nan' AS nan, created_at FROM runs")
    assert run == {"run_id": "a?", "top": "50", "nan": "null", "created_at": now.replace(tzinfo=None)}
    assert store.read("SELECT act_base FROM contexts") == [{"act_base": [0.5, 1.0]}]


@pytest.mark.parametrize(
    "rows",
    [
        [{"run_id": "a", "colour": 1}],
        [{"status": "done"}],
        [{"run_id": "a", "seed": "x"}],
        [{"run_id": "a", "settings": "{"}],
    ],
)
def test_rows_that_do_not_fit_fail_where_they_are_given(store: Store, rows):
    with pytest.raises((ValueError, pa.ArrowInvalid, pa.ArrowTypeError)):
        store.upsert("runs", rows)


def test_a_wrong_statement_fails_alone_and_flush_tells(store: Store):
    before = store.upsert("runs", [{"run_id": "a"}])
    wrong = store.execute("DELETE FROM no_such_table")
    after = store.upsert("runs", [{"run_id": "b"}])
    with pytest.raises(duckdb.CatalogException):
        store.flush()
    assert before.result() is None
    assert after.result() is None
    assert isinstance(wrong.exception(), duckdb.CatalogException)
    store.flush()  # told once
    assert len(store.read("SELECT * FROM runs")) == 2


def test_contexts_of_a_latent_are_replaced_whole(store: Store):
    store.write_contexts(RUN, 1, [context(1, i) for i in range(5)])
    store.write_contexts(RUN, 2, [context(2, 0)])
    store.write_contexts(RUN, 1, [context(1, i, "gain") for i in range(2)]).result()
    rows = store.read("SELECT latent, kind FROM contexts ORDER BY latent, context_id")
    assert [tuple(row.values()) for row in rows] == [(1, "gain"), (1, "gain"), (2, "top")]


def test_what_is_written_is_read_back_as_records(store: Store):
    write_run(store)
    evidence = store.evidence(RUN, 0)
    assert store.selected(RUN) == [0, 1, 2]
    assert evidence.contexts == (context(0, 0), context(0, 1, "gain"), context(0, 2, "silent", "score"))
    assert [(w.kind, w.target_token, w.target_latent) for w in evidence.writes] == [
        ("promotes", " test", None),
        ("raises", None, 7),
    ]
    assert [(p.side, p.token) for p in evidence.predictions] == [("adapted", " test"), ("base", " x")]
    assert (evidence.rank, evidence.gain, evidence.state) == (1, 0.25, "live")
    label = store.labels(RUN, "lexical")[0]
    assert (label.status, label.rule) == ("known", {"token": [1]})


def test_every_latent_of_a_large_dictionary_is_written_at_once(store: Store):
    m = 65_536
    values = np.random.default_rng(0).normal(size=m)
    columns: dict[str, np.ndarray] = dict.fromkeys(
        ("mean_base", "mean_adapted", "freq_base", "freq_adapted", "delta", "gain"), values
    )
    columns["rank"] = np.where(np.arange(m) < 50, np.arange(m) + 1.0, np.nan)
    start = time.monotonic()
    store.write_latents(RUN, columns).result()
    assert time.monotonic() - start < 1.5
    store.write_latents(RUN, {"mean_base": values[:100]}).result()  # replaces the run's rows
    assert store.read("SELECT count(*) AS n, count(rank) AS ranked FROM latents") == [{"n": 100, "ranked": 0}]


def test_rows_are_committed_in_groups(store: Store):
    start = time.monotonic()
    for i in range(1000):
        store.upsert("calls", [{"call_id": str(i), "status": "sent"}])
    store.flush()
    assert time.monotonic() - start < 3  # one commit each would take some ten seconds
    assert store.read("SELECT count(*) AS n FROM calls") == [{"n": 1000}]


def test_many_threads_write_and_read(store: Store):
    def work(thread: int) -> None:
        for i in range(30):
            store.upsert("calls", [{"call_id": f"{thread}-{i}", "latent": thread}])
            store.read("SELECT count(*) FROM calls")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store.flush()
    assert store.read("SELECT count(*) AS n FROM calls") == [{"n": 180}]


def test_a_cancelled_task_does_not_take_its_row_along(store: Store):
    async def pay() -> None:
        await asyncio.wrap_future(store.upsert("calls", [{"call_id": "paid"}]))

    async def main() -> None:
        task = asyncio.create_task(pay())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await store.aflush()

    asyncio.run(main())
    assert store.read("SELECT call_id FROM calls") == [{"call_id": "paid"}]


def test_what_is_queued_survives_an_exception_in_the_body(tmp_path: Path):
    def body() -> None:
        with Store.open(tmp_path / "a.duckdb") as store:
            store.write_label(RUN, Label(1, "lexical", "ok", "kept"))
            raise RuntimeError("body")

    with pytest.raises(RuntimeError, match="body"):
        body()
    with Store.open(tmp_path / "a.duckdb", "read") as store:
        assert store.labels(RUN, "lexical")[1].label == "kept"
    assert [p.name for p in tmp_path.iterdir()] == ["a.duckdb"]


def test_close_tells_what_failed_and_a_closed_store_takes_nothing(tmp_path: Path):
    store = Store.open(tmp_path / "a.duckdb")
    store.execute("DELETE FROM no_such_table")
    with pytest.raises(duckdb.CatalogException):
        store.close()
    store.close()
    with pytest.raises(ValueError, match="closed"):
        store.upsert("runs", [{"run_id": "a"}])


def test_a_reader_cannot_write(tmp_path: Path):
    Store.open(tmp_path / "a.duckdb").close()
    with Store.open(tmp_path / "a.duckdb", "read") as store, pytest.raises(ValueError, match="reading only"):
        store.upsert("runs", [{"run_id": "a"}])


def test_a_full_disk_is_named_and_loses_nothing_that_was_acknowledged(tmp_path: Path):
    path = tmp_path / "a.duckdb"
    script = f"""
        import os, resource
        from autointerp.store import Store, StoreError
        store = Store.open({str(path)!r})
        store.upsert("runs", [{{"run_id": "kept"}}]).result()
        resource.setrlimit(resource.RLIMIT_FSIZE, (os.path.getsize({str(path)!r}) + 300_000, resource.RLIM_INFINITY))
        text = os.urandom(100_000).hex()
        failed = []
        for i in range(100):
            try:
                row = {{"run_id": "r", "latent": i, "labeler": "x", "label": text + str(i)}}
                store.upsert("labels", [row]).result()
            except StoreError as error:
                failed.append(str(error))
                if len(failed) == 2:
                    break
        assert len(failed) == 2 and failed[0] == failed[1], failed
        try:
            store.flush()
        except StoreError as error:
            failed.append(str(error))
        try:
            store.read("SELECT count(*) FROM labels")
        except StoreError as error:
            assert str(error) == failed[0]  # where it was a checkpoint that failed, DuckDB reads no more either
        try:
            store.close()
        except StoreError as error:
            failed.append(str(error))
        print(i - 1, len(failed), failed[0])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    n_kept, n_told, message = done.stdout.split(" ", 2)
    assert n_told == "4"
    assert str(path) in message
    assert "cannot be written" in message
    with Store.open(path) as store:
        assert store.read("SELECT run_id FROM runs") == [{"run_id": "kept"}]
        assert store.read("SELECT count(*) AS n FROM labels") == [{"n": int(n_kept)}]
