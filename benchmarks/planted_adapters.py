"""Adapters on disk of which it is known what they do, for `benchmarks.selection`, each written in a way that hides it.

A network's units are scaled at random (ReLU lets scales through), a LoRA's factors have a random R R⁻¹ between them,
and a bias is buried under one that adds up to nothing in the stream.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autointerp import adapters
from autointerp.adapters import HookAdapter
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.wiring import Wiring
from autointerp.run import Run
from tests.planted.recording import Recording, record
from tests.planted.truths import N_PLANTED, planted

N_WRITTEN = 4
"""Latents that the LoRA writes: one for each of its components."""
N_STATIC = 5
"""Latents whose directions the bias adds."""
NULL_SPACE = 5.0
"""Length of what is added to the bias without effect, beside the bias's own."""
STATIC_ENERGY = 1.5
"""Of the bias's ‖δ‖², beside the mean ‖Δx‖² of the run's own change."""


@dataclass(frozen=True)
class Truth:
    """What an adapter does, in latents; and what its raw weights would have one think."""

    written: list[int]
    """What it writes to; of a bias, the directions that it adds."""
    raw: np.ndarray
    """Sizes [m] of what stands in the files for each latent, without regard to how it is written."""
    read: list[int] = field(default_factory=list)
    """What it reads, the k-th to write the k-th of `written`; empty where it reads no latent in particular."""

    @property
    def latents(self) -> set[int]:
        return {*self.read, *self.written}


def save_network(recording: Recording, seed: int, folder: Path) -> Truth:
    """`Ffnn`: unit k fires when latent i does, beyond half of its mean activation, and writes latent j as strongly."""
    dictionary = recording.dictionary
    both = planted(recording, seed, 2 * N_PLANTED).tolist()
    read, written = both[:N_PLANTED], both[N_PLANTED:]
    draw, units = torch.Generator().manual_seed(seed), torch.arange(N_PLANTED)
    z = recording.z.tocsc()
    W_in = 0.005 * torch.randn(N_PLANTED, dictionary.d_sae, generator=draw)
    W_out = 0.0015 * torch.randn(dictionary.d_sae, N_PLANTED, generator=draw)
    W_in[units, read], W_out[written, units] = 1.0, 1.0
    b_in = -torch.tensor([float(z[:, j].data.mean()) / 2 for j in read])
    scale = (2 * torch.randn(N_PLANTED, generator=draw)).exp()
    weights = {"W_in": W_in * scale[:, None], "b_in": b_in * scale, "W_out": W_out / scale}
    _save(adapters.Ffnn(dictionary, N_PLANTED), weights, recording, folder)
    sides = weights["W_in"].norm(dim=0), weights["W_out"].norm(dim=1)
    return Truth(written, np.maximum(*(side.numpy() / float(side.square().mean().sqrt()) for side in sides)), read)


def save_bias(recording: Recording, seed: int, folder: Path) -> Truth:
    """`Bias` on five latents, and on all of them what W_dec takes to nothing."""
    chosen, W_dec = planted(recording, seed, N_STATIC).tolist(), torch.from_numpy(recording.W_dec).double()
    bias = torch.zeros(len(W_dec), dtype=torch.float64)
    bias[chosen] = 1 / W_dec[chosen].norm(dim=1)
    energy = STATIC_ENERGY * np.square(recording.change).sum(1).mean()
    bias *= (energy / float((bias @ W_dec).square().sum())) ** 0.5
    rest = torch.randn(len(W_dec), generator=torch.Generator().manual_seed(seed)).double()
    rest -= torch.linalg.lstsq(W_dec.T, (rest @ W_dec)[:, None], driver="gelsd").solution[:, 0]
    bias += rest * NULL_SPACE * bias.norm() / rest.norm()
    _save(adapters.Bias(recording.dictionary), {"bias": bias.float()}, recording, folder)
    return Truth(chosen, (bias.abs() * W_dec.norm(dim=1)).numpy())


def save_lora(recording: Recording, seed: int, folder: Path) -> Truth:
    """A LoRA on the last matrix that writes before the hook: B the directions of four latents, A at random."""
    from peft import LoraConfig, get_peft_model

    run, model = recording.evidence.run, recording.evidence.model.pair.bare()
    module = _last_writer(run)
    written = planted(recording, seed, N_WRITTEN).tolist()
    draw = torch.Generator().manual_seed(seed)
    B = torch.nn.functional.normalize(torch.from_numpy(recording.W_dec[written]), dim=1).T
    base = BaseWeights.at(run.base)
    W = None if base is None else base.matrix(module)
    if W is None:
        raise ValueError(f"{run.base} has no {module}")
    A = torch.linalg.qr(torch.randn(W.shape[1], N_WRITTEN, generator=draw))[0].T
    R = torch.randn(N_WRITTEN, N_WRITTEN, generator=draw)
    config = LoraConfig(target_modules=[module], r=N_WRITTEN, lora_alpha=N_WRITTEN, task_type="CAUSAL_LM")
    peft = get_peft_model(model, config)
    with torch.no_grad():
        for name, weight in peft.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                weight.copy_(torch.linalg.solve(R, A) if "lora_A" in name else B @ R)
    peft.save_pretrained(str(folder))
    e = recording.dictionary.W_enc
    raw = torch.zeros(len(recording.W_dec)) if e is None else (e.float().cpu().T @ (B @ R)).norm(dim=1)
    return Truth(written, raw.numpy())


RANDOM_READS = "LoRA, B of four d_i, re-gauged"
STATIC = "bias on five latents, null-space noise"
ADAPTERS: dict[str, Callable[[Recording, int, Path], Truth]] = {
    "FFNN i → j, units rescaled": save_network,
    RANDOM_READS: save_lora,
    STATIC: save_bias,
}


def run_of(recording: Recording, folder: Path) -> Run:
    """The recording's own run, with the adapter in `folder` instead."""
    run = recording.evidence.run
    view = {key: getattr(run, key) for key in ("base", "sae", "hook", "corpus", "text_column", "context_length")}
    return Run.load(folder, **view, seed=run.settings.seed, device="cpu", selector=("weights",))


def carried_out(recording: Recording, folder: Path) -> np.ndarray:
    """Δx [n, d] of the adapter in `folder` on the recording's tokens, by a pass of the models."""
    made = record(run_of(recording, folder), recording.evidence.run.max_tokens)
    made.measured.spool.close()
    made.evidence.close()
    if not np.allclose(made.x_base, recording.x_base, atol=1e-4):
        raise ValueError("the second pass read other tokens than the first")
    return made.change


def _save(adapter: HookAdapter, weights: dict[str, Tensor], recording: Recording, folder: Path) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            getattr(adapter, name).copy_(weight)
    run = recording.evidence.run
    adapters.save(adapter, folder, hook=str(run.hook), base=str(run.base), sae=run.sae)


def _last_writer(run: Run) -> str:
    """The module whose output is the last that is added to the stream before the hook, so that nothing follows it."""
    base = BaseWeights.at(run.base)
    if base is None:
        raise ValueError(f"{run.base} is not on this machine")
    wiring = Wiring.of(str(run.hook), base.config)
    names = [name.removesuffix(".weight") for name in base.tensors.names() if name.endswith(".weight")]
    return [module for module in names if wiring.side(module) == "writes"][-1]
