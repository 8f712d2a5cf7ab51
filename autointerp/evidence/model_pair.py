"""The two sides of a comparison behind one face: a PEFT model with its adapter on and off, or two loaded models."""

from __future__ import annotations

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autointerp.errors import InputError
from autointerp.evidence.hookpoints import HookPoint, Layout

if TYPE_CHECKING:
    from peft import PeftModel

_TRANSFORMERS = logging.getLogger("transformers.modeling_utils")
_MUTATES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""LoRA initialisations that write into the base weights, so that switching the adapter off does not give the base."""


class ModelPair(ABC):
    """Base and adapted model, and where they differ. Not safe to use from two threads at once."""

    layout: Layout
    changed_modules: frozenset[str]
    """Paths of the modules, in the Hugging Face model, whose weights differ or that carry an adapter with an effect."""

    @abstractmethod
    def base(self) -> AbstractContextManager[PreTrainedModel]:
        """Yields the causal LM to run for the base side: in eval mode, valid until the block ends."""

    @abstractmethod
    def adapted(self) -> AbstractContextManager[PreTrainedModel]:
        """Yields the causal LM to run for the adapted side: in eval mode, valid until the block ends."""

    @property
    @abstractmethod
    def model(self) -> PreTrainedModel:
        """The base side's modules and config; not for running."""

    @property
    @abstractmethod
    def models(self) -> tuple[PreTrainedModel, ...]:
        """Every model whose weights the pair holds."""

    def replica(self) -> Self:
        """The same pair for another thread: modules of its own, to be switched and hooked alone; weights shared."""
        return copy.deepcopy(self, self.shared_tensors())

    def bare(self) -> PreTrainedModel:
        """The base model alone, in modules of its own over the same weights."""
        return copy.deepcopy(self.model, self.shared_tensors())

    def onwards(self, end: ModelPair) -> ModelPair:
        """`end`, a pair on the same base, from where this one begins."""
        return end

    def shared_tensors(self) -> dict[int, Any]:
        """The weights of every model, as a memo that keeps `copy.deepcopy` from copying them."""
        return {id(t): t for model in self.models for t in (*model.parameters(), *model.buffers())}

    @cached_property
    def changed_places(self) -> list[tuple[int, str]]:
        """(layer, child of the block) of every changed module, lowest first; see `Layout.place`."""
        return sorted(self.layout.place(module) for module in self.changed_modules)

    @property
    def first_changed_layer(self) -> int | None:
        """Lowest layer with a change: −1 before the blocks, n_layers after them; None when nothing is changed."""
        return self.changed_places[0][0] if self.changed_modules else None

    def check_sees(self, hook: HookPoint) -> None:
        """InputError, naming hooks that would do, when no change reaches `hook`; silent when nothing is changed."""
        places = self.changed_places
        if not places or any(hook.sees(*place) for place in places):
            return
        first = places[0][0]
        if first == self.layout.n_layers:
            module = min(self.changed_modules)
            raise InputError(f"hook {hook.name}: the adapter changes only {module}, above the blocks; no hook sees it")
        points = self.layout.points_that_see(first, [child for layer, child in places if layer == first])
        raise InputError(
            f"hook {hook.name} does not see the adapter, which first changes layer {first}:"
            f" use {' or '.join(points)}, or any later one"
        )

    @staticmethod
    def from_peft(model: PeftModel, since: str | None = None) -> ModelPair:
        """The pair inside a PEFT model in memory; it is left exactly as it was after every use.

        since: the name of another adapter in it, which the base side carries. InputError where there is none of that
        name, or where switching the adapter off does not give the base model back.
        """
        if since is not None and (since not in model.peft_config or since in model.active_adapters):
            others = ", ".join(sorted(model.peft_config.keys() - set(model.active_adapters))) or "no other"
            raise InputError(f"since {since!r}: beside the active adapter the model in memory holds {others}")
        names = [*model.active_adapters, *([] if since is None else [since])]
        for config in (model.peft_config[name] for name in names):
            if reason := acts_elsewhere(config):
                raise InputError(f"the adapter in memory {reason}")
            if reason := alters_base(config):
                raise InputError(f"the adapter in memory {reason}: save it, and run autointerp label on its folder")
        pair = PeftPair(model)
        return pair if since is None else SincePair(PeftPair(model, since), pair)


class PeftPair(ModelPair):
    """One PEFT model; the base side is the same weights with the adapter layers switched off."""

    def __init__(self, model: PeftModel, name: str | None = None):
        """name: of an adapter in it that the adapted side has instead of those that are active."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        self._peft = model
        self._model: PreTrainedModel = model.get_base_model()  # pyright: ignore[reportAttributeAccessIssue]
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        named = {name: layer for name, layer in self._model.named_modules() if isinstance(layer, kinds)}
        if not named:
            kind = model.active_peft_config.peft_type
            raise InputError(f"PEFT type {kind}: changes no module of the model that can be compared")
        if merged := [name for name, layer in named.items() if getattr(layer, "merged", False)]:
            raise InputError(f"the adapter is merged into {merged[0]}: call model.unmerge_adapter() first")
        self._layers, self._name = list(named.values()), name
        self._evaluation = Evaluation(self._model)
        self.layout = Layout.of(self._model)
        names = None if name is None else [name]
        self.changed_modules = frozenset(module for module, layer in named.items() if has_effect(layer, names))

    @property
    def model(self) -> PreTrainedModel:
        return self._model

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return (self._model,)

    def bare(self) -> PreTrainedModel:
        return copy.deepcopy(self._peft, self.shared_tensors()).unload()

    @contextmanager
    def adapted(self) -> Iterator[PreTrainedModel]:
        switched = nullcontext() if self._name is None else self._switched_to(self._name)
        with self._evaluation(), switched:
            yield self._model

    @contextmanager
    def _switched_to(self, name: str) -> Iterator[None]:
        enabled = [layer for layer in self._layers if not layer.disable_adapters]
        before = [list(layer.active_adapters) for layer in enabled]
        try:
            for layer in enabled:
                if _holds(layer, name):
                    layer.set_adapter([name])
                else:
                    layer.enable_adapters(False)
            yield
        finally:
            for layer, names in zip(enabled, before, strict=True):
                layer.set_adapter(names)
                layer.enable_adapters(True)

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        # PeftModel.disable_adapter would do, but asks the status of every layer each time: too slow for once a batch.
        enabled = [layer for layer in self._layers if not layer.disable_adapters]
        with self._evaluation():
            try:
                for layer in enabled:
                    layer.enable_adapters(False)
                yield self._model
            finally:
                for layer in enabled:
                    layer.enable_adapters(True)


class TwoModels(ModelPair):
    """Two models of one architecture; weights that are equal are kept once."""

    def __init__(self, base: PreTrainedModel, adapted: PreTrainedModel, name: str = "the checkpoint"):
        self._base, self._adapted = base, adapted
        self.layout = Layout.of(base)
        self.changed_modules = frozenset(_compared(base, adapted, name))
        self._evaluations = Evaluation(base), Evaluation(adapted)

    @property
    def model(self) -> PreTrainedModel:
        return self._base

    @property
    def models(self) -> tuple[PreTrainedModel, ...]:
        return self._base, self._adapted

    @contextmanager
    def base(self) -> Iterator[PreTrainedModel]:
        with self._evaluations[0]():
            yield self._base

    @contextmanager
    def adapted(self) -> Iterator[PreTrainedModel]:
        with self._evaluations[1]():
            yield self._adapted


class SincePair(ModelPair):
    """The adapted sides of two pairs on one base: what was trained since the first, as the reference of a DPO."""

    def __init__(self, start: ModelPair, end: ModelPair):
        """They may share their weights, and be one PEFT model with another adapter each."""
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


def acts_elsewhere(config: Any) -> str | None:
    """Why an adapter with this PEFT config is more than a change of modules, in words; None when it is not."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or config.is_adaption_prompt or kind == "XLORA":
        return f"is of PEFT type {kind}, which adds to the prompt or gates whole adapters and is not supported"
    if getattr(config, "alora_invocation_tokens", None):
        return "is an activated LoRA, which acts only after its invocation tokens and is not supported"
    return None


def alters_base(config: Any) -> str | None:
    """Why an adapter with this PEFT config trains or rewrites the base's own weights; None when it does not."""
    bias, start = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", None)
    if bias != "none":
        return f"was trained with bias={bias!r}, which changes the base model's own biases"
    if isinstance(start, str) and start.startswith(_MUTATES_BASE):
        return f"was trained with init_lora_weights={start!r}, which rewrites the base model's weights"
    if getattr(config, "kasa_config", None):
        return "was trained with KaSA, which rewrites the base model's weights"
    return None


def _holds(layer: Any, name: str) -> bool:
    """Whether an adapter is in a PEFT layer at all."""
    from peft.utils.other import AuxiliaryTrainingWrapper

    if isinstance(layer, AuxiliaryTrainingWrapper):
        return name in layer._adapters
    return any(name in getattr(layer, parts) for parts in layer.adapter_layer_names)


def has_effect(layer: Any, names: Sequence[str] | None = None) -> bool:
    """Whether a PEFT layer's active adapters, or those named, change its output at all. True in doubt."""
    from peft.tuners.ia3 import IA3Layer
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    if not isinstance(layer, AuxiliaryTrainingWrapper) and layer.disable_adapters:
        return False
    names = list(layer.active_adapters) if names is None else names
    if isinstance(layer, LoraLayer):
        return any(_lora_has_effect(layer, name) for name in names)
    if isinstance(layer, IA3Layer):
        return any(bool((layer.ia3_l[name] != 1).any()) for name in names if name in layer.ia3_l)
    if isinstance(layer, ModulesToSaveWrapper):
        old = layer.original_module.state_dict()
        copies = [layer.modules_to_save[name].state_dict() for name in names if name in layer.modules_to_save]
        return any(not torch.equal(old[key], new[key].to(old[key])) for new in copies for key in old)
    return True


def _lora_has_effect(layer: Any, name: str) -> bool:
    down = [*_entries(layer.lora_A, name), *_entries(layer.lora_embedding_A, name)]
    up = [*_entries(layer.lora_B, name), *_entries(layer.lora_embedding_B, name)]
    if not down:
        return False
    if getattr(layer, "lora_variant", {}).get(name) is not None or getattr(layer, "lora_bias", {}).get(name):
        return True  # DoRA and other variants do more than add B A x
    return layer.scaling[name] != 0 and any(w.any() for w in down) and any(w.any() for w in up)


def _entries(adapters: nn.ModuleDict | nn.ParameterDict, name: str) -> list[Tensor]:
    if name not in adapters:
        return []
    entry = adapters[name]
    return [entry] if isinstance(entry, Tensor) else list(entry.parameters())


class Evaluation:
    """Eval mode for a while; every module's mode and every parameter's requires_grad are put back afterwards."""

    def __init__(self, model: nn.Module):
        # Listed once: walking a large model at every batch costs more than the rest of this together.
        self._modules, self._parameters = list(model.modules()), list(model.parameters())

    @contextmanager
    def __call__(self) -> Iterator[None]:
        training = [module for module in self._modules if module.training]
        # PEFT sets requires_grad by its own rules when an adapter is switched on again.
        flags = [parameter.requires_grad for parameter in self._parameters]
        for module in training:
            module.training = False
        mine = partial(_is_not_about_padding)  # its own, which a replica in another thread does not take away
        _TRANSFORMERS.addFilter(mine)
        try:
            yield
        finally:
            _TRANSFORMERS.removeFilter(mine)
            for module in training:
                module.training = True
            for parameter, flag in zip(self._parameters, flags, strict=True):
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)


def _is_not_about_padding(record: logging.LogRecord) -> bool:
    """transformers warns of padding without a mask; in a causal model, padding to the right needs none."""
    return "passing in an `attention_mask`" not in record.getMessage()


def _compared(base: PreTrainedModel, adapted: PreTrainedModel, name: str) -> Iterable[str]:
    """Paths of the modules whose weights differ; equal weights of `adapted` are replaced by those of `base`."""
    theirs, ours = dict(adapted.named_parameters()), dict(base.named_parameters())
    if alien := sorted(theirs.keys() ^ ours.keys()):
        raise InputError(
            f"{name}: {alien[0]} is in only one of checkpoint and base: give --base the model it came from"
        )
    vocabulary = {
        id(ends.weight) for ends in (base.get_input_embeddings(), base.get_output_embeddings()) if ends is not None
    }
    for key, weight in ours.items():
        other = theirs[key]
        if weight.shape == other.shape and torch.equal(weight, other):
            other.data = weight.data
            continue
        if weight.shape != other.shape:
            if id(weight) not in vocabulary or weight.shape[1:] != other.shape[1:]:
                raise InputError(
                    f"{name}: {key} has shape {list(other.shape)}, in the base {list(weight.shape)}: give --base the"
                    " model it came from"
                )
            rows = min(len(weight), len(other))  # tokens were added; the base's own may be as they were
            if torch.equal(weight[:rows], other[:rows]):
                continue
        yield key.rpartition(".")[0]
