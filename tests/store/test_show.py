"""What reaches a terminal is right at 80 columns and harmless."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from autointerp import show
from autointerp.errors import InputError
from autointerp.results import Results
from autointerp.store import Store
from autointerp.store.export import latent_objects
from autointerp.terminal import console, visible

from .planted import RUN, make_store, write_run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("show") / "a.duckdb")


def printed_of(store: Store, latent: int) -> str:
    file = io.StringIO()
    show.latent(store, latent, console=console(file, width=80))
    return file.getvalue()


def printed(path: Path, latent: int | None = None, width: int = 80) -> str:
    file = io.StringIO()
    with Store.open(path, "read") as store:
        if latent is None:
            show.table(store, console=console(file, width=width))
        else:
            show.latent(store, latent, console=console(file, width=width))
    return file.getvalue()


def test_a_salvaged_label_says_so(tmp_path: Path):
    with Store.open(make_store(tmp_path / "a.duckdb")) as store:
        latent = store.selected(RUN)[0]
        before = printed_of(store, latent)
        store.execute("UPDATE labels SET salvaged = true WHERE latent = ?", [latent])
        store.flush()
        assert "salvaged" in printed_of(store, latent)
        assert "salvaged" not in before
        assert next(latent_objects(store, RUN))["salvaged"] is True


def test_the_table_has_the_honest_figures_and_every_selected_latent(path: Path):
    text = printed(path)
    for part in (
        "R² 0.84",
        "3 latents 52.0%",
        "3 random ones 18.0%",
        "static share 3.1%",
        "FVU 0.050 → 0.070",
        "1,000,000",
    ):
        assert part in text
    assert "L0 20.0 → 21.5" in text
    assert "after def" in text
    assert "promotes ‘ test’" in text
    assert "0.93 (0.50)" in text
    assert text.count("not labelled yet") == 2
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(("n_docs", "why"), [(12, "12 documents are too few"), (2345, "stands out from chance")])
def test_a_run_that_selected_nothing_says_why(tmp_path: Path, n_docs: int, why: str):
    with Store.open(tmp_path / "a.duckdb") as store:
        write_run(store, k=0)
        store.upsert("runs", [{"run_id": RUN, "n_docs": n_docs, "n_pass": 0}])
        store.flush()
    text = " ".join(printed(tmp_path / "a.duckdb").split())
    assert "no latent was selected" in text
    assert why in text


def test_a_latent_is_shown_with_contexts_writes_and_scores(path: Path):
    text = printed(path, 0)
    assert "1.00 → 2.50  class Foo:⏎« def»" in text
    assert "0.93 [0.90, 0.96], another latent's label 0.50; 40 examples, 1 missing" in text
    assert "7 ( assert) +0.25" in text
    assert "silent: does not fire" in text
    assert "not selected" in printed(path, 9)
    with pytest.raises(InputError, match="no latent 99"):
        printed(path, 99)


def test_no_escape_sequence_and_no_markup_comes_out_of_a_corpus(path: Path):
    for text in (printed(path), printed(path, 0)):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "␛[2J[red]</script>\\u202e" in text


def test_a_terminal_gets_shades_and_a_bold_peak_but_not_under_no_color(path: Path, monkeypatch):
    def on_a_terminal() -> str:
        file = io.StringIO()
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLORTERM", "truecolor")
        monkeypatch.setattr(file, "isatty", lambda: True, raising=False)
        terminal = console(file, width=80)
        with Store.open(path, "read") as store:
            show.latent(store, 0, console=terminal)
        return file.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[1;30;48;2;255;130;10m" in on_a_terminal()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_a_terminal()
    assert console(io.StringIO()).color_system is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" def", " def"),
        ("é→日", "é→日"),
        ("a\r\n\t", "a␍⏎⇥"),
        ("\x9b2J", "\\u009b2J"),
        ("\u2028\u200b\ud800", "\\u2028\\u200b\\ud800"),
    ],
)
def test_visible_spells_out_what_cannot_be_seen(text: str, shown: str):
    assert visible(text) == shown


ANSWER = pa.table({"latent": [1, 2], "label": ["a, b", None], "acts": [[0.5], []], "x": [1 / 3, float("nan")]})


def test_answers_come_as_csv_json_and_parquet(tmp_path: Path, capfdbinary):
    show.query_table(ANSWER, "csv")
    assert capfdbinary.readouterr().out.decode().splitlines()[1] == '1,"a, b","[0.5]",0.3333333333333333'
    show.query_table(ANSWER, "json")
    rows = json.loads(capfdbinary.readouterr().out)
    assert rows[1] == {"latent": 2, "label": None, "acts": [], "x": None}
    show.query_table(ANSWER, "parquet", out=str(tmp_path / "a.parquet"))
    assert pq.read_table(tmp_path / "a.parquet").column("label").to_pylist() == ["a, b", None]
    show.query_table(ANSWER, "parquet")
    assert pq.read_table(pa.BufferReader(capfdbinary.readouterr().out)).num_rows == 2
    with pytest.raises(InputError, match="unknown format 'xml'"):
        show.query_table(ANSWER, "xml")
    with pytest.raises(InputError, match="cannot write"):
        show.query_table(ANSWER, "csv", out=str(tmp_path))


def test_answers_as_tables_fit_the_terminal():
    file = io.StringIO()
    show.query_table(ANSWER, console=console(file, width=80))
    assert "NULL" in file.getvalue()
    assert "2 rows" in file.getvalue()
    wide = pa.table({f"column_{i}": ["some longer text"] for i in range(20)})
    show.query_table(wide, console=console(file, width=80))
    assert "column_19  some longer text" in file.getvalue()
    show.query_table(pa.table({"n": list(range(1000))}), console=console(file, width=80))
    assert "1,000 rows; 800 more are not shown" in file.getvalue()
    assert max(len(line) for line in file.getvalue().splitlines()) <= 80


def test_reading_and_showing_load_neither_torch_nor_pandas():
    imports = "import sys, autointerp.store, autointerp.show, autointerp.results"
    script = f"{imports}; print({{'torch', 'pandas'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_was_spent_is_shown_with_what_came_from_a_cache(tmp_path: Path):
    path = make_store(tmp_path / "a.duckdb")
    call = {"run_id": RUN, "latent": 1, "purpose": "label", "provider": "openai", "model": "m", "status": "ok"}
    usage = {"input_tokens": 1500, "cached_tokens": 500, "output_tokens": 40, "usd": 0.25, "usd_estimated": 0.5}
    with Store.open(path) as store:
        rows = [{"call_id": "a", **call, **usage}, {"call_id": "b", **call, "purpose": "score", **usage}]
        store.upsert("calls", [*rows, {"call_id": "c", **call, "status": "in_doubt", "usd_estimated": 0.5}])
        store.upsert("calls", [{"call_id": "d", **call, "model": "n", "input_tokens": 7, "output_tokens": 3}])
    text = " ".join(printed(path, width=120).split())
    assert "openai:m 3 calls · 3,000 + 80 tokens · 33% of the input cached · $0.5000 · $0.5000 in doubt" in text
    assert "openai:n 1 call · 7 + 3 tokens · no listed price" in text
    assert "asked openai:m: 3 calls · 3,000 + 80 tokens · 33% of the input cached" in printed(path, 1, width=120)
    assert "asked" not in printed(path, 2)
    sums = Results(path).sql("SELECT purpose, calls, cached_tokens, usd, usd_in_doubt FROM spent WHERE model = 'm'")
    assert sorted(sums.fetchall()) == [("label", 2, 500, 0.25, 0.5), ("score", 1, 500, 0.25, 0.0)]
    assert {row["purpose"] for row in Results(path).summary()["spent"]} == {"label", "score"}
