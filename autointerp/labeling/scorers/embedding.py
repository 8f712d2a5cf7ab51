"""`embedding:MODEL`: how well the cosine between a label and a window, by a local model, tells firing from silent ones.

Costs nothing and asks nobody (Paulo et al., 2024). MODEL is a folder or a hub id that sentence-transformers loads; it
comes with the extra `embedding`.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from autointerp.errors import InputError
from autointerp.labeling.base import SCORERS
from autointerp.labeling.scoring.intervals import Estimate, area_under_roc
from autointerp.labeling.scoring.judged import UNTESTABLE
from autointerp.labeling.windows import firing_windows, silent_windows
from autointerp.records import Label, LatentEvidence, Score

N_EACH, N_TOP = 20, 4


@SCORERS.register("embedding")
class EmbeddingScorer:
    """Area under the ROC curve over unseen windows; the null is that of another latent's label."""

    needs_model = True

    def __init__(self, model: str):
        """InputError where the extra is not installed or the model cannot be loaded."""
        try:
            from sentence_transformers import SentenceTransformer  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise InputError(
                "scorer embedding needs sentence-transformers: pip install 'autointerp[embedding]'"
            ) from error
        try:
            self._model: Any = SentenceTransformer(model, trust_remote_code=False)
        except (OSError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise InputError(f"scorer embedding:{model}: no model that can be loaded ({first})") from error
        self.name = f"embedding:{model}"
        self._one_at_a_time = asyncio.Lock()

    async def score(self, evidence: LatentEvidence, label: Label, wrong: Label | None) -> Score:
        """`value` is None for a label that claims nothing, and where there are not windows of both sorts."""
        firing = [w.plain() for w in firing_windows(evidence, "score", N_EACH, N_TOP)]
        silent = [w.plain() for w in silent_windows(evidence, "score", N_EACH)]
        found: Estimate | None = None
        null: Estimate | None = None
        if firing and silent and _claims(label):
            async with self._one_at_a_time:
                windows = await asyncio.to_thread(self._embed, firing + silent)
                found = await asyncio.to_thread(self._area, label, windows, len(firing))
                if wrong is not None and _claims(wrong):
                    null = await asyncio.to_thread(self._area, wrong, windows, len(firing))
        value, low, high = found or (None, None, None)
        n = len(firing) + len(silent) if found else 0
        return Score(label.latent, label.labeler, self.name, value, low, high, null.value if null else None, n, 0)

    def _embed(self, texts: list[str]) -> np.ndarray:
        """Unit vectors [n, width]."""
        return np.asarray(self._model.encode(texts, normalize_embeddings=True, show_progress_bar=False))

    def _area(self, label: Label, windows: np.ndarray, n_firing: int) -> Estimate | None:
        cosines = windows @ self._embed([f"{label.label}. {label.explanation or ''}"])[0]
        return area_under_roc(cosines[:n_firing].tolist(), cosines[n_firing:].tolist())


def _claims(label: Label) -> bool:
    return label.status in ("ok", "known") and bool(label.label) and label.label not in UNTESTABLE
