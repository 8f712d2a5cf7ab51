"""Several labelers: the second one as a fall-back, or as a second opinion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..faults.server import Fault, error
from .serving import MODELS, Serving
from .world import Shell, World, read

K = 4
BOTH: dict[str, Any] = {"labeler": [MODELS["openai"], MODELS["anthropic"]]}
LABELS = "SELECT labeler, status, count(*) AS n FROM labels WHERE labeler <> 'lexical' GROUP BY ALL ORDER BY ALL"
OPENAI, ANTHROPIC = MODELS["openai"], MODELS["anthropic"]


@pytest.fixture
def copied(world: World, tmp_path: Path) -> World:
    return world.copy(tmp_path / "w")


def asked(server: Serving) -> list[str]:
    return ["anthropic" if request["path"] == "/v1/messages" else "openai" for request in server.requests]


def test_a_fall_back_is_not_asked_while_the_first_answers(copied: World, shell: Shell, use: Any) -> None:
    with Serving() as server:
        use(server)
        assert shell(*copied.args(**BOTH)).status == 0
        assert set(asked(server)) == {"openai"}


def test_a_provider_that_stops_is_passed_over(copied: World, shell: Shell, use: Any) -> None:
    with Serving([error(401, "no such key")]) as server:
        use(server)
        says = shell(*copied.args(**BOTH))
        assert says.status == 0, says
        assert asked(server).count("openai") == 1
        assert "going on with the next labeler" in " ".join(says.err.split())
        assert read(copied.db, LABELS) == [{"labeler": ANTHROPIC, "status": "ok", "n": K}]
        assert len(read(copied.db, f"SELECT 1 FROM scores WHERE labeler = '{ANTHROPIC}'")) == K
        n = len(server.requests)
        assert shell(*copied.args(**BOTH)).status == 0
        assert asked(server)[n:].count("openai") > 0, "the first one again: it may be mended"
    assert read(copied.db, "SELECT status FROM runs") == [{"status": "done"}]


def test_only_what_the_first_left_open_goes_to_the_next(copied: World, shell: Shell, use: Any) -> None:
    plan = [None, error(400, "no such parameter"), Fault(finish="refusal", text="I would rather not")]
    with Serving(plan) as server:
        use(server)
        assert shell(*copied.args(concurrency=1, **BOTH)).status == 0
        expected = [(ANTHROPIC, "ok", 2), (OPENAI, "failed", 1), (OPENAI, "ok", 2), (OPENAI, "refused", 1)]
        assert [tuple(row.values()) for row in read(copied.db, LABELS)] == expected
        shown = read(copied.db, "SELECT labeler, status FROM changed_latents")
        assert {row["status"] for row in shown} == {"ok"}


def test_labels_whose_judge_has_gone_are_judged_by_the_fall_back(copied: World, shell: Shell, use: Any) -> None:
    with Serving([None] * K + [error(402, "pay first")]) as server:
        use(server)
        assert shell(*copied.args(concurrency=1, **BOTH)).status == 0
        assert read(copied.db, LABELS) == [{"labeler": OPENAI, "status": "ok", "n": K}]
        assert len(read(copied.db, f"SELECT 1 FROM scores WHERE labeler = '{OPENAI}'")) == K
        assert asked(server)[: K + 1] == ["openai"] * (K + 1)
        assert set(asked(server)[K + 1 :]) == {"anthropic"}


SUMMARIES = "SELECT labeler, status, sentences FROM summaries WHERE labeler <> 'lexical' ORDER BY created_at"


def at_the_summary(server: Serving, fault: Fault) -> Any:
    """What the next request meets: `fault` where OpenAI is asked for the summary, else a good answer."""

    def choose() -> Fault | None:
        request = server.requests[-1]
        asked_for = request["path"] != "/v1/messages" and '"sentences"' in request["messages"][0]["content"]
        return fault if asked_for else None

    return choose


@pytest.mark.parametrize(
    ("fault", "first"),
    [
        (error(402, "pay first"), []),
        (Fault(finish="refusal", text="I would rather not"), ["refused"]),
        (Fault(text='{"sentences": [{"text": "Invented.", "latents": [-1]}]}'), ["failed"]),
    ],
)
def test_the_summary_falls_back_too(copied: World, shell: Shell, use: Any, fault: Fault, first: list[str]) -> None:
    with Serving() as server:
        use(server)
        server.server.choose = at_the_summary(server, fault)
        says = shell(*copied.args(**BOTH))
        assert says.status == 0, says
        assert asked(server).count("anthropic") == 1, "the summary and nothing else"
        rows = read(copied.db, SUMMARIES)
        assert [(row["labeler"], row["status"]) for row in rows] == [
            *((OPENAI, status) for status in first),
            (ANTHROPIC, "ok"),
        ]
        n = len(server.requests)
        assert shell(*copied.args(**BOTH)).status == 0
        assert len(server.requests) == n, "it stands"


def test_one_summary_over_the_labels_of_all(copied: World, shell: Shell, use: Any) -> None:
    with Serving([None, error(400, "no such parameter")]) as server:
        use(server)
        assert shell(*copied.args(concurrency=1, **BOTH)).status == 0
        (row,) = read(copied.db, SUMMARIES)
        assert row["labeler"] == OPENAI
        cited = {latent for sentence in json.loads(row["sentences"]) for latent in sentence["latents"]}
        assert cited == {row["latent"] for row in read(copied.db, "SELECT latent FROM changed_latents")}


def test_both_stopped_is_stopped(copied: World, shell: Shell, use: Any) -> None:
    with Serving([error(401, "no")] * 2) as server:
        use(server)
        assert shell(*copied.args(**BOTH)).status == 5
        assert asked(server) == ["openai", "anthropic"]


def test_all_of_them_as_second_opinions(copied: World, shell: Shell, use: Any) -> None:
    with Serving() as server:
        use(server)
        words = copied.args(**BOTH)
        plan = json.loads(shell(*words, "--all", "--dry-run", "--json").out)
        assert shell(*words, "--all").status == 0
        rows = [tuple(row.values()) for row in read(copied.db, LABELS)]
        assert rows == [(ANTHROPIC, "ok", K), (OPENAI, "ok", K)]
        assert plan["calls"] >= len(server.requests) == len(read(copied.db, "SELECT 1 FROM calls"))
        assert plan["usd_low"] <= server.server.bill.usd <= plan["usd_high"]
        scores = read(copied.db, "SELECT labeler, count(*) AS n FROM scores WHERE scorer = 'detection' GROUP BY 1")
        assert sorted(row["n"] for row in scores) == [K, K]


def test_bad_lists(copied: World, shell: Shell, use: Any) -> None:
    with Serving() as server:
        use(server)
        says = shell(*copied.args(labeler=[OPENAI, OPENAI]))
        assert (says.status, "named twice" in says.err) == (2, True)
        says = shell(*copied.args(labeler=[OPENAI, "openia:x"]))
        assert (says.status, "unknown labeler" in says.err) == (2, True)
        assert server.requests == []
