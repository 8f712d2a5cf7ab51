"""The checkpoints that a trainer left beneath a folder, `checkpoint-N` at step N, as one series."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.weight_files import samples

T = TypeVar("T")

FINAL = "final"
"""Name of an adapter that lies beside the checkpoints and is none of them."""
STATE = "trainer_state.json"
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the training had made of the adapter, or of the whole model, at one step."""

    name: str
    """Of its folder, or FINAL."""
    path: str
    step: int | None
    """None for a final adapter of which no file says when it was saved."""


def resolve(adapter: str, most: int) -> tuple[str, tuple[Checkpoint, ...]]:
    """Which adapter is meant by a path or hub id, and the checkpoints of its training, in the order of their steps.

    The adapter is what the folder itself holds, else its last checkpoint. It is always among the checkpoints, of which
    there are at most `most`, evenly spaced; none where there is no series. Folders with nothing of a format that we
    read (an optimizer's shards, say) do not count. InputError for a damaged checkpoint.
    """
    every = _below(Path(adapter))
    if not every:
        return adapter, ()
    found = [checkpoint for checkpoint in every if adapters.format_of(Path(checkpoint.path)) is not None]
    if _weights(Path(adapter)):
        found, final = _with_final(found, Path(adapter))
        if most:
            _check_same_kind(found, final)
    elif found and found[-1] is every[-1]:
        final = found[-1]
    else:
        return every[-1].path, ()  # which whoever reads it will say
    chosen = evenly(found, most, found.index(final))
    if len(chosen) < 2:
        return final.path, ()
    for checkpoint in chosen:
        if checkpoint is not final:
            _check(checkpoint)
    return final.path, tuple(chosen)


def evenly(items: Sequence[T], most: int, kept: int) -> list[T]:
    """At most `most` of `items` in their order, evenly spaced from the first to the last; items[kept] is among them."""
    if most >= len(items):
        return list(items)
    if most < 2:
        return [items[kept]] if most else []
    at = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    if kept not in at:
        at[min(range(most), key=lambda i: abs(at[i] - kept))] = kept
    return [items[i] for i in at]


def _below(folder: Path) -> list[Checkpoint]:
    if not folder.is_dir():
        return []
    names = ((child, _CHECKPOINT.fullmatch(child.name)) for child in folder.iterdir() if child.is_dir())
    found = [Checkpoint(child.name, str(child), int(match[1])) for child, match in names if match]
    return sorted(found, key=lambda checkpoint: checkpoint.step or 0)


def _with_final(found: list[Checkpoint], folder: Path) -> tuple[list[Checkpoint], Checkpoint]:
    """The series with the adapter of `folder` in it: one of the checkpoints (the last, or the best, kept at the end of
    the training) where it has the same weights, else after them."""
    mine = _weights(folder)
    for at, checkpoint in reversed(list(enumerate(found))):
        if mine == _weights(Path(checkpoint.path)):
            final = Checkpoint(checkpoint.name, str(folder), checkpoint.step)
            return [*found[:at], final, *found[at + 1 :]], final
    final = Checkpoint(FINAL, str(folder), _step(folder / STATE))
    return [*found, final], final


def _weights(folder: Path) -> list[tuple[str, int, bytes]]:
    """Name, size and samples of each file of weights: those of two steps differ everywhere. None for a config alone."""
    format = adapters.format_of(folder)
    try:
        files = format.files(folder) if format else []
    except InputError:  # it names some that are elsewhere
        files = []
    files = [file for file in files if file.suffix != ".json" and file.is_file()]
    return [(file.name, file.stat().st_size, b"".join(samples(file))) for file in files]


def _check_same_kind(found: Sequence[Checkpoint], final: Checkpoint) -> None:
    """InputError where there are several adapters at the end and one in a checkpoint, or the reverse."""
    several = [_of_several(Path(checkpoint.path)) for checkpoint in (final, *found)]
    for checkpoint, other in zip(found, several[1:], strict=True):
        if other != several[0]:
            holds, held = ("several adapters", "one") if several[0] else ("one adapter", "several")
            raise InputError(
                f"adapter {final.path} holds {holds}, its {checkpoint.name} {held}: they are no series of one training;"
                " leave the checkpoints out with --checkpoints 0, or give --adapter what is meant"
            )


def _of_several(folder: Path) -> bool:
    format = adapters.format_of(folder)
    return format is not None and format.several


def _step(state: Path) -> int | None:
    """The step that transformers.Trainer noted in its state; None where there is no such file."""
    try:
        step = json.loads(state.read_text())["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _check(checkpoint: Checkpoint) -> None:
    try:
        adapters.detect(checkpoint.path)
    except InputError as error:
        raise InputError(f"{error}; or leave the other checkpoints out with --checkpoints 0") from error
