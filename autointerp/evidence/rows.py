"""Rows of the change map in words' reach: which latents a firing raises and lowers, which next tokens it promotes and
suppresses."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.change_map import decompose_all
from autointerp.evidence.collector import activations
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.spool import Spool
from autointerp.records import DecoderToken, Write, WriteKind

N_LATENTS = 6
"""Directions that a row is read as, besides the latent's own."""
N_TOKENS = 10
"""Tokens kept on each side."""
N_STATES = 64
"""Firing tokens over which the change of log-probabilities is averaged."""
MAX_LOGITS = 1 << 22
"""Logits held at once, on each side."""
HINT_TOKENS = 3
N_DECODER = 8
"""Tokens kept on each side of a latent's own direction."""
MIN_OCCURRENCES = 5
"""Occurrences in the corpus from which a token is shown as promoted or suppressed."""
PROBABLE = 1e-3
"""Mean probability from which a token counts as suppressed."""


def read_rows(
    fitted: FittedMap,
    latents: Sequence[int],
    model: PairedModel,
    dictionary: Dictionary,
    spool: Spool,
    decode: Callable[[int], str],
) -> list[Write]:
    """The `writes` of the selected latents. Tokens only at residual-stream hooks.

    A latent of the map: what its row writes when it fires in the base model. A latent that fires only since the
    training has no row; for it, the tokens that its own new activation promotes and suppresses.
    """
    rows = fitted.rows_of(latents)
    base, adapted = fitted.statistics.base, fitted.statistics.adapted
    revived = [j for j in latents if j not in rows or (not base.fired[j] and adapted.fired[j])]
    kept = [j for j in rows if j not in revived]
    strength = fitted.mean_firing
    stacked = torch.stack([rows[j] for j in kept]) if kept else torch.zeros(0, fitted.statistics.d).double()
    decomposed = decompose_all(stacked, fitted.W_dec, N_LATENTS, own=kept)
    targets = {j: found[1:] for j, found in zip(kept, decomposed, strict=True)}
    hints = _hints(sorted({t for pairs in targets.values() for t, _ in pairs}), model, dictionary, decode)
    writes = [write for j in kept for write in _latent_writes(j, [(t, a * strength[j]) for t, a in targets[j]], hints)]
    if not model.hook.on_stream:
        return writes
    directions = {j: rows[j] for j in kept} | {j: fitted.W_dec[j] for j in revived}
    states = firing_states(spool, dictionary, kept, "base") | firing_states(spool, dictionary, revived, "adapted")
    seen = torch.from_numpy(spool.seen(model.vocab_size, MIN_OCCURRENCES))
    written = {j: (x, z[:, None] * directions[j].float()) for j, (x, z) in states.items()}
    for j, effects in token_effects(model, written):
        writes += _token_writes(j, effects, seen, decode)
    return writes


def decoder_tokens(
    latents: Sequence[int], model: PairedModel, dictionary: Dictionary, spool: Spool, decode: Callable[[int], str]
) -> list[DecoderToken]:
    """What the latents' own decoder rows push towards in the base model, whatever the adapter does. Only tokens that
    the corpus holds; none at hooks off the residual stream."""
    if not latents or not model.hook.on_stream:
        return []
    seen = torch.from_numpy(spool.seen(model.vocab_size, MIN_OCCURRENCES))
    found: list[DecoderToken] = []
    for latent, logits in zip(latents, direction_logits(latents, model, dictionary), strict=True):
        for kind, strength in (("promotes", logits), ("suppresses", -logits)):
            values, ids = strength.masked_fill(~seen[: len(strength)], 0.0).topk(min(N_DECODER, len(strength)))
            for rank, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
                if value > 0:
                    weight = value if kind == "promotes" else -value
                    found.append(DecoderToken(latent, kind, decode(token), weight, rank))  # pyright: ignore
    return found


def direction_logits(latents: Sequence[int], model: PairedModel, dictionary: Dictionary) -> Tensor:
    """Logits [k, vocabulary] of each latent's decoder row alone, less those of a zero stream."""
    directions = dictionary.W_dec[list(latents)].float().cpu()
    return (model.unembed(directions) - model.unembed(torch.zeros_like(directions[:1]))).float().cpu()


def firing_states(
    spool: Spool, dictionary: Dictionary, latents: Sequence[int], side: Literal["base", "adapted"]
) -> dict[int, tuple[Tensor, Tensor]]:
    """x_base [n, d] and z [n] of each latent at its first N_STATES firing tokens on `side`, in corpus order as
    shuffled.

    Latents that never fire there are left out.
    """
    if not latents:
        return {}
    columns = torch.as_tensor(list(latents), device=dictionary.W_dec.device)
    # One block for all: small ones that stay would lie between the large ones that come and go with every stretch.
    states, codes = torch.zeros(len(latents), N_STATES, spool.d), torch.zeros(len(latents), N_STATES)
    have = [0] * len(latents)
    for stretch in spool.stretches():
        x = stretch.x_base if side == "base" else stretch.x_adapted
        z = activations(x, stretch.counted, dictionary, columns)
        for column, n in enumerate(have):
            if n == N_STATES:
                continue
            at = np.flatnonzero(z[:, column] > 0)[: N_STATES - n]
            have[column] = n + len(at)
            states[column, n : have[column]] = stretch.x_base[at].float()
            codes[column, n : have[column]] = torch.from_numpy(z[at, column])
        if min(have) == N_STATES:
            break
    return {j: (states[c, :n], codes[c, :n]) for c, (j, n) in enumerate(zip(latents, have, strict=True)) if n}


class TokenEffects(NamedTuple):
    """What a write does to next-token predictions, averaged over tokens where the latent fires. [vocabulary] each."""

    change: Tensor
    """Mean change of log-probability, nats."""
    before: Tensor
    """Mean probability before."""


def token_effects(
    model: PairedModel, states: Mapping[int, tuple[Tensor, Tensor]]
) -> Iterator[tuple[int, TokenEffects]]:
    """Of adding what each latent writes to the stream, read through the final norm and the unembedding.

    states: by latent, x [n, d] and what is written there [n, d]. Several latents go through the model at once, as many
    as MAX_LOGITS allows.
    """
    waiting = list(states.items())
    while waiting:
        rows = list(accumulate(len(x) for _, (x, _) in waiting))
        n = max(1, bisect_right(rows, MAX_LOGITS // model.vocab_size))
        now, waiting = waiting[:n], waiting[n:]
        x, written = (torch.cat(parts) for parts in zip(*(pair for _, pair in now), strict=True))
        before = model.unembed(x).float().log_softmax(-1)
        after = model.unembed(x + written.to(x)).float().log_softmax(-1)
        for (latent, _), end, begin in zip(now, rows, [0, *rows], strict=False):
            p, q = before[begin:end], after[begin:end]
            yield latent, TokenEffects((q - p).mean(0).cpu(), p.exp().mean(0).cpu())


def _latent_writes(latent: int, targets: list[tuple[int, float]], hints: dict[int, str]) -> list[Write]:
    writes: list[Write] = []
    for kind, sign in (("raises", 1), ("lowers", -1)):
        mine = sorted((pair for pair in targets if pair[1] * sign > 0), key=lambda pair: -abs(pair[1]))
        for rank, (target, weight) in enumerate(mine, start=1):
            writes.append(Write(latent, kind, target, None, weight, rank, hints.get(target)))  # pyright: ignore
    return writes


def _token_writes(latent: int, effects: TokenEffects, seen: Tensor, decode: Callable[[int], str]) -> list[Write]:
    """Promoted tokens by their gain alone: the layers above have yet to make them probable. Suppressed ones
    only among those that were probable before: there is nothing to suppress in the others. Tokens that the corpus
    hardly holds (`seen` [vocabulary]) are left out: of those, a model's probabilities are noise."""
    kinds: tuple[tuple[WriteKind, Tensor], ...] = (
        ("promotes", effects.change),
        ("suppresses", (-effects.change).masked_fill(effects.before < PROBABLE, 0.0)),
    )
    writes: list[Write] = []
    for kind, strength in kinds:
        values, ids = strength.masked_fill(~seen[: len(strength)], 0.0).topk(min(N_TOKENS, len(strength)))
        tokens = [token for value, token in zip(values.tolist(), ids.tolist(), strict=True) if value > 0]
        for rank, token in enumerate(tokens, start=1):
            writes.append(Write(latent, kind, None, decode(token), float(effects.change[token]), rank))
    return writes


def _hints(
    latents: list[int], model: PairedModel, dictionary: Dictionary, decode: Callable[[int], str]
) -> dict[int, str]:
    """Tokens that each latent's own direction promotes most, for readers to whom a number says nothing."""
    if not latents or not model.hook.on_stream:
        return {}
    best = direction_logits(latents, model, dictionary).topk(HINT_TOKENS, dim=-1).indices.tolist()
    return {j: ", ".join(f"`{decode(t)}`" for t in tokens) for j, tokens in zip(latents, best, strict=True)}
