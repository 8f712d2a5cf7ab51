"""A summary of a run without a model: counts over the rows of the change map, in fixed words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Literal

from autointerp.labeling.effect import MIN_GAIN, pick_readable
from autointerp.labeling.lexical import NO_RULE
from autointerp.records import Change, Sentence

Kind = Literal["promotes", "suppresses"]
N_STRONGEST = 5
"""Tokens of each latent that are counted."""
N_TOKENS, N_PLACES, N_CITED = 4, 3, 6


def overview(changes: Sequence[Change]) -> Iterator[Sentence]:
    """Up to five sentences: what is pushed, what is suppressed, where most changes, what faded, what grew stronger.

    A token counts once for each latent that has it among its N_STRONGEST; nothing is said of tokens of one latent alone
    where there are several latents.
    """
    kinds: tuple[tuple[Kind, str], ...] = (
        ("promotes", "Made more probable next where changed latents fire"),
        ("suppresses", "Made less probable there"),
    )
    for kind, words in kinds:
        tokens = _shared_tokens(changes, kind)
        if tokens:
            said = ", ".join(f"{token} ({len(by)} of {len(changes)} latents)" for token, by in tokens)
            cited = sorted({c.rank: c.latent for _, by in tokens for c in by[:2]}.items())
            yield Sentence(f"{words}: {said}.", tuple(latent for _, latent in cited[:N_CITED]))
    places = [c for c in changes if c.label and c.label != NO_RULE]
    places = sorted(places, key=lambda c: -(c.change or 0.0))[:N_PLACES]
    if places:
        named = "; ".join(c.label for c in places)
        yield Sentence(f"The largest changes come where a latent fires on: {named}.", tuple(c.latent for c in places))
    gains = [(c, c.gain) for c in changes if c.gain is not None and abs(c.gain) >= MIN_GAIN]
    for words, chosen in (
        ("Latents whose own use faded", [(c, g) for c, g in gains if g < 0]),
        ("Latents whose own use grew stronger", [(c, g) for c, g in gains if g > 0]),
    ):
        if chosen:
            middle = f"{100 * median(g for _, g in chosen):+.0f} %".replace("-", "−")
            most = sorted(chosen, key=lambda pair: -abs(pair[1]))[:N_PLACES]
            said = f"{words}: {len(chosen)} of {len(changes)}, by {middle} at the median; most of all these."
            yield Sentence(said, tuple(c.latent for c, _ in most))


def _shared_tokens(
    changes: Sequence[Change], kind: Literal["promotes", "suppresses"]
) -> list[tuple[str, list[Change]]]:
    """(token in backticks, latents that have it, by rank), by how many they are; ties by the rank of the first."""
    by_token: dict[str, list[Change]] = {}
    for change in changes:
        for token in pick_readable((change.promotes if kind == "promotes" else change.suppresses)[:10], N_STRONGEST):
            by_token.setdefault(token, []).append(change)
    least = min(2, len(changes))
    ranked = sorted(by_token.items(), key=lambda item: (-len(item[1]), item[1][0].rank, item[0]))
    return [(token, by) for token, by in ranked if len(by) >= least][:N_TOKENS]
