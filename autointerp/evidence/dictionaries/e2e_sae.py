"""Dictionaries that e2e_sae (ApolloResearch) saves: a folder with `samples_{n}.pt` and `final_config.yaml`.

    z = relu(x encoder.0.weightᵀ + encoder.0.bias),  x̂ = z D̂ᵀ + decoder.bias,  D̂ = decoder.weight, columns of norm 1

One file holds the dictionaries of all hook points trained together, under TransformerLens names with `-` for `.`
(`blocks-6-hook_resid_pre.encoder.0.weight`): --hook chooses. Of several checkpoints the last is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source
from autointerp.evidence.dictionaries.files import MEND, read_state, take
from autointerp.evidence.dictionaries.kernels import Linear, relu

CONFIG = "final_config.yaml"
SHAPES = {"encoder.0.weight": "m d", "encoder.0.bias": "m", "decoder.weight": "d m", "decoder.bias": "d"}
_CHECKPOINT = re.compile(r"samples_(\d+)\.pt")


class EndToEnd:
    """A folder with `samples_{n}.pt`, or one such file."""

    says: tuple[str, ...] = ()

    def matches(self, path: Path) -> bool:
        return bool(_CHECKPOINT.fullmatch(path.name)) if path.is_file() else bool(_checkpoints(path))

    def hook(self, source: Source) -> str | None:
        try:
            hooks = _hooks(read_state(_file(source.path), source.name))
        except InputError:
            return None
        return source.hook if source.hook in hooks else hooks[0] if len(hooks) == 1 else None

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        path, name = _file(source.path), source.name
        state = read_state(path, name)
        hook = _chosen(name, _hooks(state), source.hook)
        prefix = hook.replace(".", "-") + "."
        mine = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        w, _ = take(f"{name} at {hook}", mine, SHAPES)
        w = {key: value.to(device=device, dtype=dtype) for key, value in w.items()}
        W_dec = _rows_of_norm_one(w["decoder.weight"].T)
        made = Linear(
            w["encoder.0.weight"].T,
            W_dec,
            w["decoder.bias"],
            b_enc=w["encoder.0.bias"],
            activation=relu,
            subtract_b_dec=False,
        )
        made.format, made.hook, made.prepend_bos = "e2e_sae/relu", hook, False
        return made


def _hooks(state: dict[str, Tensor]) -> list[str]:
    """Hook points of the dictionaries in a state dict."""
    names = {key.partition(".")[0].replace("-", ".") for key in state}
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def _chosen(name: str, hooks: list[str], asked: str | None) -> str:
    if not hooks:
        raise InputError(f"{name}: its weights are empty; {MEND}")
    if asked in hooks:
        return asked
    if asked is None and len(hooks) == 1:
        return hooks[0]
    what = f"has none for {asked}" if asked else f"holds the dictionaries of {len(hooks)} hook points"
    raise InputError(f"{name} {what}; give --hook {' or '.join(hooks)}")


def _rows_of_norm_one(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _checkpoints(folder: Path) -> list[Path]:
    """samples_{n}.pt by n, ascending."""
    found: Iterable[tuple[re.Match[str] | None, Path]] = ((_CHECKPOINT.fullmatch(p.name), p) for p in folder.iterdir())
    return [path for _n, path in sorted((int(match[1]), path) for match, path in found if match)]


def _file(path: Path) -> Path:
    return path if path.is_file() else _checkpoints(path)[-1]


DICTIONARIES.register("e2e_sae")(EndToEnd())
