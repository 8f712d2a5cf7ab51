"""Transcoders: latents encoded from u at one hook point (what an MLP reads), decoded at another (what it writes).

    z = activation(u W_enc + b_enc),  v̂ = z W_dec + b_dec (+ u W_skipᵀ)

The change is read where the transcoder writes: Δv, by the latents of u. To the rest of the evidence an activation is
then x = [v | u], both in one row: the change map and all figures of the run see v, `encode` sees u.
"""

from __future__ import annotations

from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.dictionaries.kernels import Linear


def reading_elsewhere(dictionary: Linear, hook_in: str, W_skip: Tensor | None = None) -> Linear:
    """The dictionary as a transcoder that reads `hook_in`; it must not subtract b_dec, which is of the other hook."""
    dictionary.hook_in, dictionary.W_skip = hook_in, W_skip
    return dictionary


def refuse_transcoder(dictionary: Dictionary, what: str) -> None:
    """InputError where the dictionary reads at another hook than it writes, which `what` cannot do with."""
    if dictionary.hook_in is not None:
        raise InputError(
            f"{dictionary.format}: reads {dictionary.hook_in} and writes {dictionary.hook}, {what} takes one hook: give"
            " --sae an autoencoder; select, label, check and show work with a transcoder"
        )
