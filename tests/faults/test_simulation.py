"""Simulation by the probabilities of the digits, where the server tells them, and by the digits where it does not."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from autointerp.labeling.base import LabelingSettings
from autointerp.labeling.labelers.llm import LLMLabeler
from autointerp.labeling.llm.logprobs import expected_digits, read_tokens
from autointerp.labeling.prompts import Prompts
from autointerp.labeling.scorers.simulation import ROW, Passage, SimulationScorer
from autointerp.records import Label, Score

from .harness import Bench, bench
from .oracle import oracle, planted
from .server import Fault, error

Weights = Callable[[int], dict[str, float]]
"""Probabilities in the place of the n-th digit of an answer."""


def tokens_of(text: str, weights: Weights) -> list[dict[str, Any]]:
    """As a server tells them: digits by themselves, each with its alternatives; everything else is certain."""
    told, n = [], 0
    for part in re.findall(r"\d|[^\d]+", text):
        others = {part: 1.0}
        if part.isdigit():
            others, n = weights(n), n + 1
        top = [{"token": token, "logprob": math.log(p)} for token, p in others.items()]
        told.append({"token": part, "logprob": 0.0, "top_logprobs": top})
    return told


class Hedger:
    """Says 0 of every token, and is of two minds: what the oracle says is the second most probable digit."""

    def __init__(self) -> None:
        self.meant: list[str] = []

    def respond(self, system: str, user: str) -> str:
        text = oracle(system, user)
        if '"1":[' not in system:
            return text
        rows = json.loads(text)
        # In the text numbers of rows are digits too.
        self.meant = [digit for key, row in rows.items() for digit in (key, *map(str, row))]
        return json.dumps({key: [0] * len(row) for key, row in rows.items()})

    def logprobs(self, text: str) -> list[dict[str, Any]]:
        return tokens_of(text, lambda n: {self.meant[n]: 0.3, " none": 0.1, "0": 0.6 if self.meant[n] != "0" else 0.9})


def scored(
    folder: Path, shift: int = 0, prepare: Callable[[Bench], None] = lambda b: None, **settings: Any
) -> tuple[list[Score], list[dict[str, Any]]]:
    """Scores of three planted latents with each other's labels, `shift` further on; and the simulation requests."""

    async def run() -> tuple[list[Score], list[dict[str, Any]]]:
        async with bench(folder, respond=oracle, **settings) as b:
            made = LabelingSettings("run")
            labeler = LLMLabeler(b.engine, made)
            labels = [await labeler.label(planted(j)) for j in range(3)]
            n = len(b.server.requests)
            prepare(b)
            scorer = SimulationScorer(b.engine, made)
            shifted = [replace(labels[(j + shift) % 3], latent=j) for j in range(3)]
            scores = [await scorer.score(planted(j), shifted[j], labels[(j + 1) % 3]) for j in range(3)]
            return scores, b.server.requests[n:]

    return asyncio.run(run())


def hedging(b: Bench) -> None:
    hedger = Hedger()
    b.server.respond, b.server.logprobs = hedger.respond, hedger.logprobs


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_expected_values_tell_what_the_digits_hide(tmp_path: Path, api: str):
    scores, requests = scored(tmp_path, prepare=hedging, api=api)
    for score in scores:
        assert (score.value or 0) >= 0.95
        assert score.null_value == pytest.approx(0, abs=0.05)
    assert {request["top_logprobs"] for request in requests} == {15}

    def without(b: Bench) -> None:
        b.server.respond = Hedger().respond

    (tmp_path / "without").mkdir()
    plain, _ = scored(tmp_path / "without", prepare=without, api=api)
    assert [score.value for score in plain] == [0, 0, 0], "a constant simulator"


def test_another_latents_label_scores_nothing_by_expected_values_too(tmp_path: Path):
    for score in scored(tmp_path, shift=1, prepare=hedging)[0]:
        assert (score.ci_low or 1) <= 0 <= (score.ci_high or -1) or score.value == 0
        assert score.value == pytest.approx(0, abs=0.05)


def test_constant_probabilities_score_nothing(tmp_path: Path):
    def constant(b: Bench) -> None:
        b.server.logprobs = lambda text: tokens_of(text, lambda n: {"3": 0.5, "4": 0.5})

    for score in scored(tmp_path, prepare=constant)[0]:
        assert score.value == 0, "whatever digits it says"


@pytest.mark.parametrize(
    "refusal",
    [
        error(400, "Unsupported parameter: 'logprobs' is not supported with this model.", code="unsupported_parameter"),
        error(400, "Logprobs is not enabled for this model"),
        error(403, "You are not allowed to request logprobs from this model", kind="invalid_request_error"),
    ],
)
def test_a_server_that_refuses_to_tell_is_asked_for_plain_digits(tmp_path: Path, refusal: Fault):
    def refuse(b: Bench) -> None:
        b.server.choose = lambda: refusal if "logprobs" in b.server.requests[-1] else None

    scores, requests = scored(tmp_path, prepare=refuse, concurrency=1)
    assert [score.n_missing for score in scores] == [0, 0, 0]
    assert all((score.value or 0) >= 0.95 for score in scores)
    assert ["logprobs" in request for request in requests].count(True) == 1


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_server_that_does_not_tell_is_taken_at_its_word(tmp_path: Path, provider: str):
    scores, requests = scored(tmp_path, provider=provider)
    assert all((score.value or 0) >= 0.95 for score in scores)
    assert any("logprobs" in request for request in requests) == (provider == "openai")


def test_answers_with_their_probabilities_serve_again(tmp_path: Path):
    async def run():
        async with bench(tmp_path, respond=oracle) as b:
            label = await LLMLabeler(b.engine, LabelingSettings("run")).label(planted(0))
            hedging(b)
            scorer = SimulationScorer(b.engine, LabelingSettings("run"))
            first = await scorer.score(planted(0), label, None)
            n = len(b.server.requests)
            assert await scorer.score(planted(0), label, None) == first
            assert len(b.server.requests) == n

    asyncio.run(run())


PASSAGE = Passage(tuple(f" w{i}" for i in range(ROW + 2)), tuple([0.0] * (ROW + 2)))


def parsed(answer: dict[str, Any]) -> tuple[float, ...] | None:
    (said,) = SimulationScorer.parse(answer, [PASSAGE])
    return said


def test_a_miscounted_row_makes_its_window_missing():
    whole = [0, 0, 7, 0, 0, 1]
    assert parsed({"1": whole, "2": [0, 9]}) == (0, 0, 7, 0, 0, 1, 0, 9)
    assert parsed({"1": whole}) is None
    assert parsed({"1": whole[1:], "2": [0, 9]}) is None
    assert parsed({"1": whole, "2": [0, 10]}) is None
    assert parsed({"1": whole, "2": [0, True]}) is None
    with pytest.raises(ValueError, match="number of each row"):
        parsed({"3": [0]})


def test_rows_show_every_token_between_tabs():
    label = Label(0, "x", "ok", "words", "Fires on them.")
    tab = Passage(("\t", " a", "\n", "b\tc", "", " d", " e"), (0.0,) * 7)
    request = SimulationScorer.request(Prompts(), label, [tab])
    assert request.user.splitlines()[1:] == ["1\t⇥\t a\t⏎\tb⇥c\t\t d", "2\t e"]


def test_digits_are_found_wherever_a_tokeniser_puts_them():
    def token(text: str, **others: float) -> dict[str, Any]:
        top = [{"token": other.replace("_", ""), "logprob": math.log(p)} for other, p in others.items()]
        return {"token": text, "logprob": -1.0, "top_logprobs": top}

    content = [
        token('{"1":[', x=1.0),
        token("0", _0=0.75, _8=0.25),
        {
            "token": ",3",
            "logprob": -1,
            "top_logprobs": [{"token": ",5", "logprob": 0.0}, {"token": " x", "logprob": 0}],
        },
        token(",", x=1.0),
        token("00", _00=1.0),
        token(" 7", x=1.0),
    ]
    spoken = read_tokens(content)
    text = "".join(token for token, _ in spoken)
    assert text == '{"1":[0,3,00 7'
    assert expected_digits(spoken) == {text.index("0"): pytest.approx(2.0), text.index("3"): 5.0}
    answers: list[tuple[float, ...] | None] = [(4.0,) * 8]
    assert SimulationScorer.weigh(answers, spoken, [PASSAGE]) == answers, "tokens of another answer"


@pytest.mark.parametrize("content", [None, {}, [3], [{"token": "0"}], [{"token": 0, "top_logprobs": []}]])
def test_probabilities_that_cannot_be_read_are_none(content: Any):
    assert read_tokens(content) == ()
