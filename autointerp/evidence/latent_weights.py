"""Adapters of `autointerp.adapters` read by their weights alone, in the latents of the dictionary that they act on;
those of other libraries in `inserted_weights`.

Unlike a weight matrix of the model, which touches every direction of the stream, these have weights of their own for
each latent, or act on the very stream that the dictionary decomposes: what they read and write there is exact. The
formulas are in `pullback`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from autointerp import adapters
from autointerp.errors import InputError
from autointerp.evidence import pullback
from autointerp.evidence.adapters import local_folder
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.directions import InMemory
from autointerp.evidence.energy import Energy, standardise, standardise_product
from autointerp.evidence.hookpoints import HookPoint, resolve
from autointerp.evidence.selection import Ranking
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.units import Component, describe, network_rows, strongest
from autointerp.evidence.weight_change import INSTEAD
from autointerp.evidence.weight_files import read_json
from autointerp.evidence.weights_only import Change, WeightScores, better_side, rank, score
from autointerp.records import Role, Unit, UnitSide, Write, WriteKind
from autointerp.run import Run

N_TARGETS = 6
"""Latents kept of those that a latent raises, and of those that it lowers."""
SIDES: tuple[UnitSide, UnitSide] = ("reads", "writes")
MIN_SIZE = 1e-5
"""Of a component, beside the largest: below it lies rounding."""


@dataclass(frozen=True)
class LatentReading:
    """What the weights of one adapter say. m latents."""

    scores: WeightScores
    note: str
    """What was read, for people."""
    units: list[Unit] = field(default_factory=list)
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    """Further columns of `latents`, each [m]."""
    row: Callable[[int], Tensor] | None = None
    """What one unit of a latent's activation adds to each latent [m]; None where that hangs on the others too."""
    role: Role | None = None
    """Of every latent it selects; None: `read` or `written`, whichever side stands out more."""

    def ranking(self, top: int, fdr: float) -> Ranking:
        """The latents that pass at `fdr`, those that stand out most first; at most `top`."""
        found = rank(self.scores, self.note, top, fdr)
        roles = found.roles if self.role is None else [self.role] * len(found.latents)
        return replace(found, roles=roles, columns=found.columns | self.columns)

    def writes(self, latents: Sequence[int]) -> list[Write]:
        """What the latents raise and lower, for each unit of their activation, where the adapter is linear in them."""
        found: list[Write] = []
        if self.row is None:
            return found
        for latent in latents:
            written = self.row(latent)
            written[latent] = 0  # its own is its gain
            kinds: tuple[tuple[WriteKind, Tensor], ...] = (("raises", written), ("lowers", -written))
            for kind, sizes in kinds:
                targets = [j for j in sizes.topk(min(N_TARGETS, len(sizes))).indices.tolist() if sizes[j] > 0]
                found += [Write(latent, kind, j, None, float(written[j]), k) for k, j in enumerate(targets, start=1)]
        return found


def read_latents(run: Run, dictionary: Dictionary, mean: Tensor | None = None) -> LatentReading:
    """What the adapter of `run`, whose hook is known, does to each latent. mean: E[z] [m], from a corpus if there is
    one. InputError, in one line, where it acts on another dictionary's latents or at another place."""
    if run.since is not None:
        raise InputError(f"since {run.since}: the latents' own weights are those since the base; {INSTEAD}")
    if run.adapter_format != "sae_adapter":
        from autointerp.evidence.inserted_weights import read_inserted

        return read_inserted(run, dictionary, mean)
    folder = local_folder(run.adapter)
    said, base = read_json(folder / "sae_adapter.json", "adapter"), BaseWeights.at(run.base)
    if place_of(said["hook"], base) != place_of(run.hook or "", base):
        raise InputError(
            f"adapter {folder} acts at {said['hook']}, its weights do not say what it does at {run.hook}: give a --sae"
            f" for that place, or use --selector change, which runs the models over a corpus"
        )
    adapter = adapters.load(folder, dictionary)
    if vars(adapter)["d"] != dictionary.W_dec.shape[1]:
        raise InputError(
            f"adapter {folder} acts on activations of width {vars(adapter)['d']}, the SAE has d_in"
            f" {dictionary.W_dec.shape[1]}: give --sae one for its base"
        )
    reading = read_adapter(adapter.cpu(), dictionary, mean)
    return reading if adapter.has_effect() else without_effect(reading)


def without_effect(reading: LatentReading) -> LatentReading:
    """That of an adapter that was not trained."""
    return replace(reading, note="changes nothing: what it writes is all zero")


def read_adapter(adapter: adapters.HookAdapter, dictionary: Dictionary, mean: Tensor | None) -> LatentReading:
    """What one of our own modules does to each latent; see `read_latents`."""
    W_dec = dictionary.W_dec.float().cpu()
    match adapter:
        case adapters.Bias():
            return _read_bias(adapter, W_dec)
        case adapters.Scaling():
            return _read_scaling(adapter, W_dec, mean)
        case adapters.Ffnn():
            return _read_network(adapter.W_in, adapter.b_in, adapter.W_out, W_dec, adapter.activation)
        case adapters.LowRank():
            return _read_low_rank(adapter.W_in, adapter.W_out, W_dec)
        case adapters.SparseLinear():
            return _read_sparse(adapter, W_dec)
        case adapters.Residual():
            return _read_residual(adapter, dictionary)
    raise TypeError(f"{adapter.kind} adapters are not read by their weights")


def _read_bias(adapter: adapters.Bias, W_dec: Tensor) -> LatentReading:
    shares = pullback.bias_shares(adapter.bias, W_dec)
    nothing = torch.zeros_like(shares)
    length = float((adapter.bias @ W_dec).norm())
    note = f"a bias on latents, of length {length:.3g} in the stream; sizes are shares of it"
    scores = scores_of(pullback.Sides(nothing, shares.abs()))
    if 2 * int((adapter.bias != 0).sum()) >= len(shares):  # else having an entry is the finding
        lengths = W_dec.norm(dim=1)
        answers = W_dec @ (adapter.bias @ W_dec) / lengths.clamp_min(1e-30)
        tested = standardise_product((adapter.bias * lengths).double().numpy(), answers.double().numpy())
        scores = replace(scores, statistic=tested.z, q_value=tested.q)
    return LatentReading(scores, note, columns={"static_share": shares.double().numpy()}, role="static")


def _read_scaling(adapter: adapters.Scaling, W_dec: Tensor, mean: Tensor | None) -> LatentReading:
    sizes = pullback.scaling_sizes(adapter.scale, W_dec, None if mean is None else mean.to(W_dec))
    without = "; without a corpus, sizes are of the scaling alone, however little a latent fires"
    note = f"a scaling of latents{without if mean is None else ''}"
    scores = scores_of(pullback.Sides(sizes, torch.zeros_like(sizes)))
    return LatentReading(scores, note, columns={"gain": adapter.scale.double().numpy()})


def read_chain(maps: Sequence[tuple[Tensor, Tensor, bool]], W_dec: Tensor) -> LatentReading:
    """Of z + a chain of linear maps of z: (weight [out, in], bias [out], whether a ReLU follows) each, no ReLU behind
    the last. InputError for more than one hidden layer."""
    (W1, b1, relu), *others = maps
    if not others:
        return _read_matrix(W1, W_dec)
    if len(others) > 1:
        raise InputError(
            f"an adapter of {len(maps)} linear maps, one behind the other, does not say by its weights what it does to"
            " each latent: use --selector change, which runs the models over a corpus"
        )
    W2 = others[0][0]
    return _read_network(W1, b1, W2, W_dec, "relu") if relu else _read_low_rank(W1, W2, W_dec)


def _read_matrix(weight: Tensor, W_dec: Tensor) -> LatentReading:
    """Of z + W z, W [m, m]."""
    written = weight * W_dec.norm(dim=1)[:, None]
    sides = pullback.Sides(written.norm(dim=0), written.norm(dim=1))
    gain = weight.diagonal().double().numpy()
    note = "a linear map between latents"
    return LatentReading(scores_of(sides), note, columns={"gain": gain}, row=lambda latent: weight[:, latent].clone())


def _read_network(W1: Tensor, b1: Tensor, W_out: Tensor, W_dec: Tensor, activation: str) -> LatentReading:
    W2 = W_out * W_dec.norm(dim=1)[:, None]  # what is written, in lengths of the stream
    if activation == "tanh":  # odd: the sign of a unit says nothing
        sign = W1.gather(1, W1.abs().argmax(1, keepdim=True)).sign()
        W1, b1, W2 = W1 * sign, b1 * sign[:, 0], W2 * sign[:, 0]
    sizes_in, sizes_out = torch.cat([W1, b1[:, None]], 1).norm(dim=1), W2.norm(dim=0)
    kept = strongest(sizes_in * sizes_out)
    units = network_rows((W1 * sizes_out[:, None])[kept], (W2 * sizes_in).T[kept], kept)
    return LatentReading(scores_of(pullback.network_sides(W1, b1, W2)), _network_note(b1, activation), units)


def _read_low_rank(down: Tensor, up: Tensor, W_dec: Tensor) -> LatentReading:
    sides = pullback.linear_sides(down, up * W_dec.norm(dim=1)[:, None])
    gain = (up * down.T).sum(1).double().numpy()
    note = f"a linear map of rank {len(down)} between latents"
    units = network_rows(*linear_units(down, up, W_dec), name="component")
    return LatentReading(scores_of(sides), note, units, {"gain": gain}, lambda latent: up @ down[:, latent])


def signed_components(down: Tensor, up: Tensor, W_dec: Tensor) -> list[Component]:
    """The singular directions of x + up(down x) on the stream, largest first, down [r, d], up [d, r]; the latent that
    each reads most is read positively."""
    reads, writes = _singular(down, up, up.T)
    answers = reads @ W_dec.double().T
    sign = answers.gather(1, answers.abs().argmax(1, keepdim=True)).sign()
    written = writes * reads.norm(dim=1, keepdim=True)
    return [
        Component(f"component {unit}", side, direction, unit, signed=True)
        for unit, pair in enumerate(zip((reads * sign).float(), (written * sign).float(), strict=True))
        for side, direction in zip(SIDES, pair, strict=True)
    ]


def linear_units(down: Tensor, up: Tensor, W_dec: Tensor) -> tuple[Tensor, Tensor]:
    """(reads, writes) [r, m] of the components of z + up(down z): the singular directions of what it adds to the
    stream, largest first, down [r, m], up [m, r]. The same whatever R R⁻¹ stands between the factors.

    reads: the component's answer to a unit of each latent's activation, in lengths of the stream; writes: what it adds
    to each latent when it has an answer of 1. The strongest latent read is positive.
    """
    reads, writes = _singular(down, up, up.T @ W_dec)
    sign = reads.gather(1, reads.abs().argmax(1, keepdim=True)).sign()
    return (reads * sign).float(), (writes * sign).float()


def _singular(down: Tensor, up: Tensor, in_stream: Tensor) -> tuple[Tensor, Tensor]:
    """(reads [k, n], writes [k, m]) of up(down ·) by the singular directions of what it adds to the stream, largest
    first, float64, of either sign; down [r, n], up [m, r]. in_stream [r, d]: the columns of `up`, as the stream has
    them. reads have the singular values as lengths; writes are what an answer of 1 adds."""
    Q_in, R_in = torch.linalg.qr(down.double().T)
    R_out = torch.linalg.qr(in_stream.double().T).R
    _, S, Vh = torch.linalg.svd(R_out @ R_in.T)
    reads = (Q_in @ Vh.T * S).T
    kept = S.max().clamp_min(1e-30) * MIN_SIZE < S
    reads, S = reads[kept], S[kept]
    return reads, (up.double() @ (down.double() @ reads.T)).T / S.square()[:, None]


def _read_sparse(adapter: adapters.SparseLinear, W_dec: Tensor) -> LatentReading:
    m, weight = len(W_dec), adapter.weight
    at = weight.nonzero().T
    written, read, values = adapter.outputs[at[0]], adapter.inputs[at[1]], weight[*at]
    sides = pullback.sparse_sides(torch.stack([written, read]), values * W_dec.norm(dim=1)[written], m)
    gain = torch.zeros(m).index_add(0, written, values * (written == read)).double().numpy()

    def row(latent: int) -> Tensor:
        of_it = read == latent
        return torch.zeros(m).index_add(0, written[of_it], values[of_it])

    note = f"a sparse linear map between latents: {values.numel():,} of {weight.numel():,} weights are not zero"
    return LatentReading(scores_of(sides), note, columns={"gain": gain}, row=row)


def _read_residual(adapter: adapters.Residual, dictionary: Dictionary) -> LatentReading:
    W_in, b_in, W_out = adapter.W_in, adapter.b_in, adapter.W_out
    if adapter.activation == "tanh":
        reads = W_in @ dictionary.W_dec.float().cpu().T
        sign = reads.gather(1, reads.abs().argmax(1, keepdim=True)).sign()
        W_in, b_in, W_out = W_in * sign, b_in * sign[:, 0], W_out * sign[:, 0]
    read, written = pullback.unit_reads(W_in, W_out), pullback.unit_writes(W_in, b_in, W_out)  # [h, d] each
    directions = InMemory(dictionary)
    writes, reads = Energy(adapter.d), Energy(adapter.d)
    writes.add(written.T)
    reads.add(read.T)
    kept = strongest(written.norm(dim=1))
    components = [
        part
        for place, k in enumerate(kept)
        for part in (
            Component(f"unit {k}", "reads", read[k], place, signed=True),
            Component(f"unit {k}", "writes", written[k], place, signed=True),
        )
    ]
    at_rest = W_in @ dictionary.b_dec.float().cpu() + b_in
    return LatentReading(
        score(Change(writes, reads), directions),
        _network_note(at_rest, adapter.activation),
        describe(components, directions),
    )


def _network_note(at_rest: Tensor, activation: str) -> str:
    """at_rest [h]: pre-activations where no latent fires."""
    on = int((at_rest > 0).sum())
    return f"{len(at_rest)} hidden units ({activation}), {on} of them driven where no latent fires"


def scores_of(sides: pullback.Sides) -> WeightScores:
    """Both sides [m] as shares of their root mean square, tested against their own spread over the dictionary.

    Latents without any weight on a side do not count there. Where those are the greater part, as after an L1 penalty
    or in a pattern set by hand, having a weight is the finding: there is no spread of chance to test it against.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for size in (sides.write, sides.read):
        size = size.detach().double().numpy()
        weighted = size > 0
        share = np.where(weighted, size / np.sqrt(np.mean(size**2)) if weighted.any() else 0.0, np.nan)
        if 2 * weighted.sum() < len(size):
            found.append((share, share, np.where(weighted, 0.0, 1.0)))
        else:
            tested = standardise(share**2)
            found.append((share, tested.z, tested.q))
    return better_side(found[0], found[1])


def place_of(hook: str | HookPoint, base: BaseWeights | None = None) -> tuple[str, str] | str:
    """The place in the model that a hook names: the stream between two blocks has two names, or more with a base."""
    if isinstance(hook, HookPoint):
        point = hook
    elif base is None:
        match = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", hook)
        return f"blocks.{int(match[1]) - 1}.hook_resid_post" if match and int(match[1]) > 0 else hook
    else:
        point = resolve(hook, base.config)
    block = re.fullmatch(r"(.+\.)(\d+)", point.module_path)
    if point.where == "input" and point.on_stream and block and int(block[2]) > 0:
        return f"{block[1]}{int(block[2]) - 1}", "output"
    return point.module_path, point.where
