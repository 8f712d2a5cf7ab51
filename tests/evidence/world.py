"""A tiny model, its LoRA, a dictionary and a corpus on disk, and the same computed the plain way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from autointerp.run import Run
from tests import tiny

HOOK = "blocks.2.hook_resid_post"
LATENTS, CONTEXT = 48, 32
WORDS = ["the", "cat", "sat", "on", "the", "mat", "and", "the", "dog", "ran", "to", "the", "other", "house"]


def write_corpus(path: Path, n_docs: int = 60, seed: int = 0) -> Path:
    """Documents of 3 to 90 words; some too short to count."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(3, 90))) for _ in range(n_docs)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_sae(path: Path, stream: torch.Tensor, topk: bool, prepend_bos: bool) -> Path:
    """Random directions; as JumpReLU, the first latent never fires and the last on 90 % of `stream` [n, d]."""
    draw = torch.Generator().manual_seed(0)
    d = stream.shape[1]
    sae = (
        TopKSAE(TopKSAEConfig(d_in=d, d_sae=LATENTS, k=8))
        if topk
        else JumpReLUSAE(JumpReLUSAEConfig(d_in=d, d_sae=LATENTS))
    )
    with torch.no_grad():
        sae.W_enc.copy_(torch.randn(d, LATENTS, generator=draw))
        sae.W_dec.copy_(torch.nn.functional.normalize(torch.randn(LATENTS, d, generator=draw), dim=1))
        sae.b_dec.copy_(stream.mean(0))
        if isinstance(sae, JumpReLUSAE):
            pre = (stream - sae.b_dec) @ sae.W_enc
            rates = torch.linspace(0.0, 0.9, LATENTS)
            sae.b_enc.copy_(-torch.stack([pre[:, j].quantile(1 - rate) for j, rate in enumerate(rates.tolist())]))
            sae.b_enc[0] -= 100
            sae.threshold.copy_(torch.full((LATENTS,), 0.01))
    sae.cfg.metadata.hook_name, sae.cfg.metadata.prepend_bos = HOOK, prepend_bos
    sae.save_model(path)
    return path


@dataclass(frozen=True)
class World:
    """Everything on disk."""

    run: Run
    base: Path
    bos: bool

    @property
    def piece(self) -> int:
        """Document tokens of a full sequence."""
        return CONTEXT - self.bos


def build(folder: Path, base: Path, adapter: Path, *, topk: bool, bos: bool) -> World:
    """`folder` gets the SAE and the corpus."""
    corpus = write_corpus(folder / "corpus.jsonl")
    sae = write_sae(folder / "sae", _stream(base, corpus), topk, bos)
    run = Run.load(
        adapter,
        base=str(base),
        sae=str(sae),
        corpus=str(corpus),
        context_length=CONTEXT,
        max_tokens=10**6,
        device="cpu",
    )
    return World(run, base, bos)


@torch.no_grad()
def _stream(base: Path, corpus: Path) -> torch.Tensor:
    """Base activations at the hook of the first documents [n, d]."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()[:30]]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:CONTEXT] for text in texts]
    states = [model(torch.tensor([piece]), output_hidden_states=True).hidden_states[3][0] for piece in ids if piece]
    return torch.cat(states)


@dataclass(frozen=True)
class Plain:
    """What a plain computation gives, sequence by sequence: (doc, start) → [t, m]."""

    base: dict[tuple[int, int], np.ndarray]
    adapted: dict[tuple[int, int], np.ndarray]
    ids: dict[tuple[int, int], list[int]]


@torch.no_grad()
def plainly(world: World) -> Plain:
    """transformers, peft and sae_lens, one sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(world.base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(world.base), world.run.adapter).eval()
    sae = SAE.load_from_disk(world.run.sae)
    base, adapted, all_ids = {}, {}, {}
    for doc, line in enumerate(Path(str(world.run.corpus)).read_text().splitlines()):
        ids = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        for start in range(0, len(ids), world.piece):
            piece = ids[start : start + world.piece]
            if len(piece) < 8:
                continue
            window = torch.tensor([[tokenizer.bos_token_id] * world.bos + piece])
            sides = []
            for run in (model.disable_adapter, torch.no_grad):
                with run():
                    hidden = model(window, output_hidden_states=True).hidden_states[3][0, world.bos :]
                sides.append(sae.encode(hidden).numpy())
            base[doc, start], adapted[doc, start] = sides
            all_ids[doc, start] = piece
    return Plain(base, adapted, all_ids)


def saved_model(folder: Path) -> tuple[Path, Path]:
    """(base, adapter): gpt2 style, a LoRA on layers 1 and 2."""
    base = tiny.save_model(folder / "base", "gpt2")
    return base, tiny.save_lora(folder / "lora", base, [1, 2])
