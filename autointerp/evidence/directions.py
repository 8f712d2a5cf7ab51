"""Encoder columns and decoder rows of a dictionary, a block at a time: for what needs no activations, a dictionary of
any size takes little memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import Dictionary, load_dictionary
from autointerp.evidence.dictionaries.transcoder import refuse_transcoder
from autointerp.evidence.tensor_files import all_finite
from autointerp.evidence.weight_files import check_header, not_finite, read_json

BLOCK = 4096
"""Latents read at once."""
CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_LINEAR = ("standard", "jumprelu", "gated", "topk", "batchtopk")
"""SAELens architectures whose W_enc [d, m] and W_dec [m, d] act on the stream as they stand, up to their lengths."""

Block = tuple[slice, Tensor]
"""Which latents, and their directions as columns [d, n], float32."""


class Directions(ABC):
    """Directions of m latents over a stream of width d. Their lengths mean nothing: formats scale them differently."""

    d: int
    m: int
    format: str
    hook: str | None
    layer_norm: bool = False
    """Whether the encoder sees each activation centred, so that its columns have no mean."""
    relative_norm: Tensor | None = None
    """As the dictionary has it."""

    @abstractmethod
    def encoder_blocks(self) -> Iterator[Block]:
        """What each latent detects; decoder rows where the format has no linear encoder."""

    @abstractmethod
    def decoder_blocks(self) -> Iterator[Block]:
        """What each latent writes."""

    @abstractmethod
    def decoder_rows(self, latents: list[int]) -> Tensor:
        """[k, d] float32."""


def open_directions(spec: str, hook: str | None = None, decoder_only: bool = False) -> Directions:
    """Of the SAE in a local folder or a SAELens release; InputError, in one line, for what is wrong with it.

    hook: which one is meant, where a file holds those of several hook points. decoder_only: nothing is asked of
    encoders, so that a transcoder, whose encoder is of another place than its decoder, will do.
    """
    folder = Path(spec)
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        config = read_json(folder / CONFIG, "SAE")
        if config.get("architecture", "standard") in _LINEAR and not config.get("use_error_term"):
            return OnDisk(folder, config)
    return InMemory(load_dictionary(spec, hook=hook), decoder_only)


class InMemory(Directions):
    """Of a dictionary that is loaded."""

    def __init__(self, dictionary: Dictionary, decoder_only: bool = False):
        if not decoder_only:
            refuse_transcoder(dictionary, "reading the weights alone")
        self.dictionary = dictionary
        self.d, self.m, self.format, self.hook = (
            dictionary.W_dec.shape[1],
            dictionary.d_sae,
            dictionary.format,
            dictionary.hook,
        )
        self._encoder = dictionary.W_dec.T if dictionary.W_enc is None else dictionary.W_enc
        self._decoder = dictionary.W_dec
        self.relative_norm = dictionary.relative_norm

    def encoder_blocks(self) -> Iterator[Block]:
        return ((at, self._encoder[:, at].float().cpu()) for at in _slices(self.m))

    def decoder_blocks(self) -> Iterator[Block]:
        return ((at, self._decoder[at].float().cpu().T) for at in _slices(self.m))

    def decoder_rows(self, latents: list[int]) -> Tensor:
        return self._decoder[latents].float().cpu()


class OnDisk(Directions):
    """Of a SAELens folder, read from its file block by block."""

    def __init__(self, folder: Path, config: dict[str, Any]):
        self._name, self._file = f"SAE {folder}", folder / WEIGHTS
        check_header(self._file, "SAE")
        for key in ("d_in", "d_sae"):
            if not isinstance(config.get(key), int):
                raise InputError(f"{self._name}: {CONFIG} has no {key}; give --sae a SAE that SAELens saved")
        self.d, self.m = config["d_in"], config["d_sae"]
        self.format = f"saelens/{config.get('architecture', 'standard')}"
        metadata = config.get("metadata") if isinstance(config.get("metadata"), dict) else {}
        self.hook = config.get("hook_name") or config.get("hook_point") or (metadata or {}).get("hook_name")
        self.layer_norm = config.get("normalize_activations") == "layer_norm"
        with safe_open(self._file, framework="pt") as file:
            keys = set(file.keys())
            for key, shape in (("W_enc", [self.d, self.m]), ("W_dec", [self.m, self.d])):
                if key not in keys:
                    raise InputError(f"{self._name}: {WEIGHTS} lacks {key}; save it again or give another --sae")
                if (found := file.get_slice(key).get_shape()) != shape:
                    raise InputError(
                        f"{self._name}: {key} has shape {found}, its config (d_in {self.d}, d_sae {self.m}) wants"
                        f" {shape}; save it again"
                    )

    def encoder_blocks(self) -> Iterator[Block]:
        for at in _slices(self.m):
            yield at, self._read("W_enc", (slice(None), at))

    def decoder_blocks(self) -> Iterator[Block]:
        for at in _slices(self.m):
            yield at, self._read("W_dec", (at,)).T

    def decoder_rows(self, latents: list[int]) -> Tensor:
        with safe_open(self._file, framework="pt") as file:
            rows = file.get_slice("W_dec")
            return torch.cat([torch.zeros(0, self.d), *(rows[j : j + 1].to(torch.float32, copy=True) for j in latents)])

    def _read(self, key: str, at: tuple[slice, ...]) -> Tensor:
        with safe_open(self._file, framework="pt") as file:  # mapped for this block alone
            block = file.get_slice(key)[at].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        if not all_finite(block):
            raise not_finite(self._name, key)
        return block


def _slices(m: int) -> Iterator[slice]:
    return (slice(at, min(at + BLOCK, m)) for at in range(0, m, BLOCK))
