"""The course over checkpoints: known where adapters are scaled, the selection's own figures at the end, one base in
memory, one adapter at a time."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from autointerp import adapters
from autointerp.evidence.course import Reading, Sample
from autointerp.evidence.gather import Evidence
from autointerp.evidence.model_pair import PeftPair
from autointerp.evidence.paired import PairedModel
from autointerp.run import Run
from tests import tiny
from tests.e2e.test_transcoder import save_transcoder
from tests.evidence.test_series import scaled
from tests.evidence.world import CONTEXT, HOOK, _stream, plainly, write_corpus, write_sae
from tests.evidence.world import World as PlainWorld

CHANGED = {28: 0.5, 33: -0.4, 38: 0.25, 44: 1.0}
"""Latent → s of a scaling adapter, z · (1 + s); they fire often, so that the ridge of the map takes little off."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, gpt2_base: Path) -> dict[str, Any]:
    """Options of a run, but for the adapter."""
    folder = tmp_path_factory.mktemp("parts")
    corpus = write_corpus(folder / "corpus.jsonl")
    sae = write_sae(folder / "sae", _stream(gpt2_base, corpus), False, True)
    return {"base": gpt2_base, "sae": sae, "corpus": corpus, "context_length": CONTEXT, "device": "cpu", "top": 4}


def read(parts: dict[str, Any], out: Path, latents: list[int] | None = None) -> tuple[Evidence, Sample, list[Reading]]:
    """What every checkpoint of `out` has made of the latents, those selected on its adapter if none are given."""
    evidence = Evidence.load(Run.load(out, **parts))
    if latents is None:
        latents = evidence.select(lambda _n: None)[0].latents
    sample = Sample.read(evidence.models, evidence.dictionary, evidence.corpus, latents)
    return evidence, sample, [sample.at(evidence.models_with(c.path)) for c in evidence.run.checkpoints]


def test_the_course_of_a_scaled_adapter_is_its_scale(parts: dict[str, Any], tmp_path: Path):
    """Scaling latents by 1 + f·s writes f·s_j z_j d_j, whatever else the model does."""
    for step, factor in ((1, 0.0), (2, 0.5), (3, 1.0)):
        adapter = adapters.Scaling(adapters.load_dictionary(parts["sae"]))
        with torch.no_grad():
            for latent, scale in CHANGED.items():
                adapter.scale[latent] = factor * scale
        adapters.save(adapter, tmp_path / f"checkpoint-{step}", hook=HOOK)
    _, sample, (none, half, whole) = read(parts, tmp_path, list(CHANGED))
    assert none.change == 0
    assert not none.rows.any()
    assert none.coverage is None
    assert whole.gain == pytest.approx(np.array(list(CHANGED.values())), rel=0.03)
    assert half.gain == pytest.approx(whole.gain / 2, rel=1e-4)
    assert half.size == pytest.approx(whole.size / 2, rel=1e-4)
    assert half.change == pytest.approx(whole.change / 2, rel=1e-4)
    assert half.cosines(whole) == pytest.approx(np.ones(4), abs=1e-4)
    assert np.isnan(none.cosines(whole)).all()
    assert half.coverage == pytest.approx(whole.coverage, abs=1e-4)
    assert whole.coverage is not None
    assert whole.coverage > 0.99
    assert none.mean == pytest.approx(sample.base().mean)
    assert none.freq == pytest.approx(sample.base().freq)


def test_a_scaled_lora_grows_and_ends_where_the_selection_stands(
    parts: dict[str, Any], gpt2_base: Path, gpt2_lora: Path, tmp_path: Path
):
    for step, factor in ((10, 0.0), (20, 0.1), (30, 0.2), (40, 1.0)):
        scaled(gpt2_lora, tmp_path / f"checkpoint-{step}", factor)
    evidence, sample, (none, little, twice, whole) = read(parts, tmp_path)
    assert not none.rows.any()
    assert twice.size == pytest.approx(2 * little.size, rel=0.25), "a small adapter acts in proportion"
    assert (whole.size > twice.size).all()
    with evidence:
        selection, _ = evidence.select(lambda _n: None)
    for name, values in (("gain", whole.gain), ("mean_adapted", whole.mean), ("freq_adapted", whole.freq)):
        assert values == pytest.approx(selection.columns[name][selection.latents], rel=1e-4), name
    assert whole.coverage == pytest.approx(selection.figures["coverage"], rel=1e-4)
    assert sample.n_tokens == selection.figures["n_tokens"]
    assert sample.base().mean == pytest.approx(selection.columns["mean_base"][selection.latents], rel=1e-4)
    middle = plainly(PlainWorld(Run.load(tmp_path / "checkpoint-30", **parts), gpt2_base, bos=True))
    codes = np.concatenate(list(middle.adapted.values()))[:, selection.latents]
    assert twice.mean == pytest.approx(codes.mean(0), rel=1e-4)
    assert twice.freq == pytest.approx((codes > 0).mean(0), abs=2e-4)


def test_a_transcoder_is_read_where_it_writes(parts: dict[str, Any], gpt2_base: Path, gpt2_lora: Path, tmp_path: Path):
    for step, factor in ((1, 0.0), (2, 1.0)):
        scaled(gpt2_lora, tmp_path / "out" / f"checkpoint-{step}", factor)
    options = parts | {"sae": save_transcoder(tmp_path / "t"), "selector": ("mean-shift",)}
    evidence, sample, (none, whole) = read(options, tmp_path / "out")
    assert not none.rows.any()
    assert whole.rows.shape == (4, tiny.WIDTH)
    with evidence:
        selection, _ = evidence.select(lambda _n: None)
    assert sample.n_tokens == selection.figures["n_tokens"]
    for name, values in (("gain", whole.gain), ("mean_adapted", whole.mean), ("freq_adapted", whole.freq)):
        assert values == pytest.approx(selection.columns[name][selection.latents], rel=1e-3), name


def test_a_training_of_transformers(parts: dict[str, Any], gpt2_base: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(gpt2_base)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_fc"], layers_to_transform=[1, 2], task_type="CAUSAL_LM")
    ids = tiny.token_ids(32, 24)
    trainer = Trainer(
        model=get_peft_model(model, config),
        args=TrainingArguments(
            str(tmp_path / "out"), max_steps=9, save_steps=3, learning_rate=0.02, per_device_train_batch_size=8,
            report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in ids],  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    trainer.train()
    trainer.save_model()
    evidence, _, readings = read(parts, tmp_path / "out")
    assert [checkpoint.step for checkpoint in evidence.run.checkpoints] == [3, 6, 9]
    assert evidence.run.checkpoints[-1].path == evidence.run.adapter == str(tmp_path / "out")
    changes = [reading.change for reading in readings]
    assert changes == sorted(changes)
    assert (readings[0].size > 0).all()


def series(kind: str, folder: Path, base: Path, lora: Path) -> Path:
    """Three checkpoints of an adapter, or of a whole model."""
    for step in (1, 2, 3):
        path = scaled(lora, folder / kind / f"checkpoint-{step}", step / 3)
        if kind == "whole":
            whole: Any = AutoModelForCausalLM.from_pretrained(base)
            merged = tiny.PeftModel.from_pretrained(whole, str(path)).merge_and_unload()  # pyright: ignore
            shutil.rmtree(path)
            merged.save_pretrained(path)
    return folder / kind


@pytest.mark.parametrize("kind", ["lora", "whole"])
def test_one_base_and_one_adapter_at_a_time(
    kind: str, parts: dict[str, Any], gpt2_base: Path, gpt2_lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Weights of a checkpoint are let go before the next are read; those of the base are never read again; and the
    pair that the run goes on with is as it was."""
    evidence = Evidence.load(Run.load(series(kind, tmp_path, gpt2_base, gpt2_lora), **parts))
    ids = tiny.token_ids()
    before = [x.clone() for x in evidence.model.activations(ids)]
    loaded: list[str] = []
    real = AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        AutoModelForCausalLM, "from_pretrained", lambda path, **k: (loaded.append(str(path)), real(path, **k))[1]
    )
    sample = Sample.read(evidence.models, evidence.dictionary, evidence.corpus, [1, 2, 3])
    alive: list[Any] = []
    for checkpoint in evidence.run.checkpoints[:-1]:
        gc.collect()
        assert [ref for ref in alive if ref() is not None] == []
        models = evidence.models_with(checkpoint.path)
        sample.at(models)
        alive = [weakref.ref(w) for w in own_weights(models[0], evidence.model)]
        assert alive
        del models
    assert str(gpt2_base) not in loaded
    for now, was in zip(evidence.model.activations(ids), before, strict=True):
        assert torch.equal(now, was)


def own_weights(model: PairedModel, other: PairedModel) -> Iterator[torch.Tensor]:
    """Weights of a pair that are not those of the other's base."""
    base = {w.data_ptr() for w in other.pair.bare().parameters()}  # pyright: ignore[reportOptionalMemberAccess]
    return (w for m in model.pair.models for w in m.parameters() if w.data_ptr() not in base)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"trainable_token_indices": [3, 4]}],
    ids=["lora", "dora", "modules to save", "tokens"],
)
def test_the_bare_base_of_a_peft_pair_is_the_base(options: dict[str, Any], gpt2_base: Path, tmp_path: Path):
    adapter = tiny.save_lora(tmp_path / "a", gpt2_base, [1], **options)
    pair = PairedModel.load(adapter, gpt2_base, HOOK, device="cpu").pair
    assert isinstance(pair, PeftPair)
    bare, ids = pair.bare(), tiny.token_ids()
    weights = {w.data_ptr() for w in pair.model.parameters()}
    assert all(w.data_ptr() in weights for w in bare.parameters())
    assert not any("lora" in name or "original" in name for name, _ in bare.named_parameters())
    with torch.inference_mode(), pair.base() as base:
        assert torch.equal(bare(ids).logits, base(ids).logits)
