"""What a provider's batch endpoint is asked, and how the lines of its results are read."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from autointerp.labeling.llm.faults import Fault, Retry, Stop, Terminal, from_status
from autointerp.labeling.llm.provider import Answer, Request, decode

if TYPE_CHECKING:
    from autointerp.labeling.llm.anthropic import AnthropicProvider
    from autointerp.labeling.llm.clients import Clients
    from autointerp.labeling.llm.openai import OpenAIProvider

DEADLINE_S = 600.0
"""Of one request to a batch endpoint: a file of 200 MB takes a while."""
CLOCKS_DIFFER = timedelta(minutes=10)
OUR_KEY = "autointerp"
"""Key of the metadata by which a batch of ours is known at OpenAI."""
_STATUS_OF = {
    "authentication_error": 401,
    "billing_error": 402,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "rate_limit_error": 429,
    "api_error": 500,
    "timeout_error": 504,
    "overloaded_error": 529,
}

Result = tuple[str, Answer | Fault]
"""(custom id, outcome) of one call of a batch."""


class BatchApi(Protocol):
    """A provider's batches. Every method is one attempt, and raises a Fault."""

    most: int
    """Calls in one batch."""
    most_bytes: int

    async def create(self, key: str, calls: Sequence[tuple[str, Request]]) -> str:
        """The provider's id of a new batch of (custom id, request)."""
        ...

    async def candidates(self, key: str, since: datetime, n_calls: int) -> list[str]:
        """Ids of batches that may be the one that was created as `key`; whether one is, its results tell."""
        ...

    async def ended(self, remote_id: str) -> bool: ...

    async def results(self, remote_id: str) -> list[Result]:
        """Of the calls that came to an end, in any order. What is not among them was not answered.

        Raises Terminal or Retry for a batch that was refused as a whole, which costs nothing.
        """
        ...


class OpenAIBatches:
    """File upload and /v1/batches."""

    most = 50_000
    most_bytes = 190_000_000

    def __init__(self, provider: OpenAIProvider):
        self._provider = provider

    async def create(self, key: str, calls: Sequence[tuple[str, Request]]) -> str:
        client, url = self._provider.clients.shared, self._provider.path
        lines = [
            json.dumps({"custom_id": call_id, "method": "POST", "url": url, "body": self._provider.body(request)})
            for call_id, request in calls
        ]
        content = "\n".join(lines).encode()
        upload = client.files.with_raw_response.create
        file = await self._call(lambda: upload(file=(f"{key}.jsonl", content), purpose="batch"))
        create = client.batches.with_raw_response.create
        batch = await self._call(
            lambda: create(input_file_id=file["id"], endpoint=url, completion_window="24h", metadata={OUR_KEY: key})
        )
        return str(batch["id"])

    async def candidates(self, key: str, since: datetime, n_calls: int) -> list[str]:
        listing, after = self._provider.clients.shared.batches.with_raw_response.list, {}
        while True:
            page = await self._call(lambda after=after: listing(limit=100, **after))
            for batch in page.get("data") or []:
                if (batch.get("metadata") or {}).get(OUR_KEY) == key:
                    return [str(batch["id"])]
            batches = page.get("data") or []
            oldest = min((batch["created_at"] for batch in batches), default=0)
            if not page.get("has_more") or oldest < (since - CLOCKS_DIFFER).timestamp():
                return []
            after = {"after": batches[-1]["id"]}

    async def ended(self, remote_id: str) -> bool:
        return (await self._retrieve(remote_id))["status"] in ("completed", "failed", "expired", "cancelled")

    async def results(self, remote_id: str) -> list[Result]:
        batch = await self._retrieve(remote_id)
        if batch["status"] == "failed":
            errors = (batch.get("errors") or {}).get("data") or [{}]
            raise _refused_batch("; ".join(str(error.get("message")) for error in errors[:3]))
        found: list[Result] = []
        for file_id in (batch.get("output_file_id"), batch.get("error_file_id")):
            if file_id:
                text = await _text_of(lambda file_id=file_id: self._content(file_id), self._provider.clients)
                found += [(line["custom_id"], self._outcome(line)) for line in _lines(text)]
        return found

    def _outcome(self, line: dict[str, Any]) -> Answer | Fault:
        error, response = line.get("error"), line.get("response")
        if not isinstance(response, dict):
            message = (error or {}).get("message") if isinstance(error, dict) else None
            return Retry(f"not done by the batch: {message or 'no reason given'}", "server")
        status, body = response.get("status_code"), json.dumps(response.get("body"))
        if not isinstance(status, int) or not 200 <= status < 300:
            return from_status(status or 500, {}, body, self._provider.refusable())
        return _read(lambda: self._provider.read(body, status))

    async def _retrieve(self, remote_id: str) -> dict[str, Any]:
        return await self._call(lambda: self._provider.clients.shared.batches.with_raw_response.retrieve(remote_id))

    async def _content(self, file_id: str) -> Any:
        return await self._provider.clients.shared.files.with_raw_response.content(file_id)

    async def _call(self, ask: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        return decode(await _text_of(ask, self._provider.clients), 200)


class AnthropicBatches:
    """/v1/messages/batches. They carry no mark of ours: whose a batch is shows in the custom ids of its results."""

    most = 50_000
    most_bytes = 200_000_000

    def __init__(self, provider: AnthropicProvider):
        self._provider = provider

    async def create(self, key: str, calls: Sequence[tuple[str, Request]]) -> str:
        # A batch runs side by side or hours apart: each call would pay for writing the cache, and few would read it.
        bodies = {call_id: self._provider.body(request, marked=False) for call_id, request in calls}
        lines = [{"custom_id": call_id, "params": body} for call_id, body in bodies.items()]
        create = self._provider.clients.shared.messages.batches.with_raw_response.create
        return str((await self._call(lambda: create(requests=lines)))["id"])

    async def candidates(self, key: str, since: datetime, n_calls: int) -> list[str]:
        listing, after = self._provider.clients.shared.messages.batches.with_raw_response.list, {}
        found: list[str] = []
        while True:
            page = await self._call(lambda after=after: listing(limit=100, **after))
            batches = page.get("data") or []
            young = [b for b in batches if _instant(b["created_at"]) >= since - CLOCKS_DIFFER]
            found += [str(b["id"]) for b in young if sum(b["request_counts"].values()) == n_calls]
            if not page.get("has_more") or len(young) < len(batches):
                return found
            after = {"after_id": batches[-1]["id"]}

    async def ended(self, remote_id: str) -> bool:
        retrieve = self._provider.clients.shared.messages.batches.with_raw_response.retrieve
        return (await self._call(lambda: retrieve(remote_id)))["processing_status"] == "ended"

    async def results(self, remote_id: str) -> list[Result]:
        import httpx2

        path = f"/v1/messages/batches/{remote_id}/results"
        clients = self._provider.clients
        text = await _text_of(lambda: clients.shared.get(path, cast_to=httpx2.Response), clients)
        return [(line["custom_id"], self._outcome(line)) for line in _lines(text)]

    def _outcome(self, line: dict[str, Any]) -> Answer | Fault:
        result = line.get("result")
        result = result if isinstance(result, dict) else {}
        kind = result.get("type")
        if kind == "succeeded":
            return _read(lambda: self._provider.read(json.dumps(result.get("message")), 200))
        if kind != "errored":
            return Retry(f"not done by the batch: {kind or 'no reason given'}", "server")
        body = json.dumps(result.get("error"))
        error = decode_error(result.get("error"))
        return from_status(_STATUS_OF.get(error, 400), {}, body, self._provider.refusable())

    async def _call(self, ask: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        return decode(await _text_of(ask, self._provider.clients), 200)


async def _text_of(ask: Callable[[], Awaitable[Any]], clients: Clients) -> str:
    """The body of one answer; what went wrong is raised as a Fault without context, which would hold the key."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            raw = await ask()
            return raw.text if isinstance(raw.text, str) else await raw.text()
    except Exception as error:
        fault = clients.fault(error)
    raise fault


def decode_error(error: Any) -> str:
    """The type in an error of Anthropic, which may be wrapped in another."""
    inner = error.get("error") if isinstance(error, dict) else None
    return str((inner if isinstance(inner, dict) else error or {}).get("type"))


def _refused_batch(message: str) -> Fault:
    if "limit" in message.casefold():
        return Retry(f"the batch was refused: {message}", "limit")
    fault = from_status(400, {}, json.dumps({"error": {"message": message}}))
    return fault if isinstance(fault, Stop) else Terminal(f"the batch was refused: {message}")


def _read(read: Callable[[], Answer]) -> Answer | Fault:
    try:
        return read()
    except Fault as fault:
        return fault


def _lines(text: str) -> list[dict[str, Any]]:
    """The lines that can be read; a broken one is as good as missing."""
    found: list[dict[str, Any]] = []
    for line in text.splitlines():
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if isinstance(item, dict) and isinstance(item.get("custom_id"), str):
            found.append(item)
    return found


def _instant(text: str) -> datetime:
    instant = datetime.fromisoformat(text)
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)
