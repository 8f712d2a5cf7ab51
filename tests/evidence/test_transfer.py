"""Transfer probes: a model that has the feature elsewhere, and one that has it no more."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autointerp.evidence.transfer import auc, measured, train

N, D, FEATURES = 12_000, 24, 40


@pytest.fixture(scope="module")
def stream() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, z of three latents, their encoder columns): sparse features in superposition, under noise."""
    draw = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(FEATURES, D, generator=draw), dim=1)
    fires = torch.rand(N, FEATURES, generator=draw) < torch.linspace(0.05, 0.1, FEATURES)
    x = (fires * torch.rand(N, FEATURES, generator=draw) * 6) @ directions + 0.3 * torch.randn(N, D, generator=draw) + 1
    encoder = directions[[0, 20, 39]].T
    return x, torch.relu(x @ encoder - 3), encoder


def probed(x: torch.Tensor, z: torch.Tensor) -> tuple[np.ndarray, np.ndarray, torch.Tensor]:
    half = N // 2
    probe = train(x[:half], z[:half], seed=0)
    return *measured(probe, x[half:], z[half:]), probe.w


def test_the_base_itself_is_read_along_its_encoder(stream: tuple[torch.Tensor, ...]) -> None:
    x, z, encoder = stream
    r2, area, w = probed(x, z)
    assert (r2 > 0.97).all()
    assert (area > 0.99).all()
    assert (torch.nn.functional.cosine_similarity(w, encoder, dim=0) > 0.97).all()


def test_a_rotated_model_has_the_feature_elsewhere(stream: tuple[torch.Tensor, ...]) -> None:
    x, z, encoder = stream
    turn, _ = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(1)))
    r2, area, w = probed(x @ turn, z)
    assert (r2 > 0.97).all()
    assert (area > 0.99).all()
    assert (torch.nn.functional.cosine_similarity(w, turn.T @ encoder, dim=0) > 0.97).all()
    assert (torch.nn.functional.cosine_similarity(w, encoder, dim=0).abs() < 0.7).all()


def test_an_ablated_model_has_it_not(stream: tuple[torch.Tensor, ...]) -> None:
    x, z, encoder = stream
    away, _ = torch.linalg.qr(encoder)
    r2, area, _ = probed(x - x @ away @ away.T + 0.3 * torch.randn(N, D, generator=torch.Generator().manual_seed(3)), z)
    assert (r2 < 0.4).all()
    assert (area < 0.9).all()


def test_shuffled_pairs_say_nothing(stream: tuple[torch.Tensor, ...]) -> None:
    x, z, _ = stream
    r2, area, _ = probed(x, z.roll(N // 3, 0))
    assert (r2 < 0.02).all()
    assert (np.abs(area - 0.5) < 0.06).all()


def test_auc_by_counting() -> None:
    draw = torch.Generator().manual_seed(0)
    score, fires = torch.randn(80, 2, generator=draw), torch.rand(80, 2, generator=draw) < 0.3
    for column in range(2):
        s, f = score[:, column], fires[:, column]
        above = (s[f][:, None] > s[~f][None]).double().mean()
        assert float(auc(score, fires)[column]) == pytest.approx(float(above))
