"""An oracle that answers every question from its prompt alone, and latents planted for it to find.

A planted latent fires on two phrases, each with a strength of its own: on the second word, where the first stands
before it. Its near misses hold the second word after another one. The oracle labels a latent by the marked words and
what stands before them, and judges by looking for the phrases that a label names.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Sequence

from autointerp.records import Context, ContextKind, Foil, LatentEvidence, Prediction, Split, Write

from .server import Respond

PHRASES = (
    (("we", "assert"), ("they", "raise")),
    (("the", "moon"), ("a", "star")),
    (("def", "setUp"), ("class", "Case")),
    (("quickly", "ran"), ("slowly", "walked")),
    (("import", "os"), ("from", "sys")),
)
STRENGTHS = (9.0, 3.0)
PUSHED = ("Equal", "light", "self", "home", "path")
_TEXT = "lorem ipsum dolor sit amet consectetur elit sed do eiusmod tempor incididunt ut labore magna aliqua enim"
_FILLER = _TEXT.split()


def oracle(system: str, user: str) -> str:
    """The right answer to any question that the project asks, from what stands in the prompt."""
    return json.dumps(_answer(system, user))


def yes_sayer(system: str, user: str) -> str:
    """Says yes to everything, A of two, the first of many."""
    windows = _windows(user)
    if '"fires"' in system or '"right"' in system:
        return json.dumps({"fires" if '"fires"' in system else "right": [1] * len(windows)})
    if '"after"' in system:
        return json.dumps({"after": ["A"] * len(_pairs(user))})
    return json.dumps({"intruder": 1}) if '"intruder"' in system else oracle(system, user)


def _answer(system: str, user: str) -> dict:
    named = dict(re.findall(r"`([^`]+)` \((\d+)\)", user.splitlines()[0]))
    if '"fires"' in system:
        return {"fires": [int(any(phrase in window for phrase in named)) for window in _windows(user)]}
    if '"right"' in system:
        return {"right": [int(_marked(w) != [] and set(_marked(w)) <= set(named)) for w in _windows(user)]}
    if '"sentences"' in system:
        return summary(user)
    if '"intruder"' in system:
        fits = [any(phrase in window for phrase in named) for window in _windows(user)]
        return {"intruder": [*fits, False].index(False) % len(fits) + 1} if fits else {}
    if '"after"' in system:
        pushed = re.findall(r"`([^`]+)`", user.splitlines()[0])
        return {"after": ["AB"[_rank(a, pushed) > _rank(b, pushed)] for a, b in _pairs(user)]}
    if '"1":[' in system:
        rows = [row.split("\t") for row in re.findall(r"^\d+\t(.*)$", user, re.MULTILINE)]
        words = ["", *(token.strip() for row in rows for token in row)]
        pairs = [f"{before} {word}" for before, word in itertools.pairwise(words)]
        digits = iter([round(0.9 * int(named.get(pair, 0))) for pair in pairs])
        return {str(i): list(itertools.islice(digits, len(row))) for i, row in enumerate(rows, start=1)}
    return _label(user)


def summary(user: str) -> dict:
    """One sentence for each of the first five latents, in the words of its label."""
    listed = re.findall(r"^\[(\d+)\] (.*?) \|", user, re.MULTILINE)
    return {"sentences": [{"text": f"Here {what}.", "latents": [int(latent)]} for latent, what in listed[:5]]}


def with_summaries(respond: Respond) -> Respond:
    """`respond`, but what the training changed is summarised from the prompt."""
    return lambda system, user: json.dumps(summary(user)) if '"sentences"' in system else respond(system, user)


def _pairs(user: str) -> list[tuple[str, str]]:
    """The two lists of each text."""
    return list(zip(*(re.findall(rf"^\d+ {side}: (.*)$", user, re.MULTILINE) for side in "AB"), strict=True))


def _rank(listed: str, pushed: list[str]) -> int:
    """Place of the first pushed token in a list; past its end where there is none."""
    tokens = re.findall(r'"([^"]*)"', listed)
    return min((tokens.index(token) for token in pushed if token in tokens), default=len(tokens))


def _windows(user: str) -> list[str]:
    return re.findall(r"^\d+: (.*)$", user, re.MULTILINE)


def _marked(text: str) -> list[str]:
    """Each marked word with the one before it."""
    return [f"{before} {word}" for before, word in re.findall(r"(\S+)« *([^»]*?) *»", text)]


def _label(user: str) -> dict:
    strengths: dict[str, str] = {}
    for numbers, text in re.findall(r"^F\d+ \[([\d ]+)\] (.*)$", user, re.MULTILINE):
        strengths |= dict(zip(_marked(text), numbers.split(), strict=True))
    named = ", ".join(f"`{phrase}` ({strength})" for phrase, strength in sorted(strengths.items()))
    pushed = re.findall(r'^W promotes: "([^"]*)"', user, re.MULTILINE)
    effect = f"Pushes {', '.join(f'`{token}`' for token in pushed)}." if pushed else "Nothing stands out."
    return {"label": "these words", "explanation": f"Fires on {named}.", "effect": effect}


def planted(latent: int, n: int = 24, seed: int = 0) -> LatentEvidence:
    """Latent `latent` of len(PHRASES) planted ones: in each split n firing windows, n at random, n near misses, and
    what both models predict after the firing ones."""
    draw = random.Random(f"{seed} {latent}")
    phrases, pushed = PHRASES[latent], PUSHED[latent]
    contexts: list[Context] = []
    predictions: list[Prediction] = []

    def add(split: Split, kind: ContextKind, rank: int, middle: Sequence[str], strength: float, foil: Foil | None):
        before, after = draw.sample(_FILLER, 8), draw.sample(_FILLER, 7)
        tokens = tuple(f" {word}" for word in (*before, *middle, *after))
        fires = tuple(strength if i == 9 else 0.0 for i in range(len(tokens)))
        number = len(contexts)
        doc = 2 * number + (split == "score")
        contexts.append(Context(latent, number, kind, rank, split, doc, 50, tokens, fires, fires, 9, foil))
        if strength:
            for side, tops in (("base", ("and", "the", "of")), ("adapted", (pushed, "and", "the"))):
                for at, (token, p) in enumerate(zip(tops, (0.5, 0.2, 0.1), strict=True), start=1):
                    predictions.append(Prediction(latent, number, side, at, token, p))  # type: ignore[arg-type]

    splits: tuple[Split, ...] = ("explain", "score")
    for split in splits:
        for rank in range(1, n + 1):
            which = rank % 2
            add(split, "quantile", rank, phrases[which], STRENGTHS[which], None)
            add(split, "silent", rank, draw.sample(_FILLER, 2), 0.0, None)
            add(split, "silent", n + rank, (draw.choice(_FILLER), phrases[which][1]), 0.0, "token")
    writes = (Write(latent, "promotes", None, pushed, 1.4, 1),)
    numbers = {"mean_base": 0.1, "mean_adapted": 0.2, "freq_base": 0.01, "freq_adapted": 0.02}
    return LatentEvidence(
        "run", latent, latent + 1, "read", "live", 0.25, 1.0 / (latent + 1), **numbers, max_base=9.0, max_adapted=9.0,
        contexts=tuple(contexts), writes=writes, predictions=tuple(predictions), decoder=(),
    )  # fmt: skip


JUDGES: dict[str, Respond] = {"oracle": oracle, "yes": yes_sayer}
