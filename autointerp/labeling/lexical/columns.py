"""Candidate atoms of one latent as a table of booleans, one row per value of a view, one column per position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from autointerp.labeling.lexical.positions import Positions
from autointerp.labeling.lexical.rule import Atom
from autointerp.labeling.lexical.views import view

COSTS: dict[tuple[str, int], float] = {
    ("token", 0): 0.0,
    ("core", 0): 0.0,
    ("class", 0): 0.0,
    ("bigram", 0): 0.004,
    ("trigram", 0): 0.006,
    ("word", 0): 0.004,
    ("word_prefix", 0): 0.006,
    ("prefix", 0): 0.008,
    ("suffix", 0): 0.008,
    ("token", -1): 0.002,
    ("core", -1): 0.002,
    ("class", -1): 0.006,
    ("token", -2): 0.008,
    ("token", -3): 0.012,
    ("previous_word", 0): 0.006,
    ("line_place", 0): 0.004,
    ("indent", 0): 0.006,
    ("line_start", 0): 0.006,
    ("line", 0): 0.012,
    ("above_start", 0): 0.012,
    ("above_end", 0): 0.010,
    ("inside", 0): 0.004,
    ("document_start", 0): 0.004,
    ("repeat", 0): 0.008,
    ("near", 0): 0.014,
    ("texture", 0): 0.010,
}
"""The views that are searched, and what a rule must gain to use one: of two equal rules the plainer wins."""

MIN_FIRINGS = 2
MIN_DOCUMENTS = 2
MAX_VALUES = 40


@dataclass(frozen=True, slots=True)
class Columns:
    """The table and what its rows mean. A family is the rows of one view."""

    table: np.ndarray
    """[n_rows, n_positions] float32 of 0 and 1."""
    views: tuple[tuple[str, int], ...]
    """(view, at) of each family."""
    names: tuple
    """Value of each row."""
    family_of: np.ndarray
    """[n_rows] index of the row's family."""
    costs: np.ndarray
    """[n_rows] cost of using the row's view."""
    exclusive: np.ndarray
    """[n_families, longest] rows of the families of which one value holds at a position; n_rows as padding."""
    overlapping: np.ndarray
    """The other rows."""
    seen: np.ndarray
    """[n_rows, n_documents] whether the row holds at a firing position of the document."""

    def supported(self, documents: np.ndarray) -> np.ndarray:
        """[n_rows] bool: seen firing in at least two of `documents` [n_documents] (in one, where there is but one).

        What one document alone shows is as likely chance; in cross-validation the training part must show it.
        """
        return self.seen[:, documents].sum(axis=1) >= min(MIN_DOCUMENTS, int(documents.sum()))

    def atom(self, rows: tuple[int, ...]) -> Atom:
        """The atom that holds where one of the rows (of one family) does."""
        name, at = self.views[self.family_of[rows[0]]]
        return Atom(name, tuple(self.names[r] for r in rows), at)


def candidate_columns(positions: Positions) -> Columns:
    """Rows for every value that holds at firing positions of at least two documents (of one where there is but one)."""
    place = np.full(len(positions.reading), -1, dtype=np.int64)
    place[positions.chosen] = np.arange(len(positions.chosen))
    tables, views, exclusive, names = [np.zeros((0, len(positions.chosen)), dtype=np.float32)], [], [], []
    for name, at in COSTS:
        found = view(positions.reading, name, at)
        here = place[found.position]
        column, value = here[here >= 0], found.value[here >= 0]
        kept = _supported(column, value, len(found.names), positions)
        if not len(kept):
            continue
        row = np.full(len(found.names), -1, dtype=np.int64)
        row[kept] = np.arange(len(kept))
        wanted = row[value] >= 0
        tables.append(np.zeros((len(kept), len(positions.chosen)), dtype=np.float32))
        tables[-1][row[value[wanted]], column[wanted]] = 1.0
        views.append((name, at))
        exclusive.append(found.exclusive)
        names += [found.names[k] for k in kept]
    return _assemble(tables, views, exclusive, tuple(names), positions)


def _assemble(
    tables: list[np.ndarray], views: list[tuple[str, int]], exclusive: list[bool], names: tuple, positions: Positions
) -> Columns:
    lengths = np.array([len(t) for t in tables[1:]], dtype=np.int64)
    begin = np.cumsum(lengths) - lengths
    alone = [np.arange(b, b + n) for b, n, e in zip(begin, lengths, exclusive, strict=True) if e]
    several = [np.arange(b, b + n) for b, n, e in zip(begin, lengths, exclusive, strict=True) if not e]
    padded = np.full((len(alone), max(map(len, alone), default=0)), len(names), dtype=np.int64)
    for line, rows in zip(padded, alone, strict=True):
        line[: len(rows)] = rows
    family_of = np.repeat(np.arange(len(views)), lengths)
    table = np.concatenate(tables)
    of_document = np.zeros((int(positions.fires.sum()), len(positions.documents)), dtype=np.float32)
    of_document[np.arange(len(of_document)), positions.document[positions.fires]] = 1.0
    return Columns(
        table=table,
        views=tuple(views),
        names=names,
        family_of=family_of,
        costs=np.array([COSTS[v] for v in views], dtype=np.float64)[family_of],
        exclusive=padded,
        overlapping=np.concatenate(several) if several else np.zeros(0, dtype=np.int64),
        seen=table[:, positions.fires] @ of_document > 0,
    )


def _supported(column: np.ndarray, value: np.ndarray, n_values: int, positions: Positions) -> np.ndarray:
    """Values worth a row: seen firing often enough, in enough documents, and more often firing than not."""
    fires = positions.fires[column]
    hits = np.bincount(value[fires], minlength=n_values)
    misses = np.bincount(value[~fires], minlength=n_values)
    n_documents = len(positions.documents)
    pairs = np.unique(value[fires] * n_documents + positions.document[column[fires]])
    documents = np.bincount(pairs // max(1, n_documents), minlength=n_values)
    n_fires = max(1, int(positions.fires.sum()))
    lift = hits / n_fires - misses / max(1, len(positions.fires) - n_fires)
    good = np.flatnonzero((hits >= MIN_FIRINGS) & (documents >= min(MIN_DOCUMENTS, n_documents)) & (lift > 0))
    return good[np.argsort(-lift[good], kind="stable")][:MAX_VALUES]
