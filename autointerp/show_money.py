"""What a run has asked of language models, in a line a model: calls, tokens, those read from a cache, dollars."""

from __future__ import annotations

from typing import Any

from autointerp.store import Store

_SUMS = """
SELECT provider || ':' || model AS labeler, sum(calls) AS calls, sum(input_tokens) AS input_tokens,
       sum(cached_tokens) AS cached_tokens, sum(output_tokens) AS output_tokens, sum(usd) AS usd,
       sum(usd_in_doubt) AS usd_in_doubt
FROM spent WHERE run_id = ? GROUP BY ALL ORDER BY labeler
"""
_OF_LATENT = """
SELECT provider || ':' || model AS labeler, count(*) AS calls, coalesce(sum(input_tokens), 0) AS input_tokens,
       coalesce(sum(cached_tokens), 0) AS cached_tokens, coalesce(sum(output_tokens), 0) AS output_tokens,
       sum(usd) AS usd, coalesce(sum(usd_estimated) FILTER (usd IS NULL), 0) AS usd_in_doubt
FROM calls WHERE run_id = ? AND latent = ? GROUP BY ALL ORDER BY labeler
"""


def spending(store: Store, run_id: str, latent: int | None = None) -> list[dict[str, Any]]:
    """Sums of the ledger by labeler, of a run or of one latent in it: `labeler`, `calls`, tokens, `usd`."""
    rows = store.read(_SUMS, [run_id]) if latent is None else store.read(_OF_LATENT, [run_id, latent])
    counts = ("calls", "input_tokens", "cached_tokens", "output_tokens")
    return [row | {name: int(row[name]) for name in counts} for row in rows]


def spent_words(row: dict[str, Any]) -> list[str]:
    """One row of `spending` in words: `642 calls`, `1,204,311 + 45,120 tokens`, `25% of the input cached`, `$0.12`."""
    words = [f"{row['calls']:,} call{'' if row['calls'] == 1 else 's'}"]
    words.append(f"{row['input_tokens']:,} + {row['output_tokens']:,} tokens")
    if row["cached_tokens"]:
        words.append(cached_words(row["cached_tokens"], row["input_tokens"]))
    words.append("no listed price" if row["usd"] is None else f"${row['usd']:.4f}")
    if row["usd_in_doubt"] and row["usd"] is not None:
        words.append(f"${row['usd_in_doubt']:.4f} in doubt")
    return words


def cached_words(cached_tokens: int, input_tokens: int) -> str:
    """How much of the input was read from the provider's cache."""
    return f"{cached_tokens / max(1, input_tokens):.0%} of the input cached"
