"""ISaeRFT folders: written as its save_pretrained writes them, against sae_lens's own encode and decode."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sae_lens import SAE
from torch import Tensor, nn

from autointerp.errors import InputError
from autointerp.evidence import adapters
from autointerp.evidence.dictionaries import load_dictionary
from autointerp.evidence.paired import PairedModel
from tests import tiny
from tests.evidence.test_hooked import by_hand
from tests.evidence.test_paired import plainly
from tests.evidence.world import HOOK, LATENTS, write_sae

HIDDEN = 6
TARGETS = [["gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"]]


@pytest.fixture(scope="module")
def sae(tmp_path_factory):
    stream = 2 * torch.randn(200, tiny.WIDTH, generator=torch.Generator().manual_seed(5))
    return write_sae(tmp_path_factory.mktemp("sae") / "sae", stream, False, False)


class BiasOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(LATENTS))

    def forward(self, z: Tensor) -> Tensor:
        return self.bias


class ResidualBlock(nn.Module):
    """By the library's rule: −1 a bias, 0 one map; a ReLU between maps, but none behind the last hidden one."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        modules: list[nn.Module] = [BiasOnly()] if depth == -1 else []
        sizes = [LATENTS, *[HIDDEN] * depth, LATENTS]
        for i in range(depth + 1):
            modules += [nn.Linear(sizes[i], sizes[i + 1]), *([nn.ReLU()] if i < depth - 1 else [])]
        self.sequential = nn.Sequential(*modules)

    def forward(self, z: Tensor) -> Tensor:
        return self.sequential(z) + z


class Ia3(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scaling_factors = nn.Parameter(torch.zeros(LATENTS))

    def forward(self, z: Tensor) -> Tensor:
        return (self.scaling_factors + 1) * z


def block(kind: str) -> nn.Module:
    made = Ia3() if kind == "ia3" else ResidualBlock(int(kind))
    torch.manual_seed(0)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.3)
    return made.requires_grad_(False)


def saved(folder: Path, blocks: dict[str, nn.Module], targets: object = TARGETS, **config: object) -> Path:
    """As IsaerftPeft.save_pretrained does it; names are hooks with `_` for `.`."""
    folder.mkdir(parents=True)
    said = {"base_model_name_or_path": None, "depth": -1, "peft_type": "ISAERFT", "target_hooks": targets} | config
    (folder / "adapter_config.json").write_text(json.dumps(said))
    for name, module in blocks.items():
        torch.save(module.state_dict(), folder / f"{name}.pt")
    (folder / "blocks_manifest.json").write_text(json.dumps({"block_names": list(blocks)}))
    return folder


def loaded(folder: Path, base: Path, sae: Path) -> PairedModel:
    return PairedModel.load(folder, base, HOOK, device="cpu", sae=str(sae), dictionary=load_dictionary(sae))


@pytest.mark.parametrize("kind", ["-1", "0", "1", "2", "3", "ia3"])
def test_by_hand(kind, sae, gpt2_base, tmp_path):
    component = block(kind)
    folder = saved(tmp_path / "out", {"blocks_2_hook_resid_post": component})
    if kind == "3":  # maps 0, 2, 4, 5: two ReLUs, none before the last map
        assert {f"sequential.{n}.weight" for n in (0, 2, 4, 5)} < set(component.state_dict())
    found = adapters.detect(folder)
    assert (found.name, found.base_of(folder)) == ("isaerft", None)
    theirs, ids, plain = SAE.load_from_disk(sae), tiny.token_ids(), tiny.model("gpt2")

    def formula(x: Tensor) -> Tensor:
        z = theirs.encode(x)
        return theirs.decode(component(z)) + (x - theirs.decode(z))

    x_base, x_adapted = loaded(folder, gpt2_base, sae).activations(ids)
    with torch.no_grad(), by_hand(plain, HOOK, formula):
        assert torch.allclose(x_adapted, plainly(plain, "transformer.h.2", "output", ids), atol=2e-3)
    assert not torch.allclose(x_base, x_adapted, atol=1e-2)


def test_a_checkpoint_has_its_config_above_it(sae, gpt2_base, tmp_path):
    top = saved(tmp_path / "run", {}, base_model_name_or_path=str(gpt2_base))
    for step in (9, 10):
        folder = saved(top / f"checkpoint-{step}", {"blocks_2_hook_resid_post": block("-1")})
        (folder / "adapter_config.json").unlink()
        (folder / "blocks_manifest.json").unlink()
    torch.save({"state": {}}, folder / "optimizer.pt")
    found = adapters.detect(folder)
    assert (found.name, found.base_of(folder)) == ("isaerft", str(gpt2_base))
    assert loaded(folder, gpt2_base, sae).pair.first_changed_layer == 2
    (top / "blocks_manifest.json").unlink()
    with pytest.raises(InputError, match=r"give --adapter .*checkpoint-10$"):
        adapters.detect(top)


def test_which_sae_is_meant(sae, gpt2_base, tmp_path):
    """The run's own where it is of the hook and the size; else the listed ones, of which one must fit."""
    from autointerp.evidence.dictionaries.saelens import listed, listed_like

    assert listed_like(*TARGETS[0]) == ["/".join(TARGETS[0])]
    assert listed("/".join(TARGETS[0]))
    assert len(listed_like("gemma-scope-2b-pt-res", "layer_20/width_16k")) > 1  # both are only contained
    wide = {"blocks_1_hook_resid_post": block("-1")}
    for name, targets, said in [
        ("none", [["no-such-release", ""]], r"does not settle \(none\); give --sae"),
        ("several", [["gemma-scope-2b-pt-res", "layer_1/width_16k"]], r"does not settle \(gemma.*…\); give --sae"),
    ]:
        with pytest.raises(InputError, match=said):
            loaded(saved(tmp_path / name, wide, targets), gpt2_base, sae)


def test_refused_in_one_line(tmp_path):
    good = block("2").state_dict()
    name = "blocks_2_hook_resid_post"

    def refused(said: str, state: object, **changed: object) -> None:
        folder = saved(tmp_path / str(len(list(tmp_path.iterdir()))), {name: block("-1")}, **changed)  # pyright: ignore
        torch.save(state, folder / f"{name}.pt")
        with pytest.raises(InputError, match=said) as caught:
            adapters.detect(folder)
        assert "\n" not in str(caught.value)

    refused("sequential.3.bias is missing", {k: v for k, v in good.items() if k != "sequential.3.bias"})
    refused("sequential.0.lora is missing or none", good | {"sequential.0.lora": torch.ones(2)})
    refused("more than a ReLU", {k.replace("3", "7"): v for k, v in good.items()})
    refused("sequential.3.weight has shape", good | {"sequential.3.weight": torch.ones(LATENTS, 3)})
    refused(r"bias has shape \[2, 2\]", {"sequential.0.bias": torch.ones(2, 2)})
    refused("holds NaN", {"scaling_factors": torch.full((LATENTS,), torch.nan)})
    refused("want tensors by name", torch.ones(3))
    refused("sequential.0.bias is missing", {})
    refused("want pairs", good, targets=[["one"]])
    refused("of peft_type LORA", good, peft_type="LORA")
    folder = saved(tmp_path / "manifest", {name: block("-1")})
    (folder / f"{name}.pt").rename(folder / "blocks_3_hook_resid_post.pt")
    with pytest.raises(InputError, match=r"names blocks_2_hook_resid_post\.pt, which is missing"):
        adapters.detect(folder)
    with pytest.raises(InputError, match="not named after a hook point"):
        adapters.detect(saved(tmp_path / "odd", {"layer": block("-1")}))
