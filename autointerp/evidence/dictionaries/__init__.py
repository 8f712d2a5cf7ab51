"""SAE dictionaries: one module per format on disk, behind one registry. `load_dictionary` is the way in."""

from __future__ import annotations

from autointerp.evidence.dictionaries.base import (
    DICTIONARIES,
    ActiveLatents,
    Dictionary,
    check_fits,
    hook_of,
    load_dictionary,
)

__all__ = ["DICTIONARIES", "ActiveLatents", "Dictionary", "check_fits", "hook_of", "load_dictionary"]
