"""Finished answers, by the digest of the whole question: never paid for again, by any run of this store or folder."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import duckdb

from autointerp.errors import AutointerpError
from autointerp.labeling.base import CallStore
from autointerp.labeling.llm.commits import Commits
from autointerp.labeling.llm.provider import Answer, Provider
from autointerp.store import Store

_KNOWN = "SELECT request_sha256 FROM answers WHERE provider = ? AND model = ?"
_OF_MODEL = "SELECT request_sha256, answer FROM answers WHERE provider = ? AND model = ?"


class Answers:
    """The table `answers` of our store and those of the other stores (`*.duckdb`) in its folder, looked through once.

    An answer found in another store is copied into ours, which stays complete by itself. What another process is
    asking at this moment is not seen: two jobs at once on two stores may pay for the same question twice.
    """

    def __init__(self, store: CallStore, commits: Commits, provider: Provider):
        self._store = store
        self._commits = commits
        self._provider = provider
        self._reading: asyncio.Task[tuple[set[str], dict[str, str]]] | None = None
        self._kept: set[str] = set()

    async def find(self, sha256: str) -> Answer | None:
        """The answer that was paid for, here or in a store beside ours."""
        if self._reading is None:
            self._reading = asyncio.create_task(asyncio.to_thread(self._read))
        ours, elsewhere = await asyncio.shield(self._reading)
        if sha256 in ours or sha256 in self._kept:
            sql = "SELECT answer FROM answers WHERE request_sha256 = ?"
            rows = await asyncio.to_thread(self._store.read, sql, [sha256])
            if rows:
                return Answer(**json.loads(rows[0]["answer"]))
        found = elsewhere.get(sha256)
        if found is None:
            return None
        answer = Answer(**json.loads(found))
        await self.keep(answer, sha256)
        return answer

    def keep(self, answer: Answer, sha256: str) -> asyncio.Future[None]:
        """Queue the answer for the store; the future resolves when it is committed."""
        row = {
            "request_sha256": sha256,
            "provider": self._provider.name,
            "model": self._provider.model,
            "answer": asdict(answer),
            "created_at": datetime.now(UTC).replace(tzinfo=None),
        }
        self._kept.add(sha256)
        return self._commits.put("answers", row)

    def _read(self) -> tuple[set[str], dict[str, str]]:
        """(which questions our store has answers to, the answers of the stores beside it)."""
        rows = self._store.read(_KNOWN, [self._provider.name, self._provider.model])
        return {row["request_sha256"] for row in rows}, self._read_neighbours()

    def _read_neighbours(self) -> dict[str, str]:
        own = Path(self._store.path)
        found: dict[str, str] = {}
        for path in sorted(own.parent.glob("*.duckdb")):
            if path.resolve() == own.resolve():
                continue
            try:
                with Store.open(path, "read", lock_wait_s=0.0) as other:
                    rows = other.read(_OF_MODEL, [self._provider.name, self._provider.model])
            except (AutointerpError, OSError, duckdb.Error):
                continue  # not ours, damaged, or of another version: its answers are no use, and no reason to fail
            found |= {row["request_sha256"]: row["answer"] for row in rows}
        return found
