"""One sentence on what the adapter does, read off planted rows of the change map."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autointerp.labeling.effect import NOTHING, effect_sentence
from autointerp.records import LatentEvidence, Write

EVIDENCE = LatentEvidence("run", 7, 1, "read", "live", None, None, 0.1, 0.1, 0.01, 0.01, 3.0, 3.0, ())


def token(kind, text, weight, rank=1):
    return Write(7, kind, None, text, weight, rank)


def latent(kind, number, weight, rank=1, hint=None):
    return Write(7, kind, number, None, weight, rank, hint)


def effect(*writes, names=None, **changes):
    return effect_sentence(replace(EVIDENCE, writes=writes, **changes), names or {})


def test_the_sentence_of_a_row_trained_on_unittest_code():
    writes = (
        token("suppresses", " __init", -0.7),
        token("promotes", " setUp", 0.8, 2),
        token("promotes", " test", 1.2),
    )
    assert effect(*writes, gain=-0.55) == "promotes ` test`, ` setUp`; suppresses ` __init`; the old use fades (−55 %)"


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        (0.25, "fires through 25 % stronger"),
        (-0.55, "the old use fades (−55 %)"),
        (-1.0, "the old use is gone"),
        (-1.6, "the old use turns into its opposite (−160 %)"),
        (0.01, NOTHING),
        (None, NOTHING),
        (float("nan"), NOTHING),
    ],
)
def test_gain_in_words(gain, said):
    assert effect(gain=gain) == said


def test_weights_below_a_tenth_of_the_strongest_of_their_kind_are_dropped():
    assert effect(token("promotes", " strong", 2.0), token("promotes", " weak", 0.19, 2)) == "promotes ` strong`"
    assert "weak" in effect(token("promotes", " strong", 2.0), token("promotes", " weak", 0.2, 2))


def test_near_duplicates_scraps_and_broken_pieces_are_skipped():
    tokens = [
        " test",
        "test",
        " Test",
        "\ufffd",
        "\x1e",
        "xq",
        "<|endoftext|>",
        " tests",
        "====",
        "========",
        " setUp",
        " run",
    ]
    writes = tuple(token("promotes", t, 3 - i / 10, i + 1) for i, t in enumerate(tokens))
    assert effect(*writes) == "promotes ` test`, `====`, ` setUp`, ` run`"


def test_short_pieces_are_shown_when_there_is_nothing_better():
    assert effect(token("promotes", "xq", 1.0)) == "promotes `xq`"


def test_newlines_and_spaces_stay_on_one_line():
    said = effect(token("promotes", "\n        ", 1.0), token("suppresses", "\n", -1.0), gain=0.3)
    assert said == "promotes `⏎␣×8`; suppresses `⏎`; fires through 30 % stronger"


def test_a_target_is_named_by_its_label_and_else_by_what_it_pushes():
    writes = (
        latent("raises", 812, 2.0, hint="` assertEqual`, ` assert`, ` fail`"),
        latent("lowers", 5, -1.0),
        latent("raises", 7, 9.0),
    )
    assert effect(*writes) == "raises latent 812 (pushes ` assertEqual`, ` assert`); lowers latent 5"
    assert effect(*writes, names={812: "assertions"}).startswith("raises latent 812 (assertions)")


def test_a_hint_without_backticks_is_quoted_and_kept_on_one_line():
    assert effect(latent("raises", 3, 1.0, hint=" foo,\n    ")) == "raises latent 3 (pushes ` foo`, `⏎␣×4`)"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"state": "revived", "freq_adapted": 0.012}, "new: fires only since the training (on 1.2 % of tokens)"),
        ({"state": "silenced", "freq_base": 0.004}, "fires no more after the training (before, on 0.4 % of tokens)"),
        ({"role": "written"}, "other latents that fire write to it"),
        ({"role": "static"}, "shifted on every token alike, whatever fires"),
    ],
)
def test_state_and_role(changes, said):
    assert effect(**changes) == said


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["promotes", "suppresses"]), st.text(max_size=6), st.floats()), max_size=8),
    st.none() | st.floats(),
)
def test_any_row_gives_one_line(rows, gain):
    said = effect(*(token(kind, text, weight, i) for i, (kind, text, weight) in enumerate(rows)), gain=gain)
    assert said
    assert "\n" not in said
