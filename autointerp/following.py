"""The selected latents over the checkpoints of one training: a checkpoint is stored as soon as it stands, and the same
command reads those that are missing."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError
from autointerp.progress import Reporter
from autointerp.run import Run
from autointerp.stopping import Stop
from autointerp.store import Store

if TYPE_CHECKING:
    from autointerp.evidence.course import Progress, Reading, Sample
    from autointerp.evidence.gather import Evidence
    from autointerp.evidence.series import Checkpoint

COURSE = ("checkpoints", "course")
"""Its tables."""
BASE = "base"
INTERRUPTED = "interrupted: the checkpoints read so far are stored, and the same command goes on"


def missing(store: Store, run: Run) -> list[Checkpoint]:
    """The run's checkpoints of which the store does not say how the selected latents stood there; none where no latent
    is selected."""
    if not run.checkpoints or not store.selected(run.run_id):
        return []
    rows = store.read("SELECT checkpoint FROM checkpoints WHERE run_id = ?", [run.run_id])
    stored = {row["checkpoint"] for row in rows}
    return [checkpoint for checkpoint in run.checkpoints if checkpoint.name not in stored]


async def follow(evidence: Evidence, store: Store, stop: Stop, reporter: Reporter) -> None:
    """Reads the missing checkpoints, one after the other. One that cannot be read is said, noted and passed over.

    StoppedByUser when interrupted; what was read is stored.
    """
    from autointerp.evidence.course import Sample

    run, todo = evidence.run, missing(store, evidence.run)
    if not todo:
        return
    latents = store.selected(run.run_id)

    def progress(_tokens: int) -> None:
        stop.check(INTERRUPTED)

    reporter.start("series", len(todo))
    sample = await asyncio.to_thread(
        Sample.read, evidence.models, evidence.dictionary, evidence.corpus, latents, progress
    )
    _store(store, run, latents, BASE, 0, sample, sample.base())
    end = await asyncio.to_thread(sample.at, evidence.models, progress)
    for checkpoint in todo:
        try:
            reading = end
            if checkpoint.path != run.adapter:
                reading = await asyncio.to_thread(_read, evidence, checkpoint, sample, progress)
            _store(store, run, latents, checkpoint.name, checkpoint.step, sample, reading, end)
        except InputError as error:
            reporter.say(f"passed over: {error}")
            failed = {"checkpoint": checkpoint.name, "step": checkpoint.step, "error": str(error)}
            store.upsert("checkpoints", [{"run_id": run.run_id, **failed}])
        await store.aflush()
        reporter.advance("series")


def _read(evidence: Evidence, checkpoint: Checkpoint, sample: Sample, progress: Progress) -> Reading:
    try:
        return sample.at(evidence.models_with(checkpoint.path), progress)
    finally:
        gc.collect()  # modules of models are in cycles: the next adapter is to find the room of this one


def _store(
    store: Store,
    run: Run,
    latents: list[int],
    name: str,
    step: int | None,
    sample: Sample,
    reading: Reading,
    end: Reading | None = None,
) -> None:
    """The rows of a checkpoint, and last the one which says that they stand."""
    key = {"run_id": run.run_id, "checkpoint": name, "step": step}
    cosines = [None] * len(latents) if end is None else map(_number, reading.cosines(end))
    columns: Iterable[Any] = zip(latents, reading.gain, reading.size, cosines, reading.mean, reading.freq, strict=True)
    names = ("latent", "gain", "size", "cosine", "mean", "freq")
    store.upsert("course", [key | dict(zip(names, values, strict=True)) for values in columns])
    figures = {name: getattr(reading, name) for name in ("change", "static_share", "coverage")}
    store.upsert("checkpoints", [key | figures | {"n_tokens": sample.n_tokens}])


def _number(value: float) -> float | None:
    return None if value != value else float(value)
