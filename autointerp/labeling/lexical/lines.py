"""A walk from left to right: words, lines, indentation and brackets, as far as a window shows them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autointerp.labeling.lexical import lexer
from autointerp.labeling.lexical.tokens import traits


@dataclass(slots=True)
class Lines:
    """What a walk from left to right finds, one entry per position; None where it does not apply or is not known."""

    word: list[str | None]
    previous_word: list[str | None]
    line_start: list[str | None]
    line_place: list[str | None]
    indent: list[str | None]
    above_start: list[str | None]
    above_end: list[str | None]
    inside: list[tuple[str, ...]]


def walk(windows: Sequence[Sequence[str]], starts: Sequence[int | None]) -> Lines:
    """Walks all windows; `starts` as in Reading."""
    found = Lines([], [], [], [], [], [], [], [])
    for window, start in zip(windows, starts, strict=True):
        _walk_window(window, start == 0, found)
    return found


def _walk_window(window: Sequence[str], at_document_start: bool, found: Lines) -> None:
    state = lexer.START
    word, previous_word = "", None
    line_start, above_start, above_end, last_visible = None, None, None, None
    visible, indent = (0, 0) if at_document_start else (-1, -1)  # −1: the window begins in mid-line
    for token in window:
        t = traits(token)
        found.inside.append(lexer.places(state))
        state = lexer.step(state, token)
        if word and not t.starts_in_word:
            previous_word = word
        found.previous_word.append(previous_word.casefold() if previous_word else None)
        word = word + t.tail if t.starts_in_word and len(t.tail) == len(token) else t.tail
        found.word.append(word or None)
        found.line_start.append(line_start)
        found.above_start.append(above_start)
        found.above_end.append(above_end)
        found.line_place.append(_place(visible) if t.core else None)
        head, newline, rest = token.rpartition("\n")
        if t.core and not newline and visible == 0:
            indent += len(token) - len(token.lstrip())
        if newline:
            if line_start is not None or visible > 0 or head.strip():
                above_start, above_end = line_start or head.strip().casefold() or None, last_visible
            line_start, visible, indent = None, 0, len(rest) - len(rest.lstrip())
            if rest.strip():
                line_start, visible = rest.strip().casefold(), 1
        elif not t.core:
            indent += len(token) if visible == 0 else 0
        elif visible >= 0:
            line_start = line_start if visible else t.core.casefold()
            visible += 1
        found.indent.append(_depth(indent) if indent >= 0 else None)
        last_visible = t.core.casefold() or last_visible


def _place(visible: int) -> str | None:
    if visible < 0:
        return None
    return ("first", "second", "third")[visible] if visible < 3 else "later"


def _depth(width: int) -> str:
    if width <= 0:
        return "none"
    return "1–4" if width <= 4 else "5–8" if width <= 8 else "9 or more"
