"""The course of a training on a terminal: how what each latent writes grew over the checkpoints. Reads the store
alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.table import Table
from rich.text import Text

from autointerp.store import Store
from autointerp.terminal import visible

WIDTH = 20
"""Characters of a sparkline at most."""
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float | None], width: int = WIDTH) -> str:
    """Values ≥ 0 as a line of bars, the largest at full height; of more than `width`, evenly spaced ones.

    >>> sparkline([0, 1, 2, None, 4])
    '▁▃▅ █'
    """
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    top = max((value for value in values if value is not None), default=0) or 1
    return "".join(" " if value is None else _BARS[round(value / top * (len(_BARS) - 1))] for value in values)


def courses(store: Store, run_id: str, latent: int | None = None) -> dict[int, list[dict[str, Any]]]:
    """Latent → its rows of `course` in the order of the steps, of all latents or of one; empty where there is none."""
    rows = store.read(
        "SELECT * FROM course WHERE run_id = $run AND latent = coalesce($latent, latent)"
        " ORDER BY latent, step NULLS LAST",
        {"run": run_id, "latent": latent},
    )
    return {latent: list(mine) for latent, mine in groupby(rows, key=lambda row: row["latent"])}


def course_line(rows: Sequence[dict[str, Any]]) -> str:
    """One latent's course in a few words: a sparkline of what it writes, and by when half of the most was there."""
    sizes = [row["size"] for row in rows]
    half = next((row for row in rows if row["size"] >= max(sizes) / 2), None) if any(sizes) else None
    return sparkline(sizes) + (f" half by {_when(half)}" if half else "")


def header_parts(store: Store, run_id: str) -> list[str | None]:
    """What the run's header says of the series: how long it is, and how the coverage grew."""
    rows = store.read("SELECT * FROM checkpoints WHERE run_id = ? ORDER BY step NULLS LAST", [run_id])
    read = [row for row in rows if row["error"] is None and row["checkpoint"] != "base"]
    if not read:
        return []
    covered = [row["coverage"] for row in read]
    first, last = ("–" if value is None else f"{value:.0%}" for value in (covered[0], covered[-1]))
    failed = len(rows) - len(read) - 1
    return [
        f"{len(read)} checkpoints, {_when(read[0])} → {_when(read[-1])}",
        f"coverage {first} → {last} {sparkline([value and max(value, 0.0) for value in covered])}",
        f"{failed} could not be read" if failed > 0 else None,
    ]


def latent_table(rows: Sequence[dict[str, Any]]) -> Table:
    """One latent's course, a line a checkpoint."""
    out = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    out.add_column("checkpoint", overflow="fold")
    for name in ("writes", "gain", "as at the end", "mean", "fires on"):
        out.add_column(name, justify="right", no_wrap=True)
    forms = {"size": "{:.3f}", "gain": "{:+.0%}", "cosine": "{:+.2f}", "mean": "{:.4g}", "freq": "{:.3%}"}
    for row in rows:
        cells = ("–" if row[name] is None else form.format(row[name]) for name, form in forms.items())
        out.add_row(Text(visible(row["checkpoint"])), *cells)
    return out


def _when(row: dict[str, Any]) -> str:
    return "the end" if row["step"] is None else f"step {row['step']:,}"
