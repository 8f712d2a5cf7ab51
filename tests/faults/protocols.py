"""Well-formed answers in the three protocols that the fault server speaks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """One answer before it is put in the words of a protocol."""

    model: str
    text: str
    finish: str
    """stop | length | refusal | filter"""
    read: int
    cached: int
    wrote: int
    usage: bool
    logprobs: list[dict[str, Any]] | None = None


def question_of(path: str, request: dict[str, Any]) -> tuple[str, str, int]:
    """(system prompt, last user message, input tokens) of a request in the protocol of `path`."""
    if path.endswith("/responses"):
        system, messages = request["instructions"], request["input"]
        said: list[Any] = [system, messages]
    elif path.endswith("/chat/completions"):
        messages = request["messages"]
        system = messages[0]["content"]
        said = [messages]
    else:
        system, messages = request["system"], request["messages"]
        if isinstance(system, list):
            system = "".join(block["text"] for block in system)
        said = [system, messages]
    return system, messages[-1]["content"], sum(len(json.dumps(part)) for part in said) // 4


def render(path: str, said: Said) -> dict[str, Any]:
    """The answer in the protocol of `path`."""
    if path.endswith("/responses"):
        return _response(said)
    return _completion(said) if path.endswith("/chat/completions") else _message(said)


def _completion(said: Said) -> dict[str, Any]:
    refused = said.finish == "refusal"
    message = {
        "role": "assistant",
        "content": None if refused else said.text,
        "refusal": said.text if refused else None,
    }
    finish = {"length": "length", "filter": "content_filter"}.get(said.finish, "stop")
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 0,
        "model": said.model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish, "logprobs": {"content": said.logprobs}}],
    }
    details = {"cached_tokens": said.cached}
    usage = {"prompt_tokens": said.read, "completion_tokens": said.wrote, "prompt_tokens_details": details}
    return answer | ({"usage": usage | {"total_tokens": said.read + said.wrote}} if said.usage else {})


def _response(said: Said) -> dict[str, Any]:
    refused = said.finish == "refusal"
    part = {"type": "refusal", "refusal": said.text} if refused else {"type": "output_text", "text": said.text}
    part |= {} if said.logprobs is None else {"logprobs": said.logprobs}
    reason = {"length": "max_output_tokens", "filter": "content_filter"}.get(said.finish)
    answer: dict[str, Any] = {
        "id": "resp_1",
        "object": "response",
        "created_at": 0,
        "model": said.model,
        "status": "incomplete" if reason else "completed",
        "incomplete_details": {"reason": reason} if reason else None,
        "error": None,
        "output": [
            {"type": "reasoning", "id": "rs_1", "summary": []},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": [part]},
        ],
    }
    usage = {
        "input_tokens": said.read,
        "input_tokens_details": {"cached_tokens": said.cached},
        "output_tokens": said.wrote,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": said.read + said.wrote,
    }
    return answer | ({"usage": usage} if said.usage else {})


def _message(said: Said) -> dict[str, Any]:
    finish = {"length": "max_tokens", "refusal": "refusal", "filter": "refusal"}.get(said.finish, "end_turn")
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": said.model,
        "content": [{"type": "text", "text": said.text}],
        "stop_reason": finish,
        "stop_sequence": None,
    }
    usage = {
        "input_tokens": said.read - said.cached,
        "cache_read_input_tokens": said.cached,
        "output_tokens": said.wrote,
    }
    return answer | ({"usage": usage} if said.usage else {})
