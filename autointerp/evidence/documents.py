"""Documents of a corpus by index, opened without reading them all: a class per kind of file, `open_corpus` to pick it.

A document is a string, or a list of chat messages (`role` and `content`). Nothing here imports torch.
"""

from __future__ import annotations

import bisect
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.errors import InputError

Messages = list[dict[str, str]]
Document = str | Messages

READ_AHEAD = 32
"""Documents read together from a corpus with random access, in file order."""
SCAN_BYTES = 1 << 24

_HUB_ID = re.compile(r"^[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?$")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class DocumentSource(ABC):
    """Whatever can hand out its documents in a seeded shuffled order."""

    name: str
    """How the user called it; error messages name it."""

    @property
    def n_documents(self) -> int | None:
        """None where it is known only at the end."""
        return None

    @abstractmethod
    def shuffled(self, seed: int) -> Iterator[tuple[int, Document]]:
        """(index in corpus order, document) of every document once, in an order that depends on `seed` alone."""

    def column(self, name: str) -> list[Any]:
        """The value that each document has in another column, in corpus order; InputError where there are no such."""
        raise InputError(
            f"corpus {self.name}: no other columns can be read here; --outcome-column needs .jsonl, .parquet or a saved"
            " dataset"
        )


class Documents(DocumentSource):
    """Documents with random access."""

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    def n_documents(self) -> int | None:
        return len(self)

    @abstractmethod
    def read(self, index: int) -> Document:
        """Document `index`, 0-based in corpus order; InputError when what is stored there is no document."""

    def read_many(self, indices: Sequence[int]) -> list[Document]:
        """Documents in the order of `indices`, read in file order."""
        found = {index: self.read(index) for index in sorted(indices)}
        return [found[index] for index in indices]

    def shuffled(self, seed: int) -> Iterator[tuple[int, Document]]:
        order = np.random.default_rng(seed).permutation(len(self))
        for at in range(0, len(order), READ_AHEAD):
            indices = order[at : at + READ_AHEAD].tolist()
            yield from zip(indices, self.read_many(indices), strict=True)


class JsonLines(Documents):
    """One JSON object per line; keeps 8 bytes per document, where its line starts. Blank lines are no documents."""

    def __init__(self, path: Path, text_column: str):
        self.name = str(path)
        self.path = path
        self.text_column = text_column
        self._starts = _line_starts(path)
        if len(self):
            self.read(0)  # a missing column is seen here, before anything heavy is loaded

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, index: int) -> Document:
        record = self._record(index)
        if record is None:
            return ""
        if self.text_column not in record:
            raise missing_column(self._where(index), self.text_column, record)
        return as_document(record[self.text_column], self.text_column, lambda: self._where(index))

    def column(self, name: str) -> list[Any]:
        records = [self._record(index) or {} for index in range(len(self))]
        if not any(name in record for record in records):
            raise missing_column(self.name, name, records[0], "outcome-column")
        return [record.get(name) for record in records]

    def _record(self, index: int) -> dict[str, Any] | None:
        """The object in line `index`; None where the line is blank."""
        with self.path.open("rb") as file:
            file.seek(int(self._starts[index]))
            line = file.readline()
        if line.isspace():
            return None
        try:
            record = json.loads(line)
        except ValueError as error:
            raise InputError(f"corpus {self._where(index)}: not a line of JSON ({error}); mend or remove it") from error
        if not isinstance(record, dict):
            raise InputError(
                f"corpus {self._where(index)}: a {type(record).__name__}, want an object with the text in it"
            )
        return record

    def _where(self, index: int) -> str:
        with self.path.open("rb") as file:
            left, line = int(self._starts[index]), 1
            while left > 0:
                block = file.read(min(left, SCAN_BYTES))
                left -= len(block)
                line += block.count(b"\n")
        return f"{self.path}:{line}"


class TextFile(Documents):
    """One .txt file is one document. Read as UTF-8; bytes that are not become U+FFFD."""

    def __init__(self, path: Path):
        self.name = str(path)
        self.path = path

    def __len__(self) -> int:
        return 1

    def read(self, index: int) -> Document:
        return self.path.read_bytes().decode("utf-8", errors="replace")


class Folder(Documents):
    """Several files, one after the other."""

    def __init__(self, name: str, parts: Sequence[Documents]):
        self.name = name
        self.parts = list(parts)
        self._ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, index: int) -> Document:
        part = bisect.bisect_right(self._ends, index)
        return self.parts[part].read(index - (self._ends[part - 1] if part else 0))

    def column(self, name: str) -> list[Any]:
        return [value for part in self.parts for value in part.column(name)]


def open_corpus(path: str | Path, text_column: str = "text") -> DocumentSource:
    """The documents at `path`: .jsonl, .parquet, .txt, a folder of them, a saved `datasets` dataset, or a hub id.

    A folder is read recursively in sorted order; files of other kinds in it are left out. A hub id is `owner/name`, or
    `owner/name:configuration` for a dataset with several. InputError, in one line, for what cannot be a corpus.
    """
    local = Path(path).expanduser()
    if not local.exists():
        if is_hub_id(str(path)):
            from autointerp.evidence.hf_datasets import open_hub  # datasets, only where it is needed

            return open_hub(str(path), text_column)
        raise InputError(
            f"corpus {path}: no such file or folder; give --corpus an existing one, or a hub id (owner/name)"
        )
    if local.is_dir() and _is_saved_dataset(local):
        from autointerp.evidence.hf_datasets import SavedDataset

        documents: Documents = SavedDataset(local, text_column)
    elif local.is_dir():
        documents = Folder(str(path), [_OPENERS[file.suffix](file, text_column) for file in corpus_files(local)])
    else:
        documents = _OPENERS[corpus_files(local)[0].suffix](local, text_column)
    if len(documents) == 0:
        raise InputError(f"corpus {path} is empty: it holds no document")
    return documents


def corpus_files(path: Path) -> list[Path]:
    """The files that make up the local corpus `path`, sorted; InputError when there are none of a kind we read."""
    known = ", ".join(sorted(_OPENERS))
    if path.is_file():
        if path.suffix not in _OPENERS:
            raise InputError(
                f"corpus {path}: cannot read {path.suffix or 'a file without extension'}; give one of {known}"
            )
        return [path]
    if _is_saved_dataset(path):
        return sorted(file for file in path.rglob("*") if file.is_file())
    files = sorted(file for file in path.rglob("*") if file.suffix in _OPENERS and not file.name.startswith("."))
    if not files:
        raise InputError(f"corpus {path} is empty: the folder holds no {known} file")
    return files


def is_hub_id(name: str) -> bool:
    """Whether `name` has the shape owner/name or owner/name:configuration, and no extension of ours."""
    return bool(_HUB_ID.match(name)) and Path(name).suffix not in _OPENERS


def as_document(value: Any, column: str, where: Callable[[], str]) -> Document:
    """`value` of the text column as a document: null is an empty one; `from`/`value` become `role`/`content`."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        kind = type(value).__name__
        raise InputError(f"corpus {where()}: column {column!r} is of type {kind}, want text or a list of role/content")
    return [_message(message, column, where) for message in value]


def check_column(name: str, schema: Any, column: str) -> None:
    """InputError unless the Arrow `schema` has `column` and it can hold text or chat messages."""
    import pyarrow.types as types

    if column not in schema.names:
        raise missing_column(name, column, schema.names)
    kind = schema.field(column).type
    text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    chat = (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)
    if not text and not chat:
        raise InputError(f"corpus {name}: column {column!r} is of type {kind}, want text or a list of role/content")


def _message(message: dict[str, Any], column: str, where: Callable[[], str]) -> dict[str, str]:
    if isinstance(message.get("role"), str) and isinstance(message.get("content"), str):
        return {"role": message["role"], "content": message["content"]}
    role = _ROLES.get(str(message.get("from")))
    if role is None or not isinstance(message.get("value"), str):
        raise InputError(
            f"corpus {where()}: a message of {column!r} has {', '.join(map(str, message)) or 'nothing'},"
            " want role and content as text"
        )
    return {"role": role, "content": message["value"]}


def missing_column(where: str, column: str, columns: Iterable[str], option: str = "text-column") -> InputError:
    """The error for a corpus without the column that `option` names, naming those that it has."""
    return InputError(f"corpus {where}: no column {column!r}; give --{option} one of {', '.join(map(str, columns))}")


def _line_starts(path: Path) -> np.ndarray:
    """Byte offsets [n] of the lines that are not blank, in one buffered pass."""
    found, offset, start = [], 0, 0
    with path.open("rb") as file:
        while block := file.read(SCAN_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == 10) + offset
            starts = np.concatenate([[start], ends + 1])
            # A record is at least {} and its line break; "\n" and "\r\n" are blank lines.
            found.append(starts[:-1][ends - starts[:-1] >= 2])
            start, offset = int(starts[-1]), offset + len(block)
    if offset - start >= 2:
        found.append(np.array([start]))
    return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)


def _is_saved_dataset(path: Path) -> bool:
    return path.is_dir() and any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_parquet(path: Path, text_column: str) -> Documents:
    from autointerp.evidence.parquet import Parquet  # pyarrow only where there is a .parquet

    return Parquet(path, text_column)


_OPENERS: dict[str, Callable[[Path, str], Documents]] = {
    ".jsonl": JsonLines,
    ".parquet": _open_parquet,
    ".txt": lambda path, _column: TextFile(path),
}
