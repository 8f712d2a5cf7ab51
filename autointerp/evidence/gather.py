"""The evidence half as one object: load, measure, select, read the rows, collect. `pipeline.py` calls it in that order.

Everything that can be wrong with the input is found by `Evidence.load`, before any forward pass and before the store is
touched.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

import torch

from autointerp.errors import InputError
from autointerp.evidence.adapters import ADAPTERS
from autointerp.evidence.collector import collect
from autointerp.evidence.corpus import Corpus, adds_bos, check_context_length, open_corpus
from autointerp.evidence.dictionaries import check_fits, load_dictionary
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.directions import InMemory
from autointerp.evidence.documents import DocumentSource
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.foils import partners
from autointerp.evidence.gradients import measure_gradients
from autointerp.evidence.loading import torch_device
from autointerp.evidence.model_pair import ModelPair
from autointerp.evidence.ngrams import ngrams
from autointerp.evidence.outcomes import by_order, read_outcomes
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import replicas, tokens_per_batch
from autointerp.evidence.predictions import Predictor
from autointerp.evidence.rows import decoder_tokens, read_rows
from autointerp.evidence.screening import Screen
from autointerp.evidence.selection import Given, Need, Selection, needs_of, select
from autointerp.evidence.spool import Spool, open_scratch
from autointerp.evidence.stand_ins import rereading
from autointerp.evidence.stream import Measured, Progress, measure
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.token_text import token_texts
from autointerp.evidence.weights_only import changes_of
from autointerp.records import Context, DecoderToken, Ngrams, Prediction, Unit, Write
from autointerp.run import WEIGHTS_ONLY, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCREEN_SHARE = 10
"""One token in this many chooses the latents of the map where the dictionary is too large for all."""
MIN_SCREEN_TOKENS = 8192


class Evidence:
    """One run's evidence in the making. Close it, or use it as a context manager: it holds the spool."""

    def __init__(
        self,
        run: Run,
        model: PairedModel,
        dictionary: Dictionary,
        corpus: Corpus,
        in_memory: bool = False,
        given: Given | None = None,
    ):
        """Use `Evidence.load`. `in_memory`: the model is a user's own, and is run as it stands."""
        self.run, self.model, self.dictionary, self.corpus = run, model, dictionary, corpus
        self.in_memory, self._given = in_memory, given or Given()
        self.decode: Callable[[int], str] = lru_cache(maxsize=None)(token_texts(corpus.tokenizer))
        self._open = ExitStack()
        self._spool: Spool | None = None
        self._selection: Selection | None = None

    @cached_property
    def models(self) -> list[PairedModel]:
        """Replicas of the model that run at once; the one alone where it is a user's own, in memory."""
        return [self.model] if self.in_memory else replicas(self.model)

    def models_with(self, adapter: str) -> list[PairedModel]:
        """As `models`, with another adapter of the same training; the base's weights are shared. InputError where it
        does not fit the base."""
        return replicas(self.model.with_adapter(adapter, self.run.base or "", self.run.sae, self.dictionary))

    @property
    def shape(self) -> dict[str, str | int]:
        """Columns of `runs` that say what the dictionary is."""
        dictionary = self.dictionary
        return {"sae_format": dictionary.format, "d_model": dictionary.d_in, "d_sae": dictionary.d_sae}

    @classmethod
    def load(
        cls, run: Run, *, pair: ModelPair | None = None, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> Evidence:
        """Loads and checks everything; cheap things first. InputError in one line.

        `pair` and `tokenizer` are a model in memory, for a training callback; otherwise they are loaded from the run.
        """
        check_given(run)
        documents = open_corpus(run.corpus or "", run.text_column)
        open_scratch(run.settings.scratch).close()
        device = str(torch_device(run.settings.device))
        dictionary = load_dictionary(run.sae, device, hook=run.hook)
        run = run.with_hook(dictionary.hook)
        given = _load_given(run, dictionary, documents, device)
        if pair is not None and tokenizer is not None:
            model = PairedModel(pair, run.hook or "", tokenizer, dictionary.hook_in)
        else:
            model = PairedModel.load(
                run.adapter,
                run.base or "",
                run.hook or "",
                dtype=run.settings.dtype,
                device=run.settings.device,
                sae=run.sae,
                dictionary=dictionary,
                since=run.since,
            )
        check_fits(dictionary, model.d_model, run.sae)
        check_context_length(run.context_length, model.max_positions)
        model.check_sees_adapter()
        if set(run.settings.selector) & set(WEIGHTS_ONLY):
            check_readable(run, dictionary)
        bos = adds_bos(model.tokenizer) if dictionary.prepend_bos is None else dictionary.prepend_bos
        corpus = Corpus(documents, model.tokenizer, run.context_length, bos, run.max_tokens, run.settings.seed)
        corpus.check()
        return cls(run, model, dictionary, corpus, pair is not None, given)

    def select(self, progress: Progress) -> tuple[Selection, list[Write]]:
        """Reads the corpus once and chooses; the selection, and what the rows of the selected latents write."""
        settings = self.run.settings
        measured = self._measure(progress)
        fitted = FittedMap(measured.statistics, self.dictionary.W_dec)
        spool = measured.spool
        given = replace(self._given, run=self.run, dictionary=self.dictionary, reread=rereading(spool, self.dictionary))
        if given.outcome is not None:
            given = replace(given, outcome=by_order(given.outcome, (spool.place(s)[:2] for s in range(len(spool)))))
        if "gradients" in needs_of(settings.selector):
            tracked = measured.statistics.tracked
            sums = measure_gradients(self.models, self.dictionary, spool, self.corpus.bos, tracked)
            given = replace(given, gradients=sums)
        first, *others = settings.selector
        selection = select(measured, fitted, first, settings.top, settings.fdr, settings.seed, given, others)
        writes = read_rows(fitted, selection.latents, self.model, self.dictionary, spool, self.decode)
        self._spool, self._selection = spool, selection
        return selection, writes

    def fit(self, progress: Progress) -> tuple[FittedMap, Spool]:
        """The change map, and what it was measured on; reads the corpus once, unless `select` has."""
        if self._selection is not None and self._spool is not None:
            return self._selection.fitted, self._spool
        measured = self._measure(progress)
        return FittedMap(measured.statistics, self.dictionary.W_dec), measured.spool

    def _measure(self, progress: Progress) -> Measured:
        settings = self.run.settings
        spool = self._open.enter_context(Spool(self.model.width, self.model.dtype, settings.scratch))
        screen = Screen(
            self.dictionary.d_sae, self.model.d_model, max(MIN_SCREEN_TOKENS, self.run.max_tokens // SCREEN_SHARE)
        )
        return measure(
            self.models,
            self.dictionary,
            self.corpus,
            screen,
            spool,
            tokens_per_batch=settings.tokens_per_batch or tokens_per_batch(self.model.device),
            extras=[need for need in needs_of(settings.selector) if isinstance(need, type)],
            progress=progress,
        )

    def known(self) -> list[Ngrams]:
        """How much of each selected latent its n-grams tell; reads the spool once."""
        if self._spool is None or self._selection is None:
            raise RuntimeError("select first")
        return ngrams(self._spool, self.dictionary, self._selection.latents, self._revived(), self.decode)

    def _revived(self) -> set[int]:
        assert self._selection is not None
        states = self._selection.columns["state"]
        return {latent for latent in self._selection.latents if states[latent] == "revived"}

    def units(self) -> list[Unit]:
        """The adapter's hidden units or components, by the latents they read or write."""
        from autointerp.evidence.weights_evidence import units_of

        if self.dictionary.hook_in is not None:  # what reads and what is written are not of one stream
            return []
        return units_of(self.run, InMemory(self.dictionary))

    def decoder_tokens(self) -> list[DecoderToken]:
        """What the selected latents' own decoder rows push towards."""
        if self._spool is None or self._selection is None:
            raise RuntimeError("select first")
        return decoder_tokens(self._selection.latents, self.model, self.dictionary, self._spool, self.decode)

    async def contexts(self) -> AsyncIterator[tuple[int, list[Context], list[Prediction]]]:
        """(latent, contexts, predictions) of the selected latents in rank order, each as soon as it stands."""
        if self._spool is None or self._selection is None:
            raise RuntimeError("select first")
        predictor = Predictor(self.models, self._spool, self.corpus.bos, self.decode)
        latents, seed = self._selection.latents, self.run.settings.seed
        partnered = await asyncio.to_thread(partners, self._selection.fitted, latents)
        revived = self._revived()
        async for group in collect(self._spool, self.dictionary, latents, revived, self.decode, seed, partnered):
            predictions = await asyncio.to_thread(predictor.predict, [c for found in group.values() for c in found])
            for latent, found in group.items():
                yield latent, found, [p for p in predictions if p.latent == latent]

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> Evidence:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


GIVEN_BY: dict[Need, str] = {"adapted dictionary": "sae_adapted", "outcome": "outcome_column"}
"""The setting that gives what a selector needs beyond the statistics."""


def check_given(run: Run) -> None:
    """InputError for an unknown selector, one without what it needs, and for what none of them would read."""
    for name in run.settings.selector:
        for need in needs_of([name]):
            if need in GIVEN_BY and getattr(run.settings, GIVEN_BY[need]) is None:
                raise InputError(f"selector {name} needs one more thing: give --{_option(GIVEN_BY[need])}")
    for need, setting in GIVEN_BY.items():
        if getattr(run.settings, setting) is not None and need not in needs_of(run.settings.selector):
            raise InputError(
                f"--{_option(setting)} is read by no selector of {', '.join(run.settings.selector)}: add a --selector"
                " that does, or leave it out"
            )


def check_readable(run: Run, dictionary: Dictionary) -> None:
    """InputError where the adapter's weights do not say what it does."""
    if ADAPTERS.get(run.adapter_format).on_latents:
        from autointerp.evidence.latent_weights import read_latents

        read_latents(run, dictionary)
    else:
        changes_of(run, BaseWeights.at(run.base))


def _option(setting: str) -> str:
    return setting.replace("_", "-")


def _load_given(run: Run, dictionary: Dictionary, documents: DocumentSource, device: str) -> Given:
    """What selectors of this run need beyond the statistics. The outcome is still in corpus order."""
    settings, W_dec, outcome = run.settings, None, None
    if settings.sae_adapted is not None:
        adapted = load_dictionary(settings.sae_adapted, device)
        if adapted.W_dec.shape != dictionary.W_dec.shape:
            shapes = " and ".join(f"{d.d_sae} × {d.d_in}" for d in (adapted, dictionary))
            raise InputError(
                f"SAE {settings.sae_adapted}: not trained on from {run.sae}, their decoders are {shapes}; give"
                " --sae-adapted a fine-tuned copy of --sae"
            )
        W_dec = adapted.W_dec
    if settings.outcome_column is not None:
        outcome = read_outcomes(documents, settings.outcome_column)
    return Given(W_dec, outcome)


def library_versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    from importlib.metadata import version

    return {"torch": torch.__version__, **{name: version(name) for name in ("transformers", "peft", "sae-lens")}}
