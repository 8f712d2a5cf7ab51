"""How fast we may ask: requests and tokens per minute, and the pause that a provider asks for."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field

from asyncio_throttle.throttler import Throttler

from autointerp.labeling.llm.provider import Request

MARGIN = 1.01
"""Our minute is this much longer than theirs: calls do not take equally long to reach the server."""
_FIRST_TOKENS_PER_BYTE = 1 / 3
_HEADROOM = 1.05
_LEARNING = 0.2


@dataclass(eq=False)
class _Share:
    """Tokens of one call in one window."""

    at: float
    tokens: int
    counts: bool = True
    """False once it is older than the window."""


@dataclass
class Grant:
    """Leave to send one call, and what was set aside for it."""

    n_bytes: int
    shares: dict[str, _Share] = field(default_factory=dict)
    """By window: `input`, `output`, `both`."""
    at: float = 0.0
    """When it was given."""


class TokenWindow:
    """At most `limit` tokens in any period, whichever way the server counts: sliding, by the minute or as a bucket."""

    def __init__(self, limit: int, period_s: float):
        self.limit = limit
        self._period_s = period_s
        self._shares: deque[_Share] = deque()
        self._sum = 0

    def wait_s(self, tokens: int) -> float:
        """Seconds until so many fit, at what is known now; one call above the whole limit waits for an empty window."""
        oldest_that_counts = time.monotonic() - self._period_s
        while self._shares and self._shares[0].at <= oldest_that_counts:
            gone = self._shares.popleft()
            gone.counts = False
            self._sum -= gone.tokens
        excess = self._sum + min(tokens, self.limit) - self.limit
        for share in self._shares:
            if excess <= 0:
                break
            excess -= share.tokens
            if excess <= 0:
                return share.at - oldest_that_counts
        return 0.0

    def take(self, tokens: int) -> _Share:
        share = _Share(time.monotonic(), tokens)
        self._shares.append(share)
        self._sum += tokens
        return share

    def move(self, share: _Share) -> None:
        """The call goes only now."""
        if share.counts:
            self._shares.remove(share)
        else:
            self._sum += share.tokens
        share.at, share.counts = time.monotonic(), True
        self._shares.append(share)

    def settle(self, share: _Share, tokens: int) -> None:
        """What the call turned out to use, in the place of what was set aside for it."""
        if share.counts:
            self._sum += tokens - share.tokens
            share.tokens = tokens


class _Requests(Throttler):
    """So many requests in any period."""

    async def acquire(self) -> float:
        """Waits for its turn; returns when that was."""
        await super().acquire()
        return self._task_logs[-1]

    def move(self, at: float) -> None:
        """The request whose turn was at `at` goes only now."""
        if at in self._task_logs:
            self._task_logs.remove(at)
        self._task_logs.append(time.monotonic())


class Limits:
    """Waits until one more request may be sent. One caller at a time looks at the clock, the others queue behind it."""

    def __init__(
        self,
        rpm: int | None = None,
        tpm: int | None = None,
        itpm: int | None = None,
        otpm: int | None = None,
        period_s: float = 60.0,
    ):
        period_s *= MARGIN
        poll_s = min(0.05, period_s / 200)
        self._requests = _Requests(rate_limit=rpm, period=period_s, retry_interval=poll_s) if rpm else None
        limits = {"input": itpm, "output": otpm, "both": tpm}
        self._windows = {name: TokenWindow(limit, period_s) for name, limit in limits.items() if limit}
        self._tokens_per_byte = _FIRST_TOKENS_PER_BYTE
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()
        self._resume_at = 0.0

    async def admit(self, request: Request) -> Grant:
        """Returns when `request` may be sent. Input is set aside by what earlier ones took, output by its cap."""
        n_bytes = request.n_bytes()
        read = round(n_bytes * self._tokens_per_byte * _HEADROOM)
        return await self.admit_tokens(read, request.max_output_tokens, n_bytes)

    async def admit_tokens(self, input_tokens: int, output_tokens: int, n_bytes: int = 0) -> Grant:
        """Returns when a call of so many tokens may be sent."""
        wanted = {"input": input_tokens, "output": output_tokens, "both": input_tokens + output_tokens}
        async with self._turn:
            await self.resumed()
            while (wait_s := max((w.wait_s(wanted[name]) for name, w in self._windows.items()), default=0.0)) > 0:
                self._freed.clear()
                try:
                    async with asyncio.timeout(wait_s):
                        await self._freed.wait()
                except TimeoutError:
                    pass
            at = await self._requests.acquire() if self._requests is not None else 0.0
            await self.resumed()
            return Grant(n_bytes, {name: window.take(wanted[name]) for name, window in self._windows.items()}, at)

    def sent(self, grant: Grant) -> None:
        """The call goes now: since its grant it waited for its row and its slot, now longer, now shorter."""
        if self._requests is not None:
            self._requests.move(grant.at)
        for name, share in grant.shares.items():
            self._windows[name].move(share)

    def settle(self, grant: Grant, input_tokens: int | None, output_tokens: int | None) -> None:
        """Replace the estimate by the usage; what is not known stays at its estimate."""
        if input_tokens and grant.n_bytes:
            self._tokens_per_byte += _LEARNING * (input_tokens / grant.n_bytes - self._tokens_per_byte)
        for name, share in grant.shares.items():
            parts = {"input": [input_tokens], "output": [output_tokens], "both": [input_tokens, output_tokens]}[name]
            if None not in parts:
                self._windows[name].settle(share, sum(part or 0 for part in parts))
        self._freed.set()

    async def resumed(self) -> None:
        """Returns when nothing has to pause."""
        while (wait_s := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    def pause(self, seconds: float) -> None:
        """Nothing is sent for `seconds`: a 429 speaks of the account, not of the request that met it."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)
