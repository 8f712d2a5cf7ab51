"""Chat completions of OpenAI and of the servers that speak its protocol (vLLM, llama.cpp, Ollama …)."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from autointerp.labeling.llm.prices import Price
from autointerp.labeling.llm.provider import Answer, Request, count, decode, from_sdk, garbage

_HOME = "https://api.openai.com/v1"
_FINISH = {"length": "length", "content_filter": "refusal"}


class OpenAIProvider:
    """One model behind one chat-completions endpoint."""

    name = "openai"

    def __init__(self, model: str, key: str, price: Price | None, timeout_s: float):
        self.model = model
        self.endpoint = (os.environ.get("OPENAI_BASE_URL") or _HOME).rstrip("/")
        self.price = price
        self.timeout_s = timeout_s
        self._key = key
        self._client: Any = None
        at_home = self.endpoint == _HOME
        # Other servers may know only the older name of the cap, and need not be told to answer without long thought.
        self._cap = "max_completion_tokens" if at_home else "max_tokens"
        self._dispensable = {"response_format", *(["reasoning_effort"] if at_home else [])}

    async def complete(self, request: Request) -> Answer:
        import openai

        try:
            async with asyncio.timeout(self.timeout_s):
                raw = await self._ready().chat.completions.with_raw_response.create(**self._body(request))
        except Exception as error:
            fault = from_sdk(openai, error, (*sorted(self._dispensable), self._cap), self._key)
        else:
            return _answer(raw.text, raw.status_code, self.model)
        # Out here it carries no context: the SDK's exception holds the request, and the request the key.
        raise fault

    def adapt(self, parameter: str) -> None:
        if parameter == self._cap:
            self._cap = "max_tokens" if parameter == "max_completion_tokens" else "max_completion_tokens"
        self._dispensable.discard(parameter)

    async def aclose(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _ready(self) -> Any:
        if self._client is None:
            import openai

            self._client = openai.AsyncOpenAI(
                api_key=self._key, base_url=self.endpoint, max_retries=0, timeout=self.timeout_s
            )
        return self._client

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "system", "content": request.system}, *request.messages()],
            self._cap: request.max_output_tokens,
        }
        if "reasoning_effort" in self._dispensable:
            body["reasoning_effort"] = "none"  # chain of thought does not make better labels, and is billed as output
        if "response_format" in self._dispensable:
            schema = {"name": request.schema_name, "schema": dict(request.schema), "strict": True}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return body


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
    return Answer(
        text=str(message.get("refusal") if refused else message.get("content") or ""),
        input_tokens=count(usage, "prompt_tokens"),
        cached_tokens=count(details, "cached_tokens") or 0,
        cache_write_tokens=count(details, "cache_write_tokens") or 0,
        output_tokens=count(usage, "completion_tokens"),
        finish="refusal" if refused else _FINISH.get(str(choices[0].get("finish_reason")), "stop"),  # type: ignore[arg-type]
        model=str(completion.get("model") or model),
        http_status=http_status,
    )
