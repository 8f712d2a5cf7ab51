"""What labelling would cost, before anything is asked: the questions are rendered as they would be, and counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autointerp.labeling.base import LABELERS, LabelingSettings, find_scorer, needs_engine, split_spec
from autointerp.labeling.llm.prices import BATCH_SHARE, Price, find_price
from autointerp.labeling.llm.provider import Planned
from autointerp.labeling.prompts import Prompts
from autointerp.labeling.summary import plan_summary
from autointerp.records import Context, ContextKind, DecoderToken, LatentEvidence, Prediction, Split, Write, WriteKind

BYTES_PER_TOKEN = (4.6, 3.8, 3.0)
"""Of English and code in current tokenisers: many, typical, few."""
OUTPUT_SPREAD = (0.7, 1.0, 1.8)
BATCH_SECONDS = (300.0, 4 * 86_400.0)
"""Labels are one batch, their scores at most two, the summary the last; each may take a day, and seldom does."""
SECONDS_PER_CALL = (0.8, 4.0)
_FORMAT_TOKENS = 12
_CONTEXTS_PER_KIND, _PREDICTED, _PEAK = 20, 10, 23
_HINT = "` token`, ` token`"
_WRITE_KINDS: tuple[tuple[WriteKind, str | None], ...] = (
    ("promotes", None),
    ("suppresses", None),
    ("raises", _HINT),
    ("lowers", _HINT),
)


@dataclass(frozen=True)
class Estimate:
    """Of what is not yet answered; answers that the store holds cost nothing."""

    calls: int
    input_tokens: int
    output_tokens: int
    usd_low: float | None
    """None when the model has no listed price."""
    usd_high: float | None
    seconds_low: float
    seconds_high: float


def estimate(
    spec: str,
    latents: int | Sequence[LatentEvidence],
    scorers: Iterable[str],
    settings: LabelingSettings,
    to_score: Mapping[str, Sequence[LatentEvidence]] | None = None,
) -> Estimate:
    """Calls, tokens, dollars and time to label and score.

    `latents` is the evidence where it stands, or how many latents there will be; then a typical one is
    counted. `to_score`: by scorer, the latents that have a label and only wait for this score. Needs no key.
    InputError for an unknown labeler or scorer, and for a template that does not render.
    """
    name, model = split_spec(spec)
    prompts, batch = Prompts(settings.prompts_dir), settings.batch
    askers = [item for item in (LABELERS.get(name), *(find_scorer(spec)[0] for spec in scorers)) if needs_engine(item)]
    planned: list[Planned] = []
    if askers:
        counted = [typical_evidence()] if isinstance(latents, int) else latents
        planned = [plan for item in askers for evidence in counted for plan in item.plan(prompts, evidence, batch)]  # type: ignore[attr-defined]
        planned *= latents if isinstance(latents, int) else 1
    for scorer, waiting in (to_score or {}).items():
        if needs_engine(item := find_scorer(scorer)[0]):
            planned += [plan for evidence in waiting for plan in item.plan(prompts, evidence, batch)]  # type: ignore[attr-defined]
    if planned:
        n = latents if isinstance(latents, int) else len(latents)
        n = max(n, *(len(waiting) for waiting in (to_score or {}).values()), 1)
        planned.append(plan_summary(prompts, n))
    price = find_price(model, settings.prices_path) if model else Price(0, 0, 0, 0)
    least = [plan for plan in planned if plan.certain]
    spreads = zip((least, planned, planned), BYTES_PER_TOKEN, OUTPUT_SPREAD, strict=True)
    low, typical, high = (_tokens(asked, n_bytes, output) for asked, n_bytes, output in spreads)
    quick, slow = (_seconds(len(planned), *typical, s, settings) for s in SECONDS_PER_CALL)
    share = BATCH_SHARE if settings.batch else 1.0
    usd_low, usd_high = (share * price.usd(*low), share * price.usd(*high)) if price else (None, None)
    if settings.batch and planned:
        quick, slow = BATCH_SECONDS
    return Estimate(len(planned), *typical, usd_low, usd_high, quick, slow)


def _tokens(planned: Sequence[Planned], bytes_per_token: float, output_spread: float) -> tuple[int, int]:
    """(input, output) tokens of all questions."""
    n_bytes = sum(len(f"{p.request.system}{p.request.user}".encode()) for p in planned)
    read = n_bytes / bytes_per_token + _FORMAT_TOKENS * len(planned)
    return round(read), round(output_spread * sum(p.output_tokens for p in planned))


def _seconds(calls: int, read: int, wrote: int, seconds_per_call: float, settings: LabelingSettings) -> float:
    """The slowest of latency, requests per minute and tokens per minute."""
    rates = (calls, settings.rpm), (read + wrote, settings.tpm), (read, settings.itpm), (wrote, settings.otpm)
    by_latency = calls * seconds_per_call / settings.concurrency
    return max([by_latency, *(60 * n / limit for n, limit in rates if limit)])


def typical_evidence() -> LatentEvidence:
    """As much evidence as the collector gives of one latent, in tokens of average length."""
    splits: tuple[Split, ...] = ("explain", "score")
    kinds: tuple[ContextKind, ...] = ("quantile", "silent")
    places = itertools.product(splits, kinds, range(1, _CONTEXTS_PER_KIND + 1))
    contexts = tuple(_context(number, *place) for number, place in enumerate(places))
    writes = tuple(
        Write(0, kind, 12345 if hint else None, None if hint else " token", 1.0, rank, hint)
        for kind, hint in _WRITE_KINDS
        for rank in range(1, 6)
    )
    sides: tuple[Literal["base", "adapted"], ...] = ("base", "adapted")
    predictions = tuple(
        Prediction(0, context.context_id, side, rank, " token", p)
        for context in contexts
        if context.kind == "quantile" and context.rank <= _PREDICTED
        for side, p in zip(sides, (0.25, 0.5), strict=True)
        for rank in (1, 2, 3)
    )
    decoder = tuple(DecoderToken(0, "promotes", " token", 1.0, rank) for rank in range(1, 6))
    measured = {"mean_base": 0.1, "mean_adapted": 0.1, "freq_base": 0.01, "freq_adapted": 0.01}
    return LatentEvidence(
        "typical", 0, 1, "read", "live", 0.25, 1.0, **measured, max_base=1.0, max_adapted=1.0,
        contexts=contexts, writes=writes, predictions=predictions, decoder=decoder,
    )  # fmt: skip


def _context(number: int, split: Split, kind: ContextKind, rank: int) -> Context:
    """A window of 32 tokens, each window another text; one token fires unless `kind` is silent."""
    tokens = tuple(f" {number:03d}" if i == _PEAK else " tok" for i in range(32))
    fires = tuple(float(rank) if i == _PEAK and kind != "silent" else 0.0 for i in range(32))
    return Context(0, number, kind, rank, split, number, _PEAK, tokens, fires, fires, _PEAK)
