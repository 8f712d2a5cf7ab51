"""A rule: an executable predicate over token windows, kept as JSON.

    {"version": 1, "any": [{"all": [{"view": "token", "at": 0, "in": [" def"]},
                                    {"view": "indent", "at": 0, "in": ["1–4"]}]}]}

fires where, for one of the clauses in `any`, every atom in `all` finds one of its values. The views are in views.py.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autointerp.errors import InputError
from autointerp.labeling.lexical.reading import Reading
from autointerp.labeling.lexical.views import VIEWS, view

VERSION = 1
FURTHEST = 8
NO_RULE = "no simple rule found"


@dataclass(frozen=True, slots=True)
class Atom:
    """One view, read `-at` tokens back, holds one of `values`."""

    view: str
    values: tuple[Hashable, ...]
    at: int = 0

    def holds(self, reading: Reading) -> np.ndarray:
        """[n_positions] bool."""
        found = view(reading, self.view, self.at)
        wanted = set(self.values)
        ids = [i for i, name in enumerate(found.names) if name in wanted]
        mask = np.zeros(len(reading), dtype=bool)
        mask[found.position[np.isin(found.value, ids)]] = True
        return mask

    def to_json(self) -> dict[str, Any]:
        return {"view": self.view, "at": self.at, "in": [list(v) if isinstance(v, tuple) else v for v in self.values]}


@dataclass(frozen=True, slots=True)
class Clause:
    """All of its atoms hold."""

    atoms: tuple[Atom, ...]

    def holds(self, reading: Reading) -> np.ndarray:
        """[n_positions] bool."""
        mask = np.ones(len(reading), dtype=bool)
        for atom in self.atoms:
            mask &= atom.holds(reading)
        return mask


@dataclass(frozen=True, slots=True)
class Rule:
    """Any of its clauses holds."""

    clauses: tuple[Clause, ...]

    def holds(self, reading: Reading) -> np.ndarray:
        """[n_positions] bool over all windows of the reading."""
        mask = np.zeros(len(reading), dtype=bool)
        for clause in self.clauses:
            mask |= clause.holds(reading)
        return mask

    def fires(self, tokens: Sequence[str], start: int | None = None) -> list[bool]:
        """Where the rule says that the latent fires, one entry per token.

        Args:
            tokens: decoded tokens of one window; what stood before the window is unknown to the rule.
            start: index of the first token in its document, where known.
        """
        return self.holds(Reading([tokens], [start])).tolist()

    def to_json(self) -> dict[str, Any]:
        """A JSON value from which `parse_rule` makes the same rule."""
        return {"version": VERSION, "any": [{"all": [a.to_json() for a in c.atoms]} for c in self.clauses]}


def parse_rule(value: dict[str, Any]) -> Rule:
    """The rule in a JSON value. InputError when this version of autointerp cannot run it."""
    if not isinstance(value, dict) or value.get("version") != VERSION:
        found = value.get("version") if isinstance(value, dict) else value
        raise InputError(
            f"rule of version {found!r}: this version runs rules of version {VERSION}, label the run again"
        )
    try:
        return Rule(tuple(Clause(tuple(_parse_atom(a) for a in c["all"])) for c in value["any"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"rule cannot be read ({error}): label the run again") from error


def _parse_atom(value: dict[str, Any]) -> Atom:
    name, at = value["view"], int(value["at"])
    if name not in VIEWS:
        raise ValueError(f"unknown view {name!r}")
    if not -FURTHEST <= at <= 0:
        raise ValueError(f"offset {at} is outside of −{FURTHEST}…0")
    values = tuple(tuple(v) if isinstance(v, list) else v for v in value["in"])
    hash(values)  # a TypeError for what no view can hold
    return Atom(name, values, at)
