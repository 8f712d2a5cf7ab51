"""FSRL folders of every generation, against sae_lens's own encode and decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from safetensors.torch import save_file
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.dictionaries import load_dictionary
from autointerp.evidence.paired import PairedModel
from tests import tiny
from tests.evidence.test_hooked import by_hand
from tests.evidence.test_paired import plainly
from tests.evidence.world import HOOK, LATENTS

NAMED = {"base_sae_release": "some-release", "base_sae_id": "layer_2/width_48"}
SIZE = (LATENTS, tiny.WIDTH)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


W, B = 0.2 * draw(*SIZE), draw(LATENTS, seed=1)
THRESHOLD, MAGNITUDE = draw(LATENTS, seed=2).abs(), 2 * draw(LATENTS, seed=3)
LINEAR = {"adapter_linear.weight": W, "adapter_linear.bias": B}
OLD = {"0.weight": W, "0.bias": B}


def soft(v: Tensor) -> Tensor:
    return v.sign() * (v.abs() - THRESHOLD).clamp_min(0)


def jump(v: Tensor) -> Tensor:
    return torch.where(v > THRESHOLD, v, 0.0)


# The config, the weights, and z' of z and v = W x' + b.
GENERATIONS = {
    "soft_threshold": (
        {"activation_type": "soft_threshold", "use_steering_magnitude": True, "model_name": "gemma-2-2b"},
        LINEAR | {"soft_threshold": THRESHOLD, "steering_magnitude": MAGNITUDE},
        lambda z, v: (z + soft(v) * MAGNITUDE.clamp(0, 1)).relu(),
    ),
    "soft_threshold without magnitude": (
        {"use_soft_threshold": True},
        LINEAR | {"soft_threshold": THRESHOLD, "steering_magnitude": MAGNITUDE},
        lambda z, v: (z + soft(v)).relu(),
    ),
    "jump_relu": (
        {"activation_type": "jump_relu", "use_steering_magnitude": True, "bandwidth": 0.001},
        LINEAR | {"log_threshold": THRESHOLD.log()},
        lambda z, v: z + jump(v),
    ),
    "relu": ({"activation_type": "relu"}, LINEAR, lambda z, v: z + v.relu()),
    "use_jump_relu": (
        {"use_jump_relu": True, "jump_relu_bandwidth": 0.001},
        OLD | {"1.log_threshold": THRESHOLD.log()},
        lambda z, v: z + jump(v),
    ),
    "0.weight": ({}, OLD, lambda z, v: z + v.relu()),
    "weight": ({"use_jump_relu": False}, {"weight": W, "bias": B}, lambda z, v: z + v),
    "additive": ({"fusion_mode": "additive", "use_lora_adapter": False}, OLD, lambda z, v: z + v),
    "multiplicative": ({"fusion_mode": "multiplicative"}, OLD, lambda z, v: z * (1 + v)),
}


@pytest.fixture(scope="module", params=[True, False], ids=["b_dec subtracted", "not subtracted"])
def sae(request, tmp_path_factory):
    made = StandardSAE(StandardSAEConfig(d_in=tiny.WIDTH, d_sae=LATENTS, apply_b_dec_to_input=request.param))
    with torch.no_grad():
        made.W_enc.copy_(draw(*SIZE[::-1], seed=4))
        made.W_dec.copy_(draw(*SIZE, seed=5) / 5)
        made.b_enc.copy_(draw(LATENTS, seed=6))
        made.b_dec.copy_(draw(tiny.WIDTH, seed=7))
    made.cfg.metadata.hook_name = HOOK
    path = tmp_path_factory.mktemp("sae") / "sae"
    made.save_model(path)
    return path


def saved(folder: Path, config: dict, weights: dict[str, Tensor]) -> Path:
    folder.mkdir()
    (folder / "fsrl_adapter_config.json").write_text(json.dumps(NAMED | config))
    save_file({key: value.clone() for key, value in weights.items()}, folder / "adapter_weights.safetensors")
    return folder


def loaded(folder: Path, base: Path, sae: Path) -> PairedModel:
    return PairedModel.load(folder, base, HOOK, device="cpu", sae=str(sae), dictionary=load_dictionary(sae))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_by_hand(generation, sae, gpt2_base, tmp_path):
    config, weights, steered = GENERATIONS[generation]
    folder = saved(tmp_path / "a", config, weights)
    found = adapters.detect(folder)
    assert (found.name, found.base_of(folder)) == ("fsrl", None)
    theirs, ids, plain = SAE.load_from_disk(sae), tiny.token_ids(), tiny.model("gpt2")
    centred = theirs.cfg.apply_b_dec_to_input and "fusion_mode" not in config

    def formula(x: Tensor) -> Tensor:
        z = theirs.encode(x)
        return theirs.decode(steered(z, (x - centred * theirs.b_dec) @ W.T + B)) + (x - theirs.decode(z))

    x_base, x_adapted = loaded(folder, gpt2_base, sae).activations(ids)
    with torch.no_grad(), by_hand(plain, HOOK, formula):
        expected = plainly(plain, "transformer.h.2", "output", ids)
    assert torch.allclose(x_adapted, expected, atol=2e-3)
    assert not torch.allclose(x_base, x_adapted, atol=1e-2)


def test_a_magnitude_of_zero_changes_nothing(sae, gpt2_base, tmp_path):
    config = {"activation_type": "relu", "use_steering_magnitude": True}
    folder = saved(tmp_path / "a", config, LINEAR | {"steering_magnitude": -MAGNITUDE.abs()})
    assert loaded(folder, gpt2_base, sae).pair.first_changed_layer is None


def test_the_sae_of_another_layer_is_not_taken_for_its_own(sae, gpt2_base, tmp_path):
    folder = saved(tmp_path / "a", {"base_sae_id": "layer_1/width_48"}, LINEAR)
    with pytest.raises(InputError, match="SAE some-release/layer_1/width_48"):
        loaded(folder, gpt2_base, sae)


def test_refused_in_one_line(sae, gpt2_base, tmp_path):
    def refused(said: str, config: dict, weights: dict[str, Tensor], check=adapters.detect) -> None:
        folder = saved(tmp_path / str(len(list(tmp_path.iterdir()))), config, weights)
        with pytest.raises(InputError, match=said) as caught:
            check(folder)
        assert "\n" not in str(caught.value)

    refused("no adapter_linear.weight in it", {}, {"scale": B})
    refused("no soft_threshold in it", {"activation_type": "soft_threshold"}, LINEAR)
    refused(r"bias has shape \[3\]", {}, LINEAR | {"adapter_linear.bias": torch.ones(3)})
    refused(r"threshold has shape \[3\]", {"use_jump_relu": True}, LINEAR | {"log_threshold": torch.ones(3)})
    refused("activation_type 'gelu', want", {"activation_type": "gelu"}, LINEAR)
    refused("fusion_mode 'max'", {"fusion_mode": "max"}, OLD)
    refused("its linear map is a LoRA", {"fusion_mode": "additive", "use_lora_adapter": True}, OLD)
    refused("no base_sae_id", {"base_sae_id": None}, LINEAR)
    refused("holds NaN", {}, LINEAR | {"adapter_linear.bias": torch.full((LATENTS,), torch.nan)})
    wide = {"adapter_linear.weight": torch.ones(LATENTS, 5), "adapter_linear.bias": B}
    refused("reads width 5", {}, wide, lambda folder: loaded(folder, gpt2_base, sae))
    folder = saved(tmp_path / "torn", {}, LINEAR)
    (folder / "fsrl_adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"no fsrl_adapter_config\.json"):
        adapters.detect(folder)
