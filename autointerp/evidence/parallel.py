"""Several batches at once on a CPU: each core runs a batch of its own, instead of all cores sharing every operation.

Operations of small models are too short to be worth splitting: threads wait for each other more than they compute. A
batch for each core needs no waiting and stays in that core's cache. Results are handed on in the order of the batches,
so what is added up from them does not depend on which core was first; and by the threads that made them, so that there
are never more of those than cores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from queue import SimpleQueue
from typing import Generic, TypeVar

import torch

from autointerp.evidence.paired import PairedModel

H = TypeVar("H")
T = TypeVar("T")
R = TypeVar("R")

MAX_AT_ONCE = 8
"""Batches at once: beyond it, threads wait for the interpreter."""
AHEAD = 2
"""Results for each batch under way that may wait for those before them to be handed on."""
TOKENS_PER_BATCH = {"cpu": 1024}
"""Positions of a batch that stays in a core's cache, by device type."""
TOKENS_PER_LARGE_BATCH = 4096
"""On other devices."""


def tokens_per_batch(device: torch.device) -> int:
    """Positions per forward pass that suit a device."""
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_LARGE_BATCH)


def at_once(device: torch.device) -> int:
    """How many batches to have under way: as many as torch has threads for, on a GPU one."""
    return min(torch.get_num_threads(), MAX_AT_ONCE) if device.type == "cpu" else 1


def replicas(model: PairedModel) -> list[PairedModel]:
    """`model`, and as many more with the same weights as can run at once."""
    return [model, *(model.replica() for _ in range(at_once(model.device) - 1))]


def in_order(
    work: Callable[[H, T], R],
    then: Callable[[R], object],
    hands: Sequence[H],
    items: Iterable[T],
) -> None:
    """then(work(hand, item)) for each item: `work` on several at once, each hand (a replica of a model, say) in one
    thread at a time; `then` one after the other, in the order of `items`.

    Torch's threads are shared out among the hands. What either raises is raised here, and no further item is begun.
    """
    threads = torch.get_num_threads()
    n = max(2, len(hands))  # a single hand, on a GPU perhaps, does not wait for `then`
    run = _InOrder(work, then, hands, items, n, max(1, threads // len(hands)))
    workers = [threading.Thread(target=run.work, name="autointerp-model") for _ in range(n)]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        run.stop()
        torch.set_num_threads(threads)  # what a worker sets is the default of threads to come
    if run.errors:
        raise run.errors[0]


class _InOrder(Generic[H, T, R]):
    """The state that the threads of one `in_order` share."""

    def __init__(
        self,
        work: Callable[[H, T], R],
        then: Callable[[R], object],
        hands: Sequence[H],
        items: Iterable[T],
        n_threads: int,
        torch_threads: int,
    ):
        self._over, self._n = threading.Event(), n_threads
        self.errors: list[BaseException] = []
        self._work, self._then, self._torch_threads = work, then, torch_threads
        self._items, self._next_item = enumerate(items), threading.Lock()
        self._free: SimpleQueue[H] = SimpleQueue()
        for hand in hands:
            self._free.put(hand)
        self._room = threading.Semaphore((1 + AHEAD) * n_threads)
        self._done: dict[int, R] = {}
        self._handed_on, self._turn = 0, threading.Lock()

    def work(self) -> None:
        """What each thread does: takes an item, works on it, hands on what is next in order, until there are none."""
        torch.set_num_threads(self._torch_threads)
        try:
            while not self._over.is_set() and (numbered := self._take()) is not None:
                number, item = numbered
                hand = self._free.get()
                try:
                    self._done[number] = self._work(hand, item)
                finally:
                    self._free.put(hand)
                del item, numbered
                self._hand_on()
        except BaseException as error:  # raised again in the thread that asked
            self.errors.append(error)
            self.stop()

    def stop(self) -> None:
        """Lets every thread end after what it is at."""
        self._over.set()
        self._room.release(self._n)  # those that wait for room

    def _take(self) -> tuple[int, T] | None:
        self._room.acquire()
        if self._over.is_set():
            return None
        with self._next_item:
            return next(self._items, None)

    def _hand_on(self) -> None:
        # A thread that finds another at it leaves its result there; that one looks again after it let go.
        while self._next_stands() and self._turn.acquire(blocking=False):
            try:
                while self._next_stands():
                    self._then(self._done.pop(self._handed_on))
                    self._handed_on += 1
                    self._room.release()
            finally:
                self._turn.release()

    def _next_stands(self) -> bool:
        return self._handed_on in self._done and not self._over.is_set()
