"""What can go wrong with a call, and the one right answer to each: retry, give up this latent, or stop the provider.

Messages never hold a key, a header or a request: they go into the store and onto the terminal.
"""

from __future__ import annotations

import json
import re
from asyncio import Future
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal

from autointerp.errors import AutointerpError

RetryKind = Literal["limit", "server", "network", "garbage", "adapt"]

_KEY_LIKE = re.compile(r"\b(?:sk|pk)-[\w*.…-]{4,}", re.IGNORECASE)
_QUOTA = re.compile(
    r"insufficient_quota|billing|credit balance|quota.{0,20}exceeded|exceeded.{0,30}quota", re.IGNORECASE
)
_TOO_LONG = re.compile(r"context.?(length|window)|too long|too large|maximum.{0,20}tokens", re.IGNORECASE)
_FILTERED = re.compile(r"content_filter|content management policy|content_policy", re.IGNORECASE)


class Fault(Exception):
    """Base. `http_status` as the server sent it; `billable` when the provider may have done, and charged, the work."""

    def __init__(self, message: str, *, http_status: int | None = None, billable: bool = False):
        super().__init__(scrub(message))
        self.http_status = http_status
        self.billable = billable


class Retry(Fault):
    """Worth asking again. `wait_s` is what the server asked for, uncapped; None when it did not say."""

    def __init__(self, message: str, kind: RetryKind, *, wait_s: float | None = None, **known: Any):
        super().__init__(message, **known)
        self.kind: RetryKind = kind
        self.wait_s = wait_s
        self.settled: Future[None] | None = None
        """The commit of what the attempt cost, where there was one."""


class Terminal(Fault):
    """This question gets no answer; the others may. `too_long` when a shorter one might."""

    def __init__(
        self, message: str, *, status: Literal["refused", "failed"] = "failed", too_long: bool = False, **known: Any
    ):
        super().__init__(message, **known)
        self.status: Literal["refused", "failed"] = status
        self.too_long = too_long


class Stop(Fault):
    """No question to this provider will get an answer: key, quota, retired model."""


class Interrupted(AutointerpError):
    """The engine takes no new questions: it is draining what is in flight."""

    exit_status = 130


def scrub(message: str) -> str:
    """One line of at most 300 characters, without anything that looks like a key."""
    message = _KEY_LIKE.sub("[key]", message)
    return " ".join("".join(c if c.isprintable() else " " for c in message).split())[:300]


def from_status(status: int, headers: Mapping[str, str], body: str, optional: tuple[str, ...] = ()) -> Fault:
    """The fault of an answer outside 2xx.

    `optional` are the request's dispensable parameters: when a 400 names one, the call is worth repeating without it,
    and the fault is a Retry of kind `adapt` whose message is that parameter's name.
    """
    message = f"HTTP {status}: {error_message(body)}"
    if status == 429 and not _QUOTA.search(_codes(body)):
        return Retry(message, "limit", wait_s=retry_after(headers), http_status=status)
    if status == 404 and "v1/responses" in optional and "v1/responses" in body:
        return Retry("v1/responses", "adapt", http_status=status)
    named = next((name for name in optional if name.casefold() in body.casefold()), None)
    if status == 403 and named == "logprobs":  # some models answer, but do not tell these
        return Retry(named, "adapt", http_status=status)
    if status in (401, 402, 403, 404) or (status in (400, 429) and _QUOTA.search(body)):
        return Stop(message, http_status=status)
    if status >= 500 or status in (408, 409, 425):
        return Retry(message, "server", wait_s=retry_after(headers), http_status=status)
    if status in (400, 422):
        if named and not _TOO_LONG.search(body):
            return Retry(named, "adapt", http_status=status)
        if _FILTERED.search(body):
            return Terminal(message, status="refused", http_status=status)
    return Terminal(message, too_long=status == 413 or bool(_TOO_LONG.search(body)), http_status=status)


def error_message(body: str) -> str:
    """What an error body says, whatever its shape."""
    try:
        error = json.loads(body)
    except ValueError:
        return re.sub(r"<[^>]*>", " ", body) or "empty body"
    error = error.get("error", error) if isinstance(error, dict) else error
    if isinstance(error, dict):
        error = ": ".join(str(error[k]) for k in ("code", "type", "message") if error.get(k)) or error
    return str(error)


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds to wait, from retry-after-ms or Retry-After (seconds or a date); None when the server does not say."""
    try:
        return max(0.0, float(headers["retry-after-ms"]) / 1000)
    except (KeyError, ValueError):
        pass
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return None
    when = when if when.tzinfo else when.replace(tzinfo=UTC)
    return max(0.0, (when - (now or datetime.now(UTC))).total_seconds())


def _codes(body: str) -> str:
    """The machine-readable part of an error: a 429 whose prose mentions quota may still be an ordinary limit."""
    try:
        error = json.loads(body).get("error")
        return f"{error.get('code')} {error.get('type')}"
    except (ValueError, AttributeError):
        return ""
