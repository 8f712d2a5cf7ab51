"""`openai:MODEL` and `anthropic:MODEL`: one question per latent, what it is and what the adapter does when it fires."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from autointerp.errors import InputError
from autointerp.labeling.base import LABELERS, LabelingSettings
from autointerp.labeling.effect import readable
from autointerp.labeling.llm.engine import Engine
from autointerp.labeling.llm.faults import Terminal
from autointerp.labeling.llm.provider import Planned, Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.labeling.summary import parse_summary, summary_request
from autointerp.labeling.windows import Window, firing_windows, likeliest, quote_token, silent_windows
from autointerp.records import Change, Label, LatentEvidence, Prediction, RunSummary, Write, WriteKind

NO_PATTERN = "no clear pattern"
MAX_WORDS = 8
MAX_OUTPUT_TOKENS = 320
TYPICAL_OUTPUT_TOKENS = 95

N_FIRING, N_TOP, N_SILENT, N_PEAKS, N_LIKELIEST, N_DECODER = 10, 4, 6, 3, 3, 5
_SHOWN: dict[WriteKind, int] = {"promotes": 6, "suppresses": 5, "raises": 3, "lowers": 3}
_SHARE_OF_STRONGEST = 0.1

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "string"} for name in ("label", "explanation", "effect")},
    "required": ["label", "explanation", "effect"],
    "additionalProperties": False,
}


@dataclass(frozen=True)
class Explanation:
    """A model's answer, checked."""

    label: str
    explanation: str
    effect: str


@LABELERS.register("anthropic")
@LABELERS.register("openai")
class LLMLabeler:
    """Asks one model. Uses the split `explain` only."""

    needs_engine = True
    default_scorer = "detection"

    def __init__(self, engine: Engine, settings: LabelingSettings):
        self.engine = engine
        self.name = engine.name
        self._prompts = Prompts(settings.prompts_dir)

    @staticmethod
    def plan(prompts: Prompts, evidence: LatentEvidence, batch: bool = False) -> list[Planned]:
        """The question that `label` would ask, in a batch or not, for an estimate."""
        try:
            return [Planned(explain_request(prompts, evidence), TYPICAL_OUTPUT_TOKENS)]
        except NoContextsError:
            return []

    async def label(self, evidence: LatentEvidence) -> Label:
        """ok, refused, or failed with what went wrong; an answer that cannot be understood is never a label.

        Raises what stops every other question too: BudgetError, ProviderError, Interrupted, StoreError.
        """
        sha256 = None
        try:
            request = explain_request(self._prompts, evidence)
            sha256 = request.prompt_sha256()
            try:
                reply = await self.engine.ask(request, parse_explanation, latent=evidence.latent, purpose="label")
            except Terminal as fault:
                if not fault.too_long:
                    raise
                request = explain_request(self._prompts, evidence, shorter=True)
                sha256 = request.prompt_sha256()
                reply = await self.engine.ask(request, parse_explanation, latent=evidence.latent, purpose="label")
        except NoContextsError as error:
            return Label(evidence.latent, self.name, "failed", error=str(error))
        except Terminal as fault:
            return Label(evidence.latent, self.name, fault.status, error=str(fault), prompt_sha256=sha256)
        said = reply.value
        return Label(
            evidence.latent,
            self.name,
            "ok",
            said.label,
            said.explanation,
            said.effect,
            prompt_sha256=sha256,
            salvaged=reply.salvaged,
        )

    async def summarise(self, changes: Sequence[Change]) -> RunSummary:
        """One question about all labelled latents; failed when a sentence cites none of them, also after a repair."""
        request = summary_request(self._prompts, changes)
        known = {change.latent for change in changes}
        sha256 = request.prompt_sha256()
        try:
            reply = await self.engine.ask(
                request, lambda answer: parse_summary(answer, known), latent=None, purpose="summary"
            )
        except Terminal as fault:
            return RunSummary(self.name, fault.status, (), str(fault), sha256)
        return RunSummary(self.name, "ok", tuple(reply.value), None, sha256)


class NoContextsError(InputError):
    """There is nothing to explain a latent from."""


def explain_request(prompts: Prompts, evidence: LatentEvidence, shorter: bool = False) -> Request:
    """The question about one latent; half the windows when `shorter`. NoContextsError when it fires in none."""
    share = 2 if shorter else 1
    firing = firing_windows(evidence, "explain", N_FIRING // share, N_TOP // share)
    if not firing:
        raise NoContextsError("the latent fires in no context of the explain split: give more --max-tokens")
    largest = firing[0].strength
    prompt = prompts.render(
        "explain",
        firing=[{"strengths": window.strengths(largest), "text": window.marked()} for window in firing],
        silent=[window.plain() for window in silent_windows(evidence, "explain", N_SILENT // share)],
        decoder=_decoder(evidence),
        writes=_writes(evidence),
        predictions=_predictions(evidence, firing),
    )
    return Request(prompt.system, prompt.user, "explanation", SCHEMA, MAX_OUTPUT_TOKENS, prompt.template_sha256)


def parse_explanation(answer: dict[str, Any]) -> Explanation:
    """Checks a model's answer; ValueError names what is wrong with it."""
    said = Explanation(*(_words(answer, name) for name in ("label", "explanation", "effect")))
    if not said.label or not said.explanation:
        raise ValueError("label and explanation must not be empty")
    words = said.label.split()
    if len(words) > MAX_WORDS + 4:
        raise ValueError(f"the label has {len(words)} words, at most {MAX_WORDS} are allowed")
    if said.label.casefold().rstrip(".") == NO_PATTERN:
        return Explanation(NO_PATTERN, said.explanation, said.effect)
    if len(words) > MAX_WORDS:  # a little over is no reason to pay twice: the explanation says the whole
        return Explanation(" ".join(words[:MAX_WORDS]) + " …", said.explanation, said.effect)
    return said


def _words(answer: dict[str, Any], name: str) -> str:
    value = answer.get(name)
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string")
    return " ".join("".join(c if c.isprintable() else " " for c in value).split())


def _decoder(evidence: LatentEvidence) -> list[dict[str, str]]:
    """What the latent's own direction pushes towards, one line of the prompt for each kind."""
    lines: list[dict[str, str]] = []
    for kind in ("promotes", "suppresses"):
        ranked = sorted((d for d in evidence.decoder if d.kind == kind), key=lambda d: d.rank)
        tokens = [d.token for d in ranked if readable(d.token)][:N_DECODER]
        if tokens:
            lines.append({"what": kind, "tokens": ", ".join(map(quote_token, tokens))})
    return lines


def _writes(evidence: LatentEvidence) -> list[dict[str, str]]:
    """What the adapter does when the latent fires, one line of the prompt each."""
    lines: list[dict[str, str]] = []
    for kind, n in _SHOWN.items():
        writes = sorted((w for w in evidence.writes if w.kind == kind), key=lambda w: w.rank)
        strongest = max((abs(w.weight) for w in writes), default=0.0)
        items = [_item(w) for w in writes[:n] if abs(w.weight) >= _SHARE_OF_STRONGEST * strongest]
        if items:
            lines.append(
                {"what": kind if kind in ("promotes", "suppresses") else f"{kind} latents", "targets": ", ".join(items)}
            )
    if evidence.gain is not None and math.isfinite(evidence.gain):
        lines.append({"what": "own strength", "targets": f"{100 * evidence.gain:+.0f} %"})
    if evidence.state in ("revived", "silenced"):
        lines.append({"what": "state", "targets": _STATES[evidence.state]})
    elif math.isfinite(evidence.freq_base) and math.isfinite(evidence.freq_adapted):
        base, adapted = 100 * evidence.freq_base, 100 * evidence.freq_adapted
        frequencies = f"{base:.2g} % of tokens in the base model, {adapted:.2g} % with the adapter"
        lines.append({"what": "fires on", "targets": frequencies})
    return lines


_STATES = {
    "revived": "never fires in the base model, only with the adapter",
    "silenced": "no longer fires with the adapter",
}


def _item(write: Write) -> str:
    if write.target_latent is None:
        return f"{quote_token(write.target_token or '')} {write.weight:+.2f}"
    hint = f" (pushes {quote(write.target_hint)})" if write.target_hint else ""
    return f"{write.target_latent}{hint} {write.weight:+.2f}"


def _predictions(evidence: LatentEvidence, firing: list[Window]) -> list[dict[str, Any]]:
    """Next-token predictions at the strongest windows shown, the two sides beside each other."""
    lines: list[dict[str, Any]] = []
    for number, window in enumerate(firing, start=1):
        sides: dict[str, list[Prediction]] = {"base": [], "adapted": []}
        for prediction in evidence.predictions:
            if prediction.context_id == window.context.context_id:
                sides[prediction.side].append(prediction)
        if all(sides.values()) and len(lines) < N_PEAKS:
            lines.append({"number": number, **{side: likeliest(found, N_LIKELIEST) for side, found in sides.items()}})
    return lines
