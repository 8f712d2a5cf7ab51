"""A small lexer for any text: inside quotes, a comment, brackets. It reads left to right and never fails."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from autointerp.labeling.lexical.tokens import CLOSERS, OPENERS, is_word_character

MAX_DEPTH = 6


class State(NamedTuple):
    """Where the text stands after some token; the start of a window counts as outside of everything."""

    quote: str = ""
    """The open quote: one character, three, or none."""
    comment: bool = False
    brackets: str = ""
    previous: str = "\n"
    """The last character, or the last two where they may become a triple quote."""


START = State()


@lru_cache(maxsize=1 << 16)
def step(state: State, token: str) -> State:
    """The state after one more token."""
    quote, comment, brackets, previous = state
    for character in token:
        if character == "\n":
            comment = False
            quote = quote if len(quote) == 3 else ""
        elif comment:
            pass
        elif quote:
            if quote == character or (len(quote) == 3 and (previous + character)[-3:] == quote):
                if len(quote) == 3:
                    previous, character = "", " "  # its last two characters do not begin another triple quote
                quote = ""
        elif (previous + character)[-3:] in ("'''", '"""'):
            quote = character * 3
        elif character in "\"'":
            quote = _opened(character, previous)
        elif character == "#" and previous[-1:].isspace():
            comment = True
        elif character in OPENERS:
            brackets = (brackets + character)[:MAX_DEPTH]
        elif character in CLOSERS:
            brackets = brackets[:-1]
        previous = (previous + character)[-2:]
    return State(quote, comment, brackets, previous)


def _opened(character: str, previous: str) -> str:
    apostrophe = character == "'" and is_word_character(previous[-1:] or " ")
    return "" if apostrophe else character


def places(state: State) -> tuple[str, ...]:
    """Names of what `state` is inside of."""
    found = []
    if state.quote:
        found.append("quotes")
    if len(state.quote) == 3:
        found.append("triple quotes")
    if state.comment:
        found.append("a comment")
    if state.brackets:
        found += ["brackets", {"(": "round brackets", "[": "square brackets", "{": "braces"}[state.brackets[-1]]]
    return tuple(found)
