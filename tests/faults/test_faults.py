"""Each fault has one right outcome: how often is asked, what the question becomes, what the ledger says."""

from __future__ import annotations

import asyncio
import json
import socket
import time
import traceback
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest

from autointerp.errors import ProviderError
from autointerp.labeling.llm.faults import Retry, Terminal, from_status, retry_after
from autointerp.labeling.llm.sending import Retries
from autointerp.store import Store

from .catalogue import STOP, Named, catalogue
from .harness import bench, question, says, word
from .server import Fault, error

GOOD = json.dumps({"word": "yes"})
PROVIDERS = pytest.mark.parametrize("provider", ["openai", "anthropic"])


def test_an_absurd_wait_is_capped_and_a_sensible_one_obeyed(tmp_path: Path):
    async def run(wait_ms: str, longest_s: float) -> float:
        plan = [None, error(429, "slow down", retry_after_ms=wait_ms)]
        async with bench(tmp_path, plan, respond=says(GOOD), retries=Retries(longest_wait_s=longest_s)) as b:
            for user in ("the SDK is imported", wait_ms):
                asked = replace(question(), user=f"{user} {longest_s}")
                await b.engine.ask(asked, word, latent=0, purpose="label")
            started = [call["started_at"] for call in b.calls()[-2:]]
            return (started[1] - started[0]).total_seconds()

    assert 0.1 <= asyncio.run(run("100", 5.0)) < 2
    assert asyncio.run(run("1000000000", 0.1)) < 2


def test_a_limit_pauses_the_others_too(tmp_path: Path):
    async def run():
        plan = [None, error(429, "slow down", retry_after_ms="150")]
        retries = Retries(longest_wait_s=1.0)
        async with bench(tmp_path, plan, respond=says(GOOD), retries=retries, concurrency=1) as b:
            await b.engine.ask(question(), word, latent=0, purpose="label")
            began = time.monotonic()
            limited = asyncio.create_task(b.engine.ask(question(1), word, latent=1, purpose="label"))
            while len(b.server.requests) < 2:
                await asyncio.sleep(0.001)
            await b.engine.ask(question(2), word, latent=2, purpose="label")
            assert time.monotonic() - began >= 0.14
            await limited

    asyncio.run(run())


def test_a_refused_connection_was_never_sent_and_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async def run():
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            async with bench(tmp_path, respond=says(GOOD)) as b:
                monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{closed.getsockname()[1]}")
                engine = b.make("run")
                with pytest.raises(Terminal, match="given up after 5 attempts: connection failed"):
                    await engine.ask(question(), word, latent=0, purpose="label")
                await engine.aclose()
                assert b.statuses() == ["error"] * 5
                assert engine.spend.usd_in_doubt == 0

    asyncio.run(run())


@pytest.mark.parametrize(("fault", "n"), [(Fault(body=""), 3), (error(503, "busy"), 6), (error(429, "slow"), 8)])
def test_a_lasting_fault_fails_the_question_only(tmp_path: Path, fault: Fault, n: int):
    async def run():
        async with bench(tmp_path, [fault] * n, respond=says(GOOD)) as b:
            with pytest.raises(Terminal, match=f"given up after {n} attempts"):
                await b.engine.ask(question(), word, latent=0, purpose="label")
            assert len(b.server.requests) == n
            assert (await b.engine.ask(question(1), word, latent=1, purpose="label")).value == "yes"

    asyncio.run(run())


def test_an_attempt_that_is_not_repeated_after_all_is_settled(tmp_path: Path):
    """A call is lost after the provider has stopped us. The next attempt does not come; what is known of this one must
    be in the store all the same, before the engine is closed."""

    async def run():
        plan = [Fault(breaks="hang"), error(401, "Incorrect API key provided")]
        async with bench(tmp_path, plan, concurrency=2, timeout_s=0.8) as b:
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(2)]
            errors = await asyncio.gather(*asks, return_exceptions=True)
            assert [type(e) for e in errors] == [ProviderError] * 2
        with Store.open(tmp_path / "store.duckdb", "read") as store:
            return store.read("SELECT * FROM calls ORDER BY latent")

    calls = asyncio.run(run())
    assert [call["status"] for call in calls] == ["in_doubt", "error"]
    assert calls[0]["error"] == "no answer within the deadline"
    assert calls[0]["seconds"] >= 0.8


MASKED = Named("401, key masked", STOP, error(401, "Incorrect API key provided: sk-proj-****YZZY"))


@pytest.mark.parametrize(
    ("provider", "named"),
    [("openai", named) for named in (*catalogue("chat"), MASKED) if named.kind is STOP]
    + [("anthropic", catalogue("messages")[-1])],
    ids=str,
)
def test_the_provider_is_stopped_after_one_call(
    tmp_path: Path, provider: str, named: Named, capfd: pytest.CaptureFixture
):
    async def run():
        async with bench(tmp_path, [named.fault] * 20, provider=provider, concurrency=8) as b:
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(12)]
            errors = await asyncio.gather(*asks, return_exceptions=True)
            assert {type(e) for e in errors} == {ProviderError}
            assert len(b.server.requests) == 1
            (call,) = b.calls()
            assert (call["status"], call["http_status"], call["usd"]) == ("error", named.fault.status, 0.0)
            traces = [line for e in errors if isinstance(e, Exception) for line in traceback.format_exception(e)]
            return [str(e) for e in errors], traces, b.store.read("SELECT * FROM calls")

    shown = str(asyncio.run(run())) + "".join(capfd.readouterr())
    assert "secret" not in shown
    assert "YZZY" not in shown


@PROVIDERS
@pytest.mark.parametrize(("status", "too_long"), [(400, False), (413, True), (422, False)])
def test_a_bad_request_fails_its_latent_after_one_call(tmp_path: Path, provider: str, status: int, too_long: bool):
    async def run():
        async with bench(tmp_path, [error(status, "no")], provider=provider, respond=says(GOOD)) as b:
            with pytest.raises(Terminal) as failed:
                await b.engine.ask(question(), word, latent=0, purpose="label")
            assert (failed.value.status, failed.value.too_long) == ("failed", too_long)
            assert len(b.server.requests) == 1
            assert (await b.engine.ask(question(1), word, latent=1, purpose="label")).value == "yes"

    asyncio.run(run())


def test_retry_after_in_all_its_forms():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    date = format_datetime(now + timedelta(seconds=7), usegmt=True)
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "3"}) == 3.0
    assert retry_after({"retry-after": date}, now) == 7.0
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, now) == 0.0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_what_a_status_means():
    overflow = '{"error": {"message": "This model\'s maximum context length is 8192 tokens, reduce max_tokens"}}'
    fault = from_status(400, {}, overflow, ("max_tokens",))
    assert isinstance(fault, Terminal)
    assert fault.too_long
    unknown = from_status(400, {}, "Unsupported parameter: 'max_tokens'", ("max_tokens",))
    assert isinstance(unknown, Retry)
    assert (unknown.kind, str(unknown)) == ("adapt", "max_tokens")
    filtered = from_status(400, {}, '{"error": {"code": "content_filter", "message": "no"}}')
    assert isinstance(filtered, Terminal)
    assert filtered.status == "refused"
    assert len(str(from_status(500, {}, "x" * 10_000))) <= 300


def test_a_provider_that_is_down_is_not_asked_for_ever(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=says(GOOD), concurrency=1) as b:
            b.server.choose = lambda: error(503, "busy")
            asks = [b.engine.ask(question(i), word, latent=i, purpose="label") for i in range(12)]
            errors = await asyncio.gather(*asks, return_exceptions=True)
            kinds = [type(e) for e in errors]
            assert set(kinds) == {Terminal, ProviderError}
            assert 5 <= kinds.count(Terminal) <= 7, "some may have been at their last attempt"
            assert len(b.server.requests) < 12 * 6

    asyncio.run(run())
