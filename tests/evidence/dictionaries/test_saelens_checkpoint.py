"""What SAELens' own trainer leaves behind, halfway and at its end, against its SAE on scaled activations."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, SAETrainer, TrainingSAE
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler
from safetensors.torch import load_file, save_file
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary

from .checks import D, M, activations, agrees, refuses

HOOK = "blocks.2.hook_resid_post"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {"jumprelu_init_threshold": 0.1},
    "topk": {"k": 5},
    "batchtopk": {"k": 5, "topk_threshold_lr": 0.3},
    "matryoshka_batchtopk": {"k": 5, "topk_threshold_lr": 0.3, "matryoshka_widths": [16, M]},
}


def batches() -> Iterator[Tensor]:
    draw = torch.Generator().manual_seed(1)
    while True:
        yield 3 * torch.randn(64, D, generator=draw) + 1


@torch.enable_grad()
def trained(folder: Path, architecture: str, normalised: str = "none") -> Path:
    """40 steps of the real trainer; the checkpoint after half of them."""
    sae_class, config_class = get_sae_training_class(architecture)
    given: dict[str, Any] = {"normalize_activations": normalised} | ARCHITECTURES[architecture]
    config = config_class(d_in=D, d_sae=M, **given)
    config.metadata.hook_name = HOOK
    torch.manual_seed(0)
    training = SAETrainerConfig(
        total_training_samples=64 * 40,
        train_batch_size_samples=64,
        lr=0.01,
        lr_end=0.001,
        n_checkpoints=1,
        checkpoint_path=str(folder),
        save_final_checkpoint=True,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=20,
    )
    trainer: SAETrainer[Any, Any] = SAETrainer(training, sae_class(config), batches())
    trainer.fit().save_inference_model(folder / "handed_on")
    return next(path for path in folder.iterdir() if path.name.isdecimal())


def by_trainer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """z and x̂ of the trainer's own SAE, whose batch-TopK acts by its threshold outside of training."""
    sae: Any = TrainingSAE.load_from_disk(folder)
    scaler = ActivationScaler()
    scaler.load(folder / "activation_scaler.json")
    scaled = scaler.scale(x)
    if "batchtopk" in sae.cfg.architecture():
        assert sae.cfg.rescale_acts_by_decoder_norm
        pre = ((scaled - sae.b_dec) @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
        z = torch.where(pre > sae.topk_threshold, pre, 0.0)
    else:
        z = sae.encode(scaled)
    x_hat = scaler.unscale(sae.decode(z))
    # Activations that carry the decoder norm carry its units, which are those of x again once the scale is folded.
    per_norm = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    return z / scaler.scaling_factor if per_norm and scaler.scaling_factor else z, x_hat


@pytest.mark.parametrize("normalised", ["none", "expected_average_only_in"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_halfway_and_at_its_end(architecture, normalised, tmp_path):
    half, x = trained(tmp_path, architecture, normalised), activations()
    (final,) = tmp_path.glob("final_*")
    scaler = json.loads((half / "activation_scaler.json").read_text())
    assert (scaler["scaling_factor"] is not None) == (normalised != "none")
    z, x_hat = by_trainer(half, x)
    dictionary = load_dictionary(half)
    agrees(dictionary, z, x_hat, x)
    assert dictionary.hook == hook_of(half) == HOOK
    handed_on = SAE.load_from_disk(tmp_path / "handed_on")
    z = handed_on.encode(x)
    agrees(load_dictionary(final), z, handed_on.decode(z), x)
    assert dictionary.format == load_dictionary(final).format == f"saelens/{handed_on.cfg.architecture()}"
    assert not torch.allclose(dictionary.W_dec, load_dictionary(final).W_dec, atol=1e-3)


@torch.no_grad()
def test_whitened_activations(tmp_path):
    half, x = trained(tmp_path, "jumprelu", "covariance_whitening"), activations()
    agrees(load_dictionary(half), *by_trainer(half, x), x)
    (half / "activation_whitening.safetensors").unlink()
    refuses(half, "no activation_whitening.safetensors")


@torch.no_grad()
def test_without_the_files_of_the_trainer(tmp_path):
    """cfg.json and the weights alone: enough where nothing was scaled, refused where something was."""
    for normalised in ("none", "expected_average_only_in"):
        half = trained(tmp_path / normalised, "batchtopk", normalised)
        z, x_hat = by_trainer(half, activations())
        (half / "activation_scaler.json").unlink()
        (half / "trainer_state.pt").unlink()
        if normalised == "none":
            agrees(load_dictionary(half), z, x_hat, activations())
        else:
            refuses(half, "a factor that stands in activation_scaler.json, which is missing; copy")
            (half / "activation_scaler.json").write_text('{"scaling_factor": 0}')
            refuses(half, "activation_scaler.json has 0 for the scaling factor")


@torch.no_grad()
def test_before_6_0_the_scale_stood_with_the_activations_store(tmp_path):
    half, x = trained(tmp_path, "standard", "expected_average_only_in"), activations()
    z, x_hat = by_trainer(half, x)
    factor = json.loads((half / "activation_scaler.json").read_text())["scaling_factor"]
    old = tmp_path / "old"
    old.mkdir()
    shutil.copy(half / "sae_weights.safetensors", old)
    config = {
        "architecture": "standard", "d_in": D, "d_sae": M, "hook_name": HOOK, "activation_fn_str": "relu",
        "normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": True, "dtype": "float32",
    }  # fmt: skip
    (old / "cfg.json").write_text(json.dumps(config))
    stored = {"n_dataset_processed": torch.tensor(7), "estimated_norm_scaling_factor": torch.tensor(factor)}
    save_file(stored, old / "activations_store_state.safetensors")
    agrees(load_dictionary(old), z, x_hat, x)
    save_file({"n_dataset_processed": torch.tensor(7)}, old / "activations_store_state.safetensors")
    refuses(old, "a factor that stands in")


def test_damaged_and_many(tmp_path):
    half = trained(tmp_path / "a", "standard")
    many = tmp_path / "many"
    shutil.copytree(half, many / "sae_1")
    refuses(many, f"give --sae {many / 'sae_1'}")
    weights = load_file(half / "sae_weights.safetensors")
    save_file(weights | {"W_enc": torch.full((D, M), torch.nan)}, half / "sae_weights.safetensors")
    refuses(half, "W_enc holds NaN")
    save_file({key: value for key, value in weights.items() if key != "b_enc"}, half / "sae_weights.safetensors")
    refuses(half, "sae_lens cannot load it .*b_enc")
