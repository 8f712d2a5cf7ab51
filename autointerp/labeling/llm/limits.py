"""How fast we may ask: requests and tokens per minute, and the pause that a provider asks for."""

from __future__ import annotations

import asyncio
import time

from aiolimiter import AsyncLimiter
from asyncio_throttle.throttler import Throttler


class Limits:
    """Waits until one more request may be sent. Callers hold a slot of the engine first, so that few wait here."""

    def __init__(self, rpm: int | None, tpm: int | None, period_s: float = 60.0):
        poll_s = min(0.05, period_s / 200)
        self._requests = Throttler(rate_limit=rpm, period=period_s, retry_interval=poll_s) if rpm else None
        self._tokens = AsyncLimiter(tpm, period_s) if tpm else None
        self._resume_at = 0.0

    async def admit(self, tokens: int) -> None:
        """Returns when a request of about `tokens` tokens (input and output) may be sent."""
        await self._resumed()
        if self._tokens is not None:
            # One request above the whole budget of a minute would wait for ever (ValueError in the bucket).
            await self._tokens.acquire(min(tokens, self._tokens.max_rate))
        if self._requests is not None:
            await self._requests.acquire()
        await self._resumed()

    async def _resumed(self) -> None:
        while (wait_s := self._resume_at - time.monotonic()) > 0:
            await asyncio.sleep(wait_s)

    def pause(self, seconds: float) -> None:
        """Nothing is sent for `seconds`: a 429 speaks of the account, not of the request that met it."""
        self._resume_at = max(self._resume_at, time.monotonic() + seconds)
