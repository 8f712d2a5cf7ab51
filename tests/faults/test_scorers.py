"""Every scorer that asks a model: an oracle is recognised, a wrong label and a judge without a clue score chance."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from autointerp.labeling.base import LabelingSettings, make_scorer
from autointerp.labeling.labelers.llm import LLMLabeler
from autointerp.records import Label, Score

from .harness import bench
from .oracle import oracle, planted, yes_sayer
from .server import Respond, error

SETTINGS = LabelingSettings("run")
LATENTS = range(3)
CHANCE = {"detection": 0.5, "fuzzing": 0.5, "simulation": 0.0, "contrast": 0.5, "intruder": 0.25}


def scores_of(
    folder: Path, scorer: str, respond: Respond, shift: int, plan: tuple = (), n: int = 3, null: bool = True
) -> list[Score]:
    """The scores of the first `n` planted latents' labels, as the oracle labels them; shifted by `shift` latents.
    Without `null` no wrong label is asked about."""

    async def run() -> list[Score]:
        async with bench(folder, respond=oracle) as b:
            labeler = LLMLabeler(b.engine, SETTINGS)
            labels = [await labeler.label(planted(latent)) for latent in LATENTS]
            b.server.respond = respond
            b.server.plan.extend(plan)
            judge = make_scorer(scorer, labeler, SETTINGS)
            shifted = [replace(labels[(j + shift) % 3], latent=j) for j in LATENTS]
            others = [replace(labels[(j + shift + 1) % 3], latent=j) for j in LATENTS]
            return [await judge.score(planted(j), shifted[j], others[j] if null else None) for j in LATENTS[:n]]

    return asyncio.run(run())


@pytest.mark.parametrize("scorer", CHANCE)
def test_an_oracle_is_recognised_and_soon(tmp_path: Path, scorer: str):
    for score in scores_of(tmp_path, scorer, oracle, 0):
        assert score.value is not None
        assert score.value >= 0.95
        assert score.n_missing == 0
        assert score.null_value == pytest.approx(CHANCE[scorer], abs=0.05)
        assert score.n_examples <= 20, "bought until it was decided"
        assert (score.ci_low or 0) > CHANCE[scorer] + 0.1


@pytest.mark.parametrize("scorer", CHANCE)
def test_labels_shuffled_among_latents_score_chance(tmp_path: Path, scorer: str):
    for score in scores_of(tmp_path, scorer, oracle, 1):
        assert score.ci_low is not None
        assert score.ci_high is not None
        assert score.ci_low <= CHANCE[scorer] <= score.ci_high
        assert score.value == pytest.approx(CHANCE[scorer], abs=0.05)


@pytest.mark.parametrize("scorer", ["detection", "fuzzing", "contrast"])
def test_a_judge_who_always_says_yes_scores_a_half(tmp_path: Path, scorer: str):
    assert [score.value for score in scores_of(tmp_path, scorer, yes_sayer, 0, n=1)] == [0.5]


@pytest.mark.parametrize("scorer", CHANCE)
def test_what_gets_no_answer_is_missing_and_counted(tmp_path: Path, scorer: str):
    # No wrong label: its questions are asked at the same time, and either may meet the fault.
    first, second = scores_of(tmp_path, scorer, oracle, 0, (error(400, "no"),), n=2, null=False)
    assert first.n_missing > 0
    assert first.value is not None
    assert first.value >= 0.95
    assert second.n_missing == 0


@pytest.mark.parametrize("scorer", CHANCE)
def test_what_claims_nothing_is_not_bought(tmp_path: Path, scorer: str):
    async def run():
        async with bench(tmp_path, respond=oracle) as b:
            judge = make_scorer(scorer, LLMLabeler(b.engine, SETTINGS), SETTINGS)
            nothing = Label(0, "x", "ok", "no clear pattern", "None seen.", "")
            unfit = replace(planted(0), contexts=planted(0).of("explain"))
            for evidence, label in ((planted(0), nothing), (unfit, replace(nothing, label="words", effect="Pushes."))):
                score = await judge.score(evidence, label, None)
                assert (score.value, score.ci_low, score.n_examples, score.n_missing) == (None, None, 0, 0)
            assert b.server.requests == []

    asyncio.run(run())
