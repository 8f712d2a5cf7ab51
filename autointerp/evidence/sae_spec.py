"""How a user names a dictionary, and how the libraries that train them name hook points. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

from autointerp.errors import InputError

_BLOCK = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model)\.)*(?:layers|h|blocks)\.(\d+)")
_HOOK_KEYS = ("hook_name_out", "hook_name", "hook_point")
"""A transcoder's change is read where it writes."""
_SAID = re.compile(r"\w+=[^&=#]+(?:&\w+=[^&=#]+)*")


def split_spec(spec: str | Path) -> tuple[Path, dict[str, str]]:
    """(path, said) of `path#key=value&key=value`: behind the # stands what a format does not store.

    >>> split_spec("tokenized.pt#k=15")
    (PosixPath('tokenized.pt'), {'k': '15'})

    A path that exists as it is may hold a # of its own. InputError for an ending that is no key=value.
    """
    whole = Path(spec).expanduser()
    before, mark, said = str(spec).rpartition("#")
    if not mark or whole.exists():
        return whole, {}
    if not _SAID.fullmatch(said):
        raise InputError(f"SAE {spec}: behind the # stand key=value, joined by &; e.g. --sae {before}#k=32")
    return Path(before).expanduser(), dict(pair.split("=", 1) for pair in said.split("&"))


def hook_of_module(path: str, side: str = "out") -> str | None:
    """The hook point at a Hugging Face module: TransformerLens' name for a whole block, else the module's own path.

    side: `in` for what the module reads, which has a name only for a whole block. Parts of a block keep their paths,
    since not every architecture adds what they return to the stream as it is (Gemma normalises it first).
    """
    if block := _BLOCK.fullmatch(path):
        return f"blocks.{block[1]}.hook_resid_{'pre' if side == 'in' else 'post'}"
    return path if side == "out" else None


def hook_in_config(path: Path) -> str | None:
    """The hook point in a `cfg.json` with SAELens' present or former keys; None without one, or if it is damaged."""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    places = [config, config.get("metadata")] if isinstance(config, dict) else []
    names = [place.get(key) for place in places if isinstance(place, dict) for key in _HOOK_KEYS]
    return next((name for name in names if isinstance(name, str)), None)
