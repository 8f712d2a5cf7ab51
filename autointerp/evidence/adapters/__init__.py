"""Adapters on disk: one module per format, behind one registry. `detect` is the way in."""

from __future__ import annotations

from autointerp.evidence.adapters.base import (
    ADAPTERS,
    AdapterFormat,
    View,
    detect,
    format_of,
    local_folder,
    separate,
    together,
)

__all__ = ["ADAPTERS", "AdapterFormat", "View", "detect", "format_of", "local_folder", "separate", "together"]
