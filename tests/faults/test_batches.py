"""Batches: half the price, every line accounted for, nothing lost by a crash at any moment."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autointerp.errors import BudgetError, ProviderError
from autointerp.labeling.base import LabelingSettings, make_scorer
from autointerp.labeling.labelers.llm import LLMLabeler
from autointerp.labeling.llm.anthropic import CACHEABLE_BYTES
from autointerp.labeling.llm.batch_api import BatchApi
from autointerp.labeling.llm.batch_sending import BatchSender
from autointerp.labeling.llm.faults import Interrupted, Terminal

from .harness import KEY, SOON, Bench, bench, question, says, word
from .oracle import PHRASES, oracle, planted, yes_sayer
from .server import Fault, FaultServer, error

GOOD = json.dumps({"word": "yes"})
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "anthropic"])


async def ask_all(b: Bench, n: int) -> list[Any]:
    asks = (b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(n))
    return await asyncio.gather(*asks, return_exceptions=True)


async def ask_in_one(b: Bench, n: int) -> list[asyncio.Task[Any]]:
    """The questions on their way in one batch, or answered already: also on a machine so busy that they would else come
    too far apart for that."""
    sender = b.engine._sender
    assert isinstance(sender, BatchSender)
    with b.engine.hold():
        tasks = [asyncio.create_task(b.engine.ask(question(i), word, latent=i, purpose="label")) for i in range(n)]
        while len(sender._open) + sum(task.done() for task in tasks) < n:
            await asyncio.sleep(0.001)
    return tasks


def creations(server: FaultServer) -> int:
    return sum(operation in ("POST /v1/batches", "POST /v1/messages/batches") for operation in server.desk.operations)


def assert_on_the_bill(b: Bench) -> None:
    assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)
    (total,) = b.store.read("SELECT sum(usd) AS usd FROM calls")
    assert total["usd"] == pytest.approx(b.server.bill.usd, abs=1e-12)


@PROVIDERS
def test_one_batch_at_half_the_price(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD), cached_tokens=2, batch=True) as b:
            replies = await ask_all(b, 20)
            assert [reply.value for reply in replies] == ["yes"] * 20
            assert creations(b.server) == 1
            assert b.statuses() == ["ok"] * 20
            full = b.server.bill.input_tokens, b.server.bill.output_tokens, b.server.bill.cached_tokens
            price = b.engine.provider.price
            assert price is not None
            assert b.server.bill.usd == pytest.approx(price.usd(*full) / 2)
            assert_on_the_bill(b)
            assert {row["latent"] for row in b.calls()} == set(range(20))
            (batch,) = b.store.read("SELECT * FROM batches")
            assert (batch["status"], batch["n_calls"]) == ("ended", 20)
            assert {row["batch_key"] for row in b.calls()} == {batch["batch_key"]}
            assert [reply.stored for reply in await ask_all(b, 20)] == [True] * 20
            assert creations(b.server) == 1

    asyncio.run(run())


def test_a_batch_does_not_pay_for_writing_a_cache(tmp_path: Path):
    async def run():
        async with bench(tmp_path, provider="anthropic", respond=says(GOOD), batch=True) as b:
            long = replace(question(), system="x" * CACHEABLE_BYTES)
            await b.engine.ask(long, word, latent=0, purpose="label")
            (sent,) = b.server.requests
            assert sent["system"] == long.system

    asyncio.run(run())


def test_batches_of_the_responses_api(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), batch=True, api="responses") as b:
            assert [reply.value for reply in await ask_all(b, 3)] == ["yes"] * 3
            assert {request["path"] for request in b.server.requests} == {"/v1/responses"}
            assert_on_the_bill(b)

    asyncio.run(run())


def test_questions_that_trickle_in_make_one_batch_while_more_are_sure_to_come(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), batch=True) as b:
            with b.engine.hold():
                asks = []
                for i in range(4):
                    asks.append(asyncio.create_task(b.engine.ask(question(i), word, latent=i, purpose="label")))
                    await asyncio.sleep(2 * SOON.linger_s)
                assert creations(b.server) == 0
            await asyncio.gather(*asks)
            assert creations(b.server) == 1

    asyncio.run(run())


N_LATENTS = 20


def test_a_run_of_many_latents_and_scorers_makes_few_batches(tmp_path: Path):
    """Labels are one; all scorers share two, also where nothing is decided before the last example."""
    settings = LabelingSettings("run", batch=True)
    latents = [replace(planted(j % len(PHRASES), seed=j), latent=j) for j in range(N_LATENTS)]

    def judge(system: str, user: str) -> str:
        """An oracle that is wrong every other time: no score is decided soon."""
        coin = random.Random(user).random() < 0.5
        return (oracle if coin or '"explanation"' in system else yes_sayer)(system, user)

    async def run():
        async with bench(tmp_path, respond=judge, batch=True, patience=replace(SOON, linger_s=0.3)) as b:
            labeler = LLMLabeler(b.engine, settings)
            labels = await asyncio.gather(*(labeler.label(evidence) for evidence in latents))
            assert {label.status for label in labels} == {"ok"}
            assert creations(b.server) == 1
            names = ("detection", "fuzzing", "contrast", "intruder")
            scorers = [make_scorer(name, labeler, settings) for name in names]
            tasks = [
                scorer.score(evidence, label, labels[j - 1])
                for scorer in scorers
                for j, (evidence, label) in enumerate(zip(latents, labels, strict=True))
            ]
            scores = await asyncio.gather(*tasks)
            assert creations(b.server) == 3
            assert {score.n_missing for score in scores} == {0}
            n_examples = {score.n_examples for score in scores if score.scorer == "detection"}
            assert n_examples == {20, 40}, "some are decided after the first half, some are not"
            assert_on_the_bill(b)

    asyncio.run(run())


@PROVIDERS
def test_every_line_that_goes_wrong_is_finished(tmp_path: Path, provider: str):
    """Out of order always; here also missing, twice, expired, refused, wrong, cut off and unreadable lines."""

    async def run():
        plan = [
            Fault(breaks="expire"),
            Fault(breaks="lose"),
            Fault(breaks="twice"),
            error(400, "no such thing", kind="invalid_request_error"),
            error(500, "oops", kind="api_error"),
            Fault(text="I would rather not", finish="refusal"),
            Fault(text='{"word": 3}'),
            Fault(text='{"wor', finish="length"),
            Fault(body='{"error": {"message": "oops"}}'),
            Fault(usage=False),
        ]
        async with bench(tmp_path, plan, provider=provider, respond=says(GOOD), batch=True) as b:
            replies = await ask_all(b, 14)
            failed = {i: r for i, r in enumerate(replies) if isinstance(r, BaseException)}
            assert {type(fault) for fault in failed.values()} == {Terminal}
            assert sorted(getattr(fault, "status", "") for fault in failed.values()) == ["failed", "refused"]
            assert all(reply.value == "yes" for reply in replies if not isinstance(reply, BaseException))
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)
            assert creations(b.server) == 2, "what was left went into one more batch"
            doubts = [call for call in b.calls() if call["usd"] is None]
            assert sorted(call["status"] for call in doubts) == ["in_doubt", "in_doubt", "ok"]
            assert b.engine.spend.usd_in_doubt == pytest.approx(sum(call["usd_estimated"] for call in doubts))
            statuses = {call["status"] for call in b.calls()}
            assert "sent" not in statuses
            assert KEY not in str(b.calls())

    asyncio.run(run())


@PROVIDERS
def test_a_line_that_always_expires_fails_alone(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD), batch=True) as b:
            b.server.choose = lambda: Fault(breaks="expire")
            (reply,) = await ask_all(b, 1)
            assert isinstance(reply, Terminal)
            assert "given up after 3 attempts" in str(reply)
            assert b.engine.spend.usd == b.engine.spend.usd_in_doubt == 0

    asyncio.run(run())


@PROVIDERS
def test_a_wrong_key_costs_one_call(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, batch=True) as b:
            b.server.batch_plan.append(error(401, f"Incorrect API key {KEY}", kind="authentication_error"))
            replies = await ask_all(b, 5)
            assert {type(reply) for reply in replies} == {ProviderError}
            assert len(b.server.keys) == 1
            assert {call["usd"] for call in b.calls()} == {0.0}
            assert KEY not in str(replies) + str(b.calls())

    asyncio.run(run())


def test_a_batch_refused_for_its_size_is_cut_and_one_refused_otherwise_fails(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), batch=True) as b:
            b.server.desk.fails = ["Enqueued token limit reached for gpt-6-luna"]
            assert [reply.value for reply in await ask_all(b, 6)] == ["yes"] * 6
            assert sorted(len(job.lines) for job in b.server.desk.jobs.values()) == [3, 3, 6]
            b.server.desk.fails = ["The file is not valid JSONL"]
            with pytest.raises(Terminal, match="not valid JSONL"):
                await b.engine.ask(question(99), word, latent=0, purpose="label")
            assert_on_the_bill(b)

    asyncio.run(run())


@PROVIDERS
def test_polls_and_downloads_are_repeated_the_creation_is_not(tmp_path: Path, provider: str):
    """Whether a creation that was cut off went through shows in the provider's list."""

    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD), batch=True) as b:
            uploads = [None] if provider == "openai" else []
            b.server.batch_plan.extend([*uploads, Fault(breaks="reset"), error(503, "busy"), None, error(500, "oops")])
            assert [reply.value for reply in await ask_all(b, 4)] == ["yes"] * 4
            assert creations(b.server) == 1
            assert_on_the_bill(b)

    asyncio.run(run())


@PROVIDERS
def test_the_budget_holds_with_a_batch_under_way(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD), batch=True) as b:
            await ask_all(b, 1)
            estimate = b.calls()[0]["usd_estimated"]
        (tmp_path / "capped").mkdir()
        cap = 5.5 * estimate
        async with bench(tmp_path / "capped", provider=provider, respond=says(GOOD), batch=True, max_usd=cap) as b:
            replies = await ask_all(b, 30)
            good = [reply for reply in replies if not isinstance(reply, BaseException)]
            assert {type(reply) for reply in replies if isinstance(reply, BaseException)} <= {BudgetError}
            assert 5 <= len(good) == b.server.bill.calls
            assert b.server.bill.usd <= cap
            assert_on_the_bill(b)

    asyncio.run(run())


async def crash(folder: Path, provider: str, moment: str, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that ends as a killed process does at `moment`: nothing of what comes after it is done."""

    class KilledError(BaseException):
        pass

    async with bench(folder, provider=provider, respond=says(GOOD), batch=True, server=server) as b:
        batches, api = b.engine._batches, b.engine._batches.api
        create, reached = api.create, asyncio.Event()

        async def killed(*_: Any) -> Any:
            reached.set()
            raise KilledError

        async def created_and_killed(*args: Any) -> str:
            await create(*args)
            return await killed()

        if moment == "before it is created":
            monkeypatch.setattr(api, "create", killed)
        elif moment == "between create and save":
            monkeypatch.setattr(api, "create", created_and_killed)
        elif moment == "while it is waited for":
            monkeypatch.setattr(api, "ended", killed)
        else:
            monkeypatch.setattr(batches, "_settle", killed)
        tasks = await ask_in_one(b, 5)
        await asyncio.wait_for(reached.wait(), 30)
        await asyncio.sleep(0.05)
        for task in tasks:
            task.cancel()
        b.store.flush()
        assert {call["status"] for call in b.calls()} == {"sent"}
        b.engine.stopping.set()


MOMENTS = ["before it is created", "between create and save", "while it is waited for", "before it is settled"]


@PROVIDERS
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_batch_outlives_its_process(tmp_path: Path, provider: str, moment: str, monkeypatch: pytest.MonkeyPatch):
    async def run():
        async with FaultServer(says(GOOD)) as server:
            server.desk.jobs |= {}
            with monkeypatch.context() as patched:
                await crash(tmp_path, provider, moment, server, patched)
            n = creations(server)
            assert n == (0 if moment == "before it is created" else 1)
            async with bench(tmp_path, provider=provider, server=server, batch=True, run_id="run") as b:
                replies = await asyncio.gather(*await ask_in_one(b, 5))
                assert [reply.value for reply in replies] == ["yes"] * 5
                assert creations(server) == 1, "adopted, not paid for again"
                assert {reply.stored for reply in replies} == {bool(n)}
                assert server.bill.calls == 5
                assert b.engine.spend.usd_in_doubt == pytest.approx(0, abs=1e-12)
                assert b.engine.spend.calls == len(b.calls())
                assert_on_the_bill(b)
                statuses = [batch["status"] for batch in b.store.read("SELECT status FROM batches ORDER BY created_at")]
                assert statuses == (["ended"] if n else ["lost", "ended"])

    asyncio.run(run())


@PROVIDERS
def test_without_batch_mode_a_finished_batch_is_fetched_and_one_under_way_is_left(tmp_path: Path, provider: str):
    async def run():
        async with FaultServer(says(GOOD)) as server:
            server.desk.delay_s = 3600
            async with bench(tmp_path, provider=provider, server=server, batch=True) as b:
                asks = [asyncio.create_task(ask_all(b, 3))]
                while not server.desk.jobs or not b.store.read("SELECT 1 FROM batches WHERE status = 'submitted'"):
                    await asyncio.sleep(0.005)
                await b.engine.aclose()
                assert {type(reply) for reply in (await asks[0])} == {Interrupted}
            async with bench(tmp_path, provider=provider, server=server) as b:
                await b.engine.ask(question(7), word, latent=7, purpose="label")
                assert sorted(b.statuses()) == ["ok", "sent", "sent", "sent"]
                assert b.engine.spend.usd_in_doubt == pytest.approx(3 * min(c["usd_estimated"] for c in b.calls()))
            server.desk.delay_s = 0.0
            async with bench(tmp_path, provider=provider, server=server) as b:
                assert [reply.stored for reply in await ask_all(b, 3)] == [True] * 3
                assert b.statuses() == ["ok"] * 4
                assert b.engine.spend.usd_in_doubt == pytest.approx(0, abs=1e-12)
                assert_on_the_bill(b)

    asyncio.run(run())


def test_the_batches_of_others_are_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Anthropic's list has no mark of ours: a batch of the same size by somebody else is read and put back."""

    async def run():
        async with FaultServer(says(GOOD)) as server:
            (tmp_path / "other").mkdir()
            async with bench(tmp_path / "other", provider="anthropic", server=server, batch=True) as other:
                await ask_all(other, 5)
            with monkeypatch.context() as patched:
                await crash(tmp_path, "anthropic", "before it is created", server, patched)
            async with bench(tmp_path, provider="anthropic", server=server, batch=True, run_id="run") as b:
                api: BatchApi = b.engine._batches.api
                assert api.most > 5
                assert [reply.value for reply in await ask_all(b, 5)] == ["yes"] * 5
                assert creations(server) == 2
                assert [row["status"] for row in b.store.read("SELECT status FROM batches ORDER BY created_at")] == [
                    "lost",
                    "ended",
                ]

    asyncio.run(run())
