"""Many latents labelled and scored while the server misbehaves in every way: who meets what, and the audit."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from autointerp import cli
from autointerp.errors import ProviderError
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.labelers.llm import LLMLabeler
from autointerp.labeling.scorers.detection import DetectionScorer
from autointerp.labeling.work import FINISHED, Work, usable
from autointerp.progress import BarReporter
from autointerp.stopping import Stop
from autointerp.store import Store

from .harness import bench, planted
from .protocols import question_of
from .server import Fault, FaultServer

RUN = "run"


class Mixture:
    """Deals faults to questions. Each fault is met by `share` of the latents, once while they are labelled and once
    while their labels are scored; a latent may be dealt several, in any order."""

    def __init__(self, faults: Sequence[Fault], n_latents: int, share: float, seed: int):
        draw = random.Random(seed)
        self.left: dict[tuple[str, int], list[Fault]] = {}
        self.dealt = 0
        for purpose in ("label", "score"):
            for fault in faults:
                for latent in draw.sample(range(n_latents), round(share * n_latents)):
                    self.left.setdefault((purpose, latent), []).append(fault)
        for plan in self.left.values():
            draw.shuffle(plan)

    def meets(self, request: dict[str, Any]) -> Fault | None:
        """What this request meets: the next fault of its latent, which the windows name."""
        system, _, _ = question_of(request["path"], request)
        purpose = "score" if '"fires"' in system else "label"
        named = re.findall(r"zq(\d{4})", json.dumps(request))
        plan = self.left.get((purpose, int(named[-1]))) if named else None
        if not plan:
            return None
        self.dealt += 1
        return plan.pop()


def plant(store: Store, n_latents: int) -> None:
    """A run whose `n_latents` selected latents fire on a word each, ready to be labelled."""
    numbers = np.arange(n_latents)
    columns = {"latent": numbers, "rank": numbers + 1, "selected": np.ones(n_latents, bool)}
    store.upsert("runs", [{"run_id": RUN, "stage": "collect", "created_at": datetime.now(UTC)}])
    store.write_latents(RUN, columns)
    contexts = [c for latent in range(n_latents) for c in planted(latent, n=5, word=f"zq{latent:04}").contexts]
    store.upsert("contexts", [{"run_id": RUN, **asdict(context)} for context in contexts])
    store.flush()


async def label_all(folder: Path, server: FaultServer, provider: str, concurrency: int, deadline_s: float) -> int:
    """Labels and scores what is planted in `folder`, with the same command again whenever the provider stops it.
    Returns how many commands that took."""
    for n_commands in range(1, 10_000):
        async with AsyncExitStack() as held:
            b = await held.enter_async_context(
                bench(folder, provider=provider, server=server, concurrency=concurrency, timeout_s=deadline_s)
            )
            settings = LabelingSettings(RUN)
            labeler, reporter = LLMLabeler(b.engine, settings), held.enter_context(BarReporter())
            work = Work(b.store, RUN, labeler, [DetectionScorer(b.engine, settings)], 2 * concurrency, Stop(), reporter)
            try:
                await work.label(None)
                await work.score()
                return n_commands
            except ProviderError as stopped:
                reporter.say(str(stopped))
    raise RuntimeError("no end in sight")


class Audit(NamedTuple):
    """What the store says of the whole, beside what the server says. Dollars in billionths: each token's price is a
    whole number of them, so equal is equal."""

    states: Counter[str]
    """Of the labels; `none` where there is none."""
    unscored: int
    """Usable labels without a score."""
    n_missing: int
    """Examples asked about without a usable answer."""
    calls: Counter[str]
    """By status on the ledger."""
    arrived: int
    """Requests that the server received."""
    never_arrived: int
    """Calls that the ledger knows to have been refused a connection."""
    n_answered: tuple[int, int]
    """Answers with usage: on the ledger, on the bill."""
    nano_usd: tuple[int, int]
    """Settled: on the ledger, on the bill."""
    unseen_nano_usd: tuple[int, int]
    """In doubt on the ledger, charged by the server for what we could not see."""


def audit(db: Path, labeler: str, server: FaultServer) -> Audit:
    with Store.open(db, "read") as store:
        selected, labels = store.selected(RUN), store.labels(RUN, labeler)
        states = Counter(labels[j].status if j in labels else "none" for j in selected)
        (scores,) = store.read("SELECT count(DISTINCT latent) AS n, sum(n_missing) AS n_missing FROM scores")
        calls = store.read("SELECT * FROM calls")
    refused = [c for c in calls if c["status"] == "error" and c["http_status"] is None]
    settled = [c["usd"] for c in calls if c["usd"] is not None]
    in_doubt = [c["usd_estimated"] for c in calls if c["usd"] is None]
    return Audit(
        states,
        sum(usable(label) for label in labels.values()) - scores["n"],
        int(scores["n_missing"] or 0),
        Counter(c["status"] for c in calls),
        len(server.requests),
        len(refused),
        (sum(c["usd"] is not None and c["status"] in ("ok", "refused") for c in calls), server.bill.calls),
        (_nano(sum(settled)), _nano(server.bill.usd)),
        (_nano(sum(in_doubt)), _nano(server.bill.unseen_usd)),
    )


def assert_accounted_for(found: Audit, n_latents: int) -> None:
    """Every latent at its end, every request on the ledger, every dollar on both books."""
    assert set(found.states) <= {*FINISHED, "failed"}, found.states
    assert found.states.total() == n_latents
    assert found.unscored == 0
    assert "sent" not in found.calls
    assert found.calls.total() >= found.arrived + found.never_arrived, "each request that arrived is on the ledger"
    assert found.n_answered[0] == found.n_answered[1]
    assert found.nano_usd[0] == found.nano_usd[1]
    in_doubt, unseen = found.unseen_nano_usd
    assert unseen <= in_doubt, "what we could not see is covered by what we hold in doubt"


def everything_said(db: Path, folder: Path) -> str:
    """All that can be got out of a store: its tables, its bytes, the exports, the pages of `show` (on stdout)."""
    for format, name in (("jsonl", "labels.jsonl"), ("parquet", "tables")):
        assert cli.run(["export", "--db", str(db), "--format", format, "--out", str(folder / name)]) == 0
    assert cli.run(["show", "--db", str(db)]) == 0
    with Store.open(db, "read") as store:
        tables = [row["table_name"] for row in store.read("SELECT table_name FROM duckdb_tables()")]
        rows = "".join(str(store.read(f'SELECT * FROM "{table}"')) for table in tables)
    files = [db, *(file for file in sorted(folder.rglob("*")) if file.is_file())]
    return rows + "".join(file.read_bytes().decode("latin-1") for file in files)


def _nano(usd: float) -> int:
    return round(1e9 * usd)
