"""What selecting latents and collecting their contexts costs over what it cannot do without.

    python benchmarks/collection.py [--case demo|gpt2] [--tokens N] [--repeats R]   the whole against the floor
    python benchmarks/collection.py --memory 200000 1000000 [--case demo|gpt2]      peak memory, a fresh process a size

The floor: plain transformers and peft modules, base and adapted, up to the hook, the blocks below the adapter run once
for both, and one bare product x W_enc + b on the base side. The whole: `Evidence.select` and `Evidence.contexts` for
100 latents, from text to contexts and to what both models predict at their peaks, for which they run to the end. Floor
and whole run in this process in turn on the same tokens, dtype and threads, so that what else the machine does falls on
both; loading is in neither.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait make any measurement on a shared machine one of the others' load.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TOP = 100
TOKENS = {"demo": 1_000_000, "gpt2": 48_000}
CHARS_PER_TOKEN = 5
"""More than the demo's tokenizer needs, so that a corpus is never short."""
CHARS_PER_DOCUMENT = 2000
BATCHES = (1024, 4096)
"""Positions of the floor's batches: it takes the quicker of these, as the first WARM_UP positions tell."""
WARM_UP = 32_768
GPT2_LATENTS, GPT2_L0, GPT2_SPREAD, GPT2_HOOK, GPT2_ADAPTED = 24_576, 60, 1.0, 8, list(range(3, 12))


@dataclass(frozen=True)
class Timing:
    """Seconds of one run of the whole."""

    select: float
    contexts: float
    predictions: float
    selected: int
    n_contexts: int
    l0: float
    disk: int
    """Bytes of the spool."""
    cpu: float
    """Processor seconds of select, contexts and predictions, all threads."""

    @property
    def whole(self) -> float:
        return self.select + self.contexts + self.predictions


def make_case(name: str, folder: Path, tokens: int) -> dict[str, Any]:
    """What `Run.load` needs for a case; model, adapter and SAE of the gpt2 case are written under `folder`."""
    from autointerp.demo import ORGANISM

    corpus = folder / f"corpus-{tokens}.jsonl"
    if not corpus.exists():
        with corpus.open("w") as file:
            for text in _texts(tokens):
                for at in range(0, len(text), CHARS_PER_DOCUMENT):
                    file.write(json.dumps({"text": text[at : at + CHARS_PER_DOCUMENT]}) + "\n")
    flags = {"corpus": str(corpus), "max_tokens": tokens, "top": TOP, "device": "cpu"}
    if name == "demo":
        return {"path": str(ORGANISM)} | flags
    if not (folder / "gpt2").exists():
        _write_gpt2(folder / "gpt2", ORGANISM / "model", flags)
    # What a random adapter writes hangs on fewer than 100 latents: another selector chooses, `change` does its work.
    return {"path": str(folder / "gpt2"), "selector": ["mean-shift", "change"]} | flags


def _texts(tokens: int) -> Iterator[str]:
    """The demo's corpus, then the standard library, again and again until there is enough."""
    from autointerp.demo import ORGANISM
    from autointerp.demo.text import library_documents

    texts = [json.loads(line)["text"] for line in (ORGANISM / "corpus.jsonl").read_text().splitlines()]
    if sum(map(len, texts)) < tokens * CHARS_PER_TOKEN:
        texts += [document.text for document in library_documents()]
    length = 0
    while length < tokens * CHARS_PER_TOKEN:
        for text in texts:
            yield text
            length += len(text)


def _write_gpt2(folder: Path, tokenizer: Path, flags: dict[str, Any]) -> None:
    """GPT-2 small with random weights, a random LoRA, and a SAE of random directions with a realistic L0."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    from benchmarks.drawn import save_drawn

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(initializer_range=0.05)).eval()
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "model")
    directions = torch.randn(GPT2_LATENTS, 768)
    (folder / "run.yaml").write_text("base: model\nadapter: adapter\nsae: sae\n")
    lora = LoraConfig(
        r=8, target_modules=["c_attn", "c_fc", "c_proj"], layers_to_transform=GPT2_ADAPTED, fan_in_fan_out=True
    )
    adapted = get_peft_model(model, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(str(folder / "adapter"))

    def save(x: torch.Tensor) -> None:
        save_drawn(folder / "sae", f"blocks.{GPT2_HOOK}.hook_resid_post", directions, x, GPT2_L0, GPT2_SPREAD)

    save(torch.randn(2, 768))  # some dictionary, by which the activations can be read that its biases hang on
    save(Loaded.load({"path": str(folder)} | flags).sample(8192))


class Loaded:
    """Everything that is loaded once, and the floor's own copy of the models."""

    def __init__(self, run: Any, evidence: Any):
        self.run, self.evidence = run, evidence

    @classmethod
    def load(cls, flags: dict[str, Any]) -> Loaded:
        import logging

        from autointerp.evidence.gather import Evidence
        from autointerp.run import Run

        logging.getLogger("transformers").setLevel(logging.ERROR)
        run = Run.load(**flags)
        return cls(run, Evidence.load(run))

    def sample(self, n: int) -> Any:
        """x_base [n, d] of the first counted tokens."""
        import torch

        rows, have = [], 0
        for batch in self.evidence.corpus.batches():
            x, _ = self.evidence.model.activations(batch.ids)
            rows.append(x.cpu()[batch.counted])
            have += len(rows[-1])
            if have >= n:
                break
        return torch.cat(rows)[:n]

    def whole(self) -> Timing:
        """Select, collect, predict, once, from the text on."""
        from autointerp.evidence.gather import Evidence
        from autointerp.evidence.predictions import Predictor

        predicting = 0.0
        plain = Predictor.predict

        def timed(self: Predictor, contexts: Any) -> Any:
            nonlocal predicting
            begin = time.perf_counter()
            found = plain(self, contexts)
            predicting += time.perf_counter() - begin
            return found

        async def contexts() -> int:
            return sum([len(found) async for _, found, _ in evidence.contexts()])

        loaded = self.evidence
        with Evidence(self.run, loaded.model, loaded.dictionary, loaded.corpus) as evidence:
            Predictor.predict = timed
            try:
                cpu, begin = time.process_time(), time.perf_counter()
                selection, _ = evidence.select(lambda _n: None)
                middle = time.perf_counter()
                n_contexts = asyncio.run(contexts())
                end, cpu = time.perf_counter(), time.process_time() - cpu
            finally:
                Predictor.predict = plain
            spool: Any = evidence._spool
            disk = os.fstat(spool._streams.fileno()).st_size
        l0 = float(selection.figures["l0_base"] or 0)
        return Timing(
            middle - begin, end - middle - predicting, predicting, len(selection.latents), n_contexts, l0, disk, cpu
        )


class Floor:
    """Bare forward passes to the hook and one encoder product, written without this package's models."""

    def __init__(self, loaded: Loaded):
        from peft import PeftModel
        from transformers import GPT2LMHeadModel

        run = loaded.run
        self.device = loaded.evidence.model.device
        plain = GPT2LMHeadModel.from_pretrained(run.base).eval().to(self.device)
        peft = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(run.base), run.adapter).eval().to(self.device)
        first = min(peft.peft_config["default"].layers_to_transform)  # pyright: ignore
        end = int(run.hook.split(".")[1]) + 1
        self.wte, self.wpe = plain.transformer.wte, plain.transformer.wpe
        self.shared, self.base = plain.transformer.h[:first], plain.transformer.h[first:end]
        self.adapted = peft.get_base_model().transformer.h[first:end]  # pyright: ignore
        dictionary = loaded.evidence.dictionary
        self.W_enc = dictionary.W_enc
        self.bias = dictionary.b_enc - dictionary.b_dec @ dictionary.W_enc
        corpus = loaded.evidence.corpus
        self.batches = self._batches(corpus, min(BATCHES, key=lambda positions: self._warm_up(corpus, positions)))
        self._check(loaded)

    def _batches(self, corpus: Any, positions: int) -> list[tuple[Any, Any]]:
        return [(batch.ids, batch.counted) for batch in corpus.batches(positions)]

    def _warm_up(self, corpus: Any, positions: int) -> float:
        """Seconds of the first WARM_UP positions, the quickest of three times."""
        self.batches = self._batches(corpus, positions)[: WARM_UP // positions]
        return min(self.seconds()[0] for _ in range(3))

    def _check(self, loaded: Loaded) -> None:
        import torch

        ids, counted = self.batches[0]
        ours = [x.cpu()[counted] for x in loaded.evidence.model.activations(ids)]
        torch.testing.assert_close([x.cpu()[counted] for x in self.activations(ids)], ours, rtol=1e-3, atol=1e-3)

    def activations(self, ids: Any) -> tuple[Any, Any]:
        """(x_base, x_adapted) [b, t, d]."""
        import torch

        with torch.inference_mode():
            x = _through(self.shared, self.wte(ids.to(self.device)) + self.wpe.weight[: ids.shape[1]])
            return _through(self.base, x), _through(self.adapted, x)

    def seconds(self) -> tuple[float, float]:
        """One pass over the batches: seconds, and processor seconds of all threads."""
        import torch

        cpu, begin = time.process_time(), time.perf_counter()
        for ids, counted in self.batches:
            x_base, _ = self.activations(ids)
            with torch.inference_mode():
                for rows in x_base[counted.to(self.device)].split(1024):
                    torch.addmm(self.bias, rows, self.W_enc)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin, time.process_time() - cpu


def _through(blocks: Any, x: Any) -> Any:
    for block in blocks:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    return x


def compare(flags: dict[str, Any], repeats: int) -> None:
    """Prints the table row of a case: floor and whole in turn, the floor warmed up."""
    loaded = Loaded.load(flags)
    floor = Floor(loaded)
    floors, wholes = [], []
    for repeat in range(repeats):
        if repeat % 2:
            wholes.append(loaded.whole())
            floors.append(floor.seconds())
        else:
            floors.append(floor.seconds())
            wholes.append(loaded.whole())
        print(f"  floor {floors[-1]}, {wholes[-1]}", file=sys.stderr)
    pairs = list(zip(wholes, floors, strict=True))
    ratios = sorted(whole.whole / bare for whole, (bare, _) in pairs)
    cpu = statistics.median(whole.cpu / bare for whole, (_, bare) in pairs)
    select, contexts, predictions = (
        statistics.median(getattr(whole, part) for whole in wholes) for part in ("select", "contexts", "predictions")
    )
    first = wholes[0]
    print(
        f"| {flags['max_tokens']:,} | {first.l0:.0f} | {first.selected} | {first.n_contexts:,}"
        f" | {statistics.median(bare for bare, _ in floors):.1f} | {select:.1f} + {contexts:.1f} + {predictions:.1f}"
        f" | **{statistics.median(ratios):.2f}** ({ratios[0]:.2f}–{ratios[-1]:.2f}) | {cpu:.2f}"
        f" | {first.disk / 1e6:.0f} MB |"
    )


def memory(name: str, folder: Path, sizes: list[int]) -> None:
    """Prints a row for each size: peak resident memory of a fresh process that does the whole once."""
    for tokens in sizes:
        flags = make_case(name, folder, tokens)
        child = [sys.executable, __file__, "--child", json.dumps(flags)]
        done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
        print(done.stdout.strip())


def _child(flags: dict[str, Any]) -> None:
    loaded = Loaded.load(flags)
    before = peak_mb()
    timing = loaded.whole()
    print(
        f"| {flags['max_tokens']:,} | {before:.0f} MB | **{peak_mb():.0f} MB** | {timing.disk / 1e6:.0f} MB"
        f" | {timing.whole:.0f} s |"
    )


def peak_mb() -> float:
    """Peak resident memory of this process so far, MB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", choices=sorted(TOKENS), default="demo")
    parser.add_argument("--tokens", type=int, help="default: " + ", ".join(f"{k} {v:,}" for k, v in TOKENS.items()))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch; default: its own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.threads:
        import torch

        torch.set_num_threads(options.threads)
    if options.child:
        return _child(options.child)
    with tempfile.TemporaryDirectory() as folder:
        if options.memory:
            return memory(options.case, Path(folder), options.memory)
        flags = make_case(options.case, Path(folder), options.tokens or TOKENS[options.case])
        compare(flags | {"device": options.device}, options.repeats)


if __name__ == "__main__":
    main()
