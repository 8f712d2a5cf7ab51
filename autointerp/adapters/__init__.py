"""Small torch modules that act at one hook of a frozen model, trainable in any loop; see docs/adapters.md.

>>> adapter = Scaling(load_dictionary("sae"))
>>> with attached(model, adapter, "blocks.6.hook_resid_post"):
...     model(ids, labels=ids).loss.backward()
>>> save(adapter, "out", hook="blocks.6.hook_resid_post", base="gpt2", sae="sae")
"""

from __future__ import annotations

from autointerp.adapters.files import attached, load, save
from autointerp.adapters.modules import Bias, Ffnn, HookAdapter, LowRank, Residual, Scaling, SparseLinear
from autointerp.evidence.dictionaries import load_dictionary

__all__ = [
    "Bias",
    "Ffnn",
    "HookAdapter",
    "LowRank",
    "Residual",
    "Scaling",
    "SparseLinear",
    "attached",
    "load",
    "load_dictionary",
    "save",
]
