"""Questions collected into batches: half the price, within a day instead of seconds."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

from tenacity import RetryCallState

from autointerp.errors import ProviderError
from autointerp.labeling.llm.batches import Batches, Call
from autointerp.labeling.llm.faults import Fault, Retry, Stop
from autointerp.labeling.llm.ledger import Entry, Ledger
from autointerp.labeling.llm.limits import Limits
from autointerp.labeling.llm.prices import BATCH_SHARE
from autointerp.labeling.llm.provider import Answer, Provider, Request
from autointerp.labeling.llm.sending import Retries, Sender

RETRIES = Retries({"limit": 6, "server": 3, "network": 3, "garbage": 3, "adapt": 8}, total_s=float("inf"))
"""A question that one batch leaves unanswered goes into the next, at most twice."""


@dataclass(eq=False)
class _Asked:
    """A question that waits for its batch."""

    entry: Entry
    request: Request
    sha256: str
    latent: int | None
    purpose: str
    attempt: int
    outcome: asyncio.Future[Answer | Fault] = field(default_factory=asyncio.Future)


class BatchSender(Sender):
    """As `Sender`, through batches. A batch is closed when it is full, or when no question came for a while and none is
    sure to come."""

    def __init__(self, provider: Provider, ledger: Ledger, limits: Limits, batches: Batches):
        super().__init__(provider, ledger, limits, 1, RETRIES)
        self._batches = batches
        self._most = batches.api.most
        self._open: list[_Asked] = []
        self._open_bytes = 0
        self._closing: asyncio.TimerHandle | None = None
        self._holds = 0
        self._under_way: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Within, a batch is closed only when it is full."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self._close_soon()

    async def aclose(self) -> None:
        """Stop waiting for batches; what they hold is for the next process."""
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)

    async def _attempt(
        self, request: Request, sha256: str, latent: int | None, purpose: str, attempt: int
    ) -> tuple[Answer, asyncio.Future[None]]:
        self._raise_stop()
        entry = await self.unless_stopped(self._ledger.reserve(request, BATCH_SHARE))
        asked = _Asked(entry, request, sha256, latent, purpose, attempt)
        self._collect(asked)
        try:
            outcome = await self.unless_stopped(_result(asked.outcome))
        except BaseException:
            if asked in self._open:
                self._open.remove(asked)
                self._ledger.free(entry)
            raise
        if isinstance(outcome, Answer):
            return outcome, _done()
        if isinstance(outcome, Stop):
            self._stop_by(outcome)
            self._raise_stop()
        if isinstance(outcome, Retry) and outcome.kind == "adapt":
            self._provider.adapt(str(outcome))
        raise outcome

    def _wait_s(self, state: RetryCallState) -> float:
        limited = state.outcome is not None and getattr(state.outcome.exception(), "kind", "") == "limit"
        if not limited:
            return 0.0  # the next batch is wait enough
        patience = self._batches.patience  # equally long for all, so that they meet in the next batch
        return min(patience.longest_wait_s, patience.first_wait_s * 2**state.attempt_number)

    def _collect(self, asked: _Asked) -> None:
        n_bytes = 2 * asked.request.n_bytes() + 1024  # escaped as JSON, with what surrounds it
        if self._open and self._open_bytes + n_bytes > self._batches.api.most_bytes:
            self._close()
        self._open.append(asked)
        self._open_bytes += n_bytes
        self._close_soon()
        if len(self._open) >= self._most:
            self._close()

    def _close_soon(self) -> None:
        """When no other question comes for a while."""
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        if self._open and not self._holds:
            self._closing = asyncio.get_running_loop().call_later(self._batches.patience.linger_s, self._close)

    def _close(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        collected, self._open, self._open_bytes = self._open, [], 0
        for part in _parts(collected, self._most):
            task = asyncio.create_task(self._run(part))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    async def _run(self, batch: list[_Asked]) -> None:
        """One batch, to the outcome of each of its questions; an error of ours or of the disk goes to all of them."""
        try:
            outcomes = await self._outcomes(batch)
        except (Exception, asyncio.CancelledError) as error:
            for asked in batch:
                if not asked.outcome.done():
                    _fail(asked.outcome, error)
            return
        for asked in batch:
            if not asked.outcome.done():
                asked.outcome.set_result(outcomes[asked.entry.call_id])

    async def _outcomes(self, batch: list[_Asked]) -> dict[str, Answer | Fault]:
        key = uuid.uuid4().hex
        calls = {asked.entry.call_id: Call(asked.entry, asked.sha256) for asked in batch}
        await self._batches.open(key, len(batch))
        enter = self._ledger.enter
        await asyncio.gather(*(enter(a.entry, a.sha256, a.latent, a.purpose, a.attempt, key) for a in batch))
        try:
            remote_id = await self._batches.submit(key, {asked.entry.call_id: asked.request for asked in batch})
        except Fault as fault:
            if fault.billable:
                raise self._out_of_reach(fault) from None
            await self._batches.abandon(key, calls, fault)
            return dict.fromkeys(calls, fault)
        try:
            outcomes = await self._batches.finish(key, remote_id, calls)
        except Fault as fault:
            raise self._out_of_reach(fault) from None
        if any(isinstance(outcome, Retry) and outcome.kind == "limit" for outcome in outcomes.values()):
            self._most = max(1, len(batch) // 2)
        return outcomes

    def _out_of_reach(self, fault: Fault) -> ProviderError:
        return ProviderError(
            f"{self._provider.name}:{self._provider.model}: the batch cannot be reached ({fault}): "
            "the same command looks for it and fetches what it holds"
        )


def _parts(items: list[_Asked], n: int) -> list[list[_Asked]]:
    return [items[i : i + n] for i in range(0, len(items), n)]


async def _result(future: asyncio.Future[Answer | Fault]) -> Answer | Fault:
    return await asyncio.shield(future)


def _fail(future: asyncio.Future[Answer | Fault], error: BaseException) -> None:
    if isinstance(error, asyncio.CancelledError):
        future.cancel()
        return
    future.set_exception(error)
    future.exception()  # its owner may be gone: then nobody needs a warning that it was not looked at


def _done() -> asyncio.Future[None]:
    """What it cost is committed already."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future
