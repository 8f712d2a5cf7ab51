"""Further sums over the corpus that some selectors ask for, each a monoid like `ChangeStatistics`, which carries them.

They are kept only where a selector of the run declares the need (`selection.needs`), so the default pays for none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from autointerp.evidence.statistics import PairedCodes

SETTLE_AT = 1 << 20
"""Entries that wait before they are merged into a keyed sum."""


class Extra(ABC):
    """Sums of one kind over counted tokens. `a + b` is the sums of both sets of tokens, whatever the split."""

    joint: bool = False
    """Whether it wants `PairedCodes.joint` where the dictionary has it."""

    def __init__(self, m: int):
        """m latents in the dictionary."""
        self.m = m

    @abstractmethod
    def add(self, codes: PairedCodes, W_dec: np.ndarray) -> None:
        """Adds one batch; W_dec [m, d]."""

    @abstractmethod
    def __add__(self, other: Self) -> Self: ...


class KeyedSums:
    """Sums of numbers by integer key, for keys too many and too sparse for an array."""

    def __init__(self) -> None:
        self._keys, self._values = np.zeros(0, np.int64), np.zeros(0)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, keys: np.ndarray, values: np.ndarray) -> None:
        """keys [n] int64, values [n]."""
        self._waiting.append(_summed(keys, values))
        if sum(len(keys) for keys, _ in self._waiting) >= max(SETTLE_AT, len(self._keys)):
            self._settle()

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct keys, ascending, and the sum of each."""
        self._settle()
        return self._keys, self._values

    def __add__(self, other: KeyedSums) -> KeyedSums:
        result = KeyedSums()
        result._waiting = [self.items(), other.items()]
        return result

    def _settle(self) -> None:
        if self._waiting:
            keys, values = zip((self._keys, self._values), *self._waiting, strict=True)
            self._keys, self._values = _summed(np.concatenate(keys), np.concatenate(values))
            self._waiting = []


def _summed(keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, at = np.unique(keys, return_inverse=True)
    return unique, np.bincount(at, weights=values, minlength=len(unique))


class DocumentSums(Extra):
    """How strongly each latent fires in each document: Σ max(z, 0) of both sides, and the documents' tokens.

    Sparse: 16 bytes for each latent that fires in each document and side. That grows with the documents, which is why
    it is kept only where it is asked for; a document may be added in any number of parts.
    """

    def __init__(self, m: int):
        super().__init__(m)
        self._tokens = KeyedSums()
        self._sides = {"base": KeyedSums(), "adapted": KeyedSums()}

    def add(self, codes: PairedCodes, W_dec: np.ndarray) -> None:
        self._tokens.add(codes.order, np.ones(len(codes.order)))
        for side, z in (("base", codes.base), ("adapted", codes.adapted)):
            order = np.repeat(codes.order.astype(np.int64), np.diff(z.indptr))
            fires = z.data > 0
            self._sides[side].add(order[fires] * self.m + z.indices[fires], z.data[fires])

    def __add__(self, other: DocumentSums) -> DocumentSums:
        result = DocumentSums(self.m)
        result._tokens = self._tokens + other._tokens
        result._sides = {side: sums + other._sides[side] for side, sums in self._sides.items()}
        return result

    @property
    def documents(self) -> tuple[np.ndarray, np.ndarray]:
        """Place in the shuffled corpus of each document read, ascending, and its counted tokens."""
        order, tokens = self._tokens.items()
        return order, tokens.astype(np.int64)

    def fired_in(self, side: str) -> np.ndarray:
        """Documents in which each latent fires at all on `side` ('base' or 'adapted') [m]."""
        return np.bincount(self._sides[side].items()[0] % self.m, minlength=self.m)

    def differences(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(document, latent, difference of the mean activation over the document's tokens, adapted − base), sparse.

        Documents are indices into `documents`.
        """
        keys, values = self._sides["adapted"].items()
        base_keys, base_values = self._sides["base"].items()
        keys, values = _summed(np.concatenate([keys, base_keys]), np.concatenate([values, -base_values]))
        order, tokens = self._tokens.items()
        document = np.searchsorted(order, keys // self.m)
        return document, keys % self.m, values / tokens[document]


class ScalingSums(Extra):
    """Σ f² and Σ f⟨d, x⟩ on both sides, and the tokens where f > 0: what latent scaling is made of. [m] each.

    f is z of the base model and d the decoder row; of a crosscoder, f is its own code of both models, d as `JointCodes`
    has it.
    """

    joint = True

    def __init__(self, m: int):
        super().__init__(m)
        self.square, self.base, self.adapted, self.fired = np.zeros((4, m))

    def add(self, codes: PairedCodes, W_dec: np.ndarray) -> None:
        z, read_base, read_adapted = codes.joint or (codes.base, W_dec, W_dec)
        latents = np.unique(z.indices)
        f = z[:, latents].T.tocsr()
        self.square[latents] += np.asarray(f.multiply(f).sum(1), dtype=np.float64).ravel()
        self.fired[latents] += np.asarray((f > 0).sum(1)).ravel()
        self.base[latents] += np.einsum("kd,kd->k", f @ codes.x_base, read_base[latents], dtype=np.float64)
        self.adapted[latents] += np.einsum("kd,kd->k", f @ codes.x_adapted, read_adapted[latents], dtype=np.float64)

    def __add__(self, other: ScalingSums) -> ScalingSums:
        result = ScalingSums(self.m)
        for name in ("square", "base", "adapted", "fired"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result
