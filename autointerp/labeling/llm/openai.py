"""OpenAI and the servers that speak its protocol (vLLM, llama.cpp, Ollama …): chat completions or responses."""

from __future__ import annotations

import os
from typing import Any, Literal

from autointerp.labeling.llm import responses
from autointerp.labeling.llm.clients import Clients
from autointerp.labeling.llm.logprobs import read_tokens
from autointerp.labeling.llm.prices import Price
from autointerp.labeling.llm.provider import Answer, Request, cache_key, count, decode, garbage

_HOME = "https://api.openai.com/v1"
_FINISH = {"length": "length", "content_filter": "refusal"}


_EFFORTS = ("none", "low", None)
"""Chain of thought does not make better labels and is billed as output: as little as the model lets us. None: its own
default."""


class OpenAIProvider:
    """One model behind one endpoint.

    What a server refuses by name in a 400 is left out from then on: structured output, the reasoning effort, the cache
    key, the probabilities of tokens, the system role (put before the first question then). A model that answers through
    the responses API only is asked there.
    """

    name = "openai"

    def __init__(
        self, model: str, key: str, price: Price | None, timeout_s: float, api: Literal["chat", "responses"] = "chat"
    ):
        self.model = model
        self.endpoint = (os.environ.get("OPENAI_BASE_URL") or _HOME).rstrip("/")
        self.price = price
        self.parameters = "" if api == "chat" else api
        self._api = api
        self.clients = Clients("openai", "AsyncOpenAI", key, timeout_s, api_key=key, base_url=self.endpoint)
        # Other servers may know only the older name of the cap, and need not be told to answer without long thought.
        at_home = self.endpoint == _HOME
        self._cap = "max_completion_tokens" if at_home else "max_tokens"
        self._optional = {"response_format", "text.format", "System role", "logprobs"}
        self._efforts = list(_EFFORTS if at_home else (None,))
        if at_home:
            self._optional |= {"prompt_cache_key", "v1/responses"}

    def load(self) -> None:
        self.clients.load()

    async def complete(self, request: Request) -> Answer:
        path = self.path.removeprefix("/v1")
        return self.read(*await self.clients.post(path, self.body(request), self.refusable()))

    @property
    def path(self) -> str:
        """Of the API that is asked, as batches name it."""
        return "/v1/responses" if self._api == "responses" else "/v1/chat/completions"

    def read(self, body: str, http_status: int) -> Answer:
        """What the body of a good answer says. Raises Retry (garbage) for one that says nothing."""
        read = responses.answer if self._api == "responses" else _answer
        return read(body, http_status, self.model)

    def refusable(self) -> tuple[str, ...]:
        """Names that a 400 may hold for the question to be worth repeating without what they name."""
        efforts = ("reasoning_effort", "reasoning.effort", "reasoning") if self._efforts[0] else ()
        return (*sorted(self._optional), *efforts, *([self._cap] if self._api == "chat" else []))

    def adapt(self, parameter: str) -> None:
        if parameter == "v1/responses":
            self._api = "responses"
        elif parameter.startswith("reasoning"):
            self._efforts = self._efforts[1:] or [None]
        elif parameter == self._cap:
            self._cap = "max_tokens" if parameter == "max_completion_tokens" else "max_completion_tokens"
        self._optional.discard(parameter)

    async def aclose(self) -> None:
        await self.clients.aclose()

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent, in the words of the API that is asked."""
        effort = self._efforts[0]
        if self._api == "responses":
            return responses.body(self.model, request, effort, self._optional)
        body: dict[str, Any] = {
            "model": self.model,
            "messages": self._messages(request),
            self._cap: request.max_output_tokens,
        }
        if effort is not None:
            body["reasoning_effort"] = effort
        if "prompt_cache_key" in self._optional:
            body["prompt_cache_key"] = cache_key(request)
        if "response_format" in self._optional:
            schema = {"name": request.schema_name, "schema": dict(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if request.top_logprobs and "logprobs" in self._optional:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return body

    def _messages(self, request: Request) -> list[dict[str, str]]:
        if "System role" in self._optional:
            return [{"role": "system", "content": request.system}, *request.messages()]
        first, *others = request.messages()
        return [{"role": "user", "content": f"{request.system}\n\n{first['content']}"}, *others]


def _answer(body: str, http_status: int, model: str) -> Answer:
    completion = decode(body, http_status)
    choices = completion.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise garbage("no choices", http_status)
    message = choices[0].get("message")
    message = message if isinstance(message, dict) else {}
    usage = completion.get("usage")
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    refused = bool(message.get("refusal"))
    logprobs = choices[0].get("logprobs")
    return Answer(
        text=str(message.get("refusal") if refused else message.get("content") or ""),
        input_tokens=count(usage, "prompt_tokens"),
        cached_tokens=count(details, "cached_tokens") or 0,
        cache_write_tokens=count(details, "cache_write_tokens") or 0,
        output_tokens=count(usage, "completion_tokens"),
        finish="refusal" if refused else _FINISH.get(str(choices[0].get("finish_reason")), "stop"),  # type: ignore[arg-type]
        model=str(completion.get("model") or model),
        http_status=http_status,
        spoken=read_tokens(logprobs.get("content")) if isinstance(logprobs, dict) else (),
    )
