"""What the terminal may be sent: a console that keeps to NO_COLOR, and text from a corpus or a model made harmless."""

from __future__ import annotations

import os
import unicodedata
from typing import IO

from rich.console import Console

_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\x7f": "␡"}
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def console(file: IO[str] | None = None, *, stderr: bool = False, width: int | None = None) -> Console:
    """A console without highlighting or markup; without any escape sequence off a terminal and under NO_COLOR."""
    # rich alone takes NO_COLOR to mean colours, and would still send bold and dim.
    system = None if os.environ.get("NO_COLOR") else "auto"
    return Console(
        file=file, stderr=stderr, width=width, color_system=system, highlight=False, markup=False, emoji=False
    )


def visible(text: str) -> str:
    r"""`text` with line breaks as ⏎ and every control, format or unassigned character spelled out.

    Corpus text and answers of a model go through here before they reach a terminal: no escape sequence, no change of
    the writing direction, nothing invisible survives.

    >>> visible("a\n\x1b[2J")
    'a⏎␛[2J'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible_character(c) for c in text)


def _visible_character(c: str) -> str:
    if c in _VISIBLE:
        return _VISIBLE[c]
    if unicodedata.category(c) not in _INVISIBLE:
        return c
    if ord(c) < 0x20:
        return chr(0x2400 + ord(c))
    return f"\\u{ord(c):04x}" if ord(c) < 0x10000 else f"\\U{ord(c):08x}"
