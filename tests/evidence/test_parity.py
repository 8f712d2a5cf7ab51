"""What the store holds equals a plain transformers + sae_lens + peft computation on the same text."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp.demo import ORGANISM
from autointerp.evidence.collector import PER_SPLIT
from autointerp.evidence.gather import Evidence
from autointerp.evidence.selection import Selection
from autointerp.records import Context
from autointerp.run import Run

N_DOCS, CONTEXT = 12, 64


@dataclass
class Brute:
    """Activations of every document token, document by document."""

    base: dict[int, np.ndarray]
    """doc → z_base [n, m]; rows of uncounted tokens are NaN."""
    adapted: dict[int, np.ndarray]
    sequence: dict[int, np.ndarray]
    """doc → index of the sequence each token lies in [n], −1 for dropped tokens."""
    ids: dict[int, list[int]]

    def stacked(self, side: dict[int, np.ndarray]) -> np.ndarray:
        rows = np.concatenate([side[doc] for doc in sorted(side)])
        return rows[~np.isnan(rows[:, 0])]


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("parity")
    lines = (ORGANISM / "corpus.jsonl").read_text().splitlines()
    picked = lines[:: len(lines) // N_DOCS][:N_DOCS]
    (folder / "corpus.jsonl").write_text("\n".join(picked) + "\n")
    return Run.load(ORGANISM, corpus=str(folder / "corpus.jsonl"), context_length=CONTEXT, top=8, device="cpu")


@pytest.fixture(scope="module")
def ours(small_run: Run) -> tuple[Selection, dict[int, list[Context]]]:
    with Evidence.load(small_run) as evidence:
        selection, _ = evidence.select(lambda _n: None)

        async def gather() -> dict[int, list[Context]]:
            return {latent: contexts async for latent, contexts, _ in evidence.contexts()}

        return selection, asyncio.run(gather())


@pytest.fixture(scope="module")
def brute(small_run: Run) -> Brute:
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(ORGANISM / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(model, ORGANISM / "adapter").eval()
    sae = SAE.load_from_disk(str(ORGANISM / "sae"))
    box: dict[str, torch.Tensor] = {}
    block = model.base_model.model.transformer.h[2]
    block.register_forward_hook(lambda _m, _i, out: box.update(x=out[0] if isinstance(out, tuple) else out))
    found = Brute({}, {}, {}, {})
    streams: dict[int, list[torch.Tensor]] = {}
    with torch.no_grad():
        for doc, line in enumerate(Path(str(small_run.corpus)).read_text().splitlines()):
            ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
            sides: list[list[torch.Tensor]] = [[], []]
            numbers = np.full(len(ids), -1)
            for start in range(0, len(ids), CONTEXT - 1):
                piece = ids[start : start + CONTEXT - 1]
                if len(piece) < 8:
                    sides[0].append(torch.full((len(piece), 128), torch.nan))
                    sides[1].append(torch.full((len(piece), 128), torch.nan))
                    continue
                numbers[start : start + len(piece)] = start
                window = torch.tensor([[tokenizer.bos_token_id, *piece]])
                with model.disable_adapter():
                    model(window)
                sides[0].append(box["x"].reshape(len(piece) + 1, -1)[1:].clone())
                model(window)
                sides[1].append(box["x"].reshape(len(piece) + 1, -1)[1:].clone())
            streams[doc] = [torch.cat(side) for side in sides]
            found.sequence[doc], found.ids[doc] = numbers, ids
        norms = torch.cat([base.norm(dim=1) for base, _ in streams.values()])
        limit = 10 * norms[~norms.isnan()].median()
        for doc, (base, adapted) in streams.items():
            dropped = ~(base.norm(dim=1) <= limit)
            for side, x in ((found.base, base), (found.adapted, adapted)):
                z = sae.encode(x.nan_to_num())
                z[dropped] = torch.nan
                side[doc] = z.numpy()
    return found


def test_means_frequencies_and_maxima(ours: tuple[Selection, Any], brute: Brute) -> None:
    columns = ours[0].columns
    for side, codes in (("base", brute.stacked(brute.base)), ("adapted", brute.stacked(brute.adapted))):
        assert len(codes) == ours[0].figures["n_tokens"]
        np.testing.assert_allclose(columns[f"mean_{side}"], codes.mean(0, dtype=np.float64), rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(columns[f"freq_{side}"], (codes > 0).mean(0), atol=2 / len(codes))
        np.testing.assert_allclose(columns[f"max_{side}"], codes.max(0), rtol=1e-4, atol=1e-5)


def test_every_context_is_what_it_says(ours: tuple[Selection, dict[int, list[Context]]], brute: Brute) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM / "model")
    assert set(ours[1]) == set(ours[0].latents)
    for latent, contexts in ours[1].items():
        splits = {split: {c.doc for c in contexts if c.split == split} for split in ("explain", "score")}
        assert not splits["explain"] & splits["score"]
        places = [(c.kind, c.doc, int(brute.sequence[c.doc][c.position])) for c in contexts]
        assert len(set(places)) == len(places), "one context per sequence and kind"
        for c in contexts:
            first = c.position - c.peak
            window = slice(first, first + len(c.tokens))
            assert c.tokens == tuple(tokenizer.decode([i]) for i in brute.ids[c.doc][window])
            for acts, side in ((c.act_base, brute.base), (c.act_adapted, brute.adapted)):
                np.testing.assert_allclose(acts, np.nan_to_num(side[c.doc][window, latent]), rtol=1e-4, atol=2e-5)
            if c.kind == "silent":
                assert not any(c.act_base)
                assert not any(c.act_adapted)


@pytest.mark.parametrize("kind", ["top", "top_base", "gain", "loss"])
def test_peaks_are_the_largest_of_their_split(
    ours: tuple[Selection, dict[int, list[Context]]], brute: Brute, kind: str
) -> None:
    """Each split's peaks are the largest sequence peaks of its documents, in order. A document's split is that of any
    context of it, of any latent: it is the same for all."""
    split_of = {c.doc: c.split for contexts in ours[1].values() for c in contexts}
    for latent, contexts in ours[1].items():
        for split in ("explain", "score"):
            mine = sorted((c for c in contexts if c.kind == kind and c.split == split), key=lambda c: c.rank)
            found = [_value(kind, c.act_base[c.peak], c.act_adapted[c.peak]) for c in mine]
            docs = [doc for doc in brute.base if split_of.get(doc) == split]
            peaks = [peak for doc in docs for peak in _peaks(brute, doc, latent, kind) if peak > 2e-5]
            expected = sorted(peaks, reverse=True)[: len(found)]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)
            assert len(found) == min(len(peaks), PER_SPLIT[kind])  # pyright: ignore[reportArgumentType]


def _peaks(brute: Brute, doc: int, latent: int, kind: str) -> list[float]:
    values = _value(kind, brute.base[doc][:, latent], brute.adapted[doc][:, latent])
    numbers = brute.sequence[doc]
    kept = ~np.isnan(values) & (numbers >= 0)
    return [float(values[kept & (numbers == s)].max()) for s in np.unique(numbers[kept])]


def _value(kind: str, base: Any, adapted: Any) -> Any:
    return {"top": adapted, "top_base": base, "gain": adapted - base, "loss": base - adapted}[kind]
