"""The budget, the limits, and what remains after an interruption or a crash."""

from __future__ import annotations

import asyncio
import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from autointerp.errors import BudgetError, InputError
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.faults import Interrupted
from autointerp.labeling.llm.limits import Limits
from autointerp.labeling.llm.prices import find_price
from autointerp.labeling.llm.provider import make_provider
from autointerp.store import Store, StoreError

from .harness import bench, question, says, start_child, word
from .server import Fault

GOOD = json.dumps({"word": "yes"})


@pytest.mark.parametrize("n_calls", [0.5, 3, 30])
def test_the_budget_is_never_exceeded_with_twenty_in_flight(tmp_path: Path, n_calls: float):
    async def run():
        async with bench(tmp_path / "measure", respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            estimate, one = b.calls()[0]["usd_estimated"], b.server.bill.usd
        cap = n_calls * estimate
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.003, concurrency=20, max_usd=cap) as b:
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(60)]
            results = await asyncio.gather(*asks, return_exceptions=True)
            n_good = sum(not isinstance(r, BaseException) for r in results)
            assert all(isinstance(r, BudgetError) for r in results if isinstance(r, BaseException))
            assert b.server.bill.usd <= cap
            assert n_good == len(b.server.requests) == len(b.calls())
            # Nor is it left unspent: what refuses a call is that its estimate no longer fits.
            assert n_good == 60 or b.server.bill.usd + estimate > cap
            assert n_good == min(60, int((cap - estimate) // one) + 1 if cap >= estimate else 0) or n_good == 60
            assert b.statuses() == ["ok"] * n_good

    (tmp_path / "measure").mkdir()
    asyncio.run(run())


def test_the_budget_counts_earlier_invocations_and_doubts(tmp_path: Path):
    async def run():
        async with bench(tmp_path, [Fault(body="")] * 3, respond=says(GOOD), run_id="one") as b:
            with pytest.raises(Exception, match="given up"):
                await b.engine.ask(question(), word, latent=0, purpose="label")
            in_doubt = b.engine.spend.usd_in_doubt
            assert in_doubt > 0
        async with bench(tmp_path, respond=says(GOOD), run_id="one", max_usd=in_doubt * 1.05) as b:
            with pytest.raises(BudgetError, match="larger --max-usd"):
                await b.engine.ask(question(), word, latent=0, purpose="label")
            assert b.server.requests == []
        async with bench(tmp_path, respond=says(GOOD), run_id="two", max_usd=in_doubt * 1.05) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")

    asyncio.run(run())


def test_calls_of_a_killed_process_are_in_doubt(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            lost = {"call_id": "lost", "run_id": "run", "status": "sent", "usd_estimated": 0.25}
            b.store.upsert("calls", [lost | {"started_at": datetime(2020, 1, 1)}]).result()
            await b.engine.ask(question(), word, latent=0, purpose="label")
            assert b.store.read("SELECT status FROM calls WHERE call_id = 'lost'") == [{"status": "in_doubt"}]
            assert b.engine.spend.usd_in_doubt == 0.25

    asyncio.run(run())


@pytest.mark.parametrize(("concurrency", "requests", "most_in_doubt"), [(4, 17, 4), (20, 45, 28), (20, 70, 28)])
def test_after_a_kill_only_what_was_in_flight_is_asked_again(
    tmp_path: Path, concurrency: int, requests: int, most_in_doubt: int
):
    """In doubt are the calls in flight, a fifth as many that were ready to go, and as many whose rows waited."""

    async def run():
        n = 2 * requests + 10
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.03) as b:
            b.store.close()
            child = await start_child(tmp_path, n, concurrency)
            while len(b.server.requests) < requests:
                await asyncio.sleep(0.001)
            child.kill()
            output, _ = await child.communicate()
            acknowledged = {int(line.split()[0]) for line in output.decode().splitlines()}
            before = len(b.server.requests)
            async with bench(tmp_path, server=b.server, concurrency=4) as again:
                asks = [again.engine.ask(question(i), word, latent=i, purpose="label") for i in range(n)]
                replies = await asyncio.gather(*asks)
                in_doubt = again.statuses().count("in_doubt")
            assert all(replies[i].stored for i in acknowledged)
            repeats = len(b.server.requests) - n
            assert 0 < before < n
            assert 0 <= repeats <= in_doubt <= most_in_doubt

    asyncio.run(run())


def test_a_store_that_fails_stops_the_spending(tmp_path: Path):
    class Full(Store):
        full = False

        def insert(self, table: str, rows: Any) -> Any:
            if self.full:
                raise StoreError("the disk is full")
            return super().insert(table, rows)

    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            b.store.__class__ = Full
            await b.engine.ask(question(), word, latent=0, purpose="label")
            b.store.full = True  # type: ignore[attr-defined]
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(1, 5)]
            assert {type(e) for e in await asyncio.gather(*asks, return_exceptions=True)} == {StoreError}
            assert len(b.server.requests) == 1

    asyncio.run(run())


def test_draining_finishes_what_is_in_flight_and_sends_no_more(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.05, concurrency=3) as b:
            await b.engine.ask(question(99), word, latent=99, purpose="label")
            asks = [asyncio.create_task(b.engine.ask(question(i), word, latent=i, purpose="label")) for i in range(10)]
            while len(b.server.requests) < 4:
                await asyncio.sleep(0.001)
            await b.engine.drain()
            results = await asyncio.gather(*asks, return_exceptions=True)
            assert [type(r).__name__ for r in results].count("Reply") == 3
            assert [type(r) for r in results].count(Interrupted) == 7
            assert len(b.server.requests) == 4
            assert b.statuses() == ["ok"] * 4
            assert len(b.store.read("SELECT * FROM answers")) == 4
            with pytest.raises(Interrupted):
                await b.engine.ask(question(50), word, latent=0, purpose="label")

    asyncio.run(run())


def test_a_caller_that_is_cancelled_does_not_lose_a_paid_answer(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.05) as b:
            asking = asyncio.create_task(b.engine.ask(question(), word, latent=0, purpose="label"))
            while not b.server.requests:
                await asyncio.sleep(0.001)
            asking.cancel()
            await b.engine.drain()
            assert len(b.store.read("SELECT * FROM answers")) == 1

    asyncio.run(run())


def test_a_wait_is_interrupted(tmp_path: Path):
    async def run():
        limits = Limits(rpm=1, tpm=None)
        async with bench(tmp_path, respond=says(GOOD), limits=limits) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            waiting = asyncio.create_task(b.engine.ask(question(1), word, latent=1, purpose="label"))
            await asyncio.sleep(0.02)
            began = time.monotonic()
            await b.engine.drain()
            assert time.monotonic() - began < 2
            with pytest.raises(Interrupted):
                await waiting

    asyncio.run(run())


def test_requests_per_minute_and_concurrency_are_kept(tmp_path: Path):
    async def run():
        limits = Limits(rpm=5, tpm=None, period_s=0.3)
        async with bench(tmp_path, respond=says(GOOD), limits=limits, concurrency=2, latency_s=0.01) as b:
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(12)]
            began = time.monotonic()
            await asyncio.gather(*asks)
            assert time.monotonic() - began >= 0.6, "12 requests are three periods of five"
            assert b.server.busiest <= 2

    asyncio.run(run())


def test_prices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    listed = find_price("claude-haiku-5-5-20261001")
    assert listed == find_price("claude-haiku-5-5")
    assert listed is not None
    assert listed.usd(1_000_000, 1_000_000, cached_tokens=1_000_000) == pytest.approx(0.51)
    assert find_price("my-own") is None
    own = tmp_path / "prices.json"
    own.write_text('{"models": {"my-own": {"input": 1, "output": 2}}}')
    assert find_price("my-own", own) is not None
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with pytest.raises(InputError, match="--prices"):
        make_provider("openai", "my-own", LabelingSettings("r", max_usd=1.0))
    make_provider("openai", "my-own", LabelingSettings("r", max_usd=1.0, prices_path=own))
    own.write_text('{"models": {"my-own": {"input": -1, "output": 2}}}')
    with pytest.raises(InputError, match="not understood"):
        find_price("my-own", own)


def test_a_model_without_a_price_has_no_dollars(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), model="my-own") as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            (call,) = b.calls()
            assert (call["usd"], call["usd_estimated"]) == (None, None)
            assert call["input_tokens"] == b.server.bill.input_tokens

    asyncio.run(run())
