"""One column of a parquet file by row, holding only a few row groups at a time."""

from __future__ import annotations

import bisect
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from autointerp.errors import InputError
from autointerp.evidence.documents import Document, Documents, as_document, check_column, missing_column

HELD_BYTES = 64 << 20
"""Row groups held in memory; one that is larger by itself is decoded once into a temporary file and mapped."""


class Parquet(Documents):
    """Documents of the column `text_column`; InputError for a file that is no parquet or has no such column."""

    def __init__(self, path: Path, text_column: str):
        self.name = str(path)
        self.path = path
        self.text_column = text_column
        try:
            with pq.ParquetFile(path) as file:
                check_column(self.name, file.schema_arrow, text_column)
                groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(path, error) from error
        self._ends = np.cumsum([group.num_rows for group in groups]).tolist()
        self._bytes = [_column_bytes(group, text_column) for group in groups]
        self._held: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._spilled: dict[int, tuple[pa.ChunkedArray, Any]] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, index: int) -> Document:
        group = bisect.bisect_right(self._ends, index)
        row = index - (self._ends[group - 1] if group else 0)
        value = self._column(group)[row].as_py()
        return as_document(value, self.text_column, lambda: f"{self.path} row {index}")

    def column(self, name: str) -> list[Any]:
        try:
            with pq.ParquetFile(self.path) as file:
                if name not in file.schema_arrow.names:
                    raise missing_column(self.name, name, file.schema_arrow.names, "outcome-column")
                return file.read(columns=[name]).column(0).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(self.path, error) from error

    def _column(self, group: int) -> pa.ChunkedArray:
        try:
            if self._bytes[group] > HELD_BYTES:
                if group not in self._spilled:
                    self._spilled[group] = self._spill(group)
                return self._spilled[group][0]
            if group not in self._held:
                with pq.ParquetFile(self.path) as file:
                    self._held[group] = file.read_row_group(group, columns=[self.text_column]).column(0)
        except (pa.ArrowException, OSError) as error:
            raise _corrupt(self.path, error) from error
        self._held.move_to_end(group)
        while len(self._held) > 1 and sum(column.nbytes for column in self._held.values()) > HELD_BYTES:
            self._held.popitem(last=False)
        return self._held[group]

    def _spill(self, group: int) -> tuple[pa.ChunkedArray, Any]:
        """The column of a row group too large to hold, as a memory-mapped Arrow file, and what keeps that file."""
        kept = tempfile.NamedTemporaryFile(prefix="autointerp-", suffix=".arrow")  # noqa: SIM115, goes with this object
        # buffer_size makes pyarrow stream the pages of the row group rather than read it whole.
        with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
            schema = pa.schema([file.schema_arrow.field(self.text_column)])
            with pa.OSFile(kept.name, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
                for batch in file.iter_batches(batch_size=512, row_groups=[group], columns=[self.text_column]):
                    writer.write_batch(batch.cast(schema))
        mapped = pa.memory_map(kept.name)
        return pa.ipc.open_file(mapped).read_all().column(0), (mapped, kept)


def _column_bytes(group: Any, column: str) -> int:
    """Uncompressed bytes of `column` in a row group; the leaves of a nested column start with its name and a dot."""
    leaves = (group.column(i) for i in range(group.num_columns))
    return sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema.split(".")[0] == column)


def _corrupt(path: Path, error: Exception) -> InputError:
    return InputError(f"corpus {path}: not a readable parquet file ({error}); write it again")
