"""The embedding scorer on a tiny local model whose vectors are those of the words."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from autointerp.errors import InputError
from autointerp.labeling.base import LabelingSettings, find_scorer, make_scorer
from autointerp.labeling.labelers.lexical import LexicalLabeler
from autointerp.records import Label
from tests.faults.harness import planted

SETTINGS = LabelingSettings("run")


def test_cosines_tell_firing_from_silent_windows(tmp_path: Path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    import torch
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding  # pyright: ignore
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[UNK]", "assert", "return", "xyzzy", "the", "run", "of", "day", "is", "long"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    module = StaticEmbedding(tokenizer, embedding_weights=torch.eye(len(words)).numpy())
    sentence_transformers.SentenceTransformer(modules=[module]).save(str(tmp_path / "tiny"))
    scorer = make_scorer(f"embedding:{tmp_path / 'tiny'}", LexicalLabeler(), SETTINGS)
    label = Label(7, "lexical", "ok", "assert", "assert")
    wrong = replace(label, latent=9, label="xyzzy", explanation="xyzzy")
    score = asyncio.run(scorer.score(planted(), label, wrong))
    assert (score.value, score.null_value, score.n_examples) == (1.0, 0.5, 24)
    assert 0.7 < (score.ci_low or 0) < 1
    nothing = replace(label, label="no clear pattern")
    assert asyncio.run(scorer.score(planted(), nothing, wrong)).value is None


def test_its_model_is_named_in_the_scorer():
    for spec in ("embedding", "embedding:", "detection:model"):
        with pytest.raises(InputError, match="scorer"):
            find_scorer(spec)
    assert find_scorer("embedding:a/b")[1] == "a/b"
    assert find_scorer("embedding:C:/a")[1] == "C:/a"


def test_what_cannot_be_loaded_is_named(tmp_path: Path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(InputError, match="no model that can be loaded"):
        make_scorer(f"embedding:{tmp_path / 'none'}", LexicalLabeler(), SETTINGS)
