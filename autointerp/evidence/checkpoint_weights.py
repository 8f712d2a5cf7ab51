"""The weight changes of a full or merged checkpoint: its matrices minus the base's, streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from autointerp.errors import InputError
from autointerp.evidence.lora_weights import INSTEAD, differences
from autointerp.evidence.tensor_files import BaseWeights, Tensors
from autointerp.evidence.weight_change import WeightChange, WeightChanges
from autointerp.evidence.weight_files import read_json
from autointerp.evidence.wiring import CONV1D


def checkpoint_changes(folder: Path, files: Sequence[Path], base: BaseWeights | None) -> WeightChanges:
    """ΔW = W_adapted − W_base of every matrix of the checkpoint in `folder` whose weights differ.

    One matrix of each side is in memory at a time (a block of it, for vocabularies). InputError where the base is not
    here, and for another architecture.
    """
    if base is None:
        raise InputError(
            f"adapter {folder} is a whole model: its change is its difference from the base, which is not on this"
            f" machine; give --base a folder, or {INSTEAD}"
        )
    kinds = [read_json(at / "config.json", "base").get("model_type") for at in (folder, base.folder)]
    if kinds[0] != kinds[1]:
        raise InputError(
            f"adapter {folder} is a {kinds[0]}, base {base.folder} a {kinds[1]}: give --base the one it came from"
        )
    theirs, ours = Tensors(files, f"adapter {folder}:"), base.tensors
    pairs = _paired(theirs, ours)
    if not pairs:
        raise InputError(
            f"adapter {folder}: no weight of it is in base {base.folder}; give --base the one it came from"
        )
    matrices = {name: own for name, own in pairs.items() if len(theirs.shape(name)) == 2 and name.endswith(".weight")}
    transposed = kinds[0] in CONV1D

    def read() -> Iterator[WeightChange]:
        for name in pairs.keys() - matrices.keys():
            changed = (
                theirs.shape(name) != ours.shape(pairs[name]) or (theirs.read(name) != ours.read(pairs[name])).any()
            )
            changes.left_out["bias or norm"] += bool(changed)
        for name, own in matrices.items():
            module = _full(name, own).removesuffix(".weight")
            yield from differences(theirs, name, ours, own, module, transposed)

    changes = WeightChanges([_full(name, own).removesuffix(".weight") for name, own in matrices.items()], read)
    return changes


def _paired(theirs: Tensors, ours: Tensors) -> dict[str, str]:
    """Names of the checkpoint's tensors → of the same tensors in the base."""
    return {name: own for name in theirs.names() if (own := ours.find(name)) is not None}


def _full(name: str, own: str) -> str:
    """The longer of a tensor's two names: modules are named from the top of the whole model."""
    return max(name, own, key=len)
