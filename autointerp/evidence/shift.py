"""The simplest function at a hook: a constant added to every position."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Shift(nn.Module):
    """x + v for activations x [..., d]."""

    v: Tensor

    def __init__(self, v: Tensor):
        """v [d]."""
        super().__init__()
        self.register_buffer("v", v.detach().to(torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.v.to(x.dtype)

    def has_effect(self) -> bool:
        return bool(self.v.any())
