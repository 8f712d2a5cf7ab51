"""TransformerLens hook names ↔ Hugging Face modules, per architecture; checked before any forward pass.

`hook_attn_out` and `hook_mlp_out` are what is added to the residual stream, as in TransformerLens: for Gemma 2 and 3
they are read after the post-norms. A new architecture is one row of `FAMILIES`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from autointerp.errors import InputError

POINTS = ("hook_resid_pre", "hook_attn_out", "hook_resid_mid", "hook_mlp_out", "hook_resid_post")
"""The hook points of a block, in the order in which a sequential block computes them."""
OF_MLP = ("hook_mlp_in", "mlp.hook_in", "mlp.hook_out")
"""Further points, of transcoders: the stream before the MLP's norm, what the MLP reads, and what it gives."""
MID = "hook_resid_mid"
"""Stands among a block's children for the stream between its halves, where adapters may act that change no module."""

_NAME = re.compile(r"blocks\.(\d+)\.(.+)")
_AFTER = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "lm_head", "embed_out")


@dataclass(frozen=True, slots=True)
class Family:
    """Where an architecture keeps its blocks, and the children of a block in the order in which they run.

    The first child of `mlp` is the norm whose input is the stream between the two halves; the last child of each half
    is the one whose output is added to the stream.
    """

    blocks: str = "model.layers"
    attention: tuple[str, ...] = ("input_layernorm", "self_attn")
    mlp: tuple[str, ...] = ("post_attention_layernorm", "mlp")


_GEMMA = Family(
    attention=("input_layernorm", "self_attn", "post_attention_layernorm"),
    mlp=("pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
)
FAMILIES: dict[str, Family] = {
    "gpt2": Family("transformer.h", ("ln_1", "attn"), ("ln_2", "mlp")),
    "gpt_neox": Family("gpt_neox.layers", ("input_layernorm", "attention")),
    "llama": Family(),
    "mistral": Family(),
    "qwen2": Family(),
    "qwen3": Family(),
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "gemma3": Family("model.language_model.layers", _GEMMA.attention, _GEMMA.mlp),
}
"""By `config.model_type`."""


@dataclass(frozen=True, slots=True)
class HookPoint:
    """One place where activations [b, t, d] are read."""

    name: str
    """As the user gave it."""
    module_path: str
    where: Literal["input", "output"]
    layer: int
    """Index of the block it lies in; −1 before the first, n_layers after the last."""
    reads: tuple[str, ...] | None = None
    """Children of its block that what is read depends on; None for all of them."""
    on_stream: bool = False
    """Whether it is the residual stream itself, so that the final norm and the unembedding apply to it."""

    def sees(self, layer: int, child: str) -> bool:
        """Whether a change of the module `child` of block `layer` reaches this point."""
        return layer < self.layer or (layer == self.layer and (self.reads is None or child in self.reads))


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks of one model are; `Layout.of` makes it from a model or a config."""

    model_type: str
    n_layers: int
    blocks: str
    family: Family | None
    parallel: bool
    """Attention and MLP read the same stream, so that there is no point between them."""

    @classmethod
    def of(cls, model: PreTrainedModel | PretrainedConfig) -> Layout:
        """InputError where the architecture is not in the table and its blocks cannot be told from its modules."""
        config = model.config if isinstance(model, PreTrainedModel) else model
        n_layers = config.get_text_config().num_hidden_layers
        family = FAMILIES.get(config.model_type)
        parallel = config.model_type == "gpt_neox" and bool(config.use_parallel_residual)
        blocks = family.blocks if family else _find_blocks(_modules(model), n_layers, config.model_type)
        return cls(config.model_type, n_layers, blocks, family, parallel)

    @property
    def body(self) -> str:
        """Path of the module that holds the blocks, e.g. `model` or `transformer`."""
        return self.blocks.rpartition(".")[0]

    def place(self, module: str) -> tuple[int, str]:
        """(layer, child) of a module path: −1 before the blocks, n_layers after them; child "" is the block itself."""
        if module.startswith(f"{self.blocks}."):
            layer, _, rest = module.removeprefix(f"{self.blocks}.").partition(".")
            return int(layer), rest.partition(".")[0]
        before = not any(part in _AFTER for part in module.split("."))
        return (-1 if before else self.n_layers), module

    def points_that_see(self, layer: int, children: Iterable[str]) -> list[str]:
        """Hook points of block `layer`, in order, that a change of any of these children of it reaches."""
        if layer < 0:
            return ["blocks.0.hook_resid_pre" if self.family else f"{self.blocks}.0"]
        if self.family is None:
            return [f"{self.blocks}.{layer}"]
        points = [self._point(f"blocks.{layer}.{point}", layer, point) for point in POINTS if self._has(point)]
        return [point.name for point in points if any(point.sees(layer, child) for child in children)]

    def named(self, name: str, layer: int, point: str) -> HookPoint:
        """The HookPoint of a TransformerLens name `blocks.{layer}.{point}`; InputError where the model has no such."""
        if self.family is None:
            raise InputError(
                f"hook {name}: TransformerLens names are known for {', '.join(FAMILIES)}, not for {self.model_type};"
                f" give --hook a module path of the model, e.g. {self.blocks}.{min(layer, self.n_layers - 1)}"
            )
        if point == "ln2.hook_normalized":
            raise InputError(
                f"hook {name}: with or without the norm's own weights, by the settings of TransformerLens; name"
                f" blocks.{layer}.mlp.hook_in, what the MLP reads, if they are in it"
            )
        if point not in POINTS and point not in OF_MLP:
            raise InputError(f"hook {name}: no point {point}; choose one of {', '.join(POINTS)}")
        if layer >= self.n_layers:
            raise InputError(
                f"hook {name}: the model has {self.n_layers} layers; the last is blocks.{self.n_layers - 1}.{point}"
            )
        if point in OF_MLP:
            return self._of_mlp(name, layer, point)
        if not self._has(point):
            raise InputError(
                f"hook {name}: attention and MLP of this {self.model_type} read the same stream, no point lies between;"
                f" use blocks.{layer}.hook_resid_pre or blocks.{layer}.hook_resid_post"
            )
        return self._point(name, layer, point)

    def located(self, path: str) -> HookPoint:
        """The HookPoint at the output of the module `path`, which must exist."""
        layer, child = self.place(path)
        block = f"{self.blocks}.{layer}"
        if self.family is None or path == block:
            return HookPoint(path, path, "output", layer, None, on_stream=path == block)
        return HookPoint(path, path, "output", layer, self._upto(child))

    def _has(self, point: str) -> bool:
        return not (self.parallel and point == "hook_resid_mid")

    def _point(self, name: str, layer: int, point: str) -> HookPoint:
        assert self.family
        block, attention, mlp = f"{self.blocks}.{layer}", self.family.attention, self.family.mlp
        match point:
            case "hook_resid_pre":
                return HookPoint(name, block, "input", layer, (), on_stream=True)
            case "hook_attn_out":
                return HookPoint(name, f"{block}.{attention[-1]}", "output", layer, attention)
            case "hook_resid_mid":
                return HookPoint(name, f"{block}.{mlp[0]}", "input", layer, (*attention, MID), on_stream=True)
            case "hook_mlp_out":
                return HookPoint(name, f"{block}.{mlp[-1]}", "output", layer, self._upto(mlp[-1]))
            case _:
                return HookPoint(name, block, "output", layer, None, on_stream=True)

    def _of_mlp(self, name: str, layer: int, point: str) -> HookPoint:
        assert self.family
        if point == "hook_mlp_in":  # the stream before the norm
            return self._point(name, layer, "hook_resid_pre" if self.parallel else "hook_resid_mid")
        path, reads = f"{self.blocks}.{layer}.mlp", point == "mlp.hook_in"
        return HookPoint(
            name, path, "input" if reads else "output", layer, self._upto(self.family.mlp[0] if reads else "mlp")
        )

    def _upto(self, child: str) -> tuple[str, ...] | None:
        """Children of a block that the output of `child` depends on, itself among them; None when that is not known."""
        assert self.family
        attention, mlp = self.family.attention, self.family.mlp
        if child in attention:
            return attention[: attention.index(child) + 1]
        if child in mlp:
            return (() if self.parallel else (*attention, MID)) + mlp[: mlp.index(child) + 1]
        return None


def resolve(name: str, model: PreTrainedModel | PretrainedConfig) -> HookPoint:
    """The hook point called `name`: a TransformerLens name, or the path of a module whose output is meant.

    A config is enough: no weights are read. InputError, in one line, for a layer beyond the last, a name of another
    architecture, an unknown point, or a module that there is not or that is never called.
    """
    layout = Layout.of(model)
    if match := _NAME.fullmatch(name):
        return layout.named(name, int(match[1]), match[2])
    modules = _modules(model)
    if name not in modules and f"{layout.body}.{name}" in modules:
        name = f"{layout.body}.{name}"  # as the trainers of some dictionaries name it: below the base model
    found = modules.get(name)
    if found is None or not name:
        raise InputError(_no_such_module(name, layout))
    if isinstance(found, nn.ModuleList | nn.ModuleDict):
        raise InputError(f"hook {name}: is a list of modules; name one of them, e.g. {name}.{layout.n_layers // 2}")
    return layout.located(name)


def _no_such_module(name: str, layout: Layout) -> str:
    last = layout.n_layers - 1
    beyond = re.match(rf"{re.escape(layout.blocks)}\.(\d+)", name)
    if beyond and int(beyond[1]) > last:
        return f"hook {name}: the model has {layout.n_layers} layers; the last is {layout.blocks}.{last}"
    valid = f"{layout.blocks}.0 to {layout.blocks}.{last}"
    if layout.family:
        valid = f"blocks.0.hook_resid_pre to blocks.{last}.hook_resid_post, or modules such as {valid}"
    return f"hook {name}: no such point in this model ({layout.model_type}); it has {valid}"


def _modules(model: PreTrainedModel | PretrainedConfig) -> dict[str, nn.Module]:
    if isinstance(model, PretrainedConfig):
        try:
            with torch.device("meta"):  # the modules' names, without their weights
                model = AutoModelForCausalLM.from_config(model)
        except ValueError as error:
            raise InputError(f"model_type {model.model_type}: not a causal language model; give --base one") from error
    return dict(model.named_modules())


def _find_blocks(modules: dict[str, nn.Module], n_layers: int, model_type: str) -> str:
    """Path of the only list of modules that is as long as the model is deep."""
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if len(outer) != 1:
        raise InputError(
            f"model_type {model_type}: cannot tell its {n_layers} blocks among its modules;"
            f" the architectures known are {', '.join(FAMILIES)}"
        )
    return outer[0]
