"""Dictionaries: parity with sae_lens for every architecture it can save, and bad ones in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import SAE_CLASS_REGISTRY
from safetensors.torch import load_file, save_file
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries import DICTIONARIES, check_fits, load_dictionary

D, M = 16, 64
OPTIONS: dict[str, dict[str, Any]] = {
    "standard": {},
    "jumprelu": {},
    "gated": {},
    "topk": {"k": 5},
    "abstopk": {"k": 5},
    "matching_pursuit": {"residual_threshold": 0.1, "max_iterations": 5},
}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"apply_b_dec_to_input": False},
    {"normalize_activations": "layer_norm"},
    {"normalize_activations": "constant_norm_rescale"},
    {"normalize_activations": "expected_average_only_in"},
    {"rescale_acts_by_decoder_norm": True},
]
METADATA = {"hook_name": "blocks.2.hook_resid_post", "prepend_bos": True, "context_size": 128}


def make_sae(architecture: str, seed: int = 0, **config: Any) -> SAE[Any]:
    """A SAE with random weights; thresholds on both sides of 0."""
    sae_class, config_class = SAE_CLASS_REGISTRY[architecture]
    sae: Any = sae_class(config_class(d_in=D, d_sae=M, **OPTIONS.get(architecture, {}), **config))
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    for key, value in METADATA.items():
        setattr(sae.cfg.metadata, key, value)
    return sae


def activations(n: int = 200) -> Tensor:
    return 3 * torch.randn(n, D, generator=torch.Generator().manual_seed(1)) + 1


@pytest.mark.parametrize(
    ("architecture", "variant"),
    [(name, option) for name in OPTIONS for option in VARIANTS if "topk" in name or "rescale" not in "".join(option)],
)
def test_parity_with_sae_lens(tmp_path: Path, architecture: str, variant: dict[str, Any]) -> None:
    sae: Any = make_sae(architecture, **variant)
    sae.save_model(tmp_path)
    before = (tmp_path / "sae_weights.safetensors").read_bytes()
    dictionary = load_dictionary(tmp_path)
    x = activations()
    z = sae.encode(x).detach()
    torch.testing.assert_close(dictionary.encode(x), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(z, x), sae.decode(z).detach(), rtol=1e-5, atol=1e-5)
    latents = torch.tensor([40, 3, 17])
    torch.testing.assert_close(dictionary.encode_columns(x, latents), z[:, latents], rtol=1e-5, atol=1e-5)
    active = dictionary.encode_active(x)
    dense = torch.zeros_like(z).index_put((active.token, active.latent), active.value)
    torch.testing.assert_close(dense, z, rtol=1e-5, atol=1e-5)
    assert torch.equal(active.token, active.token.sort().values)
    assert len(active.value) == (z != 0).sum()
    if not dictionary.normalised:  # W_dec is the one that acts on z
        torch.testing.assert_close(
            z @ dictionary.W_dec + dictionary.b_dec, sae.decode(z).detach(), rtol=1e-5, atol=1e-5
        )
    assert 0.02 < (z != 0).float().mean() < 0.9
    assert dictionary.signed or (z >= 0).all()
    assert (dictionary.d_in, dictionary.d_sae, dictionary.format) == (D, M, f"saelens/{architecture}")
    assert (dictionary.hook, dictionary.prepend_bos, dictionary.context_size) == tuple(METADATA.values())
    assert not dictionary.encode(x).requires_grad
    assert (tmp_path / "sae_weights.safetensors").read_bytes() == before


def test_batchtopk_is_read_as_the_jumprelu_it_is_saved_as(tmp_path: Path) -> None:
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    trained: Any = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D, d_sae=M, k=5))
    trained.topk_threshold.fill_(0.7)
    trained.save_inference_model(tmp_path)
    dictionary = load_dictionary(tmp_path)
    x = activations()
    assert dictionary.format == "saelens/jumprelu"
    torch.testing.assert_close(dictionary.encode(x), SAE.load_from_disk(tmp_path).encode(x).detach())


def test_configs_from_before_sae_lens_6(tmp_path: Path) -> None:
    sae = make_sae("topk")
    sae.save_model(tmp_path)
    old = {"architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu"}
    old |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "hook_point": "blocks.1.hook_resid_pre"}
    (tmp_path / "cfg.json").write_text(json.dumps(old))
    dictionary = load_dictionary(tmp_path)
    assert (dictionary.format, dictionary.hook, dictionary.prepend_bos) == ("saelens/topk", old["hook_point"], True)
    torch.testing.assert_close(dictionary.encode(activations()), sae.encode(activations()).detach())


def test_half_precision_weights_give_float32_activations(tmp_path: Path) -> None:
    sae = make_sae("jumprelu")
    sae.save_model(tmp_path)
    dictionary = load_dictionary(tmp_path, dtype=torch.bfloat16)
    z = dictionary.encode(activations().bfloat16())
    assert dictionary.W_dec.dtype == torch.bfloat16
    assert z.dtype == torch.float32
    exact = sae.encode(activations()).detach()
    assert (z - exact).norm() < 0.05 * exact.norm()


def test_weights_are_held_once(tmp_path: Path) -> None:
    from autointerp.evidence.dictionaries.saelens import from_sae

    sae = make_sae("topk", rescale_acts_by_decoder_norm=True)
    dictionary = from_sae(sae)
    assert dictionary.W_enc is not None
    assert dictionary.W_enc.data_ptr() == sae.W_enc.data_ptr()
    assert dictionary.W_dec.data_ptr() == sae.W_dec.data_ptr()


def test_a_dictionary_must_fit_the_model(tmp_path: Path) -> None:
    make_sae("standard").save_model(tmp_path)
    dictionary = load_dictionary(tmp_path)
    check_fits(dictionary, D)
    with pytest.raises(InputError, match=r"SAE x has d_in 16, the model's residual width is 768"):
        check_fits(dictionary, 768, "x")


Damage = Callable[[Path], object]


def edit(**tensors: Callable[[Tensor], Tensor | None]) -> Damage:
    """Replaces tensors of the weights file; None removes one."""

    def damage(folder: Path) -> None:
        path = folder / "sae_weights.safetensors"
        weights = load_file(path)
        changed = {key: tensors[key](value) if key in tensors else value for key, value in weights.items()}
        save_file({key: value.contiguous() for key, value in changed.items() if value is not None}, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "cfg.json").unlink(), r"no cfg.json beside its weights"),
        (lambda f: (f / "sae_weights.safetensors").unlink(), r"no sae_weights.safetensors beside cfg.json"),
        (lambda f: [file.unlink() for file in f.iterdir()], r"no cfg.json, nor any other file of a format we read"),
        (lambda f: (f / "cfg.json").write_text("{"), r"cfg.json is not readable JSON"),
        (lambda f: (f / "cfg.json").write_text('{"d_in": 16}'), r"cfg.json has no d_sae"),
        (
            lambda f: (f / "cfg.json").write_text('{"d_in": 16, "d_sae": 64, "architecture": "odd"}'),
            r"sae_lens cannot load",
        ),
        (lambda f: (f / "sae_weights.safetensors").write_bytes(b"\x10" * 50), r"sae_weights.safetensors is corrupt"),
        (
            lambda f: (p := f / "sae_weights.safetensors").write_bytes(p.read_bytes()[:-9]),
            r"sae_weights.safetensors is corrupt",
        ),
        (edit(W_dec=lambda w: None), r"sae_weights.safetensors lacks W_dec"),
        (edit(b_enc=lambda w: None), r"sae_lens cannot load it .*b_enc"),
        (edit(W_enc=lambda w: torch.where(w > 0.8, torch.nan, w)), r"W_enc holds NaN or infinite"),
        (edit(b_dec=lambda w: w.index_fill(0, torch.tensor([3]), torch.inf)), r"b_dec holds NaN or infinite"),
        (edit(W_dec=torch.zeros_like), r"W_dec is all zero"),
        (edit(W_enc=lambda w: w[:, :60]), r"W_enc.*\[16, 60\]"),
        (edit(W_dec=lambda w: w.T), r"W_dec.*\[16, 64\]"),
    ],
)
def test_bad_folders_are_one_line(tmp_path: Path, damage: Damage, says: str) -> None:
    make_sae("standard").save_model(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError, match=says) as caught:
        load_dictionary(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_folder_below_is_named(tmp_path: Path) -> None:
    make_sae("standard").save_model(tmp_path / "final")
    with pytest.raises(InputError, match=r"give --sae .*final"):
        load_dictionary(tmp_path)


def test_transcoders_that_do_not_say_where_they_read_are_refused(tmp_path: Path) -> None:
    sae_class, config_class = SAE_CLASS_REGISTRY["transcoder"]
    sae_class(config_class(d_in=D, d_sae=M, d_out=D, apply_b_dec_to_input=False)).save_model(tmp_path)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"no hook_name and hook_name_out: say in it where"):
        load_dictionary(tmp_path)


def test_releases_without_a_network_are_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for spec, says in (
        ("gpt2-small-res-jb/blocks.8.hook_resid_pre", r"cannot be fetched from the hub .*go online"),
        ("gpt2-small-res-jb/blocks.99.hook_resid_pre", r"the release gpt2-small-res-jb has no 'blocks.99"),
        ("nobody/nothing/layer_1", r"cannot be fetched from the hub"),
        ("out/nothing", r"no such folder, and no SAELens release"),
        ("/out/nothing/there", r"no such folder"),
    ):
        with pytest.raises(InputError, match=says) as caught:
            load_dictionary(spec)
        assert "\n" not in str(caught.value)


def test_the_registry_knows_the_format() -> None:
    assert "saelens" in DICTIONARIES.names()
    with pytest.raises(InputError, match=r"unknown SAE format 'x': choose one of .*saelens"):
        DICTIONARIES.get("x")
