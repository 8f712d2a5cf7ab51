"""Ctrl-C: what is under way is finished and stored, nothing new is begun."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from autointerp.errors import AutointerpError


class StoppedByUser(AutointerpError):
    """The job was interrupted and drained."""

    exit_status = 130


@dataclass
class Stop:
    """Set once; every stage looks at it between two units of work."""

    asked: bool = False
    on_ask: list[Callable[[], None]] = field(default_factory=list)
    """Called when it is set: an engine's way to stop sending."""

    def ask(self) -> None:
        self.asked = True
        for call in self.on_ask:
            call()

    def check(self, where: str = "interrupted") -> None:
        """StoppedByUser once it was asked for."""
        if self.asked:
            raise StoppedByUser(where)


@contextlib.contextmanager
def on_interrupt(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C drains; a second one, or one where no handler can be set, is the usual KeyboardInterrupt."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.ask()

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
