"""Messages of Anthropic and of the servers that speak its protocol."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from autointerp.labeling.llm.clients import Clients
from autointerp.labeling.llm.prices import Price
from autointerp.labeling.llm.provider import Answer, Request, count, decode, from_sdk, garbage

_HOME = "https://api.anthropic.com"
_FINISH = {"max_tokens": "length", "model_context_window_exceeded": "length", "refusal": "refusal"}

CACHEABLE_BYTES = 4 * 1024
"""About 1,024 tokens, the shortest prefix that any of the models caches. Below its minimum the marker does nothing."""


class AnthropicProvider:
    """One model behind one messages endpoint."""

    name = "anthropic"
    parameters = ""

    def __init__(self, model: str, key: str, price: Price | None, timeout_s: float):
        self.model = model
        self.endpoint = (os.environ.get("ANTHROPIC_BASE_URL") or _HOME).rstrip("/")
        self.price = price
        self.timeout_s = timeout_s
        self.key = key
        self._clients: Clients | None = None
        self._effort = True
        self._structured = True
        self._caches = True

    async def complete(self, request: Request) -> Answer:
        import anthropic
        import httpx2

        try:
            # Not `create`: that walks through the whole body to convert it, and what we send is converted already.
            async with asyncio.timeout(self.timeout_s):
                with self._pools().one() as client:
                    raw = await client.post("/v1/messages", body=self.body(request), cast_to=httpx2.Response)
        except Exception as error:
            fault = from_sdk(anthropic, error, self.refusable(), self.key)
        else:
            return self.read(raw.text, raw.status_code)
        # Out here it carries no context: the SDK's exception holds the request, and the request the key.
        raise fault

    def read(self, body: str, http_status: int) -> Answer:
        """What the body of a good answer says. Raises Retry (garbage) for one that says nothing."""
        return _answer(body, http_status, self.model)

    def refusable(self) -> tuple[str, ...]:
        """Names that a 400 may hold for the question to be worth repeating without what they name."""
        known = {"cache_control": self._caches, "effort": self._effort, "output_config": self._structured}
        return tuple(name for name, sent in known.items() if sent)

    def adapt(self, parameter: str) -> None:
        if parameter == "effort":
            self._effort = False
        elif parameter == "cache_control":
            self._caches = False
        else:
            self._structured = self._effort = False

    async def aclose(self) -> None:
        if self._clients is not None:
            await self._clients.aclose()
            self._clients = None

    def client(self) -> Any:
        """One of the SDK's clients, without retries of its own."""
        return self._pools().first

    def _pools(self) -> Clients:
        if self._clients is None:
            import anthropic

            token = not os.environ.get("ANTHROPIC_API_KEY", "").strip()  # then the key is ANTHROPIC_AUTH_TOKEN's
            known: dict[str, Any] = {"base_url": self.endpoint, "max_retries": 0, "timeout": self.timeout_s}
            known |= {"api_key": None if token else self.key, "auth_token": self.key if token else None}
            self._clients = Clients(
                anthropic.DefaultAsyncHttpxClient, lambda http: anthropic.AsyncAnthropic(**known, http_client=http)
            )
        return self._clients

    def body(self, request: Request, marked: bool = True) -> dict[str, Any]:
        """What is sent; unless `marked`, without markers for the provider's cache."""
        body: dict[str, Any] = {
            "model": self.model,
            "system": self._system(request.system) if marked else request.system,
            "messages": request.messages(),
            "max_tokens": request.max_output_tokens,
        }
        output: dict[str, Any] = {}
        if self._effort:
            output["effort"] = "low"  # chain of thought does not make better labels, and is billed as output
        if self._structured:
            output["format"] = {"type": "json_schema", "schema": dict(request.schema)}
        return body | ({"output_config": output} if output else {})

    def _system(self, system: str) -> str | list[dict[str, Any]]:
        """The part that never changes, marked for the provider's cache where it is long enough to be cached: writing
        costs a quarter more than reading it plainly, each further call nine tenths less."""
        if not self._caches or len(system.encode()) < CACHEABLE_BYTES:
            return system
        return [{"type": "text", "text": system, "cache_control": {"type": "ephemeral"}}]


def _answer(body: str, http_status: int, model: str) -> Answer:
    message = decode(body, http_status)
    content = message.get("content")
    if not isinstance(content, list):
        raise garbage("no content", http_status)
    texts = [str(block.get("text", "")) for block in content if isinstance(block, dict) and block.get("type") == "text"]
    usage = message.get("usage")
    cached = count(usage, "cache_read_input_tokens") or 0
    written = count(usage, "cache_creation_input_tokens") or 0
    plain = count(usage, "input_tokens")
    return Answer(
        text="".join(texts),
        input_tokens=None if plain is None else plain + cached + written,  # Anthropic counts the three apart
        cached_tokens=cached,
        cache_write_tokens=written,
        output_tokens=count(usage, "output_tokens"),
        finish=_FINISH.get(str(message.get("stop_reason")), "stop"),  # type: ignore[arg-type]
        model=str(message.get("model") or model),
        http_status=http_status,
    )
