"""What each selector chooses, and what a selection says of every latent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autointerp.errors import InputError
from autointerp.evidence.selection import SELECTORS, Question, Ranking, select, state_of
from autointerp.evidence.selectors.change import static_shares
from autointerp.evidence.spool import Spool
from autointerp.evidence.statistics import ChangeStatistics
from autointerp.evidence.stream import Measured
from tests.evidence import synthetic

STREAM = synthetic.stream(gain=0.8, n_docs=32)
FITTED = STREAM.fitted()
M, D = STREAM.W_dec.shape


def measured(statistics: ChangeStatistics) -> Measured:
    return Measured(statistics, Spool(D, torch.float32), n_docs=32, norm_limit=1e9, left_out=0.25)


def ask(selector: str, top: int = 50, stream: synthetic.Stream = STREAM) -> Ranking:
    fitted = FITTED if stream is STREAM else stream.fitted()
    return SELECTORS.get(selector)(Question(fitted, top, 0.05, 0))


def test_change_finds_the_planted_rows_best_first() -> None:
    ranking = ask("change")
    assert ranking.n_pass is not None
    assert set(range(16)) <= set(ranking.latents)
    assert len(ranking.latents) <= 17
    assert set(ranking.roles) == {"read"}
    curve = FITTED.coverage(ranking.latents[:16])
    assert np.diff([0.0, *curve]).min() > 0
    assert curve[7] > FITTED.coverage(ranking.latents[8:16])[-1]
    five = ask("change", top=5)
    assert five.latents == ranking.latents[:5]
    assert five.n_pass == ranking.n_pass


@pytest.mark.parametrize("stream", [synthetic.stream(gain=0.0), synthetic.stream(seed=3, gain=0.0, noise=2.0)])
def test_change_selects_nothing_from_noise(stream: synthetic.Stream) -> None:
    ranking = ask("change", stream=stream)
    assert (ranking.latents, ranking.n_pass) == ([], 0)


def test_a_constant_shift_is_static_and_nothing_else() -> None:
    still = synthetic.stream(noise=0.0)
    shift = 2.0 * still.W_dec[5] + still.W_dec[11]
    moved = replace(still, change=np.tile(shift, (len(still.order), 1)))
    fitted = moved.fitted()
    ranking = SELECTORS.get("change")(Question(fitted, 10, 0.05, 0))
    assert ranking.latents == [5, 11]
    assert ranking.roles == ["static", "static"]
    assert ranking.n_pass == 0
    assert static_shares(fitted).sum() == pytest.approx(1, abs=1e-4)
    assert fitted.statistics.stream.static_share(len(still.order)) == pytest.approx(1, abs=1e-5)
    figures = select(measured(fitted.statistics), fitted, "change", 10, 0.05, 0).figures
    assert figures["change_r2"] is None


def test_the_static_part_is_read_in_latents_that_fire() -> None:
    """Towards a latent that fires on neither side there is no context to label it from."""
    still = synthetic.stream(noise=0.0)
    z, z_adapted = still.z.copy(), still.z_adapted.copy()
    z[:, 5] = z_adapted[:, 5] = 0
    shift = still.W_dec[5] + 2.0 * still.W_dec[11]
    moved = replace(still, z=z, z_adapted=z_adapted, change=np.tile(shift, (len(still.order), 1)))
    ranking = SELECTORS.get("change")(Question(moved.fitted(), 10, 0.05, 0))
    assert ranking.latents[0] == 11
    assert 5 not in ranking.latents


def test_static_and_read_share_the_places_when_both_are_there() -> None:
    both = replace(STREAM, change=STREAM.change + 6 * STREAM.W_dec[30])
    ranking = ask("change", top=20, stream=both)
    roles = dict(zip(ranking.latents, ranking.roles, strict=True))
    assert roles[30] == "static"
    assert len(ranking.latents) == len(roles) <= 20
    assert {latent for latent, role in roles.items() if role == "read"} <= set(range(16))


def test_a_change_of_nothing_selects_nothing() -> None:
    same = replace(STREAM, change=np.zeros_like(STREAM.change), z_adapted=STREAM.z)
    fitted = same.fitted()
    selection = select(measured(fitted.statistics), fitted, "change", 10, 0.05, 0)
    assert selection.latents == []
    assert selection.figures["static_share"] == 0
    assert selection.figures["coverage"] is None
    for other in ("mean-shift", "random"):
        ranking = SELECTORS.get(other)(Question(fitted, 10, 0.05, 0))
        assert (ranking.latents == []) == (other == "mean-shift")


def test_revived_latents_are_selected_where_the_text_wakes_them() -> None:
    """40 comes alive wherever 3 fires; 41 as often, but anywhere."""
    still = synthetic.stream(gain=0.0)
    z, z_adapted = still.z.copy(), still.z_adapted.copy()
    z[:, 40:42] = 0
    written = np.stack([z[:, 3], np.random.default_rng(1).permutation(z[:, 3])], axis=1)
    z_adapted[:, 40:42] = written
    woken = replace(still, z=z, z_adapted=z_adapted, change=still.change + 2 * written @ still.W_dec[40:42])
    fitted = woken.fitted()
    ranking = synthetic.choose(fitted, top=20)
    assert (ranking.latents, ranking.roles) == ([40], ["written"])
    assert np.argmax(fitted.predicted(np.arange(39, 43))) == 1
    states = state_of(fitted.statistics.base.fired, fitted.statistics.adapted.fired)
    assert list(states[39:43]) == ["live", "revived", "revived", "live"]


def test_latents_that_many_rows_write_to_have_places_beside_the_revived() -> None:
    still = synthetic.stream(gain=0.8, noise=0.05)
    z, z_adapted = still.z.copy(), still.z_adapted.copy()
    z[:, 40:44] = 0
    z_adapted[:, 40:44] = z[:, 3:7]
    added = z[:, 3:7] @ still.W_dec[40:44] + 2 * z[:, :16].sum(1, keepdims=True) * still.W_dec[30]
    ranking = ask("change", top=20, stream=replace(still, z=z, z_adapted=z_adapted, change=still.change + added))
    written = [latent for latent, role in zip(ranking.latents, ranking.roles, strict=True) if role == "written"]
    assert len(written) == 2
    assert written[1] == 30
    assert written[0] in range(40, 44)


def test_mean_shift_and_random() -> None:
    shift = np.abs(STREAM.z_adapted.mean(0) - STREAM.z.mean(0))
    ranking = ask("mean-shift", top=7)
    assert ranking.latents == np.argsort(-shift)[:7].tolist()
    np.testing.assert_allclose(ranking.change, shift, rtol=1e-4, atol=1e-7)
    drawn = [SELECTORS.get("random")(Question(FITTED, 7, 0.05, seed)).latents for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 7


def test_every_latent_has_its_row() -> None:
    selection = select(measured(FITTED.statistics), FITTED, "change", 5, 0.05, 0)
    n = len(STREAM.order)
    for name, column in selection.columns.items():
        assert len(column) == M, name
    columns = selection.columns
    np.testing.assert_allclose(columns["mean_adapted"], STREAM.z_adapted.mean(0), rtol=1e-4)
    np.testing.assert_allclose(columns["freq_base"], (STREAM.z > 0).mean(0), rtol=1e-6)
    np.testing.assert_allclose(columns["delta"], columns["mean_adapted"] - columns["mean_base"], atol=1e-9)
    assert columns["selected"].sum() == 5
    assert [int(np.flatnonzero(columns["rank"] == r)[0]) for r in range(1, 6)] == selection.latents
    assert np.nansum(columns["coverage"] > 0) == 5
    assert selection.figures["coverage"] == pytest.approx(np.nanmax(columns["coverage"]))
    random = selection.figures["random_coverage"]
    assert random is not None
    assert random < np.nanmax(columns["coverage"])
    assert selection.figures["left_out"] == 0.25
    assert selection.figures["n_tokens"] == n
    # Rows of the five are refitted for these alone and carry what they share with others: .8 is what was planted.
    assert np.abs(columns["gain"][selection.latents] - 0.8).max() < 0.25
    assert np.abs(columns["gain"][16:]).max() < 0.25


@pytest.mark.parametrize("fdr", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_outside_0_and_1_is_bad_input(fdr: float) -> None:
    with pytest.raises(InputError, match=r"--fdr .* between 0 and 1"):
        select(measured(FITTED.statistics), FITTED, "change", 5, fdr, 0)
