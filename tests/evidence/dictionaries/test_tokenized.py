"""Tokenized SAEs: top-k without ReLU, the lookup added back, k given; FVU counts the lookup, the change does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from autointerp.evidence.dictionaries import hook_of, load_dictionary
from autointerp.evidence.statistics import PairedCodes, StreamMoments
from autointerp.run import fingerprint

from .checks import DAMAGES, D, M, activations, close, draw, edited, refuses

VOCAB, K = 50, 40
LOOKUP = "lookup.W_lookup.weight"
STATE = {
    "W_enc": draw(M, D),
    "b_enc": draw(M, seed=2) - 0.5,
    "W_dec": draw(D, M, seed=3),
    "b_dec": draw(D, seed=4, scale=1.0),
    "lookup.W_original": draw(VOCAB, D, seed=5),
    LOOKUP: draw(VOCAB, D, seed=6, scale=2.0),
}


def save(path: Path, state: dict[str, Tensor] = STATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def by_hand(x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    pre = (x - STATE["b_dec"]) @ STATE["W_enc"].T + STATE["b_enc"]
    z = torch.where(pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K], pre, 0.0)
    return z, z @ STATE["W_dec"].T + STATE["b_dec"] + STATE[LOOKUP][tokens]


def test_the_arithmetic(tmp_path: Path) -> None:
    path, x = save(tmp_path / "gpt2_tokenized.pt"), activations()
    tokens = torch.arange(len(x)) % VOCAB
    z, x_hat = by_hand(x, tokens)
    assert (z < 0).any()
    for spec in (f"{path}#k={K}", f"{tmp_path}#k={K}"):
        dictionary = load_dictionary(spec)
        close(dictionary.encode(x), z)
        close(dictionary.encode_columns(x, torch.tensor([5, 60])), z[:, [5, 60]])
        active = dictionary.encode_active(x)
        close(torch.zeros_like(z).index_put((active.token, active.latent), active.value), z)
        close(dictionary.decode(z, tokens=tokens), x_hat)
        assert (dictionary.signed, dictionary.format, dictionary.hook) == (True, "tokenized/topk", None)
        assert dictionary.prepend_bos is hook_of(spec) is None
    with pytest.raises(ValueError, match="needs their ids"):
        dictionary.decode(z)


def test_without_a_lookup_it_is_a_plain_one(tmp_path: Path) -> None:
    plain = {key: value for key, value in STATE.items() if not key.startswith("lookup")}
    dictionary, x = load_dictionary(f"{save(tmp_path / 'open.pt', plain)}#k={K}"), activations()
    z = by_hand(x, torch.zeros(len(x), dtype=torch.long))[0]
    close(dictionary.decode(z), z @ STATE["W_dec"].T + STATE["b_dec"])


def test_the_lookup_counts_in_what_is_reconstructed_and_not_in_the_change(tmp_path: Path) -> None:
    dictionary = load_dictionary(f"{save(tmp_path / 'a.pt')}#k={K}")
    x, tokens = activations(), torch.arange(200) % VOCAB
    z_base, z_adapted = dictionary.encode(x), dictionary.encode(x + 0.3)
    zeros = np.zeros(len(x), np.int64)
    codes = PairedCodes(
        csr_matrix(z_base), csr_matrix(z_adapted), x.numpy(), (x + 0.3).numpy(), zeros, zeros, zeros,
        looked_up=STATE[LOOKUP][tokens].numpy(),
    )  # fmt: skip
    moments = StreamMoments.zero(D)
    moments.add(codes, dictionary.W_dec.numpy(), dictionary.b_dec.numpy())
    error = (x - dictionary.decode(z_base, tokens=tokens)).square().sum()
    assert moments.error_base == pytest.approx(float(error), rel=1e-5)
    change = (0.3 - (z_adapted - z_base) @ dictionary.W_dec).square().sum()
    assert moments.error_change == pytest.approx(float(change), rel=1e-4)


def test_what_is_said_is_part_of_which_dictionary_it_is(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt")
    prints = {fingerprint(f"{path}{said}", "sae") for said in ("", "#k=15", "#k=16")}
    assert len(prints) == 3


@pytest.mark.parametrize("key", ["W_enc", "b_enc", "W_dec", "b_dec", LOOKUP])
@pytest.mark.parametrize("damage", range(len(DAMAGES)))
def test_damaged_weights_are_one_line(tmp_path: Path, key: str, damage: int) -> None:
    if (key, damage) == (LOOKUP, 0):
        return
    change, says = DAMAGES[damage]
    refuses(f"{save(tmp_path / 'a.pt', edited(STATE, **{key.replace('.', '__'): change}))}#k=4", says.format(key=key))


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    path = save(tmp_path / "a.pt")
    refuses(path, r"does not store how many latents .*; give --sae .*a.pt#k=NUMBER")
    refuses(f"{path}#k=0", r"k=0 is no number; give --sae .*a.pt#k=NUMBER")
    refuses(f"{path}#k=many", r"k=many is no number")
    refuses(f"{path}#k=65", r"k=65, and it has 64 latents")
    refuses(f"{path}#layer=3", r"layer= means nothing here, this format takes k")
    path.write_bytes(b"no")
    refuses(f"{path}#k=3", r"a.pt is corrupt")
    torch.save({"a": 1}, path)
    refuses(f"{path}#k=3", r"holds no state dict of tensors")
