"""The weight changes of a full or merged checkpoint: its matrices minus the base's, streamed one by one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from autointerp.errors import InputError
from autointerp.evidence.tensor_files import BaseWeights, Tensors
from autointerp.evidence.weight_change import INSTEAD, WeightChange, WeightChanges
from autointerp.evidence.weight_files import read_json
from autointerp.evidence.wiring import EMBEDDINGS, UNEMBEDDINGS, stored_in_out


class _Pair(NamedTuple):
    """A tensor of the checkpoint and what the same is called in the base."""

    name: str
    own: str
    module: str
    """Path in the Hugging Face model."""


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
    pairs = _paired(theirs, base)
    if not pairs:
        raise InputError(
            f"adapter {folder}: no weight of it is in base {base.folder}; give --base the one it came from"
        )
    others = [pair for pair in pairs if len(theirs.shape(pair.name)) != 2 or not pair.name.endswith(".weight")]
    matrices = [pair for pair in pairs if pair not in others]
    if base.tied and not any(_leaf(pair.module) in UNEMBEDDINGS for pair in matrices):
        # The embedding of tokens, which writes, is also what reads the stream at its end.
        both = [pair for pair in matrices if pair.own == base.token_embedding]
        matrices = [*(pair._replace(module=UNEMBEDDINGS[0]) for pair in both), *matrices]

    def read() -> Iterator[WeightChange]:
        for name, own, _ in others:
            if theirs.shape(name) != ours.shape(own) or (theirs.read(name) != ours.read(own)).any():
                changes.left_out["bias or norm"] += 1
        for name, own, module in matrices:
            yield from differences(theirs, name, ours, own, module, stored_in_out(str(kinds[0]), module))

    changes = WeightChanges([pair.module for pair in matrices], read)
    return changes


def differences(
    theirs: Tensors, name: str, ours: Tensors, own_name: str, module: str, transposed: bool
) -> Iterator[WeightChange]:
    """ΔW of a matrix that is stored whole on both sides, in blocks of rows: never both matrices at once where they are
    large. `transposed`: stored [in, out].

    InputError for other shapes, save for rows that were added to a vocabulary: those have no counterpart.
    """
    shape, own = theirs.shape(name), ours.shape(own_name)
    # A block of an embedding's or unembedding's rows is a change in itself; other matrices are needed whole.
    by_rows = _leaf(module) in EMBEDDINGS + UNEMBEDDINGS
    if shape != own and (not by_rows or shape[1:] != own[1:]):
        raise InputError(
            f"{theirs.option}: {name} has shape {list(shape)}, in the base {list(own)}: give --base the model it came"
            " from"
        )
    vocabulary = own[0] if _leaf(module) in EMBEDDINGS else 1
    for rows in theirs.blocks(name) if by_rows else [slice(None)]:
        new, old = theirs.read(name, rows), ours.read(own_name, rows)
        change = new[: len(old)].sub_(old[: len(new)])
        if torch.any(change):
            yield WeightChange(module, change.T if transposed else change, None, vocabulary)


def _paired(theirs: Tensors, base: BaseWeights) -> list[_Pair]:
    """The checkpoint's tensors that are in the base too."""
    pairs: list[_Pair] = []
    for name in theirs.names():
        if (own := base.tensors.find(name)) is not None:
            full = max(name, own, key=len)  # named from the top of the whole model
            pairs.append(_Pair(name, own, full.removesuffix(".weight")))
        elif (tied := base.weight_name(name.removesuffix(".weight"))) is not None:
            pairs.append(_Pair(name, tied, name.removesuffix(".weight")))
    return pairs


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
