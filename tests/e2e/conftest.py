"""One world and one finished store for the whole session; every test that damages something takes a copy."""

from __future__ import annotations

import pytest
import torch

from autointerp import cli

from .world import Shell, World, build


torch.set_num_threads(1)  # the models here are tiny: threads would only wait for each other


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a key nor an endpoint of the person who runs the tests."""
    for variable in (
        "OPENAI_API_KEY",
        "OPENAI_BASE_URL",
        "ANTHROPIC_API_KEY",
        "ANTHROPIC_AUTH_TOKEN",
        "ANTHROPIC_BASE_URL",
    ):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """GPT-2-like, labelled by `lexical`. Not to be written to."""
    made = build(tmp_path_factory.mktemp("world") / "gpt2")
    assert cli.run(made.args(quiet=True)) == 0
    return made
