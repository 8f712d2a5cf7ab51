"""Money, through the command line: who is asked about, how often, for how much, and what an ending leaves to do."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from autointerp.labeling.llm import batches
from autointerp.labeling.llm.prices import find_price
from autointerp.store import Store

from ..faults.server import Fault, error
from .serving import KEY, MODELS, Serving
from .world import Shell, World, read

K = 4


def questions(server: Serving, purpose: str) -> list[str]:
    """The user messages of one kind of question that arrived."""
    found = []
    for request in server.requests:
        system = str(request.get("system") or request["messages"][0]["content"])
        asked = "score" if '"fires"' in system else "summary" if '"sentences"' in system else "label"
        if asked == purpose:
            found.append(request["messages"][-1]["content"])
    return found


@pytest.fixture
def copied(world: World, tmp_path: Path) -> World:
    """A world whose evidence stands already, and is labelled by `lexical`."""
    return world.copy(tmp_path / "w")


@pytest.mark.parametrize("provider", MODELS)
def test_only_the_selected_are_asked_about_and_once(provider: str, copied: World, shell: Shell, use: Any) -> None:
    evidence = "SELECT * FROM contexts ORDER BY ALL"
    before = read(copied.db, evidence), read(copied.db, "SELECT created_at FROM runs")
    with Serving() as server:
        use(server)
        says = shell(*copied.args(labeler=MODELS[provider]))
        assert says.status == 0, says
        selected = {row["latent"] for row in read(copied.db, "SELECT latent FROM changed_latents")}
        calls = read(copied.db, "SELECT * FROM calls ORDER BY started_at")
        assert len(selected) == K
        assert {call["latent"] for call in calls if call["purpose"] != "summary"} == selected
        assert [call["status"] for call in calls] == ["ok"] * len(server.requests)
        assert sorted(call["latent"] for call in calls if call["purpose"] == "label") == sorted(selected)
        assert len(questions(server, "label")) == K
        assert len(questions(server, "score")) == len(calls) - K - 1 > 0
        assert len(questions(server, "summary")) == 1
        assert server.repeats() == 0
        bill, spent = server.server.bill, {name: sum(call[name] for call in calls) for name in ("usd", "input_tokens")}
        assert spent == {"usd": pytest.approx(bill.usd), "input_tokens": bill.input_tokens}
        assert {(call["provider"], call["model"]) for call in calls} == {tuple(MODELS[provider].split(":"))}
        labels = read(copied.db, "SELECT * FROM labels ORDER BY ALL")
        assert {row["labeler"] for row in read(copied.db, "SELECT labeler FROM changed_latents")} == {MODELS[provider]}

        n = len(server.requests)
        assert shell(*copied.args(labeler=MODELS[provider])).status == 0
        assert len(server.requests) == n
        assert read(copied.db, "SELECT * FROM labels ORDER BY ALL") == labels
    # The evidence that `lexical` was given served again: neither collected nor selected anew.
    assert (read(copied.db, evidence), read(copied.db, "SELECT created_at FROM runs")) == before
    assert KEY.encode() not in copied.db.read_bytes()


def test_a_second_labeler_and_a_further_scorer_ask_only_what_is_new(copied: World, shell: Shell, use: Any) -> None:
    with Serving() as server:
        use(server)
        for labeler in MODELS.values():
            assert shell(*copied.args(labeler=labeler, scorer="rule")).status == 0
        assert len(questions(server, "label")) == len(server.requests) - 2 == 2 * K
        assert shell(*copied.args(labeler=MODELS["openai"])).status == 0
        assert len(questions(server, "label")) == 2 * K
        scored = read(copied.db, "SELECT DISTINCT labeler, scorer FROM scores ORDER BY ALL")
        assert {"labeler": MODELS["openai"], "scorer": "detection"} in scored
        assert {"labeler": MODELS["anthropic"], "scorer": "detection"} not in scored
        assert shell(*copied.args()).status == 0, "lexical is done: nothing happens"
        n = len(server.requests)
        assert shell(*copied.args(labeler=MODELS["openai"])).status == 0
        assert len(server.requests) == n
    labelers = read(copied.db, "SELECT labeler, count(*) AS n FROM labels GROUP BY labeler ORDER BY labeler")
    assert labelers == [{"labeler": name, "n": K} for name in sorted([*MODELS.values(), "lexical"])]


def test_from_nothing_with_a_model_that_labels_while_contexts_are_collected(
    world: World, tmp_path: Path, shell: Shell, use: Any
) -> None:
    with Serving() as server:
        use(server)
        says = shell(*world.args(labeler=MODELS["openai"], db=tmp_path / "new.duckdb", json=True))
        assert says.status == 0
        assert says.err == ""
        summary = json.loads(says.out)
        assert {item["labeler"] for item in summary["latents"]} == {MODELS["openai"]}
        assert all(0 <= item["score"] <= 1 for item in summary["latents"])
        assert len(questions(server, "label")) == K
        assert server.repeats() == 0


def test_the_budget_is_kept_and_a_larger_one_goes_on(copied: World, shell: Shell, use: Any, tmp_path: Path) -> None:
    shutil.copy(copied.db, tmp_path / "free.duckdb")
    with Serving() as free:
        use(free)
        assert shell(*copied.args(labeler=MODELS["openai"], db=tmp_path / "free.duckdb")).status == 0
    with Serving() as server:
        use(server)
        says = shell(*copied.args(labeler=MODELS["openai"], max_usd=1e-7))
        assert says.status == 4
        assert server.requests == []
        assert "the same command with a larger --max-usd goes on from here" in " ".join(says.err.split())
        (dearest,) = read(tmp_path / "free.duckdb", "SELECT max(usd_estimated) AS usd FROM calls")
        cap = 1.5 * dearest["usd"]  # a call that might not fit is not made
        assert shell(*copied.args(labeler=MODELS["openai"], max_usd=cap)).status == 4
        assert 0 < server.server.bill.usd <= cap
        assert read(copied.db, "SELECT status FROM runs") == [{"status": "budget"}]
        assert shell(*copied.args(labeler=MODELS["openai"], max_usd=1)).status == 0
        assert len(server.requests) == len(free.requests)
        assert server.repeats() == 0
    assert read(copied.db, "SELECT status FROM runs") == [{"status": "done"}]


STOPS = {
    "wrong key": error(401, f"Incorrect API key provided: {KEY}", code="invalid_api_key"),
    "no quota": error(429, "You exceeded your current quota", code="insufficient_quota", kind="insufficient_quota"),
    "no credit": error(400, "Your credit balance is too low", kind="invalid_request_error"),
    "retired model": error(404, "The model does not exist", code="model_not_found"),
}


@pytest.mark.parametrize("case", STOPS)
def test_a_provider_that_stops_us_is_asked_once(case: str, copied: World, shell: Shell, use: Any) -> None:
    with Serving([STOPS[case]]) as server:
        use(server)
        says = shell(*copied.args(labeler=MODELS["anthropic"]))
        assert says.status == 5
        assert len(server.requests) == 1
        assert "takes no more questions" in says.err
        assert "Traceback" not in says.out + says.err
        assert KEY not in says.out + says.err
        for file in copied.path.glob("store*"):
            assert KEY.encode() not in file.read_bytes()
        shown = shell("show", "--db", copied.db)
        assert (shown.status, KEY in shown.out) == (0, False)
        assert shell(*copied.args(labeler=MODELS["anthropic"])).status == 0, "the mend was all that was missing"
        assert len(questions(server, "label")) == K + 1


def test_only_what_failed_is_asked_again(copied: World, shell: Shell, use: Any) -> None:
    plan = [None, error(400, "no such parameter"), Fault(finish="refusal", text="I would rather not")]
    with Serving(plan) as server:
        use(server)
        says = shell(*copied.args(labeler=MODELS["openai"], concurrency=1))
        assert says.status == 3
        labels = {row["latent"]: row for row in read(copied.db, "SELECT * FROM labels WHERE labeler <> 'lexical'")}
        statuses = sorted(label["status"] for label in labels.values())
        assert statuses == ["failed", "ok", "ok", "refused"]
        (failed,) = (latent for latent, label in labels.items() if label["status"] == "failed")
        assert labels[failed]["label"] is None
        assert "no such parameter" in labels[failed]["error"]
        scored = {row["latent"] for row in read(copied.db, "SELECT latent FROM scores WHERE scorer = 'detection'")}
        assert scored == {latent for latent, label in labels.items() if label["status"] == "ok"}
        n = len(questions(server, "label"))
        assert n == K
        says = shell(*copied.args(labeler=MODELS["openai"]))
        assert says.status == 3, "the refused one stays refused"
        again = questions(server, "label")[n:]
        assert len(again) == 1
        after = read(copied.db, f"SELECT status FROM labels WHERE labeler <> 'lexical' AND latent = {failed}")
        assert after == [{"status": "ok"}]
        rows = read(copied.db, "SELECT status, label FROM changed_latents WHERE status = 'refused'")
        assert rows == [{"status": "refused", "label": None}]


@pytest.mark.parametrize("provider", MODELS)
def test_a_dry_run_spends_nothing_and_brackets_the_bill(
    provider: str, copied: World, shell: Shell, use: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = copied.db.read_bytes()
    with Serving() as server:
        use(server)
        says = shell(*copied.args(labeler=MODELS[provider], dry_run=True, json=True))
        assert says.status == 0
        plan = json.loads(says.out)
        assert server.requests == []
        assert copied.db.read_bytes() == before
        assert shell(*copied.args(labeler=MODELS[provider])).status == 0
        assert plan["latents"] == K
        assert len(server.requests) <= plan["calls"], "a score is bought no further than it takes to decide"
        assert plan["usd_low"] <= server.server.bill.usd <= plan["usd_high"] < 8 * plan["usd_low"]
        left = json.loads(shell(*copied.args(labeler=MODELS[provider], dry_run=True, json=True)).out)
        assert (left["calls"], left["usd_high"]) == (0, 0)
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.delenv("OPENAI_BASE_URL")
    assert shell(*copied.args(labeler=MODELS["openai"], dry_run=True)).status == 0, "an estimate needs no key"


def test_a_dry_run_before_there_is_evidence(world: World, tmp_path: Path, shell: Shell, use: Any) -> None:
    db = tmp_path / "new" / "store.duckdb"
    with Serving() as server:
        use(server)
        plan = json.loads(shell(*world.args(labeler=MODELS["openai"], dry_run=True, json=True, db=db)).out)
        assert not db.parent.exists()
        assert server.requests == []
        assert shell(*world.args(labeler=MODELS["openai"], db=db)).status == 0
        assert plan["latents"] == K
        assert plan["usd_low"] <= server.server.bill.usd <= plan["usd_high"]
        assert len(server.requests) <= plan["calls"]
    says = shell(*world.args(dry_run=True, db=db))
    assert says.status == 0
    assert "0 calls to lexical" in says.out


def test_scores_that_are_missing_are_counted_in_a_dry_run_and_asked_for(copied: World, shell: Shell, use: Any) -> None:
    stop = error(401, "no")
    with Serving([None] * (K + 1) + [stop]) as server:
        use(server)
        assert shell(*copied.args(labeler=MODELS["openai"], concurrency=1)).status == 5
        assert len(questions(server, "label")) == K
        plan = json.loads(shell(*copied.args(labeler=MODELS["openai"], dry_run=True, json=True)).out)
        assert plan["latents"] == 0
        n = len(server.requests)
        assert shell(*copied.args(labeler=MODELS["openai"])).status == 0
        assert 0 < len(server.requests) - n <= plan["calls"]
        assert len(questions(server, "label")) == K


def test_known_features_cost_no_call(copied: World, shell: Shell, use: Any) -> None:
    """The latents of this world are tokens: named and scored without a request, and dry runs know it."""
    known = {row["latent"] for row in read(copied.db, "SELECT latent FROM ngrams WHERE length IS NOT NULL")}
    selected = {row["latent"] for row in read(copied.db, "SELECT latent FROM changed_latents")}
    assert known
    args = copied.args(labeler=MODELS["openai"], ask_all=None)
    with Serving() as server:
        use(server)
        plan = json.loads(shell(*args, "--dry-run", "--json").out)
        assert plan["latents"] == len(selected - known)
        says = shell(*args)
        assert says.status == 0, says
        assert len(questions(server, "label")) == len(selected - known)
        assert known.isdisjoint({row["latent"] for row in read(copied.db, "SELECT latent FROM calls")})
    rows = read(copied.db, "SELECT * FROM changed_latents WHERE status = 'known' AND labeler LIKE 'openai:%'")
    assert {row["latent"] for row in rows} == known
    for row in rows:
        (grams,) = read(copied.db, f"SELECT grams FROM ngrams WHERE latent = {row['latent']}")
        assert json.loads(grams["grams"])[0][-1].strip() in row["label"]
        assert row["scorer"] == "rule"
        assert row["score"] > 0.9


def test_dead_latents_are_not_labelled(copied: World, shell: Shell, use: Any) -> None:
    (first,) = read(copied.db, "SELECT latent FROM changed_latents WHERE rank = 1")
    with Store.open(copied.db) as store:
        store.execute("UPDATE latents SET state = 'dead' WHERE latent = ?", [first["latent"]])
    with Serving() as server:
        use(server)
        assert shell(*copied.args(labeler=MODELS["openai"])).status == 0
        assert len(questions(server, "label")) == K - 1
    assert read(copied.db, f"SELECT * FROM labels WHERE latent = {first['latent']} AND labeler <> 'lexical'") == []


@pytest.mark.parametrize("provider", MODELS)
def test_in_batches_the_same_labels_cost_half(
    provider: str, copied: World, shell: Shell, use: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = batches.Patience(linger_s=0.3, first_poll_s=0.02, longest_poll_s=0.05, grace_s=0.1)
    monkeypatch.setattr(batches, "PATIENCE", patience)
    (tmp_path / "one by one").mkdir()
    alone = tmp_path / "one by one" / "store.duckdb"
    shutil.copy(copied.db, alone)
    labels = "SELECT latent, label, explanation, effect, status FROM labels WHERE labeler <> 'lexical' ORDER BY latent"
    with Serving() as server:
        use(server)
        assert shell(*copied.args(labeler=MODELS[provider], db=alone)).status == 0
        one_by_one = len(server.requests)
    with Serving() as server:
        use(server)
        plan = json.loads(shell(*copied.args(labeler=MODELS[provider], batch=True, dry_run=True, json=True)).out)
        assert shell(*copied.args(labeler=MODELS[provider], batch=True)).status == 0
        n = len(server.requests)
        assert n <= 1.5 * one_by_one, "fewer looks, each of more examples"
        assert all("batch" in request for request in server.requests)
        labelled = [request["batch"] for request in server.requests][:K]
        assert set(labelled) == {"batch_0"}, "all labels in one"
        assert len(server.server.desk.jobs) <= 4, "labels, two of scores, the summary"
        bill, price = server.server.bill, find_price(MODELS[provider].split(":")[1])
        assert price is not None
        assert bill.usd == pytest.approx(price.usd(bill.input_tokens, bill.output_tokens) / 2)
        assert plan["usd_low"] <= bill.usd <= plan["usd_high"]
        spent = read(copied.db, "SELECT sum(usd) AS usd FROM calls")
        assert spent == [{"usd": pytest.approx(bill.usd)}]
        assert shell(*copied.args(labeler=MODELS[provider], batch=True)).status == 0
        assert len(server.requests) == n
    assert read(copied.db, labels) == read(alone, labels)
