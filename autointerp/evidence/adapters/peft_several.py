"""Several PEFT adapters that are active together, as after `set_adapter([…])`: the named ones that PEFT saved into one
folder, or folders given one by one."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, AdapterFormat, Member, View, local_folder, separate
from autointerp.evidence.adapters.peft import (
    CONFIG,
    REFERENCES,
    PeftFormat,
    load_active,
    load_active_onto,
    peft_files,
    without_reference,
)

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from autointerp.evidence.model_pair import ModelPair
    from autointerp.evidence.tensor_files import BaseWeights
    from autointerp.evidence.weight_change import WeightChanges

_CARD = "README.md"
"""What PEFT writes once into the folder that it saves into, above the adapters that have names."""
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_PEFT = PeftFormat()


class SeveralPeftFormat(AdapterFormat):
    """`NAME/adapter_config.json` and its weights for each of two or more; that of `default` lies in the folder itself.

    An adapter beneath with a model card of its own was saved by itself, as those of other trainings are, and is not
    one of them; nor are a trainer's checkpoints, nor the reference of a preference training, which may leave a single
    one.
    """

    name = "peft-several"
    several = True

    def matches(self, path: Path) -> bool:
        folders = _saved_together(path)
        named = folders not in ([], [path]) and (len(folders) > 1 or without_reference(path) is not None)
        return named and not (path / "config.json").is_file()

    def files(self, path: Path) -> list[Path]:
        return [file for folder in _folders(path) for file in _PEFT.files(folder)]

    def check(self, path: Path) -> None:
        kinds: dict[str, Path] = {}
        for folder in _folders(path):
            _PEFT.check(folder)
            kinds.setdefault(_said(folder, "peft_type"), folder)
        if len(kinds) > 1:
            (one, first), (other, second), *_ = kinds.items()
            raise InputError(
                f"adapter {first} is of PEFT type {one}, {second} of {other}: only adapters of one type can be active"
                " together; give --adapter one of them"
            )

    def base_of(self, spec: str | Path) -> str | None:
        """InputError where they name different ones."""
        folders = _folders(spec)
        named = {base: folder for folder in reversed(folders) if (base := _PEFT.base_of(folder)) is not None}
        if len(named) > 1:
            (one, first), (other, second), *_ = sorted(named.items(), key=lambda item: folders.index(item[1]))
            raise InputError(
                f"adapter {first} names base {one}, {second} names {other}: if those are one model, give it with"
                " --base; else give --adapter one of them"
            )
        return next(iter(named), None)

    def assumed(self, spec: str | Path) -> str | None:
        if len(separate(spec)) > 1:
            return None  # whoever named them said so
        *names, last = (name for name, _ in _named(spec))
        active = f"{', '.join(names)} and {last} are taken as active together; --adapter takes one of them"
        left_out = without_reference(local_folder(spec))
        return "; ".join(said for said in (active if names else None, left_out) if said)

    def members(self, spec: str | Path) -> list[Member]:
        named = _named(spec)
        return [Member(name, str(folder), _PEFT.sha256(folder)) for name, folder in named] if named[1:] else []

    def sha256(self, spec: str | Path) -> str:
        """Over the hashes of the adapters in their order: the same for one folder and for its parts one by one."""
        hashes = [_PEFT.sha256(folder) for folder in _folders(spec)]
        return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes[1:] else hashes[0]

    def load(self, spec: str | Path, base: str, *, dtype: str | torch.dtype, device: str | torch.device) -> ModelPair:
        return load_active(_folders(spec), base, dtype=dtype, device=device)

    def load_onto(self, spec: str | Path, base: str, view: View, model: PreTrainedModel) -> ModelPair:
        return load_active_onto(_folders(spec), base, model)

    def weight_changes(self, spec: str | Path, base: BaseWeights | None) -> WeightChanges:
        from autointerp.evidence.peft_weights import peft_changes

        return peft_changes([peft_files(folder, base) for folder in _folders(spec)])


def _folders(spec: str | Path) -> list[Path]:
    """Of the adapters, in the order in which they act. InputError for a part that is no PEFT adapter."""
    parts = separate(spec)
    if len(parts) == 1:
        return _saved_together(local_folder(spec))
    folders = [local_folder(part) for part in parts]
    for folder in folders:
        _check_one(folder)
    return folders


def _named(spec: str | Path) -> list[tuple[str, Path]]:
    """`_folders`, and what their adapters are called."""
    above = None if len(separate(spec)) > 1 else local_folder(spec)
    return [("default" if folder == above else folder.name, folder) for folder in _folders(spec)]


def _saved_together(folder: Path) -> list[Path]:
    """`default`, which lies in `folder` itself, and the others by name; not the reference of a preference training."""
    below = [child for child in folder.iterdir() if (child / CONFIG).is_file()] if folder.is_dir() else []
    named = [child for child in below if not (child / _CARD).exists() and not _CHECKPOINT.fullmatch(child.name)]
    found = ([folder] if len(_PEFT.files(folder)) > 1 else []) + sorted(named, key=lambda child: child.name)
    return [each for each in found if each == folder or each.name not in REFERENCES]


def _check_one(folder: Path) -> None:
    """InputError unless `folder` is one adapter."""
    if _PEFT.matches(folder):
        return
    if len(_saved_together(folder)) > 1:
        raise InputError(f"adapter {folder}: holds several adapters; give --adapter each of them, or this one alone")
    steps = [child for child in folder.iterdir() if _CHECKPOINT.fullmatch(child.name)]
    last = max(steps, key=lambda child: int(child.name.rpartition("-")[2]), default=None)
    mend = f"give --adapter one of its checkpoints, e.g. {last}" if last else "give each with --adapter"
    raise InputError(f"adapter {folder}: no {CONFIG} in it: only PEFT adapters can be active together; {mend}")


def _said(folder: Path, key: str) -> str:
    from autointerp.evidence.weight_files import read_json

    return str(read_json(folder / CONFIG, "adapter").get(key))


ADAPTERS.register("peft-several")(SeveralPeftFormat())
