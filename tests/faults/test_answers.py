"""Good answers, in both protocols: asked once, understood, and on the ledger as on the server's bill."""

from __future__ import annotations

import asyncio
import gc
import json
from pathlib import Path

import pytest

from autointerp.labeling.llm.faults import Terminal
from autointerp.labeling.llm.openai import OpenAIProvider

from .harness import KEY, MODELS, bench, question, says, start_child, word
from .server import Fault, error

GOOD = json.dumps({"word": "yes"})


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_the_ledger_equals_the_bill(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD), cached_tokens=3, concurrency=4) as b:
            replies = await asyncio.gather(
                *(b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(6))
            )
            assert [reply.value for reply in replies] == ["yes"] * 6
            assert not any(reply.salvaged or reply.stored for reply in replies)
            bill, spend, rows = b.server.bill, b.engine.spend, b.calls()
            assert b.statuses() == ["ok"] * 6
            for name in ("input_tokens", "cached_tokens", "output_tokens"):
                assert sum(row[name] for row in rows) == getattr(bill, name) == getattr(spend, name)
            assert sum(row["usd"] for row in rows) == pytest.approx(bill.usd, abs=1e-12)
            assert spend.usd == pytest.approx(bill.usd, abs=1e-12)
            assert bill.cached_tokens > 0
            assert all(row["usd"] <= row["usd_estimated"] for row in rows)
            assert {row["latent"] for row in rows} == set(range(6))
            assert {(row["provider"], row["model"], row["purpose"]) for row in rows} == {
                (provider, MODELS[provider], "label")
            }
            assert all(KEY in key for key in b.server.keys)

    asyncio.run(run())


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_the_schema_and_the_cap_are_sent(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            (sent,) = b.server.requests
            assert sent["max_tokens"] == 50
            form = sent["response_format"]["json_schema"] if provider == "openai" else sent["output_config"]["format"]
            assert form["schema"] == question().schema

    asyncio.run(run())


def test_what_openai_itself_is_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    provider = OpenAIProvider("gpt-6-luna", KEY, None, 1.0)
    body = provider.body(question())
    assert (body["max_completion_tokens"], body["reasoning_effort"]) == (50, "none")
    assert body["prompt_cache_key"] == "autointerp-hash"
    provider.adapt("reasoning_effort")
    assert provider.body(question())["reasoning_effort"] == "low", "as little thought as the model lets us"
    provider.adapt("reasoning_effort")
    provider.adapt("max_completion_tokens")
    provider.adapt("max_completion_tokens")  # a second refusal of a question that was already on its way
    body = provider.body(question())
    assert (body["max_tokens"], "reasoning_effort" in body) == (50, False)


def test_identical_questions_in_flight_share_one_call(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), latency_s=0.02) as b:
            asks = [b.engine.ask(question(), word, latent=i, purpose="label") for i in range(10)]
            assert {reply.value for reply in await asyncio.gather(*asks)} == {"yes"}
            assert len(b.server.requests) == 1

    asyncio.run(run())


def test_an_answer_is_never_paid_for_again(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as first:
            await first.engine.ask(question(), word, latent=0, purpose="label")
            server = first.server
            await first.engine.aclose()
            first.store.close()
            async with bench(tmp_path, server=server, run_id="another run") as second:
                reply = await second.engine.ask(question(), word, latent=0, purpose="label")
                assert reply.stored
                assert reply.value == "yes"
                await second.engine.ask(question(1), word, latent=0, purpose="label")
            assert [r["messages"][-1]["content"] for r in server.requests] == ["Question 0", "Question 1"]

    asyncio.run(run())


def test_nor_by_another_process(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            b.store.close()
            child = await start_child(tmp_path, n=1)
            output, _ = await child.communicate()
            assert output.decode().split() == ["0", "yes", "True"]
            assert len(b.server.requests) == 1

    asyncio.run(run())


def test_prose_around_the_json_is_salvaged(tmp_path: Path):
    async def run():
        text = '<think>{"word": 3}</think>Sure! ```json\n{"word": "yes"}\n``` I hope this {helps}.'
        async with bench(tmp_path, respond=says(text)) as b:
            reply = await b.engine.ask(question(), word, latent=0, purpose="label")
            assert (reply.value, reply.salvaged) == ("yes", True)
            assert len(b.server.requests) == 1

    asyncio.run(run())


def test_an_answer_that_does_not_fit_is_repaired_once(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            for i, bad in enumerate(['{"word": 3}', "I would rather not say.", '{"word": "ye', '["yes"]']):
                b.server.plan.append(Fault(text=bad))
                reply = await b.engine.ask(question(i), word, latent=i, purpose="label")
                assert reply.value == "yes"
                roles = [message["role"] for message in b.server.requests[-1]["messages"]]
                assert roles == ["system", "user", "assistant", "user"]
                assert len(b.server.requests) == 2 * (i + 1)
                assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)
                assert (await b.engine.ask(question(i), word, latent=i, purpose="label")).stored
            assert b.statuses() == ["ok"] * 8

    asyncio.run(run())


def test_a_second_misfit_fails_the_question_and_is_no_answer(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says('{"world": "yes"}')) as b:
            with pytest.raises(Terminal, match="'word' must be a string") as failed:
                await b.engine.ask(question(), word, latent=0, purpose="label")
            assert failed.value.status == "failed"
            assert len(b.server.requests) == 2
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)
            assert b.store.read("SELECT * FROM answers") == []

    asyncio.run(run())


def test_an_answer_cut_off_is_asked_once_more_with_room(tmp_path: Path):
    async def run():
        cut = Fault(text='{"word": "y', finish="length")
        async with bench(tmp_path, [cut], respond=says(GOOD)) as b:
            assert (await b.engine.ask(question(), word, latent=0, purpose="label")).value == "yes"
            assert [r["max_tokens"] for r in b.server.requests] == [50, 200]
            await b.engine.ask(question(1), word, latent=0, purpose="label")
            assert b.server.requests[-1]["max_tokens"] == 200, "learnt: not paid for twice again"
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)

    asyncio.run(run())


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
@pytest.mark.parametrize("finish", ["refusal", "filter"])
def test_a_refusal_is_terminal_and_paid_for_once(tmp_path: Path, provider: str, finish: str):
    async def run():
        refusal = Fault(text="I cannot help with that.", finish=finish)
        async with bench(tmp_path, [refusal, refusal], provider=provider, respond=says(GOOD)) as b:
            for _ in range(2):
                with pytest.raises(Terminal) as refused:
                    await b.engine.ask(question(), word, latent=0, purpose="label")
                assert refused.value.status == "refused"
            assert len(b.server.requests) == 1
            assert b.statuses() == ["refused"]
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)

    asyncio.run(run())


def test_an_answer_without_usage_counts_at_its_estimate(tmp_path: Path):
    async def run():
        async with bench(tmp_path, [Fault(usage=False)], respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            (call,) = b.calls()
            assert (call["status"], call["input_tokens"], call["usd"]) == ("ok", None, None)
            assert b.engine.spend.usd_in_doubt == call["usd_estimated"] > 0

    asyncio.run(run())


@pytest.mark.parametrize(
    ("provider", "parameter", "where"),
    [("openai", "response_format", "response_format"), ("anthropic", "output_config.format", "output_config")],
)
def test_a_server_without_structured_output_is_remembered(tmp_path: Path, provider: str, parameter: str, where: str):
    async def run():
        plan = [error(400, f"{parameter}: extra inputs are not permitted")]
        async with bench(tmp_path, plan, provider=provider, respond=says(GOOD), concurrency=3) as b:
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(3)]
            await asyncio.gather(*asks)
            assert [where in request for request in b.server.requests] == [True, False, False, False]
            assert sorted(b.statuses()) == ["error", "ok", "ok", "ok"]

    asyncio.run(run())


def test_what_is_loaded_is_not_looked_through_for_garbage_while_an_engine_is_open(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            assert gc.get_freeze_count() == 0
            await b.engine.ask(question(), word, latent=0, purpose="label")
            assert gc.get_freeze_count() > 10_000
        assert gc.get_freeze_count() == 0

    asyncio.run(run())
