"""What a token costs: a dated list that the user can override. A model not in it has no price, not a price of 0."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from autointerp.errors import InputError

BATCH_SHARE = 0.5
"""What a call in a batch costs of the price of one by itself, at OpenAI and Anthropic alike."""
PRICES_VARIABLE = "AUTOINTERP_PRICES"
_VERSION_SUFFIX = re.compile(r"-(latest|\d{8}|\d{4}-\d{2}-\d{2})$")


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float
    cached: float
    cache_write: float

    def usd(self, input_tokens: int, output_tokens: int, cached_tokens: int = 0, cache_write_tokens: int = 0) -> float:
        """Dollars of one call; `input_tokens` includes the cached and the written ones."""
        plain = input_tokens - cached_tokens - cache_write_tokens
        return (
            plain * self.input
            + cached_tokens * self.cached
            + cache_write_tokens * self.cache_write
            + output_tokens * self.output
        ) / 1e6

    def usd_at_most(self, input_tokens: int, output_tokens: int) -> float:
        """Dollars of one call whichever way its input is counted."""
        dearest = max(self.input, self.cached, self.cache_write)
        return (input_tokens * dearest + output_tokens * self.output) / 1e6


def find_price(model: str, path: Path | None = None) -> Price | None:
    """The price of `model` in the file at `path` (or $AUTOINTERP_PRICES), else in the package's list; None in neither.

    A dated version (`…-2026-01-31`, `…-20260131`, `…-latest`) has the price of its model unless it is listed itself.
    """
    models = _models(
        resources.files("autointerp.labeling.llm").joinpath("prices.json").read_text("utf-8"), "prices.json"
    )
    own = path or os.environ.get(PRICES_VARIABLE)
    if own:
        try:
            text = Path(own).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"price file {own} cannot be read ({error}): give --prices a JSON file") from error
        models |= _models(text, str(own))
    return models.get(model) or models.get(_VERSION_SUFFIX.sub("", model))


def _models(text: str, source: str) -> dict[str, Price]:
    try:
        listed = json.loads(text)["models"]
        return {name: _price(entry) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"price file {source} is not understood ({error!r}): write "
            '{"models": {"MODEL": {"input": 0.1, "output": 0.5}}}, in dollars per million tokens'
        ) from error


def _price(entry: dict[str, Any]) -> Price:
    base, output = float(entry["input"]), float(entry["output"])
    price = Price(base, output, float(entry.get("cached", base)), float(entry.get("cache_write", base)))
    if not min(price.input, price.output, price.cached, price.cache_write) >= 0:
        raise ValueError("a price is below 0")
    return price
