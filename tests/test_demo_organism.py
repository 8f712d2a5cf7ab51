"""The organism that ships with the demo: its size, figures and split, and that the script that makes it still runs."""

from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from sae_lens import SAE
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp.demo import dictionary, language_model, text, train

ORGANISM = train.DEFAULT_OUT


@pytest.fixture(scope="module")
def windows() -> language_model.Windows:
    return language_model.windows_of(train.read_corpus(ORGANISM), ORGANISM / "model")


def test_the_folder_is_complete_and_small():
    run = yaml.safe_load((ORGANISM / "run.yaml").read_text())
    assert all((ORGANISM / run[part]).exists() for part in ("base", "adapter", "sae", "corpus"))
    assert sum(f.stat().st_size for f in ORGANISM.rglob("*") if f.is_file()) <= 8_000_000
    for written in ("README.md", "card.json", "adapter/adapter_config.json", "sae/cfg.json", "model/config.json"):
        assert "/root" not in (ORGANISM / written).read_text()


def test_no_document_of_the_corpus_comes_from_a_training_file():
    corpus = train.read_corpus(ORGANISM)
    assert {text.split_of(d.source) for d in corpus} == {"held-out"}
    characters = {domain: sum(len(d.text) for d in corpus if d.domain == domain) for domain in text.DOMAINS}
    assert min(characters.values()) > 0.8 * max(characters.values())


def test_the_tokenizer_adds_nothing_by_itself():
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM / "model")
    source = "def f(x):\n    return 'é'  # ∑\n"
    ids = tokenizer(source)["input_ids"]
    assert tokenizer.decode(ids) == source
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == language_model.BOS not in ids
    assert len(tokenizer) == language_model.VOCABULARY


def test_the_sae_reconstructs_held_out_text_and_few_latents_are_dead(windows):
    sae = SAE.load_from_disk(ORGANISM / "sae")
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
    assert sae.cfg.metadata.hf_hook_name == "transformer.h.2"
    assert sae.cfg.metadata.prepend_bos is True
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2048), atol=1e-3, rtol=0)
    base = language_model.load_base(ORGANISM / "model")
    quality = dictionary.sae_quality(sae, base, torch.cat(list(windows.values())))
    assert quality.fvu <= 0.10
    assert quality.dead <= 0.05


@torch.no_grad()
def test_the_adapter_learnt_tests_and_forgot_little_else(windows):
    base = AutoModelForCausalLM.from_pretrained(ORGANISM / "model").eval()
    assert base.dtype == torch.float32  # float16 on disk, float32 in use, without the caller's doing
    sample = {domain: ids[::6] for domain, ids in windows.items()}
    adapted = PeftModel.from_pretrained(base, ORGANISM / "adapter").eval()
    after = language_model.losses(adapted, sample)
    with adapted.disable_adapter():
        before = language_model.losses(adapted, sample)
    assert before["tests"] - after["tests"] >= 0.4
    assert max(after[domain] - before[domain] for domain in ("code", "docs")) <= 0.3


def test_docstrings_leave_the_code_and_become_docs(tmp_path: Path):
    docstring = "Say hello to whoever is named, in words that are long enough to keep."
    module = tmp_path / "hello.py"
    module.write_text(f'def hello(name):\n    """{docstring}"""\n    return name\n')
    found = dict(text.texts_of(module, tmp_path))
    assert found == {"code": "def hello(name):\n    return name\n", "docs": docstring + "\n"}


def test_a_module_under_test_counts_only_with_test_cases(tmp_path: Path):
    (tmp_path / "test").mkdir()
    case, fixture = tmp_path / "test" / "case.py", tmp_path / "test" / "fixture.py"
    case.write_text("class T(unittest.TestCase):\n    pass\n")
    fixture.write_text("VALUE = 1\n")
    assert [domain for domain, _ in text.texts_of(case, tmp_path)] == ["tests"]
    assert list(text.texts_of(fixture, tmp_path)) == []


def test_pieces_end_at_lines_and_lose_only_a_short_rest():
    whole = "".join(f"line {i}\n" for i in range(1000))
    pieces = text.cut_at_lines(whole, size=2000)
    assert all(p.endswith("\n") and len(p) < 2020 for p in pieces)
    assert whole.startswith("".join(pieces))
    assert len(whole) - len("".join(pieces)) < text.MIN_CHARS


def test_every_stage_runs(tmp_path: Path):
    documents = [d for d in train.read_corpus(ORGANISM) if len(d.text) > 2000]
    sources = {text.split_of(name): name for name in (f"module{i}.py" for i in range(30))}
    split = [d._replace(source=sources["train" if i % 3 else "held-out"]) for i, d in enumerate(documents)]
    plan = train.Plan(model_steps=2, model_batch=2, sae_steps=2, sae_batch=2, adapter_steps=2, adapter_batch=2)
    for stage in train.STAGES.values():
        stage(tmp_path, split, plan)
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in ORGANISM.iterdir()}
    assert (tmp_path / "README.md").read_text().startswith("# The demo's organism")
