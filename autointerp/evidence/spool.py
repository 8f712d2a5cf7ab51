"""The residual stream of one pass over the corpus, on disk for as long as the run needs it.

Which latents matter is known only after the whole corpus was read, and their contexts lie anywhere in it. Running both
models again would double the work; keeping the codes of the whole dictionary would fill memory. So the pass leaves
x_base and x_adapted of each document token here (2·d numbers a token, in the model's dtype) in an unnamed temporary
file, read back for the selected latents alone.
"""

from __future__ import annotations

import io
import tempfile
import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from autointerp.errors import AutointerpError, InputError
from autointerp.evidence.corpus import right_padded


@dataclass(frozen=True)
class Stretch:
    """Some sequences of the spool, in spool order. n tokens in all, S sequences."""

    x_base: Tensor
    """[n, d] in the model's dtype."""
    x_adapted: Tensor
    """[n, d]."""
    counted: np.ndarray
    """Whether each token is counted [n]: neither special nor a norm outlier."""
    sequences: np.ndarray
    """Indices of the sequences in the spool [S]."""
    bounds: np.ndarray
    """First token of each sequence within this stretch, and the end [S + 1]."""

    def counted_change(self, d: int) -> tuple[Tensor, np.ndarray]:
        """x_base [n, …] and Δx [n, d] of the counted tokens, both float32; d is narrower than x where that holds what a
        transcoder reads too."""
        rows = torch.from_numpy(self.counted)
        x_base = self.x_base[rows].float()
        return x_base, (self.x_adapted[rows].float() - x_base)[:, :d].numpy()


def open_scratch(folder: Path | None) -> io.FileIO:
    """An unnamed temporary file in `folder`, made if need be, or in the system's temporary folder; InputError if it
    cannot be written there."""
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
        return cast(io.FileIO, tempfile.TemporaryFile(dir=folder, buffering=0))
    except OSError as error:
        place = folder or "the system's temporary folder"
        raise InputError(f"scratch {place}: {error.strerror}; give --scratch a folder to write in") from error


class Spool:
    """Written once, then read any number of times; the files vanish when it is closed or the process dies."""

    def __init__(self, d: int, dtype: torch.dtype, folder: Path | None = None):
        """d: numbers in an activation (`PairedModel.width`); `folder` is where the temporary files go (the system's
        temporary folder when None)."""
        self.d, self.dtype = d, dtype
        self._streams = open_scratch(folder)
        self._lock = threading.Lock()
        self._token_bytes = 2 * d * dtype.itemsize
        self._offsets = [0]
        # Of all tokens in a row: an array for each sequence would lie between the large blocks that come and go with
        # every batch, and keep the memory of those from being used again.
        self._ids, self._counted = array("i"), bytearray()
        self._places: list[tuple[int, int, int]] = []

    def append(
        self, x_base: Tensor, x_adapted: Tensor, ids: np.ndarray, counted: np.ndarray, doc: int, order: int, start: int
    ) -> None:
        """One sequence of t document tokens: x [t, d], ids [t], counted [t]; see corpus.TokenSequence for the rest."""
        try:
            for side in (x_base, x_adapted):
                block = side.to("cpu", self.dtype).contiguous()
                self._write(block.view(torch.uint8).numpy().data.cast("B"))
        except OSError as error:
            raise InputError(
                f"no room for the residual stream in {tempfile.gettempdir()} ({error.strerror}): free some, or name"
                f" another folder with --scratch, or read less with --max-tokens"
            ) from error
        self._offsets.append(self._offsets[-1] + len(ids))
        self._ids.frombytes(ids.astype(np.int32).tobytes())
        self._counted += counted.tobytes()
        self._places.append((doc, order, start))

    def _write(self, block: memoryview) -> None:
        while block:
            block = block[self._streams.write(block) :]

    def __len__(self) -> int:
        """Sequences."""
        return len(self._places)

    def place(self, sequence: int) -> tuple[int, int, int]:
        """(doc, order, start) of a sequence."""
        return self._places[sequence]

    @property
    def orders(self) -> np.ndarray:
        """Index of each sequence's document in the shuffled corpus [len]."""
        return np.array([order for _, order, _ in self._places], dtype=np.int64)

    def ids(self, sequence: int) -> np.ndarray:
        """Document token ids of a sequence [t]."""
        return np.array(self._ids[self._offsets[sequence] : self._offsets[sequence + 1]], dtype=np.int32)

    def counted(self, sequence: int) -> np.ndarray:
        """Whether each document token of a sequence is counted [t]."""
        return np.frombuffer(self._counted[self._offsets[sequence] : self._offsets[sequence + 1]], bool)

    def seen(self, vocabulary: int, at_least: int) -> np.ndarray:
        """Whether each token id occurs at least so often in the corpus [vocabulary]."""
        return np.bincount(np.array(self._ids, dtype=np.int32), minlength=vocabulary) >= at_least

    def holding(self, token: int) -> np.ndarray:
        """Sequences in which the token id stands, ascending."""
        at = np.flatnonzero(np.array(self._ids, dtype=np.int32) == token)
        return np.unique(np.searchsorted(self._offsets, at, side="right") - 1)

    def read(self, sequences: np.ndarray) -> Stretch:
        """The given sequences (sorted indices)."""
        lengths = [self._offsets[s + 1] - self._offsets[s] for s in sequences]
        bounds = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        x_base = torch.empty(int(bounds[-1]), self.d, dtype=self.dtype)
        x_adapted = torch.empty_like(x_base)
        sides = [x.view(torch.uint8).numpy().data for x in (x_base, x_adapted)]
        with self._lock:
            for begin, end, s in zip(bounds[:-1].tolist(), bounds[1:].tolist(), sequences.tolist(), strict=True):
                self._streams.seek(self._offsets[s] * self._token_bytes)
                for side in sides:
                    self._fill(side[begin:end].cast("B"))
        counted = bytearray().join(self._counted[self._offsets[s] : self._offsets[s + 1]] for s in sequences)
        return Stretch(x_base, x_adapted, np.frombuffer(counted, bool), np.asarray(sequences), bounds)

    def _fill(self, buffer: memoryview) -> None:
        """Reads until `buffer` is full."""
        while buffer:
            n = self._streams.readinto(buffer)
            if not n:
                raise AutointerpError("the temporary file of the residual stream was cut short: run it again")
            buffer = buffer[n:]

    def padded(self, sequences: Sequence[int], bos: np.ndarray) -> tuple[Tensor, Tensor]:
        """(ids, whether each position is counted), each [b, t], of these sequences as the models read them: `bos`, none
        or one, before each, and right-padded."""
        ids = right_padded([np.concatenate([bos, self.ids(s)]) for s in sequences])
        counted = torch.zeros_like(ids, dtype=torch.bool)
        for row, s in zip(counted, sequences, strict=True):
            mine = self.counted(s)
            row[len(bos) : len(bos) + len(mine)] = torch.from_numpy(mine)
        return ids, counted

    def stretches(self, tokens: int = 8192, which: np.ndarray | None = None) -> Iterator[Stretch]:
        """The whole spool, or the sequences `which` [len], in order, about `tokens` tokens at a time."""
        sequences = np.arange(len(self)) if which is None else np.flatnonzero(which)
        first = held = 0
        for at, s in enumerate(sequences.tolist(), start=1):
            held += self._offsets[s + 1] - self._offsets[s]
            if held >= tokens or at == len(sequences):
                yield self.read(sequences[first:at])
                first, held = at, 0

    def close(self) -> None:
        self._streams.close()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
