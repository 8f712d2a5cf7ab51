"""ISaeRFT (github.com/AMindToThink/interpretable-fine-tuning): a trained component on the latents of one or more SAEs.

z' = component(z), decoded, with the SAE's reconstruction error added back. `{hook with . as _}.pt` for each SAE holds
`sequential.0.bias` (z + b), `sequential.N.weight` and `.bias` (z + network(z)), or `scaling_factors` (z · (1 + s)). The
modules of the network that have no weights are its ReLUs, so that a gap in the N is one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, View, local_folder, located
from autointerp.evidence.adapters.inserting import InsertingFormat, check_shape, read_state, trained_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from autointerp.adapters import HookAdapter
    from autointerp.evidence.dictionaries import Dictionary
    from autointerp.evidence.hook_functions import Map
    from autointerp.evidence.hooked import Insertion

CONFIG, MANIFEST = "adapter_config.json", "blocks_manifest.json"
PEFT_TYPE = "ISAERFT"
_BLOCK = re.compile(r"blocks_(\d+)_(hook_\w+)\.pt")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_KEY = re.compile(r"sequential\.(\d+)\.(weight|bias)")
_BIAS, _SCALE = "sequential.0.bias", "scaling_factors"
_MEND = "copy the folder that the trainer wrote"


class IsaerftFormat(InsertingFormat):
    """One `blocks_N_hook_….pt` for each SAE, `adapter_config.json` and `blocks_manifest.json` beside them; a
    `checkpoint-N` of the trainer may hold the .pt files alone, its config above it."""

    name = "isaerft"
    on_latents = True

    def matches(self, path: Path) -> bool:
        named = any(_BLOCK.fullmatch(file.name) for file in path.iterdir())
        return named or (path / MANIFEST).is_file() or _is_ours(path / CONFIG)

    def files(self, path: Path) -> list[Path]:
        config = _config_file(path)
        manifest = [path / MANIFEST] if (path / MANIFEST).is_file() else []
        return [*([config] if config else []), *manifest, *_blocks(path)]

    def check(self, path: Path) -> None:
        _targets(path)
        blocks = _blocks(path)
        if not blocks:
            below = [(int(match[1]), f) for f in path.iterdir() if (match := _CHECKPOINT.fullmatch(f.name))]
            mend = f"give --adapter {max(below)[1]}" if below else _MEND
            raise InputError(f"adapter {path}: no blocks_N_hook_….pt in it; {mend}")
        for file in blocks:
            _hook(file)
            _component(file, read_state(file))

    def base_of(self, spec: str | Path) -> str | None:
        folder = local_folder(spec)
        return located(_said(folder).get("base_model_name_or_path"), folder)

    def insertions(self, folder: Path, config: PretrainedConfig, view: View, device: torch.device) -> list[Insertion]:
        from autointerp.evidence.dictionaries.saelens import listed_like
        from autointerp.evidence.hooked import Insertion
        from autointerp.evidence.hookpoints import resolve

        specs = [spec for release, sae_id in _targets(folder) for spec in listed_like(release, sae_id)]
        specs, width, found = list(dict.fromkeys(specs)), config.get_text_config().hidden_size, []
        for file in _blocks(folder):
            point, component = resolve(_hook(file), config), _component(file, read_state(file))
            dictionary = trained_on(f"adapter {file}", view, specs, _size(component), point.layer, device)
            if dictionary.d_in != width:
                raise InputError(
                    f"adapter {file}: its SAE reads width {dictionary.d_in}, the base model's residual width is"
                    f" {width}: give --base its own"
                )
            found.append(Insertion(point, _function(component, dictionary).to(device)))
        return found


Component = tuple[str, "list[Map] | Tensor"]
"""`bias` or `scaling` and the vector [m], or `network` and its maps."""


def _component(file: Path, state: Mapping[str, Tensor]) -> Component:
    """What the tensors of one file make; InputError where they make nothing that the library trains."""
    if state.keys() == {_SCALE} or state.keys() == {_BIAS}:
        (key, vector), kind = next(iter(state.items())), "scaling" if _SCALE in state else "bias"
        check_shape(file, key, vector, (vector.numel(),), f"a {kind}")
        return kind, vector
    numbers = sorted({int(match[1]) for key in state if (match := _KEY.fullmatch(key))})
    wanted = {f"sequential.{n}.{part}" for n in numbers for part in ("weight", "bias")}
    if odd := sorted(wanted ^ state.keys()) or ([] if numbers else ["sequential.0.bias"]):
        raise InputError(f"adapter {file}: {odd[0]} is missing or none of an ISaeRFT component's; {_MEND}")
    ends = [*numbers[1:], numbers[-1] + 1]
    if numbers[0] != 0 or any(end - n > 2 for n, end in zip(numbers, ends, strict=True)):
        raise InputError(f"adapter {file}: its linear maps have the numbers {numbers}: more than a ReLU between two")
    maps = [
        (state[f"sequential.{n}.weight"], state[f"sequential.{n}.bias"], end - n == 2)
        for n, end in zip(numbers, ends, strict=True)
    ]
    width = m = maps[0][0].shape[-1]
    for n, (weight, bias, _) in zip(numbers, maps, strict=True):
        out = m if n == numbers[-1] else weight.shape[0]
        check_shape(file, f"sequential.{n}.weight", weight, (out, width), "the map before it, or the SAE,")
        check_shape(file, f"sequential.{n}.bias", bias, (out,), "its weight")
        width = out
    return "network", maps


def _size(component: Component) -> int:
    """Latents that it acts on."""
    kind, content = component
    return content[0][0].shape[1] if kind == "network" else len(content)  # pyright: ignore


def _function(component: Component, dictionary: Dictionary) -> HookAdapter:
    from autointerp.adapters import Bias, Scaling
    from autointerp.evidence.hook_functions import Network

    kind, content = component
    if isinstance(content, list):
        device = dictionary.W_dec.device
        return Network(dictionary, [(w.to(device), b.to(device), relu) for w, b, relu in content])
    adapter = Bias(dictionary) if kind == "bias" else Scaling(dictionary)
    adapter.load_state_dict({"bias" if kind == "bias" else "scale": content.float()})
    return adapter.requires_grad_(False)


def _hook(file: Path) -> str:
    if not (match := _BLOCK.fullmatch(file.name)):
        raise InputError(f"adapter {file}: not named after a hook point, as blocks_20_hook_resid_post.pt is; {_MEND}")
    return f"blocks.{match[1]}.{match[2]}"


def _blocks(folder: Path) -> list[Path]:
    """The files named in the manifest, or those named after hook points where there is none."""
    from autointerp.evidence.weight_files import read_json

    if not (folder / MANIFEST).is_file():
        return sorted(file for file in folder.iterdir() if _BLOCK.fullmatch(file.name))
    names = read_json(folder / MANIFEST, "adapter").get("block_names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"adapter {folder / MANIFEST}: no list of block_names; {_MEND}")
    files = sorted(folder / f"{name}.pt" for name in names)
    if missing := [file.name for file in files if not file.is_file()]:
        raise InputError(f"adapter {folder}: {MANIFEST} names {missing[0]}, which is missing; {_MEND}")
    return files


def _config_file(folder: Path) -> Path | None:
    above = [folder.resolve().parent] if _CHECKPOINT.fullmatch(folder.resolve().name) else []
    return next((file for place in (folder, *above) if (file := place / CONFIG).is_file()), None)


def _said(folder: Path) -> dict[str, Any]:
    from autointerp.evidence.weight_files import read_json

    file = _config_file(folder)
    return read_json(file, "adapter") if file else {}


def _targets(folder: Path) -> list[tuple[str, str]]:
    """(part of a release, part of a sae_id) for the SAEs it was trained on; none where there is no config."""
    said = _said(folder)
    if said and said.get("peft_type") != PEFT_TYPE:
        raise InputError(
            f"adapter {folder}: {CONFIG} is of peft_type {said.get('peft_type')}, want {PEFT_TYPE}; {_MEND}"
        )
    targets = said.get("target_hooks", [])
    given = targets if isinstance(targets, list) else [targets]
    pairs = [pair for pair in given if isinstance(pair, list) and [type(part) for part in pair] == [str, str]]
    if len(pairs) != len(given):
        raise InputError(
            f"adapter {folder}: {CONFIG} has target_hooks {targets}, want pairs [release, sae_id]; {_MEND}"
        )
    return [(release, sae_id) for release, sae_id in pairs]


def _is_ours(file: Path) -> bool:
    try:
        said = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(said, dict) and said.get("peft_type") == PEFT_TYPE


ADAPTERS.register("isaerft")(IsaerftFormat())
