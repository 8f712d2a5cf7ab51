"""Units of an adapter: the same however its factors are written, planted ones found, told in sentences."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from autointerp import show_units
from autointerp.demo import ORGANISM
from autointerp.evidence.adapters import detect
from autointerp.evidence.dictionaries import load_dictionary
from autointerp.evidence.directions import InMemory, open_directions
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.units import describe, lora_components, nearest, network_rows
from autointerp.evidence.weights_evidence import units_of
from autointerp.evidence.weights_only import Streamer
from autointerp.evidence.wiring import Wiring
from autointerp.records import Unit
from tests.evidence.test_weights_only import organism_run, planted_lora

DIRECTIONS = open_directions(str(ORGANISM / "sae"))


def planted(folder: Path, seed: int) -> tuple[list[Unit], dict[str, list[int]]]:
    """Three units of falling size before the hook, each writing one latent up and one down; three behind it that read
    one each. The factors are mixed at random."""
    draw = torch.Generator().manual_seed(seed)
    latents = torch.randperm(DIRECTIONS.m, generator=draw)[:9].tolist()
    D = torch.nn.functional.normalize(DIRECTIONS.decoder_rows(latents), dim=1)
    size = torch.tensor([4.0, 2.0, 1.0])
    R = torch.randn(3, 3, generator=draw) + 2 * torch.eye(3)
    A, B = (torch.linalg.qr(torch.randn(512, 3, generator=draw)).Q for _ in range(2))
    up, down, read = D[:3], D[3:6], D[6:9] - D[6:9].mean(1, keepdim=True)
    factors = {
        "transformer.h.1.mlp.c_proj": ((up - 0.8 * down).T * size @ R, torch.linalg.solve(R, A.T)),
        "transformer.h.3.mlp.c_fc": (B * size @ R, torch.linalg.solve(R, read)),
    }
    units = units_of(organism_run(planted_lora(folder, factors), base="nobody/has-this"), DIRECTIONS)
    return units, {"up": latents[:3], "down": latents[3:6], "read": latents[6:9]}


@pytest.mark.parametrize("seed", range(3))
def test_planted_units_are_found(tmp_path: Path, seed: int) -> None:
    units, truth = planted(tmp_path / "lora", seed)
    written = [[u for u in units if u.name == f"transformer.h.1.mlp.c_proj {k}"] for k in (1, 2, 3)]
    read = [[u for u in units if u.name == f"transformer.h.3.mlp.c_fc {k}"] for k in (1, 2, 3)]
    assert len({u.unit for u in units}) == 6
    for k, rows in enumerate(written):  # the directions of different sizes hardly mix
        weights = {row.latent: row.weight for row in rows}
        assert set(weights) >= {truth["up"][k], truth["down"][k]}
        assert weights[truth["up"][k]] * weights[truth["down"][k]] < 0
    firsts = [rows[0] for rows in (*written, *read)]
    assert all(row.rank == 1 and row.weight > 0 for row in firsts)
    assert sum(rows[0].latent == j for rows, j in zip(read, truth["read"], strict=True)) >= 2


def test_units_do_not_change_when_factors_are_regauged(tmp_path: Path) -> None:
    base = BaseWeights.at(str(ORGANISM / "model"))
    assert base
    changes = detect(ORGANISM / "adapter").weight_changes(ORGANISM / "adapter", base)
    draw = torch.Generator().manual_seed(0)
    factors = {}
    for change in changes:
        assert change.right is not None
        R = torch.randn(8, 8, generator=draw) + 3 * torch.eye(8)
        factors[change.module] = (change.left @ R, torch.linalg.solve(R, change.right))
    one = units_of(organism_run(ORGANISM / "adapter"), DIRECTIONS)
    other = units_of(organism_run(planted_lora(tmp_path / "lora", factors)), DIRECTIONS)
    assert len(one) == len(other)
    assert [(u.name, u.side, u.latent, u.rank) for u in one[:60]] == [
        (u.name, u.side, u.latent, u.rank) for u in other[:60]
    ]
    assert [u.weight for u in one[:60]] == pytest.approx([u.weight for u in other[:60]], rel=1e-2)
    # Components are orthogonal in the stream, and together are all that the matrix writes.
    streamer = Streamer(Wiring.of("blocks.2.hook_resid_post", base.config), base)
    parts = [c for c in lora_components(changes, streamer) if c.name.startswith("transformer.h.2.mlp.c_proj ")]
    P = torch.stack([part.direction for part in parts])
    (W,) = (c.left @ c.right for c in changes if c.module == "transformer.h.2.mlp.c_proj" and c.right is not None)
    torch.testing.assert_close(P @ P.T, torch.diag(torch.linalg.svdvals(W)[: len(P)].square()), rtol=1e-3, atol=1e-4)


def test_nearest_over_blocks_is_nearest_of_all() -> None:
    W = DIRECTIONS.decoder_rows(list(range(DIRECTIONS.m)))
    P = torch.randn(5, W.shape[1], generator=torch.Generator().manual_seed(0))
    blocks = [(slice(at, at + 300), W[at : at + 300].T) for at in range(0, len(W), 300)]
    for cosine, products in ((False, P @ W.T), (True, P @ torch.nn.functional.normalize(W, dim=1).T)):
        for (found, values), row in zip(nearest(P, iter(blocks), 7, cosine), products, strict=True):
            assert found == row.abs().topk(7).indices.tolist()
            assert values == pytest.approx(row[found].tolist(), rel=1e-4)


def test_an_adapter_without_units_has_none(tmp_path: Path) -> None:
    assert describe([], DIRECTIONS) == []
    model = tmp_path / "model"
    shutil.copytree(ORGANISM / "model", model)
    assert units_of(organism_run(model), DIRECTIONS) == []


def test_network_units_keep_their_signs() -> None:
    reads, writes = torch.tensor([[0.0, -3, 1]]), torch.tensor([[2.0, 0, -1]])
    rows = network_rows(reads, writes)
    assert [(u.side, u.latent, u.weight, u.rank) for u in rows] == [
        ("reads", 1, -3, 1), ("reads", 2, 1, 2), ("writes", 0, 2, 1), ("writes", 2, -1, 2),
    ]  # fmt: skip


def row(side: str, latent: int, weight: float) -> dict[str, Any]:
    return {"side": side, "latent": latent, "weight": weight}


def test_sentences_name_latents_by_their_labels() -> None:
    unit = [
        row("reads", 1, 2.0),
        row("reads", 2, 1.5),
        row("reads", 9, 0.1),
        row("writes", 3, 1.0),
        row("writes", 4, -0.6),
    ]
    names = {1: "`def`", 3: "` test`", 4: "` setUp`"}
    assert show_units.sentence(unit, names) == "fires on [`def`] and latent 2; raises [` test`], lowers [` setUp`]"
    assert show_units.sentence(unit[:1], {}) == "fires on latent 1"
    assert show_units.sentence([row("reads", 1, -2.0)], names) == "is held back by [`def`]"


def test_in_memory_as_on_disk() -> None:
    run = organism_run(ORGANISM / "adapter")
    loaded = units_of(run, InMemory(load_dictionary(run.sae)))
    assert [(u.name, u.latent) for u in loaded] == [(u.name, u.latent) for u in units_of(run, DIRECTIONS)]
