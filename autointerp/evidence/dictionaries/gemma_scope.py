"""Gemma Scope as Google publishes it: `params.npz` (Gemma 2), or `params.safetensors` with `config.json` (Gemma 3).

    z = relu(x W_enc + b_enc) where that is above `threshold`,  x̂ = z W_dec + b_dec   (https://arxiv.org/abs/2408.05147)

Names are upper or lower case (`W_enc`, `w_enc`). Only the path says where an .npz was trained, as the hub lays it out:
`…gemma-scope-2b-pt-res/…/layer_20/width_16k/average_l0_71/params.npz`. Transcoders of Gemma 3 are read, with or without
`affine_skip_connection`; those across layers are not.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source
from autointerp.evidence.dictionaries.files import read_config, read_npz, read_safetensors, take
from autointerp.evidence.dictionaries.kernels import Linear, jumprelu
from autointerp.evidence.dictionaries.transcoder import reading_elsewhere

CONFIG, NPZ, SAFETENSORS = "config.json", "params.npz", "params.safetensors"
SKIP = "affine_skip_connection"
SHAPES = {"w_enc": "d m", "b_enc": "m", "w_dec": "m d", "b_dec": "d", "threshold": "m"}
_REPOSITORY = re.compile(r"(?:.*--)?gemma-scope-[\w.]+-(?:pt|it)-(res|mlp|att|transcoders)")
_POINTS = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}
_MODULE = re.compile(r"model\.(?:language_model\.)?layers\.(\d+)\.(.*?)\.?(output|input)")
_MODULES = {
    ("", "output"): "hook_resid_post",
    ("post_feedforward_layernorm", "output"): "hook_mlp_out",
    ("pre_feedforward_layernorm", "output"): "mlp.hook_in",
}


class GemmaScope:
    """A folder with `params.npz` or `params.safetensors`, or that file."""

    says: tuple[str, ...] = ()

    def matches(self, path: Path) -> bool:
        if path.is_file():
            return path.suffix == ".npz" or path.name == SAFETENSORS
        return (path / SAFETENSORS).is_file() or any(path.glob("*.npz"))

    def hook(self, source: Source) -> str | None:
        path = _file(source.path)
        if path.suffix == ".npz":
            kind, layer = _kind(path), _one(re.compile(r"layer_(\d+)"), path)
            return f"blocks.{layer}.{_POINTS[kind]}" if layer is not None and kind in _POINTS else None
        try:
            config = read_config(path.parent / CONFIG, source.name)
        except InputError:
            return None
        return hook_of_module(config.get("hf_hook_point_out") or config.get("hf_hook_point_in"))

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        name, path = source.name, _file(source.path)
        if path.suffix == ".npz":
            hooks, tensors = (), read_npz(path, name)
            if _kind(path) == "transcoders":
                raise InputError(
                    f"{name} is a transcoder of Gemma 2, whose files do not say whether it reads with or without the"
                    " norm's weights; give --sae an autoencoder, or a transcoder of Gemma 3"
                )
        else:
            config = read_config(path.parent / CONFIG, name) if (path.parent / CONFIG).is_file() else {}
            hooks = tuple(config[key] for key in ("hf_hook_point_in", "hf_hook_point_out") if config.get(key))
            tensors = read_safetensors(path, name)
        lower = {key.lower(): tensor for key, tensor in tensors.items()}
        hook_in, transcoder = None, len(set(hooks)) == 2 or SKIP in lower
        points = [str(hook_of_module(hook)) for hook in hooks]
        if transcoder and [point.rpartition("hook_")[2] for point in points] == ["in", "mlp_out"]:
            hook_in = points[0]
        elif transcoder:
            raise InputError(
                f"{name} is a transcoder, but {CONFIG} does not say that it reads an MLP's input and writes its output;"
                " give --sae another"
            )
        w, _ = take(name, lower, SHAPES | ({SKIP: "d d"} if SKIP in lower else {}))
        w = {key: value.to(device=device, dtype=dtype) for key, value in w.items()}
        bar = w["threshold"].clamp(min=0)
        made = Linear(
            w["w_enc"],
            w["w_dec"],
            w["b_dec"],
            b_enc=w["b_enc"],
            activation=jumprelu,
            per_latent={"threshold": bar},
            bar=bar,
            subtract_b_dec=False,
        )
        made.format, made.hook, made.prepend_bos, made.context_size = (
            "gemma_scope/jumprelu",
            self.hook(source),
            True,
            1024,
        )
        if hook_in is None:
            return made
        return reading_elsewhere(made, hook_in, w[SKIP].T if SKIP in w else None)  # stored [d_in, d_out]


def hook_of_module(named: object) -> str | None:
    """The hook point at a module of Gemma, e.g. `model.layers.17.pre_feedforward_layernorm.output`; None at others."""
    found = _MODULE.fullmatch(named) if isinstance(named, str) else None
    point = _MODULES.get((found[2], found[3])) if found else None
    return f"blocks.{found[1]}.{point}" if found and point else None


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    return path / SAFETENSORS if (path / SAFETENSORS).is_file() else next(iter(sorted(path.glob("*.npz"))), path / NPZ)


def _kind(path: Path) -> str | None:
    """res, mlp, att or transcoders, by the repository's folder; None where it was copied out of it."""
    return _one(_REPOSITORY, path)


def _one(pattern: re.Pattern[str], path: Path) -> str | None:
    """What the pattern finds in the one folder above `path` that is wholly it; None in none, or in two."""
    found = {match[1] for part in path.absolute().parts if (match := pattern.fullmatch(part))}
    return found.pop() if len(found) == 1 else None


DICTIONARIES.register("gemma_scope")(GemmaScope())
