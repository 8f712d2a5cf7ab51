"""The seam between the engine and an SDK: one question, one answer, and every fault classified."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol

from autointerp.errors import InputError
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.faults import Retry, from_status
from autointerp.labeling.llm.logprobs import Spoken
from autointerp.labeling.llm.prices import Price, find_price

if TYPE_CHECKING:
    from types import ModuleType

    from autointerp.labeling.llm.batch_api import BatchApi

KEY_VARIABLES = {"openai": ("OPENAI_API_KEY",), "anthropic": ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")}
_LOCAL_KEY = "local-server-needs-none"


@dataclass(frozen=True)
class Request:
    """One question. What never changes (instructions, format, examples) is in `system`, so that it can be cached."""

    system: str
    user: str
    schema_name: str
    schema: Mapping[str, Any] = field(hash=False)
    """JSON schema of the answer."""
    max_output_tokens: int
    template_sha256: str
    turns: tuple[tuple[Literal["assistant", "user"], str], ...] = ()
    """What was said after `user`: an answer that did not fit the schema, and what was wrong with it."""
    top_logprobs: int = 0
    """So many of the most probable tokens are wanted in each place of the answer, where the server tells them."""

    def sha256(self, provider: Provider) -> str:
        """Identity of the question: two requests with one digest get one answer."""
        parts = [
            provider.name,
            provider.endpoint,
            provider.model,
            self.system,
            self.user,
            self.schema_name,
            self.schema,
        ]
        parts += [self.max_output_tokens, self.template_sha256, self.turns]
        parts += [provider.parameters] if provider.parameters else []
        parts += [self.top_logprobs] if self.top_logprobs else []
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def prompt_sha256(self) -> str:
        """Digest of the rendered prompt alone: labels.prompt_sha256."""
        return hashlib.sha256(json.dumps([self.system, self.user]).encode()).hexdigest()

    def messages(self) -> list[dict[str, str]]:
        """Turns after the system prompt."""
        return [{"role": "user", "content": self.user}, *({"role": r, "content": c} for r, c in self.turns)]

    def n_bytes(self) -> int:
        """Of all that is read: prompt, schema and earlier turns."""
        texts = [self.system, self.user, json.dumps(self.schema), *(text for _, text in self.turns)]
        return sum(len(text.encode()) for text in texts)

    def input_tokens_at_most(self) -> int:
        """No tokeniser makes more tokens than bytes; the chat format is counted too."""
        return self.n_bytes() + 16 * (2 + len(self.turns)) + 256

    def with_room(self, max_output_tokens: int) -> Request:
        return replace(self, max_output_tokens=max_output_tokens)

    def with_turns(self, *turns: tuple[Literal["assistant", "user"], str]) -> Request:
        return replace(self, turns=self.turns + turns)


@dataclass(frozen=True)
class Planned:
    """A question that would be asked, and the length of the answer that it would get."""

    request: Request
    output_tokens: int
    certain: bool = True
    """False for one that some answers to earlier questions make needless."""


@dataclass(frozen=True)
class Answer:
    """What came back, and what it used. Token counts are None when the server did not say."""

    text: str
    input_tokens: int | None
    """Includes cached and cache-written ones, whichever way the provider counts."""
    cached_tokens: int
    output_tokens: int | None
    finish: Literal["stop", "length", "refusal"]
    model: str
    cache_write_tokens: int = 0
    http_status: int = 200
    spoken: Sequence[Spoken] = ()
    """Its tokens with their alternatives, where they were asked for and the server told them."""


class Provider(Protocol):
    """One model at one endpoint."""

    name: str
    """`openai` or `anthropic`."""
    model: str
    endpoint: str
    price: Price | None
    parameters: str
    """What else an answer depends on, where it is not the usual: part of the identity of a question."""

    def load(self) -> None:
        """Do what takes its time before the first call: then `complete` sends at once."""
        ...

    async def complete(self, request: Request) -> Answer:
        """One attempt, within the deadline. Raises a Fault; never retries by itself."""
        ...

    def adapt(self, parameter: str) -> None:
        """Leave out a parameter that the server does not know, from now on."""
        ...

    async def aclose(self) -> None: ...


def cache_key(request: Request) -> str:
    """OpenAI's `prompt_cache_key`: questions that begin alike go to the machine that has the beginning."""
    return f"autointerp-{request.template_sha256[:16]}"


def check_provider(name: str, model: str, settings: LabelingSettings) -> None:
    """InputError when there is no key, or a budget but no price."""
    _key(name)
    if find_price(model, settings.prices_path) is None and settings.max_usd is not None:
        raise InputError(
            f"--max-usd needs the price of {model}, which is not listed: give --prices FILE with "
            f'{{"models": {{"{model}": {{"input": 0.1, "output": 0.5}}}}}} in dollars per million tokens'
        )


def make_provider(name: str, model: str, settings: LabelingSettings) -> Provider:
    """The provider `name`, with the key and endpoint of its SDK's own variables. InputError as `check_provider`."""
    check_provider(name, model, settings)
    key, price = _key(name), find_price(model, settings.prices_path)
    if name == "anthropic":
        from autointerp.labeling.llm.anthropic import AnthropicProvider

        return AnthropicProvider(model, key, price, settings.timeout_s)
    from autointerp.labeling.llm.openai import OpenAIProvider

    return OpenAIProvider(model, key, price, settings.timeout_s, settings.api)


def batches_of(provider: Provider) -> BatchApi:
    """The batch endpoint beside the one that answers at once."""
    from autointerp.labeling.llm import batch_api
    from autointerp.labeling.llm.anthropic import AnthropicProvider
    from autointerp.labeling.llm.openai import OpenAIProvider

    if isinstance(provider, AnthropicProvider):
        return batch_api.AnthropicBatches(provider)
    if isinstance(provider, OpenAIProvider):
        return batch_api.OpenAIBatches(provider)
    raise TypeError(f"{type(provider).__name__} has no batches")


def _key(name: str) -> str:
    for variable in KEY_VARIABLES[name]:
        if key := os.environ.get(variable, "").strip():
            return key
    if name == "openai" and os.environ.get("OPENAI_BASE_URL"):
        return _LOCAL_KEY
    raise InputError(
        f"labeler {name}:… needs a key: set {KEY_VARIABLES[name][0]}"
        + (" (or OPENAI_BASE_URL for a local server)" if name == "openai" else "")
        + ", or use --labeler lexical, which needs none"
    )


def from_sdk(sdk: ModuleType, error: Exception, optional: tuple[str, ...], key: str) -> Exception:
    """The Fault behind an SDK's exception; both SDKs name them alike. What is not the SDK's comes back as it is.

    `key` is taken out of what the server says.
    """
    import httpx2

    if isinstance(error, sdk.APIStatusError):
        response: Any = vars(error)["response"]
        return from_status(response.status_code, response.headers, _text(response).replace(key, "[key]"), optional)
    if isinstance(error, TimeoutError | sdk.APITimeoutError):
        sent = not isinstance(error.__cause__, httpx2.ConnectTimeout | httpx2.PoolTimeout)
        return Retry("no answer within the deadline", "network", billable=sent)
    if isinstance(error, sdk.APIConnectionError | httpx2.HTTPError):
        cause = error.__cause__ or error
        sent = not isinstance(cause, httpx2.ConnectError)
        return Retry(f"connection failed: {type(cause).__name__}", "network", billable=sent)
    return error


def decode(body: str, http_status: int) -> dict[str, Any]:
    """The JSON object of a 2xx body. Retry (garbage) for anything else: the work may have been done and charged."""
    try:
        decoded = json.loads(body)
    except ValueError:
        raise garbage("an empty body" if not body.strip() else "something that is not JSON", http_status) from None
    if not isinstance(decoded, dict) or decoded.get("error"):
        raise garbage("an error inside", http_status)
    return decoded


def garbage(what: str, http_status: int) -> Retry:
    """A 2xx answer that says nothing: the work may have been done and charged."""
    return Retry(f"HTTP {http_status} with {what}", "garbage", http_status=http_status, billable=True)


def count(usage: Any, name: str) -> int | None:
    """A token count of a usage object; None when it is missing or not one."""
    value = usage.get(name) if isinstance(usage, dict) else None
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _text(response: Any) -> str:
    try:
        return response.text
    except Exception as error:  # the body of an error answer may itself be broken off; its status is what counts
        return type(error).__name__
