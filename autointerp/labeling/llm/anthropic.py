"""Messages of Anthropic and of the servers that speak its protocol."""

from __future__ import annotations

import os
from typing import Any

from autointerp.labeling.llm.clients import Clients
from autointerp.labeling.llm.prices import Price
from autointerp.labeling.llm.provider import Answer, Request, count, decode, garbage

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
        token = not os.environ.get("ANTHROPIC_API_KEY", "").strip()  # then the key is ANTHROPIC_AUTH_TOKEN's
        known = {"api_key": None, "auth_token": key} if token else {"api_key": key, "auth_token": None}
        self.clients = Clients("anthropic", "AsyncAnthropic", key, timeout_s, base_url=self.endpoint, **known)
        self._effort = True
        self._structured = True
        self._caches = True

    def load(self) -> None:
        self.clients.load()

    async def complete(self, request: Request) -> Answer:
        return self.read(*await self.clients.post("/v1/messages", self.body(request), self.refusable()))

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
        await self.clients.aclose()

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
