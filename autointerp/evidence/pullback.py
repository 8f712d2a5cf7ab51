"""Small adapters read through a dictionary: what each unit reads from and writes to, in latents. Pure functions.

Notation: m latents with decoder rows d_i (W_dec [m, d]), x = z W_dec + b_dec + ε. All sizes are the same for adapters
that compute the same: scaling a ReLU unit's input by c > 0 and its output by 1/c, or putting R R⁻¹ between the factors
of a linear adapter, changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_TINY = 1e-30


class Sides(NamedTuple):
    """How strongly each latent is read and written, [m] each."""

    read: Tensor
    write: Tensor


class PreActivation(NamedTuple):
    """Pre-activations W_in x + b_in of an adapter on the stream, by where they come from; exact in their sum."""

    latents: Tensor
    """z (W_in W_decᵀ)ᵀ [n, h]: the part that latents say."""
    constant: Tensor
    """W_in b_dec + b_in [h]: there when no latent fires."""
    error: Tensor
    """ε W_inᵀ [n, h]: what the dictionary does not reconstruct."""

    @property
    def total(self) -> Tensor:
        return self.latents + self.constant + self.error


def bias_shares(bias: Tensor, W_dec: Tensor) -> Tensor:
    """Share [m] of each latent in v = b W_dec, what a bias b [m] on latents writes: c_i = b_i⟨d_i, v⟩/‖v‖², Σ c_i = 1.

    Negative where a latent is pushed against the whole. Where m > d, entries of b can cancel in v: |b_i|‖d_i‖ would be
    fooled by them, c_i is not. All zero where v is.
    """
    v = bias.to(W_dec) @ W_dec
    return bias.to(W_dec) * (W_dec @ v) / v.square().sum().clamp_min(_TINY)


def scaling_sizes(scaling: Tensor, W_dec: Tensor, mean: Tensor | None = None) -> Tensor:
    """Of z ⊙ (1 + s), s [m]: |s_i| E[z_i] ‖d_i‖ [m] in residual-norm units, `mean` = E[z] [m] from a corpus.

    Without one, |s_i|: how much each latent is changed where it fires, not how much that matters.
    """
    size = scaling.abs()
    return size if mean is None else size * mean * W_dec.norm(dim=1)


def linear_sides(down: Tensor, up: Tensor) -> Sides:
    """Of z + up(down z), down [r, m], up [m, r]: row and column norms of the product, which is never formed."""
    R_down = torch.linalg.qr(down.T).R  # [r, r]
    R_up = torch.linalg.qr(up).R
    return Sides((R_up @ down).norm(dim=0), (up @ R_down.T).norm(dim=1))


def sparse_sides(indices: Tensor, values: Tensor, m: int) -> Sides:
    """Of z + W z with W sparse: its column and row norms. indices [2, nnz]: latents written, latents read."""
    written, read = indices
    square = values.square()
    empty = values.new_zeros(m)
    return Sides(empty.index_add(0, read, square).sqrt(), empty.index_add(0, written, square).sqrt())


def network_sides(W1: Tensor, b1: Tensor, W2: Tensor) -> Sides:
    """Of z + W2 φ(W1 z + b1), W1 [h, m], W2 [m, h], φ(c·a) = c·φ(a) for c > 0: write ‖W2[i]⊙n‖ with
    n_k = ‖(W1[k], b1_k)‖, read ‖W1[:, j]⊙w‖ with w_k = ‖W2[:, k]‖."""
    n = torch.cat([W1, b1[:, None]], 1).norm(dim=1)
    return Sides((W1 * W2.norm(dim=0)[:, None]).norm(dim=0), (W2 * n).norm(dim=1))


def pre_activation(W_in: Tensor, b_in: Tensor, W_dec: Tensor, b_dec: Tensor, z: Tensor, error: Tensor) -> PreActivation:
    """Of an adapter W_out φ(W_in x + b_in) on the stream, at x = z W_dec + b_dec + error. W_in [h, d], z [n, m], error
    [n, d]."""
    return PreActivation(z @ (W_dec @ W_in.T), W_in @ b_dec + b_in, error @ W_in.T)


def unit_reads(W_in: Tensor, W_out: Tensor) -> Tensor:
    """What each unit reads, by what it writes for a unit of it: W_in[k] ‖W_out[:, k]‖ [h, d]."""
    return W_in * W_out.norm(dim=0)[:, None]


def residual_reads(W_in: Tensor, b_in: Tensor, W_out: Tensor, W_dec: Tensor) -> Tensor:
    """How unit k answers to latent j: ⟨W_in[k], d_j⟩ ‖W_out[:, k]‖ [h, m], what it writes for each unit of activation.

    W_out [d, h]. Signed: positive drives the unit.
    """
    return unit_reads(W_in, W_out) @ W_dec.T


def unit_writes(W_in: Tensor, b_in: Tensor, W_out: Tensor) -> Tensor:
    """What each unit adds to what it writes to, at inputs of norm 1: n_k W_out[:, k] [h, d], n_k = ‖(W_in[k], b_k)‖."""
    return W_out.T * torch.cat([W_in, b_in[:, None]], 1).norm(dim=1)[:, None]
