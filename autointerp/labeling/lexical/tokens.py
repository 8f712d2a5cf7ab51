"""What one token looks like: its core, its class, and how it is written for a reader."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

OPENERS = "([{"
CLOSERS = ")]}"
_VISIBLE_CONTROLS = {"\n": "⏎", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True, slots=True)
class Traits:
    """Properties of a token that do not depend on its neighbours."""

    core: str
    """The token without surrounding whitespace; empty for whitespace."""
    classes: tuple[str, ...]
    starts_in_word: bool
    """The first character is a letter, a digit or an underscore: it goes on with a word that was left open."""
    ends_in_word: bool
    ends_lower: bool
    newlines: int
    tail: str
    """The run of word characters that the token ends in."""


def is_word_character(character: str) -> bool:
    return character.isalnum() or character == "_"


@lru_cache(maxsize=1 << 17)
def traits(token: str) -> Traits:
    """Traits of a decoded token; any string is allowed, the empty one too."""
    core = token.strip()
    cut = len(token)
    while cut and is_word_character(token[cut - 1]):
        cut -= 1
    return Traits(
        core=core,
        classes=tuple(_classes(token, core)),
        starts_in_word=bool(token) and is_word_character(token[0]),
        ends_in_word=bool(token) and is_word_character(token[-1]),
        ends_lower=bool(token) and token[-1].islower(),
        newlines=token.count("\n"),
        tail=token[cut:],
    )


def _classes(token: str, core: str) -> list[str]:
    found = []
    if not core:
        found.append("newline" if "\n" in token else "blank")
        if token.count("\n") > 1:
            found.append("blank line")
        return found
    if "\n" in token:
        found.append("newline")
    if core.isdigit():
        found.append("digits")
    elif any(c.isdigit() for c in core) and core.isalnum():
        found.append("letters with digits")
    if not any(is_word_character(c) for c in core):
        found.append("punctuation")
        for name, members in (("opening bracket", OPENERS), ("closing bracket", CLOSERS), ("quote", "'\"`“”‘’«»")):
            if any(c in members for c in core):
                found.append(name)
        if core[-1] in ".!?":
            found.append("sentence end")
    if core.strip("_") == "":
        found.append("underscore")
    if core[0].isupper():
        found.append("capital start")
    letters = core.replace("_", "")
    if letters.isalpha():
        found += _casing(letters)
        if token[0] == " ":
            found.append("spaced word")
    if not core.isascii():
        found.append("non-ASCII")
    return found


def _casing(letters: str) -> list[str]:
    found = ["letters"]
    if len(letters) == 1:
        found.append("single letter")
    if letters.islower():
        found.append("lower case")
    elif letters.isupper() and len(letters) > 1:
        found.append("ALL CAPS")
    elif letters[0].isupper() and letters[1:].islower():
        found.append("Capitalised")
    elif letters.isupper():
        found.append("capital letter")
    return found


def visible(text: str) -> str:
    """`text` on one line: newlines and tabs as symbols, other control characters escaped."""
    return "".join(
        _VISIBLE_CONTROLS.get(c) or (c if c.isprintable() else c.encode("unicode_escape").decode()) for c in text
    )


def quote(token: str) -> str:
    """A token in backticks; whitespace-only tokens show their spaces: `⏎`, `␣×8`, ` def`."""
    if not token:
        return "the empty token"
    shown = visible(token)
    if not token.strip():
        lead, spaces = shown.rstrip(" "), len(shown) - len(shown.rstrip(" "))
        shown = lead + ("␣×" + str(spaces) if spaces > 3 else "␣" * spaces)
    return f"`` {shown} ``" if "`" in shown else f"`{shown}`"


def quote_some(tokens: list[str], limit: int) -> str:
    """ "`a`, `b` or `c`"; beyond `limit` tokens the rest is an ellipsis."""
    shown = [quote(t) for t in tokens[:limit]]
    if len(tokens) > limit:
        return ", ".join(shown) + "…"
    return shown[0] if len(shown) == 1 else ", ".join(shown[:-1]) + " or " + shown[-1]
