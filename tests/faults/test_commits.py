"""Rows of many calls go to the store together, and those that a call waits for go first."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from autointerp.labeling.llm.commits import LINGER_S, Commits
from autointerp.store import Store


class Watched(Store):
    """Notes which rows come in one load."""

    loads: list[tuple[str, list[str]]]

    def upsert(self, table: str, rows: Any) -> Future[None]:
        self.loads.append(("upsert", _keys(rows)))
        return super().upsert(table, rows)

    def insert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> Future[None]:
        self.loads.append(("insert", _keys(rows)))
        return super().insert(table, rows)


def _keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return [row.get("call_id") or row["request_sha256"] for row in rows]


def test_a_few_rows_wait_for_company_and_more_than_a_few_go_at_once_before_new_ones(tmp_path: Path):
    async def run(store: Watched):
        loop, commits = asyncio.get_running_loop(), Commits(store, lambda: 3)
        began = loop.time()
        few = [commits.put("calls", {"call_id": name, "status": "ok"}) for name in "ab"]
        await commits.put_first("calls", {"call_id": "c"})
        assert not any(future.done() for future in few), "they need not be committed before a call may go"
        await asyncio.gather(*few)
        assert loop.time() - began >= LINGER_S
        many = [commits.put("calls", {"call_id": name, "status": "ok"}) for name in "defg"]
        answer = commits.put("answers", {"request_sha256": "h"})
        await commits.put_first("calls", {"call_id": "i"})
        assert all(future.done() for future in (*many, answer))
        assert store.loads == [
            ("insert", ["c"]),
            ("upsert", ["a", "b"]),
            ("upsert", ["h"]),
            ("upsert", ["d", "e", "f", "g"]),
            ("insert", ["i"]),
        ]

    with Store.open(tmp_path / "a.duckdb") as store:
        store.__class__, store.loads = Watched, []  # type: ignore[attr-defined]
        asyncio.run(run(store))  # type: ignore[arg-type]
        assert len(store.read("SELECT 1 FROM calls")) == 8
