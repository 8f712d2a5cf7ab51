"""How many calls may be in flight: found out, as TCP finds its window, between one and what the user allows."""

from __future__ import annotations

import asyncio
from collections import deque

FIRST = 8
"""Calls in flight once the first, which goes alone, has been answered."""
RAMP_S = 0.03
"""While nobody objects, the limit doubles this often. Refusals come back long before answers do."""
CUT = 0.8
GROWTH = 1.05


class Slots:
    """A semaphore whose size adapts. The first call goes alone: a wrong key costs one call, not as many as fit.

    Then a slow start doubles the size while calls wait for it, until a 429 comes. A 429 cuts it to 0.8, once for all
    calls that were sent before the cut. From then on it grows by 5 % for each clean round (as many answers as there
    are slots) in which it was full. Server errors and lost connections pause the growth; they say nothing of our rate.
    """

    def __init__(self, most: int, ramp_s: float = RAMP_S):
        self.most = most
        self.limit = 1.0
        self.in_use = 0
        self._ramp_s = ramp_s
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._proven = False
        self._slow_start = True
        self._paused = False
        self._ramp: asyncio.TimerHandle | None = None
        self._cuts = 0
        self._answers = 0
        self._full = False

    async def acquire(self) -> int:
        """Takes a slot, first come first served; returns what `limited` wants to know of when that was."""
        if self.in_use < int(self.limit) and not self._waiting:
            self.in_use += 1
            return self._cuts
        self._full = True
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._ramp_up()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.cancelled():
                self._waiting.remove(turn)
            else:
                self.release()  # it was handed over just before
            raise
        return self._cuts

    def release(self) -> None:
        self.in_use -= 1
        self._hand_out()

    def proven(self) -> None:
        """The provider takes our questions."""
        if not self._proven:
            self._proven = True
            self._grow_to(FIRST)

    def answered(self) -> None:
        """A good answer came."""
        self._paused = False
        self._answers += 1
        if self._answers >= self.limit:
            if self._full and not self._slow_start:
                self._grow_to(self.limit * GROWTH)
            self._answers, self._full = 0, bool(self._waiting)
        self._ramp_up()

    def limited(self, since: int) -> None:
        """A 429 came to a call that took its slot at `since`."""
        self._slow_start = False
        self._answers = 0
        if since == self._cuts:
            self._cuts += 1
            self.limit = max(1.0, self.limit * CUT)

    def troubled(self) -> None:
        """A server error or a lost connection: no growth until the next good answer, and that round is not clean."""
        self._paused = True
        self._answers = 0

    def _grow_to(self, limit: float) -> None:
        self.limit = max(1.0, min(float(self.most), limit))
        self._hand_out()
        self._ramp_up()

    def _hand_out(self) -> None:
        while self._waiting and self.in_use < int(self.limit):
            turn = self._waiting.popleft()
            if not turn.done():
                self.in_use += 1
                turn.set_result(None)

    def _ramp_up(self) -> None:
        growing = self._proven and self._slow_start and not self._paused and self.limit < self.most
        if growing and self._waiting and self._ramp is None:
            self._ramp = asyncio.get_running_loop().call_later(self._ramp_s, self._double)

    def _double(self) -> None:
        self._ramp = None
        if self._slow_start and self._waiting and not self._paused:
            self._grow_to(self.limit * 2)
