"""One question to the provider: slot, limits, budget, ledger, retries. The only retry loop of the project."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from autointerp.errors import ProviderError
from autointerp.labeling.llm.concurrency import Slots
from autointerp.labeling.llm.faults import Fault, Interrupted, Retry, RetryKind, Stop, Terminal
from autointerp.labeling.llm.ledger import Entry, Ledger
from autointerp.labeling.llm.limits import Grant, Limits
from autointerp.labeling.llm.provider import Answer, Provider, Request

T = TypeVar("T")

_INTERRUPTED = "interrupted: what was in flight is stored; the same command goes on from here"
_ATTEMPTS: Mapping[RetryKind, int] = MappingProxyType({"limit": 8, "server": 6, "network": 5, "garbage": 3, "adapt": 8})

DOWN_AFTER = 5
"""Questions in a row that were given up for server errors or lost connections."""


@dataclass(frozen=True)
class Retries:
    """How patient we are with one question."""

    attempts: Mapping[RetryKind, int] = field(default_factory=lambda: _ATTEMPTS)
    """Tries that may end in this kind of fault before the question is given up."""
    first_wait_s: float = 1.0
    """Doubled at each attempt where the server does not say how long to wait."""
    longest_wait_s: float = 60.0
    """Cap on any wait, an absurd Retry-After included."""
    total_s: float = 900.0


@dataclass(frozen=True)
class _Leave:
    """All that one attempt needs before it may go."""

    entry: Entry
    grant: Grant
    since: int


class Sender:
    """Sends questions to one provider until it is told to stop, by `stopping` or by the provider."""

    def __init__(
        self, provider: Provider, ledger: Ledger, limits: Limits, concurrency: int, retries: Retries | None = None
    ):
        self.stopping = asyncio.Event()
        self._provider = provider
        self._ledger = ledger
        self._limits = limits
        self._retries = retries or Retries()
        self.slots = Slots(concurrency)
        self._stopped_by: ProviderError | None = None
        self._unanswered = 0
        self._waits: set[asyncio.Timeout] = set()
        """What ends when `stopping` is set."""
        self._watch: asyncio.Task[None] | None = None

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Within, more questions are sure to come: nothing that could be sent with them need be sent without."""
        return contextlib.nullcontext()

    async def aclose(self) -> None:
        """Nothing outlives its question here."""

    async def send(
        self, request: Request, sha256: str, latent: int | None, purpose: str, attempts: Iterator[int]
    ) -> tuple[Answer, asyncio.Future[None]]:
        """The provider's answer, and the commit of what it cost. `attempts` numbers the rows of the ledger.

        Raises Terminal, BudgetError, ProviderError or Interrupted.
        """
        met: Counter[RetryKind] = Counter()

        def give_up(state: RetryCallState) -> bool:
            kind = _fault(state).kind
            met[kind] += 1
            return met[kind] >= self._retries.attempts[kind] or (state.seconds_since_start or 0) > self._retries.total_s

        async def attempt() -> tuple[Answer, asyncio.Future[None]]:
            return await self._attempt(request, sha256, latent, purpose, next(attempts))

        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Retry), stop=give_up, wait=self._wait_s, sleep=self._sleep, reraise=True
        )
        try:
            return await retrying(attempt)
        except Retry as fault:
            self._gave_up(fault)
            if fault.settled is not None:
                await fault.settled
            message = f"given up after {met.total()} attempts: {fault}"
            raise Terminal(message, http_status=fault.http_status) from None

    async def _attempt(
        self, request: Request, sha256: str, latent: int | None, purpose: str, attempt: int
    ) -> tuple[Answer, asyncio.Future[None]]:
        outcome, settled = await self._tried(request, sha256, latent, purpose, attempt)
        if isinstance(outcome, Answer):
            return outcome, settled
        if isinstance(outcome, Retry):
            outcome.settled = settled  # the next attempt need not wait for it: it has a commit of its own
            raise outcome
        await settled
        if self._stopped_by and isinstance(outcome, Stop):
            raise self._stopped_by
        raise outcome

    async def _tried(
        self, request: Request, sha256: str, latent: int | None, purpose: str, attempt: int
    ) -> tuple[Answer | Fault, asyncio.Future[None]]:
        """How one call ended, and the commit of what it cost."""
        await self.unless_stopped(self.slots.near.acquire())
        try:
            leave = await self._leave(request, sha256, latent, purpose, attempt)
            outcome: Answer | Fault = Fault("cancelled", billable=True)
            try:
                self._limits.sent(leave.grant)
                self.slots.sent()
                try:
                    outcome = await self._provider.complete(request)
                except Fault as fault:
                    outcome = fault
                finally:
                    settled = self._ledger.settle(leave.entry, outcome)
            finally:
                self._learn(leave, outcome)
                self.slots.release()
            return outcome, settled
        finally:
            self.slots.near.release()

    async def _leave(self, request: Request, sha256: str, latent: int | None, purpose: str, attempt: int) -> _Leave:
        """Gets all that a call needs; the slot last, so that the call goes as soon as the one before is answered."""
        entry, grant = await self.unless_stopped(self._admit(request))
        await self._ledger.enter(entry, sha256, latent, purpose, attempt)
        try:
            since = await self.unless_stopped(self._slot())
        except BaseException:
            await self._ledger.withdraw(entry)
            raise
        return _Leave(replace(entry, started=time.monotonic()), grant, since)

    async def _admit(self, request: Request) -> tuple[Entry, Grant]:
        """Sets the money aside and waits for the limits."""
        self._provider.load()
        self._raise_stop()
        entry = await self._ledger.reserve(request)
        try:
            grant = await self._limits.admit(request)
            self._raise_stop()
        except BaseException:
            self._ledger.free(entry)
            raise
        return entry, grant

    async def _slot(self) -> int:
        """Waits for a slot, and for the end of a pause that began meanwhile."""
        since = await self.slots.acquire()
        try:
            await self._limits.resumed()
            self._raise_stop()
        except BaseException:
            self.slots.release()
            raise
        return since

    def _learn(self, leave: _Leave, outcome: Answer | Fault) -> None:
        """What this outcome says of all others. Comes before the slot is free for the next of them."""
        used: tuple[int | None, int | None]
        if isinstance(outcome, Answer):
            used = outcome.input_tokens, outcome.output_tokens
        else:
            used = (None, None) if outcome.billable else (0, 0)
        self._limits.settle(leave.grant, *used)
        if isinstance(outcome, Stop):
            self._stop_by(outcome)
            return
        if isinstance(outcome, Retry) and outcome.kind == "adapt":
            self._provider.adapt(str(outcome))
            return
        if isinstance(outcome, Retry) and outcome.kind == "limit":
            self._limits.pause(self._capped_s(outcome.wait_s))
            self.slots.limited(leave.since)
        elif isinstance(outcome, Answer | Terminal):
            self.slots.answered()
            self._unanswered = 0
        else:
            self.slots.troubled()
        self.slots.proven()

    def _gave_up(self, fault: Retry) -> None:
        """One question got no answer. When many in a row did not, there is nobody to answer."""
        if fault.kind not in ("server", "network"):
            return
        self._unanswered += 1
        if self._unanswered >= DOWN_AFTER:
            self._stopped_by = self._stopped_by or ProviderError(
                f"{self._provider.name}:{self._provider.model} is down ({self._unanswered} questions given up, "
                f"the last for: {fault}): the same command goes on from here"
            )

    def _stop_by(self, outcome: Stop) -> None:
        self._stopped_by = self._stopped_by or ProviderError(
            f"{self._provider.name}:{self._provider.model} takes no more questions ({outcome}): "
            "mend the key, the account or the model's name; the same command goes on from here"
        )

    def _raise_stop(self) -> None:
        if self._stopped_by:
            raise self._stopped_by

    async def unless_stopped(self, waiting: Coroutine[Any, Any, T]) -> T:
        """The result of `waiting`, which is given up when `stopping` is set first."""
        if self.stopping.is_set():
            waiting.close()
            raise Interrupted(_INTERRUPTED)
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_waits())
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    return await waiting
                finally:
                    self._waits.remove(wait)
        except TimeoutError:
            if wait.expired():
                raise Interrupted(_INTERRUPTED) from None
            raise

    async def _end_waits(self) -> None:
        await self.stopping.wait()
        for wait in self._waits:
            wait.reschedule(0.0)

    async def _sleep(self, seconds: float) -> None:
        await self.unless_stopped(asyncio.sleep(seconds))

    def _wait_s(self, state: RetryCallState) -> float:
        fault = _fault(state)
        if fault.kind == "adapt":
            return 0.0
        if fault.wait_s is None:
            doubled_s = self._retries.first_wait_s * 2 ** (state.attempt_number - 1)
            return self._capped_s(doubled_s) * random.uniform(0.5, 1)
        return self._capped_s(fault.wait_s * random.uniform(1.0, 1.1))

    def _capped_s(self, wait_s: float | None) -> float:
        return min(self._retries.longest_wait_s, self._retries.first_wait_s if wait_s is None else wait_s)


def _fault(state: RetryCallState) -> Retry:
    """The fault that ended the last attempt (tenacity asks only after one of those that it retries)."""
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, Retry) else Retry(str(error), "server")
