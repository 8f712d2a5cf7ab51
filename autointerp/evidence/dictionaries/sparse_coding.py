"""Dictionaries of HoagyC's sparse_coding: `learned_dicts.pt`, a pickled list of (learned dict, hyper-parameters).

| class | z | x̂ |
|---|---|---|
| UntiedSAE | relu(x encoderᵀ + encoder_bias) | z D, rows of `decoder` at norm 1 |
| TiedSAE | the same of (x − center_trans) center_rotᵀ ∘ center_scale, rows at norm 1 if `norm_encoder` | the reverse |
| TopKLearnedDict | the k largest of relu(x dictᵀ) | z dict |
| PCAEncoder | the k largest by size of x pca_dictᵀ | z pca_dict |

The pickle is read by torch's restricted unpickler: these classes become inert holders of their tensors, anything else
is refused. `#index=N` chooses from the list; the files do not say at which hook they were trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source
from autointerp.evidence.dictionaries.files import MEND, read_pickle, take
from autointerp.evidence.dictionaries.kernels import Linear, SignedTopK, TopK, relu

WEIGHTS = "learned_dicts.pt"
TINY = 1e-8
"""Smallest norm that a row is divided by, as in sparse_coding."""
_MODULES = {
    "UntiedSAE": "learned_dict",
    "TiedSAE": "learned_dict",
    "TopKLearnedDict": "topk_encoder",
    "PCAEncoder": "pca",
}
_STAND_INS = {name: type(name, (), {}) for name in _MODULES}


class SparseCoding:
    """`learned_dicts.pt`, or the folder that holds it."""

    says: tuple[str, ...] = ("index",)

    def matches(self, path: Path) -> bool:
        return path.name == WEIGHTS if path.is_file() else (path / WEIGHTS).is_file()

    def hook(self, source: Source) -> str | None:
        return None

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        path, name = source.path if source.path.is_file() else source.path / WEIGHTS, source.name
        learned = _chosen(read_pickle(path, name, _globals()), source)
        kind = type(learned).__name__
        held = {key: value for key, value in vars(learned).items() if isinstance(value, Tensor)}
        with torch.no_grad():
            made = _MAKE[kind](name, learned, {key: value.float() for key, value in held.items()}, device, dtype)
        made.format, made.prepend_bos = f"sparse_coding/{kind}", None
        return made


def _globals() -> list[tuple[Any, str]]:
    return [(_STAND_INS[name], f"autoencoders.{module}.{name}") for name, module in _MODULES.items()]


def _chosen(content: Any, source: Source) -> Any:
    pairs = content if isinstance(content, list) else []
    learned = [pair[0] for pair in pairs if isinstance(pair, tuple | list) and pair]
    if not learned or not all(type(one) in _STAND_INS.values() for one in learned):
        raise InputError(f"{source.name}: holds no list of learned dicts and their hyper-parameters; {MEND}")
    if len(learned) == 1 and "index" not in source.said:
        return learned[0]
    some = "; ".join(f"{n}: {_words(pair[1:])}" for n, pair in enumerate(pairs[:4])) + (" …" if len(pairs) > 4 else "")
    index = source.number("index", f"holds {len(pairs)} dictionaries ({some})")
    if index >= len(learned):
        raise InputError(f"{source.name}: holds {len(learned)} dictionaries, numbered from 0; there is no {index}")
    return learned[index]


def _words(hyper_parameters: Any) -> str:
    given = hyper_parameters[0] if hyper_parameters and isinstance(hyper_parameters[0], dict) else {}
    return ", ".join(f"{key} {value:.3g}" for key, value in given.items() if isinstance(value, int | float)) or "?"


def _untied(name: str, _learned: Any, held: dict[str, Tensor], device: str, dtype: torch.dtype) -> Dictionary:
    w, sizes = take(name, held, {"encoder": "m d", "encoder_bias": "m", "decoder": "m d"})
    W_dec = _rows_of_norm_one(w["decoder"])
    parts = (w["encoder"].T, W_dec, torch.zeros(sizes["d"]), w["encoder_bias"])
    W_enc, W_dec, b_dec, b_enc = (part.to(device=device, dtype=dtype) for part in parts)
    return Linear(W_enc, W_dec, b_dec, b_enc=b_enc, activation=relu, subtract_b_dec=False)


def _tied(name: str, learned: Any, held: dict[str, Tensor], device: str, dtype: torch.dtype) -> Dictionary:
    # Centring, rotation and scaling are folded in: encoder and decoder act on x itself.
    d = held["encoder"].shape[-1] if "encoder" in held else 0
    plain = {"center_trans": torch.zeros(d), "center_rot": torch.eye(d), "center_scale": torch.ones(d)}
    shapes = {"encoder": "m d", "encoder_bias": "m", "center_trans": "d", "center_rot": "d d", "center_scale": "d"}
    w, _ = take(name, plain | held, shapes)
    if not w["center_scale"].all():
        raise InputError(f"{name}: center_scale holds a zero, which cannot be undone; {MEND}")
    rows = _rows_of_norm_one(w["encoder"])
    read = rows if getattr(learned, "norm_encoder", True) else w["encoder"]
    W_enc = (read * w["center_scale"] @ w["center_rot"]).T
    W_dec = rows / w["center_scale"] @ w["center_rot"]
    parts = (W_enc, W_dec, w["center_trans"], w["encoder_bias"])
    W_enc, W_dec, b_dec, b_enc = (part.to(device=device, dtype=dtype) for part in parts)
    return Linear(W_enc, W_dec, b_dec, b_enc=b_enc, activation=relu)


def _top_k(name: str, learned: Any, held: dict[str, Tensor], device: str, dtype: torch.dtype) -> Dictionary:
    signed = "pca_dict" in held
    key = "pca_dict" if signed else "dict"
    w, sizes = take(name, held, {key: "m d"})
    k, rows = getattr(learned, "sparsity", None), w[key].to(device=device, dtype=dtype)
    if not isinstance(k, int) or not 0 < k <= sizes["m"]:
        raise InputError(f"{name}: has sparsity {k!r} and {sizes['m']} latents; give another --sae")
    b_dec = torch.zeros(sizes["d"], device=device, dtype=dtype)
    if signed:
        return SignedTopK(rows.T, rows, b_dec, b_enc=None, k=k, by_size=True, subtract_b_dec=False)
    return TopK(rows.T, rows, b_dec, b_enc=None, k=k, subtract_b_dec=False)


def _rows_of_norm_one(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(TINY)


_MAKE = {"UntiedSAE": _untied, "TiedSAE": _tied, "TopKLearnedDict": _top_k, "PCAEncoder": _top_k}

DICTIONARIES.register("sparse_coding")(SparseCoding())
