"""Batches from their birth to their last answer, whoever lives to see it.

A batch and its calls are committed before the provider hears of them. A process that finds one without the provider's
id looks for it there (an orphan of a crash between creating and saving), one with it fetches what it holds.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, TypeVar

from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from autointerp.labeling.base import CallStore
from autointerp.labeling.llm.batch_api import BatchApi, Result
from autointerp.labeling.llm.cache import Answers
from autointerp.labeling.llm.commits import Commits
from autointerp.labeling.llm.faults import Fault, Retry
from autointerp.labeling.llm.ledger import Entry, Ledger
from autointerp.labeling.llm.provider import Answer, Provider, Request

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How long we wait for what, in seconds."""

    linger_s: float = 3.0
    """A batch is closed when no further question came for so long."""
    first_poll_s: float = 5.0
    longest_poll_s: float = 60.0
    grace_s: float = 30.0
    """A batch that the provider does not list so long after its creation was never created."""
    attempts: int = 6
    """At one request to a batch endpoint."""
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0


PATIENCE = Patience()

_PENDING = """
SELECT * FROM batches WHERE provider = ? AND model = ? AND endpoint = ? AND status IN ('creating', 'submitted')
ORDER BY created_at
"""


@dataclass(frozen=True)
class Call:
    """One question of a batch."""

    entry: Entry
    sha256: str


class Batches:
    """The batches of one provider in one store."""

    def __init__(
        self,
        provider: Provider,
        api: BatchApi,
        store: CallStore,
        commits: Commits,
        ledger: Ledger,
        answers: Answers,
        run_id: str,
        patience: Patience | None = None,
    ):
        self.api = api
        self.patience = patience or PATIENCE
        self._provider = provider
        self._store = store
        self._commits = commits
        self._ledger = ledger
        self._answers = answers
        self._run_id = run_id

    async def open(self, key: str, n_calls: int) -> None:
        """Commit that there will be a batch."""
        row = {
            "batch_key": key,
            "run_id": self._run_id,
            "provider": self._provider.name,
            "model": self._provider.model,
            "endpoint": self._provider.endpoint,
            "status": "creating",
            "n_calls": n_calls,
            "created_at": _now(),
        }
        await self._commits.put("batches", row)

    async def submit(self, key: str, requests: Mapping[str, Request]) -> str:
        """The provider's id, committed. Creating it again after a lost answer would pay twice: we look for it first."""
        since, began = datetime.now(UTC), time.monotonic()
        try:
            remote_id = await self._create(key, requests)
        except Retry as fault:
            if not fault.billable:
                raise
            await asyncio.sleep(max(0.0, self.patience.grace_s - (time.monotonic() - began)))
            found = await self.patiently(lambda: self.api.candidates(key, since, len(requests)))
            remote_id = await self._ours(found, set(requests)) or await self._create(key, requests)
        await self._commits.put("batches", {"batch_key": key, "remote_id": remote_id, "status": "submitted"})
        return remote_id

    async def finish(self, key: str, remote_id: str, calls: Mapping[str, Call]) -> dict[str, Answer | Fault]:
        """Wait for the batch; settle all its calls and store its answers. Returns the outcome of each call."""
        await self._wait_for(remote_id)
        refused: Fault | None = None
        results: list[Result] = []
        try:
            results = await self.patiently(lambda: self.api.results(remote_id))
        except Fault as fault:
            if isinstance(fault, Retry) and fault.kind != "limit":
                raise  # not the batch, but the way to it
            refused = fault
        found: dict[str, Answer | Fault] = {}
        for call_id, outcome in results:
            found.setdefault(call_id, outcome)  # of one that comes twice the first counts
        lost = refused or Retry("the batch ended without a line for this call", "garbage", billable=True)
        outcomes = {call_id: found.get(call_id, lost) for call_id in calls}
        await self._settle(key, calls, outcomes)
        return outcomes

    async def abandon(self, key: str, calls: Mapping[str, Call], fault: Fault) -> None:
        """The batch does not exist: its calls cost nothing."""
        await asyncio.gather(*(self._ledger.settle(call.entry, fault) for call in calls.values()))
        await self._commits.put("batches", {"batch_key": key, "status": "lost", "ended_at": _now()})

    async def recover(self, wait: bool) -> None:
        """Take up the batches that an ended process left. Without `wait`, only those that have ended by now."""
        identity = [self._provider.name, self._provider.model, self._provider.endpoint]
        pending = await asyncio.to_thread(self._store.read, _PENDING, identity)
        await asyncio.gather(*(self._recover(batch, wait) for batch in pending))

    async def patiently(self, ask: Callable[[], Awaitable[T]]) -> T:
        """The answer of a batch endpoint to a question that may be repeated."""
        patience = self.patience
        retrying = AsyncRetrying(
            retry=retry_if_exception(lambda error: isinstance(error, Retry) and error.kind in ("server", "network")),
            stop=stop_after_attempt(patience.attempts),
            wait=wait_random_exponential(patience.first_wait_s, patience.longest_wait_s),
            reraise=True,
        )

        async def attempt() -> T:
            return await ask()

        return await retrying(attempt)

    async def _recover(self, batch: dict[str, Any], wait: bool) -> None:
        key, remote_id = batch["batch_key"], batch["remote_id"]
        rows = await asyncio.to_thread(self._store.read, "SELECT * FROM calls WHERE batch_key = ?", [key])
        calls = {row["call_id"]: Call(self._ledger.adopt(row), row["request_sha256"]) for row in rows}
        since = batch["created_at"].replace(tzinfo=UTC)
        if remote_id is None:
            age_s = (datetime.now(UTC) - since).total_seconds()
            await asyncio.sleep(max(0.0, self.patience.grace_s - age_s))
            candidates = await self.patiently(lambda: self.api.candidates(key, since, batch["n_calls"]))
            if not wait and not all([await self.patiently(lambda c=c: self.api.ended(c)) for c in candidates]):
                return self._leave(calls)
            remote_id = await self._ours(candidates, set(calls))
            if remote_id is None:
                return await self.abandon(key, calls, Fault("never reached the provider"))
            await self._commits.put("batches", {"batch_key": key, "remote_id": remote_id, "status": "submitted"})
        if not wait and not await self.patiently(lambda: self.api.ended(remote_id)):
            return self._leave(calls)
        await self.finish(key, remote_id, calls)

    def _leave(self, calls: Mapping[str, Call]) -> None:
        for call in calls.values():
            self._ledger.leave(call.entry)

    async def _create(self, key: str, requests: Mapping[str, Request]) -> str:
        calls = list(requests.items())

        async def create() -> str:
            try:
                return await self.api.create(key, calls)
            except Retry as fault:
                if fault.billable:  # it may exist: not to be repeated blindly
                    raise _PerhapsError(fault) from None
                raise

        try:
            return await self.patiently(create)
        except _PerhapsError as perhaps:
            fault = perhaps.fault
        raise fault

    async def _ours(self, candidates: list[str], call_ids: set[str]) -> str | None:
        """The candidate whose results speak of our calls."""
        for remote_id in candidates:
            await self._wait_for(remote_id)
            try:
                results = await self.patiently(lambda remote_id=remote_id: self.api.results(remote_id))
            except Fault:
                continue
            if any(call_id in call_ids for call_id, _ in results):
                return remote_id
        return None

    async def _wait_for(self, remote_id: str) -> None:
        wait_s = self.patience.first_poll_s
        while not await self.patiently(lambda: self.api.ended(remote_id)):
            await asyncio.sleep(wait_s)
            wait_s = min(self.patience.longest_poll_s, 1.5 * wait_s)

    async def _settle(self, key: str, calls: Mapping[str, Call], outcomes: Mapping[str, Answer | Fault]) -> None:
        """Everything that a later process could want is committed before the batch counts as ended."""
        commits: list[asyncio.Future[None]] = []
        for call_id, call in calls.items():
            outcome = outcomes[call_id]
            commits.append(self._ledger.settle(call.entry, outcome))
            if isinstance(outcome, Answer) and outcome.finish != "length":
                commits.append(self._answers.keep(outcome, call.sha256))
        await asyncio.gather(*commits)
        await self._commits.put("batches", {"batch_key": key, "status": "ended", "ended_at": _now()})


class _PerhapsError(Exception):
    """Creating a batch failed in a way that leaves open whether there is one."""

    def __init__(self, fault: Retry):
        super().__init__(str(fault))
        self.fault = fault


def _now() -> datetime:
    return datetime.now(UTC).replace(tzinfo=None)
