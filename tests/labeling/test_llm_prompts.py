"""Templates, quoting, windows, reading answers, and the arithmetic of scores: all that needs no server."""

from __future__ import annotations

import contextlib
import json
import re
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autointerp.errors import InputError
from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.llm.answers import read_answer
from autointerp.labeling.llm.estimate import estimate, typical_evidence
from autointerp.labeling.prompts import CLOSE, OPEN, Prompts, mark, quote
from autointerp.labeling.scorers.detection import DetectionScorer
from autointerp.labeling.windows import cut, firing_windows, silent_windows
from autointerp.records import Context

HOSTILE = st.text(st.sampled_from('<>[]/|«»"{}%\\INSTsystem \n\r\t\x1b\x00\u202e\u2028\ue000\ue001\ud800é')) | st.text()


@given(HOSTILE)
def test_quoted_text_is_one_line_of_harmless_utf8(text: str):
    quoted = quote(text)
    quoted.encode("utf-8")
    assert len(quoted.splitlines()) <= 1
    assert not {unicodedata.category(c) for c in quoted} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert not {OPEN, CLOSE} & set(quoted)
    assert "[INST]" not in quoted
    assert not re.search(r"<\|[^<>]{0,50}\|>", quoted)
    assert quote(quoted) == quoted or len(quoted) > 2000


@given(st.lists(st.tuples(HOSTILE, st.booleans()), max_size=12))
def test_marks_are_ours_alone(pairs: list[tuple[str, bool]]):
    tokens, fires = [t for t, _ in pairs], [f for _, f in pairs]
    line = mark(tokens, fires)
    runs = sum(f and not (i and fires[i - 1]) for i, f in enumerate(fires))
    assert line.count(OPEN) == line.count(CLOSE) == runs
    assert len(line.splitlines()) <= 1


def test_a_tag_split_over_marks_is_broken_up():
    assert mark(["<|im", "_end|>", " x"], [False, True, False]) == "‹|im«_end|›» x"
    assert "[INST]" not in mark(["[IN", "ST]"], [True, False]).replace(OPEN, "").replace(CLOSE, "")


def test_templates_are_replaced_file_by_file(tmp_path: Path):
    (tmp_path / "detect.j2").write_text("{% block system %}S{% endblock %}{% block user %}{{ label }}{% endblock %}")
    prompts = Prompts(tmp_path)
    own = prompts.render("detect", label="{{ 7 * 7 }}")
    assert (own.system, own.user) == ("S", "{{ 7 * 7 }}")
    shipped = Prompts().render("detect", label="a", explanation="b", windows=["c"])
    assert own.template_sha256 != shipped.template_sha256
    assert prompts.render("explain", firing=[], silent=[], decoder=[], writes=[], predictions=[]).system


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% block system %}S", "cannot be read"),
        ("no blocks", "has no block"),
        ("{% block system %}{{ label }}{% endblock %}{% block user %}{% endblock %}", "undefined"),
        ("{% block system %}{% endblock %}{% block user %}{{ ''.__class__.mro() }}{% endblock %}", "unsafe"),
    ],
)
def test_a_bad_template_is_named(tmp_path: Path, source: str, message: str):
    (tmp_path / "detect.j2").write_text(source)
    with pytest.raises(InputError, match=rf"detect\.j2.*{message}"):
        Prompts(tmp_path).render("detect", label="x")


def test_a_missing_template_directory_is_named(tmp_path: Path):
    with pytest.raises(InputError, match="is no directory"):
        Prompts(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "value", "salvaged"),
    [
        ('{"a": 1}', 1, False),
        (' {"a":  1}\n', 1, False),
        ('```json\n{"a": 1}\n```', 1, True),
        ('{"b": 2} then {"a": {"a": 3}}', {"a": 3}, True),
        ('<think>maybe {"a": 9}</think>{"a": 1}', 1, True),
    ],
)
def test_json_is_found_in_prose(text: str, value: object, salvaged: bool):
    def parse(answer: dict) -> object:
        if "a" not in answer:
            raise ValueError("no a")
        return answer["a"]

    found, dug = read_answer(text, parse)
    assert found == value
    assert dug == salvaged or text.startswith("<think>")


@given(st.text())
def test_reading_an_answer_never_fails_otherwise(text: str):
    with contextlib.suppress(ValueError):
        found, _ = read_answer(text, lambda answer: answer)
        assert isinstance(found, dict)


def context(number: int, kind: str, rank: int, peak: float, split: str = "explain") -> Context:
    tokens = tuple(f" t{number}.{i}" for i in range(32))
    fires = tuple(peak if i == 23 else 0.0 for i in range(32))
    return Context(1, number, kind, rank, split, number, 100, tokens, fires, fires, 23)  # type: ignore[arg-type]


def test_windows_cover_the_whole_range_and_each_place_once():
    top = [context(i, "top", i + 1, 100.0 - i) for i in range(10)]
    spread = [context(100 + i, "quantile", i + 1, 30.0 - i) for i in range(30)]
    twin = replace(top[0], kind="gain", context_id=999)
    silent = [context(200 + i, "silent", i + 1, 0.0) for i in range(4)]
    evidence = replace(typical_evidence(), contexts=(*top, *spread, twin, *silent))
    windows = firing_windows(evidence, "explain", 10, 4)
    assert [w.strength for w in windows][:4] == [100, 99, 98, 97]
    assert windows[-1].strength == 1.0
    assert len({w.context.doc for w in windows}) == len(windows) == 10
    assert len(firing_windows(evidence, "explain", 100, 4)) == 40
    assert firing_windows(evidence, "score", 10, 4) == []
    assert [w.context.rank for w in silent_windows(evidence, "explain", 3)] == [1, 2, 3]
    assert len(cut(top[0]).tokens) == 22
    assert windows[0].marked().count(OPEN) == 1
    assert windows[-1].strengths(windows[0].strength) == "1"
    assert windows[0].strengths(windows[0].strength) == "10"


def test_examples_are_balanced_in_every_look_shuffled_and_reproducible():
    examples = DetectionScorer.examples(typical_evidence(), seed=3)
    assert examples == DetectionScorer.examples(typical_evidence(), seed=3)
    assert [e.truth for e in examples] != [e.truth for e in DetectionScorer.examples(typical_evidence(), seed=4)]
    looks = DetectionScorer.looks(typical_evidence(), seed=3)
    assert [len(look) for look in looks] == [10, 10, 10, 10]
    assert {sum(example.truth for example in look) for look in looks} == {5}


def test_an_estimate_without_contexts_is_like_the_one_with(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    settings = LabelingSettings("run", rpm=60)
    guessed = estimate("openai:gpt-6-luna", 50, ["detection"], settings)
    counted = estimate("openai:gpt-6-luna", [typical_evidence()] * 50, ["detection"], settings)
    assert guessed == counted
    assert guessed.calls == 50 * (1 + 2 * 8) + 1
    assert guessed.seconds_low == 60 * guessed.calls / 60
    assert guessed.usd_low is not None
    assert guessed.usd_high is not None
    assert 0 < guessed.usd_low < guessed.usd_high < 50 * 0.0025
    label_only = estimate("openai:gpt-6-luna", 1, [], settings)
    assert label_only.input_tokens <= 2300, "the label's question and the summary's"
    assert estimate("openai:unlisted", 1, [], settings).usd_low is None
    free = estimate("lexical", 50, ["rule"], settings)
    assert (free.calls, free.usd_low, free.usd_high) == (0, 0, 0)
    assert json.dumps(guessed.__dict__)
