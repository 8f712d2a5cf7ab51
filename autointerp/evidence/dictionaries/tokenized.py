"""Tokenized SAEs (Dooms & Wilhelm, "Tokenized SAEs: infusing per-token biases", 2024): one state dict in a .pt file.

    z = top_k((x − b_dec) W_encᵀ + b_enc), without ReLU,  x̂ = z W_decᵀ + b_dec + W_lookup[token]

`W_enc [m, d]`, `W_dec [d, m]`, `b_enc`, `b_dec`, `lookup.W_lookup.weight [vocab, d]` (absent where trained without).
The file stores neither k nor the layer: give `--sae FILE#k=15` and `--hook`. The lookup is what a token alone says: it
is the same on both sides, so it takes no part in the change, only in what the dictionary reconstructs. Those of the k
chosen that lie below 0 stay negative; a latent counts as firing where it is above 0.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import DICTIONARIES, Dictionary, Source
from autointerp.evidence.dictionaries.files import read_state, take
from autointerp.evidence.dictionaries.kernels import SignedTopK

LOOKUP = "lookup.W_lookup.weight"
SHAPES = {"W_enc": "m d", "b_enc": "m", "W_dec": "d m", "b_dec": "d"}
_OTHERS = re.compile(r"ae(_\d+)?|samples_\d+|learned_dicts|\d+|cc_weights|sparse_autoencoder_.*|final_.*")
"""Names that other formats give their .pt files."""


class Tokenized:
    """A .pt file of any name of its own; or a folder that holds nothing else."""

    says: tuple[str, ...] = ("k",)

    def matches(self, path: Path) -> bool:
        file = _file(path)
        return file is not None and file.suffix == ".pt" and not _OTHERS.fullmatch(file.stem)

    def hook(self, source: Source) -> str | None:
        return None

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        name, path = source.name, _file(source.path) or source.path
        state = read_state(path, name)
        lookup = {key: "vocab d" for key in state if key == LOOKUP}
        w, sizes = take(name, state, SHAPES | lookup)
        k = source.number("k", "a tokenized SAE does not store how many latents it was trained to keep")
        if k > sizes["m"]:
            raise InputError(f"{name}: k={k}, and it has {sizes['m']} latents; give --sae {source.path}#k=NUMBER")
        w = {key: value.to(device=device, dtype=dtype) for key, value in w.items()}
        made = SignedTopK(w["W_enc"].T, w["W_dec"].T.contiguous(), w["b_dec"], b_enc=w["b_enc"], k=k, by_size=False)
        made.lookup = w.get(LOOKUP)
        made.format, made.prepend_bos = "tokenized/topk", None
        return made


def _file(path: Path) -> Path | None:
    if path.is_file():
        return path
    files = [file for file in path.iterdir() if file.is_file() and not file.name.startswith(".")]
    return files[0] if len(files) == 1 else None


DICTIONARIES.register("tokenized")(Tokenized())
