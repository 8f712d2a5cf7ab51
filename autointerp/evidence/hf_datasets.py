"""Corpora of the `datasets` library: saved to disk (random access) or on the hub (streamed)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from autointerp.errors import InputError
from autointerp.evidence.documents import (
    Document,
    Documents,
    DocumentSource,
    as_document,
    check_column,
    missing_column,
)

SHUFFLE_BUFFER = 2_000
"""Documents held to shuffle a stream."""


class SavedDataset(Documents):
    """A dataset that `datasets` saved to disk (memory-mapped by it)."""

    def __init__(self, path: Path, text_column: str):
        self.name = str(path)
        self.text_column = text_column
        try:
            loaded = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"corpus {path}: `datasets` cannot load it ({error}); save it again") from error
        table: Any = _only_split(self.name, loaded) if isinstance(loaded, datasets.DatasetDict) else loaded
        check_column(self.name, table.data.schema, text_column)
        self._table, self._rows = table, table.select_columns([text_column])

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> Document:
        return as_document(
            self._rows[int(index)][self.text_column], self.text_column, lambda: f"{self.name} row {index}"
        )

    def column(self, name: str) -> list[Any]:
        if name not in self._table.column_names:
            raise missing_column(self.name, name, self._table.column_names, "outcome-column")
        return list(self._table[name])


class Stream(DocumentSource):
    """Records that can only be read in order (a dataset on the hub), shuffled through a seeded buffer."""

    def __init__(self, name: str, records: Iterable[dict[str, Any]], text_column: str, buffer: int = SHUFFLE_BUFFER):
        self.name = name
        self.text_column = text_column
        self.buffer = buffer
        self._records = records

    def shuffled(self, seed: int) -> Iterator[tuple[int, Document]]:
        random, held = np.random.default_rng(seed), []
        for item in self._documents():
            if len(held) < self.buffer:
                held.append(item)
                continue
            slot = int(random.integers(self.buffer))
            item, held[slot] = held[slot], item
            yield item
        for slot in random.permutation(len(held)):
            yield held[slot]

    def _documents(self) -> Iterator[tuple[int, Document]]:
        try:
            for index, record in enumerate(self._records):
                if self.text_column not in record:
                    raise missing_column(self.name, self.text_column, record)
                yield (
                    index,
                    as_document(record[self.text_column], self.text_column, lambda at=index: f"{self.name} row {at}"),
                )
        except OSError as error:  # the network, or a file of the dataset
            raise InputError(f"corpus {self.name}: reading it from the hub failed ({error}); try again") from error


def _only_split(name: str, splits: Any) -> Any:
    if "train" in splits:
        return splits["train"]
    if len(splits) == 1:
        return next(iter(splits.values()))
    raise InputError(f"corpus {name}: no split 'train' among {', '.join(splits)}; save the one wanted by itself")


def open_hub(name: str, text_column: str) -> Stream:
    """The dataset `owner/name` or `owner/name:configuration` of the hub, streamed; InputError when it cannot be had."""
    repo, _, configuration = name.partition(":")
    try:
        splits = datasets.load_dataset(repo, configuration or None, streaming=True)
    except (OSError, ValueError) as error:
        hint = "give --corpus an existing path, or a hub id while online (owner/name or owner/name:configuration)"
        raise InputError(f"corpus {name}: no such path here, and the hub does not give it ({error}); {hint}") from error
    return Stream(name, _only_split(name, splits), text_column)
