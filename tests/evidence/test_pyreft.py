"""LoReFT interventions as pyvene saves them, against the formula and a file of the real library."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.paired import PairedModel
from tests import tiny
from tests.evidence.test_hooked import by_hand
from tests.evidence.test_paired import plainly

RANK = 2
KEY = "intkey_layer_{}_comp_block_output_unit_pos_nunit_1#0.bin"
WRITTEN_BY_PYREFT = (
    "eNrVlkFs01YYx1+cNEnTDjpSRtkYisY0ZRIrdkhCUur3VS6ypnqC0MEUoWnGdUxt1Y3znBdopx0iTa3GjcuknSaOO+623dYjxzE4ILQD0i7sxI4c"
    "92yXyHFbOjlc9iTrOdH73v/33vu+/3NDSaYQymbRnjaPPkJWm64Zm6qtbRquKqi6s95RV2xHX1OdHu30qNprW1TtOF217b8JZ/hzLY1qs501W5Y+"
    "QDcObX1O1x3bNnRqOe1u7orbMlyjdcnSaY6gj5dJothMM5g7hrVqUsLp1HF1c1btUcvu5lTXWOlZdkulRrvruOrtUo4ki8VmhkV02Uht1SCpICQn"
    "ybajUaH6efB/jow1E2wYT9LNJOv1To9klAVKslcVpHBKYZuMKwUlsU1yd00PZIKSyWXyVpPtFlqxtC45YjIpM2UG8wjkqJlROEqm/Pgt8raS2CLH"
    "gtg8JdPL5Hhzkg10HapRI9hS8k4wxy6iTzjgO+HPWyIzps910pu3oHDb5F2Gx7jeC+Y+Rcn7y+R0b7ahZLKd2leLSyzMexoHnuwiGot1srO3HHdd"
    "o+ptw+2y05KlBLoheLK/vPjzWw/Wew6WldFEPNndo1Q121ptrxttKkuZV6lVLXsAcIf8zTEJ7rUAIsrHAljZpIbjJaYsHY2mtG1Rahsew5b410kv"
    "VdOvZZhDx2JX1Tlelo5EABDqzyNxQeyL98Ud8ZmI8BQuYB4v4Aa+iTu4j7/D9/AP+D7+Cf+Mf8U7+AH+HT/Bz/Bz/A9+iRGkIAuTMAXTMAOnoAAf"
    "QhHOAg9lqME8LMAl+BQ+gwZcgyZ8CTehBSbY0AEKG/ANeCt/kb8y02dr6x+y8pn4KxdkaXpfN+kD2vEY5sYvb3ilmTqEYTo+Q0mWpvYwoAMbI/vP"
    "rf8b+p82b++5l9/n0W79H7z3F9GJWHs/cJv8fglwPucRPPxx9frh9b/EajOWAfnH3zVciznQ15p3U6lWS5Y4BsTXyvVyrVYrX6hXK3y5duF8hef5"
    "SqVUL9UrJaEuVKtCvVrifZt8QM4UGUfRp0x4sAPOsHPP7yEf5R6OKoXNenFI5WkCvYl7ISoYNmd5SPAqh97QjRDVDJuxOKT5R0zNwSUQlQq739yQ"
    "1BdJNILXR3XCDjes00iNoCNEdcLVPKzzeBSdUlQnXLMXh9eTRqM4xZ6ED5Xd0nAuxBTa3xAaSjp9dnfm08lPBirjkf5RMug3Mq8sNO2/KRPB7+Ar"
    "aiwdxIz744Ox/wIu18ua"
)
"""KEY of layer 1 as pyreft 0.1.0 on pyvene 0.1.8 wrote it, compressed: weight [0, 1, …, 63] / 64 and bias [1, −2] in
bfloat16; the rows of R are the coordinate 3, and minus the coordinate 8."""


def weights(seed: int) -> dict[str, Tensor]:
    """R's rows orthonormal, saved as columns."""
    draw = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(tiny.WIDTH, RANK, generator=draw)).Q
    weight, bias = 0.3 * torch.randn(RANK, tiny.WIDTH, generator=draw), torch.randn(RANK, generator=draw)
    return {"weight": weight, "bias": bias, "rotate_layer": rotation}


def saved(folder: Path, files: dict[str, dict[str, Tensor]], kind: str = "LoreftIntervention") -> Path:
    folder.mkdir(parents=True)
    for name, state in files.items():
        torch.save(state, folder / name)
    types = [f"<class 'pyreft.interventions.{kind}'>"] * len(files)
    (folder / "config.json").write_text(json.dumps({"intervention_types": types, "mode": "parallel"}))
    return folder


def formula(w: dict[str, Tensor], x: Tensor) -> Tensor:
    R = w["rotate_layer"].T
    return x + (x @ w["weight"].T + w["bias"] - x @ R.T) @ R


def check(folder: Path, base: Path, states: dict[str, dict[str, Tensor]]) -> None:
    """Against plain transformers with the formula at these hooks."""
    found = adapters.detect(folder)
    assert (found.name, found.base_of(folder)) == ("pyreft", None)
    assert "every position" in (found.assumed(folder) or "")
    ids, plain = tiny.token_ids(), tiny.model("gpt2")
    read = PairedModel.load(folder, base, "blocks.3.hook_resid_post", device="cpu")
    x_base, x_adapted = read.activations(ids)
    stacks = [by_hand(plain, at, lambda x, w=w: formula(w, x)) for at, w in states.items()]
    assert torch.allclose(x_adapted, plainly(plain, "transformer.h.3", "output", ids), atol=1e-4)
    assert not torch.allclose(x_base, x_adapted, atol=1e-2)
    for stack in stacks:
        stack.close()


def test_by_hand_on_several_layers(gpt2_base, tmp_path):
    one, two = weights(1), weights(2)
    folder = saved(tmp_path / "a", {KEY.format(1): one, KEY.format(3): two})
    check(folder, gpt2_base, {"blocks.1.hook_resid_post": one, "blocks.3.hook_resid_post": two})


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("intkey_comp_transformer_h[1]_output_unit_pos_nunit_1#0.bin", "blocks.1.hook_resid_post"),
        ("intkey_layer.1.comp.block_output.unit.pos.nunit.1#0.bin", "blocks.1.hook_resid_post"),
        ("intkey_layer_1_comp_block_input_unit_pos_nunit_1#0.bin", "blocks.1.hook_resid_pre"),
        ("intkey_layer_0_comp_block_input_unit_pos_nunit_1#0.bin", "blocks.0.hook_resid_pre"),
    ],
)
def test_where_a_name_points(name, hook, gpt2_base, tmp_path):
    check(saved(tmp_path / "a", {name: weights(1)}), gpt2_base, {hook: weights(1)})


def test_a_file_of_the_library_in_a_checkpoint_of_the_trainer(gpt2_base, tmp_path):
    """Without a config, beside an empty pytorch_model.bin."""
    home = tmp_path / "checkpoint-5" / "intervenable_model"
    home.mkdir(parents=True)
    (home / KEY.format(1)).write_bytes(zlib.decompress(base64.b64decode(WRITTEN_BY_PYREFT)))
    torch.save({}, home / "pytorch_model.bin")
    rotation = torch.zeros(tiny.WIDTH, RANK)
    rotation[3, 0], rotation[8, 1] = 1, -1
    weight = torch.arange(RANK * tiny.WIDTH).reshape(RANK, tiny.WIDTH) / 64
    w = {"weight": weight, "bias": torch.tensor([1.0, -2.0]), "rotate_layer": rotation}
    check(home.parent, gpt2_base, {"blocks.1.hook_resid_post": w})
    torch.save({"transformer.wte.weight": torch.ones(2)}, home / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"trained weights of the model itself \(transformer\.wte\.weight\)"):
        adapters.detect(home.parent)


def test_an_intervention_that_writes_what_is_there_changes_nothing(gpt2_base, tmp_path):
    w = weights(1)
    folder = saved(tmp_path / "a", {KEY.format(1): {**w, "weight": w["rotate_layer"].T, "bias": torch.zeros(RANK)}})
    pair = PairedModel.load(folder, gpt2_base, "blocks.3.hook_resid_post", device="cpu").pair
    assert pair.first_changed_layer is None


def test_refused_in_one_line(gpt2_base, tmp_path):
    w = weights(1)

    def refused(said: str, files: dict[str, dict[str, Tensor]], kind: str = "LoreftIntervention") -> None:
        folder = saved(tmp_path / str(len(list(tmp_path.iterdir()))), files, kind)
        with pytest.raises(InputError, match=said) as caught:
            PairedModel.load(folder, gpt2_base, "blocks.3.hook_resid_post", device="cpu")
        assert "\n" not in str(caught.value)

    twice = {KEY.format(1): w, KEY.format(1).replace("#0", "#1"): w}
    refused(r"#0\.bin and .*#1\.bin act at one place on different positions", twice)
    refused("a DireftIntervention; of pyreft's interventions", {KEY.format(1): w}, "DireftIntervention")
    refused("rotate_layer is missing", {KEY.format(1): {"weight": w["weight"], "bias": w["bias"]}})
    refused(r"rotate_layer has shape \[2, 32\]", {KEY.format(1): w | {"rotate_layer": w["rotate_layer"].T}})
    refused("bias holds NaN", {KEY.format(1): w | {"bias": torch.full((RANK,), torch.nan)}})
    refused("acts on mlp_activation", {KEY.format(1).replace("block_output", "mlp_activation"): w})
    refused("acts on 1 × h_pos", {KEY.format(1).replace("unit_pos", "unit_h_pos"): w})
    refused("not the name of an intervention", {"intkey_1.bin": w})
    refused("acts after layer 7, the model has 0 to 3", {KEY.format(7): w})
    refused("blocks are transformer.h", {"intkey_comp_model_layers[1]_output_unit_pos_nunit_1#0.bin": w})
    narrow = {"weight": torch.ones(1, 5), "bias": torch.ones(1), "rotate_layer": torch.ones(5, 1)}
    refused("of width 5, the base model's residual width is 32", {KEY.format(1): narrow})
