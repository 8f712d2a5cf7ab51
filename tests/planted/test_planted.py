"""Planted truths on real activations of the demo model, under realistic noise: the real Δx, rolled by a third."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from autointerp import adapters
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.gather import Evidence
from autointerp.evidence.screening import Screen
from autointerp.evidence.selection import SELECTORS, Given, Question, Ranking
from autointerp.run import Run
from tests.planted.conftest import TOKENS
from tests.planted.recording import Recording
from tests.planted.truths import N_PLANTED, false_share, gained, paired, planted, recovered


def chosen(recording: Recording, change: np.ndarray, seed: int = 0, encode: bool = False) -> tuple[Ranking, FittedMap]:
    fitted = recording.fitted(change.astype(np.float32), seed, encode)
    return SELECTORS.get("change")(Question(fitted, 50, 0.05, seed, Given(reread=recording.reread(change)))), fitted


@pytest.mark.parametrize(("gain", "n"), [(0.5, N_PLANTED), (0.25, N_PLANTED), (-1.0, 6)])
def test_gains(recording: Recording, gain: float, n: int) -> None:
    """Latents that write so much more, or nothing any more; a few are found as well as many."""
    truth = planted(recording, n, n)
    change = recording.noise + gained(recording, truth, gain)
    found = set(chosen(recording, change)[0].latents)
    assert len(found & set(truth.tolist())) >= 0.95 * n
    assert false_share(found, set(truth.tolist())) <= 0.1


def test_quiet_gains_beside_loud_ones(recording: Recording) -> None:
    """What the loud latents write is taken out of the target, but not of its decoys: they must not drown the rest."""
    truth = planted(recording, 1, 30)
    gains = np.r_[np.full(20, 2.0), np.full(10, 0.2)].astype(np.float32)
    change = recording.noise + recording.z[:, truth] @ (gains[:, None] * recording.W_dec[truth])
    found = set(chosen(recording, change)[0].latents)
    assert set(truth[:20].tolist()) <= found
    assert len(found & set(truth[20:].tolist())) >= 8
    assert len(found - set(truth.tolist())) <= 0.1 * len(found)


def test_gains_without_noise(recording: Recording) -> None:
    """Where everything is significant, what the ridge leaves to latents that fire with the planted ones is too small to
    matter."""
    truth = planted(recording, 0)
    ranking, fitted = chosen(recording, gained(recording, truth, 0.25))
    assert set(ranking.latents) == set(truth.tolist())
    assert ranking.n_pass is not None
    assert ranking.n_pass > 2 * N_PLANTED, "the tests alone do not tell them apart"
    assert fitted.coverage(ranking.latents)[-1] > 0.99
    directions = fitted.W_dec
    gains = [
        float(row @ directions[j] / directions[j].square().sum()) for j, row in fitted.rows_of(truth.tolist()).items()
    ]
    np.testing.assert_allclose(gains, 0.25, atol=0.05)  # the ridge's


@pytest.mark.parametrize(("noise", "proportional"), [(True, True), (False, True), (True, False), (False, False)])
def test_writes(recording: Recording, noise: bool, proportional: bool) -> None:
    """When latent j fires, its partner's direction is written: as strongly as j fires, or all or nothing."""
    both = planted(recording, 0, 2 * N_PLANTED)
    readers, partners = both[:N_PLANTED], both[N_PLANTED:]
    change = paired(recording, readers, partners, proportional) + noise * recording.noise
    ranking, fitted = chosen(recording, change)
    assert recovered(fitted, ranking.latents, readers, partners) >= 18
    # A write of one size is no multiple of the reader's activation: latents that fire with it stand in for the rest,
    # and under noise are not all known to do no more.
    assert false_share(set(ranking.latents), set(readers.tolist())) <= (0.3 if noise and not proportional else 0.1)


def test_a_network_without_noise(recording: Recording, tmp_path: Path) -> None:
    """The whole reading of an adapter whose units fire beyond a threshold: those that only stand in for them are left
    out, and it is said how many."""
    draw = torch.Generator().manual_seed(0)
    read, written = planted(recording, 3, 16).reshape(2, 8).tolist()
    z, units = recording.z.tocsc(), torch.arange(8)
    network = adapters.Ffnn(recording.dictionary, 8)
    with torch.no_grad():
        network.W_in.zero_()[units, read] = 1.0
        network.b_in.copy_(-torch.tensor([float(z[:, j].data.mean()) / 2 for j in read]))
        network.W_out.zero_()[written, units] = 1.0 + torch.rand(8, generator=draw)
    run = recording.evidence.run
    adapters.save(network, tmp_path, hook=str(run.hook), base=str(run.base), sae=run.sae)
    view = {key: getattr(run, key) for key in ("base", "sae", "hook", "corpus", "text_column", "context_length")}
    with Evidence.load(Run.load(tmp_path, **view, device="cpu", max_tokens=TOKENS)) as evidence:
        selection, _ = evidence.select(lambda _n: None)
    roles = dict(zip(selection.latents, selection.roles, strict=True))
    found = {latent for latent, role in roles.items() if role == "read"}
    assert set(read) <= found
    assert false_share(found, set(read)) <= 0.1
    assert (selection.rankings["change"].figures["explained_away"] or 0) > 0


def test_task_arithmetic(recording: Recording) -> None:
    """Of two changes with planted gains in common, the sum adds them, and the difference takes them away again."""
    latents = planted(recording, 5, 15)
    only_a, shared, only_b = latents[:5], latents[5:10], latents[10:]
    a = gained(recording, np.concatenate([only_a, shared]), 0.5)
    b = gained(recording, np.concatenate([shared, only_b]), 0.5)
    wanted = {1: (0.5, 1.0, 0.5), -1: (0.5, 0.0, -0.5)}
    for sign, gains in wanted.items():
        ranking, fitted = chosen(recording, recording.noise + a + sign * b)
        for group, gain in zip((only_a, shared, only_b), gains, strict=True):
            np.testing.assert_allclose(fitted.gains[fitted.positions(group.tolist())], gain, atol=0.15)
            assert len(set(group.tolist()) & set(ranking.latents)) == (5 if gain else 0)


def test_noise_alone_selects_nothing(recording: Recording) -> None:
    """Not even latents that only the noise wakes, of which there are many."""
    ranking, fitted = chosen(recording, recording.noise, encode=True)
    assert ranking.latents == []
    assert ranking.n_pass == 0
    statistics = fitted.statistics
    assert ((statistics.base.fired == 0) & (statistics.adapted.fired > 20)).any()


def test_a_revived_latent_is_found(recording: Recording) -> None:
    """A dead latent is written where another fires, as strongly as it takes to wake it."""
    dictionary = recording.dictionary
    assert dictionary.W_enc is not None
    rate = recording.rate()
    reader, dead = int(planted(recording, 0, 1)[0]), int(np.flatnonzero(rate == 0)[0])
    towards = dictionary.W_enc[:, dead].numpy() / np.linalg.norm(dictionary.W_enc[:, dead].numpy())
    fires = np.asarray((recording.z[:, [reader]] > 0).todense())
    change = recording.noise + fires * towards * 3 * np.linalg.norm(recording.x_base, axis=1).mean()
    ranking, fitted = chosen(recording, change, encode=True)
    assert fitted.statistics.base.fired[dead] == 0
    assert dict(zip(ranking.latents, ranking.roles, strict=True)).get(dead) == "written"


def test_a_constant_shift_is_static_and_nothing_else(recording: Recording) -> None:
    truth = planted(recording, 0, 3)
    shift = recording.W_dec[truth].sum(0)
    pure, fitted = chosen(recording, np.broadcast_to(shift, recording.change.shape), encode=True)
    statistics = fitted.statistics
    assert statistics.stream.static_share(statistics.n_tokens) == pytest.approx(1, abs=1e-4)
    assert set(pure.roles) == {"static"}
    assert pure.n_pass == 0
    assert set(truth.tolist()) <= set(pure.latents)
    noise = recording.noise - recording.noise.mean(0)
    strong = shift * np.sqrt(1.5 * np.square(noise).sum(1).mean() / (shift @ shift))
    under_noise, fitted = chosen(recording, noise + strong)
    assert set(under_noise.roles) == {"static"}
    assert set(under_noise.latents[:3]) == set(truth.tolist())
    assert fitted.statistics.stream.static_share(fitted.statistics.n_tokens) == pytest.approx(0.6, abs=1e-3)


def test_screening_keeps_what_covers_the_change(recording: Recording) -> None:
    """A quarter of the latents, chosen on a tenth of the text: 50 of them cover nearly what 50 of all do."""
    whole = FittedMap(recording.measured.statistics, recording.dictionary.W_dec)
    m, d = recording.dictionary.W_dec.shape
    n = len(recording.change) // 10
    screen = Screen(m, d, n, m // 4)
    screen.add(recording.z[:n], recording.change[:n])
    fitted = FittedMap(
        recording.statistics(recording.change, tracked=screen.tracked, encode=False), recording.dictionary.W_dec
    )
    assert 0.02 < screen.left_out < 0.5
    few, all_ = (np.array(f.coverage(_covering(f, 50)))[-1] for f in (fitted, whole))
    assert few >= 0.9 * all_
    control = fitted.random_coverage(50, seed=0)
    assert control is not None
    assert control < 0.7 * few


def _covering(fitted: FittedMap, k: int) -> list[int]:
    return [int(fitted.tracked[at]) for at in fitted.pursue(np.arange(len(fitted.tracked)), k)]
