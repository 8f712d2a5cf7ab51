"""FSRL (feature steering with reinforcement learning): a linear map of x steers the latents of one SAE.

    s = activation(W x' + b) · clamp(steering_magnitude, 0, 1),  out = decode(relu(z + s)) + (x − decode(z))

x' is x, less b_dec where the SAE applies it to its input. Five generations of files, by what the config says:
`activation_type`; `use_jump_relu`; neither (ReLU); a bare `weight` (no activation); `fusion_mode` (no activation, x as
it is, additive or multiplicative). Those without an activation have no ReLU behind the sum either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, View, local_folder, located
from autointerp.evidence.adapters.inserting import InsertingFormat, check_shape, read_state, trained_on

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig

    from autointerp.evidence.dictionaries import Dictionary
    from autointerp.evidence.hooked import Insertion

CONFIG, WEIGHTS = "fsrl_adapter_config.json", "adapter_weights.safetensors"
ACTIVATIONS = ("soft_threshold", "jump_relu", "relu")
_LINEAR = ("adapter_linear.", "0.", "")
"""What stands before `weight` and `bias`, the newest first."""
_MEND = "save it again with save_adapter"


class Parts(NamedTuple):
    """What the files say, checked against each other."""

    weight: Tensor
    """[m, d]"""
    bias: Tensor
    """[m]"""
    activation: str | None
    threshold: Tensor | None
    """[m]"""
    magnitude: Tensor | None
    """[m], not yet clamped."""


class FsrlFormat(InsertingFormat):
    """`fsrl_adapter_config.json` and `adapter_weights.safetensors`."""

    name = "fsrl"
    on_latents = True

    def files(self, path: Path) -> list[Path]:
        return [path / CONFIG, path / WEIGHTS]

    def check(self, path: Path) -> None:
        said = _said(path)
        if not (path / WEIGHTS).is_file():
            raise InputError(f"adapter {path}: no {WEIGHTS} beside {CONFIG}; {_MEND}")
        _parts(path / WEIGHTS, said)

    def base_of(self, spec: str | Path) -> str | None:
        """Newer files have TransformerLens' name of the model, which is the hub's only where it has an owner."""
        folder = local_folder(spec)
        name = _said(folder).get("model_name")
        return located(name, folder) if isinstance(name, str) and "/" in name else None

    def insertions(self, folder: Path, config: PretrainedConfig, view: View, device: torch.device) -> list[Insertion]:
        from autointerp.evidence.hooked import Insertion
        from autointerp.evidence.hookpoints import resolve

        said, file = _said(folder), folder / WEIGHTS
        parts, spec = _parts(file, said), f"{said['base_sae_release']}/{said['base_sae_id']}"
        m, d = parts.weight.shape
        dictionary = trained_on(f"adapter {file}", view, [spec], m, None, device)
        if not d == dictionary.d_in == config.get_text_config().hidden_size:
            raise InputError(
                f"adapter {file}: reads width {d}, its SAE {dictionary.d_in}, the base model's residual width is"
                f" {config.get_text_config().hidden_size}: give --base its own"
            )
        return [Insertion(resolve(dictionary.hook or view.hook, config), _function(parts, said, dictionary, device))]


def _said(folder: Path) -> dict[str, Any]:
    from autointerp.evidence.weight_files import read_json

    if not (folder / CONFIG).is_file():
        raise InputError(f"adapter {folder}: no {CONFIG} beside {WEIGHTS}; {_MEND}")
    said = read_json(folder / CONFIG, "adapter")
    for key in ("base_sae_release", "base_sae_id"):
        if not isinstance(said.get(key), str):
            raise InputError(f"adapter {folder}: {CONFIG} has no {key}; {_MEND}")
    if said.get("use_lora_adapter"):
        raise InputError(
            f"adapter {folder}: its linear map is a LoRA itself, which is not read; merge it, then {_MEND}"
        )
    if said.get("fusion_mode", "additive") not in ("additive", "multiplicative"):
        raise InputError(f"adapter {folder}: {CONFIG} has fusion_mode {said['fusion_mode']!r}; {_MEND}")
    return said


def _parts(file: Path, said: dict[str, Any]) -> Parts:
    """InputError for what is missing, misshapen or not finite."""
    state = read_state(file)
    prefix = next((prefix for prefix in _LINEAR if f"{prefix}weight" in state), _LINEAR[0])
    weight, bias = (_take(file, state, f"{prefix}{part}") for part in ("weight", "bias"))
    if weight.ndim != 2:
        raise InputError(f"adapter {file}: {prefix}weight has shape {list(weight.shape)}, want [m, d]; {_MEND}")
    m, threshold, magnitude = len(weight), None, None
    activation = _activation(file, said, prefix)
    if activation == "jump_relu":
        key = "1.log_threshold" if "1.log_threshold" in state else "log_threshold"
        threshold = _take(file, state, key).float().exp()
    elif activation == "soft_threshold":
        threshold = _take(file, state, "soft_threshold")
    if said.get("use_steering_magnitude"):  # files from before it was saved: 1, as their loader has it
        magnitude = state.get("steering_magnitude")
    for key, vector in (("bias", bias), ("threshold", threshold), ("steering_magnitude", magnitude)):
        if vector is not None:
            check_shape(file, key, vector, (m,), f"{prefix}weight {list(weight.shape)}")
    return Parts(weight, bias, activation, threshold, magnitude)


def _activation(file: Path, said: dict[str, Any], prefix: str) -> str | None:
    if "fusion_mode" in said or not prefix:
        return None
    if said.get("use_jump_relu"):
        return "jump_relu"
    activation = "soft_threshold" if said.get("use_soft_threshold") else said.get("activation_type", "relu")
    if activation not in ACTIVATIONS:
        raise InputError(
            f"adapter {file.parent}: activation_type {activation!r}, want {', '.join(ACTIVATIONS)}; {_MEND}"
        )
    return activation


def _take(file: Path, state: dict[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise InputError(f"adapter {file}: no {key} in it; {_MEND}")
    return state[key]


def _function(parts: Parts, said: dict[str, Any], dictionary: Dictionary, device: torch.device) -> Any:
    import torch

    from autointerp.evidence.dictionaries.kernels import Linear
    from autointerp.evidence.hook_functions import Steering, jump_relu, soft_threshold

    if not isinstance(dictionary, Linear):
        raise InputError(f"{dictionary.format}: FSRL steers SAEs with a linear encoder; give --sae the one it used")
    threshold = torch.empty(0) if parts.threshold is None else parts.threshold.float().to(device)
    activations: dict[str | None, Callable[[Tensor], Tensor]] = {
        None: lambda v: v,
        "relu": torch.relu,
        "jump_relu": jump_relu(threshold),
        "soft_threshold": soft_threshold(threshold),
    }
    centred = dictionary.subtract_b_dec and "fusion_mode" not in said
    return Steering(
        dictionary,
        parts.weight,
        parts.bias,
        centre=dictionary.b_dec if centred else torch.zeros(dictionary.d_in),
        magnitude=torch.ones(dictionary.d_sae) if parts.magnitude is None else parts.magnitude.float().clamp(0, 1),
        activation=activations[parts.activation],
        multiplies=said.get("fusion_mode") == "multiplicative",
        rectified=parts.activation is not None,
    ).to(device)


ADAPTERS.register("fsrl")(FsrlFormat())
