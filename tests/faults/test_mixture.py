"""Latents labelled and scored through all faults at once: nothing is lost, and every dollar is on both books."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest

from autointerp.store import Store

from .catalogue import DOWN, PROVIDERS, STOP, Protocol, catalogue
from .harness import MODELS
from .mixture import Mixture, assert_accounted_for, audit, everything_said, label_all, plant
from .server import FaultServer, oracle

N, SHARE = 20, 0.05


@pytest.mark.parametrize("protocol", [name for name in PROVIDERS if name != "responses"])
def test_every_latent_ends_and_every_dollar_is_on_both_books(
    tmp_path: Path, protocol: Protocol, capfd: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.DEBUG)
    provider, faults = PROVIDERS[protocol], [*(named.fault for named in catalogue(protocol)), DOWN]
    n_stops = sum(named.kind is STOP for named in catalogue(protocol)) * round(SHARE * N)

    async def run() -> tuple[FaultServer, Mixture, int]:
        async with FaultServer(oracle, cached_tokens=3) as server:
            mixture = Mixture(faults, N, SHARE, seed=0)
            server.choose = lambda: mixture.meets(server.requests[-1])
            return server, mixture, await label_all(tmp_path, server, provider, concurrency=8, deadline_s=1.5)

    with Store.open(tmp_path / "store.duckdb") as store:
        plant(store, N)
    server, mixture, n_commands = asyncio.run(run())
    found = audit(tmp_path / "store.duckdb", f"{provider}:{MODELS[provider]}", server)
    assert_accounted_for(found, N)
    assert mixture.dealt > 0.8 * len(faults) * 2 * SHARE * N
    assert n_commands > n_stops / 2
    assert found.states["ok"] > 0.8 * N
    said = everything_said(tmp_path / "store.duckdb", tmp_path)
    assert "zq0000" in said
    assert "XYZZY" not in said + "".join(capfd.readouterr()) + caplog.text
