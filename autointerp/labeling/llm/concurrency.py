"""How many calls may be in flight: found out, as TCP finds its window, between one and what the user allows."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

ALONE_S = 0.3
"""Refusals come back long before answers do: a call that meets none for so long is taken to be taken."""
FIRST = 8
"""Calls in flight after the first, which goes alone."""
AHEAD = 0.2
"""Of the slots: so many more calls get ready before there is a slot for them."""
RAMP_S = 0.03
"""While nobody objects, the limit doubles this often."""
CUT = 0.8
GROWTH = 1.05


class Line:
    """A semaphore whose size changes: first come, first served. `on_wait` is called when somebody has to."""

    def __init__(self, size: Callable[[], int], on_wait: Callable[[], None]):
        self.in_use = 0
        self.waiting: deque[asyncio.Future[None]] = deque()
        self._size = size
        self._on_wait = on_wait

    async def acquire(self) -> None:
        if self.in_use < self._size() and not self.waiting:
            self.in_use += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        self._on_wait()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self.release()  # it was handed over just before
            elif turn in self.waiting:  # and not passed over since
                self.waiting.remove(turn)
            raise

    def release(self) -> None:
        self.in_use -= 1
        self.hand_out()

    def hand_out(self) -> None:
        while self.waiting and self.in_use < self._size():
            turn = self.waiting.popleft()
            if not turn.done():
                self.in_use += 1
                turn.set_result(None)


class Slots:
    """How many calls may be in flight adapts. The first goes alone until it is answered, or is not refused for ALONE_S:
    a wrong key costs one call, not as many as fit.

    Then a slow start doubles the size while calls wait for it, until a 429 comes. A 429 cuts it to 0.8, once for all
    calls that were sent before the cut. From then on it grows by 5 % for each clean round (as many answers as there
    are slots) in which it was full. Server errors and lost connections pause the growth; they say nothing of our rate.
    """

    def __init__(self, most: int, ramp_s: float = RAMP_S, alone_s: float = ALONE_S):
        self.most = most
        self.limit = 1.0
        self.near = Line(lambda: int(self.limit * (1 + AHEAD)), self._crowded)
        """Those that have a slot, and the few next, which get ready: then a slot that is free is used at once."""
        self._slots = Line(lambda: int(self.limit), self._crowded)
        self._ramp_s = ramp_s
        self._alone_s = alone_s
        self._proven = False
        self._slow_start = True
        self._paused = False
        self._ramp: asyncio.TimerHandle | None = None
        self._silence: asyncio.TimerHandle | None = None
        self._cuts = 0
        self._answers = 0
        self._full = False

    @property
    def in_use(self) -> int:
        return self._slots.in_use

    async def acquire(self) -> int:
        """Takes a slot; returns what `limited` wants to know of when that was."""
        await self._slots.acquire()
        return self._cuts

    def sent(self) -> None:
        """A call that has a slot goes to the provider now."""
        if not self._proven:
            self._silence = asyncio.get_running_loop().call_later(self._alone_s, self.proven)

    def release(self) -> None:
        if self._silence is not None:
            self._silence.cancel()  # whatever it was, it was no silence
            self._silence = None
        self._slots.release()

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
            self._answers, self._full = 0, self._waited_for
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

    @property
    def _waited_for(self) -> bool:
        return bool(self._slots.waiting or self.near.waiting)

    def _crowded(self) -> None:
        self._full = True
        self._ramp_up()

    def _grow_to(self, limit: float) -> None:
        self.limit = max(1.0, min(float(self.most), limit))
        self._slots.hand_out()
        self.near.hand_out()
        self._ramp_up()

    def _ramp_up(self) -> None:
        growing = self._proven and self._slow_start and not self._paused and self.limit < self.most
        if growing and self._waited_for and self._ramp is None:
            self._ramp = asyncio.get_running_loop().call_later(self._ramp_s, self._double)

    def _double(self) -> None:
        self._ramp = None
        if self._slow_start and self._waited_for and not self._paused:
            self._grow_to(self.limit * 2)
