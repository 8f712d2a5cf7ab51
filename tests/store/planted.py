"""A small store with everything in it, for the tests of what reads a store."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from autointerp.records import Context, Label, Prediction, Score, Write
from autointerp.store import Store

RUN = "run-1"
HOSTILE = "\x1b[2J[red]</script>\u202e"


def context(latent: int, context_id: int, kind: str = "top", split: str = "explain") -> Context:
    tokens = ("class", " Foo", ":", "\n", " def", HOSTILE)
    return Context(
        latent=latent,
        context_id=context_id,
        kind=kind,  # type: ignore[arg-type]
        rank=context_id + 1,
        split=split,  # type: ignore[arg-type]
        doc=context_id,
        position=7,
        tokens=tokens,
        act_base=(0.0, 0.0, 0.5, 0.0, 1.0, 0.0),
        act_adapted=(0.0, 0.0, 0.5, 0.0, 2.5, 0.25),
        peak=4,
    )


def write_run(store: Store, run_id: str = RUN, m: int = 16, k: int = 3) -> None:
    """One run of which latents 0 … k−1 are selected; latent 0 has every kind of row."""
    run = {"run_id": run_id, "status": "done", "stage": "label", "base": "tiny", "adapter": "out/lora", "sae": "sae"}
    figures = {"fvu_base": 0.05, "fvu_adapted": 0.07, "l0_base": 20.0, "l0_adapted": 21.5, "delta_fvu": 0.6}
    honest = {"change_r2": 0.84, "coverage": 0.52, "random_coverage": 0.18, "static_share": 0.031, "n_pass": 40}
    read = {"hook": "blocks.2.hook_resid_post", "d_sae": m, "n_tokens": 1_000_000, "n_docs": 2345, "corpus": "a.jsonl"}
    store.upsert("runs", [{**run, **figures, **honest, **read, "selector": "change", "created_at": datetime.now(UTC)}])
    latent = np.arange(m)
    columns = dict.fromkeys(("mean_base", "mean_adapted", "freq_base", "freq_adapted", "max_base"), latent * 0.1)
    columns |= {"max_adapted": latent * 0.2, "change": 1.0 / (latent + 1), "gain": np.full(m, 0.25)}
    columns |= {"state": np.array(["live"] * m), "role": np.array(["read"] * m, dtype=object), "selected": latent < k}
    columns |= {"rank": np.where(latent < k, latent + 1.0, np.nan), "coverage": np.where(latent < k, 0.2, np.nan)}
    store.write_latents(run_id, columns)
    store.write_writes(
        run_id,
        [
            Write(0, "promotes", None, " test", 1.5, 1),
            Write(0, "raises", 7, None, 0.25, 1, target_hint=" assert"),
        ],
    )
    predictions = [Prediction(0, 0, "base", 1, " x", 0.5), Prediction(0, 0, "adapted", 1, " test", 0.75)]
    contexts = [context(0, 0), context(0, 1, "gain"), context(0, 2, "silent", "score")]
    store.write_contexts(run_id, 0, contexts, predictions)
    label = Label(
        0, "lexical", "known", f"after def {HOSTILE}", "Fires on def.", "promotes ‘ test’", rule={"token": [1]}
    )
    store.write_label(run_id, label)
    store.write_score(run_id, Score(0, "lexical", "rule", 0.93, 0.9, 0.96, 0.5, 40, 1))
    store.flush()


def make_store(path: Path, *run_ids: str) -> Path:
    """A closed store at `path` with the given runs."""
    with Store.open(path) as store:
        for run_id in run_ids or (RUN,):
            write_run(store, run_id)
    return path
