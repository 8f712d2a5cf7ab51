"""`autointerp lineage` over three runs whose dictionaries share planted, permuted rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp import cli
from autointerp.evidence import directions

from .test_transcoder import save_transcoder
from .world import M, Shell, World, read, refused, save_sae

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post", "blocks.3.hook_resid_post")
SHARED = M // 2
"""The first rows of the first dictionary are, permuted and stretched, in the others; the rest are each one's own."""


def permutation(layer: int) -> torch.Tensor:
    """Place of each shared row in a layer's dictionary."""
    return torch.randperm(M, generator=torch.Generator().manual_seed(layer))[:SHARED] if layer else torch.arange(SHARED)


def save_layer(path: Path, layer: int) -> Path:
    save_sae(path, hook=HOOKS[layer])
    weights = load_file(path / "sae_weights.safetensors")
    draw = torch.Generator().manual_seed(100 + layer)
    rows = torch.nn.functional.normalize(torch.randn(M, weights["W_dec"].shape[1], generator=draw), dim=1)
    own = torch.nn.functional.normalize(
        torch.randn(M, weights["W_dec"].shape[1], generator=torch.Generator().manual_seed(7)), dim=1
    )
    rows[permutation(layer)] = own[:SHARED]
    save_file({**weights, "W_dec": rows, "W_enc": rows.T.contiguous()}, path / "sae_weights.safetensors")
    return path


@pytest.fixture(scope="module")
def db(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run a layer; the first one labelled."""
    folder = tmp_path_factory.mktemp("lineage")
    for layer in range(3):
        sae = save_layer(folder / f"sae-{layer}", layer)
        command = "select" if layer else "label"
        assert cli.run(world.args(command, sae=sae, db=folder / "store.duckdb", top=8, quiet=True)) == 0
    return folder / "store.duckdb"


def ids(db: Path) -> list[str]:
    return [row["run_id"] for row in read(db, "SELECT run_id FROM runs ORDER BY hook")]


@pytest.fixture(scope="module")
def found(db: Path) -> dict[str, Any]:
    from autointerp.lineage import lineage
    from autointerp.store import Store

    with Store.open(db, "read") as store:
        return json.loads(json.dumps(lineage(store, ids(db)).summary()))


def test_planted_rows_are_followed_through_all_layers(db: Path, found: dict[str, Any]):
    chains = {(m["layer"], m["latent"]): chain for chain in found["chains"] for m in chain["members"]}
    selected = [
        (layer, row["latent"])
        for layer, run_id in enumerate(ids(db))
        for row in read(db, f"SELECT latent FROM latents WHERE selected AND run_id = '{run_id}'")
    ]
    places = [permutation(layer).tolist() for layer in range(3)]
    shared = [(layer, latent) for layer, latent in selected if latent in places[layer]]
    assert len(shared) >= 3
    for layer, latent in shared:
        row = places[layer].index(latent)
        chain = chains[layer, latent]
        assert [(m["layer"], m["latent"]) for m in chain["members"]] == [(at, places[at][row]) for at in range(3)]
        assert all(step["mutual"] and step["cosine"] == pytest.approx(1, abs=1e-5) for step in chain["steps"])
    lone = {(m["layer"], m["latent"]) for m in found["alone"]}
    own = [place for place in selected if place not in shared]
    assert len(own) >= 3
    assert len(lone & set(own)) >= 0.9 * len(own)
    assert not lone & set(shared)


def test_a_label_is_carried_to_where_there_is_none(db: Path, found: dict[str, Any]):
    labels = {
        row["latent"]: row["label"] for row in read(db, "SELECT latent, label FROM labels WHERE status <> 'failed'")
    }
    carried = 0
    for chain in found["chains"]:
        first = chain["members"][0]
        if (first["layer"], first["label"]) == (0, labels.get(first["latent"], "")):
            assert [m["carried"] for m in chain["members"]] == [None, first["label"], first["label"]]
            assert first["rank"] is not None
            carried += 1
    assert carried >= 1


def test_what_it_prints(db: Path, found: dict[str, Any], shell: Shell, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    says = shell("lineage", *(run_id[:9] for run_id in ids(db)), "--db", db)
    assert says.status == 0
    assert max(map(len, says.out.splitlines())) <= 80
    assert f"chance 1 → 2: cosine {found['chance'][0]['forward']['limit']:.2f}" in says.out
    assert says.out.count("↔ 1.00") == 2 * sum(len(chain["members"]) == 3 for chain in found["chains"])
    assert json.loads(shell("lineage", *ids(db), "--db", db, "--json").out) == found


def test_decoders_are_read_in_blocks(db: Path, found: dict[str, Any], shell: Shell, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(directions, "BLOCK", 5)
    again = json.loads(shell("lineage", *ids(db), "--db", db, "--json").out)
    assert [chain["members"] for chain in again["chains"]] == [chain["members"] for chain in found["chains"]]


def test_what_has_no_lineage(db: Path, world: World, tmp_path: Path, shell: Shell):
    copied = tmp_path / "x.duckdb"
    shutil.copy(db, copied)
    one, two, _ = ids(db)
    refused(shell("lineage", one, "--db", copied), "takes two runs or more")
    refused(shell("lineage", one, "none", "--db", copied), "there is no run 'none'")
    refused(shell("lineage", one, one, "--db", copied), "are on one dictionary.*autointerp compare")
    sae = save_sae(tmp_path / "sae", m=M // 2)
    from autointerp.store import Store

    with Store.open(copied) as store:
        store.execute("UPDATE runs SET sae = ? WHERE run_id = ?", [str(sae), two])
    refused(shell("lineage", one, two, "--db", copied), f"is not the one of run {two}: 32 latents")
    with Store.open(copied) as store:
        store.execute("UPDATE runs SET sae = ? WHERE run_id = ?", [str(tmp_path / "gone"), two])
    refused(shell("lineage", one, two, "--db", copied), "gone")
    with Store.open(copied) as store:
        store.execute("UPDATE latents SET selected = false WHERE run_id = ?", [two])
        store.execute("UPDATE runs SET sae = ? WHERE run_id = ?", [str(sae), two])
        store.execute("UPDATE runs SET d_sae = ? WHERE run_id = ?", [M // 2, two])
    refused(shell("lineage", one, two, "--db", copied), f"run {two} selected no latent")


def test_transcoders_are_followed_by_what_they_write(world: World, tmp_path: Path, shell: Shell) -> None:
    """Of two layers, the second with the first one's decoder rows in another order, and an encoder of its own."""
    store, order = tmp_path / "store.duckdb", torch.randperm(M, generator=torch.Generator().manual_seed(5))
    for layer in (1, 2):
        sae = save_transcoder(tmp_path / f"t{layer}", layer)
        weights = load_file(sae / "sae_weights.safetensors")
        if layer == 2:
            weights["W_dec"] = weights["W_dec"][order].contiguous()
            weights["W_enc"] = weights["W_enc"].flip(0).contiguous()
            save_file(weights, sae / "sae_weights.safetensors")
        options = {"sae": sae, "db": store, "selector": "mean-shift", "quiet": True}
        assert shell(*world.args("select", **options)).status == 0
    says = shell("lineage", *ids(store), "--db", store, "--json")
    assert says.status == 0
    chains = json.loads(says.out)["chains"]
    assert chains
    for chain in chains:
        one, other = (member["latent"] for member in chain["members"])
        assert order[other] == one
        assert chain["steps"][0]["cosine"] == pytest.approx(1, abs=1e-5)
