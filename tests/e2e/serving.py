"""The fault server in a thread of its own, for commands that bring their own event loop or process."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from ..faults.oracle import with_summaries
from ..faults.server import Fault, FaultServer, Respond, oracle

KEY = "sk-proj-secretXYZZY-0123456789"
MODELS = {"openai": "openai:gpt-6-luna", "anthropic": "anthropic:claude-haiku-5-5"}


class Serving:
    """`with Serving(plan) as server:` answers both protocols at `server.environment`."""

    def __init__(self, plan: Iterable[Fault | None] = (), *, respond: Respond = oracle, latency_s: float = 0.0):
        self.server = FaultServer(with_summaries(respond), plan, latency_s=latency_s)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake-server", daemon=True)

    def __enter__(self) -> Serving:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.server.__aenter__(), self._loop).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self.server.__aexit__(None, None, None), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def environment(self) -> dict[str, str]:
        """What points the SDKs here."""
        return {
            "OPENAI_API_KEY": KEY,
            "OPENAI_BASE_URL": f"{self.server.url}/v1",
            "ANTHROPIC_API_KEY": KEY,
            "ANTHROPIC_BASE_URL": self.server.url,
        }

    @property
    def requests(self) -> list[dict[str, Any]]:
        return self.server.requests

    def repeats(self) -> int:
        """Requests that were the same as an earlier one."""
        counted = Counter(json.dumps(request, sort_keys=True) for request in self.requests)
        return sum(counted.values()) - len(counted)
