"""How much the change at the hook matters for what the model predicts: one backward pass over a part of the corpus.

L is the mean KL(adapted ‖ base + change) of the next-token distributions, seen as a function of the activation x at the
hook of the base model. Its gradient g, taken halfway between x_base and x_adapted, prices every share of Δx: Σ⟨g, Δx⟩
is L(x_adapted) − L(x_base) up to third order (the midpoint rule; attribution patching, Nanda 2023, takes g at x_base).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from autointerp.evidence.at_hook import patched
from autointerp.evidence.corpus import by_length
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.parallel import in_order, tokens_per_batch
from autointerp.evidence.spool import Spool
from autointerp.evidence.stream import to_codes

TOKENS = 20_000
"""Tokens that the backward pass reads, sequences spread evenly over the corpus."""
MAX_LOGITS = 1 << 24
"""Logits of a batch at most: the pass holds a few times as many numbers."""


@dataclass
class GradientSums:
    """Sums over the counted tokens of the backward pass, for L in nats. Additive. m latents, d residual width."""

    change: np.ndarray
    """Σ g [d]."""
    base: np.ndarray
    """Σ z_base g [p, d], of the tracked latents."""
    differences: np.ndarray
    """Σ (z_adapted − z_base) ⟨d_i, g⟩ [m]."""
    n: int = 0
    """Tokens."""
    total: float = 0.0
    """Σ ⟨g, Δx⟩."""
    kl: float = 0.0
    """Σ KL(adapted ‖ base)."""

    @classmethod
    def zero(cls, p: int, m: int, d: int) -> GradientSums:
        return cls(np.zeros(d), np.zeros((p, d)), np.zeros(m))

    def __add__(self, other: GradientSums) -> GradientSums:
        return GradientSums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def add(self, batch: PricedBatch, tracked: np.ndarray, W_dec: np.ndarray) -> None:
        """tracked [p]; W_dec [m, d]."""
        g, z = batch.gradient, batch.base
        self.n += len(g)
        self.kl += batch.kl
        self.total += float(np.einsum("nd,nd->", g, batch.change, dtype=np.float64))
        self.change += g.sum(0, dtype=np.float64)
        self.base += (z if len(tracked) == len(W_dec) else z[:, tracked]).T @ g
        moved = csr_matrix(batch.adapted - z)
        latents = np.unique(moved.indices)
        self.differences[latents] += np.einsum("kd,kd->k", moved[:, latents].T @ g, W_dec[latents], dtype=np.float64)


@dataclass(frozen=True)
class PricedBatch:
    """Counted tokens with their gradients. n tokens."""

    gradient: np.ndarray
    """[n, d]."""
    change: np.ndarray
    """Δx [n, d]."""
    base: csr_matrix
    """z of the base model [n, m]."""
    adapted: csr_matrix
    """[n, m]."""
    kl: float
    """Σ KL(adapted ‖ base)."""


def measure_gradients(
    models: Sequence[PairedModel],
    dictionary: Dictionary,
    spool: Spool,
    bos: np.ndarray,
    tracked: np.ndarray,
    tokens: int = TOKENS,
) -> GradientSums:
    """The backward pass over about `tokens` tokens of the spool. bos: ids put before every sequence, none or one."""
    model, W_dec = models[0], dictionary.W_dec.float().cpu().numpy()
    limit = min(tokens_per_batch(model.device), MAX_LOGITS // model.vocab_size)
    batches = by_length(_spread(spool, tokens), lambda s: len(bos) + len(spool.ids(s)), max(1, limit))
    sums = GradientSums.zero(len(tracked), *W_dec.shape)
    in_order(
        lambda model, batch: _priced(model, dictionary, spool, bos, np.sort(batch)),
        lambda batch: sums.add(batch, tracked, W_dec),
        models,
        batches,
    )
    return sums


def _spread(spool: Spool, tokens: int) -> list[int]:
    """Sequences at even distances, about `tokens` tokens in all."""
    mean = sum(len(spool.ids(s)) for s in range(len(spool))) / len(spool)
    n = max(1, min(len(spool), round(tokens / mean)))
    return ((np.arange(n) + 0.5) * len(spool) / n).astype(int).tolist()


def _priced(
    model: PairedModel, dictionary: Dictionary, spool: Spool, bos: np.ndarray, sequences: np.ndarray
) -> PricedBatch:
    """One batch of the spool's sequences, its counted tokens alone."""
    ids, counted = spool.padded(sequences.tolist(), bos)
    gradient, x_base, x_adapted, kl = loss_gradient(model, ids, counted)
    at = counted.to(x_base.device)
    x_base, x_adapted = x_base[at].float(), x_adapted[at].float()
    return PricedBatch(
        gradient=gradient[at].float().cpu().numpy(),
        change=(x_adapted - x_base)[:, : model.d_model].cpu().numpy(),
        base=to_codes(dictionary, x_base),
        adapted=to_codes(dictionary, x_adapted),
        kl=kl,
    )


def loss_gradient(model: PairedModel, ids: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """(∂L/∂x [b, t, d] halfway between the two sides, x_base, x_adapted [b, t, width], Σ KL(adapted ‖ base)) of ids
    [b, t]; of a transcoder, x is what is at the hook where it writes.

    L sums the KL over the predictions made at the `counted` [b, t] positions; x at all of them moves it.
    """
    at = counted.to(model.device)
    with torch.inference_mode():
        target = [logits[at].float().log_softmax(-1) for logits in model.logits(ids)]
        kl = float(_kl(target[1], target[0]))
    x_base, x_adapted = (x.clone() for x in model.activations(ids))  # out of inference mode
    middle = ((x_base + x_adapted) / 2)[..., : model.d_model]
    halfway, wanted = middle.contiguous().requires_grad_(), target[1].clone()
    with torch.enable_grad():
        found = logits_with(model, ids, halfway)[at].float().log_softmax(-1)
        (gradient,) = torch.autograd.grad(_kl(wanted, found), halfway)
    return gradient, x_base, x_adapted, kl


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ KL(p ‖ q) of log-probabilities [n, vocabulary], over the words that both know."""
    width = min(p.shape[-1], q.shape[-1])
    return (p[:, :width].exp() * (p[:, :width] - q[:, :width])).sum()


def logits_with(model: PairedModel, ids: Tensor, x: Tensor) -> Tensor:
    """Next-token logits [b, t, vocabulary] of the base model with x [b, t, d] in place of what is at the hook."""
    with model.pair.base() as base, patched(base, model.hook, lambda _: x):
        return base(ids.to(model.device), use_cache=False).logits
