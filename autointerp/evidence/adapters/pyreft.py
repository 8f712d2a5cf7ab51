"""pyreft and pyvene: LoReFT interventions on the residual stream, h + Rᵀ(W h + b − R h) (https://arxiv.org/abs/2404.03592).

`intkey_layer_{l}_comp_block_output_unit_pos_nunit_1#0.bin`, or `intkey_comp_model_layers[{l}]_output_…` where the
component was named by a path, holds `weight [r, d]`, `bias [r]` and `rotate_layer [d, r]`. Trainer checkpoints keep
them in `intervenable_model/`, without a config. At which positions an intervention acts is decided by what calls the
model and stored nowhere; nor is its activation function.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, View
from autointerp.evidence.adapters.inserting import InsertingFormat, check_shape, read_state

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

    from autointerp.evidence.hooked import Insertion
    from autointerp.evidence.hookpoints import HookPoint, Layout

CONFIG, SUBFOLDER, MODEL = "config.json", "intervenable_model", "pytorch_model.bin"
_KEY = re.compile(  # with dots in files of older versions
    r"intkey[_.](?:layer[_.](?P<layer>\d+)[_.])?comp[_.](?P<component>.+)[_.]unit[_.](?P<unit>.+)[_.]nunit[_.](?P<n>\d+)"
    r"#(?P<number>\d+)\.bin"
)
_PATH = re.compile(r"(?P<blocks>.+)\[(?P<layer>\d+)\][_.](?P<side>output|input)")
_KEYS = ("weight", "bias", "rotate_layer")
_SIDES = {"block_output": "output", "block_input": "input"}


class PyreftFormat(InsertingFormat):
    """`intkey_….bin` for each intervention, and pyvene's `config.json`."""

    name = "pyreft"
    on_latents = True

    def matches(self, path: Path) -> bool:
        return any(_home(path).glob("intkey*.bin"))

    def files(self, path: Path) -> list[Path]:
        home = _home(path)
        config = [home / CONFIG] if (home / CONFIG).is_file() else []
        return [*config, *sorted(home.glob("intkey*.bin"))]

    def check(self, path: Path) -> None:
        home = _home(path)
        _check_types(home)
        _check_base(home / MODEL)
        seen: dict[tuple[int, str], Path] = {}
        for file in _interventions(home):
            layer, side, _ = _place(file)
            if (layer, side) in seen:
                raise InputError(
                    f"adapter {path}: {seen[layer, side].name} and {file.name} act at one place on different positions,"
                    " which no file says; train one intervention per layer (share_weights), or give a LoRA"
                )
            seen[layer, side] = file
            _weights(file)

    def base_of(self, spec: str | Path) -> str | None:
        return None

    def assumed(self, spec: str | Path) -> str | None:
        return "LoReFT at every position and without an activation function: its files say neither"

    def insertions(self, folder: Path, config: PretrainedConfig, view: View, device: torch.device) -> list[Insertion]:
        from autointerp.evidence.hook_functions import Loreft
        from autointerp.evidence.hooked import Insertion
        from autointerp.evidence.hookpoints import Layout

        layout, width, found = Layout.of(config), config.get_text_config().hidden_size, []
        for file in _interventions(_home(folder)):
            weight, bias, rotation = _weights(file)
            if weight.shape[1] != width:
                raise InputError(
                    f"adapter {file} acts on activations of width {weight.shape[1]}, the base model's residual width is"
                    f" {width}: give --base its own"
                )
            found.append(Insertion(_point(file, layout), Loreft(weight, bias, rotation.T.contiguous()).to(device)))
        return found


def _home(path: Path) -> Path:
    """Where the interventions lie: the folder, or what the trainer makes in its checkpoints."""
    below = path / SUBFOLDER
    return below if below.is_dir() and not any(path.glob("intkey*.bin")) else path


def _interventions(home: Path) -> list[Path]:
    """In the order in which the model reaches them."""
    named = sorted(home.glob("intkey*.bin"))
    return sorted(named, key=lambda file: (_place(file)[0], _place(file)[1] == "output"))


def _check_types(home: Path) -> None:
    """InputError where the config names a class that is not LoReFT's."""
    from autointerp.evidence.weight_files import read_json

    if not (home / CONFIG).is_file():
        return
    kinds = read_json(home / CONFIG, "adapter").get("intervention_types")
    for kind in kinds if isinstance(kinds, list) else []:
        if "LoreftIntervention" not in str(kind):
            name = str(kind).removeprefix("<class '").removesuffix("'>").rpartition(".")[2]
            raise InputError(f"adapter {home}: a {name}; of pyreft's interventions, LoreftIntervention is read")


def _check_base(file: Path) -> None:
    """InputError where the model itself was trained too: `save_intervention` keeps those weights beside."""
    if file.is_file() and (changed := read_state(file)):
        raise InputError(
            f"adapter {file}: holds trained weights of the model itself ({next(iter(changed))}), which are not added;"
            " merge them into --base and move the file away"
        )


def _place(file: Path) -> tuple[int, str, str | None]:
    """(layer, output or input, path of the blocks where the key has one) of a whole block on the residual stream."""
    key = _KEY.fullmatch(file.name)
    if key is None:
        raise InputError(f"adapter {file}: not the name of an intervention, intkey_layer_3_comp_block_output_…#0.bin")
    if key["unit"] != "pos" or key["n"] != "1":
        raise InputError(
            f"adapter {file}: acts on {key['n']} × {key['unit']} at a time; interventions on single positions are read"
        )
    if key["layer"] is not None and key["component"] in _SIDES:
        return int(key["layer"]), _SIDES[key["component"]], None
    if path := _PATH.fullmatch(key["component"]):
        return int(path["layer"]), path["side"], path["blocks"]
    raise InputError(
        f"adapter {file}: acts on {key['component']}; interventions on the output or the input of a block are read"
    )


def _point(file: Path, layout: Layout) -> HookPoint:
    from autointerp.evidence.hooked import stream_after

    layer, side, blocks = _place(file)
    if blocks is not None and blocks != layout.blocks.replace(".", "_"):
        raise InputError(f"adapter {file}: acts on {blocks}[{layer}], the base model's blocks are {layout.blocks}")
    if side == "input" and layer == 0:
        return layout.named("blocks.0.hook_resid_pre", 0, "hook_resid_pre")
    return stream_after(layout, layer - (side == "input"))


def _weights(file: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """weight [r, d], bias [r], rotate_layer [d, r]."""
    state = read_state(file)
    if odd := sorted(set(_KEYS) ^ state.keys()):
        raise InputError(f"adapter {file}: {odd[0]} is missing or none of LoReFT's ({', '.join(_KEYS)}); save it again")
    weight, bias, rotation = (state[key] for key in _KEYS)
    if weight.ndim != 2:
        raise InputError(f"adapter {file}: weight has shape {list(weight.shape)}, want [r, d]; save it again")
    r, d = weight.shape
    check_shape(file, "bias", bias, (r,), f"weight [{r}, {d}]")
    check_shape(file, "rotate_layer", rotation, (d, r), f"weight [{r}, {d}]")
    return weight, bias, rotation


ADAPTERS.register("pyreft")(PyreftFormat())
