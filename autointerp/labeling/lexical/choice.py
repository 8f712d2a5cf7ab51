"""Which rule to believe: cross-validation over documents, and the refusal to state one that does not hold there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autointerp.labeling.lexical.columns import Columns, candidate_columns
from autointerp.labeling.lexical.positions import Positions
from autointerp.labeling.lexical.rule import Clause, Rule
from autointerp.labeling.lexical.search import (
    CLAUSE_COST,
    MAX_LEVELS,
    Conjunction,
    Disjunction,
    holds,
    make_task,
    objective,
    pruned,
    search,
)

FOLDS = 5
DRAWS = 400
MIN_FIRINGS = 5
MIN_GROUPS = 3
MIN_ACCURACY = 0.70
MIN_LOWER = 0.60
MIN_LIFT = 5.0
LEVEL_GAIN = 0.01


@dataclass(frozen=True, slots=True)
class Found:
    """The best rule of the explain split, and how it fared on documents that its search had not seen."""

    rule: Rule | None
    """None when nothing could be searched."""
    recall: float
    fallout: float
    accuracy: float
    """Balanced accuracy on the held-out folds."""
    lower: float
    """2.5 % quantile of it over bootstrapped documents."""
    precision: float
    """Share of firing positions among those where the rule holds, at the latent's own frequency."""
    lift: float
    """How many times more often the latent fires where the rule holds than elsewhere in the text."""
    believed: bool


NOTHING = Found(None, 0.0, 0.0, 0.5, 0.0, 0.0, 1.0, False)


def choose(positions: Positions, frequency: float) -> Found:
    """The rule for a latent that fires on the share `frequency` of all tokens.

    It is believed when it holds up on unseen documents: enough balanced accuracy, a lower bound above chance, and a
    frequency of firing where it holds that is a multiple of the latent's own.
    """
    group = _groups(positions)
    n_groups = int(group.max()) + 1 if len(group) else 0
    if positions.fires.sum() < MIN_FIRINGS or positions.fires.all() or n_groups < MIN_GROUPS:
        return NOTHING
    columns = candidate_columns(positions)
    weight = _strength(positions)
    everything = make_task(columns, positions, weight, np.ones(len(positions.fires), dtype=bool))
    levels = list(search(columns, everything))
    if not levels:
        return NOTHING
    unseen = _cross_validate(columns, positions, weight, group)[: len(levels)]
    level = _simplest(unseen, positions.fires, weight)
    best = pruned(columns, levels[level], everything)
    rule = Rule(tuple(_clause(columns, clause, positions) for clause in _merged(columns, best)))
    return _judge(rule, unseen[level], positions, group, frequency)


def _merged(columns: Columns, rule: Disjunction) -> list[Conjunction]:
    """The same rule, clauses of one atom and one view as one: "`a`; or `b`" is "`a` or `b`"."""
    merged: dict[object, Conjunction] = {}
    for clause in rule:
        key = int(columns.family_of[clause[0][0]]) if len(clause) == 1 else clause
        before = merged.get(key)
        merged[key] = (tuple(dict.fromkeys(before[0] + clause[0])),) if before else clause
    return list(merged.values())


def _clause(columns: Columns, clause: Conjunction, positions: Positions) -> Clause:
    """The clause with the values of each atom in order of how often the latent fires there."""
    firings = columns.table[:, positions.fires].sum(axis=1)
    return Clause(tuple(columns.atom(tuple(sorted(rows, key=lambda r: -firings[r]))) for rows in clause))


def _strength(positions: Positions) -> np.ndarray:
    """[n] weight of each firing: a rule should rather miss the weak ones."""
    top = np.quantile(positions.activation[positions.fires], 0.9)
    return 0.4 + 0.6 * np.minimum(1.0, positions.activation / max(top, 1e-12))


def _groups(positions: Positions) -> np.ndarray:
    """[n] what is held out together: documents; windows where there are too few documents."""
    if len(positions.documents) >= MIN_GROUPS:
        return positions.document
    window = positions.reading.window[positions.chosen]
    return np.unique(window, return_inverse=True)[1].reshape(-1)


def _cross_validate(columns: Columns, positions: Positions, weight: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[n_levels, n] bool: what the rules of each complexity, searched on the other folds, say of each position."""
    fold = _folds(group, positions.fires)
    said = np.zeros((MAX_LEVELS, len(group)), dtype=bool)
    for k in range(int(fold.max()) + 1):
        here = fold == k
        for level, rule in enumerate(search(columns, make_task(columns, positions, weight, ~here))):
            said[level:, here] = holds(columns, rule)[here]  # where the search ends early, its last rule stands
    return said


def _folds(group: np.ndarray, fires: np.ndarray) -> np.ndarray:
    """[n] fold of each position: whole groups, dealt so that every fold has firing positions."""
    firings = np.bincount(group, weights=fires)
    order = np.argsort(-firings, kind="stable")
    fold_of = np.empty(len(order), dtype=np.int64)
    fold_of[order] = np.arange(len(order)) % min(FOLDS, len(order))
    return fold_of[group]


def _simplest(unseen: np.ndarray, fires: np.ndarray, weight: np.ndarray) -> int:
    """The first level that no later one beats by more than a margin."""
    hit, miss = fires * weight / (fires * weight).sum(), ~fires / (~fires).sum()
    value = objective(unseen @ hit, unseen @ miss)
    extra = np.maximum(0, np.arange(len(value)) - 1) * CLAUSE_COST + (np.arange(len(value)) > 0) * LEVEL_GAIN
    return int((value - extra).argmax())


def _judge(rule: Rule, said: np.ndarray, positions: Positions, group: np.ndarray, frequency: float) -> Found:
    fires = positions.fires
    counts = group_counts(said, fires, group)
    recall, fallout = rates(counts.sum(axis=0)[None])
    accuracy = float((recall[0] + 1 - fallout[0]) / 2)
    lower = float(bootstrap(counts, np.random.default_rng(0), DRAWS)[0])
    frequency = min(max(frequency, 1e-6), 0.5) if frequency > 0 else float(fires.mean())
    covered = recall[0] * frequency + fallout[0] * (1 - frequency)
    precision = float(recall[0] * frequency / covered) if covered else 0.0
    believed = accuracy >= MIN_ACCURACY and lower >= MIN_LOWER and precision / frequency >= MIN_LIFT
    return Found(rule, float(recall[0]), float(fallout[0]), accuracy, lower, precision, precision / frequency, believed)


def group_counts(said: np.ndarray, fires: np.ndarray, group: np.ndarray) -> np.ndarray:
    """[n_groups, 4]: hits, firing positions, false alarms, silent positions of each group."""
    n = int(group.max()) + 1 if len(group) else 0
    parts = (said & fires, fires, said & ~fires, ~fires)
    return np.stack([np.bincount(group, weights=p, minlength=n) for p in parts], axis=1)


def rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Recall and fallout of rows of summed counts [n, 4]; NaN where nothing fires or nothing is silent."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts[:, 0] / counts[:, 1], counts[:, 2] / counts[:, 3]


def bootstrap(counts: np.ndarray, rng: np.random.Generator, draws: int) -> tuple[float, float]:
    """95 % interval of balanced accuracy when groups are drawn with replacement. NaN when no draw can be scored."""
    n = len(counts)
    weights = rng.multinomial(n, np.full(n, 1 / n), size=draws) if n else np.zeros((draws, 0))
    recall, fallout = rates(weights @ counts)
    accuracy = (recall + 1 - fallout) / 2
    accuracy = accuracy[np.isfinite(accuracy)]
    if not len(accuracy):
        return float("nan"), float("nan")
    low, high = np.quantile(accuracy, [0.025, 0.975])
    return float(low), float(high)
