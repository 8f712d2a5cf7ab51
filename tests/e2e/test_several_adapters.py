"""Adapters that are active together, through the command line: one folder or one by one, one run; stored and shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.evidence.test_peft_several import edit, lora, with_adapters

from .world import Shell, World, read, refused, with_adapters_of

CHOSEN = "SELECT latent, rank, role, round(change, 6) AS change FROM latents WHERE selected ORDER BY rank"


@pytest.fixture
def both(world: World, tmp_path: Path) -> World:
    """A world whose run directory holds the adapters `one` and `two`, as peft saves them, and none besides."""
    configs = {"one": lora([1]), "two": lora([1, 2], target_modules=["c_fc", "c_proj"])}
    return with_adapters_of(world, tmp_path / "w", with_adapters(world.base, configs))


def test_a_folder_of_adapters_and_each_of_them_is_one_run(both: World, world: World, shell: Shell) -> None:
    says = shell(*both.args("select"))
    assert says.status == 0
    assert "one and two are taken as active together; --adapter takes one of them" in " ".join(says.err.split())
    (run,) = read(both.db, "SELECT * FROM runs")
    assert (run["adapter"], run["adapter_format"]) == (str(both.adapter), "peft-several")
    members = json.loads(run["adapters"])
    assert [(member["name"], member["path"]) for member in members] == [
        (name, str(both.adapter / name)) for name in ("one", "two")
    ]
    assert len({run["adapter_sha256"], *(member["sha256"] for member in members)}) == 3
    assert "one and two together" in " ".join(shell("show", "--db", both.db).out.split())
    chosen = read(both.db, CHOSEN)
    each = [both.adapter / name for name in ("one", "two")]
    again = shell(*both.args("select", run=both.path, adapter=each))
    assert (again.status, again.err.count("taken as active")) == (0, 0)
    assert read(both.db, CHOSEN) == chosen
    assert len(read(both.db, "SELECT 1 FROM runs")) == 1, "the same adapters in the same order are the same run"
    (both.path / "run.yaml").write_text(f"adapter: [adapter/one, adapter/two]\nbase: {world.base}\n")
    assert shell(*both.args("select", run=both.path)).status == 0
    assert len(read(both.db, "SELECT 1 FROM runs")) == 1
    assert shell(*both.args("select", run=each[1], quiet=True)).status == 0
    (alone,) = read(both.db, "SELECT * FROM runs WHERE adapters IS NULL")
    assert (alone["adapter"], alone["adapter_sha256"]) == (str(each[1]), members[1]["sha256"])


def test_by_weights_and_by_cause(both: World, shell: Shell) -> None:
    assert shell(*both.args("select", selector=["weights"], corpus=None, quiet=True)).status == 0
    (run,) = read(both.db, "SELECT notes FROM runs")
    assert "5 matrices write before the hook" in run["notes"]  # c_proj of two layers, attention and MLP; one's values
    assert shell("show", "--units", "--db", both.db).status == 0
    assert shell(*both.args(quiet=True)).status == 0
    assert shell(*both.args("check", quiet=True)).status == 0
    assert read(both.db, "SELECT 1 FROM causal LIMIT 1")


def test_wrong_mixtures_are_bad_input(both: World, world: World, tmp_path: Path, shell: Shell) -> None:
    edit(both.adapter / "two", base_model_name_or_path="nobody/another")
    refused(shell(*both.args("select")), "one names base .*, .*two names nobody/another: .*give it with --base")
    assert shell(*both.args("select", base=world.base, quiet=True)).status == 0
    series = tmp_path / "series"
    for step in (1, 2):
        tiny.save_lora(series / f"checkpoint-{step}", world.base, [1])
    with_series = [both.adapter / "one", series]
    refused(
        shell(*both.args("select", adapter=with_series)), "no adapter_config.json .*checkpoints, e.g. .*checkpoint-2"
    )
    nested = [both.adapter, both.adapter / "one"]
    refused(shell(*both.args("select", adapter=nested)), "holds several adapters; give --adapter each of them")
    refused(shell(*both.args("select", adapter=[both.adapter / "one"] * 2)), "one: is named twice")
    whole = [both.adapter / "one", world.base]
    refused(shell(*both.args("select", adapter=whole)), "no adapter_config.json in it: only PEFT adapters")
    missing = [both.adapter / "one", tmp_path / "none"]
    refused(shell(*both.args("select", adapter=missing)), "none: no such file or folder")
    assert len(read(both.db, "SELECT 1 FROM runs")) == 1
