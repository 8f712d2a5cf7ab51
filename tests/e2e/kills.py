"""The real command, killed with signal 9 at random moments, and what the books must say afterwards."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .serving import MODELS, Serving
from .world import World, read

LABELER = MODELS["openai"]
PATIENCE_S = 180.0
STARTING_S = 6.0
"""About what the command takes before it asks its first question."""
MOMENT_S = 0.05
MOST_REQUESTS = 18


@contextmanager
def labelling(world: World, **options: Any) -> Iterator[subprocess.Popen[str]]:
    """The command in a process of its own."""
    words = world.args(labeler=LABELER, **options)
    child = subprocess.Popen(
        [sys.executable, "-m", "autointerp", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def wait_until(reached: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not reached():
        assert time.monotonic() < deadline, f"never: {what}"
        time.sleep(0.002)


class Left(NamedTuple):
    """What stands in the store after a kill."""

    stage: str
    """What was under way: `starting` before it asked its first question, else `label`, `score` or `summary`."""
    answers: frozenset[str]
    """Digests of the questions whose answers are committed."""
    calls: frozenset[str]
    """All calls so far, by id."""
    in_flight: frozenset[str]
    """Those that were entered and never settled, at this kill or an earlier one."""


def left(world: World) -> Left:
    if not world.db.exists():
        return Left("starting", frozenset(), frozenset(), frozenset())
    answers = read(world.db, "SELECT request_sha256 AS id FROM answers")
    calls = read(world.db, "SELECT call_id AS id, purpose, status FROM calls ORDER BY started_at")
    in_flight = [call for call in calls if call["status"] in ("sent", "in_doubt")]
    stage = calls[-1]["purpose"] if calls else "starting"
    return Left(stage, *(frozenset(row["id"] for row in rows) for rows in (answers, calls, in_flight)))


def kill(world: World, server: Serving, draw: random.Random, early: bool, **options: Any) -> Left:
    """Starts the command and kills it some requests later, or while it starts if `early`, and a moment more."""
    n, latest_s = len(server.requests), draw.uniform(0, STARTING_S) if early else PATIENCE_S
    goal = n + draw.randrange(1, MOST_REQUESTS + 1)
    latest = time.monotonic() + latest_s
    with labelling(world, **options) as child:
        wait_until(
            lambda: len(server.requests) >= goal or child.poll() is not None or time.monotonic() > latest, "asked"
        )
        time.sleep(draw.uniform(0, MOMENT_S))
        assert child.poll() is None, "the command had come to its end"
        child.kill()
        child.communicate()
    found = left(world)
    return found if len(server.requests) > n else found._replace(stage="starting")


class Books(NamedTuple):
    """After the last resume."""

    arrived: int
    repeats: int
    """Requests that had arrived before."""
    n_in_flight: int
    """Calls under way at the kills."""
    n_in_doubt: int
    """Calls that the ledger holds in doubt."""
    n_answers: int
    usd: float
    usd_in_doubt: float
    billed_usd: float


def assert_asked_once(world: World, server: Serving, kills: list[Left]) -> Books:
    """What was committed was never lost nor asked again; what is in doubt was under way at a kill, and nothing else."""
    calls = read(world.db, "SELECT * FROM calls")
    in_doubt = {call["call_id"] for call in calls if call["status"] == "in_doubt"}
    in_flight = frozenset[str]().union(*(kill.in_flight for kill in kills))
    answers = left(world).answers
    for earlier, later in zip(kills, [*kills[1:], left(world)], strict=True):
        assert earlier.answers <= later.answers, "nothing that was committed is lost"
        asked_since = {call["request_sha256"] for call in calls if call["call_id"] not in earlier.calls}
        assert not earlier.answers & asked_since, "nor asked for again"
    assert {call["status"] for call in calls} <= {"ok", "in_doubt"}
    paid = [call["request_sha256"] for call in calls if call["status"] == "ok"]
    assert len(paid) == len(set(paid)), "each answer that was committed was asked for once"
    assert set(paid) <= answers
    assert in_doubt == in_flight, "in doubt is what was under way, and nothing else"
    assert server.repeats() <= len(in_doubt)
    usd = sum(call["usd"] or 0.0 for call in calls)
    usd_in_doubt = sum(call["usd_estimated"] for call in calls if call["usd"] is None)
    billed_usd = server.server.bill.usd
    assert usd <= billed_usd + 1e-12
    assert billed_usd <= usd + usd_in_doubt + 1e-12, "what the kills lost is covered by what is in doubt"
    n_requests, repeats = len(server.requests), server.repeats()
    return Books(n_requests, repeats, len(in_flight), len(in_doubt), len(answers), usd, usd_in_doubt, billed_usd)
