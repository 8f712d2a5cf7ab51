"""The engine: each question is answered once, and paid for once.

A question goes: answer stored? → same question in flight? → sending.py (slot, limits, budget, ledger, retries)
→ understood, else repaired once → answer stored.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from autointerp.errors import ProviderError
from autointerp.labeling.base import CallStore, LabelingSettings
from autointerp.labeling.llm.answers import read_answer
from autointerp.labeling.llm.batch_sending import BatchSender
from autointerp.labeling.llm.batches import Batches, Patience
from autointerp.labeling.llm.cache import Answers
from autointerp.labeling.llm.commits import Commits
from autointerp.labeling.llm.concurrency import Slots
from autointerp.labeling.llm.faults import Fault, Stop, Terminal
from autointerp.labeling.llm.ledger import Ledger, Spend
from autointerp.labeling.llm.limits import Limits
from autointerp.labeling.llm.logprobs import Spoken
from autointerp.labeling.llm.provider import Answer, Provider, Request, batches_of
from autointerp.labeling.llm.sending import Retries, Sender

T = TypeVar("T")
Parse = Callable[[dict[str, Any]], T]
"""Makes an answer of its JSON object; ValueError, saying why, when that does not fit."""

ROOM_FACTOR = 4
"""An answer cut off by its length is asked once more with this many times the room."""
WAITING_SHARE = 0.2
"""Of the calls that may be in flight: rows, two a call, that may wait for a commit of their own."""


@dataclass(frozen=True)
class Reply(Generic[T]):
    """A question's answer, fit for use."""

    value: T
    request_sha256: str
    stored: bool
    """It was paid for earlier: no call was made."""
    salvaged: bool
    """The JSON was dug out of prose, or of an answer that was cut off."""
    spoken: Sequence[Spoken] = ()
    """The tokens of the answer with their alternatives, where they were asked for and told."""


class _MisfitError(Exception):
    """An answer that is not what was asked for."""


class Engine:
    """Asks one provider on behalf of one run. Belongs to one event loop; `aclose` it there."""

    def __init__(
        self,
        provider: Provider,
        store: CallStore,
        settings: LabelingSettings,
        *,
        retries: Retries | None = None,
        limits: Limits | None = None,
        patience: Patience | None = None,
    ):
        self.provider = provider
        self._commits = Commits(store, lambda: int(WAITING_SHARE * self._sender.slots.limit))
        self._answers = Answers(store, self._commits, provider)
        self._ledger = Ledger(store, self._commits, provider, settings.run_id, settings.max_usd)
        limits = limits or Limits(settings.rpm, settings.tpm, settings.itpm, settings.otpm)
        self._batches = Batches(
            provider, batches_of(provider), store, self._commits, self._ledger, self._answers, settings.run_id, patience
        )
        self._batched = settings.batch
        if settings.batch:
            self._sender: Sender = BatchSender(provider, self._ledger, limits, self._batches)
        else:
            self._sender = Sender(provider, self._ledger, limits, settings.concurrency, retries)
        self._opened: asyncio.Task[None] | None = None
        self._in_flight: dict[str, asyncio.Task[Any]] = {}
        self._roomier: set[str] = set()
        self._froze = False

    @property
    def name(self) -> str:
        """`openai:MODEL` or `anthropic:MODEL`."""
        return f"{self.provider.name}:{self.provider.model}"

    @property
    def spend(self) -> Spend:
        """What the run has used so far, for a progress bar: calls, tokens, dollars."""
        return self._ledger.spend

    @property
    def slots(self) -> Slots:
        """How many calls may be in flight at the moment."""
        return self._sender.slots

    @property
    def stopping(self) -> asyncio.Event:
        """Set it, and what is in flight is finished and committed, and nothing more is sent."""
        return self._sender.stopping

    async def ask(self, request: Request, parse: Parse[T], *, latent: int | None, purpose: str) -> Reply[T]:
        """The answer to `request` as `parse` understands it.

        A question that any run of this store has had answered costs nothing; the same question in flight is shared.
        Cancelling the caller does not cancel a call that is on its way. Raises Terminal (this question gets no answer),
        BudgetError, ProviderError, Interrupted, or what the store raises when it cannot be written.
        """
        sha256 = request.sha256(self.provider)
        task = self._in_flight.get(sha256)
        if task is None:
            task = asyncio.create_task(self._answer(request, sha256, parse, latent, purpose))
            self._in_flight[sha256] = task
            task.add_done_callback(lambda done: self._landed(sha256, done))
        return await asyncio.shield(task)

    def hold(self) -> contextlib.AbstractContextManager[None]:
        """Around questions that trickle in, so that they make one batch and not many."""
        return self._sender.hold()

    async def drain(self) -> None:
        """Send nothing more; returns when all that is in flight is answered and committed."""
        self.stopping.set()
        while self._in_flight:
            await asyncio.wait(list(self._in_flight.values()))
        await self._commits.settled()  # an attempt that was to be repeated did not wait for its own

    async def aclose(self) -> None:
        """`drain`, then close the connections."""
        await self.drain()
        await self._sender.aclose()
        await self.provider.aclose()
        if self._froze:
            gc.unfreeze()

    def _landed(self, sha256: str, task: asyncio.Task[Any]) -> None:
        del self._in_flight[sha256]
        if not task.cancelled():
            task.exception()  # all who asked may be gone: then nobody needs a warning that it was not looked at

    async def _answer(
        self, request: Request, sha256: str, parse: Parse[T], latent: int | None, purpose: str
    ) -> Reply[T]:
        if self._opened is None:
            self._opened = asyncio.create_task(self._open())
        await asyncio.shield(self._opened)
        stored = await self._answers.find(sha256)
        if stored is not None:
            try:
                return self._reply(stored, sha256, parse, stored=True)
            except _MisfitError:
                pass  # an older version understood it, this one does not: ask again
        return await self._ask_anew(request, sha256, parse, latent, purpose)

    async def _open(self) -> None:
        """Read the ledger; fetch what batches of an earlier process hold, waiting for them in batch mode."""
        # What is loaded by now would be looked through every few hundred calls, a third of a second long.
        self._froze = gc.get_freeze_count() == 0
        if self._froze:
            gc.freeze()
        await self._ledger.open()
        try:
            await self._sender.unless_stopped(self._batches.recover(wait=self._batched))
        except Fault as fault:
            if self._batched or isinstance(fault, Stop):
                raise ProviderError(
                    f"{self.name}: a batch of an earlier command cannot be fetched ({fault}): "
                    "the same command tries again"
                ) from None

    async def _ask_anew(
        self, request: Request, sha256: str, parse: Parse[T], latent: int | None, purpose: str
    ) -> Reply[T]:
        """Send; once more with more room when cut off; once more with what was wrong when it does not fit."""
        attempts = itertools.count(1)
        room = request.max_output_tokens * ROOM_FACTOR
        if purpose in self._roomier:
            request = request.with_room(room)
        answer, settled = await self._sender.send(request, sha256, latent, purpose, attempts)
        if answer.finish == "length" and request.max_output_tokens < room:
            # A model that thinks at length does so every time: later questions get the room at once.
            self._roomier.add(purpose)
            await settled
            request = request.with_room(room)
            answer, settled = await self._sender.send(request, sha256, latent, purpose, attempts)
        try:
            return await self._keep(answer, sha256, parse, settled)
        except _MisfitError as misfit:
            if answer.finish == "length":  # with more room it would go on, not end
                raise Terminal(f"unusable answer from {self.name}: {misfit}") from None
            repair = (
                f"That answer cannot be used: {misfit}. Answer again with one JSON object in the stated format only."
            )
            request = request.with_turns(("assistant", answer.text or "(empty)"), ("user", repair))
        answer, settled = await self._sender.send(request, sha256, latent, purpose, attempts)
        try:
            return await self._keep(answer, sha256, parse, settled)
        except _MisfitError as misfit:
            raise Terminal(f"unusable answer from {self.name}, also after a second try: {misfit}") from None

    async def _keep(self, answer: Answer, sha256: str, parse: Parse[T], settled: asyncio.Future[None]) -> Reply[T]:
        """The reply, once it and its cost are committed. A refusal is an answer too, and was paid for."""
        commits = [settled]
        try:
            reply = self._reply(answer, sha256, parse, stored=False)
            commits.append(self._answers.keep(answer, sha256))
            return reply
        except Terminal:
            commits.append(self._answers.keep(answer, sha256))
            raise
        finally:
            await asyncio.gather(*commits)

    def _reply(self, answer: Answer, sha256: str, parse: Parse[T], stored: bool) -> Reply[T]:
        """Raises Terminal for a refusal, _MisfitError for what is not an answer to the question."""
        if answer.finish == "refusal":
            raise Terminal(f"{self.name} refused: {answer.text or 'no reason given'}", status="refused")
        try:
            value, salvaged = read_answer(answer.text, parse)
        except ValueError as error:
            raise _MisfitError(f"{error}; it was cut off" if answer.finish == "length" else str(error)) from None
        return Reply(value, sha256, stored, salvaged or answer.finish == "length", answer.spoken)
