"""The order of the work: run → select → collect → label → score → store. Read this file first. Where the training left
checkpoints, what was selected is followed over them before its contexts are collected.

The two halves meet here and in the store: `Evidence` (tensors) writes selections and contexts, the labelers (language
models or none) read them back. A run is found again by its id, so the same command goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from autointerp.errors import BudgetError, InputError, ProviderError
from autointerp.following import COURSE, follow, missing
from autointerp.labeling.base import LabelingSettings, check_labeler, make_labeler, make_scorer, split_spec
from autointerp.labeling.turns import Turns
from autointerp.labeling.work import FINISHED, Work, needing_calls, scored, usable
from autointerp.progress import Reporter
from autointerp.records import LatentEvidence, Write
from autointerp.results import Results
from autointerp.run import AUTO_TOP, WEIGHTS_ONLY, Run
from autointerp.stopping import Stop, StoppedByUser, on_interrupt
from autointerp.store import Store

if TYPE_CHECKING:
    from autointerp.evidence.gather import Evidence
    from autointerp.evidence.model_pair import ModelPair
    from autointerp.evidence.selection import Selection
    from autointerp.evidence.weights_evidence import WeightsEvidence

DEFAULT_DB = "results/autointerp.duckdb"
CHECKS = ("causal", "causal_latents", "transfer", "ngrams")
"""Tables of what was measured of a selection after it was made."""
SELECTED = ("latents", "writes", "decoder_tokens", "contexts", "predictions", "selectors", "selector_ranks", "map_rows")
"""Tables of a selection and what is collected for it."""
EVERY_LATENT = 1_000_000
"""In batch mode all latents wait at once, for the same batch."""
_OF_THE_RUN = ("base", "adapter", "adapter_format", "adapter_sha256", "since", "since_sha256", "sae", "corpus")
EXIT_OF_STATUS = {"done": 0, "partial": 3, "budget": 4, "stopped": 5, "interrupted": 130}


@dataclass(frozen=True)
class Job:
    """One command's wishes, beyond what is in the run."""

    run: Run
    db: Path = Path(DEFAULT_DB)
    labeler: str = "lexical"
    fallbacks: tuple[str, ...] = ()
    """Labelers for what `labeler` leaves open, in this order."""
    every: bool = False
    """Each of them labels everything: second opinions instead of fall-backs."""
    scorers: tuple[str, ...] = ()
    """Empty: the labeler's own."""
    labeling: dict[str, Any] = field(default_factory=dict)
    """Fields of LabelingSettings beyond run_id and seed."""
    select_only: bool = False

    @property
    def labelers(self) -> tuple[str, ...]:
        return (self.labeler, *self.fallbacks)

    def settings(self, run_id: str) -> LabelingSettings:
        return LabelingSettings(run_id=run_id, seed=self.run.settings.seed, **self.labeling)


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
    for spec in job.labelers:
        check_labeler(spec, job.settings("?"))
    check_scorers(job)
    stop = stop or Stop()
    with on_interrupt(stop):
        chosen = _stage(job) in ("collect", "label")
        evidence = None if chosen and not _unfollowed(job) else await _load(job, pair, tokenizer)
        with contextlib.ExitStack() as held:
            if evidence is not None:
                held.enter_context(evidence)
                stop.check("interrupted before the corpus was read: nothing was stored")
                job = replace(job, run=evidence.run)
            store = held.enter_context(Store.open(job.db))
            held.enter_context(reporter)
            status = await _work(job, evidence, chosen, store, stop, reporter)
    return Results(job.db, job.run.run_id, EXIT_OF_STATUS[status])


def estimate_job(job: Job) -> dict[str, Any]:
    """What labelling and scoring would take: latents, calls, tokens, dollars (None without a listed price), seconds.

    Exact evidence where the store holds it, else a typical latent, --top times (AUTO_TOP times where that is auto).
    Fall-backs are not counted: what they get to do is what goes wrong. Spends and stores nothing.
    """
    check_scorers(job)
    plans = [_estimate(job, spec) for spec in (job.labelers if job.every else job.labelers[:1])]
    total = dict(plans[0])
    for plan in plans[1:]:
        for name, value in plan.items():
            total[name] = None if value is None or total[name] is None else total[name] + value
    return total | {"latents": max(plan["latents"] for plan in plans)}


def _estimate(job: Job, spec: str) -> dict[str, Any]:
    """The same of one labeler."""
    from autointerp.labeling.llm.estimate import estimate

    scorers = _scorers(job, spec)
    top = job.run.settings.top
    latents: Any = AUTO_TOP if top == "auto" else top
    to_score: dict[str, list[LatentEvidence]] = {}
    run_id, stage = job.run.run_id, _stage(job)
    ask_all = job.settings(run_id).ask_all
    if stage is not None:
        with Store.open(job.db, "read") as store:
            selected = store.selected(run_id)
            latents = len(selected)
            if stage in ("collect", "label"):
                labels, have = store.labels(run_id, spec), scored(store, run_id, spec)
                selected = needing_calls(store, run_id, selected, ask_all or ":" not in spec)
                done = [j for j in selected if j in labels and labels[j].status in FINISHED]
                latents = [store.evidence(run_id, j) for j in selected if j not in done]
                for name in scorers:
                    waiting = [
                        j
                        for j in done
                        if usable(labels[j]) and (ask_all or labels[j].status == "ok") and (j, name) not in have
                    ]
                    to_score[name] = [store.evidence(run_id, j) for j in waiting]
    plan = asdict(estimate(spec, latents, scorers, job.settings(run_id), to_score))
    return {"latents": latents if isinstance(latents, int) else len(latents)} | plan


def check_scorers(job: Job) -> None:
    """InputError for a scorer that does not exist or needs a model the labeler has not, and for unusable templates."""
    from autointerp.labeling.base import find_scorer, needs_engine

    if len(set(job.labelers)) < len(job.labelers):
        raise InputError(f"--labeler {' '.join(job.labelers)}: one is named twice; name each once")
    for spec in job.labelers:
        _, model = split_spec(spec)
        for name in job.scorers:
            if needs_engine(find_scorer(name)[0]) and not model:
                raise InputError(
                    f"scorer {name!r} asks a language model: give --labeler openai:MODEL or anthropic:MODEL"
                )
        if model and job.labeling.get("prompts_dir"):
            from autointerp.labeling.llm.estimate import estimate  # renders every template there is

            estimate(spec, 1, _scorers(job, spec), job.settings("?"))


def _scorers(job: Job, spec: str) -> tuple[str, ...]:
    """The scorers by name: those wished for, else the labeler's own."""
    from autointerp.labeling.base import LABELERS

    name, _ = split_spec(spec)
    return job.scorers or (LABELERS.get(name).default_scorer,)  # pyright: ignore[reportFunctionMemberAccess]


def _stage(job: Job) -> str | None:
    """What evidence of this run the store already holds: None | select | collect | label."""
    if not job.db.exists() or job.run.hook is None:
        return None
    with Store.open(job.db, "read") as store:
        rows = store.read("SELECT stage FROM runs WHERE run_id = ?", [job.run.run_id])
    stage = rows[0]["stage"] if rows else None
    return "collect" if stage == "select" and job.select_only else stage


async def _load(job: Job, pair: ModelPair | None, tokenizer: Any) -> Evidence | WeightsEvidence:
    if _by_weights(job):
        from autointerp.evidence.weights_evidence import WeightsEvidence

        return await asyncio.to_thread(WeightsEvidence.load, job.run)
    return await load_evidence(job, pair, tokenizer)


def _by_weights(job: Job) -> bool:
    """Whether neither corpus nor model is needed."""
    return job.select_only and set(job.run.settings.selector) <= set(WEIGHTS_ONLY)


def _unfollowed(job: Job) -> bool:
    """Whether the training left checkpoints that the selected latents were not followed over yet."""
    if not job.run.checkpoints or _by_weights(job):
        return False
    with Store.open(job.db, "read") as store:
        return bool(missing(store, job.run))


async def load_evidence(job: Job, pair: ModelPair | None = None, tokenizer: Any = None) -> Evidence:
    """The run's models, dictionary and corpus, checked. InputError in one line."""
    from autointerp.evidence.gather import Evidence

    return await asyncio.to_thread(Evidence.load, job.run, pair=pair, tokenizer=tokenizer)


async def _work(
    job: Job,
    evidence: Evidence | WeightsEvidence | None,
    chosen: bool,
    store: Store,
    stop: Stop,
    reporter: Reporter,
) -> str:
    """Evidence, labels, scores; the status that the run ends with. chosen: what is selected stands in the store."""
    run_id = job.run.run_id
    try:
        if evidence is not None and not chosen:
            await select_and_store(job, evidence, store, stop, reporter)
        contextual = None if _by_weights(job) else cast("Evidence | None", evidence)
        if contextual is not None and not contextual.in_memory:
            await follow(contextual, store, stop, reporter)
        if job.select_only:
            store.execute("UPDATE runs SET status = 'done' WHERE run_id = ? AND stage = 'select'", [run_id])
            return "done"
        status = await _label(job, None if chosen else contextual, store, stop, reporter)
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


async def _label(job: Job, evidence: Evidence | None, store: Store, stop: Stop, reporter: Reporter) -> str:
    """Labels, scores and the summary, by the job's labelers in turn; `done` or `partial`."""
    run_id, settings = job.run.run_id, job.settings(job.run.run_id)
    if evidence is not None:
        await _store_known(run_id, evidence, store)

    def work(spec: str, skip: frozenset[int]) -> Work:
        labeler = make_labeler(spec, settings, store)
        if (engine := getattr(labeler, "engine", None)) is not None:
            stop.on_ask.append(engine.stopping.set)
        scorers = [make_scorer(name, labeler, settings) for name in _scorers(job, spec)]
        waiting = EVERY_LATENT if settings.batch else 2 * settings.concurrency
        return Work(store, run_id, labeler, scorers, waiting, stop, reporter, settings.ask_all, skip)

    turns = Turns(job.labelers, job.every, work, store, run_id, reporter)
    return "done" if await turns.run(evidence.contexts() if evidence is not None else None) else "partial"


async def select_and_store(
    job: Job, evidence: Evidence | WeightsEvidence, store: Store, stop: Stop, reporter: Reporter
) -> None:
    """Measures, selects and stores both; nothing is written before the selection stands."""
    from autointerp.evidence.selection import Selection

    if assumed := _assumed(job.run):
        reporter.say(f"adapter {job.run.adapter}: {assumed}")
    selection, writes = await asyncio.to_thread(_selection, evidence, stop, reporter)
    units = await asyncio.to_thread(evidence.units)
    decoder = await asyncio.to_thread(evidence.decoder_tokens)
    run_id = job.run.run_id
    old = COURSE if store.selected(run_id) != selection.latents else ()  # of the same latents, it goes on
    for table in (*SELECTED, *CHECKS, *old):
        store.execute(f"DELETE FROM {table} WHERE run_id = ?", [run_id])
    store.write_latents(run_id, selection.columns)
    if isinstance(selection, Selection):
        _store_selectors(run_id, selection, store)
    store.write_writes(run_id, writes)
    store.write_units(run_id, units)
    store.upsert("decoder_tokens", [{"run_id": run_id, **asdict(token)} for token in decoder])
    store.upsert("runs", [_run_row(job, evidence) | selection.figures | {"stage": "select", "checks": []}])
    await store.aflush()


def _selection(evidence: Evidence | WeightsEvidence, stop: Stop, reporter: Reporter) -> tuple[Any, list[Write]]:
    from autointerp.evidence.gather import Evidence

    if not isinstance(evidence, Evidence):
        return evidence.select()
    reporter.start("tokens", None)

    def progress(n: int) -> None:
        stop.check("interrupted while reading the corpus: nothing was stored")
        reporter.expect("tokens", evidence.corpus.expected_tokens())
        reporter.advance("tokens", n)

    found = evidence.select(progress)
    reporter.finish("tokens")
    return found


def _store_selectors(run_id: str, selection: Selection, store: Store) -> None:
    """How the selectors agree; where there are several, also what each says of every latent; rows of the map."""
    from autointerp.evidence.agreement import agreement, rank_columns
    from autointerp.evidence.kept_rows import kept_rows

    store.upsert("selectors", [{"run_id": run_id, **row} for row in agreement(selection.rankings, selection.fitted)])
    kept = kept_rows(selection.fitted, selection.latents)
    store.upsert("map_rows", [{"run_id": run_id, **row} for row in kept])
    if len(selection.rankings) > 1:
        for name, columns in rank_columns(selection.rankings).items():
            store.write_selector_ranks(run_id, name, columns)


async def _store_known(run_id: str, evidence: Evidence, store: Store) -> None:
    """Which of the selected latents are a token, bigram or trigram: those need no language model."""
    found = await asyncio.to_thread(evidence.known)
    store.upsert("ngrams", [{"run_id": run_id} | asdict(row) for row in found])
    await store.aflush()


def _assumed(run: Run) -> str | None:
    """What the run takes for granted because the files of its adapter do not say it."""
    from autointerp.evidence.adapters import ADAPTERS

    return ADAPTERS.get(run.adapter_format).assumed(run.adapter)


def _members(run: Run) -> list[dict[str, str]] | None:
    """Name, path and hash of each of several adapters that are active together."""
    from autointerp.evidence.adapters import ADAPTERS

    return [member._asdict() for member in ADAPTERS.get(run.adapter_format).members(run.adapter)] or None


def _run_row(job: Job, evidence: Evidence | WeightsEvidence) -> dict[str, Any]:
    from autointerp.evidence.gather import library_versions

    run = job.run
    kept = ("top", "selector", "fdr", "seed", "dtype", "outcome_column", "sae_adapted")
    settings = {name: value for name in kept if (value := getattr(run.settings, name)) is not None}
    shape = {name: getattr(run, name) for name in ("text_column", "context_length", "max_tokens")}
    return {
        "run_id": run.run_id,
        "path": str(run.path),
        "status": "done" if job.select_only else "running",
        **{name: getattr(run, name) for name in _OF_THE_RUN},
        "adapters": _members(run),
        "assumed": _assumed(run),
        "hook": run.hook,
        **evidence.shape,
        "selector": run.settings.selector[0],
        "seed": run.settings.seed,
        "settings": settings | shape,
        "versions": library_versions(),
        "created_at": datetime.now(UTC),
    }
