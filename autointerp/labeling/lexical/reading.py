"""Token windows read once: the same positions, one after another, whatever is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from autointerp.labeling.lexical.lines import Lines, walk
from autointerp.labeling.lexical.tokens import Traits, traits


class Reading:
    """The positions of several windows, one after another. [n_positions] arrays throughout.

    Args:
        windows: decoded tokens of each window; empty windows and empty tokens are allowed.
        starts: index of each window's first token in its document; None when unknown.
    """

    def __init__(self, windows: Sequence[Sequence[str]], starts: Sequence[int | None] | None = None):
        self.windows = windows
        self.starts = starts if starts is not None else [None] * len(windows)
        vocabulary: dict[str, int] = {}
        flat = [vocabulary.setdefault(token, len(vocabulary)) for window in windows for token in window]
        lengths = np.array([len(window) for window in windows], dtype=np.int64)
        self.ids = np.array(flat, dtype=np.int64)
        self.vocabulary = list(vocabulary)
        self.traits = [traits(token) for token in self.vocabulary]
        self.window = np.repeat(np.arange(len(windows)), lengths)
        first = np.repeat(np.cumsum(lengths) - lengths, lengths)
        self.index = np.arange(len(self.ids)) - first
        """Position within the window."""
        self.views: dict[tuple[str, int], Any] = {}
        """What views.py has worked out already."""

    def __len__(self) -> int:
        return len(self.ids)

    def back(self, steps: int) -> np.ndarray:
        """Vocabulary id of the token `steps` before, −1 where the window does not reach back so far."""
        if not steps:
            return self.ids
        moved = np.full(len(self), -1, dtype=np.int64)
        moved[steps:] = self.ids[:-steps]
        moved[self.index < steps] = -1
        return moved

    def of_tokens(self, per_token: Callable[[Traits], object]) -> np.ndarray:
        """A property of each token's traits, at each position."""
        return np.array([per_token(t) for t in self.traits])[self.ids] if len(self) else np.zeros(0, dtype=bool)

    @cached_property
    def cores(self) -> tuple[np.ndarray, list[str]]:
        """Per vocabulary id the id of its case-folded core (−1 for whitespace), and the cores."""
        names: dict[str, int] = {}
        ids = [names.setdefault(t.core.casefold(), len(names)) if t.core else -1 for t in self.traits]
        return np.array(ids, dtype=np.int64), list(names)

    @cached_property
    def lines(self) -> Lines:
        return walk(self.windows, self.starts)
