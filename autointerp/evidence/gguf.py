"""Control vectors in GGUF files, as repeng and llama.cpp write them: metadata and unquantised tensors, no more.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autointerp.errors import InputError

ARCHITECTURE = "controlvector"
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: "<f4", 1: "<f2", 28: "<f8", 30: "<u2"}
_BF16 = 30


@dataclass(frozen=True)
class ControlVector:
    """Directions by layer; each is added to the output of that block."""

    model_hint: str
    """The `model_type` that it was made for."""
    directions: dict[int, np.ndarray]
    """[d], float32."""


def read_control_vector(file: Path) -> ControlVector:
    """The control vector in a GGUF file; InputError, in one line, for any other content."""
    name = f"adapter {file}"
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise InputError(f"{name}: is no GGUF file; export it again with export_gguf")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return _read(_Cursor(content, 4), name)
            except (struct.error, ValueError, OverflowError) as error:
                raise InputError(f"{name}: damaged or cut short ({error}); export it again with export_gguf") from error


class _Cursor:
    """Reads values one after the other; struct.error or ValueError beyond the end."""

    def __init__(self, content: mmap.mmap, at: int):
        self.content, self.at = content, at

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.at)
        self.at += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode()

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.content):
            raise ValueError(f"{size} bytes at {self.at}, the file has {len(self.content)}")
        taken = self.content[self.at : end]
        self.at = end
        return taken

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, n = self.scalar("I"), self.scalar("Q")
            if n > len(self.content) - self.at:
                raise ValueError(f"an array of {n} values")
            return [self.value(kind) for _ in range(n)]
        if kind not in _SCALARS:
            raise ValueError(f"a value of type {kind}")
        return self.scalar(_SCALARS[kind])


def _read(cursor: _Cursor, name: str) -> ControlVector:
    version, n_tensors, n_values = cursor.scalar("I"), cursor.scalar("Q"), cursor.scalar("Q")
    if version not in (2, 3):
        raise InputError(f"{name}: GGUF version {version}, or big-endian; export it again with export_gguf")
    metadata: dict[str, Any] = {}
    for _ in range(n_values):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("I"))
        if metadata.get("general.architecture", ARCHITECTURE) != ARCHITECTURE:
            kind = metadata["general.architecture"]
            raise InputError(f"{name}: a {kind} model, not a control vector; give the base with --base, unquantised")
    places: dict[str, tuple[tuple[int, ...], int, int]] = {}
    for _ in range(n_tensors):
        key, n_axes = cursor.string(), cursor.scalar("I")
        shape = tuple(cursor.scalar("Q") for _ in range(min(n_axes, 5)))
        places[key] = (shape, cursor.scalar("I"), cursor.scalar("Q"))
    hint = metadata.get(f"{ARCHITECTURE}.model_hint")
    if not isinstance(hint, str):
        raise InputError(f"{name}: no {ARCHITECTURE}.model_hint in it; export it again with export_gguf")
    alignment = metadata.get("general.alignment", 32)
    start = -(-cursor.at // alignment) * alignment
    directions = {}
    for key, (shape, kind, offset) in places.items():
        word, _, layer = key.partition(".")
        if word == "direction":
            if not layer.isdecimal():
                raise InputError(f"{name}: {key} names no layer; want direction.LAYER")
            directions[int(layer)] = _tensor(_Cursor(cursor.content, start + offset), shape, kind, f"{name}: {key}")
    if not directions:
        raise InputError(f"{name}: no direction.LAYER in it; export it again with export_gguf")
    return ControlVector(hint, directions)


def _tensor(cursor: _Cursor, shape: tuple[int, ...], kind: int, name: str) -> np.ndarray:
    if kind not in _DTYPES:
        raise InputError(f"{name} is quantised (ggml type {kind}); export it as float32")
    width = max(shape, default=0)
    if int(np.prod(shape)) != width:
        raise InputError(f"{name} has shape {list(shape[::-1])}; want one vector")
    dtype = np.dtype(_DTYPES[kind])
    raw = np.frombuffer(cursor.take(width * dtype.itemsize), dtype)
    return (raw.astype("<u4") << 16).view("<f4") if kind == _BF16 else raw.astype(np.float32)
