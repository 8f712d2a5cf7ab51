"""The ledger: every attempt is reserved before it is sent and settled from its usage. The truth about money."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from autointerp.errors import BudgetError
from autointerp.labeling.base import CallStore
from autointerp.labeling.llm.commits import Commits
from autointerp.labeling.llm.faults import Fault, Terminal
from autointerp.labeling.llm.prices import BATCH_SHARE
from autointerp.labeling.llm.provider import Answer, Provider, Request
from autointerp.records import CallStatus

_on_their_way: set[str] = set()
"""Attempts of this process that are `sent` and not settled. One process writes a store, so all others that are `sent`
in it were lost with theirs."""
_ROUNDING_USD = 1e-12

_TOTALS = """
SELECT count(*) AS calls, sum(input_tokens) AS input_tokens, sum(cached_tokens) AS cached_tokens,
       sum(output_tokens) AS output_tokens, sum(usd) AS usd,
       sum(usd_estimated) FILTER (usd IS NULL) AS usd_in_doubt
FROM calls WHERE run_id = ?
"""


# Calls of a batch that is not done with are not lost: it will be asked for them.
_LOST = """
SELECT call_id FROM calls LEFT JOIN batches USING (batch_key)
WHERE calls.status = 'sent' AND coalesce(batches.status, 'lost') NOT IN ('creating', 'submitted')
"""


@dataclass
class Spend:
    """What this run has used so far, all its invocations together."""

    calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    """Settled."""
    usd_in_doubt: float = 0.0
    """Estimates of attempts whose answer was lost or came without usage: the provider may have charged them."""


@dataclass(frozen=True)
class Entry:
    """One attempt, reserved."""

    usd: float | None
    """What it may cost at most; None when the model has no price."""
    share: float = 1.0
    """Of the listed price: a batch costs half."""
    ours: bool = True
    """False for a call of another run, whose batch we fetch on the way."""
    settled: bool = False
    """True for a call of a batch that was settled before its batch was done with."""
    call_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.monotonic)


class Ledger:
    """The rows of `calls`, and the budget above them.

    The sum of what is settled, in doubt and reserved never exceeds the cap: an attempt that could exceed it waits for
    those in flight to settle for less, and is refused when there is none.
    """

    def __init__(self, store: CallStore, commits: Commits, provider: Provider, run_id: str, max_usd: float | None):
        self.spend = Spend()
        self.max_usd = max_usd
        self._store = store
        self._commits = commits
        self._provider = provider
        self._run_id = run_id
        self._reserved: dict[str, float] = {}
        self._freed = asyncio.Event()

    async def open(self) -> None:
        """Read what the run has spent; what an ended process left `sent` becomes `in_doubt`."""
        await asyncio.to_thread(self._adopt_orphans)
        totals = (await asyncio.to_thread(self._store.read, _TOTALS, [self._run_id]))[0]
        names = ("calls", "input_tokens", "cached_tokens", "output_tokens")
        counts = {name: int(totals[name] or 0) for name in names}
        self.spend = Spend(**counts, usd=float(totals["usd"] or 0), usd_in_doubt=float(totals["usd_in_doubt"] or 0))

    async def reserve(self, request: Request, share: float = 1.0) -> Entry:
        """Set aside the most that `request` can cost. BudgetError when that no longer fits under the cap."""
        price = self._provider.price
        if price is None:
            return Entry(None, share)
        usd = share * price.usd_at_most(request.input_tokens_at_most(), request.max_output_tokens)
        while self.max_usd is not None and self._gone() + usd > self.max_usd + _ROUNDING_USD:
            if not self._reserved:
                raise BudgetError(
                    f"the budget is reached: ${self._gone():.4f} of --max-usd {self.max_usd:g} is spent or in doubt "
                    f"and the next call may cost ${usd:.4f}: "
                    "the same command with a larger --max-usd goes on from here"
                )
            await self._freed.wait()
        entry = Entry(usd, share)
        self._reserved[entry.call_id] = usd
        return entry

    async def enter(
        self,
        entry: Entry,
        request_sha256: str,
        latent: int | None,
        purpose: str,
        attempt: int,
        batch_key: str | None = None,
    ) -> None:
        """Commit the attempt as `sent`: from here on a crash leaves a trace of what may have been paid."""
        row = {
            "call_id": entry.call_id,
            "run_id": self._run_id,
            "latent": latent,
            "purpose": purpose,
            "provider": self._provider.name,
            "model": self._provider.model,
            "status": "sent",
            "request_sha256": request_sha256,
            "usd_estimated": entry.usd,
            "attempt": attempt,
            "batch_key": batch_key,
            "started_at": datetime.now(UTC).replace(tzinfo=None),
        }
        _on_their_way.add(entry.call_id)
        try:
            await self._commits.put_first("calls", row)
        except BaseException:
            self.free(entry)  # not sent
            _on_their_way.discard(entry.call_id)
            raise

    async def withdraw(self, entry: Entry) -> None:
        """Take back what `enter` committed: the attempt was not sent after all."""
        self.free(entry)
        deleted = self._store.execute("DELETE FROM calls WHERE call_id = ?", [entry.call_id])
        deleted.add_done_callback(lambda _: _on_their_way.discard(entry.call_id))
        await asyncio.wrap_future(deleted)

    def settle(self, entry: Entry, outcome: Answer | Fault) -> asyncio.Future[None]:
        """Replace the reservation by what the attempt cost. The future resolves when the row is committed.

        An attempt that may have been charged without our seeing the usage stays in doubt, at its estimate.
        """
        if entry.settled:
            return _resolved()
        status, usd, usage = self._judge(entry, outcome)
        self.free(entry)
        if entry.ours:
            self._add(entry, usd, usage)
        settled = {
            "call_id": entry.call_id,
            "status": status,
            "http_status": outcome.http_status,
            **usage,
            "usd": usd,
            "seconds": time.monotonic() - entry.started,
            "error": str(outcome) if isinstance(outcome, Fault) else _doubt(outcome),
        }
        committed = self._commits.put("calls", settled)
        committed.add_done_callback(lambda _: _on_their_way.discard(entry.call_id))
        return committed

    def adopt(self, row: Mapping[str, Any]) -> Entry:
        """The reservation of a call of a batch that another process submitted. `settle` or `leave` it."""
        entry = Entry(
            row["usd_estimated"],
            BATCH_SHARE,
            ours=row["run_id"] == self._run_id,
            settled=row["status"] != "sent",
            call_id=row["call_id"],
        )
        if entry.ours and not entry.settled:
            self.spend.calls -= 1
            self.spend.usd_in_doubt -= entry.usd or 0.0
            self._reserved[entry.call_id] = entry.usd or 0.0
        return entry

    def leave(self, entry: Entry) -> None:
        """Undo `adopt`: its batch is still under way."""
        if entry.ours and not entry.settled:
            self.spend.calls += 1
            self.spend.usd_in_doubt += entry.usd or 0.0
            self.free(entry)

    def _add(self, entry: Entry, usd: float | None, usage: dict[str, int | None]) -> None:
        self.spend.calls += 1
        for name, tokens in usage.items():
            setattr(self.spend, name, getattr(self.spend, name) + (tokens or 0))
        if usd is None:
            self.spend.usd_in_doubt += entry.usd or 0.0
        else:
            self.spend.usd += usd

    def _judge(self, entry: Entry, outcome: Answer | Fault) -> tuple[CallStatus, float | None, dict[str, int | None]]:
        """(status, dollars when known, token counts) of one attempt."""
        if isinstance(outcome, Fault):
            refused = isinstance(outcome, Terminal) and outcome.status == "refused"
            status: CallStatus = "in_doubt" if outcome.billable else "refused" if refused else "error"
            return status, None if outcome.billable or entry.usd is None else 0.0, {}
        status = "refused" if outcome.finish == "refusal" else "ok"
        usage = {
            "input_tokens": outcome.input_tokens,
            "cached_tokens": outcome.cached_tokens,
            "output_tokens": outcome.output_tokens,
        }
        price, read, wrote = self._provider.price, outcome.input_tokens, outcome.output_tokens
        if price is None or read is None or wrote is None:
            return status, None, usage
        return status, entry.share * price.usd(read, wrote, outcome.cached_tokens, outcome.cache_write_tokens), usage

    def _gone(self) -> float:
        return self.spend.usd + self.spend.usd_in_doubt + sum(self._reserved.values())

    def free(self, entry: Entry) -> None:
        """Give back what was reserved for an attempt that was not sent, or is settled."""
        self._reserved.pop(entry.call_id, None)
        self._freed.set()
        self._freed = asyncio.Event()

    def _adopt_orphans(self) -> None:
        sent = self._store.read(_LOST)
        orphans = [row["call_id"] for row in sent if row["call_id"] not in _on_their_way]
        if orphans:
            self._store.upsert("calls", [{"call_id": lost, "status": "in_doubt"} for lost in orphans]).result()


def _doubt(answer: Answer) -> str | None:
    if answer.input_tokens is None or answer.output_tokens is None:
        return "the answer came without usage: counted at its estimate"
    return None


def _resolved() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future
