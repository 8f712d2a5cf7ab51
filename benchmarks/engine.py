"""How near the engine comes to what its limits allow, as ratios to the ideal, and what a call costs the client.

A loopback server in a process of its own answers after a fixed time, and notes when each request arrived and what it
used; the real SDK, ledger and store ask it. The ideal is computed from those notes: nothing asked of a
provider could be faster.

- requests and tokens a minute: seconds until the last request may arrive when no window of 60 s holds more than the
  limit, over the seconds until it did; and the requests at whose arrival a window held more than that.
- many in flight: calls × latency / concurrency, and the time that they took.
- CPU: process time of the client alone, its threads included, over the calls.

    python -m benchmarks.engine --write results/engine.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import openai  # noqa: F401  here, so that loading it is not on the clock

from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.engine import Engine
from autointerp.labeling.llm.provider import Request, make_provider
from autointerp.store import Store
from benchmarks.planting import publish
from tests.faults.server import FaultServer, over_the_limit

MODEL = "gpt-6-luna"
MINUTE_S = 60.0
RPM = 600
TPM = 150_000
"""About 250 questions a minute, as long as those of the labeler."""
QUESTION_BYTES = 2_000
ANSWER = json.dumps({"word": "yes " * 60})
ROOM = 320
"""Cap on the output tokens of a question: what is set aside until its answer tells what it used."""
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}


@dataclass(frozen=True)
class Taken:
    """What one run of the engine took, on the server's notes and on our clock."""

    seconds: float
    cpu_s: float
    arrivals: list[tuple[float, int]]


def ask_all(folder: Path, n: int, latency_s: float, **settings: Any) -> Taken:
    """`n` questions through a fresh engine and store, against a fresh server."""
    with server(latency_s) as process:
        assert process.stdin
        assert process.stdout
        os.environ |= {"OPENAI_BASE_URL": process.stdout.readline().strip(), "OPENAI_API_KEY": "none"}
        seconds, cpu_s = asyncio.run(
            _ask_all(folder / f"{n} {settings}.duckdb", n, LabelingSettings("run", **settings))
        )
        process.stdin.close()
        return Taken(seconds, cpu_s, [(at, tokens) for at, tokens in json.loads(process.stdout.read())])


async def _ask_all(db: Path, n: int, settings: LabelingSettings) -> tuple[float, float]:
    """(seconds, seconds of CPU) of `n` questions."""
    db.unlink(missing_ok=True)
    with Store.open(db) as store:
        store.upsert("calls", [{"call_id": "first", "started_at": datetime.now()}]).result()  # loads what loads once
        engine = Engine(make_provider("openai", MODEL, settings), store, settings)
        began, cpu_began = time.monotonic(), time.process_time()
        await asyncio.gather(*(engine.ask(question(i), word, latent=i, purpose="label") for i in range(n)))
        taken = time.monotonic() - began, time.process_time() - cpu_began
        await engine.aclose()
    return taken


def question(number: int) -> Request:
    return Request(
        "Answer with a word as JSON.", f"{number} " + "text " * (QUESTION_BYTES // 5), "word", SCHEMA, ROOM, ""
    )


def word(answer: dict[str, Any]) -> str:
    return answer["word"]


@contextmanager
def server(latency_s: float) -> Iterator[subprocess.Popen[str]]:
    """A process that writes its address, and when its standard input closes what it noted."""
    command = [sys.executable, "-m", "benchmarks.engine", "--serve", str(latency_s)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def serve(latency_s: float) -> None:
    """What `server` starts."""
    async with FaultServer(lambda system, user: ANSWER, latency_s=latency_s) as own:
        print(f"{own.url}/v1", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(json.dumps(own.arrivals))


def soonest_s(sizes: Sequence[int], limit: int) -> float:
    """Seconds from the first arrival to the last when no minute holds more than `limit` in sum."""
    held: deque[tuple[float, int]] = deque()
    total, at = 0, 0.0
    for size in sizes:
        while total + size > limit:
            before, gone = held.popleft()
            at, total = max(at, before + MINUTE_S), total - gone
        held.append((at, size))
        total += size
    return at


@dataclass(frozen=True)
class Rate:
    """Seconds from the first arrival to the last, those that the limits call for, and what broke them."""

    ideal_s: float
    seconds: float
    over: int

    @classmethod
    def of(cls, taken: Taken, rpm: int | None, tpm: int | None) -> Rate:
        arrivals = sorted(taken.arrivals)
        requests = [(at, 1) for at, _ in arrivals]
        parts = [(entries, limit) for entries, limit in ((requests, rpm), (arrivals, tpm)) if limit]
        ideal_s = max(soonest_s([n for _, n in entries], limit) for entries, limit in parts)
        over = sum(over_the_limit(entries, limit, MINUTE_S) for entries, limit in parts)
        return cls(ideal_s, arrivals[-1][0] - arrivals[0][0], over)


LIMITS = (
    (f"{RPM} requests a minute", 3 * RPM + 1, RPM, None),
    (f"{TPM:,} tokens a minute", 780, None, TPM),
    (f"both: {RPM} requests and {2 * TPM:,} tokens a minute", 1530, RPM, 2 * TPM),
)
"""(name, questions: three minutes' worth and a few, requests, tokens)."""


def rates(folder: Path, repeats: int, limits: Sequence[tuple[str, int, int | None, int | None]] = LIMITS) -> list[str]:
    """The rows about limits."""
    rows: list[str] = []
    for name, n, rpm, tpm in limits:
        found = [Rate.of(ask_all(folder, n, 0.5, rpm=rpm, tpm=tpm, concurrency=32), rpm, tpm) for _ in range(repeats)]
        shares = [rate.ideal_s / rate.seconds for rate in found]
        rows.append(
            f"| {name} | {n:,} | {found[0].ideal_s:.1f} | {spread([rate.seconds for rate in found], '.1f')} | "
            f"{spread(shares, '.3f')} | ≥ .97 | {sum(rate.over for rate in found)} |"
        )
    return rows


def flights(folder: Path, repeats: int) -> list[str]:
    """The rows about calls in flight, and the CPU of the client."""
    n, latency_s, concurrency = 1000, 1.0, 100
    ideal_s = n * latency_s / concurrency
    found = [ask_all(folder, n, latency_s, concurrency=concurrency) for _ in range(repeats)]
    ratios = [taken.seconds / ideal_s for taken in found]
    cpu_ms = [1000 * taken.cpu_s / n for taken in found]
    return [
        f"| {n:,} calls of {latency_s:g} s, {concurrency} in flight | {ideal_s:.1f} s | "
        f"{spread([taken.seconds for taken in found], '.2f')} s | {spread(ratios, '.3f')} | ≤ 1.15 |",
        f"| CPU of the client for a call | | {spread(cpu_ms, '.2f')} ms | | ≤ 5 ms |",
    ]


def spread(values: Sequence[float], form: str) -> str:
    """The median, and the range where there are several."""
    middle = format(statistics.median(values), form)
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} – {max(values):{form}})"


HEAD = """# How fast the engine asks

A loopback server in a process of its own, real time; the real SDK, ledger and store. Median of {repeats} runs
(smallest – largest) on {cpus} CPUs at a load average of {load:.0f}. CPU is the process time of the client alone, with
its threads, after a first row has loaded what is loaded once.

The ideal time is when the last request may arrive at the earliest while no window of 60 s, wherever it begins,
holds more than the limit. Violations are requests on whose arrival the last 60 s hold more, in all runs together.

| limit | calls | ideal s | seconds | ideal / seconds | goal | violations |
|---|---|---|---|---|---|---|
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=("rates", "flights"))
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--serve", type=float, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        return asyncio.run(serve(arguments.serve))
    with tempfile.TemporaryDirectory() as folder:
        found = rates(Path(folder), arguments.repeats) if arguments.only != "flights" else []
        flown = flights(Path(folder), arguments.repeats) if arguments.only != "rates" else []
    head = HEAD.format(repeats=arguments.repeats, cpus=os.cpu_count(), load=os.getloadavg()[0])
    table = ["", "| | ideal | measured | measured / ideal | goal |", "|---|---|---|---|---|"]
    publish(head + "\n".join([*found, *table, *flown]) + "\n", arguments.write)


if __name__ == "__main__":
    main()
