"""What is lost when a dictionary is too large for the whole change map, and what the rest takes of memory.

    python -m benchmarks.screening [--latents 24576 65536] [--tokens N] [--steps N] [--batch N] [--saes FOLDER]
                                   [--drawn] [--write FILE]

For each size a SAE is trained on the demo's base model, seeded, as the demo's own was, and kept in FOLDER where one is
given; or, with --drawn, one is drawn in seconds, with directions of single tokens and latents that fire as unevenly.
Screening chooses `MAX_TRACKED` latents on the first tenth of the text; the map of these, and the map of every latent
that fires, are fitted on the other nine tenths: the same tokens, fitted and held out alike. Peak memory is that of a
fresh process which runs the tool's own selection on all the text.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.collection import peak_mb

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

K = 50
"""Latents whose coverage is compared."""
DRAWN_TOKENS, DRAWN_L0, DRAWN_SPREAD = 16_384, 40, 3.0
"""Of drawn dictionaries: such a spread that of 65,536 latents as many fire as of a trained SAE of 24,576."""


def train(sae: str, n_latents: int, steps: int, batch: int) -> None:
    """Trains the SAE into its folder; on a GPU where there is one."""
    from autointerp.demo import ORGANISM, dictionary, language_model
    from autointerp.demo.text import library_documents
    from autointerp.demo.train import training_text
    from autointerp.evidence.loading import torch_device

    windows = language_model.windows_of(training_text(library_documents()), ORGANISM / "model")
    model = language_model.load_base(ORGANISM / "model")
    model.to(torch_device("auto"))  # pyright: ignore[reportArgumentType]
    dictionary.train_sae(model, windows, steps, batch, 0, Path(sae), n_latents)


def draw(sae: str, n_latents: int) -> None:
    """Draws a dictionary into its folder: directions half of a token of the text, half random."""
    import torch
    from torch.nn.functional import normalize

    from autointerp.demo import ORGANISM
    from autointerp.demo.dictionary import HOOK
    from benchmarks.collection import Loaded
    from benchmarks.drawn import save_drawn

    torch.manual_seed(0)
    x = Loaded.load({"path": str(ORGANISM), "device": "cpu"}).sample(DRAWN_TOKENS)
    tokens = normalize(x - x.mean(0), dim=1)[torch.randint(len(x), (n_latents,))]
    directions = tokens + normalize(torch.randn_like(tokens), dim=1)
    save_drawn(Path(sae), HOOK, directions, x, DRAWN_L0, DRAWN_SPREAD)


def settings(sae: str, tokens: int) -> dict[str, object]:
    """What `Run.load` needs."""
    from autointerp.demo import ORGANISM

    return {"path": str(ORGANISM), "sae": sae, "max_tokens": tokens, "device": "cpu"}


def compare(sae: str, tokens: int) -> None:
    """Prints a row of the table: the map of screened latents beside the map of all that fire."""
    from autointerp.evidence.fitted import FittedMap
    from autointerp.evidence.screening import MAX_TRACKED, Screen
    from autointerp.run import Run
    from tests.planted.recording import record

    with tempfile.TemporaryDirectory() as scratch:
        recording = record(Run.load(**settings(sae, tokens)), tokens, Path(scratch))  # pyright: ignore[reportArgumentType]
    m, d = recording.W_dec.shape
    screen = Screen(m, d, len(recording.change) // 10, min(MAX_TRACKED, m // 2))
    screen.add(recording.z[: screen.budget], recording.change[: screen.budget])
    rest = replace(
        recording,
        **{
            name: getattr(recording, name)[screen.budget :]
            for name in ("z", "x_base", "change", "order", "position", "place")
        },
    )
    fires = np.flatnonzero(rest.rate() > 0)
    cells = []
    for tracked in (fires, screen.tracked):
        begin = time.perf_counter()
        fitted = FittedMap(rest.statistics(rest.change, tracked, encode=False), rest.dictionary.W_dec)
        chosen = [int(tracked[at]) for at in fitted.pursue(np.arange(len(tracked)), K)]
        cells.append((len(tracked), fitted.coverage(chosen)[-1], fitted.r2 or 0.0, time.perf_counter() - begin))
    (n_all, all_, r2_all, seconds_all), (n_few, few, r2_few, seconds_few) = cells
    fvu, _ = recording.measured.statistics.stream.fvu(recording.measured.statistics.n_tokens)
    recording.measured.spool.close()
    print(
        f"| {m:,} | {fvu:.3f} | {n_all:,} | {all_:.3f} | {r2_all:.3f} | {n_few:,} | {few:.3f} | {r2_few:.3f}"
        f" | **{few - all_:+.3f}** | {screen.left_out:.2f} | {seconds_few / seconds_all:.2f} |"
    )


def selection(sae: str, tokens: int) -> None:
    """Runs the tool's own selection and prints what it took, as a row."""
    from autointerp.evidence.gather import Evidence
    from autointerp.run import Run

    begin = time.perf_counter()
    with Evidence.load(Run.load(**settings(sae, tokens))) as evidence:  # pyright: ignore[reportArgumentType]
        loaded = peak_mb()
        chosen, _ = evidence.select(lambda _n: None)
    figures = chosen.figures
    print(
        f"| {evidence.dictionary.d_sae:,} | {figures['n_tokens']:,} | {len(chosen.latents)} | {figures['coverage']:.3f}"
        f" | {figures['random_coverage']:.3f} | {loaded:.0f} MB | **{peak_mb():.0f} MB** |"
        f" {time.perf_counter() - begin:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latents", type=int, nargs="+", default=[24_576, 65_536])
    parser.add_argument("--tokens", type=int, default=300_000)
    parser.add_argument("--steps", type=int, default=400, help="that the SAEs train for")
    parser.add_argument("--batch", type=int, default=4, help="windows of a training step")
    parser.add_argument("--saes", type=Path, help="where trained SAEs are kept and looked for")
    parser.add_argument("--drawn", action="store_true", help="draw the dictionaries instead of training them")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        step, given = args.child
        return STEPS[step](**given)
    kind, training = ("drawn", {}) if args.drawn else ("sae", {"steps": args.steps, "batch": args.batch})
    with tempfile.TemporaryDirectory() as folder:
        rows, taken = [], []
        for n in args.latents:
            sae = str((args.saes or Path(folder)) / "-".join(map(str, (kind, n, *training.values()))))
            if not Path(sae).exists():
                _in_a_fresh_process("draw" if args.drawn else "train", sae=sae, n_latents=n, **training)
            rows.append(_in_a_fresh_process("compare", sae=sae, tokens=args.tokens))
            taken.append(_in_a_fresh_process("selection", sae=sae, tokens=args.tokens))
    from benchmarks.planting import publish

    options = f"--latents {' '.join(map(str, args.latents))} --tokens {args.tokens}"
    if args.drawn:
        options += " --drawn"
        made = (
            "dictionaries of these sizes, drawn: directions half of a token of the text and half random, biases by "
            f"which they fire as unevenly as trained ones, {DRAWN_L0} at a token."
        )
    else:
        options += f" --steps {args.steps} --batch {args.batch}"
        made = f"SAEs of these sizes, trained on the demo's base model for {args.steps} steps."
    publish(
        f"""# Large dictionaries: the change map by screening

`python -m benchmarks.screening {options}`: {made} Screening ranks latents on the first \
tenth of the text; both maps are fitted on the rest. Coverage: held-out share of the change that the best {K} latents \
explain; R²: that all of the map's do. Time: fit and choice, of the screened map over the whole one's.

| latents | FVU | fire | coverage | R² | screened | coverage | R² | **difference of coverage** | left out | time |
|---|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

Left out: share of the change, as screening prices it latent by latent, of those that the map does not track.

## The whole selection

A fresh process each; the second figure of memory is the process with model, dictionary and tokenizer loaded.

| latents | tokens | selected | coverage | random latents | loaded | peak memory | seconds |
|---|---|---|---|---|---|---|---|
{chr(10).join(taken)}
""",
        args.write,
    )


def _in_a_fresh_process(step: str, **given: object) -> str:
    """What the step prints last. Nothing large happens in this process: a child's peak begins with its parent's."""
    child = [sys.executable, "-m", "benchmarks.screening", "--child", json.dumps([step, given])]
    printed = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return printed.rpartition("\n")[2]


STEPS = {"train": train, "draw": draw, "compare": compare, "selection": selection}

if __name__ == "__main__":
    main()
