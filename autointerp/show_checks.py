"""What `check` found, on a terminal: the run's effects by cause, and each latent's own. Reads the store alone."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autointerp.store import Store
from autointerp.terminal import console as make_console

_PARTS = {
    "selected": "selected",
    "random": "random",
    "matched": "random, as much",
    "static": "static part alone",
    "directions": "directions of it",
    "random directions": "random directions",
    "all": "(all)",
}


def checks(store: Store, run_id: str, console: Console | None = None) -> None:
    """Print all that was checked of a run."""
    console = console or make_console()
    for part in run_checks(store, run_id):
        console.print(part)


def run_checks(store: Store, run_id: str) -> list[Table | Text]:
    """Tables of what was checked of a run; none before `check` has run."""
    found = causal_table(store.read("SELECT * FROM causal WHERE run_id = ? ORDER BY ALL", [run_id]))
    probes = store.read("SELECT * FROM transfer WHERE run_id = ? ORDER BY latent", [run_id])
    return [*found, Text(_probes(probes), style="dim")] if probes else found


def latent_lines(store: Store, run_id: str, latent: int) -> list[str]:
    """What was checked of one latent, a line a check."""
    rows = store.read("SELECT * FROM causal_latents WHERE run_id = ? AND latent = ?", [run_id, latent])
    probes = store.read("SELECT * FROM transfer WHERE run_id = ? AND latent = ?", [run_id, latent])
    return [_alone(row) for row in rows] + [_probe(row) for row in probes]


def causal_table(rows: Sequence[dict[str, Any]]) -> list[Table | Text]:
    """Shares of the effect of the whole Δx, a line a set of rows: ± one standard error; draws as mean (range)."""
    if not rows:
        return []
    n_tokens, n_docs = rows[0]["n_tokens"], rows[0]["n_docs"]
    read = f"{n_docs} held-out documents, {n_tokens:,} tokens"
    title = f"by cause: share of what the whole change does at the hook ({read})"
    out = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", title=title, title_justify="left")
    out.title_style = "dim"
    out.add_column("rows", no_wrap=True)
    for name in ("loss, added", "KL, added", "loss, removed", "KL, removed"):
        out.add_column(name, justify="right", no_wrap=True)
    for part, words in _PARTS.items():
        mine = [row for row in rows if row["part"] == part]
        for k in sorted({row["k"] for row in mine}):
            of_size = [row for row in mine if row["k"] == k]
            cells = [
                _shares([r for r in of_size if r["edit"] == edit], metric)
                for edit in ("added", "removed")
                for metric in ("loss", "kl")
            ]
            out.add_row(f"{k:,} {words}" if k else words, *cells)
    return [out, Text(_effects(rows), style="dim")]


def _shares(rows: Sequence[dict[str, Any]], metric: str) -> str:
    values = [row[f"{metric}_share"] for row in rows if row[f"{metric}_share"] is not None]
    if not values:
        return "–"
    if len(rows) == 1:
        error = rows[0][f"{metric}_se"]
        return f"{values[0]:.0%}" + (f" ± {100 * error:.0f}" if error is not None else "")
    return f"{sum(values) / len(values):.0%} ({100 * min(values):.0f} … {100 * max(values):.0f})"


def _effects(rows: Sequence[dict[str, Any]]) -> str:
    """What the shares are shares of."""
    of = {(row["edit"], row["part"]): row for row in rows}
    parts: list[str] = []
    for edit, start in (("added", "base"), ("removed", "adapted")):
        none, whole = of[edit, "none"], of[edit, "whole"]
        parts.append(
            f"{edit}: loss of the {start} model {none['loss']:.3f} → {whole['loss']:.3f},"
            f" KL {none['kl']:.3f} → {whole['kl']:.3f}"
        )
    return "; ".join(parts) + ". –: the whole change has no clear effect there"


def _alone(row: dict[str, Any]) -> str:
    words = [
        f"{name} {'–' if row[key] is None else format(row[key], '.1%')}"
        for name, key in (
            ("added: KL", "added_kl"),
            ("loss", "added_loss"),
            ("removed: KL", "removed_kl"),
            ("loss", "removed_loss"),
        )
    ]
    return (
        f"by cause, its row alone carries of the whole change: {words[0]}, {words[1]}; {words[2]}, {words[3]}"
        f" ({row['n_sequences']} of {row['n_firing']} held-out sequences it fires in)"
    )


def _probes(rows: Sequence[dict[str, Any]]) -> str:
    """Medians over the latents, and how many are gone."""
    words = [f"R² {median(row[key] for row in rows):.2f} {name}" for key, name in _STREAMS.items()]
    gone = sum(row["r2"] < row["r2_base"] / 2 for row in rows)
    lost = f"; {gone} have lost more than half of theirs" if gone else ""
    return f"do they live on? Probes of {len(rows)} latents, median held-out {', '.join(words)}{lost}"


_STREAMS = {"r2": "on the adapted stream", "r2_base": "on the base's", "r2_shuffled": "on shuffled pairs"}


def _probe(row: dict[str, Any]) -> str:
    turned = "" if row["cosine"] is None else f", cosine with its encoder {row['cosine']:.2f}"
    return (
        f"lives on? A probe of the adapted stream tells it with R² {row['r2']:.2f} (base {row['r2_base']:.2f},"
        f" shuffled {row['r2_shuffled']:.2f}), AUC {row['auc']:.2f}{turned}"
    )
