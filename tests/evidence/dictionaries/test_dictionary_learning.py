"""dictionary_learning's folders: every dict_class by hand, by its library where installed, and bad ones in one line."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary

from .checks import DAMAGES, D, M, activations, agrees, draw, edited, refuses

LINEAR = {"encoder.weight": draw(M, D), "encoder.bias": draw(M, seed=2), "decoder.weight": draw(D, M, seed=3)}
MATRICES = {"W_enc": draw(D, M), "b_enc": draw(M, seed=2), "W_dec": draw(M, D, seed=3), "b_dec": draw(D, seed=4)}
CALIBRATED = {"k": torch.tensor(6, dtype=torch.int), "threshold": torch.tensor(1.5)}
STATES: dict[str, dict[str, Tensor]] = {
    "AutoEncoder": LINEAR | {"bias": draw(D, seed=4, scale=1.0)},
    "AutoEncoderNew": LINEAR | {"decoder.bias": draw(D, seed=4)},
    "GatedAutoEncoder": {
        "encoder.weight": draw(M, D),
        "decoder.weight": draw(D, M, seed=3),
        "decoder_bias": draw(D, seed=4, scale=1.0),
        "r_mag": draw(M, seed=5),
        "gate_bias": draw(M, seed=6),
        "mag_bias": draw(M, seed=7),
    },
    "AutoEncoderTopK": LINEAR | {"b_dec": draw(D, seed=4, scale=1.0)} | CALIBRATED,
    "BatchTopKSAE": LINEAR | {"b_dec": draw(D, seed=4, scale=1.0)} | CALIBRATED,
    "MatryoshkaBatchTopKSAE": MATRICES | CALIBRATED | {"group_sizes": torch.tensor([16, 16, 32])},
    "JumpReluAutoEncoder": MATRICES | {"threshold": draw(M, seed=8).abs()},
}


def save(folder: Path, kind: str, state: dict[str, Tensor] | None = None, **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(STATES[kind] if state is None else state, folder / "ae.pt")
    config = {"dict_class": kind, "activation_dim": D, "dict_size": M, "k": 6, "layer": 8, "lm_name": "some/model"}
    config |= {"submodule_name": "resid_post_layer_8"} | trainer
    buffer = {"d_submodule": D, "io": "out", "ctx_len": 128}
    (folder / "config.json").write_text(json.dumps({"trainer": config, "buffer": buffer}))
    return folder


def by_hand(kind: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """z and x_hat as the dict_class computes them."""
    w = STATES[kind]
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        pre = ((x if kind.startswith("Jump") else x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        z = torch.where(pre > w["threshold"], pre, 0.0)
        return z, z @ w["W_dec"] + w["b_dec"]
    b = next(w[key] for key in ("bias", "decoder.bias", "decoder_bias", "b_dec") if key in w)
    u = x if kind == "AutoEncoderNew" else x - b
    pre = u @ w["encoder.weight"].T + w.get("encoder.bias", torch.zeros(M))
    z = pre.relu()
    if kind == "GatedAutoEncoder":
        z = (pre * w["r_mag"].exp() + w["mag_bias"]).relu() * (pre + w["gate_bias"] > 0)
    if kind == "AutoEncoderTopK":
        z = torch.where(z >= z.sort(dim=1, descending=True).values[:, 5:6], z, 0.0)
    if kind == "BatchTopKSAE":
        z = torch.where(z > w["threshold"], z, 0.0)
    x_hat = z @ w["decoder.weight"].T + b
    return (z * w["decoder.weight"].norm(dim=0), x_hat) if kind == "AutoEncoder" else (z, x_hat)


@pytest.mark.parametrize("kind", STATES)
def test_the_arithmetic(tmp_path: Path, kind: str) -> None:
    x = activations()
    dictionary = load_dictionary(save(tmp_path, kind))
    agrees(dictionary, *by_hand(kind, x), x)
    assert dictionary.format == f"dictionary_learning/{kind}"
    assert (dictionary.hook, dictionary.context_size) == ("blocks.8.hook_resid_post", 128)
    assert dictionary.prepend_bos is None


@pytest.mark.parametrize("kind", STATES)
def test_what_the_library_loads(tmp_path: Path, kind: str) -> None:
    """The same files through the library's own `load_dictionary`."""
    library = pytest.importorskip("dictionary_learning.utils")
    x = activations()
    theirs, _ = library.load_dictionary(str(save(tmp_path, kind)), device="cpu")
    z = theirs.encode(x).detach()
    agrees(load_dictionary(tmp_path), z, theirs.decode(z).detach(), x)


def test_a_threshold_that_was_never_calibrated_is_a_plain_relu(tmp_path: Path) -> None:
    state = STATES["BatchTopKSAE"] | {"threshold": torch.tensor(-1.0)}
    z = load_dictionary(save(tmp_path, "BatchTopKSAE", state)).encode(activations())
    w = STATES["BatchTopKSAE"]
    pre = (activations() - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]
    torch.testing.assert_close(z, pre.relu(), rtol=1e-5, atol=1e-5)


def test_where_it_was_trained(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"submodule_name": "resid_pre", "layer": 3}, "blocks.3.hook_resid_pre"),
        ({"submodule_name": "mlp_out_layer_3"}, None),
        ({"submodule_name": None}, None),
        ({"layer": None}, None),
    ]
    for n, (trainer, hook) in enumerate(cases):
        saved = save(tmp_path / str(n), "AutoEncoder", **trainer)
        assert hook_of(saved) == load_dictionary(saved).hook == hook


def test_files_and_checkpoints(tmp_path: Path) -> None:
    save(tmp_path, "BatchTopKSAE")
    (tmp_path / "checkpoints").mkdir()
    torch.save(STATES["BatchTopKSAE"] | {"threshold": torch.tensor(2.5)}, tmp_path / "checkpoints" / "ae_100.pt")
    x = activations()
    final, early = load_dictionary(tmp_path / "ae.pt"), load_dictionary(tmp_path / "checkpoints" / "ae_100.pt")
    torch.testing.assert_close(final.encode(x), by_hand("BatchTopKSAE", x)[0], rtol=1e-4, atol=1e-5)
    assert (early.encode(x) > 0).sum() < (final.encode(x) > 0).sum()
    assert early.hook == hook_of(tmp_path / "checkpoints" / "ae_100.pt") == "blocks.8.hook_resid_post"


USED = [(kind, key) for kind in STATES for key in STATES[kind] if STATES[kind][key].ndim and key != "group_sizes"]


@pytest.mark.parametrize(("kind", "key"), USED)
@pytest.mark.parametrize("damage", range(2))
def test_damaged_weights_are_one_line(tmp_path: Path, kind: str, key: str, damage: int) -> None:
    change, says = DAMAGES[damage]
    state = edited(STATES[kind], **{key.replace(".", "__"): change})
    refuses(save(tmp_path, kind, state), says.format(key=key))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        import os

        return os.system, ("touch EVIL",)


def test_bad_folders_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(save(tmp_path / "a", "AutoEncoder", edited(LINEAR, encoder__weight=lambda w: w.T)), r"lack bias")
    transposed = edited(STATES["AutoEncoder"], encoder__weight=lambda w: w.T)
    refuses(save(tmp_path / "b", "AutoEncoder", transposed), r"encoder.bias has shape \[64\], want \[16\]")
    refuses(save(tmp_path / "c", "AutoEncoder", dict_class="IdentityDict"), r"dict_class IdentityDict is none that can")
    refuses(save(tmp_path / "d", "AutoEncoder", dict_class=None), r"its config has no trainer.dict_class")
    refuses(save(tmp_path / "e", "AutoEncoderTopK", k=65), r"k 65, its weights 64")
    (save(tmp_path / "f", "AutoEncoder") / "config.json").unlink()
    refuses(tmp_path / "f", r"no config.json beside its weights")
    (save(tmp_path / "g", "AutoEncoder") / "ae.pt").unlink()
    refuses(tmp_path / "g", r"no ae.pt in it")
    path = save(tmp_path / "h", "AutoEncoder") / "ae.pt"
    whole = path.read_bytes()
    for damaged in (whole[:-300], b"", b"PK\x03\x04 no", b"\x80\x04junk", b"hello"):
        path.write_bytes(damaged)
        refuses(tmp_path / "h", r"ae.pt is corrupt")
    path.write_bytes(pickle.dumps(Evil()))
    refuses(tmp_path / "h", r"ae.pt is (a pickle that asks for|corrupt)")
    torch.save({"bias": Evil()}, path)
    refuses(tmp_path / "h", r"ae.pt is a pickle that asks for posix.system, which is not read")
    torch.save({"ae": {}, "optimizer": {}, "step": 3, "norm_factor": 2.0}, path)
    refuses(tmp_path / "h", r"backup of a training that did not end.*give --sae one of its checkpoints")
    torch.save([1, 2], path)
    refuses(tmp_path / "h", r"holds no state dict")
    zeroed = STATES["AutoEncoder"] | {"encoder.weight": torch.zeros(M, D)}
    refuses(save(tmp_path / "i", "AutoEncoder", zeroed), r"encoder.weight is all zero")
    uncalibrated = edited(STATES["BatchTopKSAE"], threshold=lambda _t: None)
    refuses(save(tmp_path / "j", "BatchTopKSAE", uncalibrated), r"lack threshold")
    assert not (tmp_path / "EVIL").exists()
