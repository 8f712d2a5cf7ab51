"""The weight changes of an IA3, which scales what a module puts out or, in feed-forward layers, what it takes in: the
rows or the columns of the base's own matrix (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

from autointerp.errors import InputError
from autointerp.evidence.weight_change import WeightChange

if TYPE_CHECKING:
    from autointerp.evidence.peft_weights import PeftFiles


def check(files: PeftFiles) -> None:
    """InputError for files without an IA3."""
    if not files.parts and not files.whole:
        raise InputError(f"{files}: holds no ia3_l; save it again with PEFT's save_pretrained")


def change(files: PeftFiles, module: str, left_out: Counter[str]) -> WeightChange:
    """ΔW = diag(l − 1) W of one module, or W diag(l − 1) where its input is scaled; a scaled bias is left out."""
    scale = files.read(module, "ia3_l")
    W = files.base_matrix(module, "IA3")
    if scale.shape not in ((len(W), 1), (1, W.shape[1])):
        raise files.misfit(module, f"scales {list(scale.shape)} for a matrix {list(W.shape)}")
    bias = None if files.base is None else files.base.weight(f"{module}.bias")
    if bias is not None and scale.shape[1] == 1 and torch.any(bias * (scale.flatten() - 1)):
        left_out["bias or norm"] += 1
    return WeightChange(module, W.mul_(scale.sub_(1)))
