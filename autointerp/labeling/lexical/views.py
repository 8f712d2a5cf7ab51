"""Views: what stands at every position, and what stood before it.

A view maps each position to the values that hold there (`token` at −1: the previous token; `near`: all words of the
last eight tokens). A latent of a causal model sees only what is to the left, and so do the views: none looks ahead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from autointerp.labeling.lexical.reading import Reading

NEAR = 8
TEXTURE = 8


@dataclass(frozen=True, slots=True)
class Values:
    """A view, sparse: value `names[value[k]]` holds at position `position[k]`."""

    position: np.ndarray
    value: np.ndarray
    names: list
    exclusive: bool
    """At most one value holds at a position."""


def view(reading: Reading, name: str, at: int = 0) -> Values:
    """The view `name` of a reading, shifted by `at` ≤ 0 tokens; worked out once. KeyError for an unknown name."""
    key = (name, at)
    if key not in reading.views:
        reading.views[key] = _shift(reading, VIEWS[name](reading), at)
    return reading.views[key]


def _shift(reading: Reading, values: Values, at: int) -> Values:
    """The same view read `-at` tokens earlier, within the window."""
    if not at:
        return values
    position = values.position - at
    inside = position < len(reading)
    position, value = position[inside], values.value[inside]
    same = reading.index[position] >= -at
    return Values(position[same], value[same], values.names, values.exclusive)


def _single(entries: Sequence[Hashable | None]) -> Values:
    names: dict[Hashable, int] = {}
    pairs = [(i, names.setdefault(e, len(names))) for i, e in enumerate(entries) if e is not None]
    return _values(pairs, list(names), exclusive=True)


def _several(entries: Sequence[Iterable[Hashable]]) -> Values:
    names: dict[Hashable, int] = {}
    pairs = [(i, names.setdefault(e, len(names))) for i, several in enumerate(entries) for e in several]
    return _values(pairs, list(names), exclusive=False)


def _values(pairs: list[tuple[int, int]], names: list, exclusive: bool) -> Values:
    table = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Values(table[:, 0], table[:, 1], names, exclusive)


def _by_token(reading: Reading, per_token: Sequence[Sequence[Hashable]]) -> Values:
    """A view of several values that depends on the token alone: worked out once per distinct token."""
    names: dict[Hashable, int] = {}
    listed = [[names.setdefault(v, len(names)) for v in values] for values in per_token]
    counts = np.array([len(v) for v in listed], dtype=np.int64)
    flat = np.array([v for values in listed for v in values], dtype=np.int64)
    begin = np.cumsum(counts) - counts
    repeats = counts[reading.ids] if len(reading) else np.zeros(0, dtype=np.int64)
    position = np.repeat(np.arange(len(reading)), repeats)
    offset = np.arange(len(position)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
    value = flat[begin[reading.ids[position]] + offset] if len(position) else position
    return Values(position, value, list(names), exclusive=False)


def _from_ids(ids: np.ndarray, names: list, exclusive: bool = True) -> Values:
    position = np.flatnonzero(ids >= 0)
    return Values(position, ids[position], names, exclusive)


def _tokens(reading: Reading) -> Values:
    return _from_ids(reading.ids, reading.vocabulary)


def _core_ids(reading: Reading, steps: int = 0) -> np.ndarray:
    """Core id of the token `steps` before; −1 for whitespace and beyond the window."""
    ids, _ = reading.cores
    back = reading.back(steps)
    return np.where(back >= 0, ids[back], -1) if len(reading) else back


def _cores(reading: Reading) -> Values:
    return _from_ids(_core_ids(reading), reading.cores[1])


def _ngrams(length: int) -> Callable[[Reading], Values]:
    def view(reading: Reading) -> Values:
        size, whole = len(reading.vocabulary) + 1, np.zeros(len(reading), dtype=np.int64)
        complete = reading.index >= length - 1
        for step in range(length - 1, -1, -1):
            whole = whole * size + reading.back(step)
        position = np.flatnonzero(complete)
        keys, value = np.unique(whole[position], return_inverse=True)
        names = [tuple(reading.vocabulary[key // size**k % size] for k in range(length - 1, -1, -1)) for key in keys]
        return Values(position, value.reshape(-1), names, exclusive=True)

    return view


def _classes(reading: Reading) -> Values:
    """Classes of the token alone, and how it joins the one before: `word start`, `continuation`, `camelCase piece`."""
    alone = _by_token(reading, [t.classes for t in reading.traits])
    back = reading.back(1)
    starts, ends, lower = (
        reading.of_tokens(f) for f in (lambda t: t.starts_in_word, lambda t: t.ends_in_word, lambda t: t.ends_lower)
    )
    visible = reading.of_tokens(lambda t: bool(t.core))
    capital = reading.of_tokens(lambda t: t.core[:1].isupper())
    after_word = np.zeros(len(reading), dtype=bool)
    after_lower = np.zeros(len(reading), dtype=bool)
    after_word[1:], after_lower[1:] = ends[:-1], lower[:-1]
    after_word &= back >= 0
    joined = starts & after_word
    extra = {
        "continuation": joined,
        "word start": visible & ~joined & reading.of_tokens(lambda t: t.core[:1].isalpha()),
        "camelCase piece": joined & after_lower & capital,
    }
    position, value, names = [alone.position], [alone.value], list(alone.names)
    for name, holds in extra.items():
        position.append(np.flatnonzero(holds))
        value.append(np.full(len(position[-1]), len(names)))
        names.append(name)
    return Values(np.concatenate(position), np.concatenate(value), names, exclusive=False)


def _prefixes(reading: Reading) -> Values:
    cores = [t.core for t in reading.traits]
    return _by_token(reading, [[c[:n] for n in (2, 3, 4) if len(c) >= n and c[:n].isalpha()] for c in cores])


def _suffixes(reading: Reading) -> Values:
    cores = [t.core for t in reading.traits]
    return _by_token(reading, [[c[-n:] for n in (1, 2, 3) if len(c) >= max(2, n) and c[-n:].isalpha()] for c in cores])


def _word_prefixes(reading: Reading) -> Values:
    words = reading.lines.word
    return _several([[w[:n] for n in (3, 4, 5, 6, 8) if len(w) > n] if w else () for w in words])


def _near(reading: Reading) -> Values:
    ids = np.concatenate([_core_ids(reading, k) for k in range(1, NEAR + 1)])
    position = np.tile(np.arange(len(reading)), NEAR)[ids >= 0]
    names = reading.cores[1]
    keys = np.unique(position * max(1, len(names)) + ids[ids >= 0])
    return Values(keys // max(1, len(names)), keys % max(1, len(names)), names, exclusive=False)


def _line_words(reading: Reading) -> Values:
    """Words earlier on the same line; a line that the window cuts counts from the window's edge."""
    breaks = reading.of_tokens(lambda t: t.newlines > 0)
    ids = reading.cores[0]
    entries: list[tuple[int, ...]] = []
    seen: dict[int, None] = {}
    for i in range(len(reading)):
        if reading.index[i] == 0:
            seen = {}
        entries.append(tuple(seen))
        if breaks[i]:
            seen = {}
        elif (core := int(ids[reading.ids[i]])) >= 0:
            seen[core] = None
    pairs = [(i, core) for i, several in enumerate(entries) for core in several]
    return _values(pairs, reading.cores[1], exclusive=False)


def _document_start(reading: Reading) -> Values:
    start = np.array([-1 if s is None else s for s in reading.starts], dtype=np.int64)
    begin = start[reading.window] if len(reading) else start[:0]
    absolute = np.where(begin >= 0, begin + reading.index, -1)
    names = [1, 4, 16, 64]
    pairs = [np.flatnonzero((absolute >= 0) & (absolute < n)) for n in names]
    value = np.repeat(np.arange(len(names)), [len(p) for p in pairs])
    return Values(np.concatenate(pairs), value, names, exclusive=False)


def _repeats(reading: Reading) -> Values:
    """`seen`: this token stood earlier in the window; `copy`: so did the pair of it and the one before."""
    found: list[tuple[str, ...]] = []
    for window in reading.windows:
        tokens: set[str] = set()
        pairs: set[tuple[str, str]] = set()
        previous = None
        for token in window:
            here = []
            if token in tokens and token.strip():
                here.append("seen")
            if previous is not None and (previous, token) in pairs:
                here.append("copy")
            found.append(tuple(here))
            tokens.add(token)
            if previous is not None:
                pairs.add((previous, token))
            previous = token
    return _several(found)


def _texture(reading: Reading) -> Values:
    """What most of the last eight tokens are: `words`, `punctuation`, `whitespace`."""
    kinds = {
        "words": reading.of_tokens(lambda t: "letters" in t.classes),
        "punctuation": reading.of_tokens(lambda t: "punctuation" in t.classes),
        "spaced words": reading.of_tokens(lambda t: "spaced word" in t.classes),
    }
    need = {"words": 7, "punctuation": 4, "spaced words": 5}
    position, value = [], []
    for k, (name, holds) in enumerate(kinds.items()):
        total = np.concatenate([[0], np.cumsum(holds)])
        here = np.arange(len(reading))
        count = total[here] - total[here - np.minimum(reading.index, TEXTURE)]
        position.append(np.flatnonzero(count >= need[name]))
        value.append(np.full(len(position[-1]), k))
    return Values(np.concatenate(position), np.concatenate(value), list(kinds), exclusive=False)


VIEWS: dict[str, Callable[[Reading], Values]] = {
    "token": _tokens,
    "core": _cores,
    "bigram": _ngrams(2),
    "trigram": _ngrams(3),
    "class": _classes,
    "prefix": _prefixes,
    "suffix": _suffixes,
    "word": lambda r: _single(r.lines.word),
    "word_prefix": _word_prefixes,
    "previous_word": lambda r: _single(r.lines.previous_word),
    "near": _near,
    "line": _line_words,
    "line_start": lambda r: _single(r.lines.line_start),
    "line_place": lambda r: _single(r.lines.line_place),
    "indent": lambda r: _single(r.lines.indent),
    "above_start": lambda r: _single(r.lines.above_start),
    "above_end": lambda r: _single(r.lines.above_end),
    "inside": lambda r: _several(r.lines.inside),
    "document_start": _document_start,
    "repeat": _repeats,
    "texture": _texture,
}
