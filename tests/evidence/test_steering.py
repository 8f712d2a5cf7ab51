"""Steering vectors in every form: added where they say, and refused in one line where they cannot be."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.gguf import read_control_vector
from autointerp.evidence.paired import PairedModel
from tests import tiny
from tests.evidence.test_hooked import by_hand
from tests.evidence.test_paired import plainly

HOOK = "blocks.2.hook_resid_post"
WRITTEN_BY_GGUF = (
    "eNptziFMw0AUxvGDTSwhJAjEcJWoZoDB0RmGnCHBrU13oU3KXXO5EXAnkZPISuQkjs4hJ5GVk5NI/mSHoXvJLy/37rvLG41urztC"
    "iH2xrY7vx77fSyVNUoSJSbPcytTOjOwxP/T3qVbW6OKRG236u4bhg57KYpLlyv4+7P59XNrzk535InmWZpLqmbJdv9mBD05zQybX"
    "Kjzb4xiIdrWjF/+jrv3qiilqiIg0IsRwmKPCAjVWaLCBGArRwxH6CHCKAS4R4QZj3CFGhhJPw+067oNek4VDhRoNxJK/EWCACGPE"
    "KOHwgjleUeENC7yjxidW+EKDNTb4Xv4ARZRqSA=="
)
"""What repeng 0.4.0 wrote through gguf 0.19.0, compressed: layers 1 and 3 of a gpt2, [0, .5, …, 15.5] and −2 × it."""


def folder(path: Path, content: object, name: str = "vector.pt", **said: object) -> Path:
    """A folder with one file of vectors, and what steering.json says."""
    path.mkdir()
    if name.endswith(".safetensors"):
        save_file(content, path / name)  # pyright: ignore[reportArgumentType]
    elif name.endswith(".gguf"):
        assert isinstance(content, bytes)
        (path / name).write_bytes(content)
    else:
        torch.save(content, path / name)
    if said:
        (path / "steering.json").write_text(json.dumps(said))
    return path


def gguf(directions: dict[str, np.ndarray], architecture: str = "controlvector", **metadata: str) -> bytes:
    """Written out by the specification, version 3, float32 or float16."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    values = {"general.architecture": architecture, "controlvector.model_hint": "gpt2"} | metadata
    head = b"GGUF" + struct.pack("<IQQ", 3, len(directions), len(values) + 2)
    for key, value in values.items():
        head += text(key) + struct.pack("<I", 8) + text(value)
    head += text("controlvector.layer_count") + struct.pack("<II", 4, len(directions))
    head += text("names") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b")
    data = b""
    for key, vector in directions.items():
        kind = {"float32": 0, "float16": 1, "uint16": 30}[vector.dtype.name]
        dims = struct.pack(f"<{vector.ndim}Q", *vector.shape[::-1])
        head += text(key) + struct.pack("<I", vector.ndim) + dims + struct.pack("<IQ", kind, len(data))
        data += vector.tobytes() + bytes(-vector.nbytes % 32)
    return head + bytes(-len(head) % 32) + data


def loaded(path: Path, base: Path, hook: str = HOOK) -> PairedModel:
    return PairedModel.load(path, base, hook, device="cpu")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def check(model: PairedModel, shifts: dict[str, Tensor], family: str = "gpt2") -> None:
    """Against plain transformers with `shifts` added at their hooks."""
    ids, plain = tiny.token_ids(), tiny.model(family)
    x_base, x_adapted = model.activations(ids)
    path, where = model.hook.module_path, model.hook.where
    assert torch.equal(x_base, plainly(plain, path, where, ids))
    stacks = [by_hand(plain, at, lambda x, v=v: x + v) for at, v in shifts.items()]
    assert torch.allclose(x_adapted, plainly(plain, path, where, ids), atol=1e-4)
    for stack in stacks:
        stack.close()


@pytest.mark.parametrize("name", ["vector.pt", "v.safetensors"])
def test_one_direction_acts_where_it_is_read(tmp_path, gpt2_base, name):
    v = draw(tiny.WIDTH)
    path = folder(tmp_path / "v", {"direction": v} if name[0] == "v" and "safe" in name else v, name)
    assert adapters.detect(path).name == "steering"
    model = loaded(path, gpt2_base)
    x_base, x_adapted = model.activations(tiny.token_ids())
    assert torch.equal(x_adapted, x_base + v)
    check(model, {HOOK: v})
    check(loaded(path, gpt2_base, "blocks.1.hook_mlp_out"), {"blocks.1.hook_mlp_out": v})


def test_the_sidecar_says_base_hook_and_coefficient(tmp_path, gpt2_base):
    v = draw(1, tiny.WIDTH)
    path = folder(tmp_path / "v", v, base="../base", hook="blocks.1.hook_resid_pre", coefficient=-3)
    (tmp_path / "base").symlink_to(gpt2_base)
    assert adapters.detect(path).base_of(path) == str(gpt2_base.resolve())
    check(loaded(path, gpt2_base), {"blocks.1.hook_resid_pre": -3 * v[0]})
    (tmp_path / "v" / "steering.json").write_text(json.dumps({"coefficient": 2.5}))
    assert adapters.detect(path).base_of(path) is None
    check(loaded(path, gpt2_base), {HOOK: 2.5 * v[0]})


def test_one_direction_a_layer(tmp_path, gpt2_base):
    v = draw(tiny.DEPTH, tiny.WIDTH)
    v[1] = 0
    after = {f"blocks.{layer}.hook_resid_post": v[layer] for layer in range(tiny.DEPTH)}
    model = loaded(folder(tmp_path / "rows", v), gpt2_base)
    assert model.pair.first_changed_layer == 0
    check(model, after)
    by_layer = {layer: v[layer] for layer in range(tiny.DEPTH)}
    check(loaded(folder(tmp_path / "ints", by_layer), gpt2_base), after)
    named = {f"layer_{layer}": v[layer].clone() for layer in (0, 2)}
    check(loaded(folder(tmp_path / "names", named, "v.safetensors"), gpt2_base), after)
    one = folder(tmp_path / "one", v, hook="blocks.2.hook_resid_mid")
    check(loaded(one, gpt2_base), {"blocks.2.hook_resid_mid": v[2]})


def test_one_direction_a_hidden_state(tmp_path, gpt2_base):
    v = draw(tiny.DEPTH + 1, tiny.WIDTH)
    model = loaded(folder(tmp_path / "rows", v), gpt2_base)
    assert model.pair.first_changed_layer == -1
    after = {f"blocks.{layer}.hook_resid_post": v[layer + 1] for layer in range(tiny.DEPTH)}
    check(model, after | {"blocks.0.hook_resid_pre": v[0]})
    one = folder(tmp_path / "one", v, hook="blocks.2.hook_resid_pre")
    check(loaded(one, gpt2_base), {"blocks.2.hook_resid_pre": v[2]})


def test_a_control_vector_in_gguf(tmp_path, gpt2_base):
    v = {layer: draw(4, tiny.WIDTH)[layer].numpy() for layer in (1, 2, 3)}
    v[2] = v[2].astype(np.float16)
    shifts = {f"blocks.{layer}.hook_resid_post": torch.from_numpy(v[layer].astype(np.float32)) for layer in v}
    path = folder(tmp_path / "v", gguf({f"direction.{layer}": v[layer] for layer in v}), "v.gguf")
    assert adapters.detect(path).name == "steering"
    model = loaded(path, gpt2_base)
    assert model.pair.first_changed_layer == 1
    check(model, shifts)


def test_every_float_of_gguf_and_what_repeng_wrote(tmp_path):
    for dtype in (np.float32, np.float16):
        v = draw(8).numpy().astype(dtype)
        (tmp_path / "v.gguf").write_bytes(gguf({"direction.7": v[None]}))
        assert np.array_equal(read_control_vector(tmp_path / "v.gguf").directions[7], v.astype(np.float32))
    v = draw(8).to(torch.bfloat16)
    (tmp_path / "v.gguf").write_bytes(gguf({"direction.7": v.view(torch.uint16).numpy()}))
    assert np.array_equal(read_control_vector(tmp_path / "v.gguf").directions[7], v.float().numpy())
    (tmp_path / "v.gguf").write_bytes(zlib.decompress(base64.b64decode(WRITTEN_BY_GGUF)))
    theirs, ramp = read_control_vector(tmp_path / "v.gguf"), np.arange(32, dtype=np.float32) / 2
    assert theirs.model_hint == "gpt2"
    assert theirs.directions.keys() == {1, 3}
    assert np.array_equal(theirs.directions[1], ramp)
    assert np.array_equal(theirs.directions[3], -2 * ramp)


def test_a_vector_of_zeros_changes_nothing(tmp_path, gpt2_base):
    for name, v in {"one": torch.zeros(tiny.WIDTH), "rows": torch.zeros(tiny.DEPTH, tiny.WIDTH)}.items():
        model = loaded(folder(tmp_path / name, v), gpt2_base)
        assert model.pair.first_changed_layer is None
        model.check_sees_adapter()
        x_base, x_adapted = model.activations(tiny.token_ids())
        assert torch.equal(x_base, x_adapted)


def test_a_vector_above_the_hook_is_refused(tmp_path, gpt2_base):
    model = loaded(folder(tmp_path / "v", {3: draw(tiny.WIDTH)}), gpt2_base)
    with pytest.raises(InputError, match=r"use blocks\.3\.hook_resid_post"):
        model.check_sees_adapter()


ONES, NAN = torch.ones(tiny.WIDTH), torch.full((tiny.WIDTH,), torch.nan)
DIRECTION = {"direction.1": np.ones(tiny.WIDTH, np.float32)}


@pytest.mark.parametrize(
    ("content", "name", "said", "refusal"),
    [
        (NAN, "v.pt", {}, "vector holds NaN"),
        ({"v": NAN}, "v.safetensors", {}, "v holds NaN"),
        (gguf({"direction.1": NAN.numpy()}), "v.gguf", {}, "1 holds NaN"),
        (torch.ones(16), "v.pt", {}, "a vector of width 16, the base model's residual width is 32"),
        (torch.ones(3, tiny.WIDTH), "v.pt", {}, "a tensor [3, 32], the model has 4 layers: want [32], [4, 32]"),
        (torch.ones(2, 4, tiny.WIDTH), "v.pt", {}, "vector has shape [2, 4, 32]; want"),
        ({"a": ONES, "b": ONES}, "v.pt", {}, "cannot tell the layers of a, b"),
        ({9: ONES}, "v.pt", {}, "after layer 9, the model has 0 to 3"),
        ({"x": "y"}, "v.pt", {}, "no vectors in it"),
        (torch.ones(tiny.WIDTH, dtype=torch.int64), "v.pt", {}, "no vectors in it"),
        (Path("x"), "v.pt", {}, "damaged, or not plain tensors"),
        (ONES, "v.pt", {"strength": 2}, "strength: 2; the keys are"),
        (ONES, "v.pt", {"coefficient": "2"}, "coefficient: '2'; the keys are"),
        (ONES, "v.pt", {"hook": "blocks.7.hook_resid_post"}, "the model has 4 layers"),
        ({1: ONES}, "v.pt", {"hook": "blocks.2.hook_resid_post"}, "it has layers [1]"),
        (gguf(DIRECTION)[:-20], "v.gguf", {}, "damaged or cut short"),
        (gguf(DIRECTION)[:50], "v.gguf", {}, "damaged or cut short"),
        (b"GGML", "v.gguf", {}, "is no GGUF file"),
        (gguf(DIRECTION, "llama"), "v.gguf", {}, "a llama model, not a control vector"),
        (gguf({}), "v.gguf", {}, "no direction.LAYER in it"),
        (gguf({"direction.x": ONES.numpy()}), "v.gguf", {}, "direction.x names no layer"),
        (gguf({"direction.1": np.ones((2, 32), np.float32)}), "v.gguf", {}, "has shape [2, 32]; want one vector"),
        (
            gguf(DIRECTION, **{"controlvector.model_hint": "qwen2"}),
            "v.gguf",
            {},
            "made for a qwen2, the base is a gpt2",
        ),
    ],
)
def test_refused_in_one_line(tmp_path, gpt2_base, content, name, said, refusal):
    path = folder(tmp_path / "v", content, name, **said)
    with pytest.raises(InputError) as refused:
        loaded(path, gpt2_base)
    assert refusal in str(refused.value)
    assert "\n" not in str(refused.value)


def test_folders_of_several_vectors_or_none(tmp_path):
    path = folder(tmp_path / "v", ONES)
    torch.save(ONES, path / "other.pt")
    with pytest.raises(InputError, match=r"other\.pt, vector\.pt; give --adapter a folder with one"):
        adapters.detect(path)
    trainer = tmp_path / "trainer"
    trainer.mkdir()
    torch.save({}, trainer / "optimizer.pt")
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        adapters.detect(trainer)
