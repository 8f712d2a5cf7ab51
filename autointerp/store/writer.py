"""The one thread that writes: it commits what is queued in groups, so that nobody else waits for a disk."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import duckdb
import pyarrow as pa

from autointerp.errors import AutointerpError
from autointerp.store.files import first_line
from autointerp.store.replica import FATAL, Replica
from autointerp.store.rows import last_per_key
from autointerp.store.schema import TableSchema

GROUP_ROWS = 200
GROUP_S = 0.25
LINGER_S = 0.02
"""A group is committed after GROUP_ROWS rows or GROUP_S seconds, or sooner: when nothing came for LINGER_S, or at once
when something urgent came."""


class StoreError(AutointerpError):
    """The store cannot be written any more (disk full, I/O error). What was acknowledged is safe; stop spending."""

    exit_status = 1


@dataclass(frozen=True, eq=False)
class Upsert:
    """Rows to insert, or to update in the given columns where the key exists."""

    schema: TableSchema
    rows: pa.Table
    fresh: bool = False
    """The keys are new: half the work. One that is not is an error."""

    def run(self, cursor: duckdb.DuckDBPyConnection) -> None:
        rows = self.rows if self.fresh else last_per_key(self.rows, self.schema.key)
        cursor.register("incoming_rows", rows)
        try:
            cursor.execute(
                f'INSERT INTO "{self.schema.name}" BY NAME SELECT * FROM incoming_rows'
                + ("" if self.fresh else self._conflict(rows.column_names))
            )
        finally:
            with contextlib.suppress(duckdb.Error):  # cannot be done after an error; the next rows replace it
                cursor.unregister("incoming_rows")

    def _conflict(self, columns: Sequence[str]) -> str:
        key = self.schema.key
        changes = ", ".join(f'"{name}" = excluded."{name}"' for name in columns if name not in key)
        return f" ON CONFLICT ({', '.join(key)}) " + (f"DO UPDATE SET {changes}" if changes else "DO NOTHING")


@dataclass(frozen=True, eq=False)
class Statement:
    """Any statement, in order with the upserts."""

    sql: str
    params: Sequence[Any] = ()

    def run(self, cursor: duckdb.DuckDBPyConnection) -> None:
        cursor.execute(self.sql, list(self.params))


Step = Upsert | Statement


@dataclass(frozen=True, eq=False)
class Work:
    """Steps that are committed together or not at all."""

    steps: tuple[Step, ...]
    future: Future[None] = field(default_factory=Future)
    urgent: bool = False
    """Does not wait for company."""
    closes_group: bool = False
    publishes: bool = False
    stops: bool = False

    @property
    def n_rows(self) -> int:
        return sum(step.rows.num_rows if isinstance(step, Upsert) else 1 for step in self.steps)


class Writer:
    """Owns the connection that writes to one store, the replica beside it, and the thread that serves both."""

    def __init__(self, cursor: duckdb.DuckDBPyConnection, path: str):
        self.path = path
        self._cursor = cursor
        self._replica = Replica(path)
        self._queue: queue.SimpleQueue[Work] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._order = threading.Lock()
        self._fatal: StoreError | None = None
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._serve, name="autointerp-store", daemon=True)
        self._thread.start()

    def submit(self, *steps: Step, urgent: bool = False) -> Future[None]:
        """Queue steps as one unit; the future resolves when it is committed. StoreError once the store has failed.

        `urgent`: the group that it ends up in is committed at once.
        """
        return self._put(Work(steps, urgent=urgent))

    def flush(self) -> Future[None]:
        """Resolves when all that was queued before is committed; fails with the first failure since the last flush."""
        return self._put(Work((), closes_group=True))

    def publish(self) -> Future[None]:
        """As `flush`, and the replica shows it."""
        return self._put(Work((), closes_group=True, publishes=True))

    def stop(self) -> Future[None]:
        """Commit what is queued, end the thread, let go of the cursor. `remove_replica` comes after DuckDB's own close.

        The future answers as that of `flush`.
        """
        last = Work((), closes_group=True, stops=True)
        with self._order:
            self._stopping.set()
            self._queue.put(last)
        self._thread.join()
        return last.future

    def remove_replica(self) -> None:
        self._replica.close()

    def _put(self, work: Work) -> Future[None]:
        # A task that is cancelled while it waits for its commit must not take the row with it (money was spent).
        work.future.set_running_or_notify_cancel()
        with self._order:
            if self._fatal:
                raise StoreError(str(self._fatal))
            if self._stopping.is_set():
                raise ValueError(f"the store {self.path} is closed")
            self._queue.put(work)
        return work.future

    def _serve(self) -> None:
        self._publish_if_due()
        while True:
            group = self._next_group()
            try:
                self._commit(group)
                for work in group:
                    self._settle(work)
                self._publish_if_due()
            except BaseException as error:  # a bug of ours must not leave anybody waiting for an answer
                self._give_up(error)
                for work in group:
                    self._settle(work)
            if group and group[-1].stops:
                self._cursor.close()
                return

    def _next_group(self) -> list[Work]:
        """What to commit together; empty when the replica is due and nothing came."""
        group: list[Work] = []
        n_rows, deadline = 0, 0.0
        while n_rows < GROUP_ROWS and not (group and (group[-1].closes_group or group[-1].urgent)):
            now = time.monotonic()
            timeout = min(LINGER_S, deadline - now) if group else self._replica.wait_s(now)
            try:
                work = self._queue.get(timeout=None if timeout is None else max(0.0, timeout))
            except queue.Empty:
                break
            deadline = deadline or time.monotonic() + GROUP_S
            group.append(work)
            n_rows += work.n_rows
        return group

    def _commit(self, group: list[Work]) -> None:
        if self._fatal:
            return
        try:
            self._transaction([step for work in group for step in work.steps])
        except FATAL as error:
            self._give_up(error)
        except Exception:
            for work in group:  # One of them is wrong; the others must not suffer for it.
                self._commit_alone(work)

    def _commit_alone(self, work: Work) -> None:
        try:
            if not self._fatal:
                self._transaction(work.steps)
        except FATAL as error:
            self._give_up(error)
        except Exception as error:
            self._failed.append(error)
            work.future.set_exception(error)

    def _transaction(self, steps: Sequence[Step]) -> None:
        if not steps:
            return
        self._cursor.execute("BEGIN")
        try:
            for step in _merged(steps):
                step.run(self._cursor)
            self._acknowledge()
        except BaseException:
            self._rollback()
            raise
        self._replica.stale = True

    def _acknowledge(self) -> None:
        try:
            self._cursor.execute("COMMIT")
        except duckdb.Error as error:
            # Nobody else writes, so there is no conflict to lose: it was the disk, whatever DuckDB calls it.
            raise OSError(str(error)) from error

    def _rollback(self) -> None:
        # DuckDB may have rolled back by itself; the error that led here is the one to report.
        with contextlib.suppress(duckdb.Error):
            self._cursor.execute("ROLLBACK")

    def _settle(self, work: Work) -> None:
        """Resolve a future that is not resolved yet. A flush answers for all that came before it."""
        if work.publishes and self._replica.stale:
            self._publish()
        if work.future.done():
            return
        if self._fatal:
            work.future.set_exception(self._fatal)
        elif work.closes_group and self._failed:
            failed, self._failed = self._failed[0], []
            work.future.set_exception(failed)
        else:
            work.future.set_result(None)

    def _publish_if_due(self) -> None:
        if self._replica.wait_s(time.monotonic()) == 0.0:
            self._publish()

    def _publish(self) -> None:
        if self._fatal:
            return
        try:
            self._replica.publish(self._cursor)
        except FATAL as error:
            self._give_up(error)

    def failed(self, error: BaseException) -> StoreError:
        """What is said of the store once `error`, or one before it, has come."""
        message = self._fatal or (
            f"the store {self.path} cannot be written: {first_line(error)}; what was committed is safe: "
            "make room and run the same command again"
        )
        return StoreError(str(message))

    def _give_up(self, error: BaseException) -> None:
        self._fatal = self.failed(error)
        self._replica.stale = False  # nothing more will come


def _merged(steps: Sequence[Step]) -> Iterator[Step]:
    """Neighbouring upserts of the same columns as one: a statement costs far more than a row."""

    def target(step: Step) -> object:
        return (step.schema.name, step.fresh, *step.rows.column_names) if isinstance(step, Upsert) else step

    for _, run in groupby(steps, key=target):
        same = list(run)
        upserts = [step for step in same if isinstance(step, Upsert)]
        if len(upserts) > 1:
            yield replace(upserts[0], rows=pa.concat_tables([step.rows for step in upserts]))
        else:
            yield from same
