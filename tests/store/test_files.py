"""What may be opened, and that what may not is left as it was."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
import pytest

from autointerp.errors import InputError
from autointerp.results import Results
from autointerp.store import Store
from autointerp.store.query import run_query

from .planted import RUN, make_store, write_run

WRITER = """
    import sys
    from autointerp.store import Store
    with Store.open(sys.argv[1]) as store:
        store.upsert("runs", [{"run_id": "live", "status": "0"}]).result()
        print("ready", flush=True)
        for line in sys.stdin:
            store.upsert("runs", [{"run_id": "live", "status": line.strip()}]).result()
            print("committed", flush=True)
"""


@contextmanager
def writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that writes to the store until its standard input ends."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        if process.poll() is None:
            process.communicate(timeout=30)


def status(path: Path) -> str | None:
    rows = run_query(path, "SELECT status FROM runs WHERE run_id = 'live'").to_pylist()
    return rows[0]["status"] if rows else None


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file()}


def refused(path: Path, message: str, mode: str = "write") -> None:
    """Opening fails in one line that names the file, and changes nothing in its folder."""
    before = snapshot(path.parent) if path.parent.is_dir() else None
    with pytest.raises(InputError, match=message) as caught:
        Store.open(path, mode)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert any(str(place) in str(caught.value) for place in (path, path.parent, path.parent.parent))
    assert (snapshot(path.parent) if path.parent.is_dir() else None) == before


def test_writing_makes_the_folder_reading_makes_nothing(tmp_path: Path):
    path = tmp_path / "new" / "folder" / "a.duckdb"
    refused(path, "run `autointerp label` first", "read")
    assert not (tmp_path / "new").exists()
    Store.open(path).close()
    assert [p.name for p in path.parent.iterdir()] == ["a.duckdb"]


@pytest.mark.parametrize("mode", ["read", "write"])
@pytest.mark.parametrize("content", [b"", b"notes\n", b"x" * 100_000], ids=["empty", "text", "long"])
def test_a_file_that_is_no_database_is_refused(tmp_path: Path, mode, content):
    path = tmp_path / "a.duckdb"
    path.write_bytes(content)
    refused(path, "not an autointerp store", mode)


@pytest.mark.parametrize("mode", ["read", "write"])
def test_other_databases_are_refused(tmp_path: Path, mode):
    lite = tmp_path / "a.sqlite"
    with sqlite3.connect(lite) as connection:
        connection.execute("CREATE TABLE t (a)")
    connection.close()
    refused(lite, "not an autointerp store", mode)
    other = tmp_path / "b.duckdb"
    with duckdb.connect(str(other)) as connection:
        connection.execute("CREATE TABLE runs (a INTEGER)")
    refused(other, "not an autointerp store", mode)


@pytest.mark.parametrize("mode", ["read", "write"])
def test_a_damaged_store_is_refused(tmp_path: Path, mode):
    path = make_store(tmp_path / "a.duckdb")
    path.write_bytes(path.read_bytes()[:6000] + b"\0" * 60_000)
    refused(path, "cannot be opened as a DuckDB file", mode)


def test_read_only_files_and_folders_are_refused_for_writing(tmp_path: Path):
    path = make_store(tmp_path / "sub" / "a.duckdb")
    path.chmod(0o444)
    refused(path, "read-only")
    path.chmod(0o644)
    path.parent.chmod(0o555)
    try:
        refused(path, "read-only")
        refused(path.parent / "new.duckdb", "read-only")
        refused(path.parent / "deeper" / "new.duckdb", "read-only")
        with Store.open(path, "read") as store:
            assert store.run_id() == RUN
    finally:
        path.parent.chmod(0o755)


def test_folders_in_the_place_of_files_and_the_reverse_are_refused(tmp_path: Path):
    refused(tmp_path, "is a folder")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file" / "a.duckdb", "not a folder")


def test_one_process_opens_a_store_once_for_writing(tmp_path: Path):
    with Store.open(tmp_path / "a.duckdb"), pytest.raises(InputError, match="already open in this process"):
        Store.open(tmp_path / "a.duckdb")


def test_a_store_held_by_another_process_names_it_and_can_be_queried(tmp_path: Path):
    path = tmp_path / "a.duckdb"
    with writer(path) as process:
        with pytest.raises(InputError, match=rf"PID {process.pid}.*`autointerp query` works"):
            Store.open(path, lock_wait_s=0.05)
        assert status(path) in (None, "0")  # the state of a moment ago
        assert process.stdin
        assert process.stdout
        process.stdin.write("1\n")
        process.stdin.flush()
        assert process.stdout.readline() == "committed\n"
        deadline = time.monotonic() + 10
        while status(path) != "1":
            assert time.monotonic() < deadline, "the replica does not follow"
            time.sleep(0.01)
        # The replica was made without letting go of the lock.
        with pytest.raises(InputError, match="in use by another process"):
            Store.open(path, lock_wait_s=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.duckdb"]
    assert status(path) == "1"


def test_after_kill_9_nothing_acknowledged_is_lost_and_the_stale_replica_is_ignored(tmp_path: Path):
    path = tmp_path / "a.duckdb"
    with writer(path) as process:
        assert process.stdin
        assert process.stdout
        for line in ("1\n", "2\n", "3\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == "committed\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert (tmp_path / "a.duckdb.replica").exists()
    before = snapshot(tmp_path)
    assert status(path) == "3"
    assert snapshot(tmp_path) == before
    with Store.open(path) as store:
        assert store.read("SELECT status FROM runs") == [{"status": "3"}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.duckdb"]


def test_a_writer_waits_for_a_passing_query(tmp_path: Path):
    path = make_store(tmp_path / "a.duckdb")
    script = """
        import sys
        from autointerp.store import Store
        with Store.open(sys.argv[1], "read"):
            print("ready", flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(InputError, match="in use"):
            Store.open(path, lock_wait_s=0.0)
        threading.Timer(0.2, process.stdin.close).start()
        Store.open(path, lock_wait_s=20).close()


def test_the_writing_process_itself_can_query(tmp_path: Path):
    path = tmp_path / "a.duckdb"
    with Store.open(path) as store:
        write_run(store)
        results = Results(path)
        assert results.status == "done"
        store.upsert("runs", [{"run_id": RUN, "status": "again"}])
        assert results.status == "again"  # what was queued before the question is in the answer
        with pytest.raises(InputError, match="INSERT"):
            results.sql("INSERT INTO runs (run_id) VALUES ('x')")
        # None of this let go of the lock (closing any handle on the file would).
        other = f"import duckdb; duckdb.connect({str(path)!r}, read_only=True)"
        done = subprocess.run([sys.executable, "-c", other], capture_output=True, text=True)
        assert "Could not set lock" in done.stderr
