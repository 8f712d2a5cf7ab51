"""The other ways to ask: the responses API, servers that know less, cached prefixes, answers of other stores."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from autointerp.labeling.llm.anthropic import CACHEABLE_BYTES
from autointerp.labeling.llm.faults import Retry, Terminal, from_status
from autointerp.labeling.llm.openai import OpenAIProvider

from .harness import KEY, bench, question, says, word
from .server import Fault, error

GOOD = json.dumps({"word": "yes"})


def test_the_responses_api_is_asked_and_billed_alike(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), api="responses", cached_tokens=3) as b:
            assert (await b.engine.ask(question(), word, latent=0, purpose="label")).value == "yes"
            (sent,) = b.server.requests
            assert (sent["path"], sent["max_output_tokens"], sent["store"]) == ("/v1/responses", 50, False)
            assert sent["text"]["format"]["schema"] == question().schema
            assert sent["instructions"] == question().system
            b.server.plan.extend([Fault(text='{"word": 3}'), None])
            assert (await b.engine.ask(question(1), word, latent=1, purpose="label")).value == "yes"
            assert [turn["role"] for turn in b.server.requests[-1]["input"]] == ["user", "assistant", "user"]
            b.server.plan.extend([Fault(text='{"wor', finish="length"), None])
            await b.engine.ask(question(2), word, latent=2, purpose="label")
            assert b.server.requests[-1]["max_output_tokens"] == 200
            for finish in ("refusal", "filter"):
                b.server.plan.append(Fault(text="I would rather not", finish=finish))
                with pytest.raises(Terminal) as refused:
                    await b.engine.ask(question(ord(finish[0])), word, latent=3, purpose="label")
                assert refused.value.status == "refused"
            b.server.plan.extend([Fault(body='{"error": {"message": "oops"}}'), Fault(body='{"output": 3}'), None])
            await b.engine.ask(question(4), word, latent=4, purpose="label")
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)
            assert b.engine.spend.cached_tokens == b.server.bill.cached_tokens > 0

    asyncio.run(run())


def test_the_two_apis_do_not_share_answers(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            await b.engine.aclose()
            b.store.close()
            async with bench(tmp_path, server=b.server, api="responses") as other:
                reply = await other.engine.ask(question(), word, latent=0, purpose="label")
                assert not reply.stored

    asyncio.run(run())


def test_a_model_that_has_only_the_responses_api_is_asked_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    provider = OpenAIProvider("o-pro", KEY, None, 1.0)
    body = '{"error": {"message": "This model is only supported in v1/responses and not in v1/chat/completions."}}'
    fault = from_status(404, {}, body, provider.refusable())
    assert isinstance(fault, Retry)
    assert fault.kind == "adapt"
    provider.adapt(str(fault))
    assert provider.body(question())["reasoning"] == {"effort": "none"}
    assert not isinstance(from_status(404, {}, body, provider.refusable()), Retry), "once is enough"


def test_a_template_without_a_system_role_gets_it_in_the_question(tmp_path: Path):
    async def run():
        async with bench(tmp_path, [error(400, "System role not supported")], respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            await b.engine.ask(question(1), word, latent=1, purpose="label")
            assert [[m["role"] for m in r["messages"]] for r in b.server.requests[1:]] == [["user"], ["user"]]
            assert b.server.requests[-1]["messages"][0]["content"] == "Answer with a word as JSON.\n\nQuestion 1"

    asyncio.run(run())


@pytest.mark.parametrize(("n_bytes", "marked"), [(CACHEABLE_BYTES - 1, False), (CACHEABLE_BYTES, True)])
def test_anthropic_caches_a_prefix_that_is_long_enough(tmp_path: Path, n_bytes: int, marked: bool):
    async def run():
        async with bench(tmp_path, provider="anthropic", respond=says(GOOD), cached_tokens=9) as b:
            long = replace(question(), system="x" * n_bytes)
            await b.engine.ask(long, word, latent=0, purpose="label")
            sent = b.server.requests[0]["system"]
            assert (sent == "x" * n_bytes) is not marked
            if marked:
                assert sent == [{"type": "text", "text": "x" * n_bytes, "cache_control": {"type": "ephemeral"}}]
                b.server.plan.append(error(400, "system.0.cache_control: Extra inputs are not permitted"))
                await b.engine.ask(replace(long, user="Question 1"), word, latent=1, purpose="label")
                assert b.server.requests[-1]["system"] == "x" * n_bytes
            assert b.engine.spend.cached_tokens == b.server.bill.cached_tokens
            assert b.engine.spend.usd == pytest.approx(b.server.bill.usd, abs=1e-12)

    asyncio.run(run())


def test_an_answer_in_another_store_of_the_folder_is_not_paid_for_again(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD)) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            await b.engine.aclose()
            b.store.close()
            shutil.move(tmp_path / "store.duckdb", tmp_path / "older.duckdb")
            (tmp_path / "not-ours.duckdb").write_bytes(b"no database at all")
            async with bench(tmp_path, server=b.server) as new:
                reply = await new.engine.ask(question(), word, latent=0, purpose="label")
                assert (reply.value, reply.stored) == ("yes", True)
                assert len(b.server.requests) == 1
                assert len(new.store.read("SELECT * FROM answers")) == 1, "ours is complete by itself"
                assert not (await new.engine.ask(question(1), word, latent=0, purpose="label")).stored

    asyncio.run(run())


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_calls_in_flight_have_clients_of_their_own_which_later_calls_use_again(tmp_path: Path, provider: str):
    async def run():
        async with bench(tmp_path, provider=provider, respond=says(GOOD), latency_s=0.1, concurrency=12) as b:
            asks = (b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(40))
            assert {reply.value for reply in await asyncio.gather(*asks)} == {"yes"}
            clients = b.engine.provider.clients  # type: ignore[attr-defined]
            assert b.server.busiest <= len(clients._all) <= 12
            assert set(map(id, clients._idle)) == set(map(id, clients._all))

    asyncio.run(run())
