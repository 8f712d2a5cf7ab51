"""`--since`: the base side carries another adapter, and the change is what was trained since it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from autointerp.evidence.paired import PairedModel
from tests import tiny
from tests.evidence.test_peft_several import lora, with_adapters

from .world import HOOK, Shell, World, read, refused, with_adapters_of

WEIGHTS = "SELECT latent, change FROM latents JOIN runs USING (run_id) WHERE selector = 'weights' ORDER BY latent"
CHOSEN = "SELECT latent, change FROM latents WHERE run_id = '{}' AND selected ORDER BY rank"


@pytest.fixture
def preferred(world: World, tmp_path: Path) -> World:
    """As a preference training leaves it: `default`, trained further, and beneath it `ref`, the adapter it began as."""
    both = with_adapters(world.base, {"default": lora([1], target_modules=["c_fc"]), "ref": lora([0, 1])})
    return with_adapters_of(world, tmp_path / "w", both)


def alone(base: Path, adapter: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    with torch.inference_mode():
        return model(tiny.token_ids()).logits


def test_both_sides_are_as_each_adapter_alone(preferred: World, world: World) -> None:
    start = preferred.adapter / "ref"
    model = PairedModel.load(preferred.adapter, world.base, HOOK, device="cpu", since=str(start))
    for each in (model, model.replica(), model.with_adapter(str(preferred.adapter), str(world.base), None, None)):
        base, adapted = each.logits(tiny.token_ids())
        torch.testing.assert_close(base, alone(world.base, start))
        torch.testing.assert_close(adapted, alone(world.base, preferred.adapter))
        x_base, x_adapted = each.activations(tiny.token_ids())
        assert not torch.equal(x_base, x_adapted)
    plain = AutoModelForCausalLM.from_pretrained(world.base).eval()
    with torch.inference_mode():
        assert torch.equal(model.pair.bare()(tiny.token_ids()).logits, plain(tiny.token_ids()).logits)
    same = PairedModel.load(start, world.base, HOOK, device="cpu", since=str(start))
    assert torch.equal(*same.activations(tiny.token_ids())), "since itself, nothing was trained"


def test_the_change_since_is_a_run_of_its_own(preferred: World, world: World, shell: Shell) -> None:
    start = preferred.adapter / "ref"
    assert shell(*preferred.args(quiet=True)).status == 0
    says = shell(*preferred.args(since=start))
    assert says.status == 0
    whole, since = read(preferred.db, "SELECT * FROM runs ORDER BY created_at")
    assert (whole["since"], whole["since_sha256"]) == (None, None)
    assert (since["since"], since["adapter"]) == (str(start), str(preferred.adapter))
    assert since["since_sha256"] not in (None, since["adapter_sha256"])
    assert "· since /" in " ".join(shell("show", "--db", preferred.db).out.replace("│", "").split())
    chosen = read(preferred.db, CHOSEN.format(since["run_id"]))
    assert chosen
    # The same question, asked of models: the start merged into a base of its own, the end into a checkpoint.
    base, end = (preferred.path / name for name in ("start", "end"))
    for folder, adapter in ((base, start), (end, preferred.adapter)):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), str(adapter))
        model.merge_and_unload().save_pretrained(folder)  # pyright: ignore
        tiny.tokenizer().save_pretrained(folder)
    assert shell(*preferred.args("select", run=end, base=base, db=preferred.path / "other.duckdb")).status == 0
    (other,) = read(preferred.path / "other.duckdb", "SELECT run_id FROM runs")
    expected = read(preferred.path / "other.duckdb", CHOSEN.format(other["run_id"]))
    assert [row["latent"] for row in chosen] == [row["latent"] for row in expected]
    for row, want in zip(chosen, expected, strict=True):
        assert row["change"] == pytest.approx(want["change"], rel=1e-3)
    assert shell(*preferred.args("check", since=start, quiet=True)).status == 0
    weights, other_db = {"selector": ["weights"], "fdr": 0.9, "corpus": None}, preferred.path / "other.duckdb"
    assert shell(*preferred.args("select", since=start, base=world.base, **weights)).status == 0
    assert shell(*preferred.args("select", run=end, base=base, db=other_db, **weights)).status == 0
    sizes, expected = ([row["change"] for row in read(db, WEIGHTS)] for db in (preferred.db, other_db))
    assert max(sizes) > 0
    assert sizes == pytest.approx(expected, rel=1e-3)


def test_what_cannot_be_since(preferred: World, world: World, shell: Shell, tmp_path: Path) -> None:
    whole: Any = AutoModelForCausalLM.from_pretrained(world.base)
    torch.nn.init.normal_(whole.transformer.h[1].mlp.c_fc.weight)
    whole.save_pretrained(tmp_path / "whole")
    by_weights = {"selector": ["weights"], "corpus": None, "base": world.base}
    refused(shell(*preferred.args("select", since=tmp_path / "whole", **by_weights)), "weight changes are no LoRA's")
    refused(shell(*preferred.args("select", since=tmp_path / "none")), "since .*none: no such file or folder")
    other = tiny.save_lora(tmp_path / "other", tiny.save_model(tmp_path / "base", "gpt2", seed=5), [1])
    refused(shell(*preferred.args("select", since=other)), f"names base {tmp_path / 'base'}, .*--since another adapter")
    assert not preferred.db.exists()
