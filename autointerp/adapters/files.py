"""`sae_adapter.json` and `sae_adapter.safetensors`: what the modules are saved as; how they are put into a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import PreTrainedModel

from autointerp.adapters.modules import KINDS, HookAdapter, Residual
from autointerp.errors import InputError
from autointerp.evidence.dictionaries import Dictionary

CONFIG, WEIGHTS = "sae_adapter.json", "sae_adapter.safetensors"


@contextmanager
def attached(model: PreTrainedModel, adapter: HookAdapter, hook: str) -> Iterator[None]:
    """The model with the adapter at `hook`; as it was, afterwards. Freeze the model yourself."""
    from autointerp.evidence.hooked import Insertion, inserted
    from autointerp.evidence.hookpoints import resolve

    with inserted(model, [Insertion(resolve(hook, model), adapter)]):
        yield


def save(
    adapter: HookAdapter, folder: str | Path, *, hook: str, base: str | None = None, sae: str | None = None
) -> Path:
    """Writes the adapter. `base` and `sae`: a hub id or release, or a path, best relative to the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = {"kind": adapter.kind, "hook": hook, "base": base, "sae": sae, "settings": adapter.settings()}
    if not isinstance(adapter, Residual):
        said["probe"] = probe(_dictionary_of(adapter))
    (folder / CONFIG).write_text(json.dumps(said, indent=2) + "\n")
    save_file({key: value.detach().cpu().contiguous() for key, value in adapter.state_dict().items()}, folder / WEIGHTS)
    return folder


def load(folder: str | Path, dictionary: Dictionary | None = None) -> HookAdapter:
    """The adapter in a folder, on the latents of `dictionary`, or of none; InputError, in one line, where they do not
    fit each other."""
    from autointerp.evidence.adapters.inserting import check_shape, read_state
    from autointerp.evidence.weight_files import read_json

    folder = Path(folder)
    said, state = read_json(folder / CONFIG, "adapter"), read_state(folder / WEIGHTS)
    kind, settings = KINDS.get(str(said.get("kind"))), said.get("settings", {})
    if kind is None:
        raise InputError(f"adapter {folder / CONFIG}: kind {said.get('kind')!r}; the kinds are {', '.join(KINDS)}")
    if kind is not Residual and (dictionary is None or not fits(said, dictionary)):
        raise InputError(f"adapter {folder}: was trained on the latents of another SAE; give --sae its own")
    try:
        adapter = kind(**settings) if kind is Residual else kind(dictionary, **settings)  # pyright: ignore
    except TypeError as error:
        raise InputError(f"adapter {folder / CONFIG}: settings {settings} are not those of a {kind.kind}") from error
    wanted = adapter.state_dict()
    for key in sorted(wanted.keys() ^ state.keys()):
        raise InputError(f"adapter {folder / WEIGHTS}: {key} is missing or not of a {kind.kind}; save it again")
    for key, tensor in wanted.items():
        check_shape(folder / WEIGHTS, key, state[key], tuple(tensor.shape), CONFIG)
    adapter.load_state_dict(state)
    return adapter.requires_grad_(False).eval()


def probe(dictionary: Dictionary) -> list[float]:
    """A few numbers by which an SAE is known again: its size, and entries of eight decoder rows."""
    m, d = dictionary.d_sae, dictionary.d_in
    rows = [i * m // 8 for i in range(8)]
    return [float(m), *(round(float(dictionary.W_dec[row, row % d]), 6) for row in rows)]


def fits(said: dict[str, Any], dictionary: Dictionary) -> bool:
    """Whether the dictionary is the one that the adapter was trained on; half precision is near enough."""
    theirs, ours = said.get("probe"), probe(dictionary)
    if not isinstance(theirs, list) or len(theirs) != len(ours):
        return False
    return all(abs(a - b) <= 1e-2 * abs(b) + 1e-4 for a, b in zip(theirs, ours, strict=True))


def _dictionary_of(adapter: HookAdapter) -> Dictionary:
    dictionary = vars(adapter)["dictionary"]
    assert isinstance(dictionary, Dictionary)
    return dictionary
