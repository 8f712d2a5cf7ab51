"""What a dictionary of latents can do, whatever its format, and how one is found on disk or by release."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.sae_spec import split_spec
from autointerp.registry import Registry


@dataclass(frozen=True)
class Source:
    """Where a dictionary lies and what the user says of it: `path#key=value&key=value`, and --hook."""

    path: Path
    """A folder or a file."""
    said: Mapping[str, str] = field(default_factory=dict)
    """What stands behind the #: that which the files do not say, e.g. {"k": "15"}."""
    hook: str | None = None
    """The hook point asked for, which chooses among several dictionaries in one file."""

    @property
    def name(self) -> str:
        """How errors call it."""
        return f"SAE {self.path}"

    def number(self, key: str, why: str) -> int:
        """The positive whole number (or 0 for `index`) said for `key`; InputError, with `why`, where none is."""
        value = self.said.get(key, "")
        if not value.isdecimal() or (key != "index" and int(value) == 0):
            found = f"{key}={value} is no number" if value else why
            raise InputError(f"{self.name}: {found}; give --sae {self.path}#{key}=NUMBER")
        return int(value)


class DictionaryFormat(Protocol):
    """One format of dictionary on disk."""

    says: tuple[str, ...]
    """Keys that may stand behind the # of --sae: what its files do not store."""

    def matches(self, path: Path) -> bool:
        """Whether the folder or file looks like this format, by its name; a damaged one still matches."""
        ...

    def hook(self, source: Source) -> str | None:
        """The hook point that the files name, as --hook takes it; None where they name none, or cannot be read."""
        ...

    def load(self, source: Source, device: str, dtype: torch.dtype) -> Dictionary:
        """The dictionary; InputError, in one line, for whatever is missing, misshapen or not finite."""
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

    A reconstruction is x̂ = z W_dec + b_dec (+ `lookup[token]`), with `W_dec` as it acts on `z`: where a format divides
    activations by the decoder norms, that is folded into `W_dec`. Formats that normalise x token by token
    (`normalised`) reconstruct in normalised units and need x to come back.
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
    """Hook point it was trained on, as its config names it; of a transcoder, the one where it writes."""
    hook_in: str | None = None
    """Hook point that a transcoder reads, whose activations stand behind those of `hook`: x = [v | u]. None where it
    reads what it reconstructs."""
    prepend_bos: bool | None = False
    """Whether its training text began with BOS; None: where the tokenizer's own default does so."""
    context_size: int | None = None
    W_enc: Tensor | None = None
    """Encoder columns [d, m] as they act on x − b_dec; None where the format has no linear encoder."""
    lookup: Tensor | None = None
    """What a token alone adds to the reconstruction [vocab, d]; the same on both sides, so no part of a change."""
    signed: bool = False
    """Whether activations can be negative."""
    normalised: bool = False
    """Whether x is rescaled token by token before it is encoded."""
    relative_norm: Tensor | None = None
    """‖d_adapted‖ / (‖d_base‖ + ‖d_adapted‖) of each latent [m]; None unless it has a decoder for both models."""

    def read_part(self, x: Tensor) -> Tensor:
        """What of activations x [..., d], or [v | u] of a transcoder, is encoded [..., d_in]."""
        return x if self.hook_in is None else x[..., -self.d_in :]

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

    def beside(self, x: Tensor) -> Tensor | None:
        """What else than latents, b_dec and `lookup` is in the reconstruction of x [n, d], e.g. a skip connection."""
        return None

    @abstractmethod
    def decode(self, z: Tensor, x: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Reconstruction [n, d] float32 of z [n, m]; `x`, the activations encoded, is needed where `normalised`, and
        `tokens` [n], their ids, where there is a `lookup`."""


def load_dictionary(
    spec: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32, hook: str | None = None
) -> Dictionary:
    """The dictionary in a local folder or file, or the SAELens `release/sae_id` so named; InputError in one line.

    spec: as `split_spec` takes it. hook: which one is meant, where a file holds those of several hook points.
    """
    path, said = split_spec(spec)
    if not path.exists():
        from autointerp.evidence.dictionaries.saelens import load_release

        return load_release(str(spec), device, dtype)
    found = format_of(path)
    if found is None:
        raise InputError(f"SAE {spec}: {_unknown(path)}")
    for key in said:
        if key not in found.says:
            takes = f"takes {', '.join(found.says)}" if found.says else "says all there is to say"
            raise InputError(f"SAE {spec}: {key}= means nothing here, this format {takes}; give --sae {path}")
    return found.load(Source(path, said, hook), device, dtype)


def hook_of(spec: str | Path, hook: str | None = None) -> str | None:
    """The hook point that a local dictionary's files name; None where they name none, several, or cannot be read."""
    path, said = split_spec(spec)
    found = format_of(path) if path.exists() else None
    return found.hook(Source(path, said, hook)) if found else None


def format_of(path: Path) -> DictionaryFormat | None:
    """The format that a folder or file looks like; None if it looks like none."""
    return next((candidate for _name, candidate in DICTIONARIES.items() if candidate.matches(path)), None)


def _unknown(path: Path) -> str:
    if path.is_file():
        return f"is a file of no format we read ({', '.join(DICTIONARIES.names())}); give the folder that holds it"
    below = next((b for b in sorted(path.glob("*")) if b.is_dir() and format_of(b)), None)
    hint = f"give --sae {below}" if below else f"the formats are {', '.join(DICTIONARIES.names())}"
    return f"no cfg.json, nor any other file of a format we read; {hint}"


def check_fits(dictionary: Dictionary, d_model: int, spec: str | Path = "") -> None:
    """InputError unless the dictionary reads and writes activations of the model's residual width."""
    width = next((width for width in (dictionary.d_in, dictionary.W_dec.shape[1]) if width != d_model), None)
    if width is not None:
        name = f"SAE {spec}" if spec else "the SAE"
        raise InputError(
            f"{name} has d_in {width}, the model's residual width is {d_model}: it belongs to another model;"
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
