"""`autointerp check`: goes on from the selection, measures once, is shown and exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from autointerp import adapters, checking

from .world import HOOK, Shell, World, read, refused

CAUSAL = "select edit, part, k, draw, loss, kl, kl_share from causal order by all"


def test_check_goes_on_from_the_selection(
    world: World, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = world.copy(tmp_path / "world")
    before = read(copy.db, "select latent, rank, label from changed_latents order by rank")
    labelled = world.args("check", db=copy.db)
    says = shell(*labelled)
    assert says.status == 0
    assert "by cause" in says.out
    assert read(copy.db, "select latent, rank, label from changed_latents order by rank") == before
    found = read(copy.db, CAUSAL)
    assert {row["part"] for row in found} == {"none", "whole", "static", "selected", "random", "matched", "all"}
    whole = next(row for row in found if (row["edit"], row["part"]) == ("added", "whole"))
    assert whole["kl"] == pytest.approx(0, abs=1e-4)  # the adapter changes nothing above the hook
    alone = read(copy.db, "select latent from causal_latents")
    assert {row["latent"] for row in alone} <= {row["latent"] for row in before}

    def fail(*_: object) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(checking, "load_evidence", fail)
    again = json.loads(shell(*labelled, "--json").out)
    assert len(again["causal"]) == len(found)
    assert [row["latent"] for row in again["latents"]] == [row["latent"] for row in before]
    latent = before[0]["latent"]
    assert "by cause, its row alone" in shell("show", latent, "--db", copy.db).out
    item = json.loads(shell("show", latent, "--json", "--db", copy.db).out)
    assert item["causal_latents"]["n_firing"] > 0
    assert "by cause" in shell("show", "--db", copy.db).out
    probes = read(copy.db, "select * from transfer")
    assert {row["latent"] for row in probes} <= {row["latent"] for row in before}
    assert all(row["r2"] <= 1 and 0 <= row["auc"] <= 1 and abs(row["r2_shuffled"]) < 0.5 for row in probes)
    assert item["transfer"]["n_firing"] > 0


def test_check_selects_where_nothing_stands_and_select_forgets_it(world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "new.duckdb"
    assert shell(*world.args("check", db=db, quiet=True)).out == ""
    assert read(db, "select stage, status from runs") == [{"stage": "select", "status": "done"}]
    selected = read(db, "select latent from latents where selected order by rank")
    assert selected == read(world.db, "select latent from latents where selected order by rank")
    assert read(db, "select count(*) as n from causal")[0]["n"] > 0


def test_a_bias_is_looked_at_direction_by_direction(world: World, tmp_path: Path, shell: Shell) -> None:
    """It writes the same on every token and so has no rows: its static part is taken apart instead."""
    dictionary = adapters.load_dictionary(world.sae)
    bias, weights = adapters.Bias(dictionary), torch.zeros(dictionary.d_sae)
    weights[[5, 9]] = torch.tensor([4.0, 2.0])
    bias.load_state_dict({"bias": weights})
    adapters.save(bias, tmp_path / "bias", hook=HOOK, base=str(world.base), sae=str(world.sae))
    db = tmp_path / "bias.duckdb"
    says = shell(*world.args("check", run=tmp_path / "bias", db=db))
    assert says.status == 0
    found = read(db, "select part, k, kl_share from causal where edit = 'added' and part like '%directions'")
    assert {(row["part"], row["k"]) for row in found} == {
        (part, k) for part in ("directions", "random directions") for k in (1, 2, 5, 10, 20)
    }
    shares = {row["k"]: row["kl_share"] for row in found if row["part"] == "directions"}
    assert shares[1] < shares[2]
    assert shares[2] == pytest.approx(1, abs=1e-3)
    assert max(row["kl_share"] for row in found if row["part"] == "random directions" and row["k"] == 2) < 0.9
    assert "2 directions of it" in says.out
    assert "2 random directions" in says.out
    assert not read(world.db, "select 1 from causal where part like '%directions'"), "a LoRA has rows"


def test_bad_input_changes_nothing(world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "none.duckdb"
    refused(shell(*world.args("check", db=db, sae=tmp_path / "nowhere")), "sae")
    refused(shell(*world.args("check", db=db, hook="blocks.9.hook_resid_post")), "hook")
    assert not db.exists()
