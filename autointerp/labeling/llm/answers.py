"""From the text of an answer to what was asked for: JSON, possibly wrapped in prose."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_THOUGHT = re.compile(r"^\s*<think>.*?</think>", re.DOTALL)
_DECODER = json.JSONDecoder()


def read_answer(text: str, parse: Callable[[dict[str, Any]], T]) -> tuple[T, bool]:
    """What `parse` makes of the JSON object in `text`, and whether it had to be dug out of prose.

    `parse` raises ValueError for an object that does not fit. Raises ValueError, saying why, when nothing fits.
    """
    text = _THOUGHT.sub("", text)
    problem = "the answer holds no JSON object"
    for candidate in _objects(text):
        try:
            return parse(candidate), json.dumps(candidate) != _compact(text)
        except ValueError as error:
            problem = str(error)
    raise ValueError(problem)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """JSON objects in `text`, from left to right; one inside another is not looked at."""
    at = text.find("{")
    while at >= 0:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            yield value
        at = text.find("{", end)


def _compact(text: str) -> str | None:
    try:
        return json.dumps(json.loads(text))
    except (ValueError, RecursionError):
        return None
