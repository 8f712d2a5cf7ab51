"""The tokens of an answer with what else could have stood in their places, where a server says so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Spoken = Sequence[Any]
"""(text of one token, ((alternative, its log-probability), …), itself among them): lists when read back from JSON."""

LEAST = math.log(1e-4)
"""Alternatives below are dropped: they move an expected digit by less than a thousandth."""


def read_tokens(content: Any) -> tuple[Spoken, ...]:
    """The tokens in a list as both of OpenAI's APIs give it; empty for anything else."""
    if not isinstance(content, list):
        return ()
    tokens: list[Spoken] = []
    for item in content:
        alternatives = item.get("top_logprobs") if isinstance(item, dict) else None
        if not isinstance(alternatives, list) or not isinstance(item.get("token"), str):
            return ()
        found = [(other.get("token"), other.get("logprob")) for other in alternatives if isinstance(other, dict)]
        kept = [(text, p) for text, p in found if isinstance(text, str) and isinstance(p, int | float) and p >= LEAST]
        tokens.append((item["token"], tuple(kept)))
    return tuple(tokens)


def expected_digits(tokens: Sequence[Spoken]) -> dict[int, float]:
    """Expected value of each digit in the joined text of `tokens`, by its place there.

    Σ p·digit / Σ p over those alternatives that are a digit where the token is one. A token that is more than a digit
    and the comma, bracket or space before it has none.
    """
    found: dict[int, float] = {}
    at = 0
    for text, alternatives in tokens:
        if _digit(text) is not None:
            weights = [(digit, math.exp(p)) for other, p in alternatives if (digit := _digit(other)) is not None]
            total = sum(p for _, p in weights)
            if total > 0:
                found[at + len(text.rstrip()) - 1] = sum(digit * p for digit, p in weights) / total
        at += len(text)
    return found


def _digit(token: str) -> int | None:
    token = token.strip(" \t\n[,")
    return int(token) if len(token) == 1 and token.isascii() and token.isdigit() else None
