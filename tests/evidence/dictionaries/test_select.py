"""End to end: the demo's SAE rewritten in other formats selects what it selects as SAELens saved it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from autointerp.evidence.gather import Evidence
from autointerp.evidence.selection import Selection
from autointerp.run import Run
from tests.evidence import world
from tests.evidence.test_parity import ORGANISM

HOOK = "blocks.2.hook_resid_post"


def gemma_scope(w: dict[str, Tensor], folder: Path) -> Path:
    """b_dec is not subtracted there: it moves into the encoder's bias."""
    b_enc = (w["b_enc"].double() - w["b_dec"].double() @ w["W_enc"].double()).float()
    arrays: Any = {key: value.numpy() for key, value in (w | {"b_enc": b_enc}).items()}
    np.savez(folder / "params.npz", **arrays)
    return folder / "params.npz"


def jump_relu(w: dict[str, Tensor], folder: Path) -> Path:
    b_enc = (w["b_enc"].double() - w["b_dec"].double() @ w["W_enc"].double()).float()
    return dictionary_learning("JumpReluAutoEncoder", w | {"b_enc": b_enc}, folder)


def batch_top_k(w: dict[str, Tensor], folder: Path) -> Path:
    """One threshold for all: latents are rescaled so that theirs is 1."""
    t = w["threshold"]
    linear = {"encoder.weight": (w["W_enc"] / t).T.contiguous(), "encoder.bias": w["b_enc"] / t}
    state = linear | {"decoder.weight": (w["W_dec"] * t[:, None]).T.contiguous(), "b_dec": w["b_dec"]}
    return dictionary_learning("BatchTopKSAE", state | {"threshold": torch.tensor(1.0)}, folder)


def top_k(w: dict[str, Tensor], folder: Path) -> Path:
    state = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    state |= {"decoder.weight": w["W_dec"].T.contiguous(), "b_dec": w["b_dec"]}
    return dictionary_learning("AutoEncoderTopK", state, folder)


def dictionary_learning(kind: str, state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "ae.pt")
    trainer = {"dict_class": kind, "k": 8, "layer": 2, "submodule_name": "resid_post_layer_2"}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": "out"}}))
    return folder


def sparsify(w: dict[str, Tensor], folder: Path) -> Path:
    tensors = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    tensors |= {"W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    (folder / "h.2").mkdir()
    save_file(tensors, folder / "h.2" / "sae.safetensors")
    (folder / "h.2" / "cfg.json").write_text(json.dumps({"k": 8, "activation": "topk", "d_in": len(w["b_dec"])}))
    return folder / "h.2"


def selected(run: Run) -> Selection:
    with Evidence.load(run) as evidence:
        return evidence.select(lambda _n: None)[0]


def same(found: Selection, wanted: Selection) -> None:
    assert found.latents == wanted.latents
    assert found.roles == wanted.roles
    for key in ("mean_base", "mean_adapted", "gain", "q_value", "coverage", "change"):
        if key in wanted.columns:
            a, b = (np.asarray(s.columns[key], dtype=float) for s in (found, wanted))
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-3, err_msg=key)
    for key in ("fvu_base", "fvu_adapted", "delta_fvu", "change_r2", "coverage", "l0_base", "n_pass"):
        assert found.figures[key] == pytest.approx(wanted.figures[key], rel=1e-3), key


Writer = Callable[[dict[str, Tensor], Path], Path | str]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., Run], Selection]:
    folder = tmp_path_factory.mktemp("demo")
    lines = (ORGANISM / "corpus.jsonl").read_text().splitlines()
    (folder / "corpus.jsonl").write_text("\n".join(lines[:: len(lines) // 60][:60]) + "\n")

    def run(**sae: str) -> Run:
        options = {"corpus": str(folder / "corpus.jsonl"), "context_length": 64, "top": 10, "device": "cpu"}
        return Run.load(ORGANISM, **options, **sae)

    return run, selected(run())


@pytest.mark.parametrize("write", [gemma_scope, jump_relu, batch_top_k])
def test_the_demo_in_other_formats(
    demo: tuple[Callable[..., Run], Selection], tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, wanted = demo
    assert wanted.latents
    weights = load_file(ORGANISM / "sae" / "sae_weights.safetensors")
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_2"
    folder.mkdir(parents=True)
    spec = write(weights, folder)
    # The SAE was trained with BOS, which dictionary_learning leaves to a tokenizer: this one adds none of its own.
    monkeypatch.setattr("autointerp.evidence.gather.adds_bos", lambda _tokenizer: True)
    mine = run(sae=str(spec))
    assert mine.hook == HOOK
    found = selected(mine)
    if write is batch_top_k:
        scale = weights["threshold"].numpy()
        for key in ("mean_base", "mean_adapted"):
            found.columns[key] = found.columns[key] * scale
    same(found, wanted)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[world.World, Selection]:
    folder = tmp_path_factory.mktemp("world")
    made = world.build(folder, *world.saved_model(folder), topk=True, bos=False)
    return made, selected(made.run)


@pytest.mark.parametrize("write", [sparsify, top_k])
def test_a_top_k_dictionary_in_other_formats(
    small: tuple[world.World, Selection], tmp_path: Path, write: Writer
) -> None:
    made, wanted = small
    assert wanted.latents
    spec = write(load_file(Path(made.run.sae) / "sae_weights.safetensors"), tmp_path)
    mine = Run.load(
        made.run.adapter,
        base=str(made.base),
        sae=str(spec),
        corpus=made.run.corpus,
        context_length=world.CONTEXT,
        max_tokens=10**6,
        device="cpu",
    )
    assert mine.hook == HOOK
    same(selected(mine), wanted)
