"""Folders of ISaeRFT, FSRL, pyreft and steering vectors, by their weights: as our own kinds, and planted truths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from scipy.stats import spearmanr
from torch import Tensor

from autointerp import adapters
from autointerp.demo import ORGANISM
from autointerp.errors import InputError
from autointerp.evidence.latent_weights import LatentReading, read_latents
from autointerp.evidence.weights_evidence import WeightsEvidence
from autointerp.run import Run
from tests.evidence.test_latent_weights import DICTIONARY, SAE, D, H, M, drawn, noise, told
from tests.evidence.test_latent_weights import saved as ours

UNIT = torch.nn.functional.normalize(DICTIONARY.W_dec.float(), dim=1)


def run_of(folder: Path, hook: str | None = None) -> Run:
    return Run.load(folder, base=str(ORGANISM / "model"), sae=SAE, selector="weights", hook=hook, need=()).with_hook(
        DICTIONARY.hook
    )


def reading(folder: Path) -> LatentReading:
    return read_latents(run_of(folder), DICTIONARY)


def isaerft(folder: Path, state: Mapping[str, Tensor], layer: int = 2) -> Path:
    folder.mkdir(parents=True)
    said = {"peft_type": "ISAERFT", "base_model_name_or_path": None, "target_hooks": [["some", "layer_2/width_2k"]]}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    torch.save(dict(state), folder / f"blocks_{layer}_hook_resid_post.pt")
    return folder


def fsrl(folder: Path, weight: Tensor, bias: Tensor) -> Path:
    folder.mkdir(parents=True)
    said = {"base_sae_release": "some", "base_sae_id": "layer_2/width_2k", "activation_type": "relu"}
    (folder / "fsrl_adapter_config.json").write_text(json.dumps(said))
    weights = {"adapter_linear.weight": weight, "adapter_linear.bias": bias}
    save_file(weights, folder / "adapter_weights.safetensors")
    return folder


def loreft(folder: Path, R: Tensor, W: Tensor, bias: Tensor) -> Path:
    """R and W [r, d]."""
    folder.mkdir(parents=True)
    state = {"weight": W, "bias": bias, "rotate_layer": R.T.contiguous()}
    torch.save(state, folder / "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin")
    said = {"intervention_types": ["<class 'pyreft.interventions.LoreftIntervention'>"], "mode": "parallel"}
    (folder / "config.json").write_text(json.dumps(said))
    return folder


NETWORK = {"W_in": noise(H, M, seed=1), "b_in": noise(H, seed=2), "W_out": noise(M, H, seed=3)}
LINEAR = {"W_in": NETWORK["W_in"], "W_out": NETWORK["W_out"]}
NOTHING = {"sequential.0.bias": torch.zeros(H), "sequential.1.bias": torch.zeros(M)}
SAME = {
    "bias": (lambda: adapters.Bias(DICTIONARY), {"bias": noise(M)}, {"sequential.0.bias": noise(M)}),
    "scaling": (lambda: adapters.Scaling(DICTIONARY), {"scale": noise(M)}, {"scaling_factors": noise(M)}),
    "network": (
        lambda: adapters.Ffnn(DICTIONARY, H),
        NETWORK,
        {
            "sequential.0.weight": NETWORK["W_in"],
            "sequential.0.bias": NETWORK["b_in"],
            "sequential.2.weight": NETWORK["W_out"],
            "sequential.2.bias": torch.zeros(M),
        },
    ),
    "two maps": (
        lambda: adapters.LowRank(DICTIONARY, H),
        LINEAR,
        {"sequential.0.weight": LINEAR["W_in"], "sequential.1.weight": LINEAR["W_out"], **NOTHING},
    ),
}


@pytest.mark.parametrize("kind", SAME)
def test_isaerft_as_our_own_of_the_same_weights(kind: str, tmp_path: Path) -> None:
    make, weights, state = SAME[kind]
    wanted, got = reading(ours(make(), tmp_path / "ours", weights)), reading(isaerft(tmp_path / "theirs", state))
    for name in ("writes", "reads", "statistic", "q_value"):
        np.testing.assert_allclose(getattr(got.scores, name), getattr(wanted.scores, name), rtol=1e-4, atol=1e-6)
    assert (got.note, got.role, told(got.units)) == (wanted.note, wanted.role, told(wanted.units))
    latents = drawn(0, 3)
    assert [(w.latent, w.target_latent) for w in got.writes(latents)] == [
        (w.latent, w.target_latent) for w in wanted.writes(latents)
    ]


def test_a_single_map_between_latents(tmp_path: Path) -> None:
    read, written, kept = drawn(4, 3)
    weight = 1e-3 * noise(M, M)
    weight[written, read], weight[kept, kept] = 5.0, -2.0
    found = reading(isaerft(tmp_path / "a", {"sequential.0.weight": weight, "sequential.0.bias": torch.zeros(M)}))
    assert set(found.ranking(3, 0.05).latents) == {read, written, kept}
    assert found.columns["gain"][kept] == -2.0
    first = found.writes([read])[0]
    assert (first.kind, first.target_latent, first.weight) == ("raises", written, 5.0)


@pytest.mark.parametrize("seed", range(3))
def test_planted_steering_of_fsrl(seed: int, tmp_path: Path) -> None:
    """Latents steered wherever another one's direction is in the stream."""
    latents = drawn(seed, 10)
    steered, seen = latents[:5], latents[5:]
    weight = 1e-3 * noise(M, D, seed=seed)
    weight[steered] += 2 * UNIT[seen]
    found = reading(fsrl(tmp_path / "a", weight, torch.zeros(M)))
    ranking = found.ranking(50, 0.05)
    assert set(ranking.latents[:5]) == set(steered)
    assert len(set(ranking.latents) & set(seen)) >= 4
    roles = dict(zip(ranking.latents, ranking.roles, strict=True))
    assert {roles[j] for j in steered} == {"written"}


@pytest.mark.parametrize("seed", range(3))
def test_planted_map_of_loreft_however_it_is_spanned(seed: int, tmp_path: Path) -> None:
    written, read = drawn(seed, 6)[:3], drawn(seed, 6)[3:]
    R = torch.linalg.qr(UNIT[written].T).Q.T.contiguous()
    coordinates = UNIT[written] @ R.T  # of the planted directions in the subspace [3, 3]
    W = R + 3 * coordinates.T @ UNIT[read] + 1e-3 * noise(3, D, seed=seed)
    bias = torch.zeros(3)
    found = reading(loreft(tmp_path / "a", R, W, bias))
    ranking = found.ranking(50, 0.05)
    assert len(set(ranking.latents) & {*written, *read}) >= 5
    assert {unit.name for unit in found.units} == {"component 0", "component 1", "component 2"}
    Q = torch.linalg.qr(noise(3, 3, seed=seed + 9)).Q
    turned = reading(loreft(tmp_path / "b", Q @ R, Q @ W, Q @ bias))
    for name in ("writes", "reads"):
        assert spearmanr(getattr(found.scores, name), getattr(turned.scores, name))[0] == pytest.approx(1, abs=1e-6)
    assert told(found.units) == told(turned.units)


def test_a_steering_vector_is_what_it_points_at(tmp_path: Path) -> None:
    latent = drawn(7, 1)[0]
    folder = tmp_path / "a"
    folder.mkdir()
    torch.save(4 * UNIT[latent], folder / "vector.pt")
    with WeightsEvidence.load(run_of(folder)) as evidence:
        selection, writes = evidence.select()
    assert selection.latents[0] == latent
    assert selection.columns["role"][latent] == "static"
    assert writes == []
    assert "length 4, the same on every token" in str(selection.figures["notes"])


def test_an_untrained_one_changes_nothing(tmp_path: Path) -> None:
    R = torch.linalg.qr(noise(D, 3)).Q.T.contiguous()
    found = reading(loreft(tmp_path / "a", R, R, torch.zeros(3)))
    assert found.note.startswith("changes nothing")
    assert found.ranking(50, 0.05).latents == []


def test_refused_in_one_line(tmp_path: Path) -> None:
    elsewhere = isaerft(tmp_path / "elsewhere", {"sequential.0.bias": noise(M)}, layer=1)
    deep = {f"sequential.{n}.{part}": noise(*shape) for n in (0, 2, 4) for part, shape in _shapes(n).items()}
    for folder, says in (
        (elsewhere, "blocks.1.hook_resid_post"),
        (isaerft(tmp_path / "deep", deep), "an adapter of 3 linear maps"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            reading(folder)
        assert "\n" not in str(caught.value)
    vector = tmp_path / "vector"
    vector.mkdir()
    torch.save(UNIT[0].clone(), vector / "v.pt")
    baseless = Run.load(vector, sae=SAE, selector="weights", need=()).with_hook(DICTIONARY.hook)
    with pytest.raises(InputError, match="give --base its folder"):
        read_latents(baseless, DICTIONARY)


def _shapes(n: int) -> dict[str, tuple[int, ...]]:
    out, width = (M if n == 4 else H), (M if n == 0 else H)
    return {"weight": (out, width), "bias": (out,)}
