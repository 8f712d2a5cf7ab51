"""`autointerp.label`, `alabel` and `open`: the command line's job as functions."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from autointerp.pipeline import DEFAULT_DB, Job
from autointerp.pipeline import alabel as _alabel
from autointerp.progress import BarReporter, Reporter
from autointerp.results import Results
from autointerp.run import Run

_LABELING = (
    "max_usd",
    "rpm",
    "tpm",
    "itpm",
    "otpm",
    "api",
    "batch",
    "concurrency",
    "prompts_dir",
    "prices_path",
    "timeout_s",
    "ask_all",
)


def make_job(
    run: str | os.PathLike[str],
    *,
    labeler: str | tuple[str, ...] = "lexical",
    every: bool = False,
    scorer: str | tuple[str, ...] = (),
    db: str | os.PathLike[str] = DEFAULT_DB,
    **options: Any,
) -> Job:
    """A checked job. Of several labelers, each later one labels what the earlier ones leave open; with `every`, all of
    them label everything. `options`: the keys of run.yaml, Settings (top, selector, fdr, seed, device, dtype, scratch)
    and LabelingSettings (max_usd, rpm, tpm, concurrency, …). InputError in one line for what is wrong."""
    labeling = {key: options.pop(key) for key in _LABELING if options.get(key) is not None}
    scorers = (scorer,) if isinstance(scorer, str) else tuple(scorer)
    first, *others = (labeler,) if isinstance(labeler, str) else labeler
    return Job(Run.load(Path(run), **options), Path(db), first, tuple(others), every, scorers, labeling)


async def alabel(run: str | os.PathLike[str], *, progress: bool = False, **options: Any) -> Results:
    """`label` inside an event loop."""
    return await _alabel(make_job(run, **options), reporter=BarReporter() if progress else Reporter())


def label(run: str | os.PathLike[str], *, progress: bool = False, **options: Any) -> Results:
    """Select, collect, label and score: `autointerp label --run RUN` as a function.

    Options as `make_job`. Running it again finishes what is missing and pays for nothing twice. InputError for bad
    input (nothing is changed); every other ending is in `Results.status` and `Results.exit_status`.
    """
    return asyncio.run(alabel(run, progress=progress, **options))


def open(db: str | os.PathLike[str] = DEFAULT_DB, run_id: str | None = None) -> Results:
    """The results in a store: of the newest run, or of the one named."""
    return Results(db, run_id)
