"""What every reader must satisfy, whatever the format."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autointerp.errors import InputError
from autointerp.evidence.dictionaries import Dictionary, load_dictionary

D, M = 16, 64


def draw(*shape: int, seed: int = 0, scale: float = 0.3) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def activations(n: int = 200, d: int = D) -> Tensor:
    return 3 * torch.randn(n, d, generator=torch.Generator().manual_seed(1)) + 1


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def agrees(dictionary: Dictionary, z: Tensor, x_hat: Tensor, x: Tensor) -> None:
    """All four ways through the dictionary give z [n, m] and x_hat [n, d] for x [n, d]."""
    close(dictionary.encode(x), z)
    latents = torch.tensor([40, 3, 17])
    close(dictionary.encode_columns(x, latents), z[:, latents])
    active = dictionary.encode_active(x)
    assert torch.equal(active.token, active.token.sort().values)
    assert (active.value != 0).all()
    dense = torch.zeros_like(z).index_put((active.token, active.latent), active.value)
    close(dense, z)
    close(dictionary.decode(z), x_hat)
    close(z @ dictionary.W_dec + dictionary.b_dec, x_hat)
    assert 0.01 < (z != 0).float().mean() < 0.9
    assert dictionary.signed == bool((z < 0).any())
    assert (dictionary.d_in, dictionary.d_sae) == (x.shape[1], z.shape[1])
    assert not dictionary.encode(x).requires_grad


def refuses(spec: Path | str, says: str, *, hook: str | None = None) -> None:
    """InputError, one line that names the input."""
    with pytest.raises(InputError, match=says) as caught:
        load_dictionary(spec, hook=hook)
    assert "\n" not in str(caught.value)
    assert str(spec).partition("#")[0] in str(caught.value)


Change = Callable[[Tensor], Tensor | None]


def edited(weights: dict[str, Tensor], **changes: Change) -> dict[str, Tensor]:
    """`weights` with some changed, dots in names as `__`; None removes one."""
    changes = {key.replace("__", "."): change for key, change in changes.items()}
    assert set(changes) <= set(weights)
    result = {key: changes[key](value) if key in changes else value for key, value in weights.items()}
    return {key: value.contiguous() for key, value in result.items() if value is not None}


def nan(w: Tensor) -> Tensor:
    return torch.where(w == w.flatten()[3], torch.nan, w)


DAMAGES: list[tuple[Change, str]] = [
    (lambda _w: None, r"lack.* {key}"),
    (nan, r"{key} holds NaN or infinite weights; save it again"),
    (lambda w: w[:, 1:] if w.ndim == 2 else w[1:], r"{key} has shape|has shape .*, want"),
]
"""For one matrix or vector of a format: what to do to it, and what is said."""
