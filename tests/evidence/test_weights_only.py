"""What weight changes write and read, by the model itself; invariance; planted truths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from autointerp.demo import ORGANISM
from autointerp.errors import InputError
from autointerp.evidence.adapters import detect
from autointerp.evidence.dictionaries import load_dictionary
from autointerp.evidence.directions import Directions, InMemory, open_directions
from autointerp.evidence.energy import Energy, _product_tail, relative, standardise, standardise_product
from autointerp.evidence.tensor_files import BaseWeights
from autointerp.evidence.weight_change import WeightChange, WeightChanges
from autointerp.evidence.weights_evidence import WeightsEvidence
from autointerp.evidence.weights_only import Streamer, WeightScores, read_weights, score, sum_up
from autointerp.evidence.wiring import Wiring
from autointerp.run import Run
from tests import tiny

WEIGHTS = "adapter_model.safetensors"


def dense(change: WeightChange) -> torch.Tensor:
    return change.left if change.right is None else change.left @ change.right


@pytest.mark.parametrize(
    ("family", "fused"), [("gpt2", "c_attn"), ("gpt_neox", "query_key_value"), ("llama", "v_proj")]
)
def test_values_write_what_the_model_writes(tmp_path: Path, family: str, fused: str) -> None:
    """In a sequence of one token all heads look at one place: the change of what attention adds is W_O ΔW_V times its
    input, whatever happens to queries and keys."""
    base = tiny.save_model(tmp_path / "base", family)
    adapter = tiny.save_lora(tmp_path / "lora", base, [1], [fused])
    weights = BaseWeights.at(str(base))
    assert weights
    streamer = Streamer(Wiring.of("blocks.1.hook_resid_post", weights.config), weights)
    (change,) = detect(adapter).weight_changes(adapter, weights)
    assert streamer.wiring.side(change.module) == "values"
    P = streamer.through_attention(change)
    assert P is not None
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval()
    seen: dict[str, torch.Tensor] = {}
    attention = model.get_base_model().get_submodule(change.module.rpartition(".")[0])
    attention.register_forward_hook(lambda _m, _a, output: seen.update(out=output[0]))
    attention.register_forward_pre_hook(
        lambda _m, args, kwargs: seen.update(x=args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    written, inputs = [], []
    for token in range(40):
        with torch.no_grad():
            model(torch.tensor([[token]]))
            adapted = seen["out"].flatten()
            with model.disable_adapter():
                model(torch.tensor([[token]]))
        written.append(adapted - seen["out"].flatten())
        inputs.append(seen["x"].flatten())
    V = change.singular.V.float()
    torch.testing.assert_close(torch.stack(written), torch.stack(inputs) @ V @ P.float().T, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_what_is_read_goes_through_the_norm(tmp_path: Path, family: str) -> None:
    """A module's input is moved along v: its change of output moves by ΔW γ⊙v, up to the norm's scale."""
    base = tiny.save_model(tmp_path / "base", family)
    leaf = tiny.LINEAR.get(family, ["", "up_proj"])[1]
    adapter = tiny.save_lora(tmp_path / "lora", base, [2], [leaf])
    weights = BaseWeights.at(str(base))
    assert weights
    streamer = Streamer(Wiring.of("blocks.1.hook_resid_post", weights.config), weights)
    (change,) = detect(adapter).weight_changes(adapter, weights)
    assert streamer.wiring.side(change.module) == "reads"
    P = streamer.read(change)
    model = AutoModelForCausalLM.from_pretrained(base)
    norm = model.get_submodule(str(streamer.wiring.norm_before(change.module)))
    draw = torch.Generator().manual_seed(0)
    for _ in range(4):
        x, v = torch.randn(2, tiny.WIDTH, generator=draw).double()
        scale = (x - x.mean() if family == "gpt2" else x).square().mean().sqrt()
        v = v - (v @ x / (x @ x)) * x if family != "gpt2" else v
        if family == "gpt2":  # off what moves the variance
            c = x - x.mean()
            v = v - (v @ c / (c @ c)) * c
        step = 1e-4
        moved = (norm.double()(x + step * v) - norm(x - step * v)) / (2 * step) * scale
        wanted = (dense(change).double() @ moved.detach()).norm()
        torch.testing.assert_close((P.double().T @ v).norm(), wanted, rtol=1e-3, atol=1e-5)


def test_sides_of_the_hook() -> None:
    config = AutoModelForCausalLM.from_pretrained(ORGANISM / "model").config
    at = {"hook_resid_pre": 2, "hook_resid_mid": 2, "hook_resid_post": 2, "hook_attn_out": 2, "hook_mlp_out": 2}
    sides = {
        point: {
            module: Wiring.of(f"blocks.{layer}.{point}", config).side(f"transformer.h.{module}")
            for module in (
                "1.mlp.c_proj",
                "2.attn.c_attn",
                "2.attn.c_proj",
                "2.mlp.c_fc",
                "2.mlp.c_proj",
                "3.attn.c_attn",
            )
        }
        for point, layer in at.items()
    }
    w, v, r, n = "writes", "values", "reads", None
    assert {point: list(found.values()) for point, found in sides.items()} == {
        "hook_resid_pre": [w, r, n, r, n, r],
        "hook_resid_mid": [w, v, w, r, n, r],
        "hook_resid_post": [w, v, w, n, w, r],
        "hook_attn_out": [n, v, w, r, n, r],
        "hook_mlp_out": [n, n, n, n, w, r],
    }
    for name in ("transformer.wte", "transformer.wpe"):
        assert Wiring.of("blocks.2.hook_resid_post", config).side(name) == "writes"
    assert Wiring.of("blocks.2.hook_resid_post", config).side("lm_head") == "reads"


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama", "gemma2"])
def test_without_a_config_sides_are_the_same(family: str) -> None:
    """Names alone say what a config says, save for what only weights could give."""
    model = tiny.model(family)
    modules = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    for hook in ("blocks.0.hook_resid_pre", "blocks.1.hook_resid_post"):
        known, guessed = Wiring.of(hook, model.config), Wiring.of(hook, None, modules)
        assert {m: known.side(m) for m in modules} == {m: guessed.side(m) for m in modules}
        assert known.layer_norm == guessed.layer_norm


# The statistic


@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_forms_depend_on_the_change_alone(seed: int, rank: int, n: int) -> None:
    """Factors re-gauged at random, changes in any order, thin or collapsed: one form, one ν."""
    draw = torch.Generator().manual_seed(seed)
    d, m = 12, 40
    V = torch.randn(d, m, generator=draw).double()
    forms = [Energy(d, torch.float64) for _ in range(3)]
    plain = torch.zeros(d, d).double()
    for _ in range(n):
        B, A = torch.randn(d, rank, generator=draw).double(), torch.randn(rank, 9, generator=draw).double()
        R = torch.randn(rank, rank, generator=draw).double() + 3 * torch.eye(rank)
        plain += B @ A @ A.T @ B.T
        forms[0].add(WeightChange("x", B, A).outputs)
        forms[1].add(WeightChange("x", B @ R, torch.linalg.solve(R, A)).outputs)
        forms[2].add(B @ A)
    for form in forms:
        torch.testing.assert_close(form(V), ((plain @ V) * V).sum(0))
        assert form.trace == pytest.approx(float(plain.trace()))
        share = torch.linalg.eigvalsh(plain).clamp_min(0) / plain.trace()
        assert form.degrees == pytest.approx(1 / float(share.square().sum()))


def test_a_random_adapter_selects_nothing() -> None:
    """ρ of directions that point anywhere has mean 1 and the variance that ν says; hardly ever does one stand out."""
    found = []
    for seed in range(20):
        draw = torch.Generator().manual_seed(seed)
        d, m, rank = 64, 4000, (1, 4, 64)[seed % 3]
        form = Energy(d)
        form.add(torch.randn(d, rank, generator=draw))
        V = torch.randn(d, m, generator=draw)
        rho = relative(form(V).numpy(), V.square().sum(0).numpy(), form.trace, d)
        assert rho.mean() == pytest.approx(1, abs=0.1)
        # Directions of norm 1, and so a little less spread than χ²: 2/ν but for what the sphere takes off.
        assert rho.var() == pytest.approx((2 * d / form.degrees - 2) / (d + 2), rel=0.2)
        found.append(int((standardise(rho).q <= 0.05).sum()))
    assert sum(n > 0 for n in found) <= 3


def test_standardising_knows_neither_scale_nor_the_dead() -> None:
    rng = np.random.default_rng(0)
    rho = rng.chisquare(9, 1000) / 9
    rho[3], rho[7] = 12.0, np.nan
    one, other = standardise(rho), standardise(250 * rho)
    np.testing.assert_allclose(one.z, other.z)
    assert one.q[3] < 0.01
    assert np.isnan(one.z[7])
    assert one.q[7] == 1
    assert (standardise(np.full(5, 2.0)).q == 1).all()


def test_products_of_factors_that_do_not_know_each_other() -> None:
    """Their tail is what is drawn; far out it goes on without a step and never is zero."""
    rng = np.random.default_rng(0)
    one, other = 3 * rng.standard_normal(10**6), 0.2 * rng.standard_normal(10**6)
    found = standardise_product(one, other)
    assert found.q.min() > 0.05
    for t in (0.5, 2.0, 5.0):
        assert (np.abs(one * other / 0.6) > t).mean() == pytest.approx(_product_tail(np.array(t)), rel=0.1)
    tail = _product_tail(np.array([19.99, 20.01, 500.0]))
    assert tail[1] == pytest.approx(tail[0], rel=0.05)
    assert 0 < tail[2] < 1e-200
    one[7], other[7] = 30, 2.0
    assert np.flatnonzero(standardise_product(one, other).q < 0.01).tolist() == [7]
    assert (standardise_product(np.zeros(5), np.ones(5)).q == 1).all()


# Planted truths on the demo's dictionary


def organism_run(adapter: Path, **flags: Any) -> Run:
    options = {"base": str(ORGANISM / "model"), "sae": str(ORGANISM / "sae")} | flags
    return Run.load(adapter, need=(), device="cpu", **options)


def planted_lora(folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> Path:
    """A LoRA folder for the demo's model: module → (B [out, r], A [r, in]), α = r."""
    folder.mkdir(exist_ok=True)
    config = json.loads((ORGANISM / "adapter" / "adapter_config.json").read_text())
    rank = max(len(A) for _, A in factors.values())
    config |= {"base_model_name_or_path": str(ORGANISM / "model"), "r": rank, "lora_alpha": rank}
    config |= {"layers_to_transform": None, "target_modules": list(factors)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for module, (B, A) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = B.float().contiguous()
    save_file(tensors, folder / WEIGHTS)
    return folder


def scores_of(run: Run, directions: Directions | None = None) -> WeightScores:
    directions = directions or open_directions(run.sae)
    change, streamer = read_weights(run, directions)
    return score(change, directions, streamer.wiring.layer_norm)


@pytest.fixture(scope="module")
def W_dec() -> torch.Tensor:
    return load_file(ORGANISM / "sae" / "sae_weights.safetensors")["W_dec"]


@pytest.mark.parametrize("seed", range(5))
def test_planted_writes_and_reads_come_first(tmp_path: Path, W_dec: torch.Tensor, seed: int) -> None:
    """B = chosen decoder rows before the hook, A = others behind it; both re-gauged at random."""
    draw = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(W_dec), generator=draw)
    written, read = chosen[:4], chosen[4:8]
    R = torch.randn(4, 4, generator=draw)
    unit = torch.nn.functional.normalize(W_dec, dim=1)
    centred = unit - unit.mean(1, keepdim=True)
    A, B = (
        torch.linalg.qr(torch.randn(512, 4, generator=draw))[0].T,
        torch.linalg.qr(torch.randn(512, 4, generator=draw))[0],
    )
    factors = {
        "transformer.h.1.mlp.c_proj": (unit[written].T @ R, torch.linalg.solve(R, A)),
        "transformer.h.3.mlp.c_fc": (B @ R, torch.linalg.solve(R, centred[read])),
    }
    run = organism_run(planted_lora(tmp_path / "lora", factors), top=8)
    selection, writes = WeightsEvidence.load(run).select()
    assert writes == []
    roles = dict(zip(selection.latents, selection.columns["role"][selection.latents], strict=True))
    first = {role: [j for j in selection.latents if roles[j] == role] for role in ("written", "read")}
    assert len(set(first["written"]) & set(written.tolist())) >= 3
    assert len(set(first["read"]) & set(read.tolist())) >= 3
    assert set(selection.latents[:4]) <= {*written.tolist(), *read.tolist()}


def test_ranks_do_not_change_when_the_factors_are_regauged(tmp_path: Path) -> None:
    """The demo's own adapter, R R⁻¹ put between the factors of every module, badly conditioned too."""
    tensors, draw = load_file(ORGANISM / "adapter" / WEIGHTS), torch.Generator().manual_seed(0)
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name in tensors:
        if ".lora_A." in name:
            A, B = tensors[name].double(), tensors[name.replace("lora_A", "lora_B")].double()
            R = torch.randn(8, 8, generator=draw).double() @ torch.diag(torch.logspace(-2, 2, 8).double())
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            factors[module] = (2 * B @ R, torch.linalg.solve(R, A))  # α = 2r in the demo's, r here
    one = scores_of(organism_run(ORGANISM / "adapter"))
    other = scores_of(organism_run(planted_lora(tmp_path / "lora", factors)))
    for field in ("statistic", "writes", "reads", "q_value"):
        before, after = getattr(one, field), getattr(other, field)
        np.testing.assert_allclose(before, after, rtol=2e-3, atol=1e-4)
        assert spearman(before, after) == pytest.approx(1, abs=1e-6)
    exact = [_statistic_in_double(factors), _statistic_in_double({m: (B @ Q, Q.T @ A) for m, (B, A) in factors.items()
             for Q in [torch.linalg.qr(torch.randn(8, 8, generator=draw).double())[0]]})]  # fmt: skip
    assert spearman(*exact) == 1.0


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.corrcoef(one.argsort().argsort(), other.argsort().argsort())[0, 1])


def _statistic_in_double(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> np.ndarray:
    """Written size of every latent, without the rounding of float32 files."""
    form = Energy(128, torch.float64)
    for module, (B, A) in factors.items():
        if module.endswith("c_proj"):
            form.add(WeightChange(module, B, A).outputs)
    W_enc = load_file(ORGANISM / "sae" / "sae_weights.safetensors")["W_enc"]
    return form(W_enc).numpy()


def test_on_disk_and_in_memory_are_the_same_directions() -> None:
    loaded, lazy = InMemory(load_dictionary(ORGANISM / "sae")), open_directions(str(ORGANISM / "sae"))
    assert (lazy.d, lazy.m, lazy.hook, lazy.format) == (loaded.d, loaded.m, loaded.hook, loaded.format)
    for blocks in ("encoder_blocks", "decoder_blocks"):
        for (at, one), (also, other) in zip(getattr(loaded, blocks)(), getattr(lazy, blocks)(), strict=True):
            assert at == also
            torch.testing.assert_close(one, other)
    torch.testing.assert_close(loaded.decoder_rows([5, 2]), lazy.decoder_rows([5, 2]))


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    """Only gates and queries below the hook: no weight says what they do. Values need W_O, and so the base."""
    one = torch.ones(384, 1), torch.ones(1, 128)
    fc = {"transformer.h.1.mlp.c_fc": (torch.ones(512, 1), torch.ones(1, 128))}
    with pytest.raises(InputError, match=r"nothing of it can be read.*1 × c_fc.*use --selector change"):
        scores_of(organism_run(planted_lora(tmp_path / "a", fc)))
    values = planted_lora(tmp_path / "b", {"transformer.h.1.attn.c_attn": one})
    assert np.isfinite(scores_of(organism_run(values)).writes).all()
    with pytest.raises(InputError, match="need W_O: give --base"):
        scores_of(replace(organism_run(values), base=None))
    narrow = planted_lora(tmp_path / "c", {"transformer.h.1.mlp.c_proj": (torch.ones(64, 1), torch.ones(1, 512))})
    with pytest.raises(InputError, match=r"the SAE has d_in 128, transformer.h.1.mlp.c_proj of the adapter is 64 wide"):
        scores_of(organism_run(narrow))


def test_changes_stream_and_can_be_gone_through_again(tmp_path: Path) -> None:
    run = organism_run(ORGANISM / "adapter")
    base = BaseWeights.at(run.base)
    changes = detect(ORGANISM / "adapter").weight_changes(ORGANISM / "adapter", base)
    assert isinstance(changes, WeightChanges)
    streamer = Streamer(Wiring.of(str(run.hook), base.config if base else None), base)
    one, again = sum_up(changes, streamer, 128), sum_up(changes, streamer, 128)
    assert one.used == again.used == {"writes": 4, "values": 2, "reads": 2}
    assert one.left_out == again.left_out
    assert one.writes.trace == again.writes.trace
