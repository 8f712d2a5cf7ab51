"""What the adapter does when a latent fires, in one sentence, read off the latent's row of the change map."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from autointerp.labeling.lexical.tokens import quote
from autointerp.records import LatentEvidence, Write, WriteKind

NOTHING = "no effect on tokens or latents stands out"
SHARE_OF_STRONGEST = 0.1
"""Weights below this share of the strongest of their kind are dropped."""
MIN_GAIN = 0.05
MAX_TOKENS = 4
MAX_LATENTS = 1
_HINT_TOKENS = 2
_RUNS = re.compile(r"([^\w.])\1+")
_SPECIAL = re.compile(r"<\|.*\|>|</?s>|<(bos|eos|pad|unk)>|\[(CLS|SEP|PAD|UNK|MASK)\]")


def effect_sentence(evidence: LatentEvidence, names: Mapping[int, str] | None = None) -> str:
    """ "promotes ` test`, ` setUp`; suppresses ` __init`; the old use fades (−55 %)".

    Args:
        evidence: its `writes`, `gain`, `role` and `state` are read.
        names: labels of other latents; a target without one is described by the tokens that it pushes.
    """
    names = names or {}
    parts = [
        _tokens("promotes", _strong(evidence.writes, "promotes")),
        _tokens("suppresses", _strong(evidence.writes, "suppresses")),
        _gain(evidence.gain),
        _latents("raises", _strong(evidence.writes, "raises"), names, evidence.latent),
        _latents("lowers", _strong(evidence.writes, "lowers"), names, evidence.latent),
    ]
    said = "; ".join(part for part in parts if part)
    return "; ".join(part for part in (_state(evidence), said, _role(evidence)) if part) or NOTHING


def _strong(writes: Sequence[Write], kind: WriteKind) -> list[Write]:
    """Writes of one kind by rank, without those whose weight is small beside the largest."""
    ranked = sorted((w for w in writes if w.kind == kind and w.weight == w.weight), key=lambda w: w.rank)
    least = SHARE_OF_STRONGEST * max((abs(w.weight) for w in ranked), default=0.0)
    return [w for w in ranked if w.weight and abs(w.weight) >= least]


def _tokens(verb: str, writes: list[Write]) -> str:
    tokens = [w.target_token for w in writes if w.target_token]
    shown = pick_readable(tokens, MAX_TOKENS)
    return f"{verb} {', '.join(shown)}" if shown else ""


def pick_readable(tokens: Sequence[str], limit: int) -> list[str]:
    """The first tokens that say something, in backticks: no two that differ by spaces, case, an ending or their length
    of repetition; short pieces of words only where there is nothing better."""
    good = [t for t in tokens if readable(t)]
    kept: dict[str, str] = {}
    for token in [t for t in good if not _is_scrap(t)] or good:
        key = _RUNS.sub(r"\1", token.strip().casefold() or token)
        if not any(_alike(key, other) for other in kept):
            kept[key] = token
    return [quote(token) for token in list(kept.values())[:limit]]


def readable(token: str) -> bool:
    """Whether a token says something to a reader: no piece of a broken character, no control or special token."""
    core = token.strip(" \n\t\r")
    return bool(token) and "\ufffd" not in token and core.isprintable() and not _SPECIAL.fullmatch(core)


def _is_scrap(token: str) -> bool:
    """A piece of a word that is too short to be recognised."""
    return token.isalpha() and len(token) < 3


def _alike(one: str, other: str) -> bool:
    short, long = sorted((one, other), key=len)
    return one == other or (len(short) > 3 and long.startswith(short) and len(long) - len(short) < 3)


def _latents(verb: str, writes: list[Write], names: Mapping[int, str], own: int) -> str:
    named = [_target(w, names) for w in writes if w.target_latent is not None and w.target_latent != own]
    return f"{verb} {', '.join(named[:MAX_LATENTS])}" if named else ""


def _target(write: Write, names: Mapping[int, str]) -> str:
    number = write.target_latent
    if number is not None and names.get(number):
        return f"latent {number} ({names[number]})"
    hint = _hint(write.target_hint)
    return f"latent {number} (pushes {hint})" if hint else f"latent {number}"


def _hint(hint: str | None) -> str:
    """The first tokens of a hint, quoted anew: what is between backticks, or what commas separate."""
    quoted = re.findall(r"`([^`]+)`", hint or "")
    return ", ".join(pick_readable(quoted or (hint or "").split(","), _HINT_TOKENS))


def _gain(gain: float | None) -> str:
    if gain is None or gain != gain or abs(gain) < MIN_GAIN:
        return ""
    percent = f"{abs(gain):.0%}".replace("%", " %")
    if gain <= -0.995:
        return "the old use is gone" if gain >= -1.1 else f"the old use turns into its opposite (−{percent})"
    return f"the old use fades (−{percent})" if gain < 0 else f"fires through {percent} stronger"


def _state(evidence: LatentEvidence) -> str:
    if evidence.state == "revived":
        return f"new: fires only since the training (on {_share(evidence.freq_adapted)} of tokens)"
    if evidence.state == "silenced":
        return f"fires no more after the training (before, on {_share(evidence.freq_base)} of tokens)"
    return ""


def _share(frequency: float) -> str:
    return f"{frequency * 100:.2g} %"


def _role(evidence: LatentEvidence) -> str:
    if evidence.role == "written" and evidence.state != "revived":
        return "other latents that fire write to it"
    if evidence.role == "static":
        return "shifted on every token alike, whatever fires"
    return ""
