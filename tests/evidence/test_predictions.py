"""Predictions are those of the plain models on the text up to the peak."""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp.evidence.gather import Evidence
from autointerp.evidence.predictions import N_CONTEXTS, N_TOKENS
from autointerp.records import Context, Prediction
from tests.evidence import world


@pytest.mark.parametrize("bos", [True, False])
def test_predictions_at_the_strongest_peaks(tmp_path: Path, bos: bool) -> None:
    base, adapter = world.saved_model(tmp_path)
    small = world.build(tmp_path, base, adapter, topk=False, bos=bos)
    contexts: dict[int, dict[int, Context]] = {}
    found: dict[tuple[int, int, str], list[Prediction]] = defaultdict(list)

    async def collect(evidence: Evidence) -> None:
        async for latent, mine, predictions in evidence.contexts():
            contexts[latent] = {context.context_id: context for context in mine}
            for p in predictions:
                assert p.latent == latent
                found[latent, p.context_id, p.side].append(p)

    with Evidence.load(small.run) as evidence:
        selection, _ = evidence.select(lambda _n: None)
        asyncio.run(collect(evidence))
        decode = evidence.decode
    assert set(contexts) == set(selection.latents)
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in Path(small.run.corpus or "").read_text().splitlines()]
    models = {
        "base": AutoModelForCausalLM.from_pretrained(base).eval(),
        "adapted": PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).eval(),
    }
    shown = {key[:2] for key in found}
    for latent, mine in contexts.items():
        best: set[int] = set()
        for split, n in N_CONTEXTS.items():
            of = {
                kind: [c for c in mine.values() if (c.kind, c.split) == (kind, split)] for kind in ("top", "top_base")
            }
            tops = sorted(of["top"] or of["top_base"], key=lambda c: c.rank)[:n]
            best |= {c.context_id for c in tops}
        assert {context_id for of, context_id in shown if of == latent} == best
    assert len(shown) > 10
    for (latent, context_id, side), predictions in found.items():
        context = contexts[latent][context_id]
        ids = tokenizer(texts[context.doc], add_special_tokens=False)["input_ids"]
        start = context.position // small.piece * small.piece
        text = [tokenizer.bos_token_id] * bos + ids[start : context.position + 1]
        with torch.inference_mode():
            probabilities = models[side](torch.tensor([text])).logits[0, -1].softmax(-1)
        assert [p.rank for p in predictions] == list(range(1, N_TOKENS + 1))
        likeliest = probabilities.topk(N_TOKENS)
        assert [p.probability for p in predictions] == pytest.approx(likeliest.values.tolist(), rel=1e-3)
        assert {p.token for p in predictions[:1]} <= {decode(int(i)) for i in likeliest.indices}
