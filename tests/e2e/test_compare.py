"""`autointerp compare` on the demo's organism: its adapter, the same negated, and one that has nothing to do with it.

How rows are judged is planted by hand in test_rows_by_hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autointerp import cli
from autointerp.compare import compare
from autointerp.demo import ORGANISM
from autointerp.store import Store

from .world import Shell, World, read, refused

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with a run of each."""
    folder = tmp_path_factory.mktemp("compare")
    draw = torch.Generator().manual_seed(0)
    weights = load_file(ORGANISM / "adapter" / WEIGHTS)
    others = {
        "itself": dict(weights),
        "negated": {key: -w if "lora_B" in key else w for key, w in weights.items()},
        # Other columns of the same sizes: as strong a change in other directions, in answer to other things.
        "other": {
            key: torch.nn.functional.normalize(torch.randn(w.shape, generator=draw), dim=0) * w.float().norm(dim=0)
            for key, w in weights.items()
        },
    }
    for name, changed in others.items():
        shutil.copytree(ORGANISM / "adapter", folder / name)
        save_file({key: w.contiguous() for key, w in changed.items()}, folder / name / WEIGHTS)
        given = {"run": folder / name, "base": ORGANISM / "model", "sae": ORGANISM / "sae", "top": 40,
                 "corpus": ORGANISM / "corpus.jsonl", "max-tokens": 20000, "device": "cpu",
                 "db": folder / "store.duckdb"}  # fmt: skip
        assert (
            cli.run(["select", "--quiet", *(str(w) for key, value in given.items() for w in (f"--{key}", value))]) == 0
        )
    return folder / "store.duckdb"


def runs(db: Path) -> dict[str, str]:
    return {Path(row["path"]).name: row["run_id"] for row in read(db, "SELECT path, run_id FROM runs")}


def compared(db: Path, shell: Shell, first: str, second: str) -> dict[str, Any]:
    says = shell("compare", runs(db)[first], runs(db)[second][:9], "--db", db, "--json")
    assert (says.status, says.err) == (0, "")
    return json.loads(says.out)


def test_a_negated_adapter_flips_signs_and_cancels(db: Path, shell: Shell) -> None:
    """Not to nothing: a fourth of ‖x‖ is beyond what a model answers in proportion."""
    found = compared(db, shell, "itself", "negated")
    latents = found["latents"]
    assert len(latents) >= 40
    cosines = [row["cosine"] for row in latents if row["cosine"] is not None]
    assert np.median(cosines) < -0.5
    assert np.mean(np.array(cosines) < 0) >= 0.95
    assert found["counts"]["adds"] <= 0.2 * len(latents)
    assert found["counts"]["cancels"] >= 0.4 * len(latents)
    assert found["combined"] < 0.5
    gains = np.array([[row["gain_first"], row["gain_second"]] for row in latents])
    assert np.corrcoef(gains.T)[0, 1] < -0.5


def test_an_adapter_adds_to_itself(db: Path, shell: Shell) -> None:
    found = compared(db, shell, "itself", "itself")
    assert found["counts"]["adds"] == len(found["latents"]) > 0
    assert found["combined"] == pytest.approx(2)
    assert all(row["left_first"] == pytest.approx(2) for row in found["latents"])


def test_unrelated_adapters_add(db: Path, shell: Shell) -> None:
    """Both have their say, where they act on the same latent too."""
    found = compared(db, shell, "itself", "other")
    assert found["combined"] == pytest.approx(1, abs=0.1)
    counts = found["counts"]
    assert counts["adds"] >= 0.9 * (len(found["latents"]) - counts["only first"] - counts["only second"])
    assert counts["cancels"] == 0
    assert max(abs(row["cosine"] or 0) for row in found["latents"]) < 0.4


def test_rows_by_hand(tmp_path: Path) -> None:
    a = {1: [1.0, 0, 0], 2: [1.0, 0, 0], 3: [1.0, 0, 0], 4: [1.0, 0, 0], 5: [1.0, 0, 0]}
    b = {1: [0.9, 0.1, 0], 2: [-1.0, 0, 0.2], 3: [-0.3, 0, 0], 4: [0.01, 0, 0], 6: [0, 2.0, 0]}
    with Store.open(tmp_path / "x.duckdb") as store:
        for run_id, rows in (("a", a), ("b", b)):
            store.upsert("runs", [{"run_id": run_id, "sae": "s", "hook": "h", "d_sae": 9, "d_model": 3}])
            for latent, row in rows.items():
                size = float(np.linalg.norm(row))
                store.upsert(
                    "map_rows", [{"run_id": run_id, "latent": latent, "size": size, "gain": row[0], "row": row}]
                )
                store.upsert("latents", [{"run_id": run_id, "latent": latent, "selected": True, "rank": latent}])
        store.upsert("labels", [{"run_id": "b", "latent": 3, "labeler": "x", "label": "three", "status": "ok"}])
        store.flush()
        found = compare(store, "a", "b")
    assert {pair.latent: pair.relation for pair in found.pairs} == {
        1: "adds", 2: "cancels", 3: "interferes", 4: "only first", 5: "only first", 6: "only second",
    }  # fmt: skip
    assert found.pairs[0].latent == 6, "the largest first"
    (three,) = [pair for pair in found.pairs if pair.latent == 3]
    assert (three.label, three.left_first, three.left_second) == ("three", pytest.approx(0.7), pytest.approx(-7 / 3))
    sums = [np.add(a[j], b[j]) for j in (1, 2, 3, 4)]
    alone = sum(np.square(row).sum() for rows in (a, b) for j, row in rows.items() if j < 5)
    assert found.combined == pytest.approx(np.square(sums).sum() / alone)


def test_what_it_prints(db: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    says = shell("compare", runs(db)["itself"], runs(db)["negated"], "--db", db)
    assert says.status == 0
    first = compared(db, shell, "itself", "negated")["latents"][0]
    (line,) = [line for line in says.out.splitlines() if line.split()[:1] == [str(first["latent"])]]
    assert f"{first['gain_first']:+.0%}" in line
    assert line.split()[-1] == first["relation"]
    assert max(map(len, says.out.splitlines())) <= 80


def test_only_rows_of_one_dictionary_are_compared(db: Path, world: World, tmp_path: Path, shell: Shell) -> None:
    mixed = tmp_path / "x.duckdb"
    shutil.copy(db, mixed)
    refused(shell("compare", runs(db)["itself"], "none", "--db", mixed), "there is no run 'none'")
    assert shell(*world.args("select", db=mixed, quiet=True)).status == 0
    newest = read(mixed, "SELECT run_id FROM runs WHERE d_sae = 64")[0]["run_id"]
    refused(shell("compare", runs(db)["itself"], newest, "--db", mixed), "cannot be compared: sae is .* one dictionary")
    with Store.open(mixed) as store:
        store.execute("DELETE FROM map_rows WHERE run_id = ?", [runs(db)["other"]])
    refused(shell("compare", runs(db)["itself"], runs(db)["other"], "--db", mixed), "keeps no rows of a change map")
