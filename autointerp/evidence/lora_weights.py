"""The weight changes of a LoRA: LoRA, rsLoRA, rank and alpha patterns, embeddings; DoRA where the base's weights are at
hand."""

from __future__ import annotations

import re
from collections import Counter
from math import sqrt
from typing import TYPE_CHECKING, Any

from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.weight_change import INSTEAD, WeightChange

if TYPE_CHECKING:
    from autointerp.evidence.peft_weights import PeftFiles

_UNREADABLE = (
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "monteclora_config",
    "arrow_config",
    "alora_invocation_tokens",
    "target_parameters",
    "layer_replication",
)
"""Settings with which what is added to a matrix of the base is not B A."""
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_DEFAULT_ALPHA = 8
"""PEFT's own, where the config says nothing."""


def check(files: PeftFiles) -> None:
    """InputError for settings with which weights alone do not say what is added, and for files without a LoRA."""
    config = files.config
    start = config.get("init_lora_weights")
    odd = next((key for key in _UNREADABLE if config.get(key)), None)
    if odd or (isinstance(start, str) and start.lower().startswith(_REWRITES_BASE)):
        setting = odd or f"init_lora_weights={start}"
        raise InputError(f"{files}: with {setting}, B A is not what was changed; {INSTEAD}")
    if not files.parts and not files.whole:
        raise InputError(f"{files}: holds no lora_A and lora_B; save it again with PEFT's save_pretrained")


def change(files: PeftFiles, module: str, left_out: Counter[str]) -> WeightChange:
    """ΔW of one module, as it is merged: s·B A, s = α/r, or α/√r with rslora; for DoRA
    m·(W + s·B A)/‖W + s·B A‖ − W, by rows (https://arxiv.org/abs/2402.09353)."""
    embedding = "lora_embedding_A" in files.parts[module]
    keys = ("lora_embedding_B", "lora_embedding_A") if embedding else ("lora_B", "lora_A")
    B, A = (files.read(module, key) for key in keys)
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise InputError(
            f"{files}: {module} has lora_B {list(B.shape)} and lora_A {list(A.shape)}, which do not fit each other;"
            " save it again with PEFT's save_pretrained"
        )
    vocabulary = A.shape[1] if embedding else 1
    left = B * _scale(files.config, module, A.shape[0])
    if "lora_magnitude_vector" not in files.parts[module]:
        return WeightChange(module, left, A, vocabulary)
    return WeightChange(module, _dora(files, module, left @ A), None, vocabulary)


def _scale(config: dict[str, Any], module: str, rank: int) -> float:
    """s, with the module's own alpha where a pattern of the config names it (as PEFT matches patterns)."""
    pattern = config.get("alpha_pattern") or {}
    own = next((key for key in pattern if re.match(rf"(.*\.)?({key})$", module)), None)
    alpha = float(pattern[own] if own is not None else config.get("lora_alpha", _DEFAULT_ALPHA))
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _dora(files: PeftFiles, module: str, added: Tensor) -> Tensor:
    """ΔW [out, in] of a DoRA module, which rescales every row of the base's own matrix."""
    W = files.base_matrix(module, "DoRA")
    if W.shape != added.shape:
        raise files.misfit(module, f"a change {list(added.shape)} of a matrix {list(W.shape)}")
    magnitude = files.read(module, "lora_magnitude_vector").flatten()
    merged = W + added
    norms = merged.norm(dim=1)
    if len(magnitude) != len(norms):
        raise InputError(f"{files}: {module} has {len(magnitude)} magnitudes for {len(norms)} rows; save it again")
    return merged * (magnitude / norms)[:, None] - W
