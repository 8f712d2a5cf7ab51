"""The weight changes of a PEFT adapter, from its files alone: LoRA and IA3, and modules saved whole beside them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.checkpoint_weights import differences
from autointerp.evidence.tensor_files import BaseWeights, Tensors
from autointerp.evidence.weight_change import INSTEAD, WeightChange, WeightChanges, added_up
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


def peft_changes(several: Sequence[PeftFiles]) -> WeightChanges:
    """ΔW of every module that an adapter changes, or several that are active together, as PEFT merges them.

    InputError for other PEFT types, for settings with which weights alone do not say what is added, and for adapters
    whose changes do not add up.
    """
    from autointerp.evidence import ia3_weights, lora_weights

    kinds = {"LORA": lora_weights, "IA3": ia3_weights}
    kind = several[0].config.get("peft_type")
    if kind not in kinds:
        raise InputError(f"{several[0]}: {kind} has no weight change of its own to read from its files; {INSTEAD}")
    for files in several:
        kinds[kind].check(files)
    if len(several) > 1:
        _check_additive(several)

    def read() -> Iterator[WeightChange]:
        for files in several:
            changes.left_out.update(_left_out(files))
        for module in dict.fromkeys(module for files in several for module in files.parts):
            theirs = [files for files in several if module in files.parts]
            yield added_up([kinds[kind].change(files, module, changes.left_out) for files in theirs])
        for files in several:
            yield from _saved_whole(files, changes)

    modules = sorted({module for files in several for module in (*files.parts, *files.whole)})
    changes = WeightChanges(modules, read, low_rank=kind == "LORA")
    return changes


def _check_additive(several: Sequence[PeftFiles]) -> None:
    """InputError unless what several adapters do together is the sum of what each does alone."""
    for files in several:
        rescales = "IA3" if files.config.get("peft_type") == "IA3" else "DoRA" if files.config.get("use_dora") else None
        if rescales:
            raise InputError(f"{files}: {rescales} rescales what the other adapters add, too; {INSTEAD}")
    whole = Counter(module for files in several for module in files.whole.keys() - files.parts.keys())
    if twice := sorted(module for module, n in whole.items() if n > 1):
        raise InputError(
            f"{several[0]} and another that is to be active with it both hold a {twice[0]} of their own; give --adapter"
            " one of them"
        )


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
