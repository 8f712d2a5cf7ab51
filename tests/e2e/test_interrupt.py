"""Ctrl-C and kill −9: what was paid for is stored, the same command completes, nobody is asked twice."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from .kills import LABELER, PATIENCE_S, assert_asked_once, kill, labelling, wait_until
from .serving import Serving
from .world import Shell, World, read, save_corpus

K = 8


@pytest.fixture(scope="module")
def ready(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with the evidence of K latents, labelled by `lexical`."""
    from autointerp import cli

    copied = world.copy(tmp_path_factory.mktemp("interrupt") / "w")
    assert cli.run(copied.args(top=K, quiet=True)) == 0
    return copied


@pytest.fixture
def copied(ready: World, tmp_path: Path) -> World:
    return ready.copy(tmp_path / "w")


@pytest.mark.parametrize("when", [4, K + 6], ids=["labelling", "scoring"])
def test_ctrl_c_drains_and_the_same_command_goes_on(when: int, copied: World, shell: Shell, use: Any) -> None:
    with Serving(latency_s=0.05) as server:
        use(server)
        with labelling(copied, top=K, concurrency=2) as child:
            wait_until(lambda: len(server.requests) >= when or child.poll() is not None, "requests")
            # Meanwhile the store can be read, and not written by anybody else.
            meanwhile = shell(
                "query", "select count(*) as n from changed_latents", "--db", copied.db, "--format", "csv"
            )
            assert (meanwhile.status, meanwhile.out) == (0, f'"n"\n{K + 4}\n'), "the latents of both runs"
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=PATIENCE_S)
        n = len(server.requests)
        assert child.returncode == 130, err
        assert "Traceback" not in out + err
        assert when <= n < when + K
        calls = read(copied.db, "SELECT status, purpose, latent FROM calls")
        assert [call["status"] for call in calls] == ["ok"] * n, "what was under way was waited for"
        assert read(copied.db, "SELECT status FROM runs ORDER BY created_at DESC LIMIT 1") == [
            {"status": "interrupted"}
        ]
        labelled = {row["latent"] for row in read(copied.db, f"SELECT latent FROM labels WHERE labeler = '{LABELER}'")}
        assert labelled == {call["latent"] for call in calls if call["purpose"] == "label"}, "paid for, so stored"
        assert shell(*copied.args(labeler=LABELER, top=K)).status == 0
        assert server.repeats() == 0
        assert len(server.requests) == len(read(copied.db, "SELECT call_id FROM calls"))
    assert len(read(copied.db, f"SELECT 1 FROM labels WHERE labeler = '{LABELER}' AND status = 'ok'")) == K
    assert len(read(copied.db, "SELECT 1 FROM scores WHERE scorer = 'detection'")) == K


def test_kill_9_at_random_moments(copied: World, shell: Shell, use: Any) -> None:
    draw = random.Random(0)
    with Serving(latency_s=0.03) as server:
        use(server)
        kills = [kill(copied, server, draw, early, top=K, concurrency=3) for early in (False, True, False)]
        assert kills[-1].answers
        says = shell(*copied.args(labeler=LABELER, top=K))
        assert says.status == 0, says
        books = assert_asked_once(copied, server, kills)
        assert books.n_in_flight <= 3 * 3
    assert len(read(copied.db, f"SELECT 1 FROM labels WHERE labeler = '{LABELER}' AND status = 'ok'")) == K
    assert len(read(copied.db, "SELECT 1 FROM scores WHERE scorer = 'detection'")) == K
    assert sorted(file.name for file in copied.path.glob("store*")) == ["store.duckdb"]


@pytest.mark.parametrize("kind", ["new store", "store with another run"])
def test_ctrl_c_while_the_corpus_is_read(kind: str, world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    save_corpus(copied.corpus, n=3000)
    db = copied.db if kind == "store with another run" else tmp_path / "new.duckdb"
    before = read(db, "SELECT * FROM runs") if db.exists() else None

    def interrupt() -> None:
        wait_until(lambda: db.with_name(db.name + ".replica").exists(), "the store is opened")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    says = shell(*copied.args(db=db))
    thread.join()
    assert says.status == 130
    assert says.err.splitlines()[-1] == "autointerp: interrupted while reading the corpus: nothing was stored"
    if before is None:
        assert list(tmp_path.glob("new*")) == []
    else:
        assert read(db, "SELECT * FROM runs") == before
        assert read(db, "SELECT DISTINCT run_id FROM latents") == [{"run_id": before[0]["run_id"]}]
