"""Reading the files of a dictionary: safely, and with one line for whatever is missing, misshapen or not finite."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import check_finite

MEND = "copy or save it again"


def first_words(error: Exception, limit: int = 240) -> str:
    """The error on one line, cut: libraries write paragraphs."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= limit else line[:limit] + " …"


def read_config(path: Path, name: str) -> dict[str, Any]:
    """The mapping in a .json or .yaml file; `name` opens the error, e.g. `SAE out/sae`."""
    try:
        text = path.read_text()
        content = yaml.safe_load(text) if path.suffix in (".yaml", ".yml") else json.loads(text)
    except FileNotFoundError as error:
        raise InputError(f"{name}: no {path.name} beside its weights; {MEND}") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        kind = "YAML" if path.suffix in (".yaml", ".yml") else "JSON"
        raise InputError(f"{name}: {path.name} is not readable {kind} ({first_words(error)}); {MEND}") from error
    if not isinstance(content, dict):
        raise InputError(f"{name}: {path.name} holds a {type(content).__name__}, want keys and values; {MEND}")
    return content


def config_value(config: Mapping[str, Any], key: str, kind: type, name: str) -> Any:
    """`config[key]`, or what stands at `outer.inner`; InputError unless it is of that kind."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        found = "has no" if value is None else f"has {value!r} for"
        raise InputError(f"{name}: its config {found} {key}, want a {kind.__name__}; give another --sae")
    return value


def read_safetensors(path: Path, name: str) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, on the CPU."""
    _must_exist(path, name)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{name}: {path.name} is corrupt ({first_words(error)}); {MEND}") from error


def read_npz(path: Path, name: str) -> dict[str, Tensor]:
    """All arrays of a .npz file, on the CPU; arrays of Python objects, which would be unpickled, are refused."""
    _must_exist(path, name)
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: torch.from_numpy(np.ascontiguousarray(arrays[key])) for key in arrays.files}
    except (ValueError, OSError, EOFError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{name}: {path.name} is corrupt, or no .npz of numbers ({first_words(error)}); {MEND}"
        ) from error


def read_pickle(path: Path, name: str, stand_ins: Sequence[tuple[Any, str]] = ()) -> Any:
    """What torch.save wrote, read by torch's restricted unpickler: tensors and plain containers, on the CPU.

    stand_ins: (class, qualified name) for the classes that a format pickles: an inert one is made in their place, and
    no foreign code is imported or run. InputError for whatever else the file asks to import.
    """
    _must_exist(path, name)
    try:
        with torch.serialization.safe_globals(list(stand_ins)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{name}: {path.name} is {_why_refused(error)}") from error
    except Exception as error:  # whatever damaged bytes lead the unpickler into: struct.error, AssertionError, …
        raise InputError(f"{name}: {path.name} is corrupt ({first_words(error)}); {MEND}") from error


def read_state(path: Path, name: str) -> dict[str, Tensor]:
    """The state dict that torch.save wrote."""
    state = read_pickle(path, name)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{name}: {path.name} holds no state dict of tensors; give --sae the weights themselves")
    return dict(state)


def take(
    name: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """The tensors named in `shapes`, checked; and the size of each axis.

    shapes: axes by name, e.g. {"encoder.weight": "m d", "encoder.bias": "m", "k": ""}; an axis has one size everywhere.
    InputError for what is missing, has other axes, holds NaN or infinity, or is a matrix of zeros.
    """
    missing = [key for key in shapes if key not in tensors]
    if missing:
        raise InputError(f"{name}: its weights lack {', '.join(missing)}; {MEND}, or give another --sae")
    sizes: dict[str, int] = {}
    for key, axes in shapes.items():
        shape, wanted = tensors[key].shape, axes.split()
        fits = len(shape) == len(wanted)
        if not fits or any(sizes.setdefault(axis, n) != n for axis, n in zip(wanted, shape, strict=True)):
            want = [sizes.get(axis, axis) for axis in wanted]
            raise InputError(f"{name}: {key} has shape {list(shape)}, want {str(want).replace(chr(39), '')}; {MEND}")
    taken = {key: tensors[key] for key in shapes}
    check_finite(name, taken)
    return taken, sizes


def _must_exist(path: Path, name: str) -> None:
    if not path.is_file():
        raise InputError(f"{name}: no {path.name} in it; {MEND}, or give another --sae")


def _why_refused(error: pickle.UnpicklingError) -> str:
    line = first_words(error, 4000)
    if asked := re.search(r"(?:GLOBAL|Unsupported class) (\S+)", line):
        return f"a pickle that asks for {asked[1]}, which is not read for safety's sake; save a plain state dict"
    reason = line.partition("WeightsUnpickler error: ")[2].partition(" Check the doc")[0]
    return f"corrupt, or no file of tensors ({reason or line[:120]}); {MEND}"
