"""Tiny models on disk, made once; one thread, since on tensors this small threads only wait for each other."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def gpt2_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base") / "gpt2", "gpt2")


@pytest.fixture(scope="session")
def gpt2_lora(tmp_path_factory: pytest.TempPathFactory, gpt2_base: Path) -> Path:
    """A LoRA on layers 1 and 3 of `gpt2_base`."""
    return tiny.save_lora(tmp_path_factory.mktemp("adapter") / "lora", gpt2_base, [1, 3])
