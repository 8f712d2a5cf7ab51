"""The embedded labeler on planted latents: the standard library's own source, fired by a known rule plus noise."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autointerp.errors import InputError
from autointerp.labeling.base import LABELERS, SCORERS
from autointerp.labeling.labelers.lexical import LexicalLabeler
from autointerp.labeling.lexical import NO_RULE, parse_rule
from autointerp.labeling.scorers.rule import RuleScorer
from autointerp.records import Context, Label, LatentEvidence

MODULES = """
    argparse ast bdb calendar cmd code codecs configparser contextlib copy csv dataclasses difflib dis doctest
    enum filecmp fileinput fnmatch fractions ftplib functools gettext glob graphlib gzip heapq inspect
    ipaddress locale mimetypes operator optparse pathlib pdb pickle platform poplib pprint queue random sched
    selectors shelve shlex shutil smtplib socket statistics string subprocess tarfile tempfile textwrap
    threading timeit trace types uuid
"""
PIECES = re.compile(r"\n(?: *(?= ))?| ?[A-Za-z]{1,6}| ?\d+|_| ?[^\w\s]| +|\s|.", re.DOTALL)
BEFORE, AFTER = 23, 8
PER_KIND = 20

Fires = Callable[[Sequence[str], int], bool]


@lru_cache(maxsize=1)
def documents() -> list[list[str]]:
    """1,500 tokens of each module, from where its code begins."""
    library = Path(sysconfig.get_paths()["stdlib"])
    texts = [(library / f"{name}.py").read_text() for name in MODULES.split() if (library / f"{name}.py").exists()]
    return [PIECES.findall(text)[200:1700] for text in texts]


def plant(fires: Fires, seed: int = 0, noise: float = 0.02, latent: int = 0) -> LatentEvidence:
    """Evidence for a latent that fires by `fires`, misses a share `noise` of it and fires by chance half as often."""
    rng = np.random.default_rng(seed)
    contexts: list[Context] = []
    rates = []
    chosen = {("explain", "a"): 0, ("score", "a"): 0, ("explain", "s"): 0, ("score", "s"): 0}
    for doc, tokens in enumerate(documents()):
        split = "explain" if doc % 2 else "score"
        says = np.array([fires(tokens, i) for i in range(len(tokens))])
        act = np.where(says & (rng.random(len(tokens)) > noise), rng.gamma(2.0, 1.0, len(tokens)), 0.0)
        act[rng.random(len(tokens)) < noise * says.mean() / 2] = 0.5
        rates.append((act > 0).mean())
        silent = rng.permutation(np.arange(BEFORE, len(tokens) - AFTER))
        silent = [i for i in silent if not act[i - BEFORE : i + AFTER + 1].any()][:2]
        for kind, peaks in (("quantile", rng.permutation(np.flatnonzero(act))[:2].tolist()), ("silent", silent)):
            for peak in peaks:
                if chosen[split, kind[0].replace("q", "a")] < 2 * PER_KIND:
                    chosen[split, kind[0].replace("q", "a")] += 1
                    contexts.append(window(latent, len(contexts), kind, split, doc, int(peak), tokens, act))
    rate = float(np.mean(rates))
    return LatentEvidence("run", latent, 1, "read", "live", 0.1, 1.0, 0.1, 0.1, rate, rate, 5.0, 5.0, tuple(contexts))


def window(latent, context_id, kind, split, doc, peak, tokens, act) -> Context:
    low, high = max(0, peak - BEFORE), min(len(tokens), peak + AFTER + 1)
    acts = tuple(act[low:high].tolist())
    return Context(latent, context_id, kind, 1, split, doc, peak, tuple(tokens[low:high]), acts, acts, peak - low)


def is_def(tokens, i):
    return tokens[i].strip() == "def"


def is_self_dot(tokens, i):
    return tokens[i] == "." and i > 0 and tokens[i - 1].strip() == "self"


def is_digits(tokens, i):
    return tokens[i].strip().isdigit()


def is_capital_after_word(tokens, i):
    return tokens[i][:1] == " " and tokens[i][1:2].isupper() and tokens[i].strip().isalpha()


def is_first_on_line(tokens, i):
    return i > 0 and tokens[i - 1].startswith("\n") and bool(tokens[i].strip())


def is_open_bracket_of_def(tokens, i):
    line = []
    for j in range(i - 1, max(-1, i - 12), -1):
        if tokens[j].startswith("\n"):
            break
        line.append(tokens[j].strip())
    return tokens[i] == "(" and "def" in line


def is_ing(tokens, i):
    return tokens[i].endswith("ing") or tokens[i].endswith("ed")


PLANTED: dict[str, tuple[Fires, str]] = {
    "one token": (is_def, r"^` ?def`$"),
    "bigram": (is_self_dot, r"`\.` after .*`.?self`"),
    "digits": (is_digits, r"digits"),
    "capitalised after a space": (is_capital_after_word, r"[Cc]apital"),
    "first on a line": (is_first_on_line, r"start of a line|after a newline"),
    "bracket on a def line": (is_open_bracket_of_def, r"`\(`.*line .*`def`"),
    "affix": (is_ing, r"ends in .*ng"),
}


def label_of(evidence: LatentEvidence) -> Label:
    return asyncio.run(LexicalLabeler().label(evidence))


def score_of(evidence: LatentEvidence, label: Label, wrong: Label | None = None):
    return asyncio.run(RuleScorer().score(evidence, label, wrong))


@lru_cache(maxsize=32)
def planted(name: str) -> tuple[LatentEvidence, Label]:
    evidence = plant(PLANTED[name][0], seed=3, latent=sorted(PLANTED).index(name))
    return evidence, label_of(evidence)


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_a_planted_rule_is_recovered_and_scores_on_unseen_documents(name):
    evidence, label = planted(name)
    score = score_of(evidence, label)
    assert re.search(PLANTED[name][1], label.label or ""), label.label
    assert score.value is not None
    assert score.value >= 0.95, label.explanation
    assert score.ci_low is not None
    assert score.ci_high is not None
    assert score.ci_low <= score.value <= score.ci_high
    assert (score.n_examples, score.n_missing) == (len(evidence.of("score")), 0)


@pytest.mark.parametrize("name", ["one token", "digits", "bigram"])
def test_a_wrong_rule_scores_at_chance(name):
    evidence, label = planted(name)
    wrong = planted("capitalised after a space")[1]
    score = score_of(evidence, label, wrong)
    assert score.null_value == pytest.approx(0.5, abs=0.12)
    assert score_of(evidence, wrong).value == score.null_value


@pytest.mark.parametrize("name", ["one token", "bigram"])
def test_a_token_or_bigram_feature_is_known(name):
    label = planted(name)[1]
    assert label.status == "known"
    assert (label.explanation or "").endswith(f"A {name.removeprefix('one ')} feature.")


@pytest.mark.parametrize("name", ["digits", "affix", "first on a line"])
def test_other_rules_are_ok(name):
    assert planted(name)[1].status == "ok"


@pytest.mark.parametrize("seed", range(6))
def test_random_firing_has_no_rule(seed):
    draws = np.random.default_rng(seed)
    evidence = plant(lambda tokens, i: bool(draws.random() < 0.02), seed=seed)
    label = label_of(evidence)
    assert (label.status, label.label, label.rule) == ("ok", NO_RULE, None)
    score = score_of(evidence, label)
    assert (score.value, score.n_examples, score.n_missing) == (None, 0, len(evidence.of("score")))


def test_a_rule_seen_in_a_single_document_is_not_believed():
    """All of its firings in one document are no evidence for the others."""
    evidence = plant(lambda tokens, i: tokens is documents()[1] and is_def(tokens, i))
    assert label_of(evidence).rule is None


@pytest.mark.parametrize("name", sorted(PLANTED))
def test_rules_survive_json_to_the_letter(name):
    evidence, label = planted(name)
    assert label.rule
    again = parse_rule(json.loads(json.dumps(label.rule)))
    assert again == parse_rule(label.rule)
    for context in evidence.of("score")[:20]:
        assert again.fires(context.tokens) == parse_rule(label.rule).fires(context.tokens)
        assert len(again.fires(context.tokens)) == len(context.tokens)


def test_a_rule_runs_on_plain_tokens():
    rule = parse_rule({"version": 1, "any": [{"all": [{"view": "token", "at": 0, "in": ["b"]}]}]})
    assert rule.fires(["a", "b", "", "b"]) == [False, True, False, True]
    assert rule.fires([]) == []


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"version": 2, "any": []},
        {"version": 1},
        {"version": 1, "any": [{"all": [{"view": "next_token", "at": 0, "in": []}]}]},
        {"version": 1, "any": [{"all": [{"view": "token", "at": 1, "in": ["a"]}]}]},
        {"version": 1, "any": [{"all": [{"view": "token", "at": 0, "in": [{}]}]}]},
        [],
    ],
)
def test_a_rule_that_cannot_be_run_says_so_in_one_line(value):
    with pytest.raises(InputError, match="label the run again"):
        parse_rule(value)


def test_a_position_in_windows_of_several_kinds_is_counted_once():
    evidence, label = planted("one token")
    twice = tuple(
        replace(c, kind="top", context_id=c.context_id + 1000) for c in evidence.contexts if c.kind != "silent"
    )
    score = score_of(replace(evidence, contexts=evidence.contexts + twice), label)
    assert score.value == score_of(evidence, label).value
    assert score.n_examples == len(evidence.of("score")) + len([c for c in twice if c.split == "score"])


def test_a_revived_latent_is_read_from_the_adapted_model():
    evidence, label = planted("digits")
    contexts = tuple(replace(c, act_base=(0.0,) * len(c.tokens)) for c in evidence.contexts)
    revived = replace(evidence, state="revived", freq_base=0.0, contexts=contexts)
    assert label_of(revived).rule == label.rule
    assert label_of(replace(revived, state="live")).rule is None


def test_contexts_that_cannot_be_read_are_missing_not_dropped():
    evidence, label = planted("digits")
    first = evidence.of("score")[0]
    broken = (replace(first, tokens=()), replace(first, act_base=first.act_base[:-1]))
    score = score_of(replace(evidence, contexts=evidence.contexts + broken), label)
    assert score.n_missing == 2
    assert score.value == score_of(evidence, label).value


def test_few_contexts_are_no_error():
    evidence = planted("digits")[0]
    for n in range(6):
        few = replace(evidence, contexts=evidence.contexts[:n])
        label = label_of(few)
        assert label.status == "ok"
        assert score_of(few, label).n_examples + score_of(few, label).n_missing == len(few.of("score"))
    assert label_of(replace(evidence, contexts=tuple(c for c in evidence.contexts if c.kind != "silent"))).rule
    one_document = tuple(replace(c, doc=1, position=1000 * c.context_id + c.peak) for c in evidence.contexts)
    assert score_of(replace(evidence, contexts=one_document), planted("digits")[1]).ci_low is None


def test_the_explanation_gives_examples_and_its_own_accuracy():
    explanation = planted("bigram")[1].explanation or ""
    assert re.search(r"self«\.»", explanation)
    assert re.search(r"finds \d+% of the firing tokens .* \(balanced accuracy \d\.\d\d\)", explanation)


def test_lexical_and_rule_are_found_by_name():
    assert LABELERS.get("lexical")().default_scorer == "rule"
    assert SCORERS.get("rule")().name == "rule"


def test_fifty_latents_take_seconds():
    evidence = [planted(name)[0] for name in sorted(PLANTED)]
    start = time.process_time()
    for one in evidence:
        label_of(one)
    n_contexts = sum(len(one.of("explain")) for one in evidence)
    assert (time.process_time() - start) / n_contexts * 65 * 50 < 10, "50 latents of 65 explain contexts"


def test_labeling_loads_no_torch():
    modules = "autointerp.labeling.labelers.lexical, autointerp.labeling.scorers.rule"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


TOKENS = st.lists(
    st.text(max_size=5) | st.sampled_from(["\n", " def", "(", '"""', "'", "#", "\ud800", "\x00", "", "`"]), max_size=10
)
WINDOWS = st.lists(
    st.tuples(
        TOKENS,
        st.sampled_from(["top", "quantile", "silent"]),
        st.sampled_from(["explain", "score"]),
        st.integers(0, 3),
        st.integers(0, 40),
        st.integers(0, 2**32 - 1),
    ),
    max_size=14,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WINDOWS)
def test_never_raises_on_arbitrary_tokens(windows):
    contexts = []
    for n, (tokens, kind, split, doc, position, seed) in enumerate(windows):
        odd = [0.0] if kind == "silent" else [0.0, 0.0, 1.5, float("nan"), float("inf")]
        acts = tuple(np.random.default_rng(seed).choice(odd, len(tokens)).tolist())
        contexts.append(Context(0, n, kind, 1, split, doc, position, tuple(tokens), acts, acts, 0))
    evidence = replace(planted("digits")[0], contexts=tuple(contexts))
    label = label_of(evidence)
    assert label.label
    json.dumps(label.rule)
    for any_label in (label, planted("bracket on a def line")[1]):
        score = score_of(evidence, any_label, planted("bigram")[1])
        assert score.value is None or 0 <= score.value <= 1
