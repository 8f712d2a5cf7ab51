"""e2e_sae's checkpoints: by hand, by its own module where installed, several hook points in one file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary

from .checks import DAMAGES, D, M, activations, agrees, draw, edited, refuses

HOOKS = ("blocks.2.hook_resid_pre", "blocks.6.hook_resid_pre", "blocks.10.hook_resid_pre")


def state(*hooks: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for seed, hook in enumerate(hooks):
        prefix = hook.replace(".", "-")
        weights |= {
            f"{prefix}.encoder.0.weight": draw(M, D, seed=seed),
            f"{prefix}.encoder.0.bias": draw(M, seed=seed + 10),
            f"{prefix}.decoder.weight": draw(D, M, seed=seed + 20),
            f"{prefix}.decoder.bias": draw(D, seed=seed + 30),
        }
    return weights


def save(folder: Path, weights: dict[str, Tensor], samples: int = 400000) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(weights, folder / f"samples_{samples}.pt")
    (folder / "final_config.yaml").write_text("saes:\n  sae_positions:\n  - hook_resid_pre\n")
    return folder


def by_hand(seed: int, x: Tensor) -> tuple[Tensor, Tensor]:
    z = (x @ draw(M, D, seed=seed).T + draw(M, seed=seed + 10)).relu()
    columns = draw(D, M, seed=seed + 20)
    return z, z @ (columns / columns.norm(dim=0)).T + draw(D, seed=seed + 30)


def test_the_arithmetic_of_each_hook_point(tmp_path: Path) -> None:
    saved, x = save(tmp_path, state(*HOOKS)), activations()
    for seed, hook in enumerate(HOOKS):
        dictionary = load_dictionary(saved, hook=hook)
        agrees(dictionary, *by_hand(seed, x), x)
        assert (dictionary.hook, dictionary.format, dictionary.prepend_bos) == (hook, "e2e_sae/relu", False)
        assert hook_of(saved, hook) == hook
    assert hook_of(saved) is None
    refuses(saved, r"holds the dictionaries of 3 hook points; give --hook blocks.2.hook_resid_pre or blocks.6")
    refuses(saved, r"has none for blocks.3.hook_resid_pre; give --hook blocks.2", hook="blocks.3.hook_resid_pre")


def test_what_its_module_saves_and_gives(tmp_path: Path) -> None:
    library = pytest.importorskip("e2e_sae.models.sparsifiers")
    torch.manual_seed(0)
    sae = library.SAE(D, M)
    with torch.no_grad():
        sae.decoder.weight.mul_(3)
    saes = torch.nn.ModuleDict({"blocks-6-hook_resid_pre": sae})
    save(tmp_path, saes.state_dict())
    x = activations()
    x_hat, z = sae(x)
    agrees(load_dictionary(tmp_path), z.detach(), x_hat.detach(), x)


def test_the_last_checkpoint_is_read_unless_one_is_given(tmp_path: Path) -> None:
    save(tmp_path, state(HOOKS[1]), samples=90000)
    save(tmp_path, edited(state(HOOKS[1]), **{"blocks-6-hook_resid_pre__encoder__0__weight": lambda w: 2 * w}), 400000)
    x = activations()
    assert hook_of(tmp_path) == HOOKS[1]
    torch.testing.assert_close(load_dictionary(tmp_path / "samples_90000.pt").encode(x), by_hand(0, x)[0])
    assert load_dictionary(tmp_path).encode(x).sum() > 1.5 * by_hand(0, x)[0].sum()


@pytest.mark.parametrize("key", ["encoder.0.weight", "encoder.0.bias", "decoder.weight", "decoder.bias"])
@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_damaged_weights_are_one_line(tmp_path: Path, key: str, damage: int) -> None:
    change, says = DAMAGES[damage]
    changed = {f"blocks-2-hook_resid_pre.{key}".replace(".", "__"): change}
    refuses(save(tmp_path, edited(state(*HOOKS), **changed)), says.format(key=key), hook=HOOKS[0])


def test_bad_files_are_one_line(tmp_path: Path) -> None:
    refuses(save(tmp_path / "a", {}), r"its weights are empty")
    (tmp_path / "a" / "samples_400000.pt").write_bytes(b"no")
    refuses(tmp_path / "a", r"samples_400000.pt is corrupt")
    assert hook_of(tmp_path / "a") is None
