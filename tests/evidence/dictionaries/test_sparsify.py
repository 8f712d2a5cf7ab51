"""sparsify's folders: its own arithmetic by hand, its library where it is installed, and bad ones in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary

from .checks import DAMAGES, D, M, activations, agrees, close, draw, edited, refuses

CONFIG: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 4,
    "normalize_decoder": True,
    "num_latents": 0,
    "k": 8,
    "multi_topk": False,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}


def weights() -> dict[str, Tensor]:
    return {
        "encoder.weight": draw(M, D),
        "encoder.bias": draw(M, seed=2),
        "W_dec": draw(M, D, seed=3),
        "b_dec": draw(D, seed=4, scale=1.0),
    }


def save(folder: Path, tensors: dict[str, Tensor] | None = None, **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights() if tensors is None else tensors, folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps(CONFIG | config))
    return folder


def by_hand(x: Tensor, **config: Any) -> tuple[Tensor, Tensor]:
    w, settings = weights(), CONFIG | config
    pre = (x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    z = torch.zeros_like(pre)
    for row, p in zip(z, pre, strict=True):
        if settings.get("signed"):
            kept = p.abs().argsort(descending=True)[: settings["k"]]
        elif settings["activation"] == "groupmax":
            size = M // settings["k"]
            kept = torch.stack([p[i : i + size].argmax() + i for i in range(0, M, size)])
        else:
            kept = p.argsort(descending=True)[: settings["k"]]
        row[kept] = p[kept] if settings.get("signed") else p[kept].clamp(min=0)
    return z, z @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("config", [{}, {"k": 40}, {"activation": "groupmax", "k": 16}, {"signed": True}])
def test_the_arithmetic(tmp_path: Path, config: dict[str, Any]) -> None:
    x = activations()
    dictionary = load_dictionary(save(tmp_path / "layers.6", **config))
    agrees(dictionary, *by_hand(x, **config), x)
    assert dictionary.format == f"sparsify/{'signed' if 'signed' in config else config.get('activation', 'topk')}"
    assert (dictionary.hook, dictionary.prepend_bos) == ("blocks.6.hook_resid_post", None)


@pytest.mark.parametrize("config", [{}, {"activation": "groupmax", "k": 16}, {"skip_connection": True}])
def test_a_transcoder_does_not_subtract_b_dec(tmp_path: Path, config: dict[str, Any]) -> None:
    u, W_skip = activations(), draw(D, D, seed=5)
    z, v_hat = by_hand(u + weights()["b_dec"], **config)
    tensors = weights() | ({"W_skip": W_skip} if "skip_connection" in config else {})
    dictionary = load_dictionary(save(tmp_path / "layers.6.mlp", tensors, transcode=True, **config))
    close(dictionary.encode(torch.cat([-u, u], dim=1)), z)
    close(dictionary.decode(z, u), v_hat + (u @ W_skip.T if "skip_connection" in config else 0))
    assert (dictionary.hook_in, dictionary.hook) == ("blocks.6.mlp.hook_in", "blocks.6.mlp.hook_out")


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_what_the_library_saves_and_gives(tmp_path: Path, activation: Any) -> None:
    library = pytest.importorskip("sparsify.sparse_coder")
    from sparsify.config import SparseCoderConfig  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    coder = library.SparseCoder(D, SparseCoderConfig(activation=activation, expansion_factor=4, k=8))
    with torch.no_grad():
        coder.b_dec.copy_(draw(D, scale=1.0))
        coder.encoder.bias.copy_(draw(M, seed=1))
    coder.save_to_disk(tmp_path / "h.3")
    x = activations()
    dictionary = load_dictionary(tmp_path / "h.3")
    values, indices, _ = coder.encode(x)
    z = torch.zeros(len(x), M).scatter_(1, indices, values).detach()
    agrees(dictionary, z, coder.decode(values, indices).detach(), x)
    assert dictionary.hook == "blocks.3.hook_resid_post"


def test_where_it_was_trained(tmp_path: Path) -> None:
    for folder, hook in {
        "layers.11": "blocks.11.hook_resid_post",
        "h.0": "blocks.0.hook_resid_post",
        "h.2/seed1": "blocks.2.hook_resid_post",
        "layers.3.mlp": "layers.3.mlp",
        "embed_tokens": "embed_tokens",
        "my_sae": None,
    }.items():
        saved = save(tmp_path / folder)
        assert hook_of(saved) == load_dictionary(saved).hook == hook
    assert load_dictionary(tmp_path / "my_sae" / "sae.safetensors").d_sae == M


@pytest.mark.parametrize("key", ["encoder.weight", "encoder.bias", "W_dec", "b_dec"])
@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_damaged_weights_are_one_line(tmp_path: Path, key: str, damage: int) -> None:
    change, says = DAMAGES[damage]
    refuses(save(tmp_path, edited(weights(), **{key.replace(".", "__"): change})), says.format(key=key))


def test_bad_folders_are_one_line(tmp_path: Path) -> None:
    refuses(save(tmp_path / "layers.6", transcode=True), r"is a transcoder, of an MLP by its folder's name")
    refuses(save(tmp_path / "b", k=None), r"its config has no k, want a int")
    refuses(save(tmp_path / "c", k=65), r"k 65, its weights 64 latents")
    refuses(save(tmp_path / "d", activation="odd"), r"activation 'odd' .* not one of sparsify's")
    refuses(save(tmp_path / "e", edited(weights(), W_dec=torch.zeros_like)), r"W_dec is all zero")
    (save(tmp_path / "f") / "cfg.json").unlink()
    refuses(tmp_path / "f", r"no cfg.json beside its weights")
    (save(tmp_path / "g") / "cfg.json").write_text("{")
    refuses(tmp_path / "g", r"cfg.json is not readable JSON")
    (save(tmp_path / "h") / "cfg.json").write_text("[]")
    refuses(tmp_path / "h", r"cfg.json holds a list")
    path = save(tmp_path / "i") / "sae.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    refuses(tmp_path / "i", r"sae.safetensors is corrupt")
    refuses(f"{save(tmp_path / 'j')}#k=3", r"k= means nothing here, this format says all")
    refuses(f"{tmp_path / 'j'}#k", r"behind the # stand key=value")
