"""A model that a trainer holds: out of its wrappers, as a pair of base and adapted, onto disk, and left as it was."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from autointerp.errors import InputError

if TYPE_CHECKING:
    from autointerp.evidence.model_pair import ModelPair

Trained: TypeAlias = PeftModel | PreTrainedModel
"""What is trained: an adapter, or the whole model."""

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_SHARDED = ("device_mesh", "ds_id", "_is_flat_param")
"""What FSDP 2, DeepSpeed ZeRO-3 and FSDP 1 leave on a parameter of which this process has only a part."""


def bare(model: nn.Module) -> Trained:
    """The model inside whatever accelerate, DDP or torch.compile put around it.

    InputError where there is none, or where this process does not hold all of it.
    """
    while not isinstance(model, PeftModel | PreTrainedModel):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            raise InputError(f"a {type(model).__name__} is no PEFT and no transformers model: give the one inside it")
        model = inner
    if any(hasattr(weight, mark) for weight in model.parameters() for mark in _SHARDED):
        raise InputError("the weights are spread over processes: save the model and run autointerp label on its folder")
    return model


def device_and_dtype(model: Trained) -> tuple[str, str]:
    """Names of the device and the dtype that the model computes on, as the settings of a run have them."""
    weight = next(model.parameters())
    dtype = weight.dtype if weight.dtype in _DTYPES else getattr(model, "dtype", weight.dtype)
    if dtype not in _DTYPES:
        raise InputError(f"the model in memory is {dtype}: only {', '.join(_DTYPES.values())} can be compared")
    return str(weight.device), _DTYPES[dtype]


def pair_of(model: Trained, base: str | os.PathLike[str] | None, since: str | None = None) -> ModelPair:
    """Base and adapted. For a full fine-tune the base is loaded from `base`; weights that are equal are kept once.
    since: the name of an adapter in the model, which the base side carries."""
    from autointerp.evidence.loading import load_causal_lm
    from autointerp.evidence.model_pair import ModelPair, TwoModels

    if isinstance(model, PeftModel):
        return ModelPair.from_peft(model, since)
    _check_full(model, base, since)
    other = load_causal_lm(str(base), dtype=model.dtype, device=model.device)
    theirs = dict(model.named_parameters())
    for name, weight in other.named_parameters():
        if name in theirs and torch.equal(weight, theirs[name]):
            weight.data = theirs[name].data  # so that TwoModels finds nothing to replace in the user's model
    return TwoModels(other, model, "the model in memory")


def untrained_pair_of(model: Trained, base: str | os.PathLike[str] | None, since: str | None = None) -> ModelPair:
    """The pair before the training, for checks: both sides the same, what is going to be trained counted as changed."""
    from autointerp.evidence.loading import load_config
    from autointerp.evidence.model_pair import ModelPair, TwoModels

    if not isinstance(model, PeftModel):
        _check_full(model, base, since)
        load_config(str(base))
        return TwoModels(model, model)
    pair = ModelPair.from_peft(model, since)
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    pair.changed_modules = frozenset(name for name, module in pair.model.named_modules() if isinstance(module, kinds))
    return pair


def _check_full(model: PreTrainedModel, base: str | os.PathLike[str] | None, since: str | None) -> None:
    if since is not None:
        raise InputError(f"since {since!r}: the model in memory holds no adapters; leave since out")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError("the adapter was put in by add_adapter: use peft.get_peft_model, or save and label it later")
    if base is None:
        raise InputError(
            "no adapter: the whole model is trained; give base= to have its base loaded beside it, or save it and run"
            " autointerp label --run FOLDER --base BASE"
        )


def save(model: Trained, folder: Path, names: Sequence[str] | None = None) -> Path:
    """Writes the active adapters or those named, or the whole model where all of it is trained; the folder that the
    files are in."""
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder)
        return folder
    names = list(model.active_adapters if names is None else names)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        for stale in (*folder.glob(name), *folder.glob(f"*/{name}")):
            stale.unlink()  # of another training into the same run, whose adapters had other names
    model.save_pretrained(str(folder), selected_adapters=names)
    written = [folder if name == "default" else folder / name for name in names]
    for config in (adapter / "adapter_config.json" for adapter in written):
        content = json.loads(config.read_text())
        for key in ("target_modules", "exclude_modules"):
            if isinstance(content.get(key), list):  # a set, in any order: the same training is to give the same run
                content[key] = sorted(content[key])
        config.write_text(json.dumps(content, indent=2, sort_keys=True))
    return folder if len(written) > 1 else written[0]


def save_placeholder(folder: Path) -> Path:
    """The least that passes for an adapter on disk, to check the rest of a run before there is one."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    save_file({}, folder / "adapter_model.safetensors")
    return folder


@contextmanager
def undisturbed(model: Trained) -> Iterator[None]:
    """The generators of random numbers are put back, and what torch.compile made of the model in place is not run.

    Modes, requires_grad and adapters are the ModelPair's to put back, after each pass.
    """
    python, numpy = random.getstate(), np.random.get_state()
    cuda = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with ExitStack() as held:
        held.enter_context(torch.random.fork_rng(devices=cuda))
        if any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules()):
            held.enter_context(torch.compiler.set_stance("force_eager"))  # compiled blocks cannot be passed over
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
