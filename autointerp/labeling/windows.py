"""Choosing contexts for a question, and cutting them to the part that a reader needs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from autointerp.labeling.prompts import mark, quote
from autointerp.records import ACTIVATING_KINDS, Context, ContextKind, Foil, LatentEvidence, Prediction, Split

BEFORE, AFTER = 15, 6
"""Tokens shown before and after the peak."""


@dataclass(frozen=True)
class Window:
    """The tokens around the peak of a context, with the larger of the two sides' activations at each."""

    context: Context
    tokens: tuple[str, ...]
    activations: tuple[float, ...]

    @property
    def strength(self) -> float:
        return max(self.activations, default=0.0)

    @property
    def peak(self) -> int:
        """Index of the context's peak within `tokens`."""
        return min(self.context.peak, BEFORE)

    def plain(self) -> str:
        """One quoted line."""
        return quote("".join(self.tokens))

    def marked(self) -> str:
        """One quoted line, each run of firing tokens between marks."""
        return mark(self.tokens, [a > 0 for a in self.activations])

    def strengths(self, largest: float) -> str:
        """The peak of each marked run, from 1 to 10 at `largest`."""
        runs: list[float] = []
        before = 0.0
        for activation in self.activations:
            if activation > 0:
                runs = [*runs[:-1], max(runs[-1], activation)] if before > 0 else [*runs, activation]
            before = activation
        return " ".join(str(min(10, max(1, math.ceil(10 * run / largest)))) for run in runs)


def cut(context: Context) -> Window:
    """BEFORE + 1 + AFTER tokens around the peak, fewer at a document's ends."""
    shown = slice(max(0, context.peak - BEFORE), context.peak + AFTER + 1)
    pairs = zip(context.act_base, context.act_adapted, strict=True)
    activations = tuple(max(b, a, 0.0) if b == b and a == a else 0.0 for b, a in pairs)
    return Window(context, context.tokens[shown], activations[shown])


def firing_windows(evidence: LatentEvidence, split: Split, n: int, n_top: int) -> list[Window]:
    """At most `n` windows in which the latent fires: the `n_top` strongest, then a spread over the whole range.

    Each place in the corpus and each text once; in order of strength, strongest first.
    """
    top = _by_rank(evidence.of(split, "top"))[:n_top]
    spread = _by_rank(evidence.of(split, "quantile"))
    others = _by_rank(evidence.of(split, *_OTHER_KINDS))
    # When the range is thin, what is left of the top, and then the other kinds, fill up.
    left = _by_rank(evidence.of(split, "top"))[n_top:]
    wanted = [*top, *_evenly(spread, n - len(top)), *left, *spread, *others]
    firing = [window for window in _distinct(wanted) if window.strength > 0]
    return sorted(firing[:n], key=lambda window: -window.strength)


def silent_windows(evidence: LatentEvidence, split: Split, n: int) -> list[Window]:
    """At most `n` windows in which the latent does not fire: one at random, one near miss, and so on, while there are
    both; in drawing order."""
    silent = _by_rank(evidence.of(split, "silent"))
    near = [context for context in silent if context.foil]
    far = [context for context in silent if not context.foil]
    mixed = [context for pair in zip_longest(far, near) for context in pair if context is not None]
    return [window for window in _distinct(mixed) if window.strength == 0][:n]


def near_misses(evidence: LatentEvidence, split: Split, n: int, *foils: Foil) -> list[Window]:
    """At most `n` silent windows that were drawn for one of these reasons, in drawing order."""
    found = [context for context in _by_rank(evidence.of(split, "silent")) if context.foil in foils]
    return [window for window in _distinct(found) if window.strength == 0][:n]


_OTHER_KINDS: tuple[ContextKind, ...] = tuple(kind for kind in ACTIVATING_KINDS if kind not in ("top", "quantile"))


def _by_rank(contexts: Iterable[Context]) -> list[Context]:
    return sorted(contexts, key=lambda context: (context.rank, context.context_id))


def _evenly(contexts: Sequence[Context], n: int) -> list[Context]:
    """`n` of them, evenly spaced over their order, both ends among them."""
    if n <= 0 or len(contexts) <= n:
        return list(contexts[: max(0, n)])
    if n == 1:
        return [contexts[len(contexts) // 2]]
    return [contexts[round(i * (len(contexts) - 1) / (n - 1))] for i in range(n)]


def _distinct(contexts: Iterable[Context]) -> list[Window]:
    places: set[tuple[int, int]] = set()
    texts: set[tuple[str, ...]] = set()
    windows: list[Window] = []
    for context in contexts:
        window = cut(context)
        place = (context.doc, context.position)
        if place not in places and window.tokens not in texts:
            places.add(place)
            texts.add(window.tokens)
            windows.append(window)
    return windows


def likeliest(predictions: Iterable[Prediction], n: int) -> str:
    """The `n` most probable next tokens, quoted, with their probabilities in percent."""
    ranked = sorted(predictions, key=lambda p: p.rank)[:n]
    return ", ".join(f"{quote_token(p.token)} {100 * p.probability:.0f} %" for p in ranked)


def quote_token(token: str) -> str:
    """A token between double quotes."""
    return '"' + quote(token).replace('"', '\\"') + '"'
