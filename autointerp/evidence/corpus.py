"""Documents to token sequences to batches, streamed in a seeded shuffled order. The rules:

- documents are tokenised one by one without special tokens, and cut into consecutive pieces of at most `context_length`
  positions; where the dictionary has `prepend_bos`, the first position of each is BOS and is not counted;
- a piece with fewer than `MIN_TOKENS` document tokens is dropped; nothing else is, and no partial batch is lost;
- `max_tokens` counts document tokens. The sequence that would exceed it is cut at the limit when MIN_TOKENS or more of
  it remain and left out otherwise, so the total is at most `max_tokens` and short of it by less than MIN_TOKENS.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.documents import DocumentSource, open_corpus
from autointerp.evidence.tokenising import Encoder
from autointerp.records import Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Batch",
    "Corpus",
    "TokenSequence",
    "by_length",
    "check_context_length",
    "context_split",
    "fit_rows",
    "open_corpus",
    "split_of",
]

T = TypeVar("T")

MIN_TOKENS = 8
WINDOW_BATCHES = 16
"""Batches' worth of sequences that are sorted by length together."""
PREFETCH = 4
"""Batches made ahead of the model."""


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """Consecutive tokens of one document."""

    doc: int
    """Index of the document in corpus order."""
    order: int
    """Index of the document in the shuffled order."""
    start: int
    """Index, among the document's tokens, of the first one here."""
    ids: NDArray[np.int64]
    """Token ids [n_bos + n], BOS included."""
    n_bos: int
    """Leading BOS positions, 0 or 1."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences of similar length, right-padded: `b` sequences, `t` positions."""

    ids: torch.Tensor
    """Token ids [b, t], int64."""
    counted: torch.Tensor
    """Whether a position enters the statistics [b, t]: a document token, not special; never BOS or padding."""
    docs: NDArray[np.int64]
    """`TokenSequence.doc` of each sequence [b]."""
    orders: NDArray[np.int64]
    """`TokenSequence.order` [b]."""
    starts: NDArray[np.int64]
    """`TokenSequence.start` [b]."""
    lengths: NDArray[np.int64]
    """Positions that are not padding [b], BOS included."""
    n_bos: int

    @property
    def positions(self) -> torch.Tensor:
        """Index of each position among its document's tokens [b, t]; meaningless at BOS and padding."""
        return torch.from_numpy(self.starts)[:, None] + torch.arange(self.ids.shape[1]) - self.n_bos


class Corpus:
    """Token sequences of `documents`; the same arguments give the same sequences in the same order.

    InputError when the dictionary wants BOS and the tokenizer has none, and, from the iterators, when nothing in the
    corpus is long enough.
    """

    def __init__(
        self,
        documents: DocumentSource,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int = 128,
        prepend_bos: bool = False,
        max_tokens: int | None = None,
        seed: int = 0,
    ):
        self.documents = documents
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.max_tokens = max_tokens
        self.seed = seed
        self.encoder = Encoder(tokenizer, documents.name)
        self._read = (0, 0)
        self.bos = np.array([bos_id(tokenizer)] if prepend_bos else [], np.int64)
        if self.piece < MIN_TOKENS:
            raise InputError(
                f"context length {context_length}: give --context-length {MIN_TOKENS + len(self.bos)} or more"
            )

    def head(self, max_tokens: int) -> Corpus:
        """Its first sequences, those of `max_tokens` document tokens: as the documents are shuffled, a sample of it."""
        least = max_tokens if self.max_tokens is None else min(max_tokens, self.max_tokens)
        return Corpus(self.documents, self.tokenizer, self.context_length, bool(len(self.bos)), least, self.seed)

    @property
    def piece(self) -> int:
        """Document tokens of a full sequence."""
        return self.context_length - len(self.bos)

    @cached_property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return pad if isinstance(pad, int) else 0

    @cached_property
    def special_ids(self) -> NDArray[np.int64]:
        """Ids of the tokenizer's special tokens, which are never counted."""
        return np.array(sorted(set(self.tokenizer.all_special_ids)), np.int64)

    def check(self) -> None:
        """InputError unless the corpus fills one context (or `max_tokens`, where less); reads no more than that.

        Run it before anything heavy is loaded: an empty corpus, a missing template or a bad first line show here.
        """
        want = min(self.piece, self.max_tokens or self.piece)
        have = 0
        for sequence in self.sequences():
            have += int((~np.isin(sequence.ids[sequence.n_bos :], self.special_ids)).sum())
            if have >= want:
                return
        raise InputError(
            f"corpus {self.documents.name} holds {have} tokens, fewer than one context of {self.context_length}"
            " (special tokens do not count): give more text or a smaller --context-length"
        )

    def expected_tokens(self) -> int | None:
        """Document tokens that the corpus will give in all, by those of the documents read so far, which come in random
        order; None before the first, and where nobody knows how many documents there are."""
        docs, tokens = self._read
        if not docs or self.documents.n_documents is None:
            return None
        expected = tokens if docs == self.documents.n_documents else round(tokens / docs * self.documents.n_documents)
        return expected if self.max_tokens is None else min(expected, self.max_tokens)

    def sequences(self) -> Iterator[TokenSequence]:
        """Every sequence of the corpus, documents in shuffled order, each document's pieces in its own."""
        left = self.max_tokens if self.max_tokens is not None else float("inf")
        found, any_text, n_tokens = False, False, 0
        encoded = self.encoder.encode(self.documents.shuffled(self.seed))
        for order, (doc, parts) in enumerate(encoded):
            for start, ids in _cut(parts, self.piece):
                any_text = True
                if left < MIN_TOKENS:
                    break
                ids = ids[: int(min(left, len(ids)))]
                if len(ids) >= MIN_TOKENS:
                    found, left, n_tokens = True, left - len(ids), n_tokens + len(ids)
                    self._read = (order + 1, n_tokens)
                    yield TokenSequence(doc, order, start, np.concatenate([self.bos, ids]), len(self.bos))
            if left < MIN_TOKENS:
                break
        if not found:
            raise self._nothing(any_text)

    def batches(self, tokens_per_batch: int = 4096) -> Generator[Batch, None, None]:
        """Every sequence once, in batches of at most `tokens_per_batch` positions, padding included, or one sequence.

        Sequences of similar length go together within a window of WINDOW_BATCHES batches. A background thread reads and
        tokenises ahead; it ends when the iterator is exhausted or closed, and its errors are raised here.
        """
        return prefetch((self._pad(rows) for rows in self._bucketed(tokens_per_batch)), PREFETCH)

    def _bucketed(self, tokens_per_batch: int) -> Iterator[list[TokenSequence]]:
        def positions(sequence: TokenSequence) -> int:
            return len(sequence.ids)

        window: list[TokenSequence] = []
        held = 0
        for sequence in self.sequences():
            window.append(sequence)
            held += len(sequence.ids)
            if held >= WINDOW_BATCHES * tokens_per_batch:
                # The last may be partial: it waits for more.
                *full, window = by_length(window, positions, tokens_per_batch)
                held = sum(len(waiting.ids) for waiting in window)
                yield from full
        yield from by_length(window, positions, tokens_per_batch)

    def _pad(self, rows: list[TokenSequence]) -> Batch:
        lengths = np.array([len(row.ids) for row in rows], np.int64)
        ids = np.full((len(rows), int(lengths.max())), self.pad_id, np.int64)
        for at, row in enumerate(rows):
            ids[at, : len(row.ids)] = row.ids
        column = np.arange(ids.shape[1])
        counted = (column >= len(self.bos)) & (column < lengths[:, None]) & ~np.isin(ids, self.special_ids)
        docs, orders, starts = (
            np.array([getattr(row, name) for row in rows], np.int64) for name in ("doc", "order", "start")
        )
        return Batch(torch.from_numpy(ids), torch.from_numpy(counted), docs, orders, starts, lengths, len(self.bos))

    def _nothing(self, any_text: bool) -> InputError:
        if not any_text:
            return InputError(f"corpus {self.documents.name} is empty: no document holds any text")
        return InputError(
            f"corpus {self.documents.name} is shorter than a context: no document holds {MIN_TOKENS} tokens;"
            " give longer documents or a larger --max-tokens"
        )


def split_of(order: int) -> Literal["fit", "held"]:
    """The half in which a document counts, by its place in the shuffled order; independent of `context_split`."""
    return "fit" if order // 2 % 2 == 0 else "held"


def fit_rows(orders: NDArray[np.int64]) -> NDArray[np.bool_]:
    """`split_of(order) == "fit"` of many orders at once."""
    return orders // 2 % 2 == 0


def context_split(order: int) -> Split:
    """The split of the contexts of a document, by its place in the shuffled order."""
    return "explain" if order % 2 == 0 else "score"


def check_context_length(context_length: int, max_positions: int | None) -> None:
    """InputError when a context is longer than the positions the model has (None: no limit known)."""
    if max_positions is not None and context_length > max_positions:
        raise InputError(
            f"context length {context_length}: the model has {max_positions} positions;"
            f" give --context-length {max_positions} or less"
        )


def bos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to put before each sequence: BOS, else EOS, as TransformerLens does for models without one."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise InputError(
        "the SAE wants a BOS token (prepend_bos) and the tokenizer has neither BOS nor EOS: set its bos_token"
    )


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer begins a text with BOS of its own accord, as a trainer's plain call of it has it do."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id is not None and list(first) == [tokenizer.bos_token_id]


def prefetch(items: Iterator[T], depth: int) -> Generator[T, None, None]:
    """`items`, made ahead by a background thread, at most `depth` waiting. Closing the result ends the thread."""
    waiting: queue.Queue[tuple[bool, T | BaseException | None]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(done: bool, item: T | BaseException | None) -> None:
        while not stopped.is_set():
            try:
                return waiting.put((done, item), timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(False, item)
                if stopped.is_set():
                    return
            put(True, None)
        except BaseException as error:  # raised again in the thread that reads
            put(True, error)

    thread = threading.Thread(target=work, name="autointerp-corpus", daemon=True)

    def read() -> Generator[T, None, None]:
        thread.start()
        try:
            while True:
                done, item = waiting.get()
                if isinstance(item, BaseException):
                    raise item
                if done:
                    return
                yield item  # type: ignore[misc]
        finally:
            stopped.set()
            thread.join()

    return read()


def _cut(parts: Iterable[NDArray[np.int64]], piece: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """(index of the first token, token ids) of consecutive pieces of `piece` tokens; the last may be shorter."""
    start, left = 0, np.empty(0, np.int64)
    for part in parts:
        left = np.concatenate([left, part])
        whole = len(left) // piece * piece
        for at in range(0, whole, piece):
            yield start + at, left[at : at + piece]
        start, left = start + whole, left[whole:]
    if len(left):
        yield start, left


def right_padded(texts: Sequence[np.ndarray]) -> Tensor:
    """Ids of texts as one [b, t] int64; zeros after the end of the shorter ones, which no causal model looks at."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text)] = torch.from_numpy(text.astype(np.int64))
    return ids


def by_length(rows: Iterable[T], length: Callable[[T], int], limit: int) -> list[list[T]]:
    """`rows` in batches of at most `limit` positions when padded, or one row, shortest first; stable."""
    batches: list[list[T]] = []
    for row in sorted(rows, key=length):
        if batches and (len(batches[-1]) + 1) * length(row) <= limit:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches
