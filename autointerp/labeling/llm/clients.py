"""Clients of an SDK, each with a connection pool of its own for a few calls at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CALLS_EACH = 16
"""For every call a pool looks at each of its connections: a hundred of them cost more than all else that we do."""


class Clients:
    """As many clients as the calls in flight need. `make` takes an HTTP client (httpx2) and returns one of the SDK's.

    `http` is the SDK's own class of HTTP clients, so that its defaults and the environment's proxies hold.
    """

    def __init__(self, http: Callable[..., Any], make: Callable[[Any], Any]):
        import httpx2

        self._http = http
        self._make = make
        self._trusted = httpx2.create_ssl_context()  # reading the certificates is most of the work of making a client
        self._clients: list[Any] = []
        self._in_flight: list[int] = []

    @property
    def first(self) -> Any:
        """For what is asked seldom."""
        if not self._clients:
            self._add()
        return self._clients[0]

    @contextmanager
    def one(self) -> Iterator[Any]:
        """A client that has room for one more call, while that is in flight."""
        at = next((i for i, n in enumerate(self._in_flight) if n < CALLS_EACH), len(self._clients))
        if at == len(self._clients):
            self._add()
        self._in_flight[at] += 1
        try:
            yield self._clients[at]
        finally:
            self._in_flight[at] -= 1

    async def aclose(self) -> None:
        for client in self._clients:
            await client.close()

    def _add(self) -> None:
        self._clients.append(self._make(self._http(verify=self._trusted)))
        self._in_flight.append(0)
