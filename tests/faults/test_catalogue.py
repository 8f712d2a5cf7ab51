"""Each fault of the catalogue through a labeler: how the latent ends, after how many calls, at whose expense."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from .catalogue import PROVIDERS, TOO_LONG, Protocol, catalogue, meet, scene


@pytest.mark.parametrize(("protocol", "always"), [*((name, False) for name in PROVIDERS), ("chat", True)])
def test_every_fault_has_its_right_end(tmp_path: Path, protocol: Protocol, always: bool):
    async def run():
        async with scene(tmp_path, protocol) as b:
            for named in catalogue(protocol):
                if always and named.fault.breaks in ("hang", "drip"):
                    continue  # the deadline has been seen to work
                met = await meet(b, named, always)
                assert met.ends == (named.kind.always if always else named.kind.once), named.name
                attempts = [1, 1] if named.kind is TOO_LONG else list(range(1, met.ends.calls + 1))
                assert [call["attempt"] for call in met.calls] == attempts, named.name
                first = met.calls[0]
                assert first["status"] == named.kind.status, named.name
                if first["status"] == "error":
                    assert (first["http_status"], first["usd"]) == (named.fault.status, 0.0), named.name
                assert round(1e9 * met.usd) == round(1e9 * met.billed_usd), named.name
                assert met.unseen_usd <= met.usd_in_doubt, named.name
                assert (met.unseen_usd > 0) == (met.usd_in_doubt > 0), named.name
                assert "XYZZY" not in met.said + str(met.calls), named.name

    asyncio.run(run())
