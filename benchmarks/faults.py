"""What each fault of a provider does to a labelling job: how it ends, how often is asked, what it costs on both books.

A loopback server speaks the three protocols to the real SDKs, misbehaves by plan and keeps its own bill; it charges for
whatever ended with status 200, also where the answer never reached us. Waits between attempts are scaled down (first
2 ms, at most 20 ms), and so are deadlines.

    python -m benchmarks.faults [calls scenes mixture kills] --write results/faults.md
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from autointerp.store import Store
from benchmarks.fault_scenes import SCENES
from benchmarks.planting import publish
from tests.e2e.kills import LABELER, Left, assert_asked_once, kill
from tests.e2e.serving import Serving
from tests.e2e.world import build
from tests.faults.catalogue import DOWN, PROVIDERS, STOP, Met, Named, Protocol, catalogue, meet, scene
from tests.faults.harness import MODELS
from tests.faults.mixture import Mixture, assert_accounted_for, audit, everything_said, label_all, plant
from tests.faults.server import FaultServer, oracle

TITLES: dict[Protocol, str] = {
    "chat": "OpenAI, chat completions",
    "messages": "Anthropic, messages",
    "responses": "OpenAI, responses",
}
SHARE = 0.05
DEADLINE_S = 4.0
K = 40
CONCURRENCIES = (4, 16)
"""Of the kills: without and with calls entered ahead of their slots."""
EARLY = 0.2
"""Share of the kills that come while the command starts."""


async def each_fault(folder: Path, protocol: Protocol) -> list[tuple[Named, Met, Met]]:
    """(fault, met once, met every time) for all of the catalogue."""
    async with scene(folder, protocol) as b:
        return [
            (named, await meet(b, named, False, DEADLINE_S), await meet(b, named, True, DEADLINE_S))
            for named in catalogue(protocol)
        ]


def fault_tables(folder: Path) -> Iterator[str]:
    found = {}
    for protocol in TITLES:
        (folder / protocol).mkdir()
        found[protocol] = asyncio.run(each_fault(folder / protocol, protocol))
    chat = {named.name: (once.ends, always.ends) for named, once, always in found["chat"]}
    for protocol, rows in found.items():
        yield f"\n### {TITLES[protocol]}\n"
        if protocol == "responses":
            n, rows = len(rows), [row for row in rows if (row[1].ends, row[2].ends) != chat.get(row[0].name)]
            yield f"{n - len(rows)} of {n} faults end as with chat completions, after as many calls."
        if rows:
            books = "calls | ledger | bill | in doubt | unseen"
            yield f"| fault | met once | {books} | met every time | {books} |"
            yield "|---" * 13 + "|"
        for named, once, always in rows:
            ends = once.ends, always.ends
            assert ends == (named.kind.once, named.kind.always), f"{protocol}, {named.name}: {ends}"
            yield f"| {named.name} | {_met(once)} | {_met(always)} |"


def _met(met: Met) -> str:
    usd = (met.usd, met.billed_usd, met.usd_in_doubt, met.unseen_usd)
    assert "XYZZY" not in met.said + str(met.calls)
    return f"{met.ends.state} | {met.ends.calls} | " + " | ".join(map(_micro, usd))


def scene_table(folder: Path) -> Iterator[str]:
    yield "| provider | fault | ends | calls | arrived | ledger | bill | in doubt | unseen |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for provider in MODELS:
        for play in SCENES:
            own = Path(tempfile.mkdtemp(dir=folder))
            for s in asyncio.run(play(own, provider)):
                usd = " | ".join(map(_micro, (s.usd, s.billed_usd, s.usd_in_doubt, s.unseen_usd)))
                yield f"| {provider} | {s.fault} | {s.ends} | {s.calls} | {s.arrived} | {usd} |"


def mixture_table(folder: Path, n_latents: int, seed: int) -> Iterator[str]:
    columns: list[dict[str, str]] = []
    runs: tuple[tuple[Protocol, bool], ...] = (("chat", True), ("messages", False))
    for protocol, stops in runs:
        (folder / protocol).mkdir()
        columns.append(mixed(folder / protocol, protocol, stops, n_latents, seed))
    yield "| |" + " |" * len(columns)
    yield "|---|" + "---|" * len(columns)
    for name in columns[0]:
        yield f"| {name} | " + " | ".join(column[name] for column in columns) + " |"


def mixed(folder: Path, protocol: Protocol, stops: bool, n_latents: int, seed: int) -> dict[str, str]:
    """All latents to their ends, through every fault at once."""
    provider, db = PROVIDERS[protocol], folder / "store.duckdb"
    faults = [named.fault for named in catalogue(protocol) if stops or named.kind is not STOP]
    faults.append(DOWN)
    mixture = Mixture(faults, n_latents, SHARE, seed)

    async def run() -> tuple[FaultServer, int]:
        async with FaultServer(oracle, cached_tokens=3) as server:
            server.choose = lambda: mixture.meets(server.requests[-1])
            return server, await label_all(folder, server, provider, concurrency=16, deadline_s=3.0)

    heard = folder / "heard.txt"
    with overheard(heard):
        with Store.open(db) as store:
            plant(store, n_latents)
        server, n_commands = asyncio.run(run())
        said = everything_said(db, folder)
    found = audit(db, f"{provider}:{MODELS[provider]}", server)
    assert_accounted_for(found, n_latents)
    n_keys = said.count("XYZZY") + heard.read_text(errors="replace").count("XYZZY")
    assert n_keys == 0
    return {
        "provider": f"**{provider}**",
        "kinds of fault": f"{len(faults)}, with those that stop us" if stops else str(len(faults)),
        "faults dealt": f"{mixture.dealt:,}",
        "commands until all was done": str(n_commands),
        "latents: ok": str(found.states["ok"]),
        "latents: refused": str(found.states["refused"]),
        "latents: failed": str(found.states["failed"]),
        "latents without an end": str(n_latents - found.states.total() + found.states["none"]),
        "labels without a score": str(found.unscored),
        "examples counted as missing": str(found.n_missing),
        "requests that arrived": f"{found.arrived:,}",
        "calls on the ledger": f"{found.calls.total():,}",
        "of them refused a connection": str(found.never_arrived),
        "answers with usage, ledger": f"{found.n_answered[0]:,}",
        "answers with usage, bill": f"{found.n_answered[1]:,}",
        "ledger, nano-dollars": f"**{found.nano_usd[0]:,}**",
        "bill, nano-dollars": f"**{found.nano_usd[1]:,}**",
        "in doubt, nano-dollars": f"{found.unseen_nano_usd[0]:,}",
        "unseen, nano-dollars": f"{found.unseen_nano_usd[1]:,}",
        "places where the key was found": str(n_keys),
    }


@contextlib.contextmanager
def overheard(path: Path) -> Iterator[None]:
    """All that is printed, and all that is logged by anybody at the most talkative level, goes to `path`."""
    saved = [(number, os.dup(number)) for number in (1, 2)]
    with path.open("w", buffering=1) as file:
        handler = logging.StreamHandler(file)
        logging.root.addHandler(handler)
        logging.root.setLevel(logging.DEBUG)
        for number, _ in saved:
            os.dup2(file.fileno(), number)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            logging.root.removeHandler(handler)
            logging.root.setLevel(logging.WARNING)
            for number, copy in saved:
                os.dup2(copy, number)
                os.close(copy)


def kill_table(folder: Path, n_kills: int, seed: int) -> Iterator[str]:
    """A line of `killed` for each concurrency."""
    columns = ("in flight at most", "kills", "during", "questions", "requests", "repeats", "entered", "in doubt")
    yield f"| {' | '.join(columns)} | ledger | bill | in doubt, µ$ |"
    yield "|---" * (len(columns) + 3) + "|"
    for concurrency in CONCURRENCIES:
        yield killed(folder / str(concurrency), concurrency, n_kills, seed)


def killed(folder: Path, concurrency: int, n_kills: int, seed: int) -> str:
    """The real command on a tiny model, killed at random moments and resumed to its end."""
    world, draw, kills = build(folder), random.Random(seed), list[Left]()
    options: dict[str, Any] = {"top": K, "concurrency": concurrency}
    with Serving(latency_s=0.03) as server:
        os.environ |= server.environment
        for i in range(n_kills):
            kills.append(kill(world, server, draw, early=i % round(1 / EARLY) == 0, **options))
        command = [sys.executable, "-m", "autointerp", *world.args(labeler=LABELER, **options)]
        subprocess.run(command, check=True, capture_output=True)
        books = assert_asked_once(world, server, kills)
    stages = Counter(left.stage for left in kills)
    usd = " | ".join(map(_micro, (books.usd, books.billed_usd, books.usd_in_doubt)))
    during = ", ".join(f"{n} {stage}" for stage, n in stages.items())
    return (
        f"| {concurrency} | {n_kills} | {during} | {books.n_answers} | {books.arrived} "
        f"| {books.repeats} | {books.n_in_flight} | {books.n_in_doubt} | {usd} |"
    )


def _micro(usd: float) -> str:
    return f"{1e6 * usd:.2f}"


HEAD = """# What faults do, and what they cost

The real SDKs against the loopback server of tests/faults; gpt-6-luna and claude-haiku-5-5 at their listed prices. Waits
between attempts are scaled down to 2–20 ms, deadlines to a few seconds.

- **ledger**: what `calls` holds as settled; **bill**: what the server charged for answers that went out whole, with
  their usage;
- **in doubt**: what `calls` holds, at its estimate, for calls whose answer was lost or came without usage; **unseen**:
  what the server charged for those.

Dollars are in millionths unless it says otherwise. The command fails unless ledger = bill, unseen ≤ in doubt, and each
question ends as it should after as many calls as it should. A full disk and a kill come between an answer and its
commit: there ledger ≤ bill ≤ ledger + in doubt."""

CALLS = """
## One question meets a fault

Once, or every time that it is asked. `python -m benchmarks.faults calls`"""

SCENES_HEAD = """
## More than one call

`python -m benchmarks.faults scenes`
"""

MIXTURE = """
## {n} latents through every fault at once

Labelled and scored (detection). Each fault is met by 5 % of the latents while they are labelled, and by 5 % while
their labels are scored; whom it meets is drawn. A provider that stops us is mended, and the same command goes on. The
key, which the server says in its errors, was looked for in all that was printed and logged (every logger at DEBUG), the
store's tables and bytes, the exports and `show`. A call that neither arrived nor was refused was lost on its way (its
connection had closed, or its time was over before it got one) and is in doubt.
`python -m benchmarks.faults mixture --latents {n} --seed {seed}`
"""

KILLS = """
## kill −9

`autointerp label --top {k} --concurrency …` in a process of its own on a tiny model, from nothing; killed
at random moments, every fifth time in its first six seconds, then resumed to its end. A repeat is a request that had
arrived before; entered are the calls on the ledger that were not settled at a kill: those in flight, and, with many
slots, up to a fifth as many that wait for one. What was committed was neither lost nor asked again.
`python -m benchmarks.faults kills --kills {n} --seed {seed}`
"""

SECTIONS = ("calls", "scenes", "mixture", "kills")


def section(name: str, folder: Path, args: argparse.Namespace) -> Iterator[str]:
    """The lines of one part of the file."""
    if name == "calls":
        yield CALLS
        yield from fault_tables(folder)
    elif name == "scenes":
        yield SCENES_HEAD
        yield from scene_table(folder)
    elif name == "mixture":
        yield MIXTURE.format(n=args.latents, seed=args.seed)
        yield from mixture_table(folder, args.latents, args.seed)
    else:
        yield KILLS.format(n=args.kills, k=K, seed=args.seed)
        yield from kill_table(folder, args.kills, args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", nargs="*", choices=[[], *SECTIONS], help="parts to make (default: all of them)")
    parser.add_argument("--latents", type=int, default=500)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    args = parser.parse_args()
    lines = [HEAD]
    for name in args.section or SECTIONS:
        with tempfile.TemporaryDirectory() as folder:
            lines += section(name, Path(folder), args)
    publish("\n".join(lines) + "\n", args.write)


if __name__ == "__main__":
    main()
