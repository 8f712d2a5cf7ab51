"""Steering vectors: one direction [d], one for each layer [L, d], or a control vector of repeng or llama.cpp (GGUF).

A folder with one .pt, .safetensors or .gguf file. `steering.json` beside it may say `base`, `hook` and `coefficient`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, View, local_folder, located
from autointerp.evidence.adapters.inserting import InsertingFormat, read_pickled

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from autointerp.evidence.hooked import Insertion
    from autointerp.evidence.hookpoints import HookPoint, Layout

SIDECAR = "steering.json"
KEYS = ("base", "hook", "coefficient")
_SUFFIXES = (".pt", ".safetensors", ".gguf")
_OF_A_TRAINER = re.compile(r"(optimizer|scheduler|scaler|rng_state).*")
_LAYER = re.compile(r"(?:(?:layer|block|direction)s?[._-]?)?(\d+)", re.IGNORECASE)
_SAME_IN_GGUF = {"llama", "mistral"}
"""llama.cpp calls both llama."""

Vectors = dict[int | None, "Tensor"]
"""[d], or [L, d] under None, by the layer after which it is added; None where the file does not say."""


class SteeringFormat(InsertingFormat):
    """One file of vectors."""

    name = "steering"
    on_latents = True
    generic = True

    def matches(self, path: Path) -> bool:
        return bool(_candidates(path)) or (path / SIDECAR).is_file()

    def files(self, path: Path) -> list[Path]:
        return [*([path / SIDECAR] if (path / SIDECAR).is_file() else []), *_candidates(path)]

    def check(self, path: Path) -> None:
        found = _candidates(path)
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "no .pt, .safetensors or .gguf file"
            raise InputError(f"adapter {path}: {names}; give --adapter a folder with one steering vector")
        _sidecar(path)
        _vectors(found[0])

    def base_of(self, spec: str | Path) -> str | None:
        folder = local_folder(spec)
        return located(_sidecar(folder).get("base"), folder)

    def insertions(self, folder: Path, config: PretrainedConfig, view: View, device: torch.device) -> list[Insertion]:
        from autointerp.evidence.hooked import Insertion
        from autointerp.evidence.hookpoints import Layout, resolve
        from autointerp.evidence.shift import Shift

        (file,), said, layout = _candidates(folder), _sidecar(folder), Layout.of(config)
        vectors, width = _vectors(file), config.get_text_config().hidden_size
        for vector in vectors.values():
            if vector.shape[-1] != width:
                raise InputError(
                    f"adapter {file}: a vector of width {vector.shape[-1]}, the base model's residual width is {width}:"
                    " give --base the model it was made for"
                )
        _check_hint(file, config.model_type)
        chosen = resolve(said["hook"], config) if "hook" in said else None
        placed = _placed(file, vectors, layout, chosen, resolve(view.hook, config))
        scale = float(said.get("coefficient", 1))
        return [Insertion(point, Shift(scale * vector.float()).to(device)) for point, vector in placed]


def _candidates(folder: Path) -> list[Path]:
    found = [file for file in folder.iterdir() if file.suffix in _SUFFIXES and not _OF_A_TRAINER.fullmatch(file.name)]
    return sorted(found)


def _sidecar(folder: Path) -> dict[str, Any]:
    from autointerp.evidence.weight_files import read_json

    file = folder / SIDECAR
    if not file.is_file():
        return {}
    said = read_json(file, "adapter")
    for key, value in said.items():
        wanted = int | float if key == "coefficient" else str
        if key not in KEYS or not isinstance(value, wanted) or isinstance(value, bool):
            raise InputError(
                f"adapter {file}: {key}: {value!r}; the keys are base, hook (names) and coefficient (a number)"
            )
    return said


def _vectors(file: Path) -> Vectors:
    """What is in the file, checked; InputError where it is not finite or no vectors."""
    import torch
    from safetensors.torch import load_file

    from autointerp.evidence.gguf import read_control_vector
    from autointerp.evidence.loading import check_finite
    from autointerp.evidence.weight_files import check_header

    if file.suffix == ".gguf":
        content: Any = {layer: torch.from_numpy(v) for layer, v in read_control_vector(file).directions.items()}
    elif file.suffix == ".safetensors":
        check_header(file, "adapter")
        content = load_file(file)
    else:
        content = read_pickled(file)
    named: Mapping[Any, Any] = content if isinstance(content, Mapping) else {"vector": content}
    layers = [_LAYER.fullmatch(str(key)) for key in named]
    if not named or not all(isinstance(value, torch.Tensor) and value.is_floating_point() for value in named.values()):
        raise InputError(
            f"adapter {file}: no vectors in it; save a tensor [d] or [layers, d], or one [d] for each layer"
        )
    vectors: Vectors = {}
    most = 1
    if all(layers):
        vectors = {int(m[1]): v.squeeze() for m, v in zip(layers, named.values(), strict=True) if m}
    elif len(named) == 1:
        vectors[None], most = next(iter(named.values())), 2
    else:
        some = ", ".join(map(str, list(named)[:3]))
        raise InputError(f"adapter {file}: cannot tell the layers of {some}; name them by their numbers, or keep one")
    for key, vector in zip(named, vectors.values(), strict=True):
        if not 1 <= vector.ndim <= most or not vector.numel():
            raise InputError(f"adapter {file}: {key} has shape {list(vector.shape)}; want [d] or [layers, d]")
    check_finite(f"adapter {file}", ((str(key), vector) for key, vector in zip(named, vectors.values(), strict=True)))
    return vectors


def _check_hint(file: Path, model_type: str) -> None:
    """InputError where a GGUF file was made for a model of another architecture, both known."""
    from autointerp.evidence.gguf import read_control_vector
    from autointerp.evidence.hookpoints import FAMILIES

    if file.suffix != ".gguf":
        return
    hint = read_control_vector(file).model_hint
    if hint != model_type and {hint, model_type} <= FAMILIES.keys() and {hint, model_type} != _SAME_IN_GGUF:
        raise InputError(
            f"adapter {file} was made for a {hint}, the base is a {model_type}: give --base the one it came from"
        )


def _placed(
    file: Path, vectors: Vectors, layout: Layout, chosen: HookPoint | None, read: HookPoint
) -> list[tuple[HookPoint, Tensor]]:
    """Each vector and where it is added. One [d] goes to the hook chosen in the sidecar, else to the one that is read.

    Of several, the one of the chosen hook's layer; all of them where none is chosen.
    """
    from autointerp.evidence.hooked import stream_after

    if None not in vectors:
        after = {layer: vector for layer, vector in vectors.items() if layer is not None}
    elif (only := vectors[None]).ndim == 1 or len(only) == 1:
        return [(chosen or read, only.flatten())]
    elif len(only) - layout.n_layers not in (0, 1):
        n, d = only.shape
        raise InputError(
            f"adapter {file}: a tensor [{n}, {d}], the model has {layout.n_layers} layers: want [{d}],"
            f" [{layout.n_layers}, {d}] (after each block), or [{layout.n_layers + 1}, {d}] (as hidden_states, the"
            " embeddings first)"
        )
    else:
        first = layout.n_layers - len(only)  # −1: the first row is added to the embeddings
        after = {first + row: vector for row, vector in enumerate(only)}
    if chosen is not None:
        layer = chosen.layer - (chosen.name.endswith("hook_resid_pre"))
        if layer not in after:
            raise InputError(
                f"adapter {file}: no vector for {SIDECAR}'s hook {chosen.name}; it has layers {sorted(after)}"
            )
        return [(chosen, after[layer])]
    return [
        (stream_after(layout, layer) if layer >= 0 else _embeddings(layout), vector)
        for layer, vector in sorted(after.items())
        if vector.any()
    ]


def _embeddings(layout: Layout) -> HookPoint:
    if layout.family is None:
        raise InputError(
            f"model_type {layout.model_type}: no name for the stream before its first block; leave that row out"
        )
    return layout.named("blocks.0.hook_resid_pre", 0, "hook_resid_pre")


ADAPTERS.register("steering")(SteeringFormat())
