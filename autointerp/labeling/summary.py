"""What did this training change? One answer over all labelled latents, each sentence with the latents it rests on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from autointerp.labeling.llm.provider import Planned, Request
from autointerp.labeling.prompts import Prompts, quote
from autointerp.records import Change, RunSummary, Sentence
from autointerp.store import Store

MAX_CHANGES = 150
"""Latents that a summary reads, by rank."""
MAX_SENTENCES = 8
MAX_OUTPUT_TOKENS = 700
TYPICAL_OUTPUT_TOKENS = 220

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "sentences": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "text": {"type": "string"},
                    "latents": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["text", "latents"],
                "additionalProperties": False,
            },
        }
    },
    "required": ["sentences"],
    "additionalProperties": False,
}

_CITATION = re.compile(r"\s*\[((?:latents? )?#?\d+(?:,? (?:and )?#?\d+)*)\]")
_MENTION = re.compile(r"\blatents? ((?:#?\d+(?:, (?:and )?| and )?)+)", re.IGNORECASE)


def summary_request(prompts: Prompts, changes: Sequence[Change]) -> Request:
    """The question about all labelled latents, the first MAX_CHANGES of them."""
    lines = [
        {
            "latent": change.latent,
            "what": f"{quote(change.label)}: {quote(change.explanation)}",
            "effect": quote(change.effect) or "nothing stands out",
            "figures": _figures(change),
        }
        for change in changes[:MAX_CHANGES]
    ]
    prompt = prompts.render("summarise", changes=lines)
    return Request(prompt.system, prompt.user, "summary", SCHEMA, MAX_OUTPUT_TOKENS, prompt.template_sha256)


def plan_summary(prompts: Prompts, n: int) -> Planned:
    """The question that would be asked of n labelled latents, for an estimate."""
    typical = [Change(j, j, 1.0, 0.1, "x" * 40, "x" * 160, "x" * 100, 0.9, 0.5) for j in range(n)]
    return Planned(summary_request(prompts, typical), TYPICAL_OUTPUT_TOKENS)


def parse_summary(answer: dict[str, Any], known: Collection[int]) -> list[Sentence]:
    """Checks a model's answer. ValueError, naming the sentence, where one cites no latent or an unknown one."""
    said = answer.get("sentences")
    if not isinstance(said, list) or not said:
        raise ValueError("'sentences' must be a list of sentences with their latents")
    if len(said) > MAX_SENTENCES:
        raise ValueError(f"there are {len(said)} sentences, at most {MAX_SENTENCES} are allowed")
    return [_sentence(item, number, known) for number, item in enumerate(said, start=1)]


def _sentence(item: Any, number: int, known: Collection[int]) -> Sentence:
    if not isinstance(item, dict) or not isinstance(item.get("text"), str) or not isinstance(item.get("latents"), list):
        raise ValueError(f"sentence {number} must have a 'text' and a list of 'latents'")
    text = " ".join("".join(c if c.isprintable() else " " for c in item["text"]).split())
    # A number that is written into the sentence is a citation too.
    written = [int(n) for found in _CITATION.findall(text) + _MENTION.findall(text) for n in re.findall(r"\d+", found)]
    text = _CITATION.sub("", text).strip()
    cited = [*item["latents"], *written]
    unknown = [latent for latent in cited if isinstance(latent, bool) or latent not in known]
    if unknown:
        raise ValueError(f"sentence {number} cites {unknown[0]!r}, which is not among the latents listed")
    if not text or not cited:
        raise ValueError(f"sentence {number} must say something and cite the latents that it rests on")
    return Sentence(text, tuple(dict.fromkeys(cited)))


def labelled_changes(store: Store, run_id: str, labelers: Sequence[str]) -> list[Change]:
    """The selected latents that one of these labelers labelled, by rank, with the best score of each label. Of several
    labels the first labeler's counts."""
    sql = """
    WITH first AS (
        SELECT * FROM labels WHERE status IN ('ok', 'known') AND list_contains($labelers, labeler)
        QUALIFY row_number() OVER (PARTITION BY run_id, latent ORDER BY list_position($labelers, labeler)) = 1
    )
    SELECT l.latent, l.rank, l.change, l.gain, n.label, n.explanation, n.effect,
           max_by(s.value, s.value) AS score, max_by(s.null_value, s.value) AS null_score
    FROM latents AS l
    JOIN first AS n ON n.run_id = l.run_id AND n.latent = l.latent
    LEFT JOIN scores AS s ON s.run_id = l.run_id AND s.latent = l.latent AND s.labeler = n.labeler
    WHERE l.run_id = $run_id AND l.selected
    GROUP BY ALL ORDER BY l.rank NULLS LAST, l.latent
    """
    tokens: dict[tuple[int, str], list[str]] = {}
    writes = """SELECT latent, kind, target_token FROM writes
    WHERE run_id = ? AND target_token IS NOT NULL ORDER BY latent, kind, rank"""
    for row in store.read(writes, [run_id]):
        tokens.setdefault((row["latent"], row["kind"]), []).append(row["target_token"])
    return [
        Change(
            latent=row["latent"],
            rank=row["rank"] or 0,
            change=row["change"],
            gain=row["gain"],
            label=row["label"] or "",
            explanation=row["explanation"] or "",
            effect=row["effect"] or "",
            score=row["score"],
            null_score=row["null_score"],
            promotes=tuple(tokens.get((row["latent"], "promotes"), ())),
            suppresses=tuple(tokens.get((row["latent"], "suppresses"), ())),
        )
        for row in store.read(sql, {"labelers": list(labelers), "run_id": run_id})
    ]


def summary_status(store: Store, run_id: str, labeler: str, changes: Sequence[Change]) -> str | None:
    """ok, refused or failed where the store holds this labeler's summary of just these labels and scores."""
    sql = "SELECT status FROM summaries WHERE run_id = ? AND labeler = ? AND labels_sha256 = ?"
    rows = store.read(sql, [run_id, labeler, _digest(changes)])
    return rows[0]["status"] if rows else None


def summary_row(run_id: str, summary: RunSummary, changes: Sequence[Change]) -> dict[str, Any]:
    """The row of `summaries`."""
    return {
        "run_id": run_id,
        "labeler": summary.labeler,
        "summary": summary.text,
        "sentences": [asdict(sentence) for sentence in summary.sentences],
        "status": summary.status,
        "error": summary.error,
        "labels_sha256": _digest(changes),
        "prompt_sha256": summary.prompt_sha256,
        "created_at": datetime.now(UTC).replace(tzinfo=None),
    }


def _digest(changes: Sequence[Change]) -> str:
    return hashlib.sha256(json.dumps([asdict(change) for change in changes]).encode()).hexdigest()


def _figures(change: Change) -> str:
    parts = [] if change.change is None else [f"change {change.change:.2f}"]
    parts += [] if change.gain is None else [f"own strength {100 * change.gain:+.0f} %"]
    if change.score is None:
        return ", ".join([*parts, "not scored"])
    null = "" if change.null_score is None else f" ({change.null_score:.2f})"
    return ", ".join([*parts, f"score {change.score:.2f}{null}"])
