"""Faults that are more than one bad answer: many calls at once, batches, interruptions, the disk."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from autointerp.errors import InputError, ProviderError
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.labelers.llm import LLMLabeler
from autointerp.labeling.llm.sending import DOWN_AFTER
from autointerp.labeling.scorers.detection import DetectionScorer
from autointerp.records import Label
from autointerp.store import Store, StoreError
from tests.faults.harness import Bench, bench, planted, question, says, word
from tests.faults.server import Fault, FaultServer, error
from tests.faults.test_batches import crash

GOOD = json.dumps({"word": "yes"})


class Scene(NamedTuple):
    """What became of one of them."""

    fault: str
    ends: str
    calls: int
    """On the ledger."""
    arrived: int
    """Requests that the server received."""
    usd: float
    billed_usd: float
    usd_in_doubt: float
    unseen_usd: float


def scene(fault: str, ends: str, b: Bench) -> Scene:
    """The books of a bench as they stand."""
    (books,) = b.store.read(
        "SELECT count(*) AS n, coalesce(sum(usd), 0) AS usd, "
        "coalesce(sum(usd_estimated) FILTER (usd IS NULL), 0) AS in_doubt FROM calls"
    )
    bill = b.server.bill
    assert books["usd"] <= bill.usd + 1e-12
    assert bill.usd + bill.unseen_usd <= books["usd"] + books["in_doubt"] + 1e-12
    return Scene(
        fault, ends, books["n"], len(b.server.requests), books["usd"], bill.usd, books["in_doubt"], bill.unseen_usd
    )


async def ask(b: Bench, numbers: Sequence[int], engine: Any = None) -> list[Any]:
    """What becomes of these questions, asked all at once."""
    asked = (engine or b.engine).ask
    asks = (asked(question(i), word, latent=i, purpose="label") for i in numbers)
    return await asyncio.gather(*asks, return_exceptions=True)


ENDS = {
    "Reply": "answered",
    "Terminal": "failed",
    "BudgetError": "stopped by the budget",
    "ProviderError": "stopped with the provider",
    "Interrupted": "not begun",
    "StoreError": "stopped with the disk",
}


def counted(replies: Sequence[Any]) -> str:
    """How many of each: `12 answered, 3 failed`."""
    kinds = Counter(ENDS[type(reply).__name__] for reply in replies)
    return ", ".join(f"{n} {end}" for end, n in sorted(kinds.items(), key=lambda item: item[0] != "answered"))


async def refused_connections(folder: Path, provider: str) -> list[Scene]:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        async with bench(folder, provider=provider) as b:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(f"{provider.upper()}_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
                engine = b.make("run")
            label = await LLMLabeler(engine, LabelingSettings("run")).label(planted())
            await engine.aclose()
            assert label.status == "failed"
            return [scene("nobody listens", label.status, b)]


async def identical_prompts(folder: Path, provider: str) -> list[Scene]:
    async with bench(folder, provider=provider, respond=says(GOOD), latency_s=0.05) as b:
        return [scene("the same question ten times at once", counted(await ask(b, [0] * 10)), b)]


async def budget(folder: Path, provider: str) -> list[Scene]:
    (folder / "one").mkdir()
    async with bench(folder / "one", provider=provider, respond=says(GOOD)) as b:
        await ask(b, [0])
        (cap,) = (2.5 * call["usd_estimated"] for call in b.calls())
    options: dict[str, Any] = {"latency_s": 0.02, "concurrency": 20, "max_usd": cap}
    async with bench(folder, provider=provider, respond=says(GOOD), **options) as b:
        ends = counted(await ask(b, range(60)))
        assert b.server.bill.usd <= cap
        return [scene(f"--max-usd of {1e6 * cap:.1f} µ$, 60 questions, 20 in flight", ends, b)]


async def interruption(folder: Path, provider: str) -> list[Scene]:
    async with bench(folder, provider=provider, respond=says(GOOD), latency_s=0.05) as b:
        await ask(b, [0])
        asking = asyncio.create_task(ask(b, range(1, 40)))
        while len(b.server.requests) < 9:
            await asyncio.sleep(0.001)
        await b.engine.drain()
        interrupted = counted(await asking)
        again = b.make("run")
        await ask(b, range(40), again)
        await again.aclose()
        return [scene(f"Ctrl-C: {interrupted}; then the same 40 again", "40 answered", b)]


async def scorer_answers(folder: Path, provider: str) -> list[Scene]:
    scenes: list[Scene] = []
    for name, text in (("too few verdicts", '{"fires": [1, 0, 1]}'), ("out of range", '{"fires": [1, 0, 7, null, 2]}')):
        (folder / name).mkdir()
        async with bench(folder / name, [Fault(text=text)], provider=provider) as b:
            label = Label(7, "x", "ok", "anything", "Fires on `assert`.")
            score = await DetectionScorer(b.engine, LabelingSettings("run")).score(planted(), label, None)
            ends = f"scored on {score.n_examples}, {score.n_missing} missing"
            scenes.append(scene(f"scorer: {name}", ends, b))
    return scenes


async def one_down(folder: Path, provider: str) -> list[Scene]:
    """`provider` says 503 to everything; the other one, on the same store, is asked next."""
    other = "anthropic" if provider == "openai" else "openai"
    async with FaultServer(says(GOOD)) as server:
        down = "/v1/messages" if provider == "anthropic" else "/v1/chat/completions"
        server.choose = lambda: error(503, "busy") if server.requests[-1]["path"] == down else None
        async with bench(folder, provider=provider, server=server) as b:
            first = await ask(b, range(20))
            assert sum(isinstance(reply, ProviderError) for reply in first) <= 20 - DOWN_AFTER
        async with bench(folder, provider=other, server=server) as b:
            second = await ask(b, range(20))
            return [scene(f"down: {counted(first)}; then {other}", counted(second), b)]


LINES = {
    "batch: out of order": None,
    "batch: a line is missing": Fault(breaks="lose"),
    "batch: a line comes twice": Fault(breaks="twice"),
    "batch: a line has expired": Fault(breaks="expire"),
    "batch: a line fails, 500": error(500, "oops", kind="api_error"),
    "batch: a line fails, 400": error(400, "no such thing", kind="invalid_request_error"),
}


async def batches(folder: Path, provider: str) -> list[Scene]:
    scenes: list[Scene] = []
    for number, (name, fault) in enumerate(LINES.items()):
        (folder / str(number)).mkdir()
        async with bench(folder / str(number), [fault], provider=provider, respond=says(GOOD), batch=True) as b:
            scenes.append(scene(name, counted(await ask(b, range(6))), b))
    (folder / "orphan").mkdir()
    asyncio.get_running_loop().set_exception_handler(lambda *_: None)  # that of the killed one is nobody's
    async with FaultServer(says(GOOD)) as server:
        with pytest.MonkeyPatch.context() as patch:
            await crash(folder / "orphan", provider, "between create and save", server, patch)
        async with bench(folder / "orphan", provider=provider, server=server, batch=True) as b:
            replies = await ask(b, range(5))
            assert all(reply.stored for reply in replies)
            n = len(server.desk.jobs)
            scenes.append(scene("batch: crash between create and save", f"{counted(replies)}, {n} batch, adopted", b))
    return scenes


async def full_disk(folder: Path, provider: str) -> list[Scene]:
    async with FaultServer(says(GOOD), latency_s=0.02) as server:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with contextlib.suppress(StoreError):  # said once more as the store is closed
            async with bench(folder, provider=provider, server=server) as b:
                await ask(b, range(8))
                b.store.flush()
                room = max(file.stat().st_size for file in folder.iterdir()) + 10_000
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
                try:
                    replies = await ask(b, range(8, 400))
                finally:
                    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        n = len(server.requests)
        async with bench(folder, provider=provider, server=server) as b:
            again = counted(await ask(b, range(400)))
            return [scene(f"disk full: {counted(replies)} after {n} requests; then room, and all 400 again", again, b)]


HOLDER = """
import sys, time
from autointerp.store import Store, StoreError
with Store.open(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


async def held_lock(folder: Path, provider: str) -> list[Scene]:
    path = folder / "store.duckdb"
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLDER, str(path), stdout=asyncio.subprocess.PIPE, env=dict(os.environ)
    )
    try:
        assert holder.stdout is not None
        await holder.stdout.readline()
        with pytest.raises(InputError) as refused:
            Store.open(path, lock_wait_s=0.1)
        assert str(holder.pid) in str(refused.value)
    finally:
        holder.kill()
        await holder.wait()
    return [Scene("another process holds the store", "refused, naming its PID", 0, 0, 0.0, 0.0, 0.0, 0.0)]


SCENES: tuple[Callable[[Path, str], Coroutine[Any, Any, list[Scene]]], ...] = (
    refused_connections, identical_prompts, budget, interruption, scorer_answers, one_down, batches, full_disk,
    held_lock,
)  # fmt: skip
