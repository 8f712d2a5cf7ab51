"""autointerp: what did the training change? The whole public API; importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LabelCallback", "Results", "alabel", "label", "open"]

if TYPE_CHECKING:
    from autointerp.api import alabel, label, open
    from autointerp.results import Results
    from autointerp.training import LabelCallback

_HOMES = {
    "alabel": "autointerp.api",
    "label": "autointerp.api",
    "open": "autointerp.api",
    "LabelCallback": "autointerp.training",
    "Results": "autointerp.results",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'autointerp' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
