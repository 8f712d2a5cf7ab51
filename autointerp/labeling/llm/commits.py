"""Rows of many calls in few statements: a statement costs the store far more than a row."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from autointerp.labeling.base import CallStore

LINGER_S = 0.004
"""How long a row waits for company. The store itself waits some 20 ms before it commits."""


class Commits:
    """Collects rows and hands them to the store table by table. Belongs to one event loop."""

    def __init__(self, store: CallStore):
        self._store = store
        self._waiting: dict[tuple[str, tuple[str, ...]], list[tuple[Mapping[str, Any], asyncio.Future[None]]]] = {}
        self._scheduled = False

    def put(self, table: str, row: Mapping[str, Any]) -> asyncio.Future[None]:
        """Queue a row. The future resolves when it is committed, and fails with what the store raises.

        Rows that are queued together have no order among each other; await one before queueing what depends on it.
        """
        loop = asyncio.get_running_loop()
        committed: asyncio.Future[None] = loop.create_future()
        self._waiting.setdefault((table, tuple(row)), []).append((row, committed))
        if not self._scheduled:
            self._scheduled = True
            loop.call_later(LINGER_S, self._hand_over)
        return committed

    def _hand_over(self) -> None:
        waiting, self._waiting, self._scheduled = self._waiting, {}, False
        # Answers before what they cost: after a crash between the two, money is in doubt, but nothing is asked twice.
        for (table, _), items in sorted(waiting.items(), key=lambda entry: entry[0][0]):
            committed = [future for _, future in items]
            try:
                written = asyncio.wrap_future(self._store.upsert(table, [row for row, _ in items]))
            except Exception as error:  # whoever queued a row is told; this is the loop's own stack
                _resolve(committed, error)
            else:
                written.add_done_callback(lambda done, futures=committed: _resolve(futures, done.exception()))


def _resolve(futures: list[asyncio.Future[None]], error: BaseException | None) -> None:
    for future in futures:
        if future.done():
            continue  # its owner was cancelled
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)
