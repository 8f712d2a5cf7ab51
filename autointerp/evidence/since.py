"""What was trained since an adapter: the base side carries it, as the reference of a preference training is carried."""

from __future__ import annotations

from contextlib import AbstractContextManager

from transformers import PreTrainedModel

from autointerp.evidence.model_pair import ModelPair


class SincePair(ModelPair):
    """The adapted sides of two pairs on one base: from the first to the second."""

    def __init__(self, start: ModelPair, end: ModelPair):
        """Each has modules of its own; their weights may be shared."""
        self._start, self._end = start, end
        self.layout = start.layout
        self.changed_modules = start.changed_modules | end.changed_modules

    @property
    def model(self) -> PreTrainedModel:
        return self._start.model

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return *self._start.models, *self._end.models

    def base(self) -> AbstractContextManager[PreTrainedModel]:
        return self._start.adapted()

    def adapted(self) -> AbstractContextManager[PreTrainedModel]:
        return self._end.adapted()

    def bare(self) -> PreTrainedModel:
        return self._start.bare()

    def onwards(self, end: ModelPair) -> ModelPair:
        return SincePair(self._start.replica(), end)
