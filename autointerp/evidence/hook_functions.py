"""What adapters of other libraries put in the place of an activation: ISaeRFT's network, FSRL's steering, LoReFT.

For use, not for training: weights are buffers, and what a weight meets twice is multiplied out once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autointerp.adapters.modules import HookAdapter, OnLatents
from autointerp.evidence.dictionaries import Dictionary

Map = tuple[Tensor, Tensor, bool]
"""weight [out, in], bias [out], and whether a ReLU follows."""


class Network(OnLatents):
    """z + network(z), where the network is a chain of linear maps (ISaeRFT's ResidualBlock)."""

    kind = "network"
    _to_stream: Tensor
    _bias_in_stream: Tensor

    def __init__(self, dictionary: Dictionary, maps: Sequence[Map]):
        """The first map takes m latents, the last gives m and has no ReLU behind it."""
        super().__init__(dictionary)
        self.maps = [(weight.float(), bias.float(), relu) for weight, bias, relu in maps]
        weight, bias, _ = self.maps[-1]
        # The last map and the decoder are one map: no token needs the m outputs in between.
        self.register_buffer("_to_stream", weight.T @ self.W_dec)
        self.register_buffer("_bias_in_stream", bias @ self.W_dec)

    def write(self, x: Tensor) -> Tensor:
        hidden = self.dictionary.encode(x)
        for weight, bias, relu in self.maps[:-1]:
            hidden = torch.addmm(bias, hidden, weight.T)
            hidden = hidden.relu_() if relu else hidden
        return torch.addmm(self._bias_in_stream, hidden, self._to_stream)

    def has_effect(self) -> bool:
        return bool(self._to_stream.any() or self._bias_in_stream.any())


class Steering(OnLatents):
    """z + s or z · (1 + s) in the place of z, for s = magnitude · activation(W (x − centre) + bias) (FSRL)."""

    kind = "steering"
    weight: Tensor
    bias: Tensor
    centre: Tensor
    magnitude: Tensor

    def __init__(
        self,
        dictionary: Dictionary,
        weight: Tensor,
        bias: Tensor,
        *,
        centre: Tensor,
        magnitude: Tensor,
        activation: Callable[[Tensor], Tensor],
        multiplies: bool,
        rectified: bool,
    ):
        """weight [m, d]; bias and magnitude [m]; centre [d]. `rectified`: a ReLU behind z + s."""
        super().__init__(dictionary)
        for name, value in (("weight", weight), ("bias", bias), ("centre", centre), ("magnitude", magnitude)):
            self.register_buffer(name, value.float())
        self._activation, self._multiplies, self._rectified = activation, multiplies, rectified

    def write(self, x: Tensor) -> Tensor:
        z = self.dictionary.encode(x)
        steer = self._activation(torch.addmm(self.bias, x - self.centre, self.weight.T)) * self.magnitude
        new = z * (1 + steer) if self._multiplies else z + steer
        return ((new.relu_() if self._rectified else new) - z) @ self.W_dec

    def has_effect(self) -> bool:
        return bool(self.magnitude.any() and (self.weight.any() or self.bias.any()))


class Loreft(HookAdapter):
    """x + (W x + b − R x) Rᵀ: what x is in the subspace of R's rows becomes W x + b (https://arxiv.org/abs/2404.03592)."""

    kind = "loreft"
    weight: Tensor
    bias: Tensor
    rotation: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, rotation: Tensor):
        """weight and rotation [r, d], bias [r]."""
        super().__init__()
        for name, value in (("weight", weight), ("bias", bias), ("rotation", rotation)):
            self.register_buffer(name, value.float())

    def write(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, (self.weight - self.rotation).T) @ self.rotation

    def has_effect(self) -> bool:
        return bool(self.bias.any()) or not torch.equal(self.weight, self.rotation)


def soft_threshold(threshold: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ sign(v) · max(|v| − threshold, 0), for threshold [m]."""
    return lambda v: v.sign() * (v.abs() - threshold).relu_()


def jump_relu(threshold: Tensor) -> Callable[[Tensor], Tensor]:
    """v ↦ max(v, 0) where that is above threshold [m], else 0."""
    return lambda v: v.relu() * (v.relu() > threshold)
