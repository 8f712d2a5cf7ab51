"""What a dictionary of latents can do, whatever its format, and how one is found on disk or by release."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.registry import Registry


class DictionaryFormat(Protocol):
    """One format of dictionary on disk."""

    def matches(self, folder: Path) -> bool:
        """Whether `folder` looks like this format, by the names of its files; a damaged one still matches."""
        ...

    def load(self, folder: Path, device: str, dtype: torch.dtype) -> Dictionary:
        """The dictionary in `folder`; InputError, in one line, for whatever is missing, misshapen or not finite."""
        ...


DICTIONARIES: Registry[DictionaryFormat] = Registry("SAE format", "autointerp.evidence.dictionaries")


class ActiveLatents(NamedTuple):
    """The non-zero entries of an activation matrix z [n, m], by token."""

    token: Tensor
    """Row of each entry [nnz], int64, ascending."""
    latent: Tensor
    """Column of each entry [nnz], int64."""
    value: Tensor
    """Activation of each entry [nnz], float32."""


class Dictionary(ABC):
    """Latents of one hook point: m = d_sae latents over activations of width d = d_in.

    A reconstruction is x̂ = z W_dec + b_dec, with `W_dec` as it acts on `z`: where a format divides activations by the
    decoder norms, that is folded into `W_dec`. Formats that normalise x token by token (`normalised`) reconstruct in
    normalised units and need x to come back.
    """

    d_in: int
    d_sae: int
    W_dec: Tensor
    """Feature directions [m, d]."""
    b_dec: Tensor
    """[d]."""
    format: str
    """Name and architecture, e.g. `saelens/topk`."""
    hook: str | None = None
    """Hook point it was trained on, as its config names it."""
    prepend_bos: bool = False
    context_size: int | None = None
    W_enc: Tensor | None = None
    """Encoder columns [d, m] as they act on x − b_dec; None where the format has no linear encoder."""
    signed: bool = False
    """Whether activations can be negative."""
    normalised: bool = False
    """Whether x is rescaled token by token before it is encoded."""

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Latent activations z [n, m] float32 of activations x [n, d] of any float dtype."""

    def encode_columns(self, x: Tensor, latents: Tensor) -> Tensor:
        """z[:, latents] [n, k] of x [n, d]: only these columns are computed where the activation is elementwise."""
        return self.encode(x)[:, latents]

    def encode_active(self, x: Tensor) -> ActiveLatents:
        """The non-zero entries of `encode(x)`; without the dense matrix where the format allows it."""
        z = self.encode(x)
        token, latent = z.nonzero(as_tuple=True)
        return ActiveLatents(token, latent, z[token, latent])

    @abstractmethod
    def decode(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction [n, d] float32 of z [n, m]; `x`, the activations encoded, is needed where `normalised`."""


def load_dictionary(spec: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Dictionary:
    """The dictionary in the local folder `spec`, or the SAELens `release/sae_id` so named; InputError in one line."""
    folder = Path(spec).expanduser()
    if not folder.exists():
        from autointerp.evidence.dictionaries.saelens import load_release

        return load_release(str(spec), device, dtype)
    if folder.is_file():
        raise InputError(f"SAE {spec}: is a file; give the folder that holds it")
    for _name, candidate in DICTIONARIES.items():
        if candidate.matches(folder):
            return candidate.load(folder, device, dtype)
    below = sorted(found.parent for found in folder.glob("*/cfg.json"))
    hint = f"; give --sae {below[0]}" if below else f" ({', '.join(DICTIONARIES.names())})"
    raise InputError(f"SAE {spec}: no cfg.json, nor any other file of a format we read{hint}")


def check_fits(dictionary: Dictionary, d_model: int, spec: str | Path = "") -> None:
    """InputError unless the dictionary reads activations of the model's residual width."""
    if dictionary.d_in != d_model:
        name = f"SAE {spec}" if spec else "the SAE"
        raise InputError(
            f"{name} has d_in {dictionary.d_in}, the model's residual width is {d_model}: it belongs to another model;"
            " give --sae one for this base, or the --base it was trained on"
        )


def check_finite(name: str, weights: dict[str, Tensor]) -> None:
    """InputError naming the first tensor that holds NaN or infinity, or is an all-zero matrix."""
    for key, tensor in weights.items():
        # One sum per tensor: no mask of its size, and no float32 overflow.
        if not torch.isfinite(tensor.sum(dtype=torch.float64)):
            raise InputError(f"{name}: {key} holds NaN or infinite weights; save it again or give another --sae")
        if tensor.ndim == 2 and not tensor.any():
            raise InputError(f"{name}: {key} is all zero; save it again or give another --sae")
