"""A dictionary of any size in seconds: drawn directions, and biases by which it fires as a trained one does."""

from __future__ import annotations

from pathlib import Path

import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

NEVER = -1e9
"""Bias of a latent that is to be dead."""


def save_drawn(folder: Path, hook: str, directions: Tensor, x: Tensor, l0: float, spread: float) -> None:
    """Saves an SAE with decoder rows `directions` [m, d] and the encoder tied to them.

    The biases are such that on the activations x [n, d] it has the given L0, and how often latents fire is log-normal
    (`spread`: standard deviation of the logarithm), as in trained ones. Rarer than once in x is never.
    """
    m, d = directions.shape
    metadata = SAEMetadata(hook_name=hook, prepend_bos=True)
    sae = StandardSAE(StandardSAEConfig(d_in=d, d_sae=m, device="cpu", dtype="float32", metadata=metadata))
    sae.W_dec.data = torch.nn.functional.normalize(directions, dim=1)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    rate = torch.exp(spread * torch.randn(m))
    rate = (rate * l0 / rate.sum()).clamp(max=0.5)
    for latents in torch.arange(m).split(1024):
        pre = (x @ sae.W_enc[:, latents]).sort(dim=0, descending=True).values
        at = (rate[latents] * len(x)).long()
        sae.b_enc.data[latents] = torch.where(at > 0, -pre.gather(0, at[None])[0], NEVER)
    sae.save_model(folder)
