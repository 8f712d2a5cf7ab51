"""Which rows of the change map are kept in the store: for comparing runs later, without models or dictionaries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from autointerp.evidence.fitted import FittedMap

MOST = 512
"""Rows kept of latents that were not selected, the largest ones: another run may have selected them."""


def kept_rows(fitted: FittedMap, latents: Sequence[int]) -> list[dict[str, Any]]:
    """Rows of the store's `map_rows`: of the selected `latents` of the map, and of the MOST largest others.

    Latents that never fire in the base model have none. They are the rows of the joint fit of all latents, not of the
    map restricted to the selected ones: only the former mean the same in two runs that selected differently.
    """
    if not fitted.changed:
        return []
    chosen = [fitted.position(latent) for latent in latents]
    largest = np.argsort(-fitted.size, kind="stable")[: MOST + len(latents)].tolist()
    positions = list(dict.fromkeys([*(at for at in chosen if at is not None), *largest]))[: MOST + len(latents)]
    rows, size, gains = fitted.rows.numpy(), fitted.size, fitted.gains
    return [
        {
            "latent": int(fitted.tracked[at]),
            "size": float(size[at]),
            "gain": float(gains[at]),
            "row": rows[at].astype(np.float32).tolist(),
        }
        for at in positions
        if size[at] > 0
    ]
