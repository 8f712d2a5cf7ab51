"""Configs, causal LMs and tokenizers from disk or the hub; whatever is wrong with them is said in one line.

Remote code is never run: an architecture that transformers does not know is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import logging as transformers_logging

from autointerp.errors import InputError
from autointerp.evidence.hub import snapshot
from autointerp.evidence.weight_files import check_header, first_line, not_finite, read_json

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """The dtype called float32, bfloat16 or float16."""
    if isinstance(name, torch.dtype):
        return name
    if name not in _DTYPES:
        raise InputError(f"dtype {name!r}: choose one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def torch_device(name: str | torch.device) -> torch.device:
    """A torch device; `auto` is a GPU where there is one."""
    if str(name) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without CUDA
        raise InputError(f"device {name}: not usable here ({first_line(error)}); give --device auto") from error
    return torch.device(name)


def load_config(spec: str | Path, option: str = "base") -> PretrainedConfig:
    """The config of the model at a path or hub id; no weights are read."""
    _check_folder(spec, option)
    with _one_line(f"{option} {spec}", f"give --{option} a folder written by save_pretrained, or a hub id"):
        return AutoConfig.from_pretrained(str(spec), trust_remote_code=False)


def load_causal_lm(
    spec: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    option: str = "base",
) -> PreTrainedModel:
    """The model at a path or hub id, in eval mode, without gradients. `option` is what error messages call it.

    InputError for a missing path, config or weight, a damaged file, weights not finite, and an unreachable hub.
    """
    dtype, device = torch_dtype(dtype), torch_device(device)
    _check_folder(spec, option)
    if Path(spec).is_dir():
        for file in sorted(Path(spec).glob("*.safetensors")):
            check_header(file, option)
    mend = f"give --{option} a causal language model written by save_pretrained, or its hub id"
    with _one_line(f"{option} {spec}", mend):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(spec), dtype=dtype, trust_remote_code=False, output_loading_info=True
        )
        model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{option} {spec}: no weights for {missing[0]} ({len(missing)} missing); save the whole model")
    model.requires_grad_(False).eval().to(device)
    check_finite(f"{option} {spec}", model.named_parameters())
    return model


def load_tokenizer(base: str | Path, adapter: str | Path | None = None) -> Tokenizer:
    """The base model's tokenizer, or the one beside the adapter where the base has none.

    Where only the adapter's tokenizer has a chat template, the base's takes it over.
    """
    beside = adapter is not None and _has_tokenizer(Path(adapter))
    if not beside or not Path(base).is_dir() or _has_tokenizer(Path(base)):
        tokenizer = _tokenizer(base)
        if beside and tokenizer.chat_template is None:
            tokenizer.chat_template = _tokenizer(str(adapter)).chat_template
        return tokenizer
    return _tokenizer(str(adapter))


def check_finite(name: str, weights: Iterable[tuple[str, Tensor]]) -> None:
    """InputError naming the first tensor that holds NaN or infinity."""
    for key, tensor in weights:
        if not tensor.is_floating_point():
            continue
        wide = tensor.detach() if tensor.element_size() > 1 else tensor.detach().float()  # float8 has no sum
        if not torch.isfinite(wide.sum(dtype=torch.float64)):
            raise not_finite(name, key)


def _tokenizer(spec: str | Path) -> Tokenizer:
    mend = "save it there with tokenizer.save_pretrained, or give --base a model that has one"
    if Path(spec).is_dir() and not _has_tokenizer(Path(spec)):
        raise InputError(f"no tokenizer in {spec}: {mend}")
    with _one_line(f"tokenizer of {spec}", mend):
        return AutoTokenizer.from_pretrained(str(spec), trust_remote_code=False)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def _check_folder(spec: str | Path, option: str) -> None:
    """A path must be a folder with a readable config.json; anything else, a hub id within reach."""
    folder = Path(spec)
    if not folder.exists():
        if folder.is_absolute() or str(spec).startswith(".") or len(folder.parts) > 2:
            raise InputError(f"{option} {spec}: no such folder; give --{option} an existing path, or a hub id")
        snapshot(str(spec), ("config.json",), option)
        return
    if folder.is_file():
        raise InputError(f"{option} {spec}: is a file; give the folder that holds config.json and the weights")
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(f"{option} {spec}: no config.json in it; give --{option} a folder written by save_pretrained")
    read_json(config, option)


@contextmanager
def _one_line(name: str, mend: str) -> Iterator[None]:
    """Turns the errors of a transformers loader into one InputError, and silences its bars and load reports."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{name}: cannot be loaded ({first_line(error)}); {mend}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
