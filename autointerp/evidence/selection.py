"""Selection: which latents to label, in which order, and what the whole run can be trusted for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

import numpy as np
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.extras import Extra
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.flattening import cut
from autointerp.evidence.gradients import GradientSums
from autointerp.evidence.stream import Measured
from autointerp.records import Role
from autointerp.registry import Registry
from autointerp.run import AUTO_TOP

if TYPE_CHECKING:
    from autointerp.evidence.dictionaries.base import Dictionary
    from autointerp.evidence.stand_ins import Reread
    from autointerp.run import Run

UNITS = ("mean_base", "mean_adapted", "freq_base", "freq_adapted", "max_base", "max_adapted", "delta")


@dataclass(frozen=True)
class Ranking:
    """What a selector says. m latents in the dictionary."""

    latents: list[int]
    """Selected, best first."""
    roles: list[Role]
    change: np.ndarray
    """Size by which the selector ranks [m], ≥ 0, NaN where it says nothing."""
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Further columns of `latents`, each [m]."""
    n_pass: int | None = None
    """Latents that passed the selector's test; None where it has none."""
    note: str | None = None
    """What the selector has to say of its own reading, for people."""
    figures: dict[str, float | None] = field(default_factory=dict)
    """What else the selector says of the run."""


@dataclass(frozen=True)
class Given:
    """What some selectors need beyond the statistics; None where none of the run's does."""

    adapted_W_dec: Tensor | None = None
    """Decoder rows of a dictionary fine-tuned on the adapted model [m, d]."""
    outcome: np.ndarray | None = None
    """A number for each document by its place in the shuffled corpus, NaN where it has none."""
    gradients: GradientSums | None = None
    run: Run | None = None
    dictionary: Dictionary | None = None
    """For selectors that read the adapter's files: what the statistics were made with."""
    reread: Reread | None = None
    """What the statistics were made of, once more."""


@dataclass(frozen=True)
class Question:
    """What a selector is asked."""

    fitted: FittedMap
    top: int
    fdr: float
    seed: int
    given: Given = Given()


class Selector(Protocol):
    """Chooses latents from the statistics."""

    def __call__(self, question: Question) -> Ranking: ...


SELECTORS: Registry[Selector] = Registry("selector", "autointerp.evidence.selectors")
S = TypeVar("S", bound=Callable[..., Ranking])
Need = type[Extra] | Literal["adapted dictionary", "outcome", "gradients"]
"""Further sums over the corpus, by their class, or a thing of `Given`."""


def needs(*what: Need) -> Callable[[S], S]:
    """Decorator of a selector: what it wants of the question beyond the statistics that every run keeps."""

    def declare(selector: S) -> S:
        selector.needs = what  # pyright: ignore[reportFunctionMemberAccess]
        return selector

    return declare


def needs_of(selectors: Iterable[str]) -> list[Need]:
    """What the named selectors need, each thing once; InputError for a name that does not exist."""
    return list(dict.fromkeys(need for name in selectors for need in getattr(SELECTORS.get(name), "needs", ())))


def largest(change: np.ndarray, k: int) -> list[int]:
    """The k latents of largest positive `change` [m], largest first."""
    order = np.argsort(-np.nan_to_num(change), kind="stable")[:k]
    return [int(latent) for latent in order if change[latent] > 0]


@dataclass(frozen=True)
class Selection:
    """The selected latents, the table of all latents, and the figures of the run."""

    latents: list[int]
    roles: list[Role]
    columns: dict[str, np.ndarray]
    """Columns of the store's `latents`, each [m]."""
    figures: dict[str, float | int | str | None]
    """Columns of the store's `runs`."""
    fitted: FittedMap
    rankings: dict[str, Ranking]
    """What each selector that was asked says, the one that ranks first."""


def state_of(fired_base: np.ndarray, fired_adapted: np.ndarray) -> np.ndarray:
    """live | dead | revived | silenced [m]."""
    return np.select(
        [(fired_base == 0) & (fired_adapted == 0), fired_base == 0, fired_adapted == 0],
        ["dead", "revived", "silenced"],
        "live",
    )


def select(
    measured: Measured,
    fitted: FittedMap,
    selector: str,
    top: int | Literal["auto"],
    fdr: float,
    seed: int,
    given: Given | None = None,
    others: Sequence[str] = (),
) -> Selection:
    """Asks the selector and lays its answer beside what the change map says of every latent.

    `others` are asked the same question for comparison; what columns they alone compute are taken over. top `auto`: see
    flattening.py; each selector is cut by its own curve.
    """
    if not 0 < fdr < 1:
        raise InputError(f"--fdr {fdr}: give a rate between 0 and 1, e.g. 0.05")
    question = Question(fitted, AUTO_TOP if top == "auto" else top, fdr, seed, given or Given())
    rankings = {name: SELECTORS.get(name)(question) for name in dict.fromkeys((selector, *others))}
    if top == "auto":
        rankings = {name: cut(ranking, fitted.coverage(ranking.latents)) for name, ranking in rankings.items()}
    ranking = rankings[selector]
    curve = fitted.coverage(ranking.latents)
    shared = None if given is None or given.dictionary is None else given.dictionary.relative_norm
    return Selection(
        latents=ranking.latents,
        roles=ranking.roles,
        columns=_foreign(rankings)
        | _columns(measured, fitted, ranking, curve)
        | ({} if shared is None else {"relative_norm": shared.double().cpu().numpy()}),
        figures=_figures(measured, fitted, ranking, curve, seed),
        fitted=fitted,
        rankings=rankings,
    )


def _foreign(rankings: Mapping[str, Ranking]) -> dict[str, np.ndarray]:
    """Columns of `latents` that mean the same whichever selector ranks, of all that were asked."""
    columns = [ranking.columns for ranking in rankings.values()]
    return {name: column for own in columns for name, column in own.items() if name not in ("statistic", "q_value")}


def _columns(measured: Measured, fitted: FittedMap, ranking: Ranking, curve: list[float]) -> dict[str, np.ndarray]:
    statistics = measured.statistics
    n, m = max(statistics.n_tokens, 1), statistics.m
    columns: dict[str, np.ndarray] = {
        "latent": np.arange(m),
        "state": state_of(statistics.base.fired, statistics.adapted.fired),
        "change": ranking.change,
        "selected": np.isin(np.arange(m), ranking.latents),
    }
    for side, moments in (("base", statistics.base), ("adapted", statistics.adapted)):
        columns[f"mean_{side}"] = moments.total / n
        columns[f"freq_{side}"] = moments.fired / n
        columns[f"max_{side}"] = moments.largest.astype(np.float64)
    columns["delta"] = columns["mean_adapted"] - columns["mean_base"]
    if fitted.changed:
        columns["gain"] = fitted.spread(fitted.gains)
        columns["write_size"] = fitted.spread(fitted.rows.norm(dim=1).numpy())
    _restrict(columns, fitted, ranking.latents)
    columns |= ranking.columns
    rank, coverage = np.full((2, m), np.nan)
    rank[ranking.latents] = np.arange(1, len(ranking.latents) + 1)
    coverage[ranking.latents] = curve
    role = np.full(m, None, dtype=object)
    role[ranking.latents] = ranking.roles
    return columns | {"rank": rank, "coverage": coverage, "role": role}


def _restrict(columns: dict[str, np.ndarray], fitted: FittedMap, latents: list[int]) -> None:
    """Gain and write size of the selected latents are those of the map restricted to them, as reported."""
    for latent, row in fitted.rows_of(latents).items():
        direction = fitted.W_dec[latent]
        columns["gain"][latent] = float(row @ direction / direction.square().sum().clamp_min(1e-30))
        columns["write_size"][latent] = float(row.norm())


def _figures(
    measured: Measured, fitted: FittedMap, ranking: Ranking, curve: list[float], seed: int
) -> dict[str, float | int | str | None]:
    statistics, stream = measured.statistics, measured.statistics.stream
    n = statistics.n_tokens
    fvu_base, fvu_adapted = stream.fvu(n)
    coverage = curve[-1] if curve and not np.isnan(curve[-1]) else None
    return {
        "n_docs": measured.n_docs,
        "n_tokens": n,
        "fvu_base": fvu_base,
        "fvu_adapted": fvu_adapted,
        "delta_fvu": stream.error_change / stream.square_change if stream.square_change else None,
        "l0_base": float(statistics.base.fired.sum() / max(n, 1)),
        "l0_adapted": float(statistics.adapted.fired.sum() / max(n, 1)),
        "static_share": fitted.static_share,
        "change_r2": fitted.r2,
        "coverage": coverage,
        "random_coverage": fitted.random_coverage(len(ranking.latents), seed),
        "n_pass": ranking.n_pass,
        "left_out": measured.left_out,
        "notes": ranking.note,
    }
