"""What the formats of adapters that act at hook points have in common; see `autointerp.evidence.hooked`."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import AdapterFormat, View, local_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

    from autointerp.evidence.dictionaries import Dictionary
    from autointerp.evidence.hooked import Insertion
    from autointerp.evidence.model_pair import ModelPair


class InsertingFormat(AdapterFormat):
    """A format whose adapters are functions at hook points of the base model."""

    def matches(self, path: Path) -> bool:
        return any(file.is_file() for file in self.files(path))

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


def trained_on(
    name: str, view: View, specs: Sequence[str], m: int, layer: int | None, device: torch.device
) -> Dictionary:
    """The SAE of m latents that an adapter was trained on, where its files give no more than a name in SAELens' list.

    `specs`: each release/sae_id that the name may mean; `layer`: the block at whose hook the adapter acts, None where
    its files do not say. The run's own --sae serves where it is one of them; a local one (no entry of the list) where
    it has m latents and is of that layer, or of one that every spec names. Else the named SAE is loaded. InputError, in
    one line, where the names mean no or several SAEs of the layer, or one of another size.
    """
    from autointerp.evidence.dictionaries import load_dictionary
    from autointerp.evidence.dictionaries.saelens import listed

    mend = "give --sae the SAE that it was trained on"
    own = view.dictionary
    if own is not None and own.d_sae == m:
        at = layer_of(own.hook or view.hook)
        here = at is not None and (at == layer if layer is not None else all(names_layer(s, at) for s in specs))
        if view.sae in specs or (here and not listed(view.sae or "")):
            return own
    fitting = [spec for spec in specs if layer is None or names_layer(spec, layer)]
    if len(fitting) != 1:
        found = ", ".join(fitting[:3]) + (" …" if len(fitting) > 3 else "") or "none"
        raise InputError(f"{name} acts on {m} latents of a SAE that its config does not settle ({found}); {mend}")
    dictionary = load_dictionary(fitting[0], str(device))
    if dictionary.d_sae != m:
        raise InputError(f"{name} acts on {m} latents, SAE {fitting[0]} has {dictionary.d_sae}; {mend}")
    return dictionary


def layer_of(hook: str) -> int | None:
    """The number of the block that a hook point lies in; None where its name has no number."""
    found = re.search(r"\d+", hook)
    return int(found[0]) if found else None


def names_layer(spec: str, layer: int) -> bool:
    """Whether the sae_id of a release/sae_id has the layer among its numbers: `layer_12/width_16k/canonical`."""
    return str(layer) in re.findall(r"\d+", spec.partition("/")[2])
