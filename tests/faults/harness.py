"""What the fault tests share: an engine on a real store against the fault server, and planted evidence."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.batches import Patience
from autointerp.labeling.llm.engine import Engine
from autointerp.labeling.llm.limits import Limits
from autointerp.labeling.llm.provider import Request, make_provider
from autointerp.labeling.llm.sending import Retries
from autointerp.records import Context, LatentEvidence, Prediction, Split, Write
from autointerp.store import Store

from .server import Fault, FaultServer, Respond, oracle

KEY = "sk-proj-secretXYZZY"
MODELS = {"openai": "gpt-6-luna", "anthropic": "claude-haiku-5-5"}
SOON = Patience(
    linger_s=0.05, first_poll_s=0.01, longest_poll_s=0.02, grace_s=0.05, first_wait_s=0.002, longest_wait_s=0.01
)
QUICK = Retries(first_wait_s=0.002, longest_wait_s=0.02, total_s=60.0)


@dataclass
class Bench:
    server: FaultServer
    store: Store
    engine: Engine
    make: Callable[..., Engine]
    """(run id, settings that differ …) → another engine on the same store and server."""

    def calls(self) -> list[dict[str, Any]]:
        return self.store.read("SELECT * FROM calls ORDER BY started_at, attempt")

    def statuses(self) -> list[str]:
        return [call["status"] for call in self.calls()]


@asynccontextmanager
async def bench(
    folder: Path,
    plan: Iterable[Fault | None] = (),
    *,
    provider: str = "openai",
    respond: Respond = oracle,
    server: FaultServer | None = None,
    retries: Retries = QUICK,
    limits: Limits | None = None,
    model: str | None = None,
    run_id: str = "run",
    cached_tokens: int = 0,
    latency_s: float = 0.0,
    patience: Patience = SOON,
    **settings: Any,
) -> AsyncIterator[Bench]:
    """An engine with a fresh store in `folder` (or the one that is there), against `server` or a fresh one."""
    own = server or FaultServer(respond, plan, cached_tokens=cached_tokens, latency_s=latency_s)
    if server is None:
        await own.__aenter__()
    try:
        with pytest.MonkeyPatch.context() as patch, Store.open(folder / "store.duckdb") as store:
            patch.setenv("OPENAI_API_KEY", KEY)
            patch.setenv("ANTHROPIC_API_KEY", KEY)
            patch.setenv("OPENAI_BASE_URL", f"{own.url}/v1")
            patch.setenv("ANTHROPIC_BASE_URL", own.url)

            def make(run_id: str, **changed: Any) -> Engine:
                turned = LabelingSettings(run_id, **settings | changed)
                made = make_provider(provider, model or MODELS[provider], turned)
                return Engine(made, store, turned, retries=retries, limits=limits, patience=patience)

            engine = make(run_id)
            yield Bench(own, store, engine, make)
            await engine.aclose()
    finally:
        if server is None:
            await own.__aexit__(None, None, None)


def question(number: int = 0, max_output_tokens: int = 50) -> Request:
    """A small question; each number is another one."""
    schema = {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]}
    return Request("Answer with a word as JSON.", f"Question {number}", "word", schema, max_output_tokens, "hash")


def word(answer: dict[str, Any]) -> str:
    if not isinstance(answer.get("word"), str):
        raise ValueError("'word' must be a string")
    return answer["word"]


def says(text: str) -> Respond:
    return lambda system, user: text


CHILD = """
import asyncio, sys
from pathlib import Path
from faults.harness import question, word
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.batches import Patience
from autointerp.labeling.llm.engine import Engine
from autointerp.labeling.llm.provider import make_provider
from autointerp.store import Store

async def ask(engine, i):
    reply = await engine.ask(question(i), word, latent=i, purpose="label")
    print(i, reply.value, reply.stored, flush=True)

async def run():
    with Store.open(Path(sys.argv[1]) / "store.duckdb") as store:
        settings = LabelingSettings("run", concurrency=int(sys.argv[3]))
        engine = Engine(make_provider("openai", "gpt-6-luna", settings), store, settings)
        await asyncio.gather(*(ask(engine, i) for i in range(int(sys.argv[2]))))
        await engine.aclose()

asyncio.run(run())
"""


async def start_child(folder: Path, n: int, concurrency: int = 4) -> asyncio.subprocess.Process:
    """Another process that asks questions 0 … n−1 with the store in `folder`, and the endpoint of the environment."""
    tests = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        str(folder),
        str(n),
        str(concurrency),
        env=environment,
        stdout=asyncio.subprocess.PIPE,
    )


def planted(
    latent: int = 7, n: int = 12, word: str = "assert", text: str = "the run of the day is long"
) -> LatentEvidence:
    """A latent that fires on one word, with firing and silent contexts in both splits."""
    filler = text.split()
    contexts: list[Context] = []
    splits: tuple[Split, ...] = ("explain", "score")
    for split in splits:
        for i in range(n):
            for kind, own in (("quantile", [word]), ("silent", ["return"])):
                tokens = tuple(f" {t}" for t in [*filler, f"w{i}", *own, f"v{i}", *filler])
                peak = len(filler) + 1
                fires = tuple(float(i + 1) if kind == "quantile" and j == peak else 0.0 for j in range(len(tokens)))
                doc = 2 * i + (split == "score")
                contexts.append(
                    Context(latent, len(contexts), kind, i + 1, split, doc, len(contexts), tokens, fires, fires, peak)  # type: ignore[arg-type]
                )
    writes = (
        Write(latent, "promotes", None, "Equal", 0.4, 1),
        Write(latent, "raises", 812, None, 1.5, 1, "` assertEqual`, ` assert`"),
    )
    predictions = tuple(Prediction(latent, 0, side, 1, "Equal", 0.5) for side in ("base", "adapted"))  # type: ignore[arg-type]
    numbers = {"mean_base": 0.1, "mean_adapted": 0.2, "freq_base": 0.01, "freq_adapted": 0.02}
    return LatentEvidence(
        "run", latent, 1, "read", "live", 0.25, 1.0, **numbers, max_base=12.0, max_adapted=12.0, decoder=(),
        contexts=tuple(contexts), writes=writes, predictions=predictions,
    )  # fmt: skip
