"""The backward pass against finite differences and a plain computation; what the attribution selector makes of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.gradients import GradientSums, PricedBatch, logits_with, loss_gradient
from autointerp.evidence.model_pair import ModelPair
from autointerp.evidence.paired import PairedModel
from autointerp.evidence.selection import SELECTORS, Given, Question, needs_of
from tests import tiny
from tests.evidence import synthetic


def paired(family: str, hook: str) -> PairedModel:
    peft = tiny.add_lora(tiny.model(family), [1, 3])
    return PairedModel(ModelPair.from_peft(peft.double()), hook, tiny.tokenizer())


def kl(model: PairedModel, ids: Tensor, counted: Tensor, x: Tensor) -> float:
    with torch.no_grad():
        p = model.logits(ids)[1].log_softmax(-1)[counted]
        q = logits_with(model, ids, x).log_softmax(-1)[counted]
    return float((p.exp() * (p - q)).sum())


@pytest.mark.parametrize(
    ("family", "hook"),
    [("gpt2", "blocks.2.hook_resid_post"), ("gpt_neox", "blocks.2.hook_resid_pre"), ("llama", "blocks.1.hook_mlp_out")],
)
def test_the_gradient_is_that_of_the_divergence(family: str, hook: str) -> None:
    model, ids = paired(family, hook), tiny.token_ids()
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[:, 0] = counted[1, 10:] = False
    gradient, x_base, x_adapted, at_base = loss_gradient(model, ids, counted)
    assert at_base == pytest.approx(kl(model, ids, counted, x_base), rel=1e-4)
    assert torch.equal(x_base, model.activations(ids)[0])
    middle, step = (x_base + x_adapted) / 2, 1e-4
    for seed in range(3):
        way = torch.randn(x_base.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        slope = (kl(model, ids, counted, middle + step * way) - kl(model, ids, counted, middle - step * way)) / 2 / step
        assert float((gradient * way).sum()) == pytest.approx(slope, rel=1e-2, abs=1e-3)
    assert not gradient[1, 10:].any(), "later tokens move no earlier prediction"
    assert all(p.grad is None for p in model.pair.model.parameters())


def test_of_a_transcoder_it_is_taken_where_it_writes() -> None:
    peft = tiny.add_lora(tiny.model("gpt2"), [1, 3])
    pair, hook = ModelPair.from_peft(peft.double()), "blocks.2.hook_mlp_out"
    ids = tiny.token_ids()
    counted = torch.ones_like(ids, dtype=torch.bool)
    one, two = (PairedModel(pair, hook, tiny.tokenizer(), reads) for reads in (None, "blocks.2.mlp.hook_in"))
    (g, v, *_), (same_g, x, *_) = (loss_gradient(model, ids, counted) for model in (one, two))
    torch.testing.assert_close(same_g, g)
    assert torch.equal(x[..., : tiny.WIDTH], v)
    assert x.shape[-1] == 2 * tiny.WIDTH


def test_small_changes_are_priced_at_what_they_do() -> None:
    """Σ⟨g, Δx⟩ is the difference of L, far closer halfway than at either end."""
    peft = tiny.add_lora(tiny.model("gpt2"), [1])
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            parameter.data *= 0.3
    model = PairedModel(ModelPair.from_peft(peft.double()), "blocks.2.hook_resid_post", tiny.tokenizer())
    ids = tiny.token_ids()
    counted = torch.ones_like(ids, dtype=torch.bool)
    gradient, x_base, x_adapted, at_base = loss_gradient(model, ids, counted)
    moved = kl(model, ids, counted, x_adapted) - at_base
    assert moved == pytest.approx(-at_base, abs=1e-3 * at_base), "with all of Δx, base predicts as adapted"
    assert float((gradient * (x_adapted - x_base)).sum()) == pytest.approx(moved, rel=0.15)


STREAM = synthetic.stream(gain=0.8, n_docs=32)
RNG = np.random.default_rng(0)
GRADIENT = RNG.normal(size=STREAM.x.shape).astype(np.float32)


def batch(at: slice) -> PricedBatch:
    s = STREAM
    return PricedBatch(GRADIENT[at], s.change[at], csr_matrix(s.z[at]), csr_matrix(s.z_adapted[at]), 1.0)


def sums(tracked: np.ndarray, *parts: slice) -> GradientSums:
    m, d = STREAM.W_dec.shape
    found = GradientSums.zero(len(tracked), m, d)
    for part in parts:
        found.add(batch(part), tracked, STREAM.W_dec)
    return found


@pytest.mark.parametrize("tracked", [np.arange(48), np.arange(3, 40)])
def test_sums_and_shares(tracked: np.ndarray) -> None:
    n, middle = len(STREAM.order), 500
    whole = sums(tracked, slice(0, n))
    for other in (sums(tracked, slice(0, middle), slice(middle, n)), sums(tracked, slice(middle)) + sums(tracked, slice(middle, n))):  # fmt: skip  # noqa: E501
        for name in ("change", "base", "differences", "n", "total"):
            assert np.allclose(getattr(other, name), getattr(whole, name), rtol=1e-4, atol=1e-2), name
    fitted = STREAM.fitted(STREAM.statistics(tracked=tracked))
    ranking = SELECTORS.get("attribution")(Question(fitted, 5, 0.05, 0, Given(gradients=whole)))
    rows = fitted.rows.numpy()
    z = STREAM.z[:, tracked] - STREAM.z[:, tracked].mean(0)
    wanted = -(z * (GRADIENT @ rows.T)).mean(0)
    np.testing.assert_allclose(ranking.columns["attribution"][tracked], wanted, atol=1e-5)
    naive = -((STREAM.z_adapted - STREAM.z) * (GRADIENT @ STREAM.W_dec.T)).mean(0)
    np.testing.assert_allclose(ranking.columns["statistic"], naive, atol=1e-5)
    assert ranking.latents == tracked[np.argsort(-np.abs(wanted))[:5]].tolist()
    total, static = -(GRADIENT * STREAM.change).sum() / n, -(GRADIENT @ STREAM.change.mean(0)).mean()
    figures = ranking.figures
    assert figures["kl_removed"] == pytest.approx(total, rel=1e-3)
    assert figures["by_static_part"] == pytest.approx(static / total, rel=1e-2, abs=1e-3)
    assert figures["outside_map"] == pytest.approx((total - wanted.sum() - static) / total, abs=1e-3)
    assert figures["by_encodings"] == pytest.approx(naive.sum() / total, rel=1e-3)


def test_the_default_selector_needs_no_gradients() -> None:
    assert needs_of(["change", "mean-shift", "random"]) == []
    assert needs_of(["attribution", "frequency"])[0] == "gradients"
    with pytest.raises(InputError, match="unknown selector 'x'"):
        needs_of(["x"])
