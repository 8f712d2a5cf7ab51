"""What the formats of adapters that act at hook points have in common; see `autointerp.evidence.hooked`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import AdapterFormat, View, local_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from autointerp.evidence.hooked import Insertion
    from autointerp.evidence.model_pair import ModelPair


class InsertingFormat(AdapterFormat):
    """A format whose adapters are functions at hook points of the base model."""

    @abstractmethod
    def insertions(self, folder: Path, config: PretrainedConfig, view: View, device: torch.device) -> list[Insertion]:
        """What is put where in the model of `config`; InputError, in one line, where it does not fit."""

    def load(self, spec: str | Path, base: str, *, dtype: str | torch.dtype, device: str | torch.device) -> ModelPair:
        raise InputError(f"adapter {spec}: say where it is looked at; give --hook")

    def load_for(
        self, spec: str | Path, base: str, view: View, *, dtype: str | torch.dtype, device: str | torch.device
    ) -> ModelPair:
        from autointerp.evidence.hooked import HookedPair
        from autointerp.evidence.loading import load_causal_lm, load_config, torch_device

        insertions = self.insertions(local_folder(spec), load_config(base), view, torch_device(device))
        return HookedPair(load_causal_lm(base, dtype=dtype, device=device), insertions)

    def load_onto(self, spec: str | Path, base: str, view: View, model: PreTrainedModel) -> ModelPair:
        from autointerp.evidence.hooked import HookedPair

        return HookedPair(model, self.insertions(local_folder(spec), model.config, view, model.device))


def read_pickled(file: Path) -> Any:
    """The tensors in a .pt or .bin file, on the CPU; InputError where it holds anything else: nothing is executed."""
    import pickle

    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(f"adapter {file}: damaged, or not plain tensors; save it again as safetensors") from error


def read_state(file: Path) -> dict[str, Tensor]:
    """A state_dict of finite tensors by name, from safetensors or a pickle; InputError otherwise."""
    import torch
    from safetensors.torch import load_file

    from autointerp.evidence.loading import check_finite
    from autointerp.evidence.weight_files import check_header

    if file.suffix == ".safetensors":
        check_header(file, "adapter")
        content: Any = load_file(file)
    else:
        content = read_pickled(file)
    if not isinstance(content, Mapping) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"adapter {file}: want tensors by name; save the module's state_dict")
    state = {str(key): value for key, value in content.items()}
    check_finite(f"adapter {file}", state.items())
    return state


def check_shape(file: Path, key: str, tensor: Tensor, wanted: tuple[int, ...], why: str) -> None:
    """InputError unless `tensor`, found under `key`, has the shape that follows from `why`."""
    if tuple(tensor.shape) != wanted:
        raise InputError(f"adapter {file}: {key} has shape {list(tensor.shape)}, {why} wants {list(wanted)}")
