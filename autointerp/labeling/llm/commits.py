"""Rows of many calls in few statements: a statement costs the store far more than a row."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from autointerp.labeling.base import CallStore

PROMPT_S = 0.025
LINGER_S = 0.1
"""How long a row waits for company: one that a call waits for with its slot taken, and any other."""

Row = Mapping[str, Any]
_Items = list[tuple[Row, asyncio.Future[None]]]
_Load = dict[tuple[str, tuple[str, ...]], _Items]
"""By table and columns."""


class Commits:
    """Collects rows and hands them to the store table by table. Belongs to one event loop.

    One load is under way at a time: what comes meanwhile makes up the next. `room` is how many rows may wait for
    LINGER_S; with more, all go at once, and before any that are put first. So no more answers are lost by a
    crash than calls in flight and that many rows.
    """

    def __init__(self, store: CallStore, room: Callable[[], int] = lambda: 0):
        self._store = store
        self._room = room
        self._first: _Load = {}
        self._others: _Load = {}
        self._n_others = 0
        self._uncommitted: set[asyncio.Future[None]] = set()
        self._oldest = 0.0
        self._busy = False
        self._timer: asyncio.TimerHandle | None = None

    def put(self, table: str, row: Row) -> asyncio.Future[None]:
        """Queue a row. The future resolves when it is committed, and fails with what the store raises.

        Rows that are queued together have no order among each other; await one before queueing what depends on it.
        """
        if not self._n_others:
            self._oldest = asyncio.get_running_loop().time()
        self._n_others += 1
        return self._queue(self._others, table, row)

    def put_first(self, table: str, row: Row) -> asyncio.Future[None]:
        """As `put`, sooner, for a row whose key is new."""
        return self._queue(self._first, table, row)

    async def settled(self) -> None:
        """Returns when nothing waits any more: not every row has somebody who waits for it."""
        while self._uncommitted:
            await asyncio.wait(self._uncommitted)

    def _queue(self, load: _Load, table: str, row: Row) -> asyncio.Future[None]:
        committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._uncommitted.add(committed)
        committed.add_done_callback(self._uncommitted.discard)
        load.setdefault((table, tuple(row)), []).append((row, committed))
        self._schedule()
        return committed

    def _schedule(self) -> None:
        if self._busy or not (self._first or self._others):
            return
        loop = asyncio.get_running_loop()
        soon = loop.time() + PROMPT_S
        at = soon if self._first or self._n_others > self._room() else max(soon, self._oldest + LINGER_S)
        if self._timer is None or at < self._timer.when():
            if self._timer is not None:
                self._timer.cancel()
            self._timer = loop.call_at(at, self._send)

    def _send(self) -> None:
        self._timer, self._busy = None, True
        written: list[asyncio.Future[None]] = []
        waited_s = asyncio.get_running_loop().time() - self._oldest
        if self._n_others > self._room() or waited_s >= LINGER_S:
            others, self._others, self._n_others = self._others, {}, 0
            # Answers before what they cost: after a crash in between money is in doubt, but nothing is asked twice.
            for (table, _), items in sorted(others.items(), key=lambda entry: entry[0][0]):
                written += _hand_over(self._store.upsert, table, items)
        first, self._first = self._first, {}
        for (table, _), items in first.items():
            written += _hand_over(self._store.insert, table, items)
        if written:
            written[-1].add_done_callback(lambda _: self._next())  # the store commits in order
        else:
            self._next()

    def _next(self) -> None:
        self._busy = False
        self._schedule()


def _hand_over(
    write: Callable[[str, Sequence[Row]], Future[None]], table: str, items: _Items
) -> list[asyncio.Future[None]]:
    """Gives rows to the store. Empty when it does not take them: then whoever queued one is told, as later."""
    committed = [future for _, future in items]
    try:
        written = asyncio.wrap_future(write(table, [row for row, _ in items]))
    except Exception as error:  # this is the loop's own stack
        _resolve(committed, error)
        return []
    written.add_done_callback(lambda done: _resolve(committed, done.exception()))
    return [written]


def _resolve(futures: list[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in futures:
        if future.done():
            continue  # its owner was cancelled
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
            future.exception()  # its owner may be gone: then nobody needs a warning that it was not looked at
