"""examples/train_adapters.py at its smallest: each kind of adapter learns, is saved, and is read back by the tool."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autointerp import adapters
from autointerp.demo import ORGANISM, language_model
from autointerp.demo.dictionary import HOOK
from autointerp.evidence.adapters import detect
from examples import train_adapters

N_HELD_OUT = 8


@pytest.fixture(scope="module")
def windows() -> tuple[language_model.Windows, language_model.Windows]:
    """Training and held-out windows, both of the shipped corpus: the library's own text takes half a minute to read."""
    domain, every = train_adapters.DOMAIN, train_adapters.held_out_windows()[train_adapters.DOMAIN]
    return {domain: every[N_HELD_OUT:]}, {domain: every[:N_HELD_OUT]}


@pytest.mark.parametrize("kind", train_adapters.LEARNING_RATES)
def test_each_kind_lowers_the_held_out_loss(kind, windows, tmp_path: Path):
    training, held_out = windows
    before, after = train_adapters.run(kind, tmp_path / kind, training, held_out, steps=6)
    assert after < before - 0.002
    found = detect(tmp_path / kind)
    assert (found.name, found.base_of(tmp_path / kind)) == ("sae_adapter", str((ORGANISM / "model").resolve()))
    adapter = adapters.load(tmp_path / kind, adapters.load_dictionary(ORGANISM / "sae"))
    assert adapter.kind == kind
    model = language_model.load_base(ORGANISM / "model")
    with torch.no_grad(), adapters.attached(model, adapter, HOOK):
        again = language_model.losses(model, held_out)[train_adapters.DOMAIN]
    assert again == pytest.approx(after, abs=1e-4)
    if isinstance(adapter, adapters.SparseLinear):
        assert 0 < int((adapter.weight == 0).sum()) < adapter.weight.numel()
