"""Rows of the change map in words' reach: which latents a firing raises and lowers, which next tokens it promotes and suppresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from autointerp.evidence.change_map import decompose
from autointerp.evidence.collector import activations
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.spool import Spool
from autointerp.records import Write, WriteKind

N_LATENTS = 6
"""Directions that a row is read as, besides the latent's own."""
N_TOKENS = 10
"""Tokens kept on each side."""
N_STATES = 32
"""Firing tokens over which the change of log-probabilities is averaged."""
HINT_TOKENS = 3
FLOOR = 1e-4
"""Tokens less probable than this on average, before and after, are not shown: their ratios mean nothing to a reader."""


def read_rows(
    fitted: FittedMap,
    latents: Sequence[int],
    model: PairedModel,
    dictionary: Dictionary,
    spool: Spool,
    decode: Callable[[int], str],
) -> list[Write]:
    """The `writes` of the selected latents; none for latents outside the map or with no row. Tokens only at residual-stream hooks."""
    kept = [latent for latent in latents if fitted.row(latent) is not None and fitted.changed]
    if not kept:
        return []
    strength = mean_firing(fitted)
    targets = {j: decompose(_row(fitted, j), fitted.W_dec, N_LATENTS, own=j)[1:] for j in kept}
    hints = _hints(sorted({t for pairs in targets.values() for t, _ in pairs}), model, dictionary, decode)
    states = firing_states(spool, dictionary, kept) if model.hook.on_stream else {}
    writes: list[Write] = []
    for j in kept:
        writes += _latent_writes(j, [(t, a * strength[j]) for t, a in targets[j]], hints)
        if j in states:
            x, z = states[j]
            writes += _token_writes(j, token_effects(model, x, z[:, None] * _row(fitted, j).float()), decode)
    return writes


def _row(fitted: FittedMap, latent: int) -> Tensor:
    row = fitted.row(latent)
    if row is None:
        raise ValueError(f"latent {latent} has no row in the map")
    return row


def mean_firing(fitted: FittedMap) -> np.ndarray:
    """Mean z_base of each latent over the tokens where it fires [m]."""
    base = fitted.statistics.base
    return base.total / np.maximum(base.fired, 1)


def firing_states(spool: Spool, dictionary: Dictionary, latents: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """For each latent x_base [n, d] and z_base [n] at its first N_STATES firing tokens of the shuffled corpus."""
    columns = torch.as_tensor(list(latents), device=dictionary.W_dec.device)
    found: dict[int, list[tuple[Tensor, Tensor]]] = {latent: [] for latent in latents}
    wanted = dict.fromkeys(latents, N_STATES)
    for stretch in spool.stretches():
        z = activations(stretch.x_base, stretch.counted, dictionary, columns)
        for column, latent in enumerate(latents):
            if wanted[latent] > 0:
                at = np.flatnonzero(z[:, column] > 0)[: wanted[latent]]
                wanted[latent] -= len(at)
                found[latent].append((stretch.x_base[at].float(), torch.from_numpy(z[at, column])))
        if not any(wanted.values()):
            break
    joined = {j: (torch.cat([x for x, _ in parts]), torch.cat([z for _, z in parts])) for j, parts in found.items()}
    return {j: (x, z) for j, (x, z) in joined.items() if len(z)}


def token_effects(model: PairedModel, x: Tensor, written: Tensor) -> Tensor:
    """Mean change of log-probability [vocabulary] when `written` [n, d] is added to x [n, d], through final norm and unembedding.

    −inf where a token is rarer than FLOOR both before and after.
    """
    before = model.unembed(x).float().log_softmax(-1)
    after = model.unembed(x + written.to(x)).float().log_softmax(-1)
    change = (after - before).mean(0).cpu()
    rare = torch.maximum(before.exp().mean(0), after.exp().mean(0)).cpu() < FLOOR
    return change.masked_fill(rare, float("nan"))


def _latent_writes(latent: int, targets: list[tuple[int, float]], hints: dict[int, str]) -> list[Write]:
    writes: list[Write] = []
    for kind, sign in (("raises", 1), ("lowers", -1)):
        mine = sorted((pair for pair in targets if pair[1] * sign > 0), key=lambda pair: -abs(pair[1]))
        for rank, (target, weight) in enumerate(mine, start=1):
            writes.append(Write(latent, kind, target, None, weight, rank, hints.get(target)))  # pyright: ignore
    return writes


def _token_writes(latent: int, change: Tensor, decode: Callable[[int], str]) -> list[Write]:
    writes: list[Write] = []
    kinds: tuple[tuple[WriteKind, float], ...] = (("promotes", 1.0), ("suppresses", -1.0))
    for kind, sign in kinds:
        signed = (change * sign).nan_to_num(-1.0)
        values, ids = signed.topk(min(N_TOKENS, len(signed)))
        for rank, (value, token) in enumerate(zip(values.tolist(), ids.tolist(), strict=True), start=1):
            if value > 0:
                writes.append(Write(latent, kind, None, decode(token), sign * value, rank))
    return writes


def _hints(
    latents: list[int], model: PairedModel, dictionary: Dictionary, decode: Callable[[int], str]
) -> dict[int, str]:
    """Tokens that each latent's own direction promotes most, for readers to whom a number says nothing."""
    if not latents or not model.hook.on_stream:
        return {}
    directions = dictionary.W_dec[latents].float().cpu()
    logits = model.unembed(directions) - model.unembed(torch.zeros_like(directions[:1]))
    best = logits.float().topk(HINT_TOKENS, dim=-1).indices.tolist()
    return {j: ", ".join(f"`{decode(t)}`" for t in tokens) for j, tokens in zip(latents, best, strict=True)}
