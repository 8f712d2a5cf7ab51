"""Adapters of other libraries that act at hook points, read by their weights alone: ISaeRFT, FSRL, LoReFT, steering.

Where they act is taken from the base model's config, the base's weights are not needed. What is said of each kind holds
for the function that it computes: it is the same however LoReFT's subspace is spanned, or a ReLU's input is scaled.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from autointerp.adapters.modules import HookAdapter, OnLatents
from autointerp.errors import InputError
from autointerp.evidence import pullback
from autointerp.evidence.adapters import ADAPTERS, View, local_folder
from autointerp.evidence.adapters.inserting import InsertingFormat
from autointerp.evidence.dictionaries.base import Dictionary
from autointerp.evidence.directions import InMemory
from autointerp.evidence.energy import Energy
from autointerp.evidence.hook_functions import Loreft, Network, Steering
from autointerp.evidence.latent_weights import (
    LatentReading,
    place_of,
    read_adapter,
    read_chain,
    scores_of,
    signed_components,
    without_effect,
)
from autointerp.evidence.shift import Shift
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.units import describe
from autointerp.evidence.weights_only import Change, score
from autointerp.run import Run


def read_inserted(run: Run, dictionary: Dictionary, mean: Tensor | None = None) -> LatentReading:
    """What the adapter of `run`, whose hook is known, does to each latent. mean: E[z] [m], from a corpus if there is
    one. InputError, in one line, where it acts on another dictionary's latents or at other places."""
    base, found = BaseWeights.at(run.base), ADAPTERS.get(run.adapter_format)
    assert isinstance(found, InsertingFormat)
    if base is None:
        raise InputError(f"adapter {run.adapter}: where it acts takes the base model's config; give --base its folder")
    view = View(run.hook or "", run.sae, dictionary)
    inserted = found.insertions(local_folder(run.adapter), base.config, view, torch.device("cpu"))
    here = [insertion for insertion in inserted if place_of(insertion.point) == place_of(view.hook, base)]
    if len(here) != 1:
        names = ", ".join(dict.fromkeys(insertion.point.name for insertion in inserted))
        raise InputError(
            f"adapter {run.adapter} acts at {names}: its weights do not say what it does at {run.hook}; give a --sae"
            " for one of its places, or use --selector change, which runs the models over a corpus"
        )
    function = here[0].function
    if isinstance(function, OnLatents) and not torch.equal(function.W_dec, dictionary.W_dec.to(function.W_dec)):
        raise InputError(f"adapter {run.adapter} acts on the latents of another SAE than {run.sae}: give --sae its own")
    reading = _read(function, dictionary, mean)
    return reading if function.has_effect() else without_effect(reading)


def _read(function: object, dictionary: Dictionary, mean: Tensor | None) -> LatentReading:
    W_dec = dictionary.W_dec.float().cpu()
    match function:
        case Network():
            return read_chain(function.maps, W_dec)
        case Steering():
            return _read_steering(function, W_dec)
        case Loreft():
            return _read_loreft(function, dictionary)
        case Shift():
            return _read_shift(function, dictionary)
        case HookAdapter():
            return read_adapter(function, dictionary, mean)
    raise TypeError(f"{type(function).__name__} is not read by its weights")


def _read_steering(adapter: Steering, W_dec: Tensor) -> LatentReading:
    # Each latent is steered by a direction of its own: how strongly, for x of norm 1, in lengths of the stream.
    reach = adapter.magnitude.abs() * W_dec.norm(dim=1)
    directed = adapter.weight * reach[:, None]
    at_centre = adapter.bias - adapter.weight @ adapter.centre
    written = torch.cat([directed, (at_centre * reach)[:, None]], 1).norm(dim=1)
    reads = Energy(W_dec.shape[1])
    reads.add(directed.T)
    n = int((adapter.magnitude != 0).sum())
    note = f"a steering of {n:,} of {len(reach):,} latents by linear maps of the stream; its threshold is not counted"
    return LatentReading(scores_of(pullback.Sides(reads(W_dec.T).sqrt(), written)), note)


def _read_loreft(adapter: Loreft, dictionary: Dictionary) -> LatentReading:
    R, difference = adapter.rotation, adapter.weight - adapter.rotation
    # ΔW = Rᵀ (W − R); P Pᵀ = ΔW ΔWᵀ, and ΔWᵀ ΔW on the other side.
    writes, reads = Energy(R.shape[1]), Energy(R.shape[1])
    writes.add(R.T @ torch.linalg.qr(difference.T).R.T)
    reads.add(difference.T @ torch.linalg.qr(R.T).R.T)
    directions = InMemory(dictionary)
    note = f"a linear map of rank {len(R)} on the stream, beside what it writes on every token"
    units = describe(signed_components(difference, R.T, dictionary.W_dec.float().cpu()), directions)
    return LatentReading(score(Change(writes, reads), directions), note, units)


def _read_shift(adapter: Shift, dictionary: Dictionary) -> LatentReading:
    writes = Energy(len(adapter.v))
    writes.add(adapter.v[:, None])
    scores = score(Change(writes, Energy(len(adapter.v))), InMemory(dictionary))
    note = f"a vector of length {float(adapter.v.norm()):.3g}, the same on every token; sizes are of its share"
    return replace(LatentReading(scores, note), role="static")
