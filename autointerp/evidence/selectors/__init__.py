"""Selectors, one file each; see `autointerp.evidence.selection.SELECTORS`."""
