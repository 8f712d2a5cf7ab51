"""Tensors of a checkpoint or an adapter by name, each read from disk when it is asked for and let go afterwards."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.weight_files import check_header, first_line, not_finite
from autointerp.evidence.wiring import TOKEN_EMBEDDINGS, UNEMBEDDINGS, stored_in_out

_PREFIXES = ("model", "transformer", "gpt_neox", "base_model.model")
"""First components that a checkpoint's names have or lack, by whether the body or the whole model was saved."""


class Tensors:
    """The tensors in some .safetensors or .bin files. Nothing is kept of what was read."""

    def __init__(self, files: Sequence[Path], option: str):
        """InputError for a damaged file; messages call the files `option`."""
        self.option = option
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        self._file: dict[str, Path] = {}
        for file in files:
            self._file |= dict.fromkeys(self._names_in(file), file)

    def names(self) -> list[str]:
        """All names, in order of layers and then of the alphabet, so that what belongs together is read together."""
        return sorted(self._file, key=_by_layer)

    def find(self, name: str) -> str | None:
        """`name`, or what the same tensor is called here: other files have or lack the first component."""
        if name in self._file:
            return name
        for prefix in _PREFIXES:
            for other in (f"{prefix}.{name}", name.removeprefix(f"{prefix}.")):
                if other in self._file:
                    return other
        return None

    def shape(self, name: str) -> tuple[int, ...]:
        file = self._file[name]
        if file.suffix != ".safetensors":
            return tuple(self._load(file)[name].shape)
        with safe_open(file, framework="pt") as content:
            return tuple(content.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = slice(None)) -> Tensor:
        """The tensor, or these rows of it, as float32 in memory of its own. InputError where it is not finite."""
        file = self._file[name]
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as content:  # a mapping of its own, gone with it
                whole = content.get_slice(name)
                found = (whole[rows] if whole.get_shape() else content.get_tensor(name)).to(torch.float32, copy=True)
        else:
            found = self._load(file)[name][rows].to(torch.float32, copy=True)
        if not all_finite(found):
            raise not_finite(f"{self.option} {file.parent}", name)
        return found

    def blocks(self, name: str, numel: int = 1 << 26) -> Iterator[slice]:
        """Slices of rows of about `numel` numbers each."""
        shape = self.shape(name)
        step = max(1, numel // max(1, torch.Size(shape[1:]).numel()))
        return (slice(at, at + step) for at in range(0, shape[0], step))

    def _names_in(self, file: Path) -> list[str]:
        if file.suffix != ".safetensors":
            return list(self._load(file))
        check_header(file, self.option)
        try:
            with safe_open(file, framework="pt") as content:
                return list(content.keys())
        except (SafetensorError, OSError) as error:
            raise InputError(f"{self.option} {file}: damaged ({first_line(error)}); copy or save it again") from error

    def _load(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a .bin file, mapped where it is of the present format; nothing else in it is executed."""
        if file not in self._pickled:
            try:
                self._pickled[file] = {k: v for k, v in _unpickle(file).items() if isinstance(v, Tensor)}
            except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
                raise InputError(
                    f"{self.option} {file}: damaged, or not plain tensors; save it again as safetensors"
                ) from error
        return self._pickled[file]


class BaseWeights:
    """What can be had of the base model without loading it: its config, and tensors one by one."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def at(cls, base: str | None) -> BaseWeights | None:
        """The base in this folder, or in the hub's cache; None where it is not on this machine. Nothing is fetched."""
        if base is None:
            return None
        if Path(base).is_dir():
            return cls(Path(base))
        from huggingface_hub import try_to_load_from_cache

        try:
            found = try_to_load_from_cache(base, "config.json")
        except ValueError:  # no name that the hub could have
            return None
        return cls(Path(found).parent) if isinstance(found, str) else None

    @cached_property
    def config(self) -> Any:
        """Its transformers config."""
        from autointerp.evidence.loading import load_config

        return load_config(self.folder)

    @cached_property
    def tensors(self) -> Tensors:
        """InputError where the folder holds no weights."""
        if not self._files:
            raise InputError(f"base {self.folder}: no weights in it; give --base a folder written by save_pretrained")
        return Tensors(self._files, "base")

    def weight(self, name: str) -> Tensor | None:
        """One tensor as float32; None where there are no weights here, or none of this name."""
        found = self.tensors.find(name) if self._files else None
        return None if found is None else self.tensors.read(found)

    def weight_name(self, module: str) -> str | None:
        """What the weight of a module is called in the files: that of an unembedding tied to the embedding is the
        embedding's. None where there is none, or no weights are here."""
        if not self._files:
            return None
        found = self.tensors.find(f"{module}.weight")
        if found is None and module.rpartition(".")[2] in UNEMBEDDINGS and self.tied:
            return self.token_embedding
        return found

    def matrix(self, module: str) -> Tensor | None:
        """W [out, in] of a module's linear map as float32; an embedding is the map from one-hot tokens. None where
        there are no weights here, or none of this module."""
        name = self.weight_name(module)
        if name is None:
            return None
        stored = self.tensors.read(name)
        return stored.T if stored_in_out(self.config.model_type, module) else stored

    @property
    def tied(self) -> bool:
        """Whether one matrix embeds and unembeds tokens."""
        return bool(getattr(self.config.get_text_config(), "tie_word_embeddings", False))

    @cached_property
    def token_embedding(self) -> str | None:
        """What the weight of the embedding of tokens is called in the files."""
        ends = tuple(f".{leaf}.weight" for leaf in TOKEN_EMBEDDINGS)
        return next((name for name in self.tensors.names() if f".{name}".endswith(ends)), None)

    @cached_property
    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("*.safetensors")) or sorted(self.folder.glob("pytorch_model*.bin"))


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity in it; a mask is made only where the plain sum does not settle it."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


def _unpickle(file: Path) -> dict[str, Any]:
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # written before 2020: cannot be mapped
        return torch.load(file, map_location="cpu", weights_only=True)


def _by_layer(name: str) -> tuple[int, str]:
    return next((int(part) for part in name.split(".") if part.isdigit()), -1), name
