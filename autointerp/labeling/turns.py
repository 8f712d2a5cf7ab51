"""Several labelers on one run: each later one for what the earlier ones leave open, or all of them for everything."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from autointerp.errors import ProviderError
from autointerp.labeling.summary import labelled_changes, summary_status
from autointerp.labeling.work import Contexts, Work
from autointerp.progress import Reporter
from autointerp.store import Store


@dataclass
class Turns:
    """The labelers of one run, by name, in their order.

    A labeler whose provider stops us is passed over as long as there is another; the last one's error is raised.
    """

    labelers: Sequence[str]
    every: bool
    """Each labels everything and summarises its own labels, instead of what is left open."""
    make: Callable[[str, frozenset[int]], Work]
    """The work of a labeler that leaves out the latents given."""
    store: Store
    run_id: str
    reporter: Reporter
    _works: dict[str, Work] = field(default_factory=dict, init=False)
    _stopped: set[str] = field(default_factory=set, init=False)
    _engines: contextlib.AsyncExitStack = field(default_factory=contextlib.AsyncExitStack, init=False)

    async def run(self, contexts: Contexts | None) -> bool:
        """Labels, scores and the summary; whether every latent that can have a label has one."""
        wanted = set(self.store.selected(self.run_id)) - self.store.dead(self.run_id)
        async with self._engines:
            for name in self.labelers:
                unscored = [other for other, work in self._works.items() if not self.every and not work.all_scored()]
                if self._works and not self.every and self._labelled() >= wanted and not unscored:
                    break
                async with self._passed_over(name):
                    await self._label(name, unscored, contexts)
                contexts = None  # they stand in the store now
            if not self.every:
                await self._summarise_all()
            complete = [work.labelled() >= wanted for work in self._works.values()]
            return all(complete) if self.every else self._labelled() >= wanted

    async def _label(self, name: str, unscored: Sequence[str], contexts: Contexts | None) -> None:
        work = self._work(name)
        await work.label(contexts)
        await work.score()
        for other in unscored:
            await work.score(other)
        if self.every:
            changes = labelled_changes(self.store, self.run_id, [name])
            if changes and summary_status(self.store, self.run_id, name, changes) in (None, "failed"):
                await work.summarise(changes)

    async def _summarise_all(self) -> None:
        """One summary of all labels, whoever gave them, by the first labeler that gives one. Who refused to is not
        asked again; where one stands of just these labels and scores, nobody is."""
        changes = labelled_changes(self.store, self.run_id, self.labelers)
        said = {name: summary_status(self.store, self.run_id, name, changes) for name in self.labelers}
        if not changes or "ok" in said.values():
            return
        for name in self.labelers:
            if said[name] == "refused" or name in self._stopped:
                continue
            async with self._passed_over(name):
                if await self._work(name).summarise(changes) == "ok":
                    return

    def _labelled(self) -> set[int]:
        return {latent for work in self._works.values() for latent in work.labelled()}

    def _work(self, name: str) -> Work:
        """That of a labeler, made when it is first needed; its engine is drained when all is done."""
        if name not in self._works:
            done = frozenset[int]() if self.every else frozenset(self._labelled())
            work = self._works[name] = self.make(name, done)
            if (engine := getattr(work.labeler, "engine", None)) is not None:
                self._engines.push_async_callback(engine.aclose)
        return self._works[name]

    @contextlib.asynccontextmanager
    async def _passed_over(self, name: str):
        """Within, a provider that stops us is no error while there is another labeler."""
        try:
            yield
        except ProviderError as error:
            if name == self.labelers[-1]:
                raise
            self._stopped.add(name)
            self.reporter.say(f"{error}; going on with the next labeler")
