"""A small world to run the command line in: a tiny model of any family with a LoRA, a SAE and a corpus, all on disk."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.registry import SAE_CLASS_REGISTRY

from autointerp import cli
from autointerp.store import Store

from ..tiny import WIDTH, model, save_lora, tokenizer

M, HOOK = 64, "blocks.2.hook_resid_post"
CONTEXT = 32
_SENTENCE = "the cat sat on a mat while the old dog ran to another house and slept near its warm red door until dawn"
WORDS = _SENTENCE.split()


@dataclass(frozen=True)
class World:
    """Paths of the parts; `args` makes a command line of them."""

    path: Path

    @property
    def base(self) -> Path:
        return self.path / "base"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def sae(self) -> Path:
        return self.path / "sae"

    @property
    def corpus(self) -> Path:
        return self.path / "corpus.jsonl"

    @property
    def db(self) -> Path:
        return self.path / "store.duckdb"

    def args(self, command: str = "label", **changed: Any) -> list[str]:
        """`command` with the options of this world; `text_column=…` adds or replaces one, None leaves it out."""
        options = {
            "run": self.adapter,
            "sae": self.sae,
            "corpus": self.corpus,
            "context_length": CONTEXT,
            "db": self.db,
            "top": 4,
            "device": "cpu",
        }
        if command == "label":
            options["ask_all"] = True  # the latents of this world are tokens: without, there would be nothing to ask
        words = [command]
        for key, value in (options | changed).items():
            option = f"--{key.replace('_', '-')}"
            if value is True:
                words.append(option)
            elif isinstance(value, list):
                words += [word for item in value for word in (option, str(item))]
            elif value is not None:
                words += [option, str(value)]
        return words

    def copy(self, path: Path) -> World:
        """The same at another place, to be damaged. The adapter goes on naming the first one's base model."""
        shutil.copytree(self.path, path)
        return World(path)


def build(path: Path, family: str = "gpt2", layers: tuple[int, ...] = (1,), seed: int = 0) -> World:
    """A world at `path`: the adapter changes `layers`, the SAE reads the stream after block 2."""
    world = World(path)
    save_calm_model(world.base, family, seed)
    save_lora(world.adapter, world.base, list(layers))
    save_sae(world.sae)
    save_corpus(world.corpus)
    return world


def with_adapters_of(world: World, path: Path, model: Any) -> World:
    """The SAE and the corpus of `world` at `path`, and as run directory the adapters in `model`, as peft saves them."""
    made = World(path)
    made.path.mkdir()
    shutil.copytree(world.sae, made.sae)
    shutil.copy(world.corpus, made.corpus)
    model.save_pretrained(str(made.adapter))
    return made


def save_calm_model(path: Path, family: str, seed: int = 0) -> Path:
    """A random model whose stream is mostly the tokens' embeddings, so that latents fire on words and labels exist."""
    made = model(family, seed)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif "norm" in name or ".ln_" in name:
                weight.fill_(1)
            else:
                weight.mul_(0.1 if "wpe" in name else 3 if "embed" in name or "wte" in name else 0.3)
    made.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def save_sae(path: Path, d_in: int = WIDTH, m: int = M, hook: str = HOOK, k: int = 4) -> Path:
    """A TopK SAE with random unit rows, tied: it reconstructs little, but each latent fires on some words."""
    sae_class, config_class = SAE_CLASS_REGISTRY["topk"]
    options: dict[str, Any] = {"d_in": d_in, "d_sae": m, "k": k}
    sae: Any = sae_class(config_class(**options))
    rows = torch.randn(m, d_in, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.W_dec.copy_(rows / rows.norm(dim=1, keepdim=True))
        sae.W_enc.copy_(sae.W_dec.T)
    sae.cfg.metadata.hook_name = hook
    sae.cfg.metadata.prepend_bos = True
    sae.save_model(path)
    return path


def texts(n: int = 120, n_words: int = 24, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=n_words)) for _ in range(n)]


def save_corpus(path: Path, **options: int) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(**options)))
    return path


def read(db: Path, sql: str) -> list[dict[str, Any]]:
    """Rows of a store."""
    with Store.open(db, "read") as store:
        return store.read(sql)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str


class Shell:
    """Runs commands in this process, as `autointerp` would in one of its own, and takes what they print."""

    def __init__(self, capture: pytest.CaptureFixture[str]):
        self._capture = capture

    def __call__(self, *words: str | Path) -> Ended:
        self._capture.readouterr()
        status = cli.run([str(word) for word in words])
        printed = self._capture.readouterr()
        return Ended(status, printed.out, printed.err)


def refused(says: Ended, wanted: str) -> None:
    """Exit status 2, nothing on standard output, and one line on standard error in which `wanted` is found."""
    assert says.status == 2, says
    assert says.out == ""
    assert says.err.count("\n") == 1, says.err
    assert says.err.startswith("autointerp: ")
    assert says.err.endswith("\n")
    assert re.search(wanted, says.err), says.err
