"""Which sequences of the spool matter to which latent: the peaks of each, from one reading of the whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.parallel import at_once, in_order
from autointerp.evidence.spool import Spool, Stretch
from autointerp.records import ContextKind, Split

BEFORE, AFTER = 23, 8
"""Tokens of a window before and after its peak."""
STRETCH = 2048
"""Tokens surveyed at a time."""
SPLITS: tuple[Split, Split] = ("explain", "score")
MIN_SILENT = 8
"""Tokens without a firing, in a sequence with one, that make a silent context where silent sequences are too few."""


@dataclass(frozen=True)
class Survey:
    """Each sequence's peaks for the selected latents. S sequences, k latents; −inf where no token is counted."""

    latents: list[int]
    base: np.ndarray
    """Largest z_base [S, k]."""
    adapted: np.ndarray
    """Largest z_adapted [S, k]."""
    gain: np.ndarray
    """Largest z_adapted − z_base [S, k]."""
    loss: np.ndarray
    """Largest z_base − z_adapted [S, k]."""
    silence: np.ndarray
    """Tokens of the longest stretch silent on both sides [S, k], int32; the whole length where nothing fires."""


@dataclass(frozen=True)
class Pick:
    """One chosen context before its text is read."""

    kind: ContextKind
    split: Split
    sequence: int
    peak: float
    """What it is ranked by."""


def activations(
    spool_x: torch.Tensor, counted: np.ndarray, dictionary: Dictionary, latents: torch.Tensor
) -> np.ndarray:
    """z [n, k] of spooled activations x [n, d]; 0 at tokens that are not counted."""
    z = dictionary.encode_columns(spool_x.to(dictionary.W_dec.device).float(), latents).float().cpu().numpy()
    z[~counted] = 0
    return z


def survey(spool: Spool, dictionary: Dictionary, latents: Sequence[int]) -> Survey:
    """Reads the whole spool once."""
    columns = torch.as_tensor(list(latents), dtype=torch.long, device=dictionary.W_dec.device)
    peaks = np.full((4, len(spool), len(latents)), -np.inf, dtype=np.float32)
    silence = np.zeros((len(spool), len(latents)), dtype=np.int32)

    def look(_hand: int, stretch: Stretch) -> None:
        base = activations(stretch.x_base, stretch.counted, dictionary, columns)
        adapted = activations(stretch.x_adapted, stretch.counted, dictionary, columns)
        lengths = silent_for((base > 0) | (adapted > 0), stretch.bounds)
        silence[stretch.sequences] = np.maximum.reduceat(lengths, stretch.bounds[:-1], axis=0)
        for row, values in enumerate((base, adapted, adapted - base, base - adapted)):
            values[~stretch.counted] = -np.inf
            peaks[row, stretch.sequences] = np.maximum.reduceat(values, stretch.bounds[:-1], axis=0)

    in_order(look, lambda _: None, range(at_once(columns.device)), spool.stretches(STRETCH))
    base, adapted, gain, loss = peaks
    return Survey(list(latents), base, adapted, gain, loss, silence)


def base_peaks(spool: Spool, dictionary: Dictionary, latents: Sequence[int], tokens: int) -> dict[int, np.ndarray]:
    """Largest z_base of each sequence [S] for each latent, −inf beyond the first `tokens` tokens of the spool, which
    are a sample: documents are in shuffled order."""
    columns = torch.as_tensor(list(latents), dtype=torch.long, device=dictionary.W_dec.device)
    peaks = np.full((len(spool), len(latents)), -np.inf, dtype=np.float32)

    def look(_hand: int, stretch: Stretch) -> None:
        base = activations(stretch.x_base, stretch.counted, dictionary, columns)
        base[~stretch.counted] = -np.inf
        peaks[stretch.sequences] = np.maximum.reduceat(base, stretch.bounds[:-1], axis=0)

    part = islice(spool.stretches(STRETCH), max(1, tokens // STRETCH))
    in_order(look, lambda _: None, range(at_once(columns.device)), part if latents else ())
    return {latent: peaks[:, at] for at, latent in enumerate(latents)}


def silent_for(fires: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """For each token, how many tokens of its sequence up to and with it are silent in a row [n, k], int32.

    fires [n, k]: whether the latent fires on either side; bounds: first token of each sequence, and the end.
    """
    at = np.arange(1, len(fires) + 1, dtype=np.int32)[:, None]
    last = np.where(fires, at, 0)
    starts = bounds[:-1]
    last[starts] = np.maximum(last[starts], starts[:, None])
    return at - np.maximum.accumulate(last, axis=0)
