"""Where a weight matrix meets the residual stream at a hook: whether it writes what the hook sees, reads what is there,
or neither. Names and configs only; no weights."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from autointerp.evidence.hookpoints import FAMILIES, HookPoint, Layout, resolve

WRITERS = ("o_proj", "out_proj", "c_proj", "dense", "down_proj", "dense_4h_to_h", "fc2", "fc_out", "w2")
"""Last names of the maps of a block whose output is added to the stream, over all architectures."""
READERS = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value", "W_pack",
    "gate_proj", "up_proj", "gate_up_proj", "c_fc", "dense_h_to_4h", "fc1", "fc_in", "w1", "w3",
)  # fmt: skip
"""Last names of those whose input is the stream behind a norm."""
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings")
EMBEDDINGS = (*TOKEN_EMBEDDINGS, "wpe", "embed_positions")
UNEMBEDDINGS = ("lm_head", "embed_out")
_FINAL_NORMS = {"transformer.h": "transformer.ln_f", "gpt_neox.layers": "gpt_neox.final_layer_norm"}
_CONV1D = ("gpt2", "openai-gpt")
"""Model types whose linear maps are stored [in, out]."""
_INTERLEAVED = ("gpt_neox", "bloom")
"""Fused projections in which q, k and v of each head lie together."""
_LAYER_NORM = ("gpt2", "gpt_neox")
_BEYOND = 1 << 20
"""Number of layers of a model of which nothing is known."""

Side = Literal["writes", "values", "reads"]


@dataclass(frozen=True)
class Heads:
    """How attention is cut."""

    n: int
    n_kv: int
    width: int


@dataclass(frozen=True)
class Wiring:
    """What touches one hook of one model; `Wiring.of` makes it."""

    hook: HookPoint
    layout: Layout
    layer_norm: bool
    """Whether norms take the mean off, so that a direction is read without its mean."""
    heads: Heads | None
    """None without a config."""

    @classmethod
    def of(cls, hook: str, config: Any = None, modules: Iterable[str] = ()) -> Wiring:
        """From the base's transformers config; without one, from the names of the modules that the adapter changes.

        InputError for a hook that the model does not have, as far as that can be known.
        """
        if config is None:
            layout = _guessed(modules)
            match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook)
            point = layout.named(hook, int(match[1]), match[2]) if match else layout.located(hook)
            return cls(point, layout, layout.model_type in _LAYER_NORM, None)
        text = config.get_text_config()
        n = text.num_attention_heads
        heads = Heads(
            n,
            getattr(text, "num_key_value_heads", None) or n,
            getattr(text, "head_dim", None) or text.hidden_size // n,
        )
        layer_norm = not hasattr(text, "rms_norm_eps")
        return cls(resolve(hook, config), Layout.of(config), layer_norm, heads)

    def side(self, module: str) -> Side | None:
        """How a change of `module` (a path in the Hugging Face model) meets the stream at the hook.

        `writes`: its output is added to the stream at or before the hook. `values`: it makes the values of an attention
        at or before the hook, and so writes through that attention's output matrix. `reads`: it reads the stream after
        the hook. None: it acts before the hook through something nonlinear, or writes behind it.
        """
        layer, child = self.layout.place(module)
        leaf = module.rpartition(".")[2]
        if leaf in EMBEDDINGS:
            return "writes" if self.hook.on_stream else None
        if leaf in UNEMBEDDINGS:
            return "reads"
        if leaf in WRITERS and self._reaches(layer, child):
            return "writes"
        if leaf not in READERS:
            return None
        if self._reads_after(layer, child):
            return "reads"
        return "values" if self._reaches(layer, child) and self._has_values(leaf) else None

    def values_among(self, module: str, out: int) -> Literal["last", "interleaved"] | None:
        """Where the values are among the `out` outputs: after queries and keys, or with those of their head; None where
        that is not known."""
        if self.heads is None:
            return None
        leaf, heads = module.rpartition(".")[2], self.heads
        values, whole = heads.n_kv * heads.width, (heads.n + 2 * heads.n_kv) * heads.width
        if leaf == "query_key_value":
            known = self.layout.model_type in _INTERLEAVED and out == 3 * heads.n * heads.width
            return "interleaved" if known else None
        return "last" if out == (values if leaf == "v_proj" else whole) else None

    def norm_before(self, module: str) -> str | None:
        """The norm whose output `module` reads; None where it is not known."""
        layer, child = self.layout.place(module)
        if module.rpartition(".")[2] in UNEMBEDDINGS:
            body = self.layout.blocks.rpartition(".")[0]
            return _FINAL_NORMS.get(self.layout.blocks, f"{body}.norm") if self.layout.family else None
        family = self.layout.family
        if family is None:
            return None
        return f"{self.layout.blocks}.{layer}.{family.attention[0] if child in family.attention else family.mlp[0]}"

    def norm_after(self, module: str) -> str | None:
        """The norm that `module`'s output passes on its way into the stream, as in Gemma 2 and 3; else None."""
        layer, child = self.layout.place(module)
        for half in (self.layout.family.attention, self.layout.family.mlp) if self.layout.family else ():
            if child in half and half[-1] != child:
                return f"{self.layout.blocks}.{layer}.{half[-1]}"
        return None

    @property
    def norms_count_from_one(self) -> bool:
        """Whether norms multiply by 1 + weight."""
        return self.layout.model_type.startswith("gemma")

    def _reaches(self, layer: int, child: str) -> bool:
        """Whether what this half of a block adds to the stream is part of what is read at the hook."""
        if self.hook.on_stream:
            return self.hook.sees(layer, child)
        family, own = self.layout.family, self.layout.place(self.hook.module_path)[1]
        if layer != self.hook.layer or family is None:
            return False
        return child in (family.attention if own in family.attention else family.mlp)

    def _reads_after(self, layer: int, child: str) -> bool:
        if self.hook.sees(layer, child):
            return False
        return layer > self.hook.layer or (
            layer == self.hook.layer and (self.hook.on_stream or not self.layout.parallel)
        )

    def _has_values(self, leaf: str) -> bool:
        return leaf in ("v_proj", "qkv_proj", "c_attn", "query_key_value")


def stored_in_out(model_type: str, module: str) -> bool:
    """Whether the weight of a module is stored [in, out], as transformers' Conv1D does; an embedding's is, whose map is
    from one-hot tokens."""
    leaf = module.rpartition(".")[2]
    return leaf in EMBEDDINGS or (model_type in _CONV1D and leaf not in UNEMBEDDINGS)


def _guessed(modules: Iterable[str]) -> Layout:
    """A layout by where the adapter's modules lie. Architectures whose blocks have one name have one way of naming."""
    lists = [match[1] for module in modules if (match := re.match(r"(.+?)\.\d+\.", module))]
    blocks = max(sorted(set(lists)), key=lists.count, default="model.layers")
    for model_type, family in FAMILIES.items():
        if family.blocks == blocks:
            return Layout("llama" if model_type.startswith("gemma") else model_type, _BEYOND, blocks, family, False)
    return Layout("unknown", _BEYOND, blocks, None, False)
