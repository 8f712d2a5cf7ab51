"""Labels and scores of one run: what is missing is made, in any order, and stored as soon as it stands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from autointerp.errors import AutointerpError, BudgetError, ProviderError
from autointerp.labeling.base import Labeler, Scorer, needs_engine
from autointerp.labeling.effect import effect_sentence
from autointerp.labeling.known import known_label
from autointerp.labeling.lexical import NO_RULE
from autointerp.labeling.llm.faults import Interrupted
from autointerp.labeling.scorers.rule import RuleScorer
from autointerp.labeling.summary import summary_row
from autointerp.progress import Reporter
from autointerp.records import Change, Context, Label, Ngrams, Prediction
from autointerp.show_money import cached_words
from autointerp.stopping import Stop
from autointerp.store import Store

FINISHED = ("ok", "known", "refused")
"""Label statuses that are not asked for again."""

Contexts = AsyncIterator[tuple[int, list[Context], list[Prediction]]]
"""(latent, its contexts, predictions at their peaks), one latent after the other."""


def usable(label: Label) -> bool:
    """Whether a label says something that can be scored."""
    return label.status in ("ok", "known")


def needing_calls(store: Store, run_id: str, latents: Sequence[int], ask_all: bool) -> list[int]:
    """Those of `latents` that a labeler's model is asked about: not the dead ones nor, without `ask_all`, n-grams."""
    dead = store.dead(run_id)
    known = {latent for latent, found in store.ngrams(run_id).items() if found.length is not None and not ask_all}
    return [latent for latent in latents if latent not in dead | known]


def scored(store: Store, run_id: str, labeler: str) -> set[tuple[int, str]]:
    """(latent, scorer) of the scores that stand for this labeler's labels."""
    rows = store.read("SELECT latent, scorer FROM scores WHERE run_id = ? AND labeler = ?", [run_id, labeler])
    return {(row["latent"], row["scorer"]) for row in rows}


@dataclass
class Work:
    """One labeler's work on one run."""

    store: Store
    run_id: str
    labeler: Labeler
    scorers: Sequence[Scorer]
    waiting: int
    """Latents under way at once; a labeler limits its own requests."""
    stop: Stop
    reporter: Reporter
    ask_all: bool = False
    """Whether the labeler's model is asked about latents that are n-grams, too."""
    skip: frozenset[int] = frozenset()
    """Latents that another labeler has labelled."""
    halted: AutointerpError | None = field(default=None, init=False)
    """The budget or the provider said no: nothing more is asked, but contexts are still collected."""

    def __post_init__(self) -> None:
        self._free = asyncio.Semaphore(self.waiting)
        self._asks = getattr(self.labeler, "engine", None) is not None and not self.ask_all
        self._ngrams: dict[int, Ngrams] = {}

    async def label(self, contexts: Contexts | None) -> None:
        """Labels each selected latent that has no label yet and is not dead. With `contexts`, stores them as they come
        and labels each latent at once, while others are still being collected; without, they stand in the store."""
        selected = self.store.selected(self.run_id)
        labels = self.store.labels(self.run_id, self.labeler.name)
        done = {latent for latent in selected if latent in labels and labels[latent].status in FINISHED}
        done |= self.skip | (self.store.dead(self.run_id) & set(selected))
        self._ngrams = self.store.ngrams(self.run_id) if self._asks else {}
        self.reporter.start("labels", len(selected))
        self.reporter.advance("labels", len(done))
        engine = getattr(self.labeler, "engine", None)
        async with _gathering() as tasks:
            # Contexts take their time to come: in batch mode all labels go into one batch all the same.
            with engine.hold() if engine is not None else contextlib.nullcontext():
                async for latent in self._stored(contexts) if contexts is not None else _each(selected):
                    if latent not in done:
                        tasks.create_task(self._guarded(lambda latent=latent: self._label(latent), "labels"))
        self._raise_halt()
        if self.labeler.name == "lexical":
            await self._name_targets()

    async def score(self, labeler: str | None = None) -> None:
        """Scores every usable label that has no score yet, beside the label of another latent as the null.

        With `labeler`, the labels of that one, whose own judge is out of reach.
        """
        labeler = labeler or self.labeler.name
        labels = self.store.labels(self.run_id, labeler)
        found = [labels[j] for j in self.store.selected(self.run_id) if j in labels and usable(labels[j])]
        done = scored(self.store, self.run_id, labeler)
        self.reporter.start("scores", len(found) * len(self.scorers))
        async with _gathering() as tasks:
            for wished in self.scorers:
                for at, label in enumerate(found):
                    scorer = self._scorer_of(label, wished)
                    if (label.latent, scorer.name) in done:
                        self.reporter.advance("scores")
                        continue
                    wrong = wrong_label(found, at)
                    tasks.create_task(
                        self._guarded(lambda s=scorer, right=label, w=wrong: self._score(s, right, w), "scores")
                    )
        self._raise_halt()

    def _scorer_of(self, label: Label, wished: Scorer) -> Scorer:
        """What asks a model is not asked of a known feature: its rule is run instead."""
        known = label.status == "known" and not self.ask_all
        return RuleScorer() if known and needs_engine(wished) else wished

    async def summarise(self, changes: Sequence[Change]) -> str | None:
        """What the training changed, over these labels; its status once it is stored, None when we were stopped."""
        self.reporter.start("summary", 1)
        status: list[str] = []

        async def summarise() -> None:
            summary = await self.labeler.summarise(changes)
            await asyncio.wrap_future(self.store.upsert("summaries", [summary_row(self.run_id, summary, changes)]))
            status.append(summary.status)

        await self._guarded(summarise, "summary")
        self._raise_halt()
        return status[0] if status else None

    def labelled(self) -> set[int]:
        """The latents with a usable label of this labeler."""
        labels = self.store.labels(self.run_id, self.labeler.name)
        return {latent for latent in self.store.selected(self.run_id) if latent in labels and usable(labels[latent])}

    def all_scored(self) -> bool:
        """Whether each of those has all the scores that it is to get."""
        labels = self.store.labels(self.run_id, self.labeler.name)
        done = scored(self.store, self.run_id, self.labeler.name)
        wished = ((latent, scorer) for latent in self.labelled() for scorer in self.scorers)
        return all((latent, self._scorer_of(labels[latent], scorer).name) in done for latent, scorer in wished)

    async def _stored(self, contexts: Contexts) -> AsyncIterator[int]:
        """The latents whose contexts are committed, one by one."""
        self.reporter.start("contexts", len(self.store.selected(self.run_id)))
        async for latent, found, predictions in contexts:
            if self.stop.asked:
                return
            await asyncio.wrap_future(self.store.write_contexts(self.run_id, latent, found, predictions))
            self.reporter.advance("contexts")
            yield latent
        self.store.upsert("runs", [{"run_id": self.run_id, "stage": "collect"}])

    async def _label(self, latent: int) -> None:
        evidence = await asyncio.to_thread(self.store.evidence, self.run_id, latent)
        label = known_label(evidence, self._ngrams.get(latent), self.labeler.name)
        label = label or await self.labeler.label(evidence)
        await asyncio.wrap_future(self.store.write_label(self.run_id, label))

    async def _score(self, scorer: Scorer, label: Label, wrong: Label | None) -> None:
        evidence = await asyncio.to_thread(self.store.evidence, self.run_id, label.latent)
        await asyncio.wrap_future(self.store.write_score(self.run_id, await scorer.score(evidence, label, wrong)))

    async def _guarded(self, work: Callable[[], Awaitable[None]], stage: str) -> None:
        """One unit of work, unless all is over; a spent budget or a provider's no halts the others, not the run, and
        what is under way when Ctrl-C comes is finished."""
        async with self._free:
            if self.halted is not None or self.stop.asked:
                return
            try:
                await work()
            except Interrupted:
                return
            except (BudgetError, ProviderError) as error:
                self.halted = self.halted or error
                return
            self.reporter.advance(stage, 1, self._spent())

    def _raise_halt(self) -> None:
        self.stop.check()
        if self.halted is not None:
            raise self.halted

    def _spent(self) -> str:
        engine = getattr(self.labeler, "engine", None)
        if engine is None:
            return ""
        spend = engine.spend
        cached = f" · {cached_words(spend.cached_tokens, spend.input_tokens)}" if spend.cached_tokens else ""
        return f"${spend.usd + spend.usd_in_doubt:.4f}{cached}"

    async def _name_targets(self) -> None:
        """Second look at lexical effects, now that the latents they speak of have labels."""
        labels = self.store.labels(self.run_id, "lexical")
        names = {latent: label.label for latent, label in labels.items() if label.label and label.label != NO_RULE}
        for latent, label in labels.items():
            effect = effect_sentence(self.store.evidence(self.run_id, latent), names)
            if effect != label.effect:
                row = {"run_id": self.run_id, "latent": latent, "labeler": "lexical", "effect": effect}
                self.store.upsert("labels", [row])
        await self.store.aflush()


def wrong_label(found: Sequence[Label], at: int) -> Label | None:
    """Another latent's label, as far away in rank as there is, and one that claims something where possible."""
    n, own = len(found), found[at]
    others = [found[(at + n // 2 + step) % n] for step in range(n)]
    others = [other for other in others if (other.label, other.explanation) != (own.label, own.explanation)]
    others.sort(key=lambda other: other.label == own.label)  # stable: one of another name where there is one
    claiming = [other for other in others if own.rule is None or other.rule is not None]
    return next(iter(claiming or others), None)


async def _each(latents: Sequence[int]) -> AsyncIterator[int]:
    for latent in latents:
        yield latent


@contextlib.asynccontextmanager
async def _gathering() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that raises the first real error itself, not a group of them."""
    try:
        async with asyncio.TaskGroup() as tasks:
            yield tasks
    except BaseExceptionGroup as group:
        errors = [error for error in _leaves(group) if not isinstance(error, asyncio.CancelledError)]
        raise errors[0] from None


def _leaves(group: BaseExceptionGroup) -> Iterator[BaseException]:
    for error in group.exceptions:
        yield from _leaves(error) if isinstance(error, BaseExceptionGroup) else (error,)
