"""Search for the rules that tell firing from silent positions, from the simplest to the most complex.

The search is greedy, exact in its steps: all conjunctions of two rows come out of one matrix product, and the best set
of values of a view is a prefix of its values sorted by precision. How complex a rule may be is decided in choice.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from autointerp.labeling.lexical.columns import Columns
from autointerp.labeling.lexical.positions import Positions

PRIOR = 0.1
"""Share of firing positions at which precision is judged: about that of a window around a peak."""
MAX_CONTEXTS = 40
MAX_SET = 8
MAX_CLAUSES = 3
MAX_LEVELS = MAX_CLAUSES + 1
"""Rules that one search yields at most."""
VALUE_COST = 0.005
ATOM_COST = 0.012
CLAUSE_COST = 0.02

Rows = tuple[int, ...]
Conjunction = tuple[Rows, ...]
Disjunction = tuple[Conjunction, ...]


def objective(recall: np.ndarray, fallout: np.ndarray) -> np.ndarray:
    """Half balanced accuracy, half F1 at `PRIOR`: the first alone likes broad rules, the second narrow ones."""
    f1 = 2 * recall * PRIOR / (recall * PRIOR + fallout * (1 - PRIOR) + PRIOR)
    return 0.5 * (recall + 1 - fallout) / 2 + 0.5 * f1


def holds(columns: Columns, rule: Disjunction) -> np.ndarray:
    """[n_positions] bool: where the rule holds."""
    mask = np.zeros(columns.table.shape[1], dtype=bool)
    for clause in rule:
        mask |= _clause(columns, clause)
    return mask


def _clause(columns: Columns, clause: Conjunction) -> np.ndarray:
    mask = np.ones(columns.table.shape[1], dtype=bool)
    for rows in clause:
        mask &= columns.table[list(rows)].any(axis=0)
    return mask


@dataclass(frozen=True, slots=True)
class Task:
    """Weights of the positions that a search may learn from; zero elsewhere."""

    hit: np.ndarray
    """[n_positions] share of all recall that a firing position stands for (stronger firings for more)."""
    miss: np.ndarray
    """[n_positions] share of all fallout that a silent position stands for."""
    rows: np.ndarray
    """[n_rows] bool: the rows that may be used."""
    recall: float = 0.0
    fallout: float = 0.0
    """What the clauses before have reached."""

    @property
    def reached(self) -> float:
        """The objective of the clauses before."""
        return float(objective(np.array(self.recall), np.array(self.fallout)))

    def without(self, mask: np.ndarray) -> Task:
        """What is left to do once a clause holds at `mask`."""
        return Task(
            np.where(mask, 0, self.hit),
            np.where(mask, 0, self.miss),
            self.rows,
            self.recall + float(self.hit[mask].sum()),
            self.fallout + float(self.miss[mask].sum()),
        )


def make_task(columns: Columns, positions: Positions, weight: np.ndarray, use: np.ndarray) -> Task:
    """The task of the positions in `use` [n_positions] bool; `weight` [n_positions] is that of each firing."""
    hit, miss = np.where(use & positions.fires, weight, 0.0), np.where(use & ~positions.fires, 1.0, 0.0)
    documents = np.zeros(len(positions.documents), dtype=bool)
    documents[positions.document[use]] = True
    return Task(hit / max(hit.sum(), 1e-12), miss / max(miss.sum(), 1e-12), columns.supported(documents))


def search(columns: Columns, task: Task) -> Iterator[Disjunction]:
    """Ever more complex rules: one atom; a clause of two; with a second clause; with a third. It ends where a further
    clause gains next to nothing; without any row it finds nothing."""
    if not task.rows.any():
        return
    single, pair = _best_clauses(columns, task)
    yield (single,)
    rule: Disjunction = (pair,)
    yield rule
    task = task.without(_clause(columns, pair))
    for _ in range(MAX_CLAUSES - 1):
        clause = _best_clauses(columns, task)[1]
        rest = task.without(_clause(columns, clause))
        if rest.reached - task.reached < CLAUSE_COST / 2:
            return
        task, rule = rest, (*rule, clause)
        yield rule


def pruned(columns: Columns, rule: Disjunction, task: Task) -> Disjunction:
    """The rule without the values, and the clauses, that the others make superfluous; the rarest are tried first."""
    reached = task.without(holds(columns, rule)).reached
    firings = columns.table @ task.hit.astype(np.float32)
    for row in sorted({row for clause in rule for rows in clause for row in rows}, key=lambda r: firings[r]):
        less = tuple(c for c in (_without_row(clause, row) for clause in rule) if c)
        value = task.without(holds(columns, less)).reached
        if less and value >= reached - VALUE_COST / 2:
            rule, reached = less, value
    return rule


def _without_row(clause: Conjunction, row: int) -> Conjunction:
    """The clause without one value; nothing when an atom of it has no other."""
    atoms = tuple(tuple(r for r in rows if r != row) for rows in clause)
    return atoms if all(atoms) else ()


def _best_clauses(columns: Columns, task: Task) -> tuple[Conjunction, Conjunction]:
    """The best clause of one atom, and the best of one or two."""
    context = _contexts(columns, task)
    beside = np.concatenate([np.ones((1, columns.table.shape[1]), dtype=np.float32), columns.table[context]])
    recall, fallout = _tallies(columns.table, beside, task)
    recall[~task.rows], fallout[~task.rows] = 0.0, 1.0
    options = [_best_sets(columns, recall, fallout, task), _best_single_rows(columns, recall, fallout, task)]
    cost = np.concatenate([[0.0], ATOM_COST + columns.costs[context]])
    families = np.concatenate([[-1], columns.family_of[context]])
    one, two = (-np.inf, ()), (-np.inf, ())
    for option in options:
        if option is None:
            continue
        value = option.value - cost - 2.0 * (option.exclusive & (option.families[:, None] == families))
        j, k = np.unravel_index(int(value.argmax()), value.shape)
        alone = int(value[:, 0].argmax())
        if value[alone, 0] > one[0]:
            one = (value[alone, 0], (option.rows(alone, 0),))
        if value[j, k] > two[0]:
            two = (value[j, k], (option.rows(int(j), int(k)), *([(int(context[k - 1]),)] if k else [])))
    return one[1], _widen(columns, task, two[1])


def _tallies(table: np.ndarray, beside: np.ndarray, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Recall and fallout [n_rows, n_beside] of every row of `table` together with every row of `beside`."""
    tallies = []
    for share in (task.hit, task.miss):
        used = np.flatnonzero(share)
        weighted = beside[:, used] * share[used].astype(np.float32)
        tallies.append(table[:, used] @ weighted.T)
    return tallies[0], tallies[1]


def _contexts(columns: Columns, task: Task) -> np.ndarray:
    """Rows that may stand beside another one: those that tell most on their own."""
    lift = columns.table @ (task.hit - task.miss).astype(np.float32)
    order = np.argsort(-np.where(task.rows, lift, -2.0), kind="stable")[:MAX_CONTEXTS]
    return order[task.rows[order]]


@dataclass(frozen=True, slots=True)
class _Options:
    """The best atom of each view (or each row), for each context."""

    value: np.ndarray
    """[n_options, n_contexts] objective, the cost of the atom taken off."""
    families: np.ndarray
    """[n_options]"""
    exclusive: bool
    """No two values hold at once, so the view is of no use beside itself."""
    order: np.ndarray
    """[n_options, n, n_contexts] rows, the most precise first."""
    size: np.ndarray
    """[n_options, n_contexts] how many of them to take."""

    def rows(self, option: int, context: int) -> Rows:
        return tuple(self.order[option, : self.size[option, context], context].tolist())


def _best_sets(columns: Columns, recall: np.ndarray, fallout: np.ndarray, task: Task) -> _Options | None:
    """Sets of values of the exclusive views: recall and fallout of a set are sums, so its best members are a prefix of
    the values in order of precision.

    Args:
        recall, fallout: [n_rows, n_contexts] of each row with each context.
    """
    if not len(columns.exclusive):
        return None
    recall = np.concatenate([recall, np.zeros_like(recall[:1])])  # the last row is the padding of short views
    fallout = np.concatenate([fallout, np.ones_like(fallout[:1])])
    precision = recall / (fallout + 0.002)
    order = np.argsort(-precision[columns.exclusive], axis=1, kind="stable")[:, :MAX_SET]
    rows = np.take_along_axis(columns.exclusive[:, :, None], order, 1)
    context = np.arange(recall.shape[1])
    total_recall = task.recall + recall[rows, context].cumsum(axis=1)
    total_fallout = task.fallout + fallout[rows, context].cumsum(axis=1)
    value = objective(total_recall, total_fallout) - VALUE_COST * np.arange(rows.shape[1])[:, None]
    size = value.argmax(axis=1)
    families = columns.family_of[columns.exclusive[:, 0]]
    value = np.take_along_axis(value, size[:, None], 1)[:, 0] - columns.costs[columns.exclusive[:, 0]][:, None]
    return _Options(value, families, True, rows, size + 1)


def _best_single_rows(columns: Columns, recall: np.ndarray, fallout: np.ndarray, task: Task) -> _Options | None:
    """Single values of the views of which several may hold at once."""
    rows = columns.overlapping
    if not len(rows):
        return None
    value = objective(task.recall + recall[rows], task.fallout + fallout[rows]) - columns.costs[rows][:, None]
    order = np.broadcast_to(rows[:, None, None], (len(rows), 1, recall.shape[1]))
    return _Options(value, columns.family_of[rows], False, order, np.ones(value.shape, dtype=np.int64))


def _widen(columns: Columns, task: Task, clause: Conjunction) -> Conjunction:
    """The second atom of a pair as a set of values too, and then the first one chosen anew beside it."""
    if len(clause) < 2:
        return clause
    first, second = clause
    for _ in range(2):
        second = _refit(columns, task, beside=first, rows=second)
        first, second = second, first
    return first, second


def _refit(columns: Columns, task: Task, beside: Rows, rows: Rows) -> Rows:
    """The best set of values of the view of `rows`, given the atom `beside`."""
    family = columns.family_of[rows[0]]
    which = np.flatnonzero(columns.family_of[columns.exclusive[:, 0]] == family) if len(columns.exclusive) else []
    if not len(which):
        return rows
    mask = np.asarray(columns.table[list(beside)].any(axis=0), dtype=np.float32)[None, :]
    members = columns.exclusive[which[0]]
    recall, fallout = np.zeros((len(columns.table), 1)), np.ones((len(columns.table), 1))
    members = members[members < len(columns.table)]
    members = members[task.rows[members]]
    recall[members], fallout[members] = _tallies(columns.table[members], mask, task)
    options = _best_sets(columns, recall, fallout, task)
    return options.rows(int(which[0]), 0) if options else rows
