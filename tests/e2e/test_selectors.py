"""Selectors by name on the command line: what they need, what they store, what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from .world import HOOK, Shell, World, read, refused


def chosen(db: Path) -> list[dict[str, Any]]:
    return read(db, "SELECT latent, change, statistic FROM latents WHERE selected ORDER BY rank")


@pytest.mark.parametrize("name", ["frequency", "latent-scaling"])
def test_selectors_that_need_nothing_more(name: str, world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "x.duckdb"
    assert shell(*world.args("select", db=db, selector=name, quiet=True)).status == 0
    found = chosen(db)
    assert len(found) == 4
    assert [row["change"] for row in found] == sorted((row["change"] for row in found), reverse=True)
    assert read(db, "SELECT selector FROM runs") == [{"selector": name}]


def test_rotation_wants_the_adapted_dictionary(world: World, tmp_path: Path, shell: Shell) -> None:
    db, turned = tmp_path / "x.duckdb", tmp_path / "turned"
    shutil.copytree(world.sae, turned)
    weights = load_file(turned / "sae_weights.safetensors")
    fires = read(world.db, "SELECT latent FROM latents WHERE state = 'live' ORDER BY freq_base DESC LIMIT 1")
    weights["W_dec"][fires[0]["latent"]] *= -1
    save_file(weights, turned / "sae_weights.safetensors")
    args = world.args("select", db=db, selector="rotation", quiet=True)
    refused(shell(*args), "selector rotation needs one more thing: give --sae-adapted")
    assert shell(*args, "--sae-adapted", turned, "--top", "1").status == 0
    assert chosen(db) == [{"latent": fires[0]["latent"], "change": pytest.approx(2), "statistic": pytest.approx(-1)}]
    refused(shell(*world.args("select", sae_adapted=turned)), "--sae-adapted is read by no selector of change")
    refused(shell(*args, "--sae-adapted", tmp_path / "none"), "sae-adapted .*none: no such file or folder")


def test_outcome_reads_a_column_of_the_corpus(world: World, tmp_path: Path, shell: Shell) -> None:
    copied = world.copy(tmp_path / "w")
    records = [json.loads(line) for line in copied.corpus.read_text().splitlines()]
    for at, record in enumerate(records):
        record |= {"grade": record["text"].count("dog") - record["text"].count("cat"), "same": 1, "word": "a"}
        if at == 7:
            del record["grade"]
    copied.corpus.write_text("".join(json.dumps(record) + "\n" for record in records))
    parquet = tmp_path / "w.parquet"
    pq.write_table(pa.table({key: [r.get(key) for r in records] for key in ("text", "grade", "same")}), parquet)
    args = copied.args("select", db=tmp_path / "x.duckdb", selector="outcome", quiet=True)
    refused(shell(*args), "selector outcome needs one more thing: give --outcome-column")
    for column, wanted in (
        ("no", "no column 'no'; give --outcome-column one of text, grade, same, word"),
        ("same", "column 'same' is the same in every document"),
        ("word", "column 'word' holds 'a': give --outcome-column a column of numbers"),
    ):
        refused(shell(*args, "--outcome-column", column), wanted)
    assert shell(*args, "--outcome-column", "grade").status == 0
    found = chosen(tmp_path / "x.duckdb")
    assert found
    assert all(0 < row["change"] == abs(row["statistic"]) <= 1 for row in found)
    args = copied.args("select", db=tmp_path / "y.duckdb", selector="outcome", corpus=parquet, quiet=True)
    assert shell(*args, "--outcome-column", "grade").status == 0
    assert chosen(tmp_path / "y.duckdb") == found, "the same documents in another file"
    refused(shell(*args, "--outcome-column", "no"), "give --outcome-column one of text, grade, same")
    text = copied.corpus.with_suffix(".txt")
    text.write_text(" ".join(record["text"] for record in records))
    args = copied.args("select", selector="outcome", corpus=text, outcome_column="grade")
    refused(shell(*args), "no other columns can be read here; --outcome-column needs .jsonl")


def test_several_selectors_on_one_reading(world: World, tmp_path: Path, shell: Shell) -> None:
    """The first ranks as if it were alone; the others' answers stand beside it."""
    db = tmp_path / "x.duckdb"
    names = ["change", "attribution", "mean-shift", "random"]
    flags = [word for name in names for word in ("--selector", name)]
    says = shell(*world.args("select", db=db), *flags)
    assert says.status == 0
    shown = " ".join(says.out.split())
    assert "mean-shift agrees at ρ" in shown
    assert "attribution kl" in shown
    columns = "latent, rank, role, change, gain, statistic, q_value, coverage"
    alone = read(world.db, f"SELECT {columns} FROM latents ORDER BY latent")
    assert read(db, f"SELECT {columns} FROM latents ORDER BY latent") == alone
    rows = read(db, "SELECT * FROM selectors ORDER BY position")
    assert [row["selector"] for row in rows] == names
    assert (rows[0]["spearman"], rows[0]["overlap"]) == (None, None)
    ranks = {name: read(db, f"SELECT * FROM selector_ranks WHERE selector = '{name}' ORDER BY rank") for name in names}
    first = {row["latent"] for row in ranks["change"] if row["rank"]}
    assert first == {row["latent"] for row in alone if row["rank"]}
    for name, row in zip(names, rows, strict=True):
        chosen = [rank["latent"] for rank in ranks[name] if rank["rank"]]
        assert len(chosen) == row["n_selected"] == 4
        if name != "change":
            assert row["overlap"] == len(first & set(chosen)) / 4
    assert rows[3]["spearman"] is None
    (known,) = read(
        db,
        """SELECT corr(x, y) AS rho FROM (
            SELECT rank() OVER (ORDER BY a.change) AS x, rank() OVER (ORDER BY b.change) AS y
            FROM selector_ranks a JOIN selector_ranks b USING (run_id, latent)
            WHERE a.selector = 'change' AND b.selector = 'attribution' AND a.change IS NOT NULL AND b.change > 0)""",
    )
    assert rows[1]["spearman"] == pytest.approx(known["rho"], abs=0.02), "ties apart"
    filled = read(db, "SELECT l.attribution, r.change FROM latents l JOIN selector_ranks r USING (run_id, latent)"
                      " WHERE r.selector = 'attribution' ORDER BY latent")  # fmt: skip
    assert filled
    assert all(abs(row["attribution"]) == pytest.approx(row["change"]) for row in filled)
    figures = json.loads(rows[1]["figures"])
    assert figures["by_map"] + figures["by_static_part"] + figures["outside_map"] == pytest.approx(1)
    summary = json.loads(shell(*world.args("select", db=db, json=True), *flags).out)
    assert [row["selector"] for row in summary["selectors"]] == names


def test_an_unknown_selector_among_several_is_refused(world: World, shell: Shell) -> None:
    refused(shell(*world.args("select"), "--selector", "change", "--selector", "chance"), "unknown selector 'chance'")


def test_top_auto(world: World, tmp_path: Path, shell: Shell) -> None:
    db = tmp_path / "x.duckdb"
    args = world.args(db=db, top="auto", selector="mean-shift")
    plan = shell(*args, "--dry-run")
    assert plan.out.startswith("up to 200 latents")
    assert shell(*args, "--quiet").status == 0
    found, run = chosen(db), read(db, "SELECT run_id, settings, coverage FROM runs")[0]
    assert 0 < len(found) <= 200
    assert json.loads(run["settings"])["top"] == "auto"
    assert shell(*args, "--dry-run").out.startswith("0 latents")
    assert shell(*args, "--quiet").status == 0
    assert len(read(db, "SELECT run_id FROM runs")) == 1, "the same run"
    number = world.args("select", db=db, top=len(found), selector="mean-shift", quiet=True)
    assert shell(*number).status == 0
    assert [row["latent"] for row in chosen_in(db, run["run_id"])] == [row["latent"] for row in found]
    assert len(read(db, "SELECT run_id FROM runs")) == 2, "another question"
    for top in ("0", "many"):
        refused(shell(*world.args("select", top=top)), "--top")


def chosen_in(db: Path, run_id: str) -> list[dict[str, Any]]:
    return read(db, f"SELECT latent FROM latents WHERE selected AND run_id = '{run_id}' ORDER BY rank")


def test_a_crosscoder_says_whose_a_latent_is(world: World, tmp_path: Path, shell: Shell) -> None:
    """Its latents' shares are stored whichever way they are selected, and shown; its own code serves latent scaling."""
    weights = load_file(world.sae / "sae_weights.safetensors")
    W_enc, W_dec = weights["W_enc"] / 2, torch.stack([weights["W_dec"]] * 2, dim=1)
    W_dec[:8, 0] *= 0.05
    bias = weights["b_enc"] - 0.5  # a ReLU, where the SAE chooses the largest
    state = {
        "W_enc": torch.stack([W_enc] * 2),
        "W_dec": W_dec,
        "b_enc": bias,
        "b_dec": W_dec[0] * 1e-3,
    }
    folder, db = tmp_path / "crosscoder", tmp_path / "x.duckdb"
    folder.mkdir()
    torch.save(state, folder / "0.pt")
    (folder / "0_cfg.json").write_text(json.dumps({"hook_point": HOOK}))
    assert shell(*world.args("select", sae=folder, db=db, selector="latent-scaling", quiet=True)).status == 0
    assert len(chosen(db)) == 4
    shares = [row["relative_norm"] for row in read(db, "SELECT relative_norm FROM latents ORDER BY latent")]
    assert shares == pytest.approx([1 / 1.05] * 8 + [0.5] * (len(shares) - 8), rel=1e-4)

    def shown(latent: int) -> str:
        return shell("show", str(latent), "--db", db).out

    assert "decoder norms 5% base, 95% adapted · in the adapted model alone" in shown(0)
    assert "decoder norms 50% base, 50% adapted · shared" in shown(9)
