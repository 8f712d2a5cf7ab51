"""The order of the work: run → select → collect → label → score → store. Read this file first.

The two halves meet here and in the store: `Evidence` (tensors) writes selections and contexts, the labelers (language
models or none) read them back. A run is found again by its id, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.errors import AutointerpError, BudgetError, InputError, ProviderError
from autointerp.labeling.base import (
    Labeler,
    LabelingSettings,
    Scorer,
    check_labeler,
    make_labeler,
    make_scorer,
    split_spec,
)
from autointerp.progress import Reporter
from autointerp.records import Label
from autointerp.results import Results
from autointerp.run import Run
from autointerp.store import Store

if TYPE_CHECKING:
    from autointerp.evidence.gather import Evidence
    from autointerp.evidence.model_pair import ModelPair

DEFAULT_DB = "results/autointerp.duckdb"
FINISHED = ("ok", "known", "refused")
"""Label statuses that are not asked for again."""
EXIT_OF_STATUS = {"done": 0, "partial": 3, "budget": 4, "stopped": 5, "interrupted": 130}


@dataclass(frozen=True)
class Job:
    """One command's wishes, beyond what is in the run."""

    run: Run
    db: Path = Path(DEFAULT_DB)
    labeler: str = "lexical"
    scorers: tuple[str, ...] = ()
    """Empty: the labeler's own."""
    labeling: dict[str, Any] = field(default_factory=dict)
    """Fields of LabelingSettings beyond run_id and seed."""
    select_only: bool = False

    def settings(self, run_id: str) -> LabelingSettings:
        return LabelingSettings(run_id=run_id, seed=self.run.settings.seed, **self.labeling)


@dataclass
class Stop:
    """Set once by Ctrl-C; every stage looks at it between two units of work."""

    asked: bool = False
    labeler: Labeler | None = None

    def ask(self) -> None:
        self.asked = True
        engine = getattr(self.labeler, "engine", None)
        if engine is not None:
            engine.stopping.set()


class StoppedByUser(AutointerpError):
    """Ctrl-C: what was under way is finished and stored."""

    exit_status = 130


async def alabel(
    job: Job,
    *,
    pair: ModelPair | None = None,
    tokenizer: Any = None,
    reporter: Reporter | None = None,
    stop: Stop | None = None,
) -> Results:
    """Does what of the job is not yet done. InputError (nothing changed) for bad input; every other end is in the
    results.

    `pair` and `tokenizer`: a model in memory instead of the run's files, for training callbacks. `stop`: asked
    from within the loop, it drains the job as Ctrl-C does.
    """
    reporter = reporter or Reporter()
    check_labeler(job.labeler, job.settings("?"))
    check_scorers(job)
    stop = stop or Stop()
    with _on_interrupt(stop):
        stands = _stage(job)
        evidence = None if stands in ("collect", "label") else await _load(job, pair, tokenizer)
        with contextlib.ExitStack() as held:
            if evidence is not None:
                held.enter_context(evidence)
                job = replace(job, run=evidence.run)
            store = held.enter_context(Store.open(job.db))
            held.enter_context(reporter)
            status = await _work(job, evidence, store, stop, reporter)
    return Results(job.db, job.run.run_id, EXIT_OF_STATUS[status])


def estimate_job(job: Job) -> dict[str, Any]:
    """What labelling and scoring would take: latents, calls, tokens, dollars (None without a listed price), seconds.

    Exact evidence where the store holds it, else a typical latent, --top times. Spends and stores nothing.
    """
    from dataclasses import asdict

    from autointerp.labeling.base import LABELERS
    from autointerp.labeling.llm.estimate import estimate

    check_scorers(job)
    name, _ = split_spec(job.labeler)
    scorers = job.scorers or (LABELERS.get(name).default_scorer,)  # pyright: ignore[reportFunctionMemberAccess]
    latents: Any = job.run.settings.top
    run_id = job.run.run_id
    if _stage(job) in ("collect", "label"):
        with Store.open(job.db, "read") as store:
            done = {j for j, label in store.labels(run_id, job.labeler).items() if label.status in FINISHED}
            latents = [store.evidence(run_id, j) for j in store.selected(run_id) if j not in done]
    plan = asdict(estimate(job.labeler, latents, scorers, job.settings(run_id)))
    return {"latents": latents if isinstance(latents, int) else len(latents)} | plan


def check_scorers(job: Job) -> None:
    """InputError for a scorer that does not exist, or that needs a model the labeler has not."""
    from autointerp.labeling.base import SCORERS, needs_engine

    _, model = split_spec(job.labeler)
    for name in job.scorers:
        if needs_engine(SCORERS.get(name)) and not model:
            raise InputError(f"scorer {name!r} asks a language model: give --labeler openai:MODEL or anthropic:MODEL")


def _stage(job: Job) -> str | None:
    """What evidence of this run the store already holds: None | select | collect | label."""
    if not job.db.exists() or job.run.hook is None:
        return None
    with Store.open(job.db, "read") as store:
        rows = store.read("SELECT stage FROM runs WHERE run_id = ?", [job.run.run_id])
    stage = rows[0]["stage"] if rows else None
    return "collect" if stage == "select" and job.select_only else stage


async def _load(job: Job, pair: ModelPair | None, tokenizer: Any) -> Evidence:
    from autointerp.evidence.gather import Evidence

    return await asyncio.to_thread(Evidence.load, job.run, pair=pair, tokenizer=tokenizer)


async def _work(job: Job, evidence: Evidence | None, store: Store, stop: Stop, reporter: Reporter) -> str:
    """Evidence, labels, scores; the status that the run ends with."""
    run_id = job.run.run_id
    try:
        if evidence is not None:
            await _select(job, evidence, store, stop, reporter)
        if job.select_only:
            return "done"
        settings = job.settings(run_id)
        labeler = stop.labeler = make_labeler(job.labeler, settings, store)
        scorers = [make_scorer(name, labeler, settings) for name in job.scorers or (labeler.default_scorer,)]
        try:
            await _label_all(job, labeler, evidence, store, stop, reporter)
            await _score_all(job, labeler, scorers, store, stop, reporter)
        finally:
            engine = getattr(labeler, "engine", None)
            if engine is not None:
                await engine.aclose()
        status = _ending(store, run_id, labeler.name)
    except StoppedByUser:
        if not store.read("SELECT 1 FROM runs WHERE run_id = ?", [run_id]):
            raise
        status = "interrupted"
    except BudgetError as error:
        status = "budget"
        reporter.say(str(error))
    except ProviderError as error:
        status = "stopped"
        reporter.say(str(error))
    done = {"stage": "label"} if status in ("done", "partial") else {}
    store.upsert("runs", [{"run_id": run_id, "status": status, "finished_at": datetime.now(UTC), **done}])
    await store.aflush()
    return status


async def _select(job: Job, evidence: Evidence, store: Store, stop: Stop, reporter: Reporter) -> None:
    """Measures, selects and stores both; nothing is written before the selection stands."""
    reporter.start("tokens", None)

    def progress(n: int) -> None:
        if stop.asked:
            raise StoppedByUser("interrupted while reading the corpus: nothing was stored")
        reporter.advance("tokens", n)

    selection, writes = await asyncio.to_thread(evidence.select, progress)
    run_id = job.run.run_id
    for table in ("latents", "writes", "contexts", "predictions"):
        store.execute(f"DELETE FROM {table} WHERE run_id = ?", [run_id])
    store.write_latents(run_id, selection.columns)
    store.write_writes(run_id, writes)
    store.upsert("runs", [_run_row(job, evidence) | selection.figures | {"stage": "select"}])
    await store.aflush()


def _run_row(job: Job, evidence: Evidence) -> dict[str, Any]:
    from autointerp.evidence.gather import library_versions

    run, dictionary = job.run, evidence.dictionary
    settings = {name: getattr(run.settings, name) for name in ("top", "selector", "fdr", "seed", "dtype")}
    shape = {name: getattr(run, name) for name in ("text_column", "context_length", "max_tokens")}
    return {
        "run_id": run.run_id,
        "path": str(run.path),
        "status": "done" if job.select_only else "running",
        **{
            name: getattr(run, name)
            for name in ("base", "adapter", "adapter_format", "adapter_sha256", "sae", "corpus")
        },
        "sae_format": dictionary.format,
        "hook": run.hook,
        "d_model": dictionary.d_in,
        "d_sae": dictionary.d_sae,
        "selector": run.settings.selector[0],
        "seed": run.settings.seed,
        "settings": settings | shape,
        "versions": library_versions(),
        "created_at": datetime.now(UTC),
    }


async def _label_all(
    job: Job, labeler: Labeler, evidence: Evidence | None, store: Store, stop: Stop, reporter: Reporter
) -> None:
    """Labels each selected latent as soon as its contexts stand; those that have a label already are passed over."""
    run_id = job.run.run_id
    selected = store.selected(run_id)
    done = {latent for latent, label in store.labels(run_id, labeler.name).items() if label.status in FINISHED}
    waiting = asyncio.Semaphore(2 * job.settings(run_id).concurrency)
    reporter.start("labels", len(selected))
    reporter.advance("labels", len(done & set(selected)))

    async def label(latent: int) -> None:
        async with waiting:
            if stop.asked:
                raise StoppedByUser("interrupted")
            found = await labeler.label(await asyncio.to_thread(store.evidence, run_id, latent))
            await asyncio.wrap_future(store.write_label(run_id, found))
            reporter.advance("labels", 1, _spent(labeler))

    async with _gathering() as tasks:
        if evidence is None:
            for latent in selected:
                if latent not in done:
                    tasks.create_task(label(latent))
        else:
            reporter.start("contexts", len(selected))
            async for latent, contexts, predictions in evidence.contexts():
                if stop.asked:
                    raise StoppedByUser("interrupted")
                await asyncio.wrap_future(store.write_contexts(run_id, latent, contexts, predictions))
                reporter.advance("contexts")
                if latent not in done:
                    tasks.create_task(label(latent))
            store.upsert("runs", [{"run_id": run_id, "stage": "collect"}])
    if labeler.name == "lexical":
        await _name_targets(run_id, store)


async def _name_targets(run_id: str, store: Store) -> None:
    """Second look at lexical effects, now that the latents they speak of have labels."""
    from autointerp.labeling.effect import effect_sentence
    from autointerp.labeling.lexical import NO_RULE

    labels = store.labels(run_id, "lexical")
    names = {latent: label.label for latent, label in labels.items() if label.label and label.label != NO_RULE}
    for latent, label in labels.items():
        effect = effect_sentence(store.evidence(run_id, latent), names)
        if effect != label.effect:
            store.upsert("labels", [{"run_id": run_id, "latent": latent, "labeler": "lexical", "effect": effect}])
    await store.aflush()


async def _score_all(
    job: Job, labeler: Labeler, scorers: Sequence[Scorer], store: Store, stop: Stop, reporter: Reporter
) -> None:
    """Scores every usable label that has no score yet, beside the label of another latent as the null."""
    run_id = job.run.run_id
    labels = store.labels(run_id, labeler.name)
    usable = [labels[latent] for latent in store.selected(run_id) if latent in labels and _usable(labels[latent])]
    rows = store.read("SELECT latent, scorer FROM scores WHERE run_id = ? AND labeler = ?", [run_id, labeler.name])
    scored = {(row["latent"], row["scorer"]) for row in rows}
    waiting = asyncio.Semaphore(2 * job.settings(run_id).concurrency)
    reporter.start("scores", len(usable) * len(scorers))

    async def score(scorer: Scorer, label: Label, wrong: Label | None) -> None:
        async with waiting:
            if stop.asked:
                raise StoppedByUser("interrupted")
            found = await scorer.score(await asyncio.to_thread(store.evidence, run_id, label.latent), label, wrong)
            await asyncio.wrap_future(store.write_score(run_id, found))
            reporter.advance("scores", 1, _spent(labeler))

    async with _gathering() as tasks:
        for scorer in scorers:
            for at, label in enumerate(usable):
                if (label.latent, scorer.name) in scored:
                    reporter.advance("scores")
                else:
                    tasks.create_task(score(scorer, label, _wrong(usable, at)))


def _usable(label: Label) -> bool:
    return label.status in ("ok", "known")


def _wrong(usable: Sequence[Label], at: int) -> Label | None:
    """Another latent's label, as far away in rank as there is, and one that claims something where possible."""
    n = len(usable)
    others = [usable[(at + n // 2 + step) % n] for step in range(n)]
    others = [other for other in others if other.latent != usable[at].latent and other.label != usable[at].label]
    claiming = [other for other in others if usable[at].rule is None or other.rule is not None]
    return next(iter(claiming or others), None)


def _spent(labeler: Labeler) -> str:
    engine = getattr(labeler, "engine", None)
    return f"${engine.spend.usd + engine.spend.usd_in_doubt:.4f}" if engine is not None else ""


@contextlib.asynccontextmanager
async def _gathering() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first real error itself, not a group of them."""
    from autointerp.labeling.llm.faults import Interrupted

    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, asyncio.CancelledError)]
        if any(isinstance(error, Interrupted | StoppedByUser) for error in errors):
            raise StoppedByUser("interrupted") from None
        raise errors[0] from None


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)


def _ending(store: Store, run_id: str, labeler: str) -> str:
    """`partial` when a selected latent has no usable label, else `done`."""
    labels = store.labels(run_id, labeler)
    return "done" if all(_usable(labels[j]) for j in store.selected(run_id) if j in labels) else "partial"


@contextlib.contextmanager
def _on_interrupt(stop: Stop) -> Iterator[None]:
    """The first Ctrl-C drains; a second one, or one where no handler can be set, is the usual KeyboardInterrupt."""
    loop = asyncio.get_running_loop()

    def first() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop.ask()

    try:
        loop.add_signal_handler(signal.SIGINT, first)
    except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread
        yield
        return
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)
