"""What a labeler and a scorer are, how one is found by name, and what they need of the outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from autointerp.errors import InputError
from autointerp.records import Change, Label, LatentEvidence, RunSummary, Score
from autointerp.registry import Registry

if TYPE_CHECKING:
    from autointerp.labeling.llm.engine import Engine


class Labeler(Protocol):
    """Says what a latent is and what the adapter does when it fires."""

    name: str
    """`lexical`, `openai:MODEL` or `anthropic:MODEL`: goes into labels.labeler."""
    default_scorer: str

    async def label(self, evidence: LatentEvidence) -> Label:
        """A label from the `explain` split. What goes wrong with one latent is a Label with status failed or refused;
        what stops everything (budget, key, interruption) is raised."""
        ...

    async def summarise(self, changes: Sequence[Change]) -> RunSummary:
        """What the training changed, from all labelled latents by rank, at least one; raises as `label`."""
        ...


class Scorer(Protocol):
    """Measures how well a label predicts where its latent fires."""

    name: str

    async def score(self, evidence: LatentEvidence, label: Label, wrong: Label | None) -> Score:
        """The label's score on the `score` split, and that of `wrong`, another latent's label, as the null."""
        ...


class CallStore(Protocol):
    """The part of the store that paid calls need."""

    path: str

    def upsert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> Future[None]: ...

    def insert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> Future[None]: ...

    def execute(self, sql: str, params: Sequence[Any] = ()) -> Future[None]: ...

    def read(self, sql: str, params: Sequence[Any] | None = None) -> list[dict[str, Any]]: ...


@dataclass(frozen=True)
class LabelingSettings:
    """What a user can turn about labelers that ask a language model."""

    run_id: str
    max_usd: float | None = None
    """Cap on the dollars of this run, over all its invocations; None is no cap."""
    rpm: int | None = None
    """Requests per minute."""
    tpm: int | None = None
    """Tokens per minute, input and output together."""
    itpm: int | None = None
    """Input tokens per minute."""
    otpm: int | None = None
    """Output tokens per minute."""
    concurrency: int = 8
    """Requests in flight at most; a provider that refuses gets fewer."""
    seed: int = 0
    ask_all: bool = False
    """Whether the model is asked about latents that a token, bigram or trigram explains, too."""
    prompts_dir: Path | None = None
    """Templates here replace those of the package, file by file."""
    prices_path: Path | None = None
    """A JSON file as labeling/llm/prices.json, whose models replace or add to the listed ones."""
    api: Literal["chat", "responses"] = "chat"
    """Which of OpenAI's two APIs is asked; a model that has only the second is asked there in either case."""
    batch: bool = False
    """Questions go through the provider's batch endpoint: half the price, within a day."""
    timeout_s: float = 120.0
    """Total deadline of one call, from sending to the last byte of its answer."""

    def __post_init__(self) -> None:
        positive = {"max-usd": self.max_usd, "rpm": self.rpm, "tpm": self.tpm, "concurrency": self.concurrency}
        positive |= {"itpm": self.itpm, "otpm": self.otpm}
        for option, value in positive.items():
            if value is not None and not value > 0:
                raise InputError(f"--{option} {value} must be above 0")
        if self.api not in ("chat", "responses"):
            raise InputError(f"--api {self.api} is unknown: choose chat or responses")


LABELERS: Registry[Callable[..., Labeler]] = Registry("labeler", "autointerp.labeling.labelers")
"""Classes. One whose labels come from a model has `needs_engine = True` and is made with (engine, settings); the others
are made with no arguments."""

SCORERS: Registry[Callable[..., Scorer]] = Registry("scorer", "autointerp.labeling.scorers")
"""Classes, made in the same way, with the engine of the labeler whose labels they score."""


def split_spec(spec: str) -> tuple[str, str | None]:
    """`openai:MODEL` → ("openai", MODEL), `lexical` → ("lexical", None). InputError naming the choices otherwise."""
    name, _, model = spec.partition(":")
    known = name in LABELERS.names()
    if not known or needs_engine(LABELERS.get(name)) != bool(model):
        choices = [f"{n}:MODEL" if needs_engine(item) else n for n, item in LABELERS.items()]
        raise InputError(f"unknown labeler {spec!r}: choose one of {', '.join(choices)}")
    return name, model or None


def needs_engine(item: Any) -> bool:
    """Whether a registered labeler or scorer asks a language model."""
    return bool(getattr(item, "needs_engine", False))


def find_scorer(spec: str) -> tuple[Any, str | None]:
    """The registered scorer behind `detection` or `embedding:MODEL`, and its model. InputError in one line."""
    name, _, model = spec.partition(":")
    item = SCORERS.get(name)
    if bool(getattr(item, "needs_model", False)) != bool(model):
        wanted = f"{name} takes no model" if model else f"give --scorer {name}:MODEL, a folder or a hub id"
        raise InputError(f"scorer {spec!r}: {wanted}")
    return item, model or None


def check_labeler(spec: str, settings: LabelingSettings) -> None:
    """InputError when a labeler could not work: unknown, no key, no price under a budget. Touches nothing."""
    name, model = split_spec(spec)
    if model:
        from autointerp.labeling.llm.provider import check_provider

        check_provider(name, model, settings)


def make_labeler(spec: str, settings: LabelingSettings, store: CallStore) -> Labeler:
    """The labeler that `spec` names. InputError as `check_labeler`."""
    check_labeler(spec, settings)
    name, model = split_spec(spec)
    if not model:
        return LABELERS.get(name)()
    from autointerp.labeling.llm.engine import Engine
    from autointerp.labeling.llm.provider import make_provider

    return LABELERS.get(name)(Engine(make_provider(name, model, settings), store, settings), settings)


def make_scorer(name: str, labeler: Labeler, settings: LabelingSettings) -> Scorer:
    """The scorer `name` for the labels of `labeler`. InputError for an unknown one, or one without a model to ask."""
    item, model = find_scorer(name)
    if not needs_engine(item):
        return item(model) if model else item()
    engine: Engine | None = getattr(labeler, "engine", None)
    if engine is None:
        raise InputError(
            f"scorer {name!r} asks a language model and labeler {labeler.name!r} has none: "
            "give --labeler openai:MODEL or anthropic:MODEL"
        )
    return item(engine, settings)
