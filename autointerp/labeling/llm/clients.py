"""The clients of an SDK, each with one connection for one call at a time."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from autointerp.labeling.llm.provider import from_sdk


class Clients:
    """As many clients of one SDK as there are calls in flight.

    One for all calls would look through all of its connections twice a call: a hundred of them cost more than all else
    that we do. `kind` names the class of the clients, `known` is what it is made with, `key` what nobody may read.
    """

    def __init__(self, sdk: str, kind: str, key: str, timeout_s: float, **known: Any):
        self._name = sdk
        self._kind = kind
        self._key = key
        self._timeout_s = timeout_s
        self._known = known
        self._sdk: Any = None
        self._trusted: Any = None
        self._all: list[Any] = []
        self._idle: list[Any] = []

    def load(self) -> None:
        """Import the SDK and read the certificates, which takes about a second, once."""
        if self._sdk is None:
            import httpx2

            self._sdk = importlib.import_module(self._name)
            self._trusted = httpx2.create_ssl_context()

    @property
    def shared(self) -> Any:
        """For what is asked seldom."""
        return self._all[0] if self._all else self._another()

    async def post(self, path: str, body: dict[str, Any], refusable: tuple[str, ...]) -> tuple[str, int]:
        """The text and the HTTP status of a good answer, within the deadline. Raises a Fault."""
        import httpx2

        try:
            # Not `create`: that walks through the whole body to convert it, and what we send is converted already.
            async with asyncio.timeout(self._timeout_s):
                with self._one() as client:
                    raw = await client.post(path, body=body, cast_to=httpx2.Response)
        except Exception as error:
            fault = self.fault(error, refusable)
        else:
            return raw.text, raw.status_code
        # Out here it carries no context: the SDK's exception holds the request, and the request the key.
        raise fault

    def fault(self, error: Exception, refusable: tuple[str, ...] = ()) -> Exception:
        """The Fault behind an exception of the SDK; see `from_sdk`."""
        self.load()
        return from_sdk(self._sdk, error, refusable, self._key)

    async def aclose(self) -> None:
        clients, self._all, self._idle = self._all, [], []
        for client in clients:
            await client.close()

    @contextmanager
    def _one(self) -> Iterator[Any]:
        """A client that nobody else uses meanwhile. Of the idle ones the last used: its connection is the freshest."""
        client = self._idle.pop() if self._idle else self._another()
        try:
            yield client
        finally:
            self._idle.append(client)

    def _another(self) -> Any:
        self.load()
        # The SDK's own class of HTTP clients, so that its defaults and the environment's proxies hold.
        http = self._sdk.DefaultAsyncHttpxClient(verify=self._trusted)
        client = getattr(self._sdk, self._kind)(**self._known, max_retries=0, timeout=self._timeout_s, http_client=http)
        self._all.append(client)
        return client
