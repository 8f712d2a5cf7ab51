"""A loopback server that speaks chat completions, responses, messages and both batch protocols, keeps its own bill, and
misbehaves by plan."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

from .batches import Desk
from .protocols import Said, question_of, render

Respond = Callable[[str, str], str]
"""(system prompt, last user message) → text of the answer."""


UNREAD = ("reset", "truncate", "hang", "drip", "refuse")
"""Ways to break after which the client has no whole answer."""


@dataclass(frozen=True)
class Fault:
    """What to do with one request instead of answering it well. Whatever ends with status 200 is charged for: on the
    bill proper if the client is told its usage, else on what it cannot see."""

    status: int = 200
    body: str | None = None
    """Replaces the whole body."""
    headers: dict[str, str] = field(default_factory=dict)
    text: str | None = None
    """Replaces the text of a well-formed answer."""
    finish: str = "stop"
    """stop | length | refusal | filter"""
    usage: bool = True
    delay_s: float = 0.0
    breaks: str = ""
    """`reset`: the connection closes without an answer; `truncate`: in the middle of it; `hang`: nothing comes;
    `drip`: a byte now and then, so that no read ever times out; `refuse`: it closes, and nobody listens for `delay_s`.
    Of a line of a batch: `expire`, `lose`, `twice`."""

    @property
    def tells_usage(self) -> bool:
        return self.usage and self.body is None and self.breaks not in UNREAD


def error(status: int, message: str, *, code: str = "", kind: str = "", **headers: str) -> Fault:
    """An error body that both SDKs understand."""
    body = json.dumps({"type": "error", "error": {"message": message, "type": kind, "code": code}})
    return Fault(status, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Bill:
    """Calls, tokens and dollars of the answers that went out whole, with their usage."""

    calls: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    unseen_usd: float = 0.0
    """Charged for work that the client cannot know the price of: its answer was lost, or came without usage."""

    @property
    def tokens(self) -> int:
        return self.input_tokens + self.output_tokens


class FaultServer:
    """`async with FaultServer(respond, plan) as server:` serves at `server.url` in the running loop.

    The n-th request meets the n-th entry of `plan` (None: a good answer); what comes after the plan is answered well.
    """

    def __init__(
        self,
        respond: Respond,
        plan: Iterable[Fault | None] = (),
        *,
        usd_per_mtok: tuple[float, float, float] = (0.10, 0.01, 0.50),
        cached_tokens: int = 0,
        latency_s: float = 0.0,
    ):
        self.respond = respond
        self.plan: deque[Fault | None] = deque(plan)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.bill = Bill()
        self.arrivals: list[tuple[float, int]] = []
        """(seconds on the monotonic clock, tokens on the bill) of each request, in the order in which they ended."""
        self.busiest = 0
        self.busy = 0
        self.choose: Callable[[], Fault | None] = lambda: self.plan.popleft() if self.plan else None
        """What the next request meets; by default the next of the plan."""
        self.logprobs: Callable[[str], list[dict[str, Any]]] | None = None
        """Tokens of an answer with their alternatives, for who asks for them; None: nobody is told."""
        self._prices = usd_per_mtok
        self._cached = cached_tokens
        self._latency_s = latency_s
        self.desk = Desk(self)
        self.batch_plan: deque[Fault | None] = deque()
        """What the next requests to batch and file endpoints meet."""
        self._server: asyncio.Server | None = None
        self._port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._idle: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> FaultServer:
        await self._listen()
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None):
        if self._server:
            self._server.close()
        for writer in list(self._open):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone, as clients do
        finally:
            self._open.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer. False when the connection is over."""
        self._idle.add(writer)
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        finally:
            self._idle.discard(writer)
        headers = {k.lower(): v for k, v in re.findall(r"^([^:\r\n]+): *([^\r\n]*)", head, re.MULTILINE)}
        raw = await self._body(reader, headers)
        if writer.transport.is_closing():
            return False  # we went away while this request came in: it was lost on its way, and is not charged for
        method, path = head.split(" ", 2)[:2]
        self.keys.append(headers.get("authorization", headers.get("x-api-key", "")))
        self.busy += 1
        self.busiest = max(self.busiest, self.busy)
        try:
            return await self._reply(reader, writer, method, path, raw)
        finally:
            self.busy -= 1

    async def _body(self, reader: asyncio.StreamReader, headers: dict[str, str]) -> bytes:
        if headers.get("transfer-encoding") != "chunked":
            return await reader.readexactly(int(headers.get("content-length", 0)))
        whole = b""
        while size := int(await reader.readline(), 16):
            whole += (await reader.readexactly(size + 2))[:-2]
        await reader.readline()
        return whole

    async def _reply(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, method: str, path: str, raw: bytes
    ) -> bool:
        if method != "POST" or re.search(r"/(batches|files)\b", path):
            fault = self.batch_plan.popleft() if self.batch_plan else None
            done = None if fault and not fault.breaks else self.desk.handle(method, path, raw)
            fault = fault or Fault(*(done or (404, "{}")))  # one that breaks does so when the work is done
        else:
            arrived, request = time.monotonic(), json.loads(raw)
            self.requests.append({"path": path, **request})
            fault = self.next_fault()
            await asyncio.sleep(self._latency_s + (0 if fault.breaks == "refuse" else fault.delay_s))
            before = self.bill.tokens
            if fault.body is None or fault.status == 200:
                answer = self.answer(path, request, fault)
                fault = fault if fault.body is not None else replace(fault, body=answer)
            self.arrivals.append((arrived, self.bill.tokens - before))
        if fault.breaks in ("reset", "hang", "refuse"):
            if fault.breaks == "hang":
                await reader.read()  # until the client has gone
            writer.transport.abort()
            if fault.breaks == "refuse":
                await self._stay_away(fault.delay_s)
            return False
        await self._write(writer, fault, (fault.body or "").encode())
        return not fault.breaks

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    async def _stay_away(self, seconds: float) -> None:
        """Nobody listens for a while, and connections that wait for a request are gone."""
        if self._server is None:
            return  # away already
        self._server.close()
        self._server = None
        for writer in list(self._idle):
            writer.transport.abort()
        await asyncio.sleep(seconds)
        await self._listen()

    def next_fault(self) -> Fault:
        return self.choose() or Fault()

    async def _write(self, writer: asyncio.StreamWriter, fault: Fault, body: bytes) -> None:
        headers = {"content-type": "application/json", "content-length": str(len(body)), **fault.headers}
        lines = [f"HTTP/1.1 {fault.status} X", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode())
        if fault.breaks == "drip":
            for byte in body:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.02)
        writer.write(body[: len(body) // 2] if fault.breaks == "truncate" else body)
        await writer.drain()

    def answer(self, path: str, request: dict[str, Any], fault: Fault, share: float = 1.0) -> str:
        """A well-formed answer in the protocol of `path`, on the bill at a `share` of the price."""
        system, user, read = question_of(path, request)
        text = fault.text if fault.text is not None else self.respond(system, user)
        wrote = len(text) // 4 + 1
        cached = min(self._cached, read)
        plain_usd, cached_usd, output_usd = self._prices
        usd = share * ((read - cached) * plain_usd + cached * cached_usd + wrote * output_usd) / 1e6
        if fault.tells_usage:
            self.bill.calls += 1
            self.bill.input_tokens += read
            self.bill.cached_tokens += cached
            self.bill.output_tokens += wrote
            self.bill.usd += usd
        else:
            self.bill.unseen_usd += usd
        told = self.logprobs(text) if self.logprobs and request.get("top_logprobs") else None
        said = Said(request["model"], text, fault.finish, read, cached, wrote, fault.usage, told)
        return json.dumps(render(path, said))


def over_the_limit(arrivals: Iterable[tuple[float, int]], limit: int, period_s: float) -> int:
    """Requests on whose arrival the `period_s` seconds up to it hold more than `limit`, whatever the entries count."""
    window: deque[tuple[float, int]] = deque()
    held = over = 0
    for at, n in sorted(arrivals):
        window.append((at, n))
        held += n
        while window[0][0] <= at - period_s:
            held -= window.popleft()[1]
        over += held > limit
    return over


def oracle(system: str, user: str) -> str:
    """Answers both kinds of question from the prompt alone: names the marked tokens, and looks for the named ones."""
    if '"fires"' in system:
        described = re.findall(r"`([^`]+)`", user.splitlines()[0])
        windows = re.findall(r"^\d+: (.*)$", user, re.MULTILINE)
        return json.dumps({"fires": [int(any(word in window for word in described)) for window in windows]})
    marked = sorted({m.strip() for line in user.splitlines() if line[:1] == "F" for m in re.findall("«([^»]*)»", line)})
    named = ", ".join(f"`{word}`" for word in marked[:5])
    answer = {"label": "these tokens", "explanation": f"Fires on {named}.", "effect": "Nothing stands out."}
    return json.dumps(answer)
