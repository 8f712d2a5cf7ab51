"""PEFT adapters: LoRA, rsLoRA, DoRA, IA3 and whatever else changes modules of the model; `peft` itself loads them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from autointerp.errors import InputError
from autointerp.evidence.adapters.base import ADAPTERS, AdapterFormat, View, local_folder, located

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel

    from autointerp.evidence.model_pair import ModelPair
    from autointerp.evidence.peft_weights import PeftFiles
    from autointerp.evidence.tensor_files import BaseWeights
    from autointerp.evidence.weight_change import WeightChanges

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
REFERENCES = ("ref", "reference")
"""Names under which preference training keeps a frozen copy of the adapter that it began with, and saves it with the
trained one: TRL's own, and the one of its documentation."""


class PeftFormat(AdapterFormat):
    """`adapter_config.json` and `adapter_model.safetensors` or `.bin`."""

    name = "peft"
    generic = True

    def matches(self, path: Path) -> bool:
        return any((path / file).is_file() for file in (CONFIG, *WEIGHTS))

    def files(self, path: Path) -> list[Path]:
        return [path / file for file in (CONFIG, *WEIGHTS) if (path / file).is_file()]

    def check(self, path: Path) -> None:
        from autointerp.evidence.weight_files import check_finite_file, check_header, read_json

        weights = _weights(path)
        if not (path / CONFIG).is_file():
            raise InputError(
                f"adapter {path}: {weights} without {CONFIG}; copy the one that the trainer wrote beside it"
            )
        if weights is None:
            raise InputError(
                f"adapter {path}: {CONFIG} without {WEIGHTS[0]}; copy the one that the trainer wrote beside it"
            )
        if "peft_type" not in read_json(path / CONFIG, "adapter"):
            raise InputError(f"adapter {path}: {CONFIG} has no peft_type; save it again with PEFT's save_pretrained")
        if weights.endswith(".safetensors"):
            check_header(path / weights, "adapter")
            check_finite_file(path / weights, f"adapter {path}")
        else:
            _check_pickled(path / weights, f"adapter {path}")

    def base_of(self, spec: str | Path) -> str | None:
        from autointerp.evidence.weight_files import read_json

        folder = local_folder(spec)
        return located(read_json(folder / CONFIG, "adapter").get("base_model_name_or_path"), folder)

    def assumed(self, spec: str | Path) -> str | None:
        return without_reference(local_folder(spec))

    def load(self, spec: str | Path, base: str, *, dtype: str | torch.dtype, device: str | torch.device) -> ModelPair:
        return load_active([local_folder(spec)], base, dtype=dtype, device=device)

    def load_onto(self, spec: str | Path, base: str, view: View, model: PreTrainedModel) -> ModelPair:
        return load_active_onto([local_folder(spec)], base, model)

    def weight_changes(self, spec: str | Path, base: BaseWeights | None) -> WeightChanges:
        from autointerp.evidence.peft_weights import peft_changes

        return peft_changes([peft_files(local_folder(spec), base)])


def without_reference(folder: Path) -> str | None:
    """What is said where an adapter beneath `folder` is taken for the reference of a preference training."""
    found = next((name for name in REFERENCES if (folder / name / CONFIG).is_file()), None)
    if found is None:
        return None
    return (
        f"{found}, taken for the frozen reference of a preference training, is no part of the adapter;"
        f" --since {folder / found} asks what came after it"
    )


def load_active(
    folders: Sequence[Path], base: str, *, dtype: str | torch.dtype, device: str | torch.device
) -> ModelPair:
    """The base with the adapters in these folders, all of them active, which act in this order."""
    from autointerp.evidence.loading import load_causal_lm
    from autointerp.evidence.model_pair import PeftPair, TwoModels

    alter_base = _alter_base(folders)
    peft = _attached(load_causal_lm(base, dtype=dtype, device=device), folders, base)
    if not alter_base:
        return PeftPair(peft)
    # Switched off, such an adapter leaves weights that are not the base's; merged, it is a checkpoint like any.
    merged = peft.merge_and_unload()
    return TwoModels(load_causal_lm(base, dtype=dtype, device=device), merged, f"adapter {folders[0]}")


def load_active_onto(folders: Sequence[Path], base: str, model: PreTrainedModel) -> ModelPair:
    """The same on a base that is in memory, unless the adapters change its own weights."""
    from autointerp.evidence.model_pair import PeftPair

    if _alter_base(folders):
        return load_active(folders, base, dtype=model.dtype, device=model.device)
    return PeftPair(_attached(model, folders, base))


def peft_files(folder: Path, base: BaseWeights | None) -> PeftFiles:
    """The files in `folder` by what is in them."""
    from autointerp.evidence.peft_weights import PeftFiles
    from autointerp.evidence.weight_files import read_json

    return PeftFiles.open(folder, read_json(folder / CONFIG, "adapter"), folder / str(_weights(folder)), base)


def _alter_base(folders: Sequence[Path]) -> bool:
    from autointerp.evidence.model_pair import alters_base

    return any(alters_base(_config(folder)) is not None for folder in folders)


def _weights(folder: Path) -> str | None:
    return next((file for file in WEIGHTS if (folder / file).is_file()), None)


def _check_pickled(file: Path, name: str) -> None:
    """InputError unless a .bin file holds finite tensors; nothing else in it is executed."""
    import pickle

    import torch

    from autointerp.evidence.loading import check_finite

    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
        check_finite(name, tensors.items())
    except (OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        raise InputError(f"adapter {file}: damaged, or not plain tensors; save it again as safetensors") from error


def _config(folder: Path) -> PeftConfig:
    """The adapter's config; InputError for types that change no module, or that run only inside PeftModel.forward."""
    from peft import PeftConfig

    from autointerp.evidence.model_pair import acts_elsewhere

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"adapter {folder}: {CONFIG} is not one that this peft reads ({reason}); update peft"
        ) from error
    if reason := acts_elsewhere(config):
        raise InputError(f"adapter {folder} {reason}: give a LoRA-like adapter, or a checkpoint")
    return config


def _attached(model: PreTrainedModel, folders: Sequence[Path], base: str) -> PeftModel:
    """`model` with the adapters in it, all active; InputError where one does not fit it, or not the others."""
    from peft import PeftModel

    names = [f"adapter_{k}" for k in range(len(folders))]
    device = str(model.device)
    with _fitting(folders[0], base):
        peft = PeftModel.from_pretrained(model, str(folders[0]), names[0], torch_device=device)
    for name, folder in zip(names[1:], folders[1:], strict=True):
        with _fitting(folder, base):
            peft.load_adapter(str(folder), name, torch_device=device)
    if len(folders) > 1:
        try:
            peft.base_model.set_adapter(names, inference_mode=True)  # pyright: ignore[reportCallIssue]
        except ValueError as error:
            raise InputError(
                f"adapter {folders[0]} cannot be active together with {folders[1]} ({str(error).splitlines()[0]}); give"
                " --adapter one of them"
            ) from error
    return peft.eval()


@contextmanager
def _fitting(folder: Path, base: str) -> Iterator[None]:
    """Turns what PEFT says of an adapter that is not one of this model into one InputError."""
    mend = "it was trained on another model: give its own with --base"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except (ValueError, RuntimeError, KeyError, AttributeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = lines[min(1, len(lines) - 1)][:160] if lines else type(error).__name__
            raise InputError(f"adapter {folder} does not fit base {base} ({reason}); {mend}") from error
    for warning in caught:
        if "missing adapter keys" in str(warning.message):
            raise InputError(f"adapter {folder} does not fit base {base} (some of its layers have no weights); {mend}")


ADAPTERS.register("peft")(PeftFormat())
