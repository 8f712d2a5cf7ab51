"""A training that left checkpoints, through the command line: the course is stored, shown, resumed and left out."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from autointerp import following, pipeline
from autointerp.evidence.gather import Evidence
from autointerp.store import Store
from tests import tiny
from tests.evidence.test_series import scaled

from .world import Shell, World, read, refused

STEPS = (100, 200, 300, 1000)
COURSE = "SELECT latent, checkpoint, step, round(gain, 5) AS gain, round(size, 5) AS size FROM course ORDER BY ALL"
LABELS = "SELECT latent, label, created_at FROM labels ORDER BY latent"


@pytest.fixture(scope="module")
def followed(world: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A copy of the world in which the training left checkpoints and is labelled. Not to be written to."""
    from autointerp import cli

    copied = world.copy(tmp_path_factory.mktemp("series") / "w")
    copied.db.unlink()
    for step in STEPS:
        scaled(world.adapter, copied.path / "out" / f"checkpoint-{step}", step / STEPS[-1])
    assert cli.run(copied.args(run=copied.path / "out", quiet=True)) == 0
    return copied


def test_every_latent_at_every_checkpoint(followed: World, world: World):
    rows = read(
        followed.db,
        "SELECT c.*, l.gain AS selected_gain, l.mean_base FROM course AS c JOIN latents AS l USING (run_id, latent)"
        " ORDER BY latent, step",
    )
    assert len(rows) == 4 * (1 + len(STEPS))
    for at in range(4):
        mine = rows[at * 5 : at * 5 + 5]
        assert [row["step"] for row in mine] == [0, *STEPS]
        assert [row["size"] for row in mine] == sorted(row["size"] for row in mine)
        assert mine[0]["size"] == mine[0]["gain"] == 0
        assert mine[0]["mean"] == pytest.approx(mine[0]["mean_base"])
        assert mine[-1]["cosine"] == pytest.approx(1)
        assert mine[-1]["gain"] == pytest.approx(mine[-1]["selected_gain"], rel=1e-4)
    figures = read(followed.db, "SELECT * FROM checkpoints ORDER BY step")
    assert [row["checkpoint"] for row in figures] == ["base", *(f"checkpoint-{step}" for step in STEPS)]
    assert figures[-1]["coverage"] == pytest.approx(read(followed.db, "SELECT coverage FROM runs")[0]["coverage"])
    ranked = "SELECT latent, rank, label FROM changed_latents ORDER BY rank"
    assert read(followed.db, ranked) == read(world.db, ranked), "selected on the last one"


def test_it_is_shown_and_exported(followed: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    says = shell("show", "--db", followed.db)
    assert says.out.count("▁") >= 4
    assert says.out.count("█ half by step ") == 4
    assert "4 checkpoints, step 100 → step 1,000 · coverage " in says.out
    assert max(map(len, says.out.splitlines())) <= 80
    latent = read(followed.db, "SELECT min(latent) AS latent FROM course")[0]["latent"]
    one = shell("show", latent, "--db", followed.db).out
    assert [line.split()[0] for line in one.splitlines() if line.startswith("checkpoint-")] == [
        f"checkpoint-{step}" for step in STEPS
    ]
    item = json.loads(shell("show", latent, "--json", "--db", followed.db).out)
    assert [row["step"] for row in item["course"]] == [0, *STEPS]
    assert shell("export", "--format", "parquet", "--out", tmp_path / "x", "--db", followed.db).status == 0
    assert pq.read_table(tmp_path / "x" / "course.parquet").num_rows == 20


def test_the_same_command_has_nothing_left_to_do(followed: World, shell: Shell, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(pipeline, "load_evidence", fail)
    found = json.loads(shell(*followed.args(run=followed.path / "out", json=True)).out)
    assert [row["step"] for row in found["checkpoints"]] == [0, *STEPS]


def test_a_checkpoint_alone_is_no_series(followed: World, shell: Shell, tmp_path: Path):
    db = tmp_path / "new.duckdb"
    assert shell(*followed.args("select", run=followed.path / "out" / "checkpoint-300", db=db)).status == 0
    assert read(db, "SELECT * FROM course") == []
    assert Path(read(db, "SELECT adapter FROM runs")[0]["adapter"]).name == "checkpoint-300"


def test_what_was_left_out_comes_later_and_labels_stay(
    followed: World, shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    db = tmp_path / "new.duckdb"
    command = followed.args(run=followed.path / "out", db=db)
    assert shell(*command, "--checkpoints", "0").status == 0
    assert read(db, "SELECT * FROM checkpoints") == []
    labels = read(db, LABELS)

    def fail(*_: object) -> None:
        raise AssertionError("selected again")

    monkeypatch.setattr(Evidence, "select", fail)
    assert shell(*command, "--checkpoints", "2").status == 0
    assert [row["step"] for row in read(db, "SELECT step FROM checkpoints ORDER BY step")] == [0, 100, 1000]
    assert shell(*command).status == 0
    assert read(db, COURSE) == read(followed.db, COURSE)
    assert read(db, LABELS) == labels


DIES = """
import os, signal, sys
from autointerp import cli, following

real = following._read
read = []

def dying(evidence, checkpoint, *others):
    read.append(checkpoint)
    if len(read) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(evidence, checkpoint, *others)

following._read = dying
cli.run(sys.argv[1:])
"""
"""The command, which is killed while it reads its third checkpoint."""


@pytest.mark.parametrize("labelled", [False, True], ids=["before the labels", "after the labels"])
def test_kill_9_between_checkpoints(labelled: bool, followed: World, tmp_path: Path, shell: Shell):
    db = tmp_path / "new.duckdb"
    command = followed.args(run=followed.path / "out", db=db)
    if labelled:
        assert shell(*command, "--checkpoints", "0").status == 0
    labels = read(db, LABELS) if labelled else []
    died = subprocess.run([sys.executable, "-c", DIES, *command], capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr
    before = read(db, "SELECT * FROM checkpoints ORDER BY step")
    assert [row["step"] for row in before] == [0, 100, 200]
    assert shell(*command).status == 0
    assert read(db, "SELECT * FROM checkpoints ORDER BY step")[:3] == before
    assert read(db, COURSE) == read(followed.db, COURSE)
    assert read(db, "SELECT status FROM runs") == [{"status": "done"}]
    assert len(read(db, LABELS)) == 4
    if labelled:
        assert read(db, LABELS) == labels


def test_ctrl_c_between_checkpoints(followed: World, tmp_path: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch):
    db = tmp_path / "new.duckdb"
    command = followed.args("select", run=followed.path / "out", db=db)
    real = following._read

    def interrupted(*given: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(following, "_read", interrupted)
        assert shell(*command).status == 130
    assert read(db, "SELECT status, stage FROM runs") == [{"status": "interrupted", "stage": "select"}]
    assert len(read(db, "SELECT * FROM checkpoints")) < 5
    assert shell(*command).status == 0
    assert read(db, "SELECT status, stage FROM runs") == [{"status": "done", "stage": "select"}]
    assert read(db, COURSE) == read(followed.db, COURSE)


def test_another_selection_begins_a_course_of_its_own(followed: World, tmp_path: Path, shell: Shell):
    """As when a newer version selects otherwise: nothing of the old one is taken for the new one's."""
    copied = followed.copy(tmp_path / "w")
    with Store.open(copied.db) as store:
        store.execute("UPDATE latents SET selected = true WHERE latent = 63")
        store.execute("UPDATE course SET latent = 63 WHERE latent = (SELECT min(latent) FROM course)")
        store.execute("UPDATE runs SET stage = NULL")
    assert shell(*copied.args(run=copied.path / "out")).status == 0
    assert read(copied.db, COURSE) == read(followed.db, COURSE)


def test_a_checkpoint_of_another_model_is_passed_over(followed: World, shell: Shell, tmp_path: Path):
    copied = followed.copy(tmp_path / "w")
    copied.db.unlink()
    tiny.save_model(tmp_path / "wide", "gpt2", n_embd=64)
    shutil.rmtree(copied.path / "out" / "checkpoint-200")
    tiny.save_lora(copied.path / "out" / "checkpoint-200", tmp_path / "wide", [1])
    assert shell(*copied.args(run=copied.path / "out")).status == 0
    rows: dict[str, Any] = {
        row["checkpoint"]: row["error"] for row in read(copied.db, "SELECT checkpoint, error FROM checkpoints")
    }
    assert "checkpoint-200 does not fit base" in rows.pop("checkpoint-200")
    assert set(rows.values()) == {None}
    assert len(rows) == 4
    assert "1 could not be read" in shell("show", "--db", copied.db).out


def test_a_checkpoint_without_weights_is_bad_input(followed: World, shell: Shell, tmp_path: Path):
    copied = followed.copy(tmp_path / "w")
    (copied.path / "out" / "checkpoint-200" / "adapter_model.safetensors").unlink()
    db = tmp_path / "new.duckdb"
    refused(shell(*copied.args(run=copied.path / "out", db=db)), "checkpoint-200: .*--checkpoints 0")
    assert not db.exists()
