"""The weight changes of a LoRA adapter, from its files alone: LoRA, rsLoRA, rank and alpha patterns, embeddings; DoRA
and modules saved whole where the base's weights are at hand."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.tensor_files import BaseWeights, Tensors
from autointerp.evidence.weight_change import WeightChange, WeightChanges

_PREFIX = "base_model.model."
_PARTS = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.weight)?$")
_UNREADABLE = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
)
"""Settings with which what is added is not B A x."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
INSTEAD = "use --selector change, which runs the models over a corpus"


@dataclass(frozen=True)
class _Lora:
    """One adapter's files, taken apart."""

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    parts: dict[str, dict[str, str]]
    """Module → part (lora_A, …) → name of its tensor."""
    whole: dict[str, str]
    """Module saved whole → name of its weight."""
    other: list[str]
    """Names of biases and of whatever else there is."""
    base: BaseWeights | None

    def __str__(self) -> str:
        return f"adapter {self.folder}"


def lora_changes(folder: Path, config: dict[str, Any], file: Path, base: BaseWeights | None) -> WeightChanges:
    """ΔW of every module of the LoRA in `folder`, as it is merged: s·B A, s = α/r, or α/√r with rslora; for DoRA
    m·(W + s·B A)/‖W + s·B A‖ − W, by rows (https://arxiv.org/abs/2402.09353).

    InputError for another PEFT type, and for settings with which weights alone do not say what is added.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"adapter {folder}: {kind} has no weight change of its own to read from its files; {INSTEAD}")
    start = config.get("init_lora_weights")
    odd = next((key for key in _UNREADABLE if config.get(key)), None)
    if odd or (isinstance(start, str) and start.lower().startswith(_REWRITES_BASE)):
        setting = odd or f"init_lora_weights={start}"
        raise InputError(f"adapter {folder}: with {setting}, B A is not what was changed; {INSTEAD}")
    lora = _taken_apart(folder, config, Tensors([file], "adapter"), base)
    if not lora.parts and not lora.whole:
        raise InputError(f"adapter {folder}: holds no lora_A and lora_B; save it again with PEFT's save_pretrained")
    changes = WeightChanges(sorted({*lora.parts, *lora.whole}), lambda: _changes(lora, changes), low_rank=True)
    return changes


def _taken_apart(folder: Path, config: dict[str, Any], tensors: Tensors, base: BaseWeights | None) -> _Lora:
    parts: dict[str, dict[str, str]] = {}
    whole, other = {}, []
    for name in tensors.names():
        if match := _PARTS.fullmatch(name):
            parts.setdefault(match[1].removeprefix(_PREFIX).removesuffix(".base_layer"), {})[match[2]] = name
        elif name.endswith(".weight") and len(tensors.shape(name)) == 2:
            whole[name.removesuffix(".weight").removeprefix(_PREFIX)] = name
        else:
            other.append(name)
    return _Lora(folder, config, tensors, parts, whole, other, base)


def _changes(lora: _Lora, told: WeightChanges) -> Iterator[WeightChange]:
    told.left_out.update("bias or norm" for name in lora.other if lora.tensors.read(name).any())
    for module, parts in lora.parts.items():
        yield _lora_change(lora, module, parts)
    for module, name in lora.whole.items():
        if lora.base is None or (found := lora.base.tensors.find(f"{module}.weight")) is None:
            told.left_out[f"{module} (saved whole; needs --base)"] += 1
            continue
        yield from differences(lora.tensors, name, lora.base.tensors, found, module, transposed=False)


def _lora_change(lora: _Lora, module: str, parts: dict[str, str]) -> WeightChange:
    embedding = "lora_embedding_A" in parts
    keys = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")
    if missing := [key for key in keys if key not in parts]:
        raise InputError(f"{lora}: {module} has no {missing[0]}; save it again with PEFT's save_pretrained")
    B, A = (lora.tensors.read(parts[key]) for key in keys)
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise InputError(
            f"{lora}: {module} has lora_B {list(B.shape)} and lora_A {list(A.shape)}, which do not fit each other;"
            " save it again with PEFT's save_pretrained"
        )
    left = B * _scale(lora.config, module, A.shape[0])
    if "lora_magnitude_vector" not in parts:
        return WeightChange(module, left, A, A.shape[1] if embedding else 1)
    magnitude = lora.tensors.read(parts["lora_magnitude_vector"]).flatten()
    dense = _dora(lora, module, left @ A, magnitude, embedding)
    return WeightChange(module, dense, None, A.shape[1] if embedding else 1)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """s, with the module's own alpha where a pattern of the config names it (as PEFT matches patterns)."""
    pattern = config.get("alpha_pattern") or {}
    own = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(pattern[own] if own is not None else config.get("lora_alpha", rank))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _dora(lora: _Lora, module: str, added: Tensor, magnitude: Tensor, embedding: bool) -> Tensor:
    """ΔW [out, in] of a DoRA module, which rescales every row of the base's own matrix."""
    base = None if lora.base is None else lora.base.weight(f"{module}.weight")
    if base is None:
        raise InputError(f"{lora}: DoRA rescales the base's own weights: give --base a folder with them, or {INSTEAD}")
    W = base.T if embedding or lora.config.get("fan_in_fan_out") else base
    if W.shape != added.shape:
        raise InputError(f"{lora} does not fit base {lora.base and lora.base.folder} ({module}); give --base its own")
    merged = W + added
    norms = merged.norm(dim=1)
    if len(magnitude) != len(norms):
        raise InputError(f"{lora}: {module} has {len(magnitude)} magnitudes for {len(norms)} rows; save it again")
    return merged * (magnitude / norms)[:, None] - W


def differences(
    theirs: Tensors, name: str, ours: Tensors, own_name: str, module: str, transposed: bool
) -> Iterator[WeightChange]:
    """ΔW of a matrix that is stored whole on both sides, in blocks of rows: never both matrices at once where they are
    large. `transposed`: stored [in, out]. An embedding's rows are its inputs.

    InputError for other shapes, save for rows that were added to a vocabulary: those have no counterpart.
    """
    from autointerp.evidence.wiring import EMBEDDINGS, UNEMBEDDINGS

    shape, own = theirs.shape(name), ours.shape(own_name)
    leaf = module.rpartition(".")[2]
    if shape != own and (leaf not in EMBEDDINGS + UNEMBEDDINGS or shape[1:] != own[1:]):
        raise InputError(
            f"{theirs.option}: {name} has shape {list(shape)}, in the base {list(own)}: give --base the model it came"
            " from"
        )
    # A block of an embedding's or unembedding's rows is a change in itself; other matrices are needed whole.
    by_rows = leaf in EMBEDDINGS + UNEMBEDDINGS
    for rows in theirs.blocks(name) if by_rows else [slice(None)]:
        new, old = theirs.read(name, rows), ours.read(own_name, rows)
        change = new[: len(old)].sub_(old[: len(new)])
        if not torch.any(change):
            continue
        if leaf in EMBEDDINGS:
            yield WeightChange(module, change.T, None, own[0])
        else:
            yield WeightChange(module, change.T if transposed else change)
