"""PairedModel: base and adapted activations at one hook, on the same tokens.

Three savings, none of which changes a bit of the result: nothing above the hook is run; the blocks below the first
changed one are run once for both sides; no KV cache is built. Batches are right-padded and need no attention mask: in a
causal model the padding only follows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.at_hook import patched
from autointerp.evidence.dictionaries import Dictionary
from autointerp.evidence.hookpoints import HookPoint, resolve
from autointerp.evidence.loading import load_config, load_tokenizer
from autointerp.evidence.model_pair import ModelPair, SincePair


class _Reached(Exception):
    """Ends a forward pass at the hook."""


class PairedModel:
    """A base model and its adapted self, read at one hook point. For one thread at a time: see `replica`."""

    def __init__(self, pair: ModelPair, hook: str | HookPoint, tokenizer: Tokenizer, hook_in: str | None = None):
        """InputError for a hook that the model does not have, or a tokenizer with more tokens than it embeds.

        hook_in: a second hook point, before the first: what is there stands behind what is at the first, [v | u].
        """
        self.pair = pair
        self.hook = hook if isinstance(hook, HookPoint) else resolve(hook, pair.model)
        self.hook_in = None if hook_in is None else _before(resolve(hook_in, pair.model), self.hook)
        self.tokenizer = tokenizer
        self._config = pair.model.config.get_text_config()
        self.n_layers = pair.layout.n_layers
        self.d_model: int = self._config.hidden_size
        self.vocab_size: int = pair.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        self.max_positions: int | None = getattr(self._config, "max_position_embeddings", None)
        """Longest sequence that the model was made for; None where its config does not say."""
        if len(tokenizer) > self.vocab_size:
            raise InputError(
                f"the tokenizer has {len(tokenizer)} tokens, the base model embeds {self.vocab_size}: it is another"
                " model's; save the base's own beside it"
            )

    @classmethod
    def load(
        cls,
        adapter: str | Path,
        base: str | Path,
        hook: str,
        *,
        dtype: str = "float32",
        device: str = "auto",
        sae: str | None = None,
        dictionary: Dictionary | None = None,
        since: str | None = None,
    ) -> PairedModel:
        """The pair of an adapter and its base, by path or hub id. The hook is checked before any weights are read.

        `dictionary`, loaded from `sae`, serves an adapter that acts on its latents, and says what else is read.
        `since`: another adapter of the same base, which the base side carries.
        """
        found, before = adapters.detect(adapter), None if since is None else adapters.detect(since)
        hook_in = None if dictionary is None else dictionary.hook_in
        for name in (hook, *([hook_in] if hook_in else [])):
            resolve(name, load_config(base))
        tokenizer = load_tokenizer(base, adapters.local_folder(adapters.separate(adapter)[0]))
        view = adapters.View(hook, sae, dictionary)
        pair = found.load_for(adapter, str(base), view, dtype=dtype, device=device)
        if before is not None:
            pair = SincePair(before.load_onto(str(since), str(base), view, pair.bare()), pair)
        return cls(pair, hook, tokenizer, hook_in)

    def with_adapter(self, adapter: str, base: str, sae: str | None, dictionary: Dictionary | None) -> PairedModel:
        """The same base with another adapter, over the same weights where the adapter's kind allows. As `load`."""
        found, view = adapters.detect(adapter), adapters.View(self.hook.name, sae, dictionary)
        pair = self.pair.onwards(found.load_onto(adapter, base, view, self.pair.bare()))
        return PairedModel(pair, self.hook, self.tokenizer, None if self.hook_in is None else self.hook_in.name)

    def replica(self) -> PairedModel:
        """The same for another thread: modules of its own, the same weights."""
        other = copy.copy(self)
        other.pair = self.pair.replica()
        return other

    @property
    def width(self) -> int:
        """Numbers in an activation as it is read: d, or 2 d with a second hook."""
        return self.d_model * (1 if self.hook_in is None else 2)

    @property
    def device(self) -> torch.device:
        return self._weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype, which activations come in."""
        return self._weight.dtype

    @property
    def _weight(self) -> Tensor:
        return next(self.pair.model.parameters())

    def check_sees_adapter(self) -> None:
        """InputError, naming hooks that would do, when no change of the adapter reaches the hook.

        Silent for an adapter that changes nothing anywhere (`pair.first_changed_layer is None`), which is no mistake.
        """
        self.pair.check_sees(self.hook)

    @torch.inference_mode()
    def activations(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """(x_base, x_adapted) at the hook, each [b, t, width] in the model's dtype, of token ids [b, t], right-padded.

        Both are one tensor where no change reaches the hook; do not write into them. InputError for sequences longer
        than the model's positions.
        """
        ids = self._checked(ids)
        n_shared = self._n_shared
        with self.pair.base() as model:
            x_base, shared = self._read(model, ids, n_shared)
        if not any(self.hook.sees(*place) for place in self.pair.changed_places):
            return x_base, x_base
        with self.pair.adapted() as model, self._passed_over(model, n_shared, shared):
            x_adapted, _ = self._read(model, ids, known=x_base)
        return x_base, x_adapted

    @torch.inference_mode()
    def activations_of(self, side: Literal["base", "adapted"], ids: Tensor) -> Tensor:
        """What `activations` gives of one side [b, t, width], without the other."""
        ids = self._checked(ids)
        with self.pair.base() if side == "base" else self.pair.adapted() as model:
            return self._read(model, ids)[0]

    @torch.inference_mode()
    def logits(self, ids: Tensor, at: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Next-token logits (base, adapted), each [b, t, vocabulary], of token ids [b, t], right-padded.

        A vocabulary is large: give a few sequences at a time, or ask for those of some places alone, [n, vocabulary]:
        at [n, 2] names the sequence and the position of each.
        """
        ids, n_shared = self._checked(ids), self._n_shared
        with self.pair.base() as model, self._kept(model, n_shared) as kept, _unembedding_only(model, at):
            base = model(ids, use_cache=False).logits
        with (
            self.pair.adapted() as model,
            self._passed_over(model, n_shared, kept.get("block")),
            _unembedding_only(model, at),
        ):
            adapted = model(ids, use_cache=False).logits
        base, adapted = (logits if at is None else logits[0] for logits in (base, adapted))
        return base, adapted[..., : base.shape[-1]]

    @torch.inference_mode()
    def logits_from(self, streams: tuple[Tensor, Tensor], ids: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """`logits` of `ids` at places at [n, 2], from what `activations` gave of them: (x_base, x_adapted), each
        [b, t, d]. Only what is above the hook is run, where that is the stream between two blocks.
        """
        ids, n, found = self._checked(ids), self._n_below, []
        for side, x in zip((self.pair.base, self.pair.adapted), streams, strict=True):
            with side() as model:
                if n is not None and not self._acts_below(model, n):
                    with self._passed_over(model, n, x.to(self.device)), _unembedding_only(model, at):
                        found.append(model(ids, use_cache=False).logits[0])
        if len(found) < len(streams):
            return self.logits(ids, at)
        base, adapted = found
        return base, adapted[..., : base.shape[-1]]

    @torch.inference_mode()
    def patched_logits(
        self, side: Literal["base", "adapted"], ids: Tensor, patch: Callable[[Tensor], Tensor], below: Any = None
    ) -> tuple[Tensor, Any]:
        """Next-token logits [b, t, vocabulary of the base] of one side when what is at the hook, x [b, t, d], is
        replaced by patch(x); and what the blocks below the hook's gave, to be handed back as `below` with the same ids
        on the same side, which leaves those blocks out.
        """
        ids = self._checked(ids)
        with self.pair.base() if side == "base" else self.pair.adapted() as model:
            below_hook = max(self.hook.layer, 0)
            n = 0 if self._acts_below(model, below_hook) else below_hook
            start = nullcontext() if below is None else self._passed_over(model, n, below)
            with self._kept(model, n) as kept, start, patched(model, self.hook, patch):
                logits = model(ids, use_cache=False).logits
        return logits[..., : self.vocab_size], kept.get("block")

    def _acts_below(self, model: PreTrainedModel, n_blocks: int) -> bool:
        """Whether torch hooks change one of the first blocks: they would act again on a block that is passed over."""
        blocks = (model.get_submodule(self._block_path(layer)) for layer in range(n_blocks))
        return any(block._forward_hooks or block._forward_pre_hooks for block in blocks)

    @torch.inference_mode()
    def unembed(self, x: Tensor) -> Tensor:
        """Logits [n, vocabulary] that the base model makes of residual-stream activations x [n, d].

        They go through the model's own forward pass with its blocks passed over, so that the final norm, soft-capping
        and whatever else the architecture does after the blocks are applied. InputError for a hook off the stream.
        """
        if not self.hook.on_stream:
            raise InputError(
                f"hook {self.hook.name} is not on the residual stream, the unembedding does not apply to it;"
                f" use a hook_resid_pre, hook_resid_mid or hook_resid_post"
            )
        x = x.to(self.device, self.dtype)[:, None]
        ids = torch.zeros(len(x), 1, dtype=torch.long, device=self.device)
        with self.pair.base() as model, self._passed_over(model, self.n_layers, x):
            return model(ids, use_cache=False).logits[:, 0]

    @property
    def _n_below(self) -> int | None:
        """Number of blocks whose result is what is at the hook; None where that is within a block."""
        if self.hook.module_path != self._block_path(self.hook.layer):
            return None
        return self.hook.layer + (self.hook.where == "output")

    @property
    def _n_shared(self) -> int:
        """Number of blocks that are the same on both sides and have nothing changed before them."""
        first = self.pair.first_changed_layer
        return self.n_layers if first is None else max(first, 0)

    def _read(
        self, model: PreTrainedModel, ids: Tensor, n_kept: int = 0, known: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Activations [b, t, width] at the hook, and the output of block n_kept − 1 if the pass got there. `known`: the
        same of the other side, for a second hook in a block that is passed over, where both sides agree."""
        with self._kept(model, n_kept) as kept, self._entering(model) as read, self._watched(model) as seen:
            try:
                model(ids, use_cache=False)
            except _Reached:
                if self.hook_in is None:
                    return seen[0], kept.get("block")
                u = read[0] if read else None if known is None else known[..., self.d_model :]
                if u is not None:
                    return torch.cat([seen[0], u], dim=-1), kept.get("block")
                raise InputError(f"hook {self.hook_in.name}: the model calls {self.hook.name} without it") from None
        raise InputError(
            f"hook {self.hook.name}: the model never calls this module; name another, e.g. {self._block_path(0)}"
        )

    @contextmanager
    def _entering(self, model: PreTrainedModel) -> Iterator[list[Tensor]]:
        """Records what is at the second hook, if there is one."""
        read: list[Tensor] = []

        def keep(x: Tensor) -> Tensor:
            read.append(x)
            return x

        with nullcontext() if self.hook_in is None else patched(model, self.hook_in, keep):
            yield read

    @contextmanager
    def _watched(self, model: PreTrainedModel) -> Iterator[list[Tensor]]:
        """Records what is at the hook and stops there."""
        seen: list[Tensor] = []

        def stop(x: Tensor) -> Tensor:
            seen.append(x)
            raise _Reached

        with patched(model, self.hook, stop):
            yield seen

    @contextmanager
    def _kept(self, model: PreTrainedModel, n_blocks: int) -> Iterator[dict[str, Any]]:
        """Keeps the output of block n_blocks − 1, as the block returns it, under "block"."""
        kept: dict[str, Any] = {}
        if n_blocks == 0:
            yield kept
            return
        last = model.get_submodule(self._block_path(n_blocks - 1))
        handle = last.register_forward_hook(lambda _module, _args, output: kept.update(block=output))
        try:
            yield kept
        finally:
            handle.remove()

    @contextmanager
    def _passed_over(self, model: PreTrainedModel, n_blocks: int, output: Any) -> Iterator[None]:
        """The first n_blocks blocks compute nothing: each returns `output`."""
        blocks = [model.get_submodule(self._block_path(layer)) for layer in range(n_blocks)]
        own = [vars(block).get("forward") for block in blocks]  # set by accelerate, for one
        try:
            for block in blocks:
                block.forward = lambda *_args, **_kwargs: output
            yield
        finally:
            for block, forward in zip(blocks, own, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _block_path(self, layer: int) -> str:
        return f"{self.pair.layout.blocks}.{layer}"

    def _checked(self, ids: Tensor) -> Tensor:
        if self.max_positions is not None and ids.shape[1] > self.max_positions:
            raise InputError(
                f"sequences of {ids.shape[1]} tokens: the model has {self.max_positions} positions; give a smaller"
                " --context-length"
            )
        return ids.to(self.device)


def _before(hook_in: HookPoint, hook: HookPoint) -> HookPoint:
    """`hook_in`, which must lie before `hook`, off the stream, where a second activation can mean something."""
    if hook.on_stream or hook_in.layer > hook.layer:
        raise InputError(
            f"hook {hook.name}: a transcoder that reads {hook_in.name} writes at an MLP's or attention's output, before"
            " it is added to the stream; give --hook such a point"
        )
    return hook_in


@contextmanager
def _unembedding_only(model: PreTrainedModel, at: Tensor | None) -> Iterator[None]:
    """The model unembeds the places at [n, 2] (sequence, position) alone, as one sequence [1, n]; every position where
    that is None."""
    if at is None:
        yield
        return

    def pick(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sequence, position = at.to(args[0].device).T
        return args[0][None, sequence, position], *args[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)  # pyright: ignore
    try:
        yield
    finally:
        handle.remove()
