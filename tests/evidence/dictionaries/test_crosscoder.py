"""Crosscoders: what of them becomes the dictionary, scales folded in, relative norms, and bad ones in one line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary
from autointerp.evidence.dictionaries.crosscoder import Crosscoder, relative_norm
from autointerp.evidence.extras import ScalingSums
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.selection import SELECTORS, Question
from autointerp.evidence.statistics import ChangeStatistics, PairedCodes
from autointerp.evidence.stream import joint_codes, to_codes

from .checks import D, M, activations, agrees, close, draw, edited, nan, refuses

STATE = {
    "W_enc": draw(2, D, M),
    "W_dec": draw(M, 2, D, seed=2),
    "b_enc": draw(M, seed=3),
    "b_dec": draw(2, D, seed=4),
}
HOOK = "blocks.14.hook_resid_pre"


def save(folder: Path, state: dict[str, Tensor] = STATE, version: int | None = 0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = (f"{version}.pt", f"{version}_cfg.json") if version is not None else ("cc_weights.pt", "cfg.json")
    torch.save(state, folder / weights)
    settings = {"d_in": D, "dict_size": M, "enc_dtype": "fp32", "hook_point": HOOK, "model_name": "gemma-2-2b"}
    (folder / config).write_text(json.dumps(settings))
    return folder


def by_hand(x_base: Tensor, x_trained: Tensor) -> tuple[Tensor, Tensor]:
    """The crosscoder's own forward pass: z [n, m] and both reconstructions [n, 2, d]."""
    x = torch.stack([x_base, x_trained], dim=1)
    z = (torch.einsum("bmd,mdh->bh", x, STATE["W_enc"]) + STATE["b_enc"]).relu()
    return z, torch.einsum("bh,hmd->bmd", z, STATE["W_dec"]) + STATE["b_dec"]


@pytest.mark.parametrize("version", [0, 12, None])
def test_each_side_where_both_models_agree(tmp_path: Path, version: int | None) -> None:
    x = activations()
    z, both = by_hand(x, x)
    saved = save(tmp_path, version=version)
    for spec, side in ((saved, 0), (f"{saved}#side=base", 0), (f"{saved}#side=trained", 1)):
        dictionary = load_dictionary(spec)
        agrees(dictionary, z, both[:, side], x)
        assert (dictionary.hook, dictionary.format) == (HOOK, f"crosscoder/{('base', 'trained')[side]}")
    assert hook_of(saved) == HOOK


def test_scales_are_folded_in(tmp_path: Path) -> None:
    x = activations()
    z, both = by_hand(0.5 * x, 0.25 * x)
    said = f"{save(tmp_path)}#scale_base=0.5&scale_trained=0.25"
    agrees(load_dictionary(said), z, both[:, 0] / 0.5, x)
    agrees(load_dictionary(f"{said}&side=trained"), z, both[:, 1] / 0.25, x)


def test_relative_norms() -> None:
    W_dec = torch.zeros(4, 2, D)
    W_dec[0, 0, 3], W_dec[1, 1, 3], W_dec[2, :, 5] = 2.0, 3.0, 1.0
    close(relative_norm(W_dec), torch.tensor([0.0, 1.0, 0.5, 0.5]))
    close(relative_norm(W_dec, 0.5, 1.5)[2:3], torch.tensor([(1 / 1.5) / (1 / 1.5 + 2)]))


def test_the_dictionary_carries_them(tmp_path: Path) -> None:
    dictionary = load_dictionary(save(tmp_path))
    assert isinstance(dictionary, Crosscoder)
    norms = STATE["W_dec"].norm(dim=2)
    close(dictionary.relative_norm, norms[:, 1] / norms.sum(1))


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.25)])
def test_its_own_code_of_both_models(tmp_path: Path, scales: tuple[float, float]) -> None:
    dictionary = load_dictionary(f"{save(tmp_path)}#scale_base={scales[0]}&scale_trained={scales[1]}")
    x_base, x_trained = activations(), activations().roll(1, 0)
    z, _ = by_hand(scales[0] * x_base, scales[1] * x_trained)
    codes = joint_codes(dictionary, x_base, x_trained)
    assert codes is not None
    close(torch.from_numpy(codes.z.toarray()), z)
    longer = STATE["W_dec"][torch.arange(M), STATE["W_dec"].norm(dim=2).argmax(1)]
    for scale, directions in zip(scales, (codes.read_base, codes.read_adapted), strict=True):
        close(torch.from_numpy(directions), scale * longer)


def scaling(folder: Path, amounts: Tensor, own: dict[str, list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """ν and change by `latent-scaling` of models in which latent j is e_j, those in `own` in one of the two alone."""
    state = {key: torch.zeros_like(value) for key, value in STATE.items()}
    state["b_dec"][:, -1] = 1  # where no latent is
    eye, x = torch.eye(M)[:, :D], {side: amounts.clone() for side in ("base", "trained")}
    for at, side in enumerate(x):
        state["W_dec"][:, at], state["W_enc"][at] = eye, eye.T / 2
        for latents in (own[other] for other in own if other != side):
            state["W_dec"][latents, at] = 0
            x[side][:, latents] = 0
    dictionary = load_dictionary(save(folder, state))
    n = len(amounts)
    order = np.arange(n) // 50
    codes = PairedCodes(
        base=to_codes(dictionary, x["base"]),
        adapted=to_codes(dictionary, x["trained"]),
        x_base=x["base"].numpy(),
        x_adapted=x["trained"].numpy(),
        order=order,
        position=np.arange(n) % 50,
        place=np.zeros(n, dtype=np.int64),
        joint=joint_codes(dictionary, x["base"], x["trained"]),
    )
    statistics = ChangeStatistics(M, D, np.arange(D), 0, [ScalingSums])
    statistics.add(codes, dictionary.W_dec.numpy(), dictionary.b_dec.numpy())
    question = Question(FittedMap(statistics, dictionary.W_dec), 3, 0.05, 0)
    ranking = SELECTORS.get("latent-scaling")(question)
    assert sorted(ranking.latents) == sorted(own["base"] + own["trained"])
    return ranking.columns["statistic"], ranking.change


def test_latent_scaling_finds_what_one_model_has_alone(tmp_path: Path) -> None:
    """Though the base's decoder, by which the dictionary decodes, has no direction for it."""
    amounts = activations(2000).abs()
    amounts[:, 12:] = 0
    ratio, change = scaling(tmp_path, amounts, {"base": [5], "trained": [3, 7]})
    np.testing.assert_allclose(ratio[[3, 7, 0]], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(change[[3, 7, 5, 0, 11]], [1, 1, 1, 0, 0], atol=1e-6)
    assert np.isnan(change[12:]).all()  # fire nowhere


def test_the_last_version_of_a_folder(tmp_path: Path) -> None:
    save(tmp_path, edited(STATE, b_enc=lambda w: w - 100), version=9)
    save(tmp_path, version=10)
    assert load_dictionary(tmp_path).encode(activations()).any()
    assert not load_dictionary(tmp_path / "9.pt").encode(activations()).any()


@pytest.mark.parametrize("key", STATE)
def test_damaged_weights_are_one_line(tmp_path: Path, key: str) -> None:
    refuses(save(tmp_path / "a", edited(STATE, **{key: lambda _w: None})), rf"lack.* {key}")
    refuses(save(tmp_path / "b", edited(STATE, **{key: nan})), rf"{key} holds NaN")
    refuses(save(tmp_path / "c", edited(STATE, **{key: lambda w: w[..., 1:]})), r"has shape .*, want")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    three = {"W_enc": draw(3, D, M), "W_dec": draw(M, 3, D), "b_enc": draw(M), "b_dec": draw(3, D)}
    refuses(save(tmp_path / "a", three), r"a crosscoder of 3 models or layers")
    saved = save(tmp_path / "b")
    refuses(f"{saved}#side=left", r"side=left is neither base nor trained")
    refuses(f"{saved}#scale_base=0", r"scale_base=0 is no number above 0")
    refuses(f"{saved}#scale_trained=x", r"scale_trained=x is no number above 0")
    (saved / "0.pt").write_bytes(b"no")
    refuses(saved, r"0.pt is corrupt")
    (saved / "0_cfg.json").write_text("{")
    refuses(saved, r"0_cfg.json is not readable JSON")
