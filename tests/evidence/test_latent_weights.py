"""Adapters on latents and on the stream, read by their weights: planted truths, found however they are written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import spearmanr
from torch import Tensor

from autointerp import adapters
from autointerp.adapters.modules import KINDS
from autointerp.cli import cli
from autointerp.demo import ORGANISM
from autointerp.demo.dictionary import HOOK
from autointerp.errors import InputError
from autointerp.evidence import pullback
from autointerp.evidence.dictionaries import load_dictionary
from autointerp.evidence.gather import Evidence
from autointerp.evidence.latent_weights import LatentReading, linear_units, read_latents
from autointerp.evidence.weights_evidence import WeightSelection, WeightsEvidence
from autointerp.records import Unit, Write
from autointerp.run import Run

SAE = ORGANISM / "sae"
DICTIONARY = load_dictionary(SAE)
M, D = DICTIONARY.W_dec.shape
H = 6


def drawn(seed: int, n: int) -> list[int]:
    """Different latents."""
    return torch.randperm(M, generator=torch.Generator().manual_seed(seed))[:n].tolist()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def saved(
    adapter: adapters.HookAdapter, folder: Path, weights: Mapping[str, Tensor] | None = None, hook: str = HOOK
) -> Path:
    """The adapter with these weights, on disk."""
    with torch.no_grad():
        for name, weight in (weights or {}).items():
            getattr(adapter, name).copy_(weight)
    return adapters.save(adapter, folder, hook=hook, base=str(ORGANISM / "model"), sae=str(SAE))


def run_of(folder: Path, **flags: object) -> Run:
    return Run.load(folder, sae=SAE, selector="weights", need=(), **flags)


def selected(folder: Path) -> tuple[WeightSelection, list[Write], list[Unit]]:
    """What `autointerp select --selector weights` finds."""
    with WeightsEvidence.load(run_of(folder)) as evidence:
        return *evidence.select(), evidence.units()


def reading(folder: Path) -> LatentReading:
    return read_latents(run_of(folder), DICTIONARY)


def told(units: list[Unit]) -> list[tuple[str, int, int]]:
    """Units without their names and weights."""
    return [(unit.side, unit.latent, unit.rank) for unit in units]


def assert_same_ranks(one: Path, other: Path) -> None:
    """Every latent's size, on both sides, and every unit."""
    (a, _, a_units), (b, _, b_units) = selected(one), selected(other)
    for column in ("write_weight", "read_weight", "change"):
        x, y = a.columns[column], b.columns[column]
        assert np.array_equal(np.isnan(x), np.isnan(y))
        if np.isfinite(x).any():
            assert spearmanr(x, y, nan_policy="omit")[0] == pytest.approx(1.0, abs=1e-6)
    assert a.latents == b.latents
    assert told(a_units) == told(b_units)
    assert [u.weight for u in a_units] == pytest.approx([u.weight for u in b_units], rel=1e-3)


def planted_ffnn(seed: int) -> tuple[dict[str, Tensor], list[int], list[int], list[int]]:
    """Units of falling size; each reads a latent, raises one and lowers another. Weak noise everywhere."""
    latents = drawn(seed, 3 * H)
    read, raised, lowered = latents[:H], latents[H : 2 * H], latents[2 * H :]
    W_in, W_out = 0.01 * noise(H, M, seed=seed), 0.003 * noise(M, H, seed=seed + 1)
    units, size = torch.arange(H), 1 + 0.3 * torch.arange(H, 0, -1)
    W_in[units, read] = 2.0
    W_out[raised, units] = size
    W_out[lowered, units] = -0.7 * size
    return {"W_in": W_in, "b_in": 0.1 * noise(H), "W_out": W_out}, read, raised, lowered


@pytest.mark.parametrize("seed", range(5))
def test_planted_units_of_a_network(tmp_path: Path, seed: int) -> None:
    weights, read, raised, lowered = planted_ffnn(seed)
    folder = saved(adapters.Ffnn(DICTIONARY, H), tmp_path / "a", weights)
    selection, writes, units = selected(folder)
    assert set(selection.latents[: 3 * H]) == {*read, *raised, *lowered}
    roles = dict(zip(range(M), selection.columns["role"], strict=True))
    assert {roles[j] for j in read} == {"read"}
    assert {roles[j] for j in (*raised, *lowered)} == {"written"}
    assert writes == []  # what one latent leads to hangs on the others
    for place in range(H):  # the largest first
        rows = [unit for unit in units if unit.unit == place]
        reads, written = ([u for u in rows if u.side == side] for side in ("reads", "writes"))
        assert {u.name for u in rows} == {f"unit {place}"}
        assert (reads[0].latent, reads[0].weight > 0) == (read[place], True)
        assert [(u.latent, u.weight > 0) for u in written[:2]] == [(raised[place], True), (lowered[place], False)]


@pytest.mark.parametrize("activation", ["relu", "gelu", "tanh"])
def test_a_network_written_otherwise(tmp_path: Path, activation: str) -> None:
    """Units in another order; scaled, where the activation lets scales through; signs turned, where it is odd."""
    weights, *_ = planted_ffnn(0)
    order = torch.randperm(H, generator=torch.Generator().manual_seed(1))
    gauge = {"relu": noise(H).exp(), "gelu": torch.ones(H), "tanh": noise(H).sign()}[activation]
    other = {
        "W_in": (weights["W_in"] * gauge[:, None])[order],
        "b_in": (weights["b_in"] * gauge)[order],
        "W_out": (weights["W_out"] / gauge)[:, order],
    }
    module = adapters.Ffnn(DICTIONARY, H, activation)
    one = saved(module, tmp_path / "one", weights)
    x = 5 * noise(40, D) + DICTIONARY.b_dec
    before = module(x)
    two = saved(module, tmp_path / "two", other)
    torch.testing.assert_close(module(x), before, rtol=1e-4, atol=1e-3)  # the same function
    assert_same_ranks(one, two)


def planted_low_rank(seed: int) -> tuple[Tensor, Tensor, list[int], list[int]]:
    latents = drawn(seed, 6)
    read, written = latents[:3], latents[3:]
    down, up = 0.002 * noise(3, M, seed=seed), 0.002 * noise(M, 3, seed=seed + 1)
    down[torch.arange(3), read] = torch.tensor([3.0, 2, 1])
    up[written, torch.arange(3)] = 1.0
    return down, up, read, written


@pytest.mark.parametrize("seed", range(3))
def test_components_of_a_low_rank_map(tmp_path: Path, seed: int) -> None:
    down, up, read, written = planted_low_rank(seed)
    R = noise(3, 3, seed=seed) + 3 * torch.eye(3)
    one = saved(adapters.LowRank(DICTIONARY, 3), tmp_path / "one", {"W_in": down, "W_out": up})
    two = saved(
        adapters.LowRank(DICTIONARY, 3), tmp_path / "two", {"W_in": torch.linalg.solve(R, down), "W_out": up @ R}
    )
    assert_same_ranks(one, two)
    selection, writes, units = selected(two)
    assert set(selection.latents[:6]) == {*read, *written}
    for place in range(3):
        firsts = {u.side: u for u in units if (u.unit, u.rank) == (place, 1)}
        assert (firsts["reads"].latent, firsts["writes"].latent) == (read[place], written[place])
        assert firsts["reads"].weight > 0
        assert firsts["writes"].weight > 0
        (row,) = [w for w in writes if (w.latent, w.kind, w.rank) == (read[place], "raises", 1)]
        assert (row.target_latent, row.weight) == (written[place], pytest.approx(3.0 - place, rel=0.01))
    W = up @ down
    np.testing.assert_allclose(selection.columns["gain"], W.diagonal().numpy(), atol=1e-4)


def test_components_add_up_to_the_map() -> None:
    down, up, W_dec = noise(4, M), noise(M, 4, seed=1), DICTIONARY.W_dec
    reads, writes = linear_units(down, up, W_dec)
    torch.testing.assert_close((writes.T @ (writes @ W_dec @ W_dec.T @ writes.T).diagonal().diag()) @ reads,
                               up @ down, rtol=1e-3, atol=1e-2)  # fmt: skip
    written = writes @ W_dec
    torch.testing.assert_close(written @ written.T, torch.eye(4), rtol=1e-3, atol=1e-3)


def test_a_sparse_map_is_read_weight_by_weight(tmp_path: Path) -> None:
    latents = drawn(0, 70)
    inputs, outputs = latents[:40], latents[40:]
    weight = torch.zeros(30, 40)
    weight[3, 5], weight[4, 5], weight[7, 9] = 0.5, -0.25, 0.125
    adapter = adapters.SparseLinear(DICTIONARY, inputs, outputs)
    selection, writes, units = selected(saved(adapter, tmp_path / "a", {"weight": weight}))
    assert set(selection.latents) == {inputs[5], inputs[9], outputs[3], outputs[4], outputs[7]}
    assert selection.figures["n_pass"] == 5
    assert "3 of 1,200 weights" in str(selection.figures["notes"])
    assert {(w.latent, w.kind, w.target_latent, w.weight) for w in writes} == {
        (inputs[5], "raises", outputs[3], 0.5),
        (inputs[5], "lowers", outputs[4], -0.25),
        (inputs[9], "raises", outputs[7], 0.125),
    }
    assert units == []


def test_a_sparse_map_onto_itself_is_a_gain(tmp_path: Path) -> None:
    latents = drawn(2, 4)
    adapter = adapters.SparseLinear(DICTIONARY, latents, latents)
    selection, writes, _ = selected(
        saved(adapter, tmp_path / "a", {"weight": torch.diag(torch.tensor([0.5, -1, 0, 0]))})
    )
    assert set(selection.latents) == set(latents[:2])
    assert selection.columns["gain"][latents].tolist() == [0.5, -1.0, 0.0, 0.0]
    assert writes == []


def test_a_bias_under_null_space_noise(tmp_path: Path) -> None:
    W_dec, false = DICTIONARY.W_dec.double(), 0
    for seed in range(5):
        chosen = drawn(seed, 5)
        bias = torch.zeros(M, dtype=torch.float64)
        bias[chosen] = 1 / W_dec[chosen].norm(dim=1)
        rest = noise(M, seed=seed).double()
        rest -= torch.linalg.lstsq(W_dec.T, (rest @ W_dec)[:, None], driver="gelsd").solution[:, 0]
        bias += rest * 2 * bias.norm() / rest.norm()
        selection, *_ = selected(saved(adapters.Bias(DICTIONARY), tmp_path / str(seed), {"bias": bias.float()}))
        assert len({*selection.latents} & {*chosen}) >= 4
        false += len({*selection.latents} - {*chosen})
        assert {selection.columns["role"][j] for j in selection.latents} == {"static"}
        assert np.sum(selection.columns["static_share"]) == pytest.approx(1, abs=1e-3)
    assert false <= 2


def test_a_bias_at_random_selects_nothing(tmp_path: Path) -> None:
    """A share is a product, |b_i| times |⟨d_i, v⟩|: its tail is heavy without any cause."""
    found = [
        len(selected(saved(adapters.Bias(DICTIONARY), tmp_path / str(seed), {"bias": noise(M, seed=seed)}))[0].latents)
        for seed in range(10)
    ]
    assert sum(n > 0 for n in found) <= 2
    assert max(found) <= 2


def test_a_pattern_set_by_hand_needs_no_test(tmp_path: Path) -> None:
    chosen, scale = drawn(3, 4), torch.zeros(M)
    scale[chosen] = torch.tensor([-0.9, 0.5, 0.3, 0.3])
    selection, *_ = selected(saved(adapters.Scaling(DICTIONARY), tmp_path / "a", {"scale": scale}))
    assert selection.latents[:2] == chosen[:2]
    assert set(selection.latents) == set(chosen)
    assert selection.columns["gain"][chosen].tolist() == pytest.approx([-0.9, 0.5, 0.3, 0.3])


def planted_residual(seed: int) -> tuple[dict[str, Tensor], list[int], list[int]]:
    latents = drawn(seed, 2 * H)
    rows = torch.nn.functional.normalize(DICTIONARY.W_dec[latents], dim=1)
    size = 1 + 0.3 * torch.arange(H, 0, -1)
    weights = {"W_in": rows[:H].clone(), "b_in": 0.1 * noise(H), "W_out": -(rows[H:] * size[:, None]).T}
    return weights, latents[:H], latents[H:]


def test_a_residual_adapter_through_the_dictionary(tmp_path: Path) -> None:
    found = 0
    for seed in range(5):
        weights, read, written = planted_residual(seed)
        folder = saved(adapters.Residual(D, H), tmp_path / str(seed), weights)
        selection, _, units = selected(folder)
        found += len({*selection.latents} & {*read, *written})
        for place in range(H):
            firsts = {u.side: u for u in units if (u.unit, u.rank) == (place, 1)}
            assert firsts["reads"].weight > 0 > firsts["writes"].weight
            assert (firsts["reads"].latent, firsts["writes"].latent) == (read[place], written[place])
    assert found >= 0.75 * 5 * 2 * H  # the smallest of unequal units hide behind the dictionary's overlaps


def test_a_residual_adapter_written_otherwise(tmp_path: Path) -> None:
    weights, *_ = planted_residual(0)
    order, gauge = torch.randperm(H, generator=torch.Generator().manual_seed(1)), noise(H).exp()
    other = {
        "W_in": (weights["W_in"] * gauge[:, None])[order],
        "b_in": (weights["b_in"] * gauge)[order],
        "W_out": (weights["W_out"] / gauge)[:, order],
    }
    assert_same_ranks(
        saved(adapters.Residual(D, H), tmp_path / "one", weights),
        saved(adapters.Residual(D, H), tmp_path / "two", other),
    )


def test_the_terms_of_a_saved_residual_adapter_sum_to_its_pre_activation(tmp_path: Path) -> None:
    """Latents, constant and reconstruction error; the module itself runs behind a linear activation's place."""
    torch.manual_seed(0)
    folder = saved(adapters.Residual(D, H), tmp_path / "a", {"W_out": noise(D, H)})
    adapter = adapters.load(folder)
    assert isinstance(adapter, adapters.Residual)
    x = 5 * noise(50, D) + DICTIONARY.b_dec
    z = DICTIONARY.encode(x)
    terms = pullback.pre_activation(
        adapter.W_in, adapter.b_in, DICTIONARY.W_dec, DICTIONARY.b_dec, z, x - DICTIONARY.decode(z)
    )
    torch.testing.assert_close(torch.relu(terms.total) @ adapter.W_out.T, adapter.write(x), rtol=1e-4, atol=1e-2)
    on = int((terms.constant > 0).sum())
    assert f"{H} hidden units (relu), {on} of them driven where no latent fires" in reading(folder).note


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_selects_nothing_and_says_so(tmp_path: Path, kind: str) -> None:
    made = {
        "residual": lambda: adapters.Residual(D, H),
        "sparse_linear": lambda: adapters.SparseLinear(DICTIONARY, [1, 2], [3]),
    }
    adapter = made.get(kind, lambda: KINDS[kind](DICTIONARY))()  # pyright: ignore
    selection, writes, units = selected(saved(adapter, tmp_path / "a"))
    assert (selection.latents, selection.figures["n_pass"], writes, units) == ([], 0, [], [])
    assert "changes nothing" in str(selection.figures["notes"])


def test_another_place_or_another_dictionary(tmp_path: Path) -> None:
    elsewhere = saved(adapters.Residual(D, H), tmp_path / "a", {"W_out": noise(D, H)}, "blocks.1.hook_resid_post")
    with pytest.raises(InputError, match=r"acts at blocks\.1\.hook_resid_post"):
        WeightsEvidence.load(run_of(elsewhere))
    same = saved(adapters.Residual(D, H), tmp_path / "b", {"W_out": noise(D, H)}, "blocks.3.hook_resid_pre")
    for base in (ORGANISM / "model", "nobody/has-this"):
        assert WeightsEvidence.load(run_of(same, base=base)).select()[0].figures["n_pass"] is not None
    folder = saved(adapters.Bias(DICTIONARY), tmp_path / "c", {"bias": noise(M)})
    said = (folder / "sae_adapter.json").read_text()
    (folder / "sae_adapter.json").write_text(said.replace(str(float(M)), "77.0"))
    with pytest.raises(InputError, match="latents of another SAE"):
        WeightsEvidence.load(run_of(folder))


def test_by_command(tmp_path: Path) -> None:
    weights, read, raised, lowered = planted_ffnn(0)
    folder, db = saved(adapters.Ffnn(DICTIONARY, H), tmp_path / "a", weights), str(tmp_path / "s.duckdb")
    words = ["select", "--run", str(folder), "--sae", str(SAE), "--selector", "weights", "--db", db, "--quiet"]
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    shown = CliRunner().invoke(cli, ["show", "--units", "--db", db], catch_exceptions=False).output
    first = f"fires on latent {read[0]}; raises latent {raised[0]}, lowers latent {lowered[0]}"
    assert first in " ".join(shown.split())


def test_beside_a_corpus_a_scaling_counts_by_what_it_scales(tmp_path: Path) -> None:
    chosen, scale = drawn(3, 40), torch.zeros(M)
    scale[chosen] = 0.5
    folder = saved(adapters.Scaling(DICTIONARY), tmp_path / "a", {"scale": scale})
    run = run_of(folder, corpus=ORGANISM / "corpus.jsonl", max_tokens=2000, device="cpu", dtype="float32")
    with Evidence.load(run) as evidence:
        selection, _ = evidence.select(lambda _n: None)
        mean = selection.columns["mean_base"]
        assert evidence.units() == []
    fire = [j for j in chosen if mean[j] > 0]
    sizes = mean[fire] * DICTIONARY.W_dec[fire].norm(dim=1).numpy()
    assert selection.latents == [fire[at] for at in np.argsort(-sizes)]
    assert len(fire) < len(chosen)
