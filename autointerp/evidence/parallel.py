"""Several batches at once on a CPU: each core runs a batch of its own, instead of all cores sharing every operation.

Operations of small models are too short to be worth splitting: threads wait for each other more than they compute.
A batch for each core needs no waiting and stays in that core's cache. The order of the results is that of the batches, so
what is added up from them does not depend on which core was first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch

from autointerp.evidence.paired import PairedModel

T = TypeVar("T")
R = TypeVar("R")

MAX_MODELS = 8
"""Batches at once: beyond it, threads wait for the interpreter."""
AHEAD = 1
"""Results made ahead of the reader, besides those under way."""
TOKENS_PER_BATCH = {"cpu": 1024}
"""Positions of a batch that stays in a core's cache, by device type."""
TOKENS_PER_LARGE_BATCH = 4096
"""On other devices."""


def tokens_per_batch(device: torch.device) -> int:
    """Positions per forward pass that suit a device."""
    return TOKENS_PER_BATCH.get(device.type, TOKENS_PER_LARGE_BATCH)


def replicas(model: PairedModel) -> list[PairedModel]:
    """`model`, and as many more with the same weights as there are threads to run them: on a GPU, none."""
    n = min(torch.get_num_threads(), MAX_MODELS) if model.device.type == "cpu" else 1
    return [model, *(model.replica() for _ in range(n - 1))]


def in_order(
    work: Callable[[PairedModel, T], R], models: Sequence[PairedModel], items: Iterable[T]
) -> Generator[R, None, None]:
    """work(model, item) for each item, in the order of `items`, each model in one thread at a time.

    Torch's threads are shared out among the models. What `work` raises is raised here; closing the result waits for what
    is under way.
    """
    free: SimpleQueue[PairedModel] = SimpleQueue()
    for model in models:
        free.put(model)

    def run(item: T) -> R:
        model = free.get()
        try:
            return work(model, item)
        finally:
            free.put(model)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(
        len(models), "autointerp-model", torch.set_num_threads, (max(1, threads // len(models)),)
    )
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            under_way.append(pool.submit(run, item))
            if len(under_way) > len(models) + AHEAD:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        torch.set_num_threads(threads)  # what a worker sets is the default of threads to come
