"""One pass over the demo's corpus for all planted truths; one thread, since threads only wait for each other here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from autointerp.demo import ORGANISM
from autointerp.run import Run
from tests.planted.recording import Recording, record

TOKENS = 60_000


@pytest.fixture(scope="session")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recording]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    recorded = record(Run.load(ORGANISM, device="cpu"), TOKENS, tmp_path_factory.mktemp("spool"))
    yield recorded
    recorded.measured.spool.close()
    torch.set_num_threads(threads)
