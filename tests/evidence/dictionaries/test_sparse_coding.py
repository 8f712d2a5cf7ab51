"""sparse_coding's pickles, written as its own classes pickle: by hand, by its library where there, no code run."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary

from .checks import DAMAGES, D, M, activations, agrees, draw, edited, refuses

ROTATION = torch.linalg.qr(draw(D, D, seed=9)).Q
FIELDS: dict[str, dict[str, Any]] = {
    "learned_dict.UntiedSAE": {"encoder": draw(M, D), "decoder": draw(M, D, seed=2), "encoder_bias": draw(M, seed=3)},
    "learned_dict.TiedSAE": {
        "encoder": draw(M, D),
        "encoder_bias": draw(M, seed=3),
        "norm_encoder": True,
        "center_trans": draw(D, seed=4, scale=1.0),
        "center_rot": ROTATION,
        "center_scale": 0.5 + draw(D, seed=5).abs(),
    },
    "topk_encoder.TopKLearnedDict": {"dict": draw(M, D), "sparsity": 7},
    "pca.PCAEncoder": {"pca_dict": draw(M, D), "sparsity": 7},
}


@pytest.fixture
def foreign() -> Iterator[dict[str, type]]:
    """Classes of the names that sparse_coding pickles, there while a file is written and gone when it is read."""
    made: dict[str, type] = {}
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "autoencoders"}
    sys.modules.setdefault("autoencoders", types.ModuleType("autoencoders"))
    for name in (*FIELDS, "learned_dict.ReverseSAE"):
        module, kind = name.split(".")
        holder = sys.modules.setdefault(f"autoencoders.{module}", types.ModuleType(f"autoencoders.{module}"))
        made[name] = type(kind, (), {"__module__": holder.__name__})
        setattr(holder, kind, made[name])
    yield made
    for name in [name for name in sys.modules if name.partition(".")[0] == "autoencoders"]:
        del sys.modules[name]
    sys.modules.update(before)


def save(path: Path, foreign: dict[str, type], *dicts: tuple[str, dict[str, Any]]) -> Path:
    """learned_dicts.pt as `big_sweep` saves it."""
    pairs = []
    for n, (name, fields) in enumerate(dicts):
        learned = foreign[name]()
        vars(learned).update(fields, n_feats=M, activation_size=D)
        pairs.append((learned, {"dict_size": M, "l1_alpha": 0.001 * (n + 1)}))
    path.mkdir(parents=True, exist_ok=True)
    torch.save(pairs, path / "learned_dicts.pt")
    return path


def by_hand(name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    f = FIELDS[name]
    unit = torch.nn.functional.normalize
    if name.endswith("UntiedSAE"):
        z = (x @ f["encoder"].T + f["encoder_bias"]).relu()
        return z, z @ unit(f["decoder"], dim=1)
    if name.endswith("TiedSAE"):
        centred = ((x - f["center_trans"]) @ f["center_rot"].T) * f["center_scale"]
        z = (centred @ unit(f["encoder"], dim=1).T + f["encoder_bias"]).relu()
        return z, (z @ unit(f["encoder"], dim=1) / f["center_scale"]) @ f["center_rot"] + f["center_trans"]
    rows = f["pca_dict" if "pca_dict" in f else "dict"]
    pre = x @ rows.T
    size = pre.abs() if "pca_dict" in f else pre
    z = torch.where(size >= size.sort(dim=1, descending=True).values[:, 6:7], pre, 0.0)
    z = z if "pca_dict" in f else z.relu()
    return z, z @ rows


@pytest.mark.parametrize("name", FIELDS)
def test_the_arithmetic(tmp_path: Path, foreign: dict[str, type], name: str) -> None:
    x = activations()
    saved = save(tmp_path, foreign, (name, FIELDS[name]))
    for spec in (saved, saved / "learned_dicts.pt", f"{saved}#index=0"):
        dictionary = load_dictionary(spec)
        agrees(dictionary, *by_hand(name, x), x)
        assert dictionary.format == f"sparse_coding/{name.split('.')[1]}"
    assert dictionary.hook is hook_of(saved) is None


def test_what_its_classes_pickle_and_give(tmp_path: Path) -> None:
    library = pytest.importorskip("autoencoders.learned_dict")
    f = FIELDS["learned_dict.TiedSAE"]
    centring = (f["center_trans"], f["center_rot"], f["center_scale"])
    tied = [library.TiedSAE(f["encoder"], f["encoder_bias"], centring, norm_encoder=norm) for norm in (True, False)]
    untied = library.UntiedSAE(f["encoder"], draw(M, D, seed=2), f["encoder_bias"])
    learned, x = [*tied, untied], activations()
    torch.save([(one, {"l1_alpha": 1e-3}) for one in learned], tmp_path / "learned_dicts.pt")
    for index, one in enumerate(learned):
        agrees(load_dictionary(f"{tmp_path}#index={index}"), one.encode(one.center(x)), one.predict(x), x)


def test_old_pickles_without_centring(tmp_path: Path, foreign: dict[str, type]) -> None:
    fields = {key: FIELDS["learned_dict.TiedSAE"][key] for key in ("encoder", "encoder_bias", "norm_encoder")}
    z = load_dictionary(save(tmp_path, foreign, ("learned_dict.TiedSAE", fields))).encode(activations())
    rows = torch.nn.functional.normalize(fields["encoder"], dim=1)
    torch.testing.assert_close(z, (activations() @ rows.T + fields["encoder_bias"]).relu(), rtol=1e-4, atol=1e-5)


def test_one_of_several_is_chosen_by_number(tmp_path: Path, foreign: dict[str, type]) -> None:
    saved, x = save(tmp_path, foreign, *FIELDS.items()), activations()
    for index, name in enumerate(FIELDS):
        torch.testing.assert_close(load_dictionary(f"{saved}#index={index}").encode(x), by_hand(name, x)[0])
    refuses(saved, r"holds 4 dictionaries \(0: dict_size 64, l1_alpha 0.001; 1: .*; give --sae .*#index=NUMBER")
    refuses(f"{saved}#index=4", r"holds 4 dictionaries, numbered from 0; there is no 4")
    refuses(f"{saved}#index=first", r"index=first is no number; give --sae .*#index=NUMBER")
    refuses(f"{saved}#k=4", r"k= means nothing here, this format takes index")


CASES = [
    (name, key, damage)
    for name, fields in FIELDS.items()
    for key, value in fields.items()
    for damage in range(len(DAMAGES))
    if isinstance(value, Tensor)
    and not (key.startswith("center_") and damage == 0)  # old pickles have none
    and not (key.endswith("dict") and damage == 2)  # it fits nothing but itself
]


@pytest.mark.parametrize(("name", "key", "damage"), CASES)
def test_damaged_weights_are_one_line(
    tmp_path: Path, foreign: dict[str, type], name: str, key: str, damage: int
) -> None:
    change, says = DAMAGES[damage]
    tensors = {k: v for k, v in FIELDS[name].items() if isinstance(v, Tensor)}
    fields = {k: v for k, v in FIELDS[name].items() if k not in tensors} | edited(tensors, **{key: change})
    refuses(save(tmp_path, foreign, (name, fields)), says.format(key=key if damage or "dict" not in key else "dict"))


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch EVIL",)


def test_foreign_pickles_are_one_line(
    tmp_path: Path, foreign: dict[str, type], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    allowed = torch.serialization.get_safe_globals()
    fields = FIELDS["learned_dict.TiedSAE"]
    refuses(save(tmp_path / "a", foreign, ("learned_dict.ReverseSAE", fields)), r"asks for autoencoders.*ReverseSAE")
    refuses(save(tmp_path / "b", foreign, ("learned_dict.TiedSAE", fields | {"x": Evil()})), r"asks for posix.system")
    refuses(save(tmp_path / "c", foreign), r"holds no list of learned dicts")
    torch.save({"encoder": draw(M, D)}, tmp_path / "c" / "learned_dicts.pt")
    refuses(tmp_path / "c", r"holds no list of learned dicts")
    zero = fields | {"center_scale": torch.zeros(D)}
    refuses(save(tmp_path / "d", foreign, ("learned_dict.TiedSAE", zero)), r"center_scale holds a zero")
    sparse = FIELDS["topk_encoder.TopKLearnedDict"] | {"sparsity": 65}
    refuses(save(tmp_path / "e", foreign, ("topk_encoder.TopKLearnedDict", sparse)), r"sparsity 65 and 64 latents")
    (tmp_path / "e" / "learned_dicts.pt").write_bytes(b"\x80\x02no")
    refuses(tmp_path / "e", r"is corrupt")
    assert not (tmp_path / "EVIL").exists()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)
