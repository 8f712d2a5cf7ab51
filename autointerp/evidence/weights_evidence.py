"""`select` by weights alone as one object with the face of `Evidence`: seconds, no corpus, no forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from autointerp.errors import InputError
from autointerp.evidence.adapters import ADAPTERS
from autointerp.evidence.directions import Directions, open_directions
from autointerp.evidence.selection import Ranking
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.units import describe, lora_components
from autointerp.evidence.weights_only import Change, Streamer, WeightScores, read_weights, score
from autointerp.evidence.wiring import Wiring
from autointerp.records import DecoderToken, Role, Unit, Write
from autointerp.run import AUTO_TOP, Run


@dataclass(frozen=True)
class WeightSelection:
    """What goes into the store: as `Selection`, but without anything that takes a corpus."""

    latents: list[int]
    columns: dict[str, np.ndarray]
    """Columns of the store's `latents`, each [m]."""
    figures: dict[str, float | int | str | None]
    """Columns of the store's `runs`."""


class WeightsEvidence:
    """One run's weights, read. Made by `load`, which finds whatever is wrong with the input."""

    def __init__(self, run: Run, directions: Directions, change: Change, streamer: Streamer):
        """Use `WeightsEvidence.load`."""
        self.run, self.directions = run, directions
        self._change, self._streamer = change, streamer

    @classmethod
    def load(cls, run: Run) -> WeightsEvidence:
        """Reads the adapter, and of the base what it takes, if it is here. InputError in one line."""
        if run.settings.top == "auto":
            raise InputError("--top auto follows the coverage curve, which takes a corpus: give --top a number")
        directions = open_directions(run.sae)
        run = run.with_hook(directions.hook)
        return cls(run, directions, *read_weights(run, directions))

    @property
    def shape(self) -> dict[str, str | int | None]:
        """Columns of `runs` that say what the dictionary is; and that no corpus was read, even if one is named."""
        directions = self.directions
        return {"sae_format": directions.format, "d_model": directions.d, "d_sae": directions.m, "corpus": None}

    def select(self) -> tuple[WeightSelection, list[Write]]:
        """Goes through the dictionary once and chooses."""
        settings, m = self.run.settings, self.directions.m
        scores = score(self._change, self.directions, self._streamer.wiring.layer_norm)
        top = AUTO_TOP if settings.top == "auto" else settings.top
        ranking = rank(scores, self._change, top, settings.fdr)
        rank_of, role = np.full(m, np.nan), np.full(m, None, dtype=object)
        rank_of[ranking.latents] = np.arange(1, len(ranking.latents) + 1)
        role[ranking.latents] = ranking.roles
        columns = {
            "latent": np.arange(m),
            "change": ranking.change,
            "selected": np.isin(np.arange(m), ranking.latents),
            "rank": rank_of,
            "role": role,
        }
        if (shared := self.directions.relative_norm) is not None:
            columns["relative_norm"] = shared.double().cpu().numpy()
        figures: dict[str, Any] = {"n_pass": ranking.n_pass, "notes": ranking.note}
        return WeightSelection(ranking.latents, columns | ranking.columns, figures), []

    def units(self) -> list[Unit]:
        """The components of the adapter, where it is of low rank, by the latents they read or write."""
        return units_of(self.run, self.directions)

    def decoder_tokens(self) -> list[DecoderToken]:
        """None: that takes the base model's unembedding."""
        return []

    def close(self) -> None:
        pass

    def __enter__(self) -> WeightsEvidence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def units_of(run: Run, directions: Directions) -> list[Unit]:
    """The units of an adapter; none where its files do not tell of any."""
    base = BaseWeights.at(run.base)
    try:
        changes = ADAPTERS.get(run.adapter_format).weight_changes(run.adapter, base)
        if not changes.low_rank:
            return []
        streamer = Streamer(Wiring.of(run.hook or "", None if base is None else base.config, changes.modules), base)
        return describe(lora_components(changes, streamer), directions)
    except InputError:
        return []


def rank(scores: WeightScores, change: Change, top: int, fdr: float) -> Ranking:
    """The latents that pass at `fdr`, those that stand out most first; at most `top`."""
    passing = np.flatnonzero((scores.q_value <= fdr) & np.isfinite(scores.statistic))
    latents = passing[np.argsort(-scores.statistic[passing], kind="stable")][:top].tolist()
    roles: list[Role] = ["written" if scores.written[latent] else "read" for latent in latents]
    columns = {
        "statistic": scores.statistic,
        "q_value": np.where(np.isfinite(scores.statistic), scores.q_value, np.nan),
        "write_weight": scores.writes,
        "read_weight": scores.reads,
    }
    return Ranking(latents, roles, scores.change, columns, len(passing), change.note)
