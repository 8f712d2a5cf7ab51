"""A transcoder through the command line: the change is read where it writes, by latents of what it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY

from .world import WIDTH, M, Shell, World, read, refused

IN, OUT = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"


def save_transcoder(path: Path, layer: int = 2) -> Path:
    sae_class, config_class = SAE_CLASS_REGISTRY["skip_transcoder"]
    sizes: dict[str, Any] = {"d_in": WIDTH, "d_out": WIDTH, "d_sae": M, "apply_b_dec_to_input": False}
    sae: Any = sae_class(config_class(**sizes))
    torch.manual_seed(3)
    with torch.no_grad():
        for weight in sae.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        sae.b_enc -= 0.5
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = (
        hook.replace("blocks.2", f"blocks.{layer}") for hook in (IN, OUT)
    )
    sae.save_model(path)
    return path


def test_the_whole_job(world: World, tmp_path: Path, shell: Shell) -> None:
    transcoder, db = save_transcoder(tmp_path / "t"), tmp_path / "x.duckdb"
    args = {"sae": transcoder, "db": db, "selector": "mean-shift", "quiet": True}
    assert shell(*world.args(**args)).status == 0
    (run,) = read(db, "SELECT hook, sae_format, status, fvu_base, n_tokens FROM runs")
    assert (run["hook"], run["sae_format"], run["status"]) == (OUT, "saelens/skip_transcoder", "done")
    assert run["fvu_base"] > 0
    labelled = read(db, "SELECT latent, label FROM changed_latents ORDER BY rank")
    assert len(labelled) == 4
    assert all(row["label"] for row in labelled)
    peaks = "SELECT latent, max(list_max(act_base)) AS seen, max(max_base) AS largest FROM contexts"
    for row in read(db, f"{peaks} JOIN latents USING (latent) WHERE kind = 'top_base' GROUP BY latent"):
        assert row["seen"] == pytest.approx(row["largest"], rel=1e-5)  # the contexts' activations are those of the pass
    assert str(labelled[0]["latent"]) in shell("show", str(labelled[0]["latent"]), "--db", db).out


def test_by_cause_by_probes_and_by_gradient(world: World, tmp_path: Path, shell: Shell) -> None:
    transcoder, db = save_transcoder(tmp_path / "t"), tmp_path / "x.duckdb"
    args = {"sae": transcoder, "db": db, "selector": ["mean-shift", "attribution"], "quiet": True}
    assert shell(*world.args("check", **args)).status == 0
    found = read(db, "SELECT part, kl_share FROM causal WHERE edit = 'added'")
    assert {row["part"] for row in found} >= {"none", "whole", "selected", "random"}
    selected = {row["latent"] for row in read(db, "SELECT latent FROM latents WHERE selected")}
    assert {row["latent"] for row in read(db, "SELECT latent FROM causal_latents")} <= selected
    for probe in read(db, "SELECT r2, r2_base, r2_shuffled, cosine FROM transfer"):
        assert probe["r2_base"] > 0.5 > abs(probe["r2_shuffled"])  # what it reads says when it fires
    (priced,) = read(db, "SELECT count(attribution) AS n FROM latents")
    assert priced["n"] > 0
    figures = "SELECT figures FROM selectors WHERE selector = 'attribution'"
    assert "by_map" in str(read(db, figures))


def test_what_takes_one_hook_is_refused(world: World, tmp_path: Path, shell: Shell) -> None:
    transcoder, db = save_transcoder(tmp_path / "t"), tmp_path / "x.duckdb"
    says = shell(*world.args("select", sae=transcoder, db=db, selector="weights"))
    refused(says, "reading the weights alone takes one hook: give --sae")
    assert not db.exists()
