"""A number for each document from a column of the corpus."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from autointerp.errors import InputError
from autointerp.evidence.documents import DocumentSource


def read_outcomes(documents: DocumentSource, column: str) -> np.ndarray:
    """The values of `column` in corpus order [n_documents], NaN where one is missing.

    InputError where the corpus has no such column, where a value is no number or truth value, and where all are equal.
    """
    values = np.array([_number(value, documents.name, column) for value in documents.column(column)])
    known = values[np.isfinite(values)]
    if len(known) < 3 or np.ptp(known) == 0:
        raise InputError(
            f"corpus {documents.name}: column {column!r} is the same in every document, or missing in all but two:"
            " give --outcome-column one that varies"
        )
    return values


def _number(value: Any, name: str, column: str) -> float:
    if value is None:
        return math.nan
    if not isinstance(value, bool | int | float):
        raise InputError(
            f"corpus {name}: column {column!r} holds {value!r:.40}: give --outcome-column a column of numbers or of"
            " true and false"
        )
    return float(value)


def by_order(values: np.ndarray, places: Iterable[tuple[int, int]]) -> np.ndarray:
    """`values` [n_documents] in the shuffled order; `places`: (document, place in that order) of those that were read.

    NaN at places that nothing was read from.
    """
    pairs = np.array(sorted(set(places)), np.int64).reshape(-1, 2)
    shuffled = np.full(pairs[:, 1].max(initial=-1) + 1, np.nan)
    shuffled[pairs[:, 1]] = values[pairs[:, 0]]
    return shuffled
