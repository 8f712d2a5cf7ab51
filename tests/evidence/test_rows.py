"""What rows are read as, against the model's own final norm and unembedding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.gather import Evidence
from autointerp.evidence.rows import N_LATENTS, N_STATES, N_TOKENS, firing_states, read_rows
from autointerp.evidence.screening import Screen
from autointerp.evidence.spool import Spool
from autointerp.evidence.stream import measure
from autointerp.records import Write
from tests.evidence import world

LATENTS = [3, 9, 20, 33]


@dataclass(frozen=True)
class Read:
    evidence: Evidence
    spool: Spool
    fitted: FittedMap
    writes: dict[int, dict[str, list[Write]]]
    plain: Any


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Read]:
    folder = tmp_path_factory.mktemp("world")
    base, adapter = world.saved_model(folder)
    small = world.build(folder, base, adapter, topk=False, bos=False)
    with Evidence.load(small.run) as evidence:
        m, d = evidence.dictionary.W_dec.shape
        with Spool(d, torch.float32, folder) as spool:
            measured = measure([evidence.model], evidence.dictionary, evidence.corpus, Screen(m, d, 0), spool)
            fitted = FittedMap(measured.statistics, evidence.dictionary.W_dec)
            writes: dict[int, dict[str, list[Write]]] = defaultdict(lambda: defaultdict(list))
            for write in read_rows(fitted, LATENTS, evidence.model, evidence.dictionary, spool, evidence.decode):
                writes[write.latent][write.kind].append(write)
            yield Read(evidence, spool, fitted, writes, AutoModelForCausalLM.from_pretrained(base).eval())


def test_ranks_count_from_one_and_signs_fit_the_kinds(read: Read) -> None:
    assert set(read.writes) == set(LATENTS)
    for kinds in read.writes.values():
        for kind, writes in kinds.items():
            assert [w.rank for w in writes] == list(range(1, len(writes) + 1))
            assert all((w.weight > 0) == (kind in ("raises", "promotes")) for w in writes)
            targets = [w.target_latent if kind in ("raises", "lowers") else w.target_token for w in writes]
            assert None not in targets
            assert len(set(targets)) == len(targets)
        assert 0 < len(kinds["raises"]) + len(kinds["lowers"]) <= N_LATENTS
        assert 0 < len(kinds["promotes"]) <= N_TOKENS


def test_raised_and_lowered_latents_add_up_to_the_row(read: Read) -> None:
    """Own direction and targets, at their weights, are the least-squares reading of the row of the restricted map."""
    rows, strength = read.fitted.rows_of(LATENTS), read.fitted.mean_firing
    z = read.fitted.statistics.base
    assert strength[20] == pytest.approx(z.total[20] / z.fired[20])
    for latent, kinds in read.writes.items():
        written = {w.target_latent: w.weight for w in kinds["raises"] + kinds["lowers"]}
        assert latent not in written
        targets = [latent, *written]
        D = read.fitted.W_dec[targets].numpy()
        coefficients = np.linalg.lstsq(D.T, rows[latent].numpy(), rcond=None)[0]
        np.testing.assert_allclose(coefficients[1:] * strength[latent], list(written.values()), rtol=1e-6)
        for kind in ("raises", "lowers"):
            sizes = [abs(w.weight) for w in kinds[kind]]
            assert sizes == sorted(sizes, reverse=True)


@torch.no_grad()
def test_tokens_are_the_models_own_change_of_log_probability(read: Read) -> None:
    """x and x + z c_j at the first firing tokens, through ln_f and lm_head of the plain model."""
    states = firing_states(read.spool, read.evidence.dictionary, LATENTS, "base")
    ids = {read.evidence.decode(i): i for i in range(read.evidence.model.vocab_size)}
    rows, transformer = read.fitted.rows_of(LATENTS), read.plain.transformer
    for latent, kinds in read.writes.items():
        x, z = states[latent]
        assert 0 < len(z) <= N_STATES
        assert (z > 0).all()
        torch.testing.assert_close(
            read.evidence.dictionary.encode_columns(x, torch.tensor([latent]))[:, 0], z, rtol=1e-4, atol=1e-4
        )
        logits = [read.plain.lm_head(transformer.ln_f(y)) for y in (x, x + z[:, None] * rows[latent].float())]
        before, after = (side.log_softmax(-1) for side in logits)
        change = (after - before).mean(0)
        for write in kinds["promotes"] + kinds["suppresses"]:
            assert write.target_token is not None
            assert write.weight == pytest.approx(float(change[ids[write.target_token]]), rel=1e-3, abs=1e-4)


def test_nothing_is_read_where_nothing_is(read: Read) -> None:
    """No latents, and one that fires on neither side: its row is zero, and no token is its doing."""
    statistics, evidence = read.fitted.statistics, read.evidence
    assert statistics.base.fired[0] == statistics.adapted.fired[0] == 0
    for latents in ([], [0]):
        assert read_rows(read.fitted, latents, evidence.model, evidence.dictionary, read.spool, evidence.decode) == []
