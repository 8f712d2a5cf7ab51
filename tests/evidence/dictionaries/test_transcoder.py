"""Transcoders: as sae_lens computes them, read at two hooks of a real model, and refused where one hook is meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY
from torch import Tensor

from autointerp import adapters
from autointerp.errors import InputError
from autointerp.evidence.dictionaries import load_dictionary
from autointerp.evidence.directions import open_directions
from autointerp.evidence.gather import Evidence
from autointerp.evidence.paired import PairedModel
from autointerp.run import Run
from tests import tiny
from tests.evidence.world import CONTEXT, write_corpus

from .checks import D, M, activations, agrees, close, draw, refuses

ARCHITECTURES = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
IN, OUT = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"


def made(architecture: str, d: int = D, hook_in: str = IN, hook_out: str = OUT, **config: Any) -> Any:
    sae_class, config_class = SAE_CLASS_REGISTRY[architecture]
    sizes: dict[str, Any] = {"d_in": d, "d_out": d, "d_sae": M, "apply_b_dec_to_input": False}
    sae: Any = sae_class(config_class(**sizes, **config))
    with torch.no_grad():
        for n, (key, weight) in enumerate(sae.named_parameters()):
            weight.copy_(draw(*weight.shape, seed=n).abs() if key == "threshold" else draw(*weight.shape, seed=n))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.hook_name_out = hook_in, hook_out
    return sae


def saved(folder: Path, architecture: str = "skip_transcoder", **options: Any) -> Path:
    made(architecture, **options).save_model(folder)
    return folder


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_as_sae_lens_has_it(architecture: str, tmp_path: Path) -> None:
    theirs, ours = made(architecture), load_dictionary(saved(tmp_path / "t", architecture))
    u = activations()
    z, x = theirs.encode(u), torch.cat([activations().flip(0), u], dim=1)  # what is written stands first
    close(ours.encode(x), z)
    close(ours.encode_columns(x, torch.tensor([40, 3])), z[:, [40, 3]])
    token, latent, value = ours.encode_active(x)
    close(torch.zeros_like(z).index_put((token, latent), value), z)
    close(ours.decode(z, x), theirs(u))
    assert 0.01 < (z != 0).float().mean() < 0.9
    assert (ours.hook_in, ours.hook, ours.format) == (IN, OUT, f"saelens/{architecture}")
    if "skip" not in architecture:
        agrees(ours, z, theirs(u), u)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("hook_in", ["blocks.2.mlp.hook_in", "blocks.2.hook_mlp_in"])
def test_both_hooks_in_one_pass(family: str, hook_in: str, tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", family)
    lora = tiny.save_lora(tmp_path / "lora", base, [1])
    dictionary = load_dictionary(saved(tmp_path / "t", d=tiny.WIDTH, hook_in=hook_in))
    ids = tiny.token_ids()
    read = PairedModel.load(lora, base, OUT, device="cpu", dictionary=dictionary)
    written = PairedModel.load(lora, base, OUT, device="cpu").activations(ids)
    norm = {"gpt2": "ln_2", "llama": "post_attention_layernorm", "gemma2": "pre_feedforward_layernorm"}[family]
    block = f"{tiny.BLOCKS.get(family, 'model.layers')}.2"
    at = "blocks.2.hook_resid_mid" if hook_in.endswith("hook_mlp_in") else f"{block}.{norm}"
    entered = PairedModel.load(lora, base, at, device="cpu").activations(ids)
    for x, v, u in zip(read.activations(ids), written, entered, strict=True):
        assert torch.equal(x[..., : tiny.WIDTH], v)
        assert torch.equal(x[..., tiny.WIDTH :], u)
    assert not torch.equal(*entered)


def test_what_the_pass_measures(gpt2_base: Path, gpt2_lora: Path, tmp_path: Path) -> None:
    """Latents of what the MLP reads, the change of what it gives; contexts carry the same activations."""
    transcoder = saved(tmp_path / "t", d=tiny.WIDTH)
    corpus = write_corpus(tmp_path / "corpus.jsonl")
    run = Run.load(
        gpt2_lora, base=str(gpt2_base), sae=str(transcoder), corpus=str(corpus), context_length=CONTEXT, device="cpu",
        selector="mean-shift", top=3,
    )  # fmt: skip
    assert run.hook == OUT
    dictionary = load_dictionary(transcoder)
    W_skip = dictionary.beside(torch.eye(tiny.WIDTH))
    assert W_skip is not None
    with Evidence.load(run) as evidence:
        selection, _ = evidence.select(lambda _n: None)
        spool = evidence._spool
        assert spool is not None
        stretch = spool.read(np.arange(len(spool)))
        measured = selection.fitted.statistics
        ids = [torch.from_numpy(spool.ids(s)).long()[None] for s in range(len(spool))]
    entered = PairedModel.load(gpt2_lora, gpt2_base, "transformer.h.2.ln_2", device="cpu")
    written = PairedModel.load(gpt2_lora, gpt2_base, OUT, device="cpu")
    sides: list[list[Tensor]] = [
        [torch.cat([model.activations(i)[side][0] for i in ids])[stretch.counted] for side in (0, 1)]
        for model in (entered, written)
    ]
    (u_base, u_adapted), (v_base, v_adapted) = sides
    close(torch.from_numpy(measured.base.total).float(), dictionary.encode(u_base).sum(0))
    close(torch.from_numpy(measured.adapted.total).float(), dictionary.encode(u_adapted).sum(0))
    assert measured.stream.square_change == pytest.approx((v_adapted - v_base).square().sum().item(), rel=1e-4)
    errors = [
        v - dictionary.encode(u) @ dictionary.W_dec - dictionary.b_dec - u @ W_skip
        for u, v in ((u_base, v_base), (u_adapted, v_adapted))
    ]
    assert measured.stream.error_base == pytest.approx(errors[0].square().sum().item(), rel=1e-3)
    assert measured.stream.error_change == pytest.approx((errors[1] - errors[0]).square().sum().item(), rel=1e-3)
    assert len(selection.latents) == 3


def test_refused_in_one_line(gpt2_base: Path, gpt2_lora: Path, tmp_path: Path) -> None:
    saved(tmp_path / "t", d=tiny.WIDTH)
    with pytest.raises(InputError, match="reading the weights alone takes one hook"):
        open_directions(str(tmp_path / "t"))
    with pytest.raises(InputError, match="an adapter on latents takes one hook"):
        adapters.Bias(load_dictionary(tmp_path / "t"))
    refuses(saved(tmp_path / "n", normalize_activations="layer_norm"), "that normalises each token is not read")
    refuses(saved(tmp_path / "h", hook_out=""), "has no hook_name and hook_name_out")
    wrong = {
        "with or without the norm's own weights": ("blocks.2.ln2.hook_normalized", OUT),
        "writes at an MLP's or attention's output": (IN, "blocks.2.hook_resid_post"),
        "before it is added": ("blocks.3.mlp.hook_in", OUT),
    }
    for said, (hook_in, hook_out) in wrong.items():
        dictionary = load_dictionary(saved(tmp_path / said[:6], d=tiny.WIDTH, hook_in=hook_in, hook_out=hook_out))
        with pytest.raises(InputError, match=said):
            PairedModel.load(gpt2_lora, gpt2_base, hook_out, device="cpu", dictionary=dictionary)


def test_the_hook_in_the_config_is_where_it_writes(tmp_path: Path) -> None:
    from autointerp.run import hook_of

    assert hook_of(str(saved(tmp_path / "t"))) == OUT
    config = json.loads((tmp_path / "t" / "cfg.json").read_text())
    assert config["metadata"]["hook_name"] == IN
