"""`select` by weights alone as one object with the face of `Evidence`: seconds, no corpus, no forward pass; and what
every kind of adapter says by its weights, in one form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.adapters import ADAPTERS
from autointerp.evidence.dictionaries.base import load_dictionary
from autointerp.evidence.directions import Directions, InMemory, open_directions
from autointerp.evidence.latent_weights import read_latents
from autointerp.evidence.selection import Ranking
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.units import describe, lora_components
from autointerp.evidence.weights_only import Change, Streamer, changes_of, rank, read_weights, score
from autointerp.evidence.wiring import Wiring
from autointerp.records import DecoderToken, Unit, Write
from autointerp.run import AUTO_TOP, Run


@dataclass(frozen=True)
class WeightSelection:
    """What goes into the store: as `Selection`, but without anything that takes a corpus."""

    latents: list[int]
    columns: dict[str, np.ndarray]
    """Columns of the store's `latents`, each [m]."""
    figures: dict[str, float | int | str | None]
    """Columns of the store's `runs`."""


class Reading(Protocol):
    """What the weights of an adapter say."""

    def ranking(self, top: int, fdr: float) -> Ranking:
        """The latents that pass at `fdr`, those that stand out most first; at most `top`."""
        ...

    def writes(self, latents: Sequence[int]) -> list[Write]:
        """What these latents raise and lower, where weights say it."""
        ...

    @property
    def units(self) -> list[Unit]:
        """The hidden units or components of the adapter, by the latents they read or write."""
        ...


@dataclass(frozen=True)
class MatrixReading:
    """Of an adapter that changes weight matrices of the model."""

    run: Run
    change: Change
    streamer: Streamer
    directions: Directions

    def ranking(self, top: int, fdr: float) -> Ranking:
        scores = score(self.change, self.directions, self.streamer.wiring.layer_norm)
        return rank(scores, self.change.note, top, fdr)

    def writes(self, latents: Sequence[int]) -> list[Write]:
        """None: what a latent's firing leads to goes through the model."""
        return []

    @property
    def units(self) -> list[Unit]:
        return units_of(self.run, self.directions)


def directions_for(run: Run) -> Directions:
    """Those of the run's dictionary: loaded whole where the adapter acts on its latents, else block by block."""
    if ADAPTERS.get(run.adapter_format).on_latents:
        return InMemory(load_dictionary(run.sae, hook=run.hook))
    return open_directions(run.sae)


def reading_of(run: Run, directions: Directions, mean: Tensor | None = None) -> Reading:
    """What the weights of the run's adapter, whose hook is known, say. mean: E[z] [m], from a corpus if there is one.
    InputError, in one line, where they do not say."""
    if isinstance(directions, InMemory) and ADAPTERS.get(run.adapter_format).on_latents:
        return read_latents(run, directions.dictionary, mean)
    return MatrixReading(run, *read_weights(run, directions), directions)


def units_of(run: Run, directions: Directions) -> list[Unit]:
    """The units of an adapter; none where its files do not tell of any."""
    base = BaseWeights.at(run.base)
    try:
        if isinstance(directions, InMemory) and ADAPTERS.get(run.adapter_format).on_latents:
            return read_latents(run, directions.dictionary).units
        changes = changes_of(run, base)
        if not changes.low_rank:
            return []
        streamer = Streamer(Wiring.of(run.hook or "", None if base is None else base.config, changes.modules), base)
        return describe(lora_components(changes, streamer), directions)
    except InputError:
        return []


class WeightsEvidence:
    """One run's weights, read. Made by `load`, which finds whatever is wrong with the input."""

    def __init__(self, run: Run, directions: Directions, reading: Reading):
        """Use `WeightsEvidence.load`."""
        self.run, self.directions, self._reading = run, directions, reading

    @classmethod
    def load(cls, run: Run) -> WeightsEvidence:
        """Reads the adapter, and of the base what it takes, if it is here. InputError in one line."""
        if run.settings.top == "auto":
            raise InputError("--top auto follows the coverage curve, which takes a corpus: give --top a number")
        directions = directions_for(run)
        run = run.with_hook(directions.hook)
        return cls(run, directions, reading_of(run, directions))

    @property
    def shape(self) -> dict[str, str | int | None]:
        """Columns of `runs` that say what the dictionary is; and that no corpus was read, even if one is named."""
        directions = self.directions
        return {"sae_format": directions.format, "d_model": directions.d, "d_sae": directions.m, "corpus": None}

    def select(self) -> tuple[WeightSelection, list[Write]]:
        """Goes through the dictionary once and chooses."""
        settings, m = self.run.settings, self.directions.m
        top = AUTO_TOP if settings.top == "auto" else settings.top
        ranking = self._reading.ranking(top, settings.fdr)
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
        selection = WeightSelection(ranking.latents, columns | ranking.columns, figures)
        return selection, self._reading.writes(ranking.latents)

    def units(self) -> list[Unit]:
        """The hidden units or components of the adapter, by the latents they read or write."""
        return self._reading.units

    def decoder_tokens(self) -> list[DecoderToken]:
        """None: that takes the base model's unembedding."""
        return []

    def close(self) -> None:
        pass

    def __enter__(self) -> WeightsEvidence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
