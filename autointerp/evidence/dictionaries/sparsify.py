"""Dictionaries that EleutherAI's sparsify (formerly `sae`) saves: a folder `layers.6` with `cfg.json` and
`sae.safetensors`.

    z = top_k(relu((x − b_dec) encoder.weightᵀ + encoder.bias)),  x̂ = z W_dec + b_dec

`activation: groupmax` keeps the largest of k groups instead; `signed` (2024 only) the k largest by size, without ReLU.
`transcode` makes it a transcoder of the MLP that the folder is named after, `layers.6.mlp`: b_dec is not subtracted,
and with `skip_connection` u W_skipᵀ is added.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source
from autointerp.evidence.dictionaries.files import config_value, read_config, read_safetensors, take
from autointerp.evidence.dictionaries.kernels import GroupMax, SignedTopK, TopK
from autointerp.evidence.dictionaries.transcoder import reading_elsewhere
from autointerp.evidence.sae_spec import hook_of_module

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
SHAPES = {"encoder.weight": "m d", "encoder.bias": "m", "W_dec": "m d", "b_dec": "d"}
_MLP = re.compile(r"(?:layers|h|blocks)\.(\d+)\.mlp$")
_MODULE = re.compile(r"(\w+\.)*(layers|h|blocks)\.\d+(\.\w+)*|embed_tokens|embed_in|wte")


class Sparsify:
    """A folder with `cfg.json` and `sae.safetensors`, named after the module it reads."""

    says: tuple[str, ...] = ()

    def matches(self, path: Path) -> bool:
        return path.name == WEIGHTS if path.is_file() else (path / WEIGHTS).is_file()

    def hook(self, source: Source) -> str | None:
        folder = _folder(source.path)
        name = folder.parent.name if re.fullmatch(r"seed\d+", folder.name) else folder.name
        return hook_of_module(name) if _MODULE.fullmatch(name) else None

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        name, folder = source.name, _folder(source.path)
        config = read_config(folder / CONFIG, name)
        hook, hook_in = self.hook(source), None
        if config.get("transcode"):
            if (mlp := _MLP.search(hook or "")) is None:
                raise InputError(
                    f"{name} is a transcoder, of an MLP by its folder's name, layers.6.mlp: name the folder so, or give"
                    " --sae an autoencoder"
                )
            hook, hook_in = (f"blocks.{mlp[1]}.mlp.hook_{side}" for side in ("out", "in"))
        skip = {"W_skip": "d d"} if hook_in and config.get("skip_connection") else {}
        weights, sizes = take(name, read_safetensors(folder / WEIGHTS, name), SHAPES | skip)
        k = config_value(config, "k", int, name)
        if not 0 < k <= sizes["m"]:
            raise InputError(f"{name}: its config has k {k}, its weights {sizes['m']} latents; give another --sae")
        on = {key: value.to(device=device, dtype=dtype) for key, value in weights.items()}
        W_enc, parts = on["encoder.weight"].T, {"b_enc": on["encoder.bias"], "k": k, "subtract_b_dec": not hook_in}
        activation = config.get("activation", "topk")
        if config.get("signed"):
            activation, made = "signed", SignedTopK(W_enc, on["W_dec"], on["b_dec"], by_size=True, **parts)
        elif activation == "topk":
            made = TopK(W_enc, on["W_dec"], on["b_dec"], **parts)
        elif activation == "groupmax" and sizes["m"] % k == 0:
            made = GroupMax(W_enc, on["W_dec"], on["b_dec"], **parts)
        else:
            raise InputError(
                f"{name}: activation {activation!r} with k {k} of {sizes['m']} latents is not one of sparsify's"
            )
        made.format, made.hook, made.prepend_bos = f"sparsify/{activation}", hook, None
        return reading_elsewhere(made, hook_in, on.get("W_skip")) if hook_in else made


def _folder(path: Path) -> Path:
    return (path if path.is_dir() else path.parent).resolve()


DICTIONARIES.register("sparsify")(Sparsify())
