"""Handing the labels on: Parquet tables and JSON lines. A further format is one function in `EXPORTS`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from autointerp.errors import InputError
from autointerp.store.store import Store

Exporter = Callable[[Store, list[str], Path], None]
"""Writes the given runs of a store to a path that does not exist yet."""

_TABLES = (
    "runs",
    "latents",
    "writes",
    "decoder_tokens",
    "contexts",
    "predictions",
    "labels",
    "scores",
    "summaries",
    "units",
    "causal",
    "causal_latents",
    "transfer",
    "ngrams",
    "checkpoints",
    "course",
    "calls",
    "changed_latents",
)


def export(
    path: str | os.PathLike[str],
    format: str,
    out: str | os.PathLike[str],
    run_id: str | None = None,
    force: bool = False,
) -> Path:
    """Write one run, or all of them, from the store at `path` to `out`; returns where it stands.

    parquet: `changed_latents` with what is known of the run when `out` ends in .parquet, otherwise a folder with one
    file per table. jsonl: one object per selected latent. `out` appears whole or not at all.

    InputError: unknown format or run, no store, `out` exists already (unless `force`) or cannot be written.
    """
    if format not in EXPORTS:
        raise InputError(f"unknown export format {format!r}: choose one of {', '.join(sorted(EXPORTS))}")
    target = Path(out)
    if target.exists() and not force:
        raise InputError(f"{target} exists already: name another file, or say --force to replace it")
    with Store.open(path, mode="read") as store:
        newest = store.run_id(run_id)
        runs = (
            [newest]
            if run_id
            else [r["run_id"] for r in store.read("SELECT run_id FROM runs ORDER BY created_at, run_id")]
        )
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as drafts:
                draft = Path(drafts, target.name)
                EXPORTS[format](store, runs, draft)
                _put_in_place(draft, target)
        except OSError as error:
            raise InputError(f"cannot export to {target}: {error.strerror or error}; name another file") from error
    return target


def _parquet(store: Store, runs: list[str], out: Path) -> None:
    if out.suffix == ".parquet":
        pq.write_table(
            store.arrow(
                "SELECT c.*, r.base, r.adapter, r.sae, r.hook, r.selector, r.corpus, r.n_tokens, r.change_r2 "
                "FROM changed_latents AS c LEFT JOIN runs AS r USING (run_id) "
                "WHERE list_contains(?, c.run_id) ORDER BY c.run_id, c.rank",
                [runs],
            ),
            out,
        )
        return
    out.mkdir()
    for table in _TABLES:
        rows = store.arrow(f"SELECT * FROM {table} WHERE list_contains(?, run_id)", [runs])
        pq.write_table(rows, out / f"{table}.parquet")


def _jsonl(store: Store, runs: list[str], out: Path) -> None:
    with out.open("w", encoding="utf-8") as file:
        for run_id in runs:
            for latent in latent_objects(store, run_id):
                file.write(json.dumps(latent, ensure_ascii=False, default=str) + "\n")


def latent_objects(store: Store, run_id: str) -> Iterator[dict[str, Any]]:
    """One plain object per selected latent, by rank: statistics, newest label, all scores, contexts and writes."""
    for latent in store.selected(run_id):
        key = [run_id, latent]
        (row,) = store.read("SELECT * EXCLUDE (selected) FROM latents WHERE run_id = ? AND latent = ?", key)
        (label,) = store.read(
            "SELECT c.label, c.explanation, c.effect, c.status, l.salvaged, c.labeler, scorer, score, null_score "
            "FROM changed_latents AS c LEFT JOIN labels AS l USING (run_id, latent, labeler) "
            "WHERE run_id = ? AND latent = ?",
            key,
        )
        parts = {
            name: store.read(
                f"SELECT * EXCLUDE (run_id, latent) FROM {name} WHERE run_id = ? AND latent = ? ORDER BY ALL", key
            )
            for name in ("scores", "writes", "contexts", "predictions")
        }
        parts["course"] = store.read(
            "SELECT * EXCLUDE (run_id, latent) FROM course WHERE run_id = ? AND latent = ? ORDER BY step NULLS LAST",
            key,
        )
        yield {**row, **label, **parts, **_checks(store, key)}


def _checks(store: Store, key: list[Any]) -> dict[str, Any]:
    """What was measured of a latent by `check`, under the name of its table; None where it was not."""
    found: dict[str, Any] = {}
    for name in ("causal_latents", "transfer", "ngrams"):
        rows = store.read(f"SELECT * EXCLUDE (run_id, latent) FROM {name} WHERE run_id = ? AND latent = ?", key)
        found[name] = rows[0] if rows else None
    return found


def _put_in_place(draft: Path, target: Path) -> None:
    if draft.is_dir() and target.is_dir():
        for file in draft.iterdir():  # what else lies in the user's folder is not ours to remove
            os.replace(file, target / file.name)
    else:
        os.replace(draft, target)


EXPORTS: dict[str, Exporter] = {"parquet": _parquet, "jsonl": _jsonl}
