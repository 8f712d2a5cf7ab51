"""`--selector weights`: no corpus, no model; what is stored and shown; what a label job takes after it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, PeftConfig, VeraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ..tiny import save_lora
from .world import M, Shell, World, build, read, refused

WEIGHTS = "adapter_model.safetensors"
PLANTED = 7
"""The latent that the adapter writes."""


@pytest.fixture
def bare(world: World, tmp_path: Path) -> World:
    """A world whose adapter writes before the hook and reads behind it; no corpus, its base not on this machine."""
    made = World(tmp_path / "bare")
    made.path.mkdir()
    save_lora(made.adapter, world.base, [1, 3], ["c_attn", "c_proj", "c_fc"])
    config = made.adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "nobody/has-this"}))
    shutil.copytree(world.sae, made.sae)
    plant(made)
    return made


def plant(world: World) -> None:
    """One matrix before the hook writes PLANTED, more than all others write."""
    weights = load_file(world.adapter / WEIGHTS)
    direction = load_file(world.sae / "sae_weights.safetensors")["W_dec"][PLANTED]
    (name,) = (name for name in weights if ".h.1.mlp.c_proj.lora_B" in name)
    weights[name] = (30 * direction[:, None] * torch.ones(1, 2)).contiguous()
    save_file(weights, world.adapter / WEIGHTS, {"format": "pt"})


def by_weights(world: World, **changed: object) -> list[str]:
    return world.args("select", **{"selector": "weights", "corpus": None, **changed})


def edit_weights(adapter: Path, value: float) -> None:
    weights = load_file(adapter / WEIGHTS)
    for tensor in weights.values():
        tensor.fill_(value)
    save_file(weights, adapter / WEIGHTS, {"format": "pt"})


def test_neither_corpus_nor_base_is_needed(bare: World, shell: Shell) -> None:
    says = shell(*by_weights(bare))
    assert (says.status, says.err.strip()) == (0, "")
    assert "weights · done" in says.out
    (run,) = read(bare.db, "SELECT * FROM runs")
    assert (run["selector"], run["stage"], run["d_sae"], run["corpus"], run["n_tokens"]) == (
        "weights", "select", M, None, None,
    )  # fmt: skip
    assert "2 matrices write before the hook" in run["notes"]
    assert "1 × values of c_attn (need W_O: give --base a folder)" in run["notes"]
    latents = read(bare.db, "SELECT * FROM latents ORDER BY latent")
    assert [row["latent"] for row in latents] == list(range(M))
    assert all(row["statistic"] is not None and row["write_weight"] > 0 and row["read_weight"] > 0 for row in latents)
    chosen = sorted((row for row in latents if row["selected"]), key=lambda row: row["rank"])
    assert [row["rank"] for row in chosen] == list(range(1, len(chosen) + 1))
    assert [row["statistic"] for row in chosen] == sorted((row["statistic"] for row in chosen), reverse=True)
    assert (chosen[0]["latent"], chosen[0]["role"]) == (PLANTED, "written")
    assert all(row["state"] is None and row["coverage"] is None for row in latents)
    # What a user asks next.
    assert shell("show", "--db", bare.db).status == 0
    one = shell("show", "3", "--db", bare.db)
    assert one.status == 0
    assert "no corpus was read" in one.out
    assert "nan" not in one.out.lower()
    assert shell("query", "from changed_latents", "--db", bare.db).status == 0
    units = shell("show", "--units", "--db", bare.db)
    assert units.status == 0
    assert f"raises latent {PLANTED}" in " ".join(units.out.split())
    assert "no latent is labelled yet" in units.out
    again = shell(*by_weights(bare, json=True))
    assert json.loads(again.out)["n_pass"] == run["n_pass"]
    assert len(read(bare.db, "SELECT 1 FROM runs")) == 1


def test_with_the_base_at_hand_values_and_norms_count(world: World, bare: World, shell: Shell) -> None:
    assert shell(*by_weights(bare, base=world.base)).status == 0
    (run,) = read(bare.db, "SELECT notes FROM runs")
    assert "3 matrices write before the hook" in run["notes"]
    assert "need" not in run["notes"]


def test_an_adapter_of_zeros_selects_nothing_and_says_so(bare: World, shell: Shell) -> None:
    edit_weights(bare.adapter, 0.0)
    says = shell(*by_weights(bare))
    assert (says.status, says.err.strip()) == (0, "")
    assert "no latent was selected: the adapter changes nothing" in says.out
    assert read(bare.db, "SELECT count(*) AS n FROM latents WHERE NOT selected AND change IS NULL") == [{"n": M}]


def test_what_stands_out_from_chance_is_all_that_is_selected(bare: World, shell: Shell) -> None:
    says = shell(*by_weights(bare, fdr=1e-30))
    assert says.status == 0
    assert "none stands out from what a random direction gets" in " ".join(says.out.split())


def test_not_finite_is_bad_input(bare: World, shell: Shell) -> None:
    edit_weights(bare.adapter, float("nan"))
    refused(shell(*by_weights(bare)), "lora_A.weight holds NaN")
    assert not bare.db.exists()


def test_a_dictionary_that_is_not_finite_is_bad_input(bare: World, shell: Shell) -> None:
    weights = load_file(bare.sae / "sae_weights.safetensors")
    weights["W_dec"][3, 5] = float("nan")
    save_file(weights, bare.sae / "sae_weights.safetensors")
    refused(shell(*by_weights(bare)), "W_dec holds NaN")
    assert not bare.db.exists()


def test_what_weights_do_not_say_names_a_selector_that_can(world: World, bare: World, shell: Shell) -> None:
    save_adapter(bare, world, VeraConfig(target_modules=["c_attn"], r=2))
    refused(shell(*by_weights(bare)), "VERA has no weight change of its own.*use --selector change")
    refused(shell(*world.args(adapter=bare.adapter, selector="weights", db=bare.db)), "VERA.*use --selector change")
    assert not bare.db.exists()


def test_ia3_takes_the_files_of_its_base(world: World, bare: World, shell: Shell) -> None:
    """A neuron of the MLP below the hook writes a latent; the IA3 makes it stronger, and the others hardly."""
    weights = load_file(world.base / "model.safetensors")
    made = Path(shutil.copytree(world.base, bare.path / "base"))
    direction = load_file(bare.sae / "sae_weights.safetensors")["W_dec"][PLANTED]
    weights["transformer.h.1.mlp.c_proj.weight"][11] = direction
    save_file(weights, made / "model.safetensors", {"format": "pt"})
    save_adapter(bare, world, IA3Config(target_modules=["mlp.c_proj"], feedforward_modules=["mlp.c_proj"]))
    scales = load_file(bare.adapter / WEIGHTS)
    scales["base_model.model.transformer.h.1.mlp.c_proj.ia3_l"][0, 11] = 3.0
    save_file(scales, bare.adapter / WEIGHTS, {"format": "pt"})
    refused(
        shell(*by_weights(bare, base="nobody/has-this")), "IA3 rescales the base's own weights: give --base a folder"
    )
    assert not bare.db.exists()
    assert shell(*by_weights(bare, base=made)).status == 0
    (first,) = read(bare.db, "SELECT latent, role FROM latents WHERE rank = 1")
    assert (first["latent"], first["role"]) == (PLANTED, "written")


def save_adapter(bare: World, world: World, config: PeftConfig) -> None:
    """An adapter fresh from peft in place of the LoRA."""
    shutil.rmtree(bare.adapter)
    get_peft_model(AutoModelForCausalLM.from_pretrained(world.base), config).save_pretrained(str(bare.adapter))


def test_labels_after_it_take_corpus_and_base(world: World, tmp_path: Path, shell: Shell) -> None:
    """With both, the same latents get contexts and labels, and the change map says what they carry."""
    made = build(tmp_path / "w")
    shutil.rmtree(made.adapter)
    save_lora(made.adapter, made.base, [1, 3], ["c_attn", "c_proj", "c_fc"])
    plant(made)
    refused(shell(*made.args(selector="weights", corpus=None)), "no corpus for .*give --corpus")
    assert shell(*made.args("select", selector="weights", quiet=True)).status == 0
    chosen = "SELECT latent, statistic FROM latents WHERE selected ORDER BY rank"
    before = read(made.db, chosen)
    assert before
    says = shell(*made.args(selector="weights", quiet=True))
    assert (says.status, says.err.strip()) == (0, "")
    (run,) = read(made.db, "SELECT * FROM runs")
    assert (run["stage"], run["status"]) == ("label", "done")
    assert run["coverage"] is not None
    after = read(made.db, chosen)
    assert [row["latent"] for row in after] == [row["latent"] for row in before]
    assert [row["statistic"] for row in after] == pytest.approx([row["statistic"] for row in before], rel=1e-4)
    names = read(made.db, "SELECT label FROM labels WHERE status = 'known'")
    units = " ".join(shell("show", "--units", "--db", made.db).out.split())
    assert any(f"[{row['label']}]" in units for row in names)
    (counts,) = read(made.db, "SELECT count(DISTINCT latent) AS labelled FROM labels")
    assert counts["labelled"] == len(before)


def test_a_hook_beyond_the_model_is_bad_input(world: World, bare: World, shell: Shell) -> None:
    refused(shell(*by_weights(bare, base=world.base, hook="blocks.9.hook_resid_post")), "the model has 4 layers")
    refused(shell(*by_weights(bare, hook="blocks.0.hook_resid_pre", adapter=_below(bare))), "nothing of it can be read")


def _below(bare: World) -> Path:
    """The adapter with nothing but what lies behind the hook and writes there."""
    weights = load_file(bare.adapter / WEIGHTS)
    kept = {name: tensor for name, tensor in weights.items() if ".h.3.mlp.c_proj" in name}
    save_file(kept, bare.adapter / WEIGHTS, {"format": "pt"})
    assert torch.stack([tensor.abs().sum() for tensor in kept.values()]).all()
    return bare.adapter
