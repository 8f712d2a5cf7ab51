"""Encoders by architecture, whatever the format on disk: one matrix product, the activation in place, no autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.dictionaries.base import ActiveLatents, Dictionary

if TYPE_CHECKING:
    from sae_lens import SAE

PerLatent = Mapping[str, Tensor]
Activation = Callable[[Tensor, PerLatent], Tensor]


class Normalisation:
    """Token-by-token scaling of x before the encoder, u = (x − shift) / (scale + ε); undone without ε (as SAELens)."""

    def __init__(
        self, shift_and_scale: Callable[[Tensor], tuple[Tensor | float, Tensor]] | None = None, epsilon: float = 0
    ):
        self.shift_and_scale = shift_and_scale
        self.epsilon = epsilon

    @classmethod
    def named(cls, name: str) -> Normalisation:
        """By SAELens' name; those that it folds into the weights at training's end are the identity."""
        if name == "layer_norm":
            return cls(_mean_and_deviation, epsilon=1e-5)
        return cls(_relative_norm) if name == "constant_norm_rescale" else cls()

    def __bool__(self) -> bool:
        return self.shift_and_scale is not None

    def apply(self, x: Tensor) -> Tensor:
        """u [n, d] of x [n, d]."""
        if self.shift_and_scale is None:
            return x
        shift, scale = self.shift_and_scale(x)
        return (x - shift) / (scale + self.epsilon)

    def undo(self, u: Tensor, x: Tensor | None) -> Tensor:
        """Reconstructions u [n, d] back in the units of x [n, d]."""
        if self.shift_and_scale is None:
            return u
        if x is None:
            raise ValueError("this dictionary normalises each token: decode(z, x) needs x")
        shift, scale = self.shift_and_scale(x.to(u.dtype))
        return u * scale + shift


class _Decoding(Dictionary):
    """x̂ = z W_dec + b_dec."""

    normalisation: Normalisation
    W_skip: Tensor | None = None
    """Of a transcoder [d_out, d_in]: what it adds to the reconstruction is no latent's."""

    @torch.no_grad()
    def beside(self, x: Tensor) -> Tensor | None:
        if self.W_skip is None:
            return None
        return (x[:, -self.d_in :].to(self.W_skip.dtype) @ self.W_skip.T).float()

    @torch.no_grad()
    def decode(self, z: Tensor, x: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        u = torch.addmm(self.b_dec, z.to(self.W_dec.dtype), self.W_dec)
        if self.lookup is not None:
            if tokens is None:
                raise ValueError("this dictionary looks tokens up: decode(z, tokens=tokens) needs their ids")
            u += self.lookup[tokens]
        if self.W_skip is not None:
            if x is None:
                raise ValueError("this transcoder has a skip connection: decode(z, x) needs x")
            u += x[:, -self.d_in :].to(u.dtype) @ self.W_skip.T
        return self.normalisation.undo(u, x).float()


class Linear(_Decoding):
    """z = activation((u − b_dec) W_enc + b_enc), elementwise in the latents; 0 wherever that is not above `bar` [m]."""

    def __init__(
        self,
        W_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        *,
        b_enc: Tensor | None,
        activation: Activation,
        per_latent: PerLatent | None = None,
        bar: Tensor | None = None,
        subtract_b_dec: bool = True,
        normalisation: Normalisation | None = None,
    ):
        self.d_in, self.d_sae = W_enc.shape
        self.W_enc: Tensor = W_enc
        self.W_dec, self.b_dec, self.b_enc = W_dec, b_dec, b_enc
        self.activation = activation
        self.per_latent: PerLatent = per_latent or {}
        self.bar = W_enc.new_zeros(self.d_sae) if bar is None else bar
        self.subtract_b_dec = subtract_b_dec
        self.normalisation = normalisation or Normalisation()
        self.normalised = bool(self.normalisation)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        return self.activation(_affine(self._centred(x), self.W_enc, self.b_enc), self.per_latent).float()

    @torch.no_grad()
    def encode_columns(self, x: Tensor, latents: Tensor) -> Tensor:
        bias = None if self.b_enc is None else self.b_enc[latents]
        per_latent = {name: value[latents] for name, value in self.per_latent.items()}
        return self.activation(_affine(self._centred(x), self.W_enc[:, latents], bias), per_latent).float()

    @torch.no_grad()
    def encode_active(self, x: Tensor) -> ActiveLatents:
        # The activation is applied to the few entries above the bar: [n, m] is written once and read once.
        pre = _affine(self._centred(x), self.W_enc, self.b_enc)
        at = _positions(pre > self.bar)
        token, latent = at // self.d_sae, at % self.d_sae
        per_latent = {name: value[latent] for name, value in self.per_latent.items()}
        active = ActiveLatents(token, latent, self.activation(pre.view(-1)[at], per_latent).float())
        fires = active.value != 0
        return active if fires.all() else ActiveLatents(*(entries[fires] for entries in active))

    def _centred(self, x: Tensor) -> Tensor:
        # b_dec is subtracted rather than folded into the bias: it costs 1/m of the product, and folding would lose
        # digits where the stream has large coordinates that b_dec cancels.
        u = self.normalisation.apply(self.read_part(x).to(self.W_enc.dtype))
        return u - self.b_dec if self.subtract_b_dec else u


class TopK(Linear):
    """The k largest pre-activations of each token, those above 0; not elementwise, so columns cost a whole encoding."""

    def __init__(self, W_enc: Tensor, W_dec: Tensor, b_dec: Tensor, *, b_enc: Tensor | None, k: int, **options: Any):
        super().__init__(W_enc, W_dec, b_dec, b_enc=b_enc, activation=relu, **options)
        self.k = k

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        values, indices = self._largest(x)
        return torch.zeros(len(x), self.d_sae, device=values.device).scatter_(1, indices, values)

    @torch.no_grad()
    def encode_columns(self, x: Tensor, latents: Tensor) -> Tensor:
        return self.encode(x)[:, latents]

    @torch.no_grad()
    def encode_active(self, x: Tensor) -> ActiveLatents:
        values, indices = self._largest(x)
        token, slot = values.nonzero(as_tuple=True)
        return ActiveLatents(token, indices[token, slot], values[token, slot])

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Activations [n, k] float32 (0 for pre-activations not above 0) and their latents [n, k], in no order."""
        pre = _affine(self._centred(x), self.W_enc, self.b_enc)
        values, indices = pre.topk(self.k, dim=1, sorted=False)
        return values.relu_().float(), indices


class SignedTopK(TopK):
    """The k largest pre-activations of each token as they are, negative ones too; `by_size` ranks by |pre|."""

    def __init__(self, *weights: Tensor, by_size: bool, **options: Any):
        super().__init__(*weights, **options)
        self.signed, self.by_size = True, by_size

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = _affine(self._centred(x), self.W_enc, self.b_enc)
        indices = (pre.abs() if self.by_size else pre).topk(self.k, dim=1, sorted=False).indices
        return pre.gather(1, indices).float(), indices


class GroupMax(TopK):
    """The largest of each of k equal groups of consecutive latents, where above 0 (sparsify's `groupmax`)."""

    def _largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pre = _affine(self._centred(x), self.W_enc, self.b_enc)
        values, place = pre.unflatten(1, (self.k, -1)).max(dim=2)
        first = torch.arange(0, self.d_sae, self.d_sae // self.k, device=pre.device)
        return values.relu_().float(), place + first


class Generic(_Decoding):
    """An architecture that only sae_lens knows: its own `encode`. Activations may be negative."""

    def __init__(self, sae: SAE[Any], W_dec: Tensor):
        self.sae = sae
        self.d_in, self.d_sae = sae.cfg.d_in, sae.cfg.d_sae
        self.signed = True
        self.normalisation = Normalisation.named(sae.cfg.normalize_activations)
        self.normalised = bool(self.normalisation)
        # Ours, around its encode and decode: activations come flattened [n, d], and its own keeps state between them.
        sae.turn_off_forward_pass_hook_z_reshaping()
        sae.run_time_activation_norm_fn_in = sae.run_time_activation_norm_fn_out = lambda x: x
        rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        self.W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) if rescaled else W_dec
        self.b_dec = sae.decode(W_dec.new_zeros(1, self.d_sae))[0].detach()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        z = self.sae.encode(self.normalisation.apply(x.to(self.W_dec.dtype)))
        return (z.to_dense() if z.is_sparse else z).float()


def relu(pre: Tensor, _per_latent: PerLatent) -> Tensor:
    """max(pre, 0), in place."""
    return pre.relu_()


def jumprelu(pre: Tensor, per_latent: PerLatent) -> Tensor:
    """pre where it is above its latent's `threshold` (≥ 0), else 0; in place."""
    return pre.masked_fill_(pre <= per_latent["threshold"], 0)


def gated(pre: Tensor, per_latent: PerLatent) -> Tensor:
    """relu(pre · scale + b_mag) where pre + b_gate > 0 (https://arxiv.org/abs/2404.16014), from one product."""
    closed = pre + per_latent["b_gate"] <= 0
    return pre.mul_(per_latent["scale"]).add_(per_latent["b_mag"]).relu_().masked_fill_(closed, 0)


def _mean_and_deviation(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True)


def _relative_norm(x: Tensor) -> tuple[float, Tensor]:
    return 0.0, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5


def _positions(mask: Tensor) -> Tensor:
    """Flat indices of the true entries, ascending."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # several times faster than torch on few true entries
    return mask.flatten().nonzero()[:, 0]


def _affine(x: Tensor, W: Tensor, bias: Tensor | None) -> Tensor:
    return x @ W if bias is None else torch.addmm(bias, x, W)
