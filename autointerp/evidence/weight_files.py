"""Files of configs and weights, checked without torch: to find a run again, nothing heavy need be loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from autointerp.errors import InputError

_EXPONENT = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F80_0000),
    "F64": ("<u8", 0x7FF0_0000_0000_0000),
}
"""Bits of the exponent; all of them are set in NaN and infinity, and in nothing else."""

_SAMPLE = 1 << 16


def read_json(file: Path, option: str) -> dict[str, Any]:
    """The object in a JSON file; InputError where it is damaged or something else. Messages call it `option`."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{option} {file}: not readable JSON ({first_line(error)}); save it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{option} {file}: a {type(content).__name__}, want an object; save it again")
    return content


def check_header(file: Path, option: str) -> None:
    """InputError unless `file` is a whole safetensors file; reads its header only."""
    try:
        with safe_open(file, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(f"{option} {file}: damaged ({first_line(error)}); copy or save it again") from error


def check_finite_file(file: Path, name: str) -> None:
    """InputError naming the first tensor of a safetensors file that holds NaN or infinity. `check_header` it first."""
    with file.open("rb") as content:
        size = int.from_bytes(content.read(8), "little")
        for key, entry in json.loads(content.read(size)).items():
            if key == "__metadata__" or entry["dtype"] not in _EXPONENT:
                continue
            kind, exponent = _EXPONENT[entry["dtype"]]
            begin, end = entry["data_offsets"]
            content.seek(8 + size + begin)
            bits = np.frombuffer(content.read(end - begin), kind)
            if ((bits & bits.dtype.type(exponent)) == exponent).any():
                raise not_finite(name, key)


def samples(file: Path) -> Iterator[bytes]:
    """The first, middle and last 64 KiB of a file: all of a small one, and of a large one what is cheaply read."""
    size = file.stat().st_size
    with file.open("rb") as content:
        for start in sorted({0, max(0, size // 2 - _SAMPLE // 2), max(0, size - _SAMPLE)}):
            content.seek(start)
            yield content.read(_SAMPLE)


def not_finite(name: str, key: str) -> InputError:
    """The error for a tensor `key` with NaN or infinity in it."""
    return InputError(f"{name}: {key} holds NaN or infinite weights; save it again from a run that converged")


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line and cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0][:200] if lines else type(error).__name__}".rstrip(".:")
