"""What an adapter format must answer, and how the format of a folder is found. Torch is loaded with weights."""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autointerp.errors import InputError
from autointerp.evidence.hub import snapshot
from autointerp.registry import Registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from autointerp.evidence.dictionaries import Dictionary
    from autointerp.evidence.model_pair import ModelPair
    from autointerp.evidence.tensor_files import BaseWeights
    from autointerp.evidence.weight_change import WeightChanges

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_PATTERNS = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.gguf", "*.model")
_CHUNK = 1 << 20
_TOGETHER = " + "


class Member(NamedTuple):
    """One of several adapters that are active together."""

    name: str
    """Of its folder; `default` for the one that lies above the others."""
    path: str
    sha256: str


@dataclass(frozen=True)
class View:
    """What a run looks at an adapter through: for adapters that do not say where they act, or that act on latents."""

    hook: str
    sae: str | None = None
    """The path or release/sae_id of `dictionary`."""
    dictionary: Dictionary | None = None


class AdapterFormat(ABC):
    """One way in which a trainer leaves its result on disk. Everything here takes a folder or a hub id."""

    name: str
    generic: bool = False
    """Whether files of a more special format also look like this one, so that the others are asked first."""
    on_latents: bool = False
    """Whether its weights are read in the latents of its dictionary (latent_weights.py), not as changed matrices."""
    several: bool = False
    """Whether it is of several adapters that are active together; takes what `together` makes of their folders, too."""

    @abstractmethod
    def matches(self, path: Path) -> bool:
        """Whether the folder looks like this format, by the names of its files; a damaged one still matches."""

    @abstractmethod
    def files(self, path: Path) -> list[Path]:
        """The files that make the adapter what it is: config and weights, sorted."""

    @abstractmethod
    def check(self, path: Path) -> None:
        """InputError, in one line, for what is missing, damaged or not finite."""

    @abstractmethod
    def base_of(self, spec: str | Path) -> str | None:
        """The base model that the adapter names: an absolute path if it exists here, a hub id as it is, or None."""

    @abstractmethod
    def load(self, spec: str | Path, base: str, *, dtype: str | torch.dtype, device: str | torch.device) -> ModelPair:
        """Base and adapted model; InputError, in one line, where they do not fit each other."""

    def assumed(self, spec: str | Path) -> str | None:
        """What is taken for granted because the files do not say it, in words for the user; None where nothing is."""
        return None

    def members(self, spec: str | Path) -> list[Member]:
        """The adapters that are active together, in the order in which they act; none where there is only one."""
        return []

    def weight_changes(self, spec: str | Path, base: BaseWeights | None) -> WeightChanges:
        """What the files alone say of the changed weight matrices; `base` is None where the base is not here.

        InputError, in one line, where files of this format do not say it.
        """
        raise InputError(
            f"adapter {spec}: what a {self.name} adapter does is not in weight matrices of the model;"
            " use --selector change, which runs the models over a corpus"
        )

    def load_for(
        self, spec: str | Path, base: str, view: View, *, dtype: str | torch.dtype, device: str | torch.device
    ) -> ModelPair:
        """`load`, for a run that looks at it through `view`; most formats do not ask."""
        return self.load(spec, base, dtype=dtype, device=device)

    def load_onto(self, spec: str | Path, base: str, view: View, model: PreTrainedModel) -> ModelPair:
        """`load_for`, of a base that is in memory already: the pair takes `model` over, and its dtype and device.

        Formats that have no use for it load the base anew.
        """
        return self.load_for(spec, base, view, dtype=model.dtype, device=model.device)

    def sha256(self, spec: str | Path) -> str:
        """Over the names and bytes of `files`: the same wherever the folder lies."""
        digest = hashlib.sha256()
        for file in self.files(local_folder(spec)):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while chunk := content.read(_CHUNK):
                    digest.update(chunk)
        return digest.hexdigest()


ADAPTERS: Registry[AdapterFormat] = Registry("adapter format", "autointerp.evidence.adapters")


def detect(spec: str | Path) -> AdapterFormat:
    """The format of the adapter at a path or hub id, its files checked; InputError, in one line, otherwise."""
    if len(separate(spec)) > 1:
        found = next(candidate for _, candidate in ADAPTERS.items() if candidate.several)
        found.check(Path(spec))
        return found
    folder = local_folder(spec)
    if (found := format_of(folder)) is not None:
        found.check(folder)
        return found
    below = sorted(file.parent for file in folder.glob("*/adapter_config.json"))
    below = below or sorted(file.parent for file in folder.glob("*/config.json"))
    hint = f"give --adapter {below[-1]}" if below else "give --adapter a PEFT folder or a checkpoint"
    if len(below) > 1:
        hint += ", or --adapter once for each of those to be taken together"
    raise InputError(
        f"adapter {spec}: no adapter_config.json, nor config.json with weights, nor any other file of a format we read"
        f" ({', '.join(ADAPTERS.names())}); {hint}"
    )


def format_of(folder: Path) -> AdapterFormat | None:
    """The format that a folder looks like, its files unchecked; None if it looks like none."""
    formats = sorted((format for _, format in ADAPTERS.items()), key=lambda format: format.generic)
    return next((candidate for candidate in formats if candidate.matches(folder)), None)


def together(specs: Sequence[str]) -> str:
    """Adapters that are to be active together, as one path: a readable list of them. InputError where one is named
    twice, and for names that `separate` could not take apart again."""
    for spec in specs:
        if _TOGETHER in spec and len(specs) > 1:
            raise InputError(f"adapter {spec}: {_TOGETHER!r} in a path stands between adapters; rename the folder")
        if specs.count(spec) > 1:
            raise InputError(f"adapter {spec}: is named twice; name each adapter once")
    return _TOGETHER.join(specs)


def separate(spec: str | Path) -> list[str]:
    """The paths or hub ids in an adapter's: one, or several that are active together."""
    return [str(spec)] if Path(spec).is_dir() else str(spec).split(_TOGETHER)


def local_folder(spec: str | Path) -> Path:
    """The folder of an adapter: the path itself, or the snapshot of a hub id, downloaded if need be."""
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"adapter {spec}: is a file; give the folder that holds it")
    if _HUB_ID.fullmatch(str(spec)):
        return snapshot(str(spec), _PATTERNS, "adapter")
    raise InputError(f"adapter {spec}: no such folder; give --adapter an existing path, or a hub id")


def located(name: str | None, folder: Path) -> str | None:
    """A model name found in a file of `folder`: an absolute path where there is one, else as it is.

    Relative paths are looked for beside the adapter first, then in the working directory.
    """
    if not name:
        return None
    written = Path(name).expanduser()
    found = next((place for place in (folder.resolve() / written, written) if place.exists()), None)
    return str(found.resolve()) if found else name
