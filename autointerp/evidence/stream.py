"""The one pass over the corpus: tokens → activations of both sides → statistics, and the spool for what comes after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse import csr_matrix

from autointerp.evidence.corpus import Batch, Corpus
from autointerp.evidence.dictionaries.base import ActiveLatents, Dictionary
from autointerp.evidence.dictionaries.crosscoder import Crosscoder
from autointerp.evidence.extras import Extra
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order
from autointerp.evidence.screening import Screen
from autointerp.evidence.spool import Spool
from autointerp.evidence.statistics import ChangeStatistics, JointCodes, PairedCodes, place_of

OUTLIER = 10.0
"""Tokens whose ‖x_base‖ exceeds this many medians are attention sinks, not text: left out on both sides."""
CALIBRATION_TOKENS = 8192
"""Counted tokens at the head of the shuffled corpus that set the median."""
ENCODE_ROWS = 1024
"""Tokens encoded at a time: [rows, m] must stay in cache."""
Progress = Callable[[int], None]
"""Called with the number of document tokens of each batch that is done."""


@dataclass(frozen=True)
class PairedBatch:
    """A batch with its activations; b sequences of t positions. Of a transcoder, x = [v | u] (transcoder.py)."""

    batch: Batch
    x_base: torch.Tensor
    """[b, t, width]; see `PairedModel.width`."""
    x_adapted: torch.Tensor
    """[b, t, width]."""
    d: int
    """Width of v, from which the change is read."""

    def norms(self) -> torch.Tensor:
        """‖x_base‖ [b, t], float32."""
        return self.x_base[..., : self.d].float().norm(dim=-1).cpu()


@dataclass(frozen=True)
class CodedBatch:
    """A batch with its latents, off the device."""

    batch: Batch
    counted: torch.Tensor
    """`Batch.counted` without outliers of the norm [b, t]."""
    x_base: torch.Tensor
    """As `PairedBatch` has it."""
    x_adapted: torch.Tensor
    codes: PairedCodes


@dataclass(frozen=True)
class Measured:
    """What one pass over the corpus leaves."""

    statistics: ChangeStatistics
    spool: Spool
    n_docs: int
    norm_limit: float
    """Tokens above it were left out."""
    left_out: float
    """Share of the change that screening ascribes to latents outside the map; 0 where all were tracked."""


def to_codes(dictionary: Dictionary, x: torch.Tensor) -> csr_matrix:
    """z [n, m] of x [n, d] as a sparse matrix, encoded ENCODE_ROWS tokens at a time."""
    return _sparse(((len(rows), dictionary.encode_active(rows)) for rows in x.split(ENCODE_ROWS)), dictionary.d_sae)


def _sparse(parts: Iterable[tuple[int, ActiveLatents]], m: int) -> csr_matrix:
    """z [n, m] of the active latents of some tokens after the other; how many tokens stands with each part."""
    lengths, columns, values = [np.zeros(1, np.int64)], [], []
    for n, (token, latent, value) in parts:
        lengths.append(np.bincount(token.cpu().numpy(), minlength=n))
        columns.append(latent.cpu().numpy())
        values.append(value.float().cpu().numpy())
    indptr = np.cumsum(np.concatenate(lengths))
    indices = np.concatenate(columns) if columns else np.zeros(0, np.int64)
    data = np.concatenate(values) if values else np.zeros(0, np.float32)
    shape = (len(indptr) - 1, m)
    return csr_matrix((data, indices.astype(np.int32), indptr.astype(np.int32)), shape=shape)


def joint_codes(dictionary: Dictionary, x_base: torch.Tensor, x_adapted: torch.Tensor) -> JointCodes | None:
    """What a crosscoder says of x_base and x_adapted [n, d]; None for other dictionaries."""
    if not isinstance(dictionary, Crosscoder):
        return None
    rows = zip(x_base.split(ENCODE_ROWS), x_adapted.split(ENCODE_ROWS), strict=True)
    z = _sparse(((len(base), dictionary.encode_both(base, adapted)) for base, adapted in rows), dictionary.d_sae)
    return JointCodes(z, *dictionary.directions)


def read(model: PairedModel, batch: Batch) -> PairedBatch:
    """The batch with its activations on both sides."""
    return PairedBatch(batch, *model.activations(batch.ids), model.d_model)


def median_norm(batches: list[PairedBatch]) -> float:
    """Median ‖x_base‖ over the counted tokens."""
    return float(torch.cat([paired.norms()[paired.batch.counted] for paired in batches]).median())


def measure(
    models: Sequence[PairedModel],
    dictionary: Dictionary,
    corpus: Corpus,
    screen: Screen,
    spool: Spool,
    *,
    tokens_per_batch: int = 4096,
    extras: Iterable[type[Extra]] = (),
    progress: Progress = lambda _n: None,
) -> Measured:
    """Reads the corpus once. `screen` says which latents enter the change map; the spool is filled, not closed.

    models: replicas of one pair, each of which reads a batch at a time; see `in_order`. extras: further sums to keep.
    """
    with closing(corpus.batches(tokens_per_batch)) as batches:
        head: list[PairedBatch] = []
        in_order(read, head.append, models, _head(batches))
        extras = list(extras)
        pass_, joint = _Pass(dictionary, screen, spool, corpus, extras), any(extra.joint for extra in extras)
        limit = OUTLIER * median_norm(head)

        def coded(model: PairedModel, batch: Batch | PairedBatch) -> CodedBatch:
            paired = batch if isinstance(batch, PairedBatch) else read(model, batch)
            return encoded(dictionary, paired, limit, corpus.piece, joint)

        in_order(coded, lambda batch: pass_.add(batch, progress), models, _chained(head, batches))
        return pass_.result(limit)


def _head(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Batches until they hold CALIBRATION_TOKENS counted tokens."""
    counted = 0
    while counted < CALIBRATION_TOKENS and (batch := next(batches, None)) is not None:
        counted += int(batch.counted.sum())
        yield batch


def encoded(
    dictionary: Dictionary, paired: PairedBatch, norm_limit: float, piece: int, joint: bool = False
) -> CodedBatch:
    """The batch with its latents, outliers of the norm no longer counted; full sequences are `piece` tokens long.

    joint: whether a crosscoder's own code is wanted too.
    """
    batch = paired.batch
    counted = batch.counted & (paired.norms() <= norm_limit)
    rows = counted.flatten().to(paired.x_base.device)
    x_base = paired.x_base.flatten(0, 1)[rows].float()
    x_adapted = paired.x_adapted.flatten(0, 1)[rows].float()
    position = batch.positions[counted].numpy()
    looked_up = 0.0 if dictionary.lookup is None else dictionary.lookup[batch.ids[counted]].float().cpu().numpy()
    beside = [side if side is None else side.cpu().numpy() for side in map(dictionary.beside, (x_base, x_adapted))]
    codes = PairedCodes(
        base=to_codes(dictionary, x_base),
        adapted=to_codes(dictionary, x_adapted),
        x_base=x_base[:, : paired.d].cpu().numpy(),
        x_adapted=x_adapted[:, : paired.d].cpu().numpy(),
        order=np.repeat(batch.orders, counted.sum(1).numpy()),
        position=position,
        place=place_of(position, piece),
        looked_up=looked_up if beside[0] is None else beside[0],
        looked_up_adapted=beside[1],
        joint=joint_codes(dictionary, x_base, x_adapted) if joint else None,
    )
    return CodedBatch(batch, counted, paired.x_base.cpu(), paired.x_adapted.cpu(), codes)


def _chained(head: list[PairedBatch], batches: Iterator[Batch]) -> Iterator[PairedBatch | Batch]:
    """`head`, let go of as it is read, then the other batches."""
    while head:
        yield head.pop(0)
    yield from batches


class _Pass:
    """The state of one pass: the screen until it has chosen, the statistics from then on."""

    def __init__(
        self, dictionary: Dictionary, screen: Screen, spool: Spool, corpus: Corpus, extras: Iterable[type[Extra]]
    ):
        self.dictionary, self.screen, self.spool, self.piece = dictionary, screen, spool, corpus.piece
        self.W_dec = dictionary.W_dec.float().cpu().numpy()
        self.b_dec = dictionary.b_dec.float().cpu().numpy()
        self.docs: set[int] = set()
        m, d = self.W_dec.shape
        tracked = screen.tracked if screen.done else np.zeros(0, np.int64)
        self.statistics = ChangeStatistics(m, d, tracked, corpus.seed, extras)

    def add(self, coded: CodedBatch, progress: Progress) -> None:
        batch, codes = coded.batch, coded.codes
        self._spool(coded)
        self.statistics.add(codes, self.W_dec, self.b_dec)
        if not self.screen.done:
            self.screen.add(codes.base, codes.x_adapted - codes.x_base)
            if self.screen.done:
                self.statistics = self.statistics.tracking(self.screen.tracked)
        self.docs.update(batch.docs.tolist())
        progress(int((batch.lengths - batch.n_bos).sum()))

    def _spool(self, coded: CodedBatch) -> None:
        batch = coded.batch
        for s, length in enumerate(batch.lengths.tolist()):
            kept = slice(batch.n_bos, length)
            self.spool.append(
                coded.x_base[s, kept],
                coded.x_adapted[s, kept],
                batch.ids[s, kept].numpy(),
                coded.counted[s, kept].numpy(),
                int(batch.docs[s]),
                int(batch.orders[s]),
                int(batch.starts[s]),
            )

    def result(self, norm_limit: float) -> Measured:
        if self.screen.seen > self.statistics.fit.n + self.statistics.held.n:
            self._screen_again()
        return Measured(self.statistics, self.spool, len(self.docs), norm_limit, self.screen.left_out)

    def _screen_again(self) -> None:
        """Screens on a tenth of the corpus and maps the rest, read back from the spool: it was too short for the
        screen's budget, which left the map less than that or nothing."""
        m, d = self.W_dec.shape
        self.screen = Screen(m, d, self.statistics.n_tokens // 10, self.screen.max_tracked)
        for stretch in self.spool.stretches(min(8192, self.screen.budget)):
            counted, place = stretch.counted, [self.spool.place(s) for s in stretch.sequences]
            lengths = np.diff(stretch.bounds)
            order = np.repeat([order for _, order, _ in place], lengths)[counted]
            first = np.repeat([start for _, _, start in place] - stretch.bounds[:-1], lengths)
            position = (first + np.arange(len(counted)))[counted]
            x_base, change = stretch.counted_change(d)
            z = to_codes(self.dictionary, x_base.to(self.dictionary.W_dec.device))
            if self.screen.done:
                self.statistics.map(z, change, order, position, place_of(position, self.piece))
            else:
                self.screen.add(z, change)
                if self.screen.done:
                    self.statistics = self.statistics.tracking(self.screen.tracked)
