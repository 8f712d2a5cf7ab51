"""One world and one finished store for the whole session; every test that damages something takes a copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from autointerp import cli

from .serving import Serving
from .world import Shell, World, build


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


@pytest.fixture(scope="package", autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are tiny: threads would only wait for each other."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capfd)


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[[Serving], None]:
    """Points the SDKs at a server."""

    def use(server: Serving) -> None:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)

    return use


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """GPT-2-like, labelled by `lexical`. Not to be written to."""
    made = build(tmp_path_factory.mktemp("world") / "gpt2")
    assert cli.run(made.args(quiet=True)) == 0
    return made
