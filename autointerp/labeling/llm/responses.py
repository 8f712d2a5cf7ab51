"""The responses API of OpenAI: how a question is put, and how its answer is read."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from autointerp.labeling.llm.logprobs import read_tokens
from autointerp.labeling.llm.provider import Answer, Request, cache_key, count, decode, garbage


def body(model: str, request: Request, effort: str | None, optional: Collection[str]) -> dict[str, Any]:
    """The request's body. `optional`: the parameters that the server is known not to refuse."""
    asked: dict[str, Any] = {
        "model": model,
        "instructions": request.system,
        "input": request.messages(),
        "max_output_tokens": request.max_output_tokens,
        "store": False,
    }
    if effort is not None:
        asked["reasoning"] = {"effort": effort}
    if "prompt_cache_key" in optional:
        asked["prompt_cache_key"] = cache_key(request)
    if "text.format" in optional:
        form = {"type": "json_schema", "name": request.schema_name, "schema": dict(request.schema), "strict": True}
        asked["text"] = {"format": form}
    if request.top_logprobs and "logprobs" in optional:
        asked |= {"include": ["message.output_text.logprobs"], "top_logprobs": request.top_logprobs}
    return asked


def answer(text: str, http_status: int, model: str) -> Answer:
    """What a response says. Raises Retry (garbage) for one that says nothing."""
    response = decode(text, http_status)
    output = response.get("output")
    if not isinstance(output, list):
        raise garbage("no output", http_status)
    parts = [part for item in output if isinstance(item, dict) for part in _parts(item)]
    refusals = [str(part.get("refusal") or "") for part in parts if part.get("type") == "refusal"]
    said = [part for part in parts if part.get("type") == "output_text"]
    texts = [str(part.get("text") or "") for part in said]
    usage = response.get("usage")
    details = usage.get("input_tokens_details") if isinstance(usage, dict) else None
    return Answer(
        text="".join(refusals or texts),
        input_tokens=count(usage, "input_tokens"),
        cached_tokens=count(details, "cached_tokens") or 0,
        cache_write_tokens=count(details, "cache_write_tokens") or 0,
        output_tokens=count(usage, "output_tokens"),
        finish="refusal" if refusals else _finish(response),
        model=str(response.get("model") or model),
        http_status=http_status,
        spoken=tuple(token for part in said for token in read_tokens(part.get("logprobs"))),
    )


def _parts(item: dict[str, Any]) -> list[dict[str, Any]]:
    content = item.get("content") if item.get("type") == "message" else None
    return [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []


def _finish(response: dict[str, Any]) -> Literal["stop", "length", "refusal"]:
    if response.get("status") != "incomplete":
        return "stop"
    details = response.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else None
    return "refusal" if reason == "content_filter" else "length"
