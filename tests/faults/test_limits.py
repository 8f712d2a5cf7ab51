"""Tokens per minute, and the number of calls in flight that adapts."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from autointerp.errors import ProviderError
from autointerp.labeling.llm.concurrency import ALONE_S, CUT, FIRST, Slots
from autointerp.labeling.llm.faults import Interrupted
from autointerp.labeling.llm.limits import Limits, TokenWindow
from autointerp.labeling.llm.sending import Retries

from .harness import bench, question, says, word
from .server import Fault, error

GOOD = json.dumps({"word": "yes"})


def test_no_window_of_any_length_holds_more_than_the_limit(monkeypatch: pytest.MonkeyPatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    draw, window = random.Random(0), TokenWindow(100, 60.0)
    sent: list[list[float]] = []
    while clock[0] < 1600:
        tokens = draw.randrange(1, 60)
        while (wait_s := window.wait_s(tokens)) > 0:
            clock[0] += wait_s
        share = window.take(tokens)
        used = draw.randrange(0, tokens + 1)
        window.settle(share, used)
        sent.append([clock[0], used])
        clock[0] += draw.random()
    for start, _ in sent:
        assert sum(n for at, n in sent if start <= at < start + 59.999) <= 100
    # Nor is it left unused: it is what is settled that counts, not what was set aside.
    assert sum(n for _, n in sent) > 0.7 * 100 * 10


def test_input_and_output_have_limits_of_their_own_and_a_large_question_still_goes():
    async def run(limits: Limits, *calls: tuple[int, int], settled: tuple[int, int] | None = None) -> float:
        began = time.monotonic()
        for read, wrote in calls:
            grant = await limits.admit_tokens(read, wrote)
            if settled:
                limits.settle(grant, *settled)
        return time.monotonic() - began

    def timed(*calls: tuple[int, int], settled: tuple[int, int] | None = None, **limits: int) -> float:
        return asyncio.run(run(Limits(**limits, period_s=0.3), *calls, settled=settled))  # type: ignore[arg-type]

    assert timed((100, 5), (900, 5), itpm=100) >= 0.3, "above the whole limit: alone in its window"
    assert timed((100, 5), (100, 5), otpm=10) < 0.2
    assert timed((5, 100), (5, 100), otpm=100, itpm=100) >= 0.3
    assert timed((50, 50), (5, 5), tpm=100) >= 0.3
    assert timed((100, 50), (100, 50), (100, 50), itpm=125, settled=(10, 5)) < 0.2, "settled for less"


def test_it_is_the_sending_that_counts_not_the_leave():
    """What is sent long after it was granted leaves less room for so much longer, even a whole period after."""

    async def run(limits: Limits, late_s: float) -> float:
        grant = await limits.admit_tokens(100, 0)
        await asyncio.sleep(late_s)
        limits.sent(grant)
        began = time.monotonic()
        limits.sent(await limits.admit_tokens(100, 0))
        return time.monotonic() - began

    for limit in ({"rpm": 1}, {"tpm": 100}):
        for late_s in (0.2, 0.4):
            assert asyncio.run(run(Limits(**limit, period_s=0.3), late_s)) >= 0.3


def test_what_a_question_takes_is_learnt_from_the_answers(tmp_path: Path):
    async def run():
        # The server counts 1 token per 4 bytes and adds no schema; we begin at 1 per 3 bytes of all that is sent.
        limits = Limits(itpm=100_000)
        async with bench(tmp_path, respond=says(GOOD), limits=limits, concurrency=1) as b:
            reserved = []
            for i in range(12):
                before = limits._windows["input"]._sum
                grant = await limits.admit(question(i))
                reserved.append(grant.shares["input"].tokens)
                limits.settle(grant, 0, 0)
                assert limits._windows["input"]._sum == before
                await b.engine.ask(question(i), word, latent=i, purpose="label")
            used = b.calls()[-1]["input_tokens"]
            assert abs(reserved[-1] - used) < 0.5 * abs(reserved[0] - used)
            assert reserved[-1] >= used
            assert limits._windows["input"]._sum == b.server.bill.input_tokens

    asyncio.run(run())


def test_one_goes_alone_and_then_the_number_doubles_while_nobody_objects():
    async def run():
        slots = Slots(100, ramp_s=0.01)
        waiting = [asyncio.create_task(slots.acquire()) for _ in range(200)]
        await asyncio.sleep(0.05)
        assert slots.in_use == 1, "not before the provider has taken one"
        slots.proven()
        await asyncio.sleep(0)
        assert slots.in_use == FIRST
        await asyncio.sleep(0.1)
        assert (slots.in_use, slots.limit) == (100, 100)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert slots.in_use == 100

    asyncio.run(run())


def test_who_is_not_refused_for_a_while_is_alone_no_longer():
    async def run():
        slots = Slots(100, ramp_s=10, alone_s=0.05)
        waiting = [asyncio.create_task(slots.acquire()) for _ in range(20)]
        await asyncio.sleep(0.1)
        assert slots.in_use == 1, "it is the sending that begins the while"
        slots.sent()
        slots.release()  # an answer that says nothing yet of all others: the next is alone, too
        await asyncio.sleep(0.1)
        assert slots.in_use == 1
        slots.sent()
        await asyncio.sleep(0.1)
        assert slots.in_use == FIRST
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(run())


def test_a_wrong_key_costs_one_call_though_the_refusal_takes_its_time(tmp_path: Path):
    async def run():
        async with bench(tmp_path, [replace(error(401, "no such key"), delay_s=0.05)], concurrency=20) as b:
            asks = (b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(40))
            found = await asyncio.gather(*asks, return_exceptions=True)
            assert {type(error) for error in found} == {ProviderError}
            assert len(b.server.requests) == len(b.calls()) == 1

    asyncio.run(run())


def test_no_more_than_a_moment_is_lost_until_the_first_slow_answer(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), latency_s=2.0, concurrency=20) as b:
            asks = (b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(20))
            await asyncio.gather(*asks)
            first, second, *_, last = sorted(at for at, _ in b.server.arrivals)
            assert second - first >= 0.8 * ALONE_S
            assert last - first < 2.0

    asyncio.run(run())


def test_a_few_calls_are_ready_before_there_is_a_slot_and_leave_no_trace_when_none_comes(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), latency_s=2.0, concurrency=10) as b:
            asks = [asyncio.create_task(b.engine.ask(question(i), word, latent=i, purpose="label")) for i in range(40)]
            while len(b.calls()) < 12:
                await asyncio.sleep(0.05)
            await asyncio.sleep(0.2)
            assert b.statuses() == ["sent"] * 12, "two more than may be in flight"
            assert len(b.server.requests) == 10
            await b.engine.drain()
            found = await asyncio.gather(*asks, return_exceptions=True)
            assert [type(reply) for reply in found].count(Interrupted) == 30
            assert b.statuses() == ["ok"] * len(b.server.requests) == ["ok"] * 10
            assert b.engine.spend.calls == 10
            assert not b.engine._ledger._reserved

    asyncio.run(run())


def test_a_call_that_was_ready_waits_for_the_end_of_a_pause(tmp_path: Path):
    async def run():
        def limited() -> Fault | None:
            if len(b.server.requests) != 11:
                return None
            refused.append(time.monotonic())
            return error(429, "slow down", retry_after="1")

        refused: list[float] = []
        retries = Retries(longest_wait_s=2.0)
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.2, concurrency=10, retries=retries) as b:
            b.server.choose = limited
            await asyncio.gather(*(b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(30)))
            known = refused[0] + 0.4  # its own latency, and a moment
            assert not [at for at, _ in b.server.arrivals if known < at < refused[0] + 1.0]
            assert b.statuses().count("error") == 1

    asyncio.run(run())


def test_a_429_cuts_once_for_all_that_were_in_flight_and_growth_follows_clean_full_rounds():
    async def run():
        slots = Slots(1000, ramp_s=10)
        slots.proven()
        slots.limit = 100.0
        since = [await slots.acquire() for _ in range(100)]
        for sent in since[:30]:
            slots.limited(sent)
            slots.release()
        assert slots.limit == 100 * CUT, "thirty refusals of one burst are one cut"
        sent = await slots.acquire()
        slots.limited(sent)
        slots.release()
        assert slots.limit == 100 * CUT * CUT, "one that was sent after the cut is another"

        async def round_of_answers(n: int) -> None:
            for _ in range(n):
                await slots.acquire()
                slots.answered()
                slots.release()

        while slots.in_use:
            slots.release()
        await round_of_answers(192)
        assert slots.limit == 64, "never full: no reason to grow"
        queue = [asyncio.create_task(slots.acquire()) for _ in range(70)]
        await asyncio.sleep(0)
        for _ in range(63):
            slots.answered()
        slots.troubled()
        slots.answered()
        assert slots.limit == 64, "not a clean round"
        for _ in range(63):
            slots.answered()
        assert slots.limit == pytest.approx(64 * 1.05)
        await asyncio.gather(*queue[:67])
        for task in queue:
            task.cancel()

    asyncio.run(run())


def test_a_server_error_stops_the_slow_start_until_the_next_good_answer():
    async def run():
        slots = Slots(64, ramp_s=0.005)
        queue = [asyncio.create_task(slots.acquire()) for _ in range(64)]
        slots.proven()
        slots.troubled()
        await asyncio.sleep(0.05)
        assert slots.in_use == FIRST
        slots.answered()
        await asyncio.sleep(0.05)
        assert slots.in_use == 64
        await asyncio.gather(*queue)

    asyncio.run(run())


def test_a_cancelled_wait_gives_its_turn_to_the_next():
    async def run():
        slots = Slots(1)
        await slots.acquire()
        first, second = (asyncio.create_task(slots.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        slots.release()  # hands over to the first, which does not know yet
        first.cancel()
        await asyncio.wait_for(second, 1)
        assert slots.in_use == 1
        third, fourth = (asyncio.create_task(slots.acquire()) for _ in range(2))
        await asyncio.sleep(0)
        third.cancel()
        slots.release()  # passes over the third, which does not know yet
        await asyncio.wait_for(fourth, 1)
        assert (await asyncio.gather(third, return_exceptions=True))[0].__class__ is asyncio.CancelledError
        assert slots.in_use == 1

    asyncio.run(run())


def test_a_server_with_room_for_few_is_found_out(tmp_path: Path):
    """A server that refuses what exceeds 6 in flight: few refusals, all answered."""

    async def run():
        def refuse() -> Fault | None:
            return error(429, "too many", retry_after_ms="1") if b.server.busy > 6 else None

        retries = Retries(first_wait_s=0.002, longest_wait_s=0.01)
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.03, concurrency=64, retries=retries) as b:
            b.server.choose = refuse
            b.engine.slots._ramp_s = 1.0  # refusals come back before the next doubling, on a busy machine too
            asks = (b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(120))
            assert {reply.value for reply in await asyncio.gather(*asks)} == {"yes"}
            assert 6 <= b.engine.slots.limit <= 16
            refused = b.statuses().count("error")
            assert 0 < refused < 120
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)

    asyncio.run(run())
