"""Gemma Scope's files, of Gemma 2 and Gemma 3: the paper's arithmetic, sae_lens' JumpReLU, and bad ones in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
from safetensors.torch import save_file
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary

from .checks import DAMAGES, D, M, activations, agrees, close, draw, edited, refuses

WEIGHTS = {
    "W_enc": draw(D, M),
    "b_enc": draw(M, seed=2),
    "W_dec": draw(M, D, seed=3),
    "b_dec": draw(D, seed=4, scale=1.0),
    "threshold": draw(M, seed=5).abs() + 0.2,
}


def save(folder: Path, weights: dict[str, Tensor] = WEIGHTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    arrays: Any = {key: value.numpy() for key, value in weights.items()}
    np.savez(folder / "params.npz", **arrays)
    return folder


def save_new(folder: Path, weights: dict[str, Tensor] = WEIGHTS, **config: Any) -> Path:
    """As Gemma Scope 2 lies on the hub."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key.lower(): value.clone() for key, value in weights.items()}, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.17.output", "width": M} | config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=D, d_sae=M, apply_b_dec_to_input=False))
    sae.load_state_dict(WEIGHTS)
    z = sae.encode(x).detach()
    return z, sae.decode(z).detach()


def test_the_arithmetic(tmp_path: Path) -> None:
    x = activations()
    pre = x @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]
    z = torch.where(pre > WEIGHTS["threshold"], pre, 0.0)
    lower = {key.lower(): value for key, value in WEIGHTS.items()}
    for n, saved in enumerate((save(tmp_path / "a"), save(tmp_path / "b", lower), save_new(tmp_path / "c"))):
        dictionary = load_dictionary(saved)
        agrees(dictionary, z, z @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"], x)
        agrees(dictionary, *theirs(x), x)
        assert (dictionary.format, dictionary.prepend_bos, dictionary.context_size) == (
            "gemma_scope/jumprelu",
            True,
            1024,
        )
        assert dictionary.hook == (None if n < 2 else "blocks.17.hook_resid_post")


def test_where_it_was_trained(tmp_path: Path) -> None:
    for folder, hook in {
        "models--google--gemma-scope-2b-pt-res/snapshots/fd/layer_20/width_16k/l0_7": "blocks.20.hook_resid_post",
        "gemma-scope-9b-it-res/layer_9/width_16k/canonical": "blocks.9.hook_resid_post",
        "gemma-scope-2b-pt-mlp/layer_3/width_65k/average_l0_71": "blocks.3.hook_mlp_out",
        "gemma-scope-2b-pt-att/layer_3/width_65k/average_l0_71": "blocks.3.attn.hook_z",
        "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": None,
        "copied/layer_3": None,
    }.items():
        saved = save(tmp_path / folder)
        assert hook_of(saved) == hook_of(saved / "params.npz") == load_dictionary(saved / "params.npz").hook == hook
    for named, hook in {
        "model.layers.5.output": "blocks.5.hook_resid_post",
        "model.language_model.layers.5.output": "blocks.5.hook_resid_post",
        "model.layers.5.post_feedforward_layernorm.output": "blocks.5.hook_mlp_out",
        "model.layers.5.self_attn.o_proj.input": None,
        "strange": None,
    }.items():
        assert hook_of(save_new(tmp_path / "new", hf_hook_point_in=named)) == hook


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_damaged_weights_are_one_line(tmp_path: Path, key: str, damage: int) -> None:
    change, says = DAMAGES[damage]
    refuses(save(tmp_path, edited(WEIGHTS, **{key: change})), says.format(key=key.lower()))


@pytest.mark.parametrize("affine", [False, True])
def test_transcoders_of_gemma_3(tmp_path: Path, affine: bool) -> None:
    """Their loader in SAELens turns the affine part round: it is stored [d_in, d_out]."""
    hooks = {
        f"hf_hook_point_{side}": f"model.layers.17.{at}_feedforward_layernorm.output"
        for side, at in (("in", "pre"), ("out", "post"))
    }
    skip = {"affine_skip_connection": draw(D, D, seed=6)}
    u = activations()
    z, u_hat = theirs(u)
    dictionary = load_dictionary(save_new(tmp_path / "t", WEIGHTS | (skip if affine else {}), **hooks))
    close(dictionary.encode(torch.cat([-u, u], dim=1)), z)
    close(dictionary.decode(z, u), u_hat + (u @ skip["affine_skip_connection"] if affine else 0))
    assert (dictionary.hook_in, dictionary.hook) == ("blocks.17.mlp.hook_in", "blocks.17.hook_mlp_out")
    assert hook_of(tmp_path / "t") == "blocks.17.hook_mlp_out"


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a") / "params.npz"
    whole = path.read_bytes()
    for damaged in (whole[:-200], whole[:100], b"", b"PK\x03\x04 no", b"hello"):
        path.write_bytes(damaged)
        refuses(path, r"params.npz is corrupt, or no .npz of numbers")
    np.savez(path, W_enc=np.array([{"a": 1}], dtype=object))
    refuses(path, r"is corrupt, or no .npz of numbers .*allow_pickle")
    np.save(tmp_path / "a" / "b.npy", np.zeros(3))
    (tmp_path / "a" / "b.npy").rename(path)
    refuses(path, r"is corrupt, or no .npz of numbers")
    words: Any = {key: value.numpy().astype("U") for key, value in WEIGHTS.items()}
    np.savez(path, **words)
    refuses(path, r"is corrupt, or no .npz of numbers")
    refuses(save(tmp_path / "gemma-scope-2b-pt-transcoders" / "layer_1"), r"is a transcoder of Gemma 2")
    refuses(save_new(tmp_path / "t", hf_hook_point_out="model.layers.17.mlp.act.output"), r"is a transcoder, but")
    refuses(save_new(tmp_path / "s", WEIGHTS | {"affine_skip_connection": draw(D, D)}), r"is a transcoder, but")
    (save_new(tmp_path / "d") / "params.safetensors").write_bytes(b"no")
    refuses(tmp_path / "d", r"params.safetensors is corrupt")
