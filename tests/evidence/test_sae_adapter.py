"""Adapters of autointerp.adapters: their maths by hand, on disk and back, inside a model, trained, and refused."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from sae_lens import SAE
from safetensors.torch import load_file, save_file
from torch import Tensor

from autointerp import adapters
from autointerp.errors import InputError
from autointerp.evidence import adapters as formats
from autointerp.evidence.paired import PairedModel
from tests import tiny
from tests.evidence.test_hooked import by_hand
from tests.evidence.test_paired import plainly
from tests.evidence.world import LATENTS, write_sae

HOOK = "blocks.2.hook_resid_post"
INPUTS, OUTPUTS = [1, 7, 40], [3, 5]


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    stream = 2 * torch.randn(200, tiny.WIDTH, generator=torch.Generator().manual_seed(5))
    return write_sae(tmp_path_factory.mktemp("sae") / "sae", stream, False, False)


def made(kind: str, sae, filled: bool = True) -> adapters.HookAdapter:
    dictionary = adapters.load_dictionary(sae)
    torch.manual_seed(0)
    adapter = {
        "bias": lambda: adapters.Bias(dictionary),
        "scaling": lambda: adapters.Scaling(dictionary),
        "ffnn": lambda: adapters.Ffnn(dictionary, hidden=4, activation="silu"),
        "low_rank": lambda: adapters.LowRank(dictionary, hidden=2),
        "sparse_linear": lambda: adapters.SparseLinear(dictionary, INPUTS, OUTPUTS),
        "residual": lambda: adapters.Residual(tiny.WIDTH, hidden=4, activation="gelu"),
    }[kind]()
    if filled:
        for weight in adapter.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return adapter


KINDS = ["bias", "scaling", "ffnn", "low_rank", "sparse_linear", "residual"]


def by_formula(kind: str, w: dict[str, Tensor], sae, x: Tensor) -> Tensor:
    """decode(z′) + (x − decode(z)) with sae_lens's own encode and decode."""
    if kind == "residual":
        return x + torch.nn.functional.gelu(x @ w["W_in"].T + w["b_in"]) @ w["W_out"].T
    theirs = SAE.load_from_disk(sae)
    z = theirs.encode(x)
    match kind:
        case "bias":
            new = z + w["bias"]
        case "scaling":
            new = z * (1 + w["scale"])
        case "ffnn":
            new = z + torch.nn.functional.silu(z @ w["W_in"].T + w["b_in"]) @ w["W_out"].T + w["b_out"]
        case "low_rank":
            new = z + z @ w["W_in"].T @ w["W_out"].T
        case _:
            square = torch.zeros(LATENTS, LATENTS)
            square[torch.tensor(OUTPUTS)[:, None], torch.tensor(INPUTS)] = w["weight"]
            new = z + z @ square.T
    return theirs.decode(new) + (x - theirs.decode(z))


@pytest.mark.parametrize("kind", KINDS)
def test_by_hand_on_disk_and_in_a_model(kind, sae, gpt2_base, tmp_path):
    adapter = made(kind, sae)
    adapters.save(adapter, tmp_path / "a", hook=HOOK, base=str(gpt2_base), sae=str(sae))
    weights = load_file(tmp_path / "a" / "sae_adapter.safetensors")
    assert all(weight.numel() < LATENTS**2 for weight in weights.values())
    found = formats.detect(tmp_path / "a")
    assert (found.name, found.base_of(tmp_path / "a")) == ("sae_adapter", str(gpt2_base))
    ids, plain = tiny.token_ids(), tiny.model("gpt2")
    for read in (HOOK, "blocks.3.hook_resid_post"):
        model = PairedModel.load(tmp_path / "a", gpt2_base, read, device="cpu")  # its SAE by the path that it names
        x_base, x_adapted = model.activations(ids)
        assert torch.equal(x_base, plainly(plain, model.hook.module_path, "output", ids))
        with torch.no_grad(), by_hand(plain, HOOK, lambda x: by_formula(kind, weights, sae, x)):
            assert torch.allclose(x_adapted, plainly(plain, model.hook.module_path, "output", ids), atol=2e-3)
        assert not torch.allclose(x_base, x_adapted, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_identity_and_learns(kind, sae, tmp_path):
    adapter, model, ids = made(kind, sae, filled=False), tiny.model("gpt2").requires_grad_(False), tiny.token_ids()
    assert not adapter.has_effect()
    plain = model(ids).logits
    with adapters.attached(model, adapter, HOOK):
        assert torch.equal(model(ids).logits, plain)
        optimizer = torch.optim.Adam(adapter.parameters(), lr=1e-2)
        losses = []
        for _ in range(15):
            loss = model(ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    assert adapter.has_effect()
    assert torch.equal(model(ids).logits, plain)


def test_the_proximal_step_makes_exact_zeros(sae):
    adapter = made("sparse_linear", sae)
    assert isinstance(adapter, adapters.SparseLinear)
    before = adapter.weight.detach().clone()
    adapter.shrink(0.2)
    assert torch.equal(adapter.weight == 0, before.abs() <= 0.2)
    kept = before.abs() > 0.2
    assert torch.allclose(adapter.weight[kept], (before - 0.2 * before.sign())[kept])


def test_refused_in_one_line(sae, gpt2_base, tmp_path):
    folder = adapters.save(made("bias", sae), tmp_path / "a", hook=HOOK, base=str(gpt2_base))
    other = write_sae(tmp_path / "other", torch.randn(50, tiny.WIDTH), True, False)
    dictionary = adapters.load_dictionary(sae)
    dictionary.W_dec = dictionary.W_dec.roll(1, 0)
    assert other.is_dir()
    refusals = {
        "another SAE": lambda: adapters.load(folder, dictionary),
        "choose one of": lambda: adapters.Residual(4, activation="sin"),
        "choose fewer": lambda: adapters.SparseLinear(dictionary, range(LATENTS), range(LATENTS)),
        "want 1 to the residual width": lambda: adapters.LowRank(dictionary, hidden=LATENTS),
        "want different ones": lambda: adapters.SparseLinear(dictionary, [1, 1], [2]),
    }
    for said, action in refusals.items():
        with pytest.raises(InputError, match=said):
            action()
    save_file({"bias": torch.full((LATENTS,), torch.nan)}, folder / "sae_adapter.safetensors")
    with pytest.raises(InputError, match="bias holds NaN"):
        formats.detect(folder)
    save_file({"bias": torch.ones(3)}, folder / "sae_adapter.safetensors")
    with pytest.raises(InputError, match=r"bias has shape \[3\]"):
        adapters.load(folder, adapters.load_dictionary(sae))
    (folder / "sae_adapter.json").write_text(json.dumps({"kind": "x", "hook": HOOK}))
    with pytest.raises(InputError, match="the kinds are"):
        adapters.load(folder, dictionary)
    (folder / "sae_adapter.safetensors").unlink()
    with pytest.raises(InputError, match=r"no sae_adapter\.safetensors"):
        formats.detect(folder)


def test_importing_autointerp_loads_no_torch():
    code = "import autointerp, sys; assert 'torch' not in sys.modules and 'autointerp.adapters' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
