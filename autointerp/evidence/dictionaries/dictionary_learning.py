"""Dictionaries that dictionary_learning (saprmarks) saves: a folder with `ae.pt` and `config.json`, whose
`trainer.dict_class` names the architecture; `checkpoints/ae_{step}.pt` beside them too.

| dict_class | z, with u = x − b for the decoder's bias b |
|---|---|
| AutoEncoder | relu(E u + b_enc), rescaled to unit decoder columns, as the library's own loader does |
| AutoEncoderNew | relu(E x + b_enc) |
| GatedAutoEncoder | relu(exp(r_mag) ∘ E u + mag_bias) where E u + gate_bias > 0 |
| AutoEncoderTopK | the k largest of relu(E u + b_enc) |
| BatchTopKSAE, MatryoshkaBatchTopKSAE | relu(E u + b_enc) where above the one `threshold` |
| JumpReluAutoEncoder | relu(x W_enc + b_enc) where above each latent's `threshold` |
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source
from autointerp.evidence.dictionaries.files import config_value, read_config, read_pickle, take
from autointerp.evidence.dictionaries.kernels import Linear, TopK, gated, jumprelu, relu

CONFIG, WEIGHTS = "config.json", "ae.pt"
LINEAR = {"encoder.weight": "m d", "encoder.bias": "m", "decoder.weight": "d m"}
MATRICES = {"W_enc": "d m", "b_enc": "m", "W_dec": "m d", "b_dec": "d"}
_POINTS = (("resid_pre", "resid_pre"), ("resid_mid", "resid_mid"), ("resid", "resid_post"))
"""What a `submodule_name` such as `resid_post_layer_8` holds, and the hook point of the block that it means. Parts of a
block are not guessed: their outputs reach the stream in other ways in other architectures."""

Weights = dict[str, Tensor]


class DictionaryLearning:
    """A folder with `ae.pt` and `config.json`; or the one .pt file, its config beside it or one folder up."""

    says: tuple[str, ...] = ()

    def matches(self, path: Path) -> bool:
        if path.is_dir():
            return (path / WEIGHTS).is_file() or _config_in(path) is not None
        return re.fullmatch(r"ae(_\d+)?\.pt", path.name) is not None

    def hook(self, source: Source) -> str | None:
        try:
            config = read_config(_config(source.path), source.name)
        except InputError:
            return None
        trainer, buffer = _part(config, "trainer"), _part(config, "buffer")
        layer, submodule = trainer.get("layer"), trainer.get("submodule_name")
        if not isinstance(layer, int) or not isinstance(submodule, str) or buffer.get("io", "out") != "out":
            return None
        return next((f"blocks.{layer}.hook_{point}" for holds, point in _POINTS if holds in submodule), None)

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        name, path = source.name, source.path
        config = read_config(_config(path), name)
        kind = config_value(config, "trainer.dict_class", str, name)
        if kind not in _KINDS:
            raise InputError(f"{name}: dict_class {kind} is none that can be read ({', '.join(_KINDS)})")
        weights = _state(path if path.is_file() else path / WEIGHTS, name)
        shapes, make = _KINDS[kind]
        on, _ = take(name, weights, shapes)
        on = {key: value.to(device=device, dtype=dtype) for key, value in on.items()}
        made = make(name, on, config)
        made.format, made.hook, made.prepend_bos = f"dictionary_learning/{kind}", self.hook(source), None
        context = _part(config, "buffer").get("ctx_len")
        made.context_size = context if isinstance(context, int) else None
        return made


def _state(path: Path, name: str) -> Weights:
    state = read_pickle(path, name)
    if isinstance(state, dict) and "ae" in state and "optimizer" in state:
        raise InputError(
            f"{name}: {path.name} is the backup of a training that did not end, biases still scaled;"
            " give --sae one of its checkpoints/ae_STEP.pt, or finish it"
        )
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{name}: {path.name} holds no state dict of tensors; give another --sae")
    return state


def _auto_encoder(_name: str, w: Weights, _config: dict[str, Any]) -> Dictionary:
    norms = w["decoder.weight"].norm(dim=0)
    W_dec = (w["decoder.weight"] / norms).T.contiguous()
    W_enc, b_enc = (w["encoder.weight"] * norms[:, None]).T, w["encoder.bias"] * norms
    return Linear(W_enc, W_dec, w["bias"], b_enc=b_enc, activation=relu)


def _auto_encoder_new(_name: str, w: Weights, _config: dict[str, Any]) -> Dictionary:
    options: dict[str, Any] = {"activation": relu, "subtract_b_dec": False}
    return Linear(*_matrices(w), w["decoder.bias"], b_enc=w["encoder.bias"], **options)


def _gated(_name: str, w: Weights, _config: dict[str, Any]) -> Dictionary:
    per_latent = {"scale": w["r_mag"].exp(), "b_gate": w["gate_bias"], "b_mag": w["mag_bias"]}
    options: dict[str, Any] = {"activation": gated, "per_latent": per_latent, "bar": -w["gate_bias"]}
    return Linear(*_matrices(w), w["decoder_bias"], b_enc=None, **options)


def _top_k(name: str, w: Weights, config: dict[str, Any]) -> Dictionary:
    k, m = config_value(config, "trainer.k", int, name), len(w["encoder.bias"])
    if not 0 < k <= m:
        raise InputError(f"{name}: its config has k {k}, its weights {m} latents; give another --sae")
    return TopK(*_matrices(w), w["b_dec"], b_enc=w["encoder.bias"], k=k)


def _batch_top_k(_name: str, w: Weights, _config: dict[str, Any]) -> Dictionary:
    return Linear(*_matrices(w), w["b_dec"], b_enc=w["encoder.bias"], **_above(w["threshold"], w["encoder.bias"]))


def _matryoshka(_name: str, w: Weights, _config: dict[str, Any]) -> Dictionary:
    return Linear(w["W_enc"], w["W_dec"], w["b_dec"], b_enc=w["b_enc"], **_above(w["threshold"], w["b_enc"]))


def _jump_relu(_name: str, w: Weights, _config: dict[str, Any]) -> Dictionary:
    options: dict[str, Any] = {"subtract_b_dec": False, **_above(w["threshold"], w["b_enc"])}
    return Linear(w["W_enc"], w["W_dec"], w["b_dec"], b_enc=w["b_enc"], **options)


def _above(threshold: Tensor, like: Tensor) -> dict[str, Any]:
    """relu where above the threshold, one or one a latent; below 0 (never calibrated) it acts as 0."""
    bar = threshold.clamp(min=0).expand_as(like).contiguous()
    return {"activation": jumprelu, "per_latent": {"threshold": bar}, "bar": bar}


def _matrices(w: Weights) -> tuple[Tensor, Tensor]:
    """(W_enc [d, m], W_dec [m, d]); the decoder's rows are gathered one by one, so they are laid out as rows."""
    return w["encoder.weight"].T, w["decoder.weight"].T.contiguous()


def _part(config: dict[str, Any], key: str) -> dict[str, Any]:
    part = config.get(key)
    return part if isinstance(part, dict) else {}


def _config_in(folder: Path) -> Path | None:
    """The config.json of `folder` if dictionary_learning wrote it: a damaged folder, without its weights."""
    try:
        content = read_config(folder / CONFIG, "")
    except InputError:
        return None
    return folder / CONFIG if "dict_class" in _part(content, "trainer") else None


def _config(path: Path) -> Path:
    """Where the config of a folder or a weights file lies; checkpoints lie one folder below it."""
    folder = path if path.is_dir() else path.parent
    above = folder.resolve().parent / CONFIG
    return above if folder.name == "checkpoints" and above.is_file() else folder / CONFIG


_KINDS: dict[str, tuple[dict[str, str], Callable[[str, Weights, dict[str, Any]], Dictionary]]] = {
    "AutoEncoder": (LINEAR | {"bias": "d"}, _auto_encoder),
    "AutoEncoderNew": (LINEAR | {"decoder.bias": "d"}, _auto_encoder_new),
    "GatedAutoEncoder": (
        {"encoder.weight": "m d", "decoder.weight": "d m", "decoder_bias": "d"}
        | dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), "m"),
        _gated,
    ),
    "AutoEncoderTopK": (LINEAR | {"b_dec": "d"}, _top_k),
    "BatchTopKSAE": (LINEAR | {"b_dec": "d", "threshold": ""}, _batch_top_k),
    "MatryoshkaBatchTopKSAE": (MATRICES | {"threshold": ""}, _matryoshka),
    "JumpReluAutoEncoder": (MATRICES | {"threshold": "m"}, _jump_relu),
}

DICTIONARIES.register("dictionary_learning")(DictionaryLearning())
