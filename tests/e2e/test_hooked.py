"""Adapters that act at a hook, through the command line: what is found, where it is found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from .world import HOOK, M, Shell, World, read, refused

DIRECTIONS = {5: 3.0, 40: -2.0}
"""Latent → how much of its direction is added to every token."""


def steering(folder: Path, vector: torch.Tensor) -> Path:
    folder.mkdir()
    torch.save(vector, folder / "vector.pt")
    return folder


def directions(world: World) -> torch.Tensor:
    return load_file(world.sae / "sae_weights.safetensors")["W_dec"]


def test_a_steering_vector_is_found_in_the_static_part_and_only_there(
    world: World, tmp_path: Path, shell: Shell
) -> None:
    rows = directions(world)
    vector = sum(size * rows[latent] for latent, size in DIRECTIONS.items())
    assert isinstance(vector, torch.Tensor)
    db, folder = tmp_path / "s.duckdb", steering(tmp_path / "vector", vector)
    assert shell(*world.args(run=folder, base=world.base, hook=HOOK, db=db, top=10)).status == 0
    (run,) = read(db, "SELECT adapter_format, static_share, n_pass, change_r2, status FROM runs")
    assert run["adapter_format"] == "steering"
    assert run["static_share"] == pytest.approx(1, abs=1e-6)
    assert (run["n_pass"], run["change_r2"], run["status"]) == (0, None, "done")
    found = read(db, "SELECT latent, role, static_share, label FROM changed_latents JOIN latents USING (latent, role)")
    assert {row["role"] for row in found} == {"static"}
    assert {row["latent"] for row in found} == set(DIRECTIONS)
    assert sum(row["static_share"] for row in found) == pytest.approx(1, abs=1e-4)
    assert all(row["label"] for row in found)
    shares = read(db, "SELECT latent FROM latents WHERE static_share <> 0")
    assert {row["latent"] for row in shares} == set(DIRECTIONS)


def test_a_vector_of_zeros_selects_nothing_and_says_so(world: World, tmp_path: Path, shell: Shell) -> None:
    db, folder = tmp_path / "s.duckdb", steering(tmp_path / "vector", torch.zeros(32))
    says = shell(*world.args(run=folder, base=world.base, hook=HOOK, db=db))
    assert says.status == 0
    assert read(db, "SELECT * FROM changed_latents") == []
    assert "changes nothing" in says.out + says.err


def test_a_vector_of_nan_is_refused_and_nothing_written(world: World, tmp_path: Path, shell: Shell) -> None:
    db, folder = tmp_path / "s.duckdb", steering(tmp_path / "vector", torch.full((32,), torch.nan))
    refused(shell(*world.args(run=folder, base=world.base, hook=HOOK, db=db)), "vector holds NaN")
    refused(shell(*world.args(run=folder, db=db)), "vector holds NaN")
    assert not db.exists()


def test_what_a_loreft_does_not_say_is_said(world: World, tmp_path: Path, shell: Shell) -> None:
    """Positions and activation function are in no file of pyreft's: the run notes what it took for granted."""
    row, db, folder = directions(world)[5:6], tmp_path / "s.duckdb", tmp_path / "reft"
    folder.mkdir()
    state = {"weight": 3 * row, "bias": torch.zeros(1), "rotate_layer": row.T / row.norm()}
    torch.save(state, folder / "intkey_layer_2_comp_block_output_unit_pos_nunit_1#0.bin")
    select = world.args("select", run=folder, base=world.base, hook=HOOK, db=db, top=5)
    assert shell(*select).status == 0
    (run,) = read(db, "SELECT adapter_format, assumed FROM runs")
    assert run["adapter_format"] == "pyreft"
    assert "every position" in run["assumed"]
    assert "every position" in " ".join(shell("show", "--db", str(db)).out.split())


def test_a_vector_names_no_base(world: World, tmp_path: Path, shell: Shell) -> None:
    folder = steering(tmp_path / "vector", directions(world)[M - 1])
    refused(shell(*world.args(run=folder, db=tmp_path / "s.duckdb")), "no base model: .* give --base")
