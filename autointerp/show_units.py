"""What an adapter's units do, in sentences made of the labels of the latents they read and write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autointerp.errors import InputError
from autointerp.labeling.lexical import NO_RULE
from autointerp.store import Store
from autointerp.terminal import console as make_console
from autointerp.terminal import visible

SHARE_OF_STRONGEST = 0.3
"""Latents with less than this share of the weight of the strongest of their unit's side are left out of a sentence."""
MOST = 3
"""Latents named for each verb."""
_VERBS = {("reads", True): "fires on", ("reads", False): "is held back by", ("writes", True): "raises",
          ("writes", False): "lowers"}  # fmt: skip


def table(store: Store, run_id: str, console: Console | None = None) -> None:
    """Print the units of a run, a sentence each. InputError where it has none."""
    console = console or make_console()
    rows = store.read("SELECT * FROM units WHERE run_id = ? ORDER BY unit, side, rank", [run_id])
    if not rows:
        raise InputError(
            f"run {run_id} has no units: they are read off adapters with hidden units, such as a LoRA, that meet the"
            " stream at the hook of the SAE"
        )
    names = latent_names(store, run_id)
    out = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=True)
    out.add_column("unit", overflow="fold", ratio=2)
    out.add_column("what it does", overflow="fold", ratio=5)
    for _, group in groupby(rows, key=lambda row: row["unit"]):
        unit = list(group)
        out.add_row(Text(visible(unit[0]["name"] or str(unit[0]["unit"]))), Text(visible(sentence(unit, names))))
    console.print(out)
    if not names:
        console.print(Text("no latent is labelled yet: `autointerp label` names them", style="dim"))


def sentence(unit: Sequence[Mapping[str, Any]], names: Mapping[int, str]) -> str:
    """Rows of `units` of one unit as "fires on [A] and [B]; raises [C], lowers [D]"."""
    parts = []
    for side, joined in (("reads", " and "), ("writes", ", ")):
        rows = [row for row in unit if row["side"] == side]
        least = SHARE_OF_STRONGEST * max((abs(row["weight"]) for row in rows), default=0.0)
        said = []
        for positive in (True, False):
            kept = [row for row in rows if abs(row["weight"]) >= least and (row["weight"] > 0) == positive][:MOST]
            if kept:
                said.append(f"{_VERBS[side, positive]} {joined.join(_called(row['latent'], names) for row in kept)}")
        parts += [", ".join(said)] if said else []
    return "; ".join(parts)


def latent_names(store: Store, run_id: str) -> dict[int, str]:
    """Latent → label: this run's, else one that another run with the same dictionary has given it."""
    rows = store.read(
        """
        SELECT l.latent, l.label FROM labels AS l JOIN runs AS r USING (run_id)
        WHERE l.status IN ('ok', 'known') AND l.label IS NOT NULL AND l.label <> $nothing
          AND (r.sae, r.hook) IN (SELECT (sae, hook) FROM runs WHERE run_id = $run_id)
        QUALIFY row_number() OVER (PARTITION BY l.latent ORDER BY l.run_id = $run_id DESC, l.created_at DESC) = 1
        """,
        {"run_id": run_id, "nothing": NO_RULE},
    )
    return {row["latent"]: row["label"] for row in rows}


def _called(latent: int, names: Mapping[int, str]) -> str:
    return f"[{names[latent]}]" if latent in names else f"latent {latent}"
