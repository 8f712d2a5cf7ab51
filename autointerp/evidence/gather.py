"""The evidence half as one object: load, measure, select, read the rows, collect. `pipeline.py` calls it in that order.

Everything that can be wrong with the input is found by `Evidence.load`, before any forward pass and before the store is
touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from autointerp.evidence.collector import collect
from autointerp.evidence.corpus import Corpus, check_context_length, open_corpus
from autointerp.evidence.dictionaries import check_fits, load_dictionary
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.loading import torch_device
from autointerp.evidence.model_pair import ModelPair
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import replicas, tokens_per_batch
from autointerp.evidence.predictions import Predictor
from autointerp.evidence.rows import read_rows
from autointerp.evidence.screening import Screen
from autointerp.evidence.selection import SELECTORS, Selection, select
from autointerp.evidence.spool import Spool, open_scratch
from autointerp.evidence.stream import Progress, measure
from autointerp.evidence.token_text import token_texts
from autointerp.records import Context, Prediction, Write
from autointerp.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCREEN_SHARE = 10
"""One token in this many chooses the latents of the map where the dictionary is too large for all."""
MIN_SCREEN_TOKENS = 8192


class Evidence:
    """One run's evidence in the making. Close it, or use it as a context manager: it holds the spool."""

    def __init__(self, run: Run, model: PairedModel, dictionary: Dictionary, corpus: Corpus, in_memory: bool = False):
        """Use `Evidence.load`. `in_memory`: the model is a user's own, and is run as it stands."""
        self.run, self.model, self.dictionary, self.corpus = run, model, dictionary, corpus
        self.in_memory = in_memory
        self.decode: Callable[[int], str] = lru_cache(maxsize=None)(token_texts(corpus.tokenizer))
        self._open = ExitStack()
        self._spool: Spool | None = None
        self._selection: Selection | None = None

    @cached_property
    def models(self) -> list[PairedModel]:
        """Replicas of the model that run at once; the one alone where it is a user's own, in memory."""
        return [self.model] if self.in_memory else replicas(self.model)

    @classmethod
    def load(
        cls, run: Run, *, pair: ModelPair | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Evidence:
        """Loads and checks everything; cheap things first. InputError in one line.

        `pair` and `tokenizer` are a model in memory, for a training callback; otherwise they are loaded from the run.
        """
        for name in run.settings.selector:
            SELECTORS.get(name)
        documents = open_corpus(run.corpus or "", run.text_column)
        open_scratch(run.settings.scratch).close()
        device = str(torch_device(run.settings.device))
        dictionary = load_dictionary(run.sae, device)
        run = run.with_hook(dictionary.hook)
        if pair is not None and tokenizer is not None:
            model = PairedModel(pair, run.hook or "", tokenizer)
        else:
            model = PairedModel.load(
                run.adapter,
                run.base or "",
                run.hook or "",
                dtype=run.settings.dtype,
                device=run.settings.device,
                sae=run.sae,
                dictionary=dictionary,
            )
        check_fits(dictionary, model.d_model, run.sae)
        check_context_length(run.context_length, model.max_positions)
        model.check_sees_adapter()
        corpus = Corpus(
            documents, model.tokenizer, run.context_length, dictionary.prepend_bos, run.max_tokens, run.settings.seed
        )
        corpus.check()
        return cls(run, model, dictionary, corpus, in_memory=pair is not None)

    def select(self, progress: Progress) -> tuple[Selection, list[Write]]:
        """Reads the corpus once and chooses; the selection, and what the rows of the selected latents write."""
        settings = self.run.settings
        spool = self._open.enter_context(Spool(self.model.d_model, self.model.dtype, settings.scratch))
        screen = Screen(
            self.dictionary.d_sae, self.model.d_model, max(MIN_SCREEN_TOKENS, self.run.max_tokens // SCREEN_SHARE)
        )
        measured = measure(
            self.models,
            self.dictionary,
            self.corpus,
            screen,
            spool,
            tokens_per_batch=settings.tokens_per_batch or tokens_per_batch(self.model.device),
            progress=progress,
        )
        fitted = FittedMap(measured.statistics, self.dictionary.W_dec)
        selection = select(measured, fitted, settings.selector[0], settings.top, settings.fdr, settings.seed)
        writes = read_rows(fitted, selection.latents, self.model, self.dictionary, spool, self.decode)
        self._spool, self._selection = spool, selection
        return selection, writes

    async def contexts(self) -> AsyncIterator[tuple[int, list[Context], list[Prediction]]]:
        """(latent, contexts, predictions) of the selected latents in rank order, each as soon as it stands."""
        if self._spool is None or self._selection is None:
            raise RuntimeError("select first")
        states = self._selection.columns["state"]
        revived = {latent for latent in self._selection.latents if states[latent] == "revived"}
        predictor = Predictor(self.models, self._spool, self.corpus.bos, self.decode)
        latents, seed = self._selection.latents, self.run.settings.seed
        async for group in collect(self._spool, self.dictionary, latents, revived, self.decode, seed):
            predictions = await asyncio.to_thread(predictor.predict, [c for found in group.values() for c in found])
            for latent, found in group.items():
                yield latent, found, [p for p in predictions if p.latent == latent]

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Evidence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def library_versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    from importlib.metadata import version

    return {"torch": torch.__version__, **{name: version(name) for name in ("transformers", "peft", "sae-lens")}}
