"""Train the demo's organism: a small language model, its SAE and an adapter, from the standard library's own text.

    python -m autointerp.demo.train [--out DIR] [--stage all|model|sae|adapter|corpus] [--threads N] [--scale F]

Stages, in order; each reads what the ones before it left in DIR:
  model    byte-level BPE (4096 tokens) and a GPT-2-style model (4 layers, d=128, context 128) on code and docs;
  sae      BatchTopK, 2048 latents, k=20, after block 2, on all three domains; saved as JumpReLU in SAELens format;
  adapter  PEFT LoRA (r=8, layers 1–3) on unittest code;
  corpus   held-out text of the three domains, run.yaml, and the measured card.json and README.md.

Everything is seeded and counted in steps. It costs about a quarter of an hour of one core's time, less wall time on two
free cores; where cores are shared with other work, `--threads 1` is faster, since two threads wait for each other.
Text comes from the Python that runs this (see `autointerp.demo.text`), so another version gives a similar organism.
The model's weights are float16 on disk; SAE, adapter and figures are of those rounded weights, computed in float32.
"""

import json
import platform
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import torch
import yaml
from sae_lens import SAE

from autointerp.demo import dictionary, language_model
from autointerp.demo.text import Document, corpus_documents, library_documents, split_of

DEFAULT_OUT = Path(__file__).parent / "organism"
RUN = {
    "base": "model",
    "adapter": "adapter",
    "sae": "sae",
    "corpus": "corpus.jsonl",
    "hook": dictionary.HOOK,
    "text_column": "text",
    "context_length": language_model.CONTEXT,
    "max_tokens": 1_000_000,
}


@dataclass(frozen=True)
class Plan:
    """How long each stage trains, in steps, and how many windows of 128 tokens a step sees."""

    seed: int = 0
    model_steps: int = 1800
    model_batch: int = 16
    sae_steps: int = 2200
    sae_batch: int = 8
    adapter_steps: int = 1100
    adapter_batch: int = 16
    corpus_chars_per_domain: int = 200_000

    def scaled(self, factor: float) -> "Plan":
        """The same plan with every number of steps multiplied by `factor` (for a quick look)."""
        steps = {k: max(1, round(v * factor)) for k, v in asdict(self).items() if k.endswith("_steps")}
        return Plan(**(asdict(self) | steps))

    def tokens(self) -> dict[str, int]:
        """Tokens that each stage trains on, BOS included."""
        stages = ("model", "sae", "adapter")
        return {s: getattr(self, f"{s}_steps") * getattr(self, f"{s}_batch") * language_model.CONTEXT for s in stages}


def training_text(documents: list[Document]) -> list[Document]:
    """The documents of files that are not held out."""
    return [d for d in documents if split_of(d.source) == "train"]


def train_model(out: Path, documents: list[Document], plan: Plan) -> None:
    """Stage `model`: tokenizer (on all domains, so that test vocabulary has tokens of its own), then base model."""
    training = training_text(documents)
    language_model.train_tokenizer((d.text for d in training), out / "model")
    windows = language_model.windows_of(training, out / "model")
    language_model.train_base(windows, plan.model_steps, plan.model_batch, plan.seed, out / "model")


def train_sae(out: Path, documents: list[Document], plan: Plan) -> None:
    """Stage `sae`: on the base model alone; the adapter's effect is to be read in the base's own latents."""
    windows = language_model.windows_of(training_text(documents), out / "model")
    model = language_model.load_base(out / "model")
    dictionary.train_sae(model, windows, plan.sae_steps, plan.sae_batch, plan.seed, out / "sae")


def train_adapter(out: Path, documents: list[Document], plan: Plan) -> None:
    """Stage `adapter`: LoRA on the training part of the tests."""
    windows = language_model.windows_of(training_text(documents), out / "model")
    language_model.train_adapter(
        out / "model", windows, plan.adapter_steps, plan.adapter_batch, plan.seed, out / "adapter"
    )


def write_corpus(out: Path, documents: list[Document], plan: Plan) -> None:
    """Stage `corpus`: held-out documents, the run's settings, and what was measured on those documents."""
    corpus = corpus_documents(documents, plan.corpus_chars_per_domain, plan.seed)
    lines = [json.dumps(d._asdict(), ensure_ascii=False) + "\n" for d in corpus]
    (out / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    (out / "run.yaml").write_text(yaml.safe_dump(RUN, sort_keys=False))
    card = measure(out) | {
        "plan": asdict(plan),
        "trained_tokens": plan.tokens(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
    (out / "README.md").write_text(readme(card))


def read_corpus(organism: Path) -> list[Document]:
    """The documents of an organism's corpus.jsonl."""
    with (organism / "corpus.jsonl").open(encoding="utf-8") as lines:
        return [Document(**json.loads(line)) for line in lines]


def measure(organism: Path) -> dict:
    """Losses per domain with and without the adapter, and the SAE's quality, on the shipped held-out corpus."""
    windows = language_model.windows_of(read_corpus(organism), organism / "model")
    adapted = language_model.load_adapted(organism)
    after = language_model.losses(adapted, windows)
    base = language_model.load_base(organism / "model")
    before = language_model.losses(base, windows)
    quality = dictionary.sae_quality(SAE.load_from_disk(organism / "sae"), base, torch.cat(list(windows.values())))
    return {
        "loss": {d: {"base": round(before[d], 4), "adapted": round(after[d], 4)} for d in windows},
        "sae": {name: round(value, 4) for name, value in quality._asdict().items()},
    }


def readme(card: dict) -> str:
    """The organism's README, filled with the card's figures."""
    rows = "\n".join(
        f"| {domain} | {loss['base']:.2f} | {loss['adapted']:.2f} | {loss['adapted'] - loss['base']:+.2f} |"
        for domain, loss in card["loss"].items()
    )
    sae, plan = card["sae"], card["plan"]
    return f"""# The demo's organism

A language model small enough to ship, with a known change in it: `model/` learnt Python library code and its
documentation, `adapter/` then learnt unittest code. `sae/` is a dictionary of the base model's residual stream.

- `model/`: GPT-2 style, 4 layers, d=128, 4 heads, context 128, vocabulary 4096, float16 on disk;
  {plan["model_steps"]} steps of {plan["model_batch"]} windows.
- `sae/`: SAELens JumpReLU (trained as BatchTopK, k={dictionary.K}), {dictionary.N_LATENTS} latents,
  `{dictionary.HOOK}`; FVU {sae["fvu"]:.3f}, L0 {sae["l0"]:.1f}, {sae["dead"]:.1%} of them never fire on the corpus.
- `adapter/`: PEFT LoRA, r=8, layers 1–3; {plan["adapter_steps"]} steps.
- `corpus.jsonl`: held-out documents (domain, source, text), no file of which was trained on.
- `run.yaml`: the settings of a run on it. `card.json`: the figures and how they were made.

| held-out loss, nats per token | base | adapted | change |
|---|---|---|---|
{rows}

Made by `python -m autointerp.demo.train` with Python {card["python"]}, whose standard library is the text.

## Licence of the text
`corpus.jsonl` and the tokenizer's vocabulary derive from the Python standard library, © Python Software Foundation,
under the PSF License Version 2 (https://docs.python.org/3/license.html); the weights were trained on that text alone.
"""


STAGES: dict[str, Callable[[Path, list[Document], Plan], None]] = {
    "model": train_model,
    "sae": train_sae,
    "adapter": train_adapter,
    "corpus": write_corpus,
}


@click.command(help=(__doc__ or "").splitlines()[0])
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), default=DEFAULT_OUT, help="organism folder")
@click.option("--stage", type=click.Choice(["all", *STAGES]), default="all", show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="threads for torch; 1 where cores are shared")
@click.option("--scale", type=float, default=1.0, show_default=True, help="multiplies every number of steps")
def main(out: Path, stage: str, threads: int | None, scale: float) -> None:
    if threads:
        torch.set_num_threads(threads)
    out.mkdir(parents=True, exist_ok=True)
    documents = library_documents()
    plan = Plan().scaled(scale)
    for name in STAGES if stage == "all" else [stage]:
        STAGES[name](out, documents, plan)


if __name__ == "__main__":
    main()
