"""The modules. Each starts as the identity, keeps the SAE's reconstruction error as it is, and has no [m, m] matrix.

On latents z of activations x: x' = x + (z' − z) W_dec, which is decode(z') + (x − decode(z)). The latents are taken as
given: no gradient flows back through the encoder, which is exact as long as nothing before the hook is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autointerp.errors import InputError
from autointerp.evidence.dictionaries import Dictionary
from autointerp.evidence.dictionaries.transcoder import refuse_transcoder

ACTIVATIONS = {"relu": torch.relu, "gelu": nn.functional.gelu, "silu": nn.functional.silu, "tanh": torch.tanh}


class HookAdapter(nn.Module, ABC):
    """x + write(x) for activations x [..., d]."""

    kind: str

    @abstractmethod
    def write(self, x: Tensor) -> Tensor:
        """What is added [n, d] to x [n, d], float32."""

    @abstractmethod
    def has_effect(self) -> bool:
        """Whether it changes anything; True in doubt."""

    def forward(self, x: Tensor) -> Tensor:
        written = self.write(x.reshape(-1, x.shape[-1]).float())
        return x + written.expand(x.shape[:-1].numel(), -1).view_as(x).to(x.dtype)

    def settings(self) -> dict[str, Any]:
        """What besides its weights is needed to make it again."""
        return {}


class OnLatents(HookAdapter):
    """An adapter in the basis of a dictionary, which is not trained and not saved with it."""

    def __init__(self, dictionary: Dictionary):
        super().__init__()
        if dictionary.normalised:
            raise InputError(f"{dictionary.format}: normalises each token; adapters need latents in the units of x")
        refuse_transcoder(dictionary, "an adapter on latents")
        self.dictionary, self.m, self.d = dictionary, dictionary.d_sae, dictionary.d_in
        self._device = dictionary.W_dec.device

    @property
    def W_dec(self) -> Tensor:
        return self.dictionary.W_dec.float()

    def zeros(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.zeros(*shape, device=self._device))

    def random(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(*shape, device=self._device) / shape[-1] ** 0.5)


class Bias(OnLatents):
    """z + b: a learned steering pattern."""

    kind = "bias"

    def __init__(self, dictionary: Dictionary):
        super().__init__(dictionary)
        self.bias = self.zeros(self.m)

    def write(self, x: Tensor) -> Tensor:
        return (self.bias @ self.W_dec)[None]

    def has_effect(self) -> bool:
        return bool(self.bias.any())


class Scaling(OnLatents):
    """z · (1 + s)."""

    kind = "scaling"

    def __init__(self, dictionary: Dictionary):
        super().__init__(dictionary)
        self.scale = self.zeros(self.m)

    def write(self, x: Tensor) -> Tensor:
        return (self.dictionary.encode(x) * self.scale) @ self.W_dec

    def has_effect(self) -> bool:
        return bool(self.scale.any())


class Ffnn(OnLatents):
    """z + W_out φ(W_in z + b_in) + b_out; W_in [h, m], W_out [m, h]."""

    kind = "ffnn"

    def __init__(self, dictionary: Dictionary, hidden: int = 32, activation: str = "relu"):
        super().__init__(dictionary)
        self.hidden, self.activation = _small(hidden, self.d), _known(activation)
        self.W_in, self.b_in = self.random(hidden, self.m), self.zeros(hidden)
        self.W_out, self.b_out = self.zeros(self.m, hidden), self.zeros(self.m)

    def write(self, x: Tensor) -> Tensor:
        units = ACTIVATIONS[self.activation](self.dictionary.encode(x) @ self.W_in.T + self.b_in)
        return units @ (self.W_out.T @ self.W_dec) + self.b_out @ self.W_dec

    def has_effect(self) -> bool:
        return bool(self.W_out.any() or self.b_out.any())

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "activation": self.activation}


class LowRank(OnLatents):
    """z + W_out W_in z; W_in [r, m], W_out [m, r]."""

    kind = "low_rank"

    def __init__(self, dictionary: Dictionary, hidden: int = 8):
        super().__init__(dictionary)
        self.hidden = _small(hidden, self.d)
        self.W_in, self.W_out = self.random(hidden, self.m), self.zeros(self.m, hidden)

    def write(self, x: Tensor) -> Tensor:
        return (self.dictionary.encode(x) @ self.W_in.T) @ (self.W_out.T @ self.W_dec)

    def has_effect(self) -> bool:
        return bool(self.W_out.any() and self.W_in.any())

    def settings(self) -> dict[str, Any]:
        return {"hidden": self.hidden}


class SparseLinear(OnLatents):
    """z[outputs] + W z[inputs], W [n_outputs, n_inputs]: chosen latents to chosen latents. Call `shrink` after each
    optimizer step, so that weights become exactly zero."""

    kind = "sparse_linear"
    inputs: Tensor
    outputs: Tensor

    def __init__(self, dictionary: Dictionary, inputs: Sequence[int], outputs: Sequence[int]):
        super().__init__(dictionary)
        for latents in (inputs, outputs):
            if not latents or len(set(latents)) < len(latents) or not 0 <= min(latents) <= max(latents) < self.m:
                raise InputError(f"latents {list(latents)[:5]} …: want different ones between 0 and {self.m - 1}")
        if len(inputs) * len(outputs) > self.m * self.d:
            raise InputError(f"{len(inputs)} × {len(outputs)} weights: more than the SAE's own; choose fewer latents")
        self.register_buffer("inputs", torch.tensor(inputs, device=self._device), persistent=False)
        self.register_buffer("outputs", torch.tensor(outputs, device=self._device), persistent=False)
        self.weight = self.zeros(len(outputs), len(inputs))

    def write(self, x: Tensor) -> Tensor:
        return (self.dictionary.encode_columns(x, self.inputs) @ self.weight.T) @ self.W_dec[self.outputs]

    @torch.no_grad()
    def shrink(self, by: float) -> None:
        """The proximal step of `by`·‖W‖₁ (learning rate × penalty): each weight moves `by` towards zero, and stays."""
        self.weight.copy_(self.weight.sign() * (self.weight.abs() - by).clamp_min(0))

    def has_effect(self) -> bool:
        return bool(self.weight.any())

    def settings(self) -> dict[str, Any]:
        return {"inputs": self.inputs.tolist(), "outputs": self.outputs.tolist()}


class Residual(HookAdapter):
    """x + W_out φ(W_in x + b_in), without a dictionary; W_in [h, d], W_out [d, h]."""

    kind = "residual"

    def __init__(self, d: int, hidden: int = 32, activation: str = "relu"):
        super().__init__()
        self.d, self.hidden, self.activation = d, hidden, _known(activation)
        self.W_in, self.b_in = nn.Parameter(torch.randn(hidden, d) / d**0.5), nn.Parameter(torch.zeros(hidden))
        self.W_out = nn.Parameter(torch.zeros(d, hidden))

    def write(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x @ self.W_in.T + self.b_in) @ self.W_out.T

    def has_effect(self) -> bool:
        return bool(self.W_out.any())

    def settings(self) -> dict[str, Any]:
        return {"d": self.d, "hidden": self.hidden, "activation": self.activation}


def _small(hidden: int, d: int) -> int:
    if not 0 < hidden <= d:
        raise InputError(f"hidden size {hidden}: want 1 to the residual width, {d}")
    return hidden


def _known(activation: str) -> str:
    if activation not in ACTIVATIONS:
        raise InputError(f"activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
    return activation


KINDS: dict[str, type[HookAdapter]] = {
    kind.kind: kind for kind in (Bias, Scaling, Ffnn, LowRank, SparseLinear, Residual)
}
