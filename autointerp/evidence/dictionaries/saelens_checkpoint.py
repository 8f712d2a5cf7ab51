"""Checkpoints that a SAELens training leaves: `{n_samples}/` and `final_{n_samples}/`, one folder below for each SAE of
a multi-SAE training.

Their `cfg.json` is the trainer's (batch-TopK is still that, not yet the JumpReLU as which it is handed on), and until
the last one the weights act on activations scaled, or whitened, as `activation_scaler.json` says; before SAELens 6.0,
`activations_store_state.safetensors`. What is read is the SAE that the training would have handed on, had it ended
there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.files import read_config, read_safetensors, take
from autointerp.evidence.tensor_files import Tensors

if TYPE_CHECKING:
    from sae_lens import SAE, TrainingSAE

TRAINER_STATE, SCALER, WHITENING = "trainer_state.pt", "activation_scaler.json", "activation_whitening.safetensors"
STORE_STATE, OLD_FACTOR = "activations_store_state.safetensors", "estimated_norm_scaling_factor"
_ESTIMATED = ("expected_average_only_in", "covariance_whitening")
"""Normalisations whose figures are measured in training and folded into the weights at its end."""
_OF_TRAINING = "decoder_init_norm"
"""A key of every config of a trainer's, and of none that it hands on."""


def is_checkpoint(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether a training left the folder, by its files or by its config."""
    beside = any((folder / name).is_file() for name in (TRAINER_STATE, SCALER, STORE_STATE))
    return beside or ("metadata" in config and _OF_TRAINING in config)


def load_checkpoint(folder: Path, config: Mapping[str, Any], name: str, device: str, dtype: str) -> SAE[Any]:
    """The SAE of a checkpoint, its normalisation folded in; InputError where that is in none of its files."""
    from sae_lens import SAE, TrainingSAE

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if "metadata" not in config:  # before 6.0 a checkpoint was saved as the SAE itself
            sae = SAE.load_from_disk(folder, device=device, dtype=dtype)
            _fold(sae, folder, config, name)
            return sae
        training = TrainingSAE.load_from_disk(folder, device=device, dtype=dtype)
        _fold(training, folder, config, name)
        return _handed_on(training)


@torch.no_grad()
def _fold(sae: SAE[Any], folder: Path, config: Mapping[str, Any], name: str) -> None:
    if (folder / SCALER).is_file():
        said = read_config(folder / SCALER, name)
        if (factor := said.get("scaling_factor")) is not None:
            sae.fold_activation_norm_scaling_factor(_checked(factor, SCALER, name))
        if said.get("has_whitening"):
            shapes = {"mean": "d", "matrix": "d d", "inverse_matrix": "d d"}
            parts, _ = take(name, read_safetensors(folder / WHITENING, name), shapes)
            mean, matrix, inverse = (part.to(sae.device) for part in parts.values())
            sae.fold_activation_whitening(mean=mean, whitening_matrix=matrix, unwhitening_matrix=inverse)
        return
    normalised = config.get("normalize_activations")
    if normalised not in _ESTIMATED and normalised is not True:  # a boolean before 4.0
        return
    stored = Tensors([folder / STORE_STATE] if (folder / STORE_STATE).is_file() else [], "SAE")
    if OLD_FACTOR not in stored.names():  # the file also holds the buffer of activations, which is not read
        raise InputError(
            f"{name}: its weights act on activations scaled by a factor that stands in {SCALER}, which is missing; copy"
            " it from the trainer's folder, or give --sae the SAE that the training saved at its end"
        )
    sae.fold_activation_norm_scaling_factor(_checked(stored.read(OLD_FACTOR).item(), STORE_STATE, name))


def _checked(factor: Any, file: str, name: str) -> float:
    if not isinstance(factor, int | float) or not 0 < factor < float("inf"):
        raise InputError(f"{name}: {file} has {factor!r} for the scaling factor, want a number above 0; copy it again")
    return float(factor)


@torch.no_grad()
def _handed_on(training: TrainingSAE[Any]) -> SAE[Any]:
    """What `save_inference_model` would write, without the disk between."""
    from sae_lens import SAE

    config = training.cfg.get_inference_sae_cfg_dict()
    state = dict(training.state_dict())
    training.process_state_dict_for_saving_inference(state)
    kind: Any = SAE.get_sae_class_for_architecture(config["architecture"])
    made = kind(SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config))
    made.process_state_dict_for_loading(state)
    made.load_state_dict(state, assign=True)
    return made
