"""`autointerp check`: is what was selected real? It goes on from the selection in the store, or makes it.

The corpus is read once more, since rows and activations are not kept; each check is stored as soon as it stands, and
the same command does what is missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from autointerp.pipeline import CHECKS, Job, load_evidence, select_and_store
from autointerp.progress import Reporter
from autointerp.results import Results
from autointerp.stopping import Stop, on_interrupt
from autointerp.store import Store

if TYPE_CHECKING:
    from autointerp.evidence.fitted import FittedMap
    from autointerp.evidence.gather import Evidence
    from autointerp.evidence.spool import Spool

INTERRUPTED = "interrupted: what was measured so far is stored, and the same command goes on"


async def acheck(job: Job, *, reporter: Reporter | None = None, stop: Stop | None = None) -> Results:
    """Runs the checks that the store does not hold yet. InputError (nothing changed) for bad input; StoppedByUser."""
    reporter, stop = reporter or Reporter(), stop or Stop()
    with on_interrupt(stop):
        if not _complete(job):
            evidence = await load_evidence(job)
            with contextlib.ExitStack() as held:
                held.enter_context(evidence)
                stop.check("interrupted before the corpus was read: nothing was stored")
                job = replace(job, run=evidence.run)
                store = held.enter_context(Store.open(job.db))
                held.enter_context(reporter)
                await _check(job, evidence, store, stop, reporter)
    return Results(job.db, job.run.run_id, 0)


def summary(results: Results) -> dict[str, Any]:
    """The run's figures, and every check of it: what `check --json` prints."""
    found = results.summary()
    for table in CHECKS:
        rows = results.sql(f"SELECT * EXCLUDE (run_id) FROM {table} WHERE run_id = ? ORDER BY ALL", [results.run_id])
        found[table] = rows.arrow().to_pylist()
    return found


@dataclass(frozen=True)
class Checked:
    """What the checks look at."""

    evidence: Evidence
    fitted: FittedMap
    spool: Spool
    latents: list[int]
    """Selected, by rank."""
    seed: int


Progress = Callable[[int], None]
Rows = dict[str, list[dict[str, Any]]]
"""Table → rows, without the run."""


async def _check(job: Job, evidence: Evidence, store: Store, stop: Stop, reporter: Reporter) -> None:
    run_id = job.run.run_id
    if not _stands(store, run_id):
        await select_and_store(replace(job, select_only=True), evidence, store, stop, reporter)
    missing = _missing(store, run_id)
    if not missing:
        return
    progress = _reports("tokens", stop, reporter)
    reporter.start("tokens", evidence.corpus.expected_tokens())
    fitted, spool = await asyncio.to_thread(evidence.fit, progress)
    reporter.finish("tokens")
    checked = Checked(evidence, fitted, spool, store.selected(run_id), job.run.settings.seed)
    for name in missing:
        reporter.start(name, None)
        rows = await asyncio.to_thread(_RUNS[name], checked, _reports(name, stop, reporter))
        reporter.finish(name)
        for table, found in rows.items():
            store.execute(f"DELETE FROM {table} WHERE run_id = ?", [run_id])
            store.upsert(table, [{"run_id": run_id, **row} for row in found])
        done = [other for other in _RUNS if other == name or other not in _missing(store, run_id)]
        store.upsert("runs", [{"run_id": run_id, "checks": done}])
        await store.aflush()


def _reports(stage: str, stop: Stop, reporter: Reporter) -> Progress:
    def progress(n: int) -> None:
        stop.check(INTERRUPTED)
        reporter.advance(stage, n)

    return progress


def _causal(checked: Checked, progress: Progress) -> Rows:
    from autointerp.evidence.causal import DRAWS, SIZES, HeldOut, Restoration, row_sets
    from autointerp.evidence.causal_single import one_by_one
    from autointerp.evidence.causal_static import SIZES as DIRECTIONS
    from autointerp.evidence.causal_static import direction_sets

    evidence, fitted = checked.evidence, checked.fitted
    held = HeldOut.of(checked.spool, evidence.corpus.bos)
    restoration = Restoration(evidence.models, evidence.dictionary, fitted, held)
    sets = row_sets(fitted, checked.latents, SIZES, DRAWS, checked.seed)
    if fitted.mostly_static:
        sets += direction_sets(fitted, DIRECTIONS, DRAWS, checked.seed)
    sums = restoration.together(sets, progress)
    alone = one_by_one(restoration, fitted, checked.latents, sums.whole(), checked.seed, lambda _n: progress(0))
    return {"causal": _dicts(sums.effects(sets)), "causal_latents": _dicts(alone)}


def _transfer(checked: Checked, progress: Progress) -> Rows:
    from autointerp.evidence.transfer import transfer

    found = transfer(checked.spool, checked.evidence.dictionary, checked.latents, checked.seed, progress)
    return {"transfer": _dicts(found)}


_RUNS: dict[str, Callable[[Checked, Progress], Rows]] = {"causal": _causal, "transfer": _transfer}
"""Check, named after its main table → how it is run."""


def _dicts(records: Sequence[Any]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(record) for record in records]


def _complete(job: Job) -> bool:
    """Whether selection and checks all stand, so that nothing need be loaded."""
    if not job.db.exists() or job.run.hook is None:
        return False
    with Store.open(job.db, "read") as store:
        return _stands(store, job.run.run_id) and not _missing(store, job.run.run_id)


def _stands(store: Store, run_id: str) -> bool:
    """Whether the run's selection is in the store."""
    return bool(store.read("SELECT 1 FROM runs WHERE run_id = ? AND stage IS NOT NULL", [run_id]))


def _missing(store: Store, run_id: str) -> list[str]:
    """The checks that have not run: some leave no row, so that what was done is told by the run."""
    (run,) = store.read("SELECT checks FROM runs WHERE run_id = ?", [run_id])
    return [name for name in _RUNS if name not in (run["checks"] or [])]
