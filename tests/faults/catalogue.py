"""Every fault of a single call that a labeler meets, by name, and the one right end of the question that meets it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from autointerp.errors import ProviderError
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.labelers.llm import LLMLabeler
from autointerp.records import CallStatus

from .harness import KEY, Bench, bench, planted
from .server import Fault, error

Protocol = Literal["chat", "responses", "messages"]
PROVIDERS: dict[Protocol, str] = {"chat": "openai", "responses": "openai", "messages": "anthropic"}
DEADLINE_S = 1.0
"""Of calls that would never end; a good answer has to come within it, too."""


class Ends(NamedTuple):
    """How a question ends."""

    state: str
    """ok | refused | failed of the label, or `stopped`: the provider is asked no more (exit status 5)."""
    calls: int


@dataclass(frozen=True)
class Kind:
    """Faults with the same right answer."""

    once: Ends
    """The question that meets one, and good answers from then on."""
    always: Ends
    """The question that meets it every time."""
    status: CallStatus
    """Of the call that met it, on the ledger."""


LIMIT = Kind(Ends("ok", 2), Ends("failed", 8), "error")
SERVER = Kind(Ends("ok", 2), Ends("failed", 6), "error")
NETWORK = Kind(Ends("ok", 2), Ends("failed", 5), "in_doubt")
GARBAGE = Kind(Ends("ok", 2), Ends("failed", 3), "in_doubt")
STOP = Kind(Ends("stopped", 1), Ends("stopped", 1), "error")
BAD_REQUEST = Kind(Ends("failed", 1), Ends("failed", 1), "error")
TOO_LONG = Kind(Ends("ok", 2), Ends("failed", 2), "error")
MISFIT = Kind(Ends("ok", 2), Ends("failed", 2), "ok")
CUT_OFF = Kind(Ends("ok", 2), Ends("failed", 2), "ok")
REFUSAL = Kind(Ends("refused", 1), Ends("refused", 1), "refused")
HARMLESS = Kind(Ends("ok", 1), Ends("ok", 1), "ok")


@dataclass(frozen=True)
class Named:
    """One fault."""

    name: str
    kind: Kind
    fault: Fault

    def __str__(self) -> str:
        return self.name


_SAID = f"with the key {KEY} we can do nothing for you"
"""What a server, or somebody between it and us, says of a request may hold its key."""
_HTML = {"content-type": "text/html"}
_GOOD = '{"label": "these tokens", "explanation": "Fires on `assert`.", "effect": "Nothing stands out."}'

_RETRIED = [
    Named("429, Retry-After in seconds", LIMIT, error(429, _SAID, retry_after="0")),
    Named("429, Retry-After as a date", LIMIT, error(429, _SAID, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")),
    Named("429, retry-after-ms", LIMIT, error(429, _SAID, retry_after_ms="5")),
    Named("429, no Retry-After", LIMIT, error(429, _SAID, code="rate_limit_exceeded", kind="rate_limit_error")),
    Named("429, Retry-After of 10⁶ s", LIMIT, error(429, _SAID, retry_after="1000000")),
    Named("429, Retry-After that is nonsense", LIMIT, error(429, _SAID, retry_after="soon")),
    Named("408", SERVER, error(408, _SAID)),
    Named("500", SERVER, error(500, _SAID)),
    Named("502, HTML", SERVER, Fault(502, f"<html><h1>Bad gateway</h1>{_SAID}</html>", _HTML)),
    Named("503", SERVER, error(503, _SAID)),
    Named("529", SERVER, error(529, _SAID, kind="overloaded_error")),
    Named("connection reset", NETWORK, Fault(breaks="reset")),
    Named("body cut short", NETWORK, Fault(breaks="truncate")),
    Named("no headers before the deadline", NETWORK, Fault(breaks="hang")),
    Named("body drips past the deadline", NETWORK, Fault(breaks="drip")),
    Named("200, empty", GARBAGE, Fault(body="")),
    Named("200, HTML", GARBAGE, Fault(body=f"<html>Welcome to the hotel, {KEY}</html>", headers=_HTML)),
    Named("200, an error inside", GARBAGE, Fault(body=f'{{"error": {{"message": "{_SAID}"}}}}')),
    Named("200, invalid JSON", GARBAGE, Fault(body='{"choices": [')),
    Named("200, nothing in it", GARBAGE, Fault(body='{"choices": [], "content": null, "output": null, "usage": null}')),
    Named("200, a list", GARBAGE, Fault(body="[]")),
]
_ANSWERED = [
    Named("400", BAD_REQUEST, error(400, _SAID, kind="invalid_request_error")),
    Named("413", TOO_LONG, error(413, _SAID, kind="request_too_large")),
    Named("context overflow", TOO_LONG, error(400, "maximum context length is 8192 tokens: prompt is too long")),
    Named("wrong schema", MISFIT, Fault(text='{"label": 3}')),
    Named("no JSON in the answer", MISFIT, Fault(text="I would rather not say.")),
    Named("prose around the JSON", HARMLESS, Fault(text=f"Sure! ```json\n{_GOOD}\n``` I hope this {{helps}}.")),
    Named("cut off by length", CUT_OFF, Fault(text='{"label": "these tok', finish="length")),
    Named("refusal", REFUSAL, Fault(text="I cannot help with that.", finish="refusal")),
    Named("content filter", REFUSAL, Fault(text="", finish="filter")),
    Named("no usage", HARMLESS, Fault(usage=False)),
    Named(
        "rate headers that lie",
        HARMLESS,
        Fault(headers={"x-ratelimit-remaining-requests": "0", "retry-after": "1000000", "x-should-retry": "true"}),
    ),
]
_STOPS = [
    Named("401", STOP, error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key")),
    Named("402", STOP, error(402, _SAID, kind="billing_error")),
    Named("403", STOP, error(403, _SAID, kind="permission_error")),
    Named("404, model retired", STOP, error(404, _SAID, code="model_not_found", kind="not_found_error")),
]
_BROKE: dict[str, Named] = {
    "openai": Named(
        "429, insufficient_quota", STOP, error(429, _SAID, code="insufficient_quota", kind="insufficient_quota")
    ),
    "anthropic": Named("400, no credit", STOP, error(400, "Your credit balance is too low", kind="billing_error")),
}

DOWN = Fault(breaks="refuse", delay_s=0.02)
"""One for many calls at once: the connection is reset, and nobody listens for a moment."""


def catalogue(protocol: Protocol) -> list[Named]:
    """All faults of single calls, those that stop the provider last."""
    return [*_RETRIED, *_ANSWERED, *_STOPS, _BROKE[PROVIDERS[protocol]]]


class Met(NamedTuple):
    """What became of a latent's question, on our books and on the server's."""

    ends: Ends
    calls: list[dict[str, Any]]
    """Rows of the ledger, in order."""
    usd: float
    usd_in_doubt: float
    billed_usd: float
    unseen_usd: float
    said: str
    """The label or the error, as a user gets to see it."""


@asynccontextmanager
async def scene(folder: Path, protocol: Protocol) -> AsyncIterator[Bench]:
    """A store and a server to `meet` faults at."""
    api = "responses" if protocol == "responses" else "chat"
    async with bench(folder, provider=PROVIDERS[protocol], api=api) as b:
        yield b


async def meet(b: Bench, named: Named, always: bool = False, deadline_s: float = DEADLINE_S) -> Met:
    """Labels one planted latent whose first question, or every one, meets a fault."""
    n, bill = len(b.server.requests), replace(b.server.bill)
    b.server.choose = lambda: named.fault if always or len(b.server.requests) == n + 1 else None
    run_id = f"{named.name}, {'always' if always else 'once'}"
    engine = b.make(run_id, timeout_s=deadline_s) if named.fault.breaks in ("hang", "drip") else b.make(run_id)
    try:
        label = await LLMLabeler(engine, LabelingSettings(run_id)).label(planted(word=f"assert{n}"))
        state, said = label.status, str(label)
    except ProviderError as stopped:
        state, said = "stopped", str(stopped)
    await engine.aclose()
    calls = b.store.read("SELECT * FROM calls WHERE run_id = ? ORDER BY started_at, attempt", [run_id])
    return Met(
        Ends(state, len(b.server.requests) - n),
        calls,
        engine.spend.usd,
        engine.spend.usd_in_doubt,
        b.server.bill.usd - bill.usd,
        b.server.bill.unseen_usd - bill.unseen_usd,
        said,
    )
