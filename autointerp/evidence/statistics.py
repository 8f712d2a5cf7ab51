"""The sufficient statistics of a change, streamed and additive.

`ChangeStatistics` is a monoid: statistics of two sets of documents add up to the statistics of their union, whatever
the split, so batches, processes and hosts merge by `+`. What is kept is O(m) numbers for every latent of the dictionary
and O(p²) for the p latents that the change map tracks; nothing grows with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from scipy.sparse import csr_matrix, vstack
from torch.nn.functional import embedding_bag

from autointerp.evidence.change_map import Moments
from autointerp.evidence.corpus import fit_rows

if TYPE_CHECKING:
    from autointerp.evidence.extras import Extra

E = TypeVar("E", bound="Extra")

N_DECOYS = 8
"""Sign-flipped copies of the change. At a false discovery rate of 5 %, halved for each of two tests, 40/N_DECOYS
latents are the fewest that can pass."""
N_PLACES = 16
"""Equal parts of a sequence, over which the tests compare like with like."""
PENDING_ROWS = 16384
"""Tokens that are gathered before their products are added up: adding them into the dense G and B costs as much for few
as for many."""
_MASK = (1 << 64) - 1


class JointCodes(NamedTuple):
    """What a crosscoder, which encodes both models at once, says of a batch."""

    z: csr_matrix
    """[n, m] float32."""
    read_base: np.ndarray
    """By which each latent is looked for in x_base [m, d]."""
    read_adapted: np.ndarray
    """By which it is looked for in x_adapted [m, d]."""


@dataclass(frozen=True)
class PairedCodes:
    """Counted tokens of one batch on both sides. n tokens, d residual width, m latents."""

    base: csr_matrix
    """z of the base model [n, m], float32."""
    adapted: csr_matrix
    """z of the adapted model [n, m]."""
    x_base: np.ndarray
    """[n, d] float32."""
    x_adapted: np.ndarray
    """[n, d] float32."""
    order: np.ndarray
    """Index of each token's document in the shuffled corpus, [n]."""
    position: np.ndarray
    """Index of each token among its document's tokens, [n]."""
    place: np.ndarray
    """Part of its sequence that each token stands in, [n], 0 … N_PLACES − 1; see `place_of`."""
    looked_up: np.ndarray | float = 0.0
    """What the dictionary's lookup, or a skip connection, adds to the reconstruction of each token [n, d]."""
    looked_up_adapted: np.ndarray | float | None = None
    """The same of the adapted side; None where it is the same number."""
    joint: JointCodes | None = None
    """Of a crosscoder, where an extra asks for it."""


def place_of(position: np.ndarray, piece: int) -> np.ndarray:
    """`PairedCodes.place` of tokens by their index in their documents, which are cut into sequences of `piece`."""
    return position % piece * N_PLACES // piece


def decoy_signs(order: np.ndarray, position: np.ndarray, seed: int, span: int = 1024) -> np.ndarray:
    """Random signs [n, N_DECOYS], one for each stretch of `span` tokens of each document: a function of the document
    alone.

    Multiplying Δx by them keeps its spectrum, its autocorrelation and its dependence within a document, and breaks
    every link to the latents that holds across documents (the wild cluster bootstrap: Cameron, Gelbach & Miller 2008).
    """
    key = (order.astype(np.uint64) << np.uint64(24)) ^ (position // span).astype(np.uint64)
    key = key + np.uint64((0x9E3779B97F4A7C15 * (2 * seed + 1)) & _MASK)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    key ^= key >> np.uint64(31)
    bits = (key[:, None] >> np.arange(N_DECOYS, dtype=np.uint64)) & np.uint64(1)
    return (1.0 - 2.0 * bits).astype(np.float32)


class LatentMoments:
    """Per-latent sums, firing counts and maxima of one side, for all m latents."""

    def __init__(self, m: int):
        self.total = np.zeros(m)
        self.fired = np.zeros(m, dtype=np.int64)
        self.largest = np.zeros(m, dtype=np.float32)

    def add(self, z: csr_matrix) -> None:
        """z [n, m]."""
        m = len(self.total)
        active = z.data > 0
        self.total += np.bincount(z.indices, weights=z.data, minlength=m)
        self.fired += np.bincount(z.indices[active] if not active.all() else z.indices, minlength=m)
        np.maximum.at(self.largest, z.indices, z.data)

    def __add__(self, other: LatentMoments) -> LatentMoments:
        result = LatentMoments(len(self.total))
        result.total = self.total + other.total
        result.fired = self.fired + other.fired
        result.largest = np.maximum(self.largest, other.largest)
        return result


@dataclass
class StreamMoments:
    """How well the dictionary reconstructs each side and the change, over all counted tokens. Sums."""

    sum_base: np.ndarray
    sum_adapted: np.ndarray
    sum_change: np.ndarray
    square_base: float = 0.0
    square_adapted: float = 0.0
    square_change: float = 0.0
    error_base: float = 0.0
    error_adapted: float = 0.0
    error_change: float = 0.0
    """Σ‖Δx − Δz W_dec‖²: what the difference of two encodings misses."""

    @classmethod
    def zero(cls, d: int) -> StreamMoments:
        return cls(np.zeros(d), np.zeros(d), np.zeros(d))

    def __add__(self, other: StreamMoments) -> StreamMoments:
        return StreamMoments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add(self, codes: PairedCodes, W_dec: np.ndarray, b_dec: np.ndarray) -> np.ndarray:
        """Adds one batch and returns Δx [n, d]."""
        change = codes.x_adapted - codes.x_base
        error_base = codes.x_base - b_dec - codes.looked_up - product(codes.base, W_dec)
        beside = codes.looked_up if codes.looked_up_adapted is None else codes.looked_up_adapted
        error_adapted = codes.x_adapted - b_dec - beside - product(codes.adapted, W_dec)
        self.sum_base += codes.x_base.sum(0, dtype=np.float64)
        self.sum_adapted += codes.x_adapted.sum(0, dtype=np.float64)
        self.sum_change += change.sum(0, dtype=np.float64)
        self.square_base += _square(codes.x_base)
        self.square_adapted += _square(codes.x_adapted)
        self.square_change += _square(change)
        self.error_base += _square(error_base)
        self.error_adapted += _square(error_adapted)
        self.error_change += _square(error_adapted - error_base)
        return change

    def fvu(self, n: int) -> tuple[float, float]:
        """Fraction of variance unexplained on base and adapted; variance around the mean of the n tokens."""
        base = self.square_base - float(self.sum_base @ self.sum_base) / max(n, 1)
        adapted = self.square_adapted - float(self.sum_adapted @ self.sum_adapted) / max(n, 1)
        return self.error_base / max(base, 1e-30), self.error_adapted / max(adapted, 1e-30)

    def static_share(self, n: int) -> float:
        """‖δ̄‖² / E‖Δx‖²; 0 when nothing changed."""
        if self.square_change == 0:
            return 0.0
        return float(self.sum_change @ self.sum_change) / max(n, 1) / self.square_change


def _square(x: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", x, x, dtype=np.float64))


class MapMoments:
    """Σ z, G, B, ΣΔx, ΣΔxΔxᵀ of the tracked latents over the tokens of one split, uncentred. First moments are kept by
    place, so that they can be centred place by place; decoys keep what hangs on the change's sign."""

    _SUMS = ("n", "fired", "G", "S", "count", "z", "change", "B", "decoy_count", "decoy_z", "decoy_change", "decoy_B")

    def __init__(self, p: int, d: int, n_decoys: int):
        self.n = 0
        self.fired = np.zeros(p, dtype=np.int64)
        self.G = np.zeros((p, p))
        self.S = np.zeros((d, d))
        self.count, self.decoy_count = np.zeros(N_PLACES), np.zeros((n_decoys, N_PLACES))
        self.z, self.decoy_z = np.zeros((N_PLACES, p)), np.zeros((n_decoys, N_PLACES, p))
        self.change, self.decoy_change = np.zeros((N_PLACES, d)), np.zeros((n_decoys, N_PLACES, d))
        self.B, self.decoy_B = np.zeros((p, d)), np.zeros((n_decoys, p, d))

    def add(self, z: csr_matrix, change: np.ndarray, place: np.ndarray, signs: np.ndarray) -> None:
        """z [n, p], change [n, d], place [n], signs [n, n_decoys]."""
        self.n += len(change)
        by_latent = z.T.tocsr()
        self.G += (by_latent @ z).toarray()
        self.S += (torch.from_numpy(change).T @ torch.from_numpy(change)).numpy()  # numpy's threads would spin
        self.fired += np.bincount(z.indices, minlength=len(self.fired))
        at = csr_matrix((np.ones(len(place), np.float32), (place, np.arange(len(place)))), shape=(N_PLACES, len(place)))
        sums = (self.count, self.z, self.change, self.B)
        for total, added in zip(sums, _products(at, by_latent, z, change), strict=True):
            total += added
        decoys = (self.decoy_count, self.decoy_z, self.decoy_change, self.decoy_B)
        for r, sign in enumerate(signs.T):
            # Signs go to the few codes rather than to the change: [nnz] numbers, not [n, d].
            flipped = _products(_signed(at, sign), _signed(by_latent, sign), z, change)
            for total, added in zip(decoys, flipped, strict=True):
                total[r] += added

    def __add__(self, other: MapMoments) -> MapMoments:
        result = MapMoments(0, 0, 0)
        for name in self._SUMS:
            setattr(result, name, getattr(self, name) + getattr(other, name))
        return result

    def moments(self, mean: np.ndarray, static: np.ndarray) -> Moments:
        """Codes centred on their mean [N_PLACES, p], the change on the static part [N_PLACES, d]."""
        count = self.count[:, None]
        left = self.change - count * static
        G = self.G - self.z.T @ mean - mean.T @ self.z + mean.T @ (count * mean)
        B = self.B - self.z.T @ static - mean.T @ left
        S = self.S - self.change.T @ static - static.T @ left
        return Moments(self.n, _tensor(G), _tensor(B), _tensor(S))

    def decoys(self, target: Moments, mean: np.ndarray, static: np.ndarray) -> list[Moments]:
        """`target`, made by `moments`, with the change's sign flipped at random: no link between latents and change."""
        sums = zip(self.decoy_count, self.decoy_z, self.decoy_change, self.decoy_B, strict=True)
        B = (B - z.T @ static - mean.T @ (change - count[:, None] * static) for count, z, change, B in sums)
        return [Moments(self.n, target.G, _tensor(b), target.S) for b in B]


def _signed(by_token: csr_matrix, sign: np.ndarray) -> csr_matrix:
    """A matrix [k, n] with its columns, one a token, multiplied by sign [n]."""
    data = by_token.data * sign[by_token.indices]
    return csr_matrix((data, by_token.indices, by_token.indptr), shape=by_token.shape)


def _products(at: csr_matrix, by_latent: csr_matrix, z: csr_matrix, change: np.ndarray) -> tuple[np.ndarray, ...]:
    """Counts [N_PLACES], Σ z [N_PLACES, p], ΣΔx [N_PLACES, d] and B [p, d].

    at [N_PLACES, n]: the weight of each token in its place; by_latent [p, n]: the codes so weighted.
    """
    return np.asarray(at.sum(1)).ravel(), csr_matrix(at @ z).toarray(), product(at, change), product(by_latent, change)


def product(sparse: csr_matrix, dense: np.ndarray) -> np.ndarray:
    """[n, p] times [p, d], both float32. As torch adds up embeddings: in less than half of what scipy's own product
    takes on one thread, and scipy knows of no more."""
    indices, indptr, weights = (torch.from_numpy(part) for part in (sparse.indices, sparse.indptr, sparse.data))
    return embedding_bag(
        indices, torch.from_numpy(dense), indptr, mode="sum", per_sample_weights=weights, include_last_offset=True
    ).numpy()


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float64))


class ChangeStatistics:
    """Everything that selection needs to know of the corpus. `a + b` is the statistics of both sets of documents.

    m latents in all, of which the p in `tracked` enter the change map (all of them where m² fits; see screening.py).
    """

    def __init__(self, m: int, d: int, tracked: np.ndarray, seed: int, extras: Iterable[type[Extra]] = ()):
        """extras: kinds of further sums to keep; see extras.py."""
        self.m, self.d, self.seed = m, d, seed
        self.extras = {kind: kind(m) for kind in extras}
        self.tracked = np.asarray(tracked, dtype=np.int64)
        self.n_tokens = 0
        self.base = LatentMoments(m)
        self.adapted = LatentMoments(m)
        self.stream = StreamMoments.zero(d)
        self._fit = MapMoments(len(self.tracked), d, N_DECOYS)
        self._held = MapMoments(len(self.tracked), d, 0)
        self._pending: list[tuple[csr_matrix, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    @property
    def fit(self) -> MapMoments:
        """Of the half that the map is fitted and tested on."""
        self._settle()
        return self._fit

    @property
    def held(self) -> MapMoments:
        """Of the half that it is measured on."""
        self._settle()
        return self._held

    def add(self, codes: PairedCodes, W_dec: np.ndarray, b_dec: np.ndarray) -> None:
        """Adds the counted tokens of a batch; W_dec [m, d], b_dec [d]."""
        if not len(codes.order):
            return
        self.n_tokens += len(codes.order)
        self.base.add(codes.base)
        self.adapted.add(codes.adapted)
        change = self.stream.add(codes, W_dec, b_dec)
        for extra in self.extras.values():
            extra.add(codes, W_dec)
        if len(self.tracked):
            self.map(codes.base, change, codes.order, codes.position, codes.place)

    def map(
        self, z: csr_matrix, change: np.ndarray, order: np.ndarray, position: np.ndarray, place: np.ndarray
    ) -> None:
        """Adds tokens to the change map alone: base codes z [n, m], change [n, d]; see `PairedCodes` for the rest."""
        self._pending.append((z, change, order, position, place))
        if sum(len(waiting[1]) for waiting in self._pending) >= PENDING_ROWS:
            self._settle()

    def _settle(self) -> None:
        """Adds the pending tokens into the moments of their half."""
        if not self._pending:
            return
        codes, *others = zip(*self._pending, strict=True)
        self._pending = []
        z = csr_matrix(vstack(codes))
        tracked = z if len(self.tracked) == self.m else z[:, self.tracked]
        change, order, position, place = (np.concatenate(parts) for parts in others)
        fit, signs = fit_rows(order), decoy_signs(order, position, self.seed)
        for half, mine, n_decoys in ((self._fit, fit, N_DECOYS), (self._held, ~fit, 0)):
            if mine.any():
                half.add(tracked[mine], change[mine], place[mine], signs[mine, :n_decoys])

    def extra(self, kind: type[E]) -> E:
        """The further sums of one kind, which were asked for when this was made."""
        return self.extras[kind]  # pyright: ignore[reportReturnType] - kept by kind

    def __add__(self, other: ChangeStatistics) -> ChangeStatistics:
        mine, theirs = ((s.m, s.d, s.seed, s.extras.keys()) for s in (self, other))
        if mine != theirs or not np.array_equal(self.tracked, other.tracked):
            raise ValueError("statistics of different dictionaries, seeds, extras or tracked latents do not add up")
        result = ChangeStatistics(self.m, self.d, self.tracked[:0], self.seed)
        result.tracked = self.tracked
        for name in ("n_tokens", "base", "adapted", "stream"):
            setattr(result, name, getattr(self, name) + getattr(other, name))
        result._fit, result._held = self.fit + other.fit, self.held + other.held
        result.extras = {kind: extra + other.extras[kind] for kind, extra in self.extras.items()}
        return result

    def tracking(self, tracked: np.ndarray) -> ChangeStatistics:
        """The same, with an empty map of other latents: the map starts here, the rest goes on."""
        result = ChangeStatistics(self.m, self.d, tracked, self.seed)
        for name in ("n_tokens", "base", "adapted", "stream"):
            setattr(result, name, getattr(self, name))
        result.extras = self.extras
        return result

    def fit_fired(self) -> np.ndarray:
        """How often each tracked latent fired in the base model on the fit half [p]."""
        return self.fit.fired

    @property
    def static(self) -> np.ndarray:
        """δ̄ [d], the mean change over all counted tokens."""
        return self.stream.sum_change / max(self.n_tokens, 1)

    def centre(self, by_place: bool) -> tuple[np.ndarray, np.ndarray]:
        """Mean base codes [N_PLACES, p] and mean change [N_PLACES, d] over the tokens of the map, both halves: those of
        each place, or of all tokens, the same in each row."""
        fit, held = self.fit, self.held
        count, z, change = ((getattr(fit, name) + getattr(held, name)) for name in ("count", "z", "change"))
        if not by_place:
            count, z, change = (np.broadcast_to(total.sum(0), total.shape) for total in (count, z, change))
        count = np.maximum(count, 1)[:, None]
        return z / count, change / count
