"""The weight changes of a PEFT adapter, from its files alone: LoRA and IA3, and modules saved whole beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.checkpoint_weights import differences
from autointerp.evidence.tensor_files import BaseWeights, Tensors
from autointerp.evidence.weight_change import INSTEAD, WeightChange, WeightChanges
from autointerp.evidence.wiring import stored_in_out

_PREFIX = "base_model.model."
_PART = re.compile(r"(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l)(\.weight)?$")


@dataclass(frozen=True)
class PeftFiles:
    """One adapter's files, taken apart."""

    folder: Path
    config: dict[str, Any]
    tensors: Tensors
    base: BaseWeights | None
    parts: dict[str, dict[str, str]]
    """Module → part (lora_A, …) → name of its tensor."""
    whole: dict[str, str]
    """Module saved whole → name of its weight."""
    other: list[str]
    """Names of biases, norms and whatever else there is."""

    def __str__(self) -> str:
        return f"adapter {self.folder}"

    @classmethod
    def open(cls, folder: Path, config: dict[str, Any], file: Path, base: BaseWeights | None) -> PeftFiles:
        """The names in `file`; no weight is read."""
        tensors = Tensors([file], "adapter")
        parts: dict[str, dict[str, str]] = {}
        whole, other = {}, []
        for name in tensors.names():
            if match := _PART.fullmatch(name):
                parts.setdefault(_bare(match[1]), {})[match[2]] = name
            elif name.endswith(".weight") and len(tensors.shape(name)) == 2:
                whole[_bare(name.removesuffix(".weight"))] = name
            else:
                other.append(name)
        return cls(folder, config, tensors, base, parts, whole, other)

    def read(self, module: str, part: str) -> Tensor:
        """One part of a module's adapter as float32. InputError where it is not there."""
        if part not in self.parts[module]:
            raise InputError(f"{self}: {module} has no {part}; save it again with PEFT's save_pretrained")
        return self.tensors.read(self.parts[module][part])

    def base_matrix(self, module: str, kind: str) -> Tensor:
        """W [out, in] of the base, which an adapter of this kind rescales. InputError where it is not on this
        machine."""
        W = None if self.base is None else self.base.matrix(module)
        if W is None:
            raise InputError(
                f"{self}: {kind} rescales the base's own weights: give --base a folder with them, or {INSTEAD}"
            )
        return W

    def misfit(self, module: str, reason: str) -> InputError:
        """That a module is not one of this base."""
        folder = self.base and self.base.folder
        return InputError(f"{self} does not fit base {folder} ({module}: {reason}); give --base its own")


def peft_changes(folder: Path, config: dict[str, Any], file: Path, base: BaseWeights | None) -> WeightChanges:
    """ΔW of every module that the adapter in `folder` changes, as PEFT merges it.

    InputError for other PEFT types, and for settings with which weights alone do not say what is added.
    """
    from autointerp.evidence import ia3_weights, lora_weights

    kinds = {"LORA": lora_weights, "IA3": ia3_weights}
    kind = config.get("peft_type")
    if kind not in kinds:
        raise InputError(f"adapter {folder}: {kind} has no weight change of its own to read from its files; {INSTEAD}")
    files = PeftFiles.open(folder, config, file, base)
    kinds[kind].check(files)

    def read() -> Iterator[WeightChange]:
        changes.left_out.update(_left_out(files))
        for module in files.parts:
            yield kinds[kind].change(files, module, changes.left_out)
        yield from _saved_whole(files, changes)

    modules = sorted({*files.parts, *files.whole})
    changes = WeightChanges(modules, read, low_rank=kind == "LORA")
    return changes


def _bare(module: str) -> str:
    """Its path in the Hugging Face model."""
    return module.removeprefix(_PREFIX).removesuffix(".base_layer")


def _saved_whole(files: PeftFiles, told: WeightChanges) -> Iterator[WeightChange]:
    base = files.base
    for module, name in files.whole.items():
        if base is None or (own := base.weight_name(module)) is None:
            told.left_out[f"{module} (saved whole; needs --base)"] += 1
            continue
        transposed = stored_in_out(base.config.model_type, module)
        yield from differences(files.tensors, name, base.tensors, own, module, transposed)


def _left_out(files: PeftFiles) -> Iterator[str]:
    """What each change that is not a weight matrix is called."""
    for name in files.other:
        if name.endswith("trainable_tokens_delta"):
            yield "trainable tokens"
            continue
        stored = files.tensors.read(name)
        own = None if files.base is None else files.base.weight(_bare(name).replace(".base_layer", ""))
        if (stored != own).any() if own is not None and own.shape == stored.shape else stored.any():
            yield "bias or norm"
