"""Trains each kind of `autointerp.adapters` on the demo's language model, saves it, and says what it learnt.

    python examples/train_adapters.py [--kind KIND ...] [--steps N] [--out FOLDER]

The model is frozen; a small module at the SAE's hook learns unittest code, the text that the demo's LoRA was trained
on, and is measured on the demo's held-out unittest documents before and after. `autointerp label --run FOLDER/KIND
--corpus …` then reads it. Nothing is downloaded: the text is Python's own standard library, read from the Python that
runs this, which takes half a minute; each kind takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from autointerp import adapters
from autointerp.demo import ORGANISM, language_model
from autointerp.demo.dictionary import HOOK, residual_stream
from autointerp.demo.text import library_documents
from autointerp.demo.train import read_corpus, training_text
from autointerp.evidence.dictionaries import Dictionary

DOMAIN = "tests"
BATCH = 16  # windows of 128 tokens
STEPS = 200
N_DOCUMENTS = 600  # somewhat more windows than the steps ask for
LEARNING_RATES = {
    "bias": 1e-2,
    "scaling": 1e-2,
    "ffnn": 3e-3,
    "low_rank": 3e-3,
    "sparse_linear": 3e-3,
    "residual": 3e-3,
}
L1_PENALTY = 0.5  # of the sparse linear adapter; high, since the steps of Adam are as long for small gradients
INPUTS, OUTPUTS = 256, 512  # latents between which the sparse linear adapter has weights


def new_adapter(kind: str, dictionary: Dictionary, frequent: list[int]) -> adapters.HookAdapter:
    """An untrained adapter, which changes nothing yet. `frequent`: latents that fire on the text, most often first."""
    torch.manual_seed(0)
    made: dict[str, Callable[[], adapters.HookAdapter]] = {
        "bias": lambda: adapters.Bias(dictionary),
        "scaling": lambda: adapters.Scaling(dictionary),
        "ffnn": lambda: adapters.Ffnn(dictionary, hidden=32),
        "low_rank": lambda: adapters.LowRank(dictionary, hidden=8),
        "sparse_linear": lambda: adapters.SparseLinear(dictionary, frequent[:INPUTS], frequent[:OUTPUTS]),
        "residual": lambda: adapters.Residual(dictionary.d_in, hidden=32),
    }
    return made[kind]()


def train(model: GPT2LMHeadModel, adapter: adapters.HookAdapter, batches: Iterator[Tensor], steps: int) -> None:
    """An ordinary loop over batches of token ids [b, t]; only the adapter learns. The rate falls to zero."""
    model.requires_grad_(False)
    rate = LEARNING_RATES[adapter.kind]
    optimizer = torch.optim.Adam(adapter.parameters(), lr=rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    with adapters.attached(model, adapter, HOOK):
        for _ in range(steps):
            ids = next(batches)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if isinstance(adapter, adapters.SparseLinear):  # the proximal step of the L1 penalty
                adapter.shrink(optimizer.param_groups[0]["lr"] * L1_PENALTY)
            schedule.step()


@torch.no_grad()
def held_out_loss(model: GPT2LMHeadModel, adapter: adapters.HookAdapter, windows: language_model.Windows) -> float:
    """Nats per token of the model with the adapter in it."""
    with adapters.attached(model, adapter, HOOK):
        return language_model.losses(model, windows)[DOMAIN]


@torch.no_grad()
def by_frequency(model: GPT2LMHeadModel, dictionary: Dictionary, ids: Tensor) -> list[int]:
    """All latents, those that fire on most tokens of windows `ids` [n, t] first."""
    fired = (dictionary.encode(residual_stream(model, ids)) > 0).sum(0)
    return fired.argsort(descending=True, stable=True).tolist()


def training_windows(n_documents: int = N_DOCUMENTS) -> language_model.Windows:
    """Unittest documents of the running Python's library, in windows of tokens; none of a held-out file."""
    documents = [d for d in training_text(library_documents()) if d.domain == DOMAIN]
    random.Random(0).shuffle(documents)
    return language_model.windows_of(documents[:n_documents], ORGANISM / "model")


def held_out_windows() -> language_model.Windows:
    """The unittest documents of the demo's corpus, no file of which is trained on."""
    documents = [d for d in read_corpus(ORGANISM) if d.domain == DOMAIN]
    return language_model.windows_of(documents, ORGANISM / "model")


def run(
    kind: str, out: Path, training: language_model.Windows, held_out: language_model.Windows, steps: int = STEPS
) -> tuple[float, float]:
    """Trains one kind and saves it in `out`; the held-out loss before and after."""
    model, dictionary = language_model.load_base(ORGANISM / "model"), adapters.load_dictionary(ORGANISM / "sae")
    adapter = new_adapter(kind, dictionary, by_frequency(model, dictionary, training[DOMAIN][:128]))
    before = held_out_loss(model, adapter, held_out)
    train(model, adapter, language_model.mixed_batches(training, {DOMAIN: 1.0}, BATCH, seed=0), steps)
    base, sae = (os.path.relpath(ORGANISM / part, out) for part in ("model", "sae"))
    adapters.save(adapter, out, hook=HOOK, base=base, sae=sae)
    return before, held_out_loss(model, adapter, held_out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kind", choices=list(LEARNING_RATES), nargs="+", default=list(LEARNING_RATES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=Path("results/train_adapters"))
    args = parser.parse_args()
    training, held_out = training_windows(), held_out_windows()
    for kind in args.kind:
        begin = time.perf_counter()
        before, after = run(kind, args.out / kind, training, held_out, args.steps)
        seconds = time.perf_counter() - begin
        print(
            f"{kind}: held-out loss {before:.3f} → {after:.3f}, {seconds:.0f} s, saved in {args.out / kind}", flush=True
        )


if __name__ == "__main__":
    main()
