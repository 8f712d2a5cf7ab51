"""Crosscoders of two models (Kissane, Krzyzanowski, Conmy & Nanda's replication): `{v}.pt` + `{v}_cfg.json`, or
`cc_weights.pt` + `cfg.json` as published.

    z = relu(s_A x^A W_enc[A] + s_B x^B W_enc[B] + b_enc),  x̂^M = (z W_dec[:, M] + b_dec[M]) / s_M

`W_enc [2, d, m]`, `W_dec [m, 2, d]`, `b_dec [2, d]`; model 0 (A) is the base, 1 (B) the trained one.

What becomes the dictionary. Each side is encoded by itself, as if both models agreed on it (x^A = x^B = x): the encoder
is s_A W_enc[A] + s_B W_enc[B]. It is decoded by the base's decoder, W_dec[:, A] / s_A; `#side=trained` takes the other.
`relative_norm` is ‖d^B‖ / (‖d^A‖ + ‖d^B‖) of each latent in the models' own units: 0 only in the base, ½ shared, 1 only
in the trained one. A latent of the trained model alone has next to no direction in the base's decoder.

The scales s that brought both models to mean norm √d in training are not stored: `#scale_base=0.28&scale_trained=0.24`.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, ActiveLatents, Dictionary, Source
from autointerp.evidence.dictionaries.files import read_config, read_state, take
from autointerp.evidence.dictionaries.kernels import Linear, relu
from autointerp.evidence.sae_spec import hook_in_config

PUBLISHED = "cc_weights.pt"
SHAPES = {"W_enc": "models d m", "W_dec": "m models d", "b_enc": "m", "b_dec": "models d"}
SIDES = ("base", "trained")
_VERSION = re.compile(r"\d+\.pt")


class Crosscoder(Linear):
    """One side of a crosscoder, and its code of both."""

    relative_norm: Tensor
    """‖d^B‖ / (‖d^A‖ + ‖d^B‖) of each latent [m]; ½ where both are zero."""
    W_enc_base: Tensor
    """s_A W_enc[A] [d, m]; the other half of `W_enc` is s_B W_enc[B]."""
    directions: tuple[np.ndarray, np.ndarray]
    """By which each latent is looked for in x^A and in x^B, both [m, d]: s_A d and s_B d, d the longer of its rows."""

    @torch.no_grad()
    def encode_both(self, x_base: Tensor, x_adapted: Tensor) -> ActiveLatents:
        """The non-zero entries of the crosscoder's own z [n, m] of x^A and x^B, both [n, d]."""
        assert self.W_enc is not None
        assert self.b_enc is not None
        dtype = self.W_enc.dtype
        pre = torch.addmm(self.b_enc, x_adapted.to(dtype), self.W_enc)
        pre.addmm_((x_base - x_adapted).to(dtype), self.W_enc_base)
        token, latent = (pre > 0).nonzero(as_tuple=True)
        return ActiveLatents(token, latent, pre[token, latent].float())


class CrosscoderFiles:
    """`{v}.pt` or `cc_weights.pt`, its config beside it; or the folder, whose last version is read."""

    says: tuple[str, ...] = ("side", "scale_base", "scale_trained")

    def matches(self, path: Path) -> bool:
        if path.is_file():
            return path.name == PUBLISHED or (bool(_VERSION.fullmatch(path.name)) and _config(path).is_file())
        return (path / PUBLISHED).is_file() or bool(_versions(path))

    def hook(self, source: Source) -> str | None:
        return hook_in_config(_config(_file(source.path)))

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        path, name = _file(source.path), source.name
        read_config(_config(path), name)
        w, sizes = take(name, read_state(path, name), SHAPES)
        if sizes["models"] != len(SIDES):
            raise InputError(f"{name}: a crosscoder of {sizes['models']} models or layers; give --sae one of two")
        side = source.said.get("side", SIDES[0])
        if side not in SIDES:
            raise InputError(f"{name}: side={side} is neither base nor trained; give --sae {source.path}#side=base")
        scales = [_scale(source, f"scale_{side}") for side in SIDES]
        at, scale = SIDES.index(side), scales[SIDES.index(side)]
        W_enc = scales[0] * w["W_enc"][0].float() + scales[1] * w["W_enc"][1].float()
        parts = (W_enc, w["W_dec"][:, at] / scale, w["b_dec"][at] / scale, w["b_enc"])
        W_enc, W_dec, b_dec, b_enc = (part.to(device=device, dtype=dtype).contiguous() for part in parts)
        made = Crosscoder(W_enc, W_dec, b_dec, b_enc=b_enc, activation=relu, subtract_b_dec=False)
        made.relative_norm = relative_norm(w["W_dec"].float(), *scales)
        made.W_enc_base = (scales[0] * w["W_enc"][0].float()).to(device=device, dtype=dtype)
        made.directions = _directions(w["W_dec"].float(), *scales)
        # The first position is dropped in training, and its text begins with BOS where the tokenizer has it do so.
        made.format, made.hook, made.prepend_bos = f"crosscoder/{side}", self.hook(source), None
        return made


def relative_norm(W_dec: Tensor, scale_base: float = 1.0, scale_trained: float = 1.0) -> Tensor:
    """Share of the trained model in each latent's decoder norms [m], for W_dec [m, 2, d]; ½ where both are zero."""
    norms = W_dec.norm(dim=2) / torch.tensor([scale_base, scale_trained], device=W_dec.device)
    total = norms.sum(dim=1)
    return torch.where(total > 0, norms[:, 1] / total.clamp_min(1e-30), 0.5)


def _directions(W_dec: Tensor, scale_base: float, scale_trained: float) -> tuple[np.ndarray, np.ndarray]:
    longer = W_dec.norm(dim=2).argmax(dim=1)  # as trained: on scaled activations
    d = W_dec[torch.arange(len(W_dec)), longer].numpy()
    base = scale_base * d
    return base, base if scale_base == scale_trained else scale_trained * d


def _scale(source: Source, key: str) -> float:
    said = source.said.get(key, "1")
    try:
        value = float(said)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise InputError(f"{source.name}: {key}={said} is no number above 0; give --sae {source.path}#{key}=NUMBER")
    return value


def _versions(folder: Path) -> list[Path]:
    """{v}.pt with {v}_cfg.json beside them, by v."""
    found = [path for path in folder.glob("*.pt") if _VERSION.fullmatch(path.name) and _config(path).is_file()]
    return sorted(found, key=lambda path: int(path.stem))


def _file(path: Path) -> Path:
    if path.is_file():
        return path
    return path / PUBLISHED if (path / PUBLISHED).is_file() else _versions(path)[-1]


def _config(path: Path) -> Path:
    return path.with_name("cfg.json" if path.name == PUBLISHED else f"{path.stem}_cfg.json")


DICTIONARIES.register("crosscoder")(CrosscoderFiles())
