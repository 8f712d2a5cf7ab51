"""A copy of the store that other processes may read while this one holds the file's lock."""

from __future__ import annotations

import contextlib
import os
import shutil
import time

import duckdb

from autointerp.store.files import replica_of

FATAL = (duckdb.IOException, duckdb.FatalException, duckdb.InternalException, duckdb.OutOfMemoryException, OSError)
"""After one of these a store cannot be written any more."""

MIN_INTERVAL_S = 1.0
COST_FACTOR = 20
"""A copy is made at most once in this many times what it takes: it never costs more than 5 % of one core."""


class Replica:
    """Publishes the committed state of a store under `<path>.replica`, atomically. Used by the writer thread alone."""

    def __init__(self, path: str):
        self.path = path
        self.stale = True
        self._not_before = 0.0
        # Kept open until DuckDB has let go of the file: closing it earlier would drop DuckDB's lock (see files.py).
        self._file = open(path, "rb")  # noqa: SIM115
        _unlink(replica_of(path))  # what a killed writer left

    def wait_s(self, now: float) -> float | None:
        """Seconds until the next copy is due; None when there is nothing new to show."""
        return max(0.0, self._not_before - now) if self.stale else None

    def publish(self, cursor: duckdb.DuckDBPyConnection) -> bool:
        """Copy the store after a checkpoint; between transactions only. False when it could not be done just now.

        A missing replica costs nobody's work, so a full disk here is no error: it is tried again, more rarely.
        """
        start = time.monotonic()
        draft = replica_of(self.path) + ".new"
        try:
            done = self._checkpointed(cursor)
            if done:
                with open(draft, "wb") as copy:
                    self._file.seek(0)
                    shutil.copyfileobj(self._file, copy, 1 << 20)
                os.replace(draft, replica_of(self.path))
                self.stale = False
        except OSError:
            _unlink(draft)
            done = False
        now = time.monotonic()
        self._not_before = now + max(MIN_INTERVAL_S, COST_FACTOR * (now - start))
        return done

    def close(self) -> None:
        """Take the replica away; after DuckDB has closed the store, which others can read itself from now on."""
        self._file.close()
        _unlink(replica_of(self.path))

    def _checkpointed(self, cursor: duckdb.DuckDBPyConnection) -> bool:
        """Whether all that was committed is in the file itself, none of it in the log beside it."""
        try:
            cursor.execute("CHECKPOINT")
        except FATAL:
            raise
        except duckdb.Error:  # a reader in this process stands in the way
            return False
        wal = self.path + ".wal"
        return not os.path.exists(wal) or os.path.getsize(wal) == 0


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
