"""By cause: how much of an adapter's effect k rows of its change map carry, for five kinds of training.

    python -m benchmarks.causal [--steps N] [--tokens N] [--draws N] [--write results/causal.md]

The demo's language model, taught unittest code by the demo's LoRA, by training all weights, and by three small modules
at the SAE's hook (trained here by examples/train_adapters.py, seeded). Each is looked at through the demo's SAE on the
demo's corpus; rows are fitted on one half of the documents. On unittest documents of the other half the first k rows
are added to the base model, or taken out of the adapted one (`autointerp check` does the same).
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from autointerp.demo import ORGANISM, language_model
from autointerp.demo.train import read_corpus
from autointerp.evidence.causal import EDITS, Edit, HeldOut, Part, Restoration, RowSet, row_sets
from autointerp.evidence.causal_static import direction_sets
from autointerp.evidence.fitted import FittedMap
from autointerp.evidence.gather import Evidence
from autointerp.evidence.selection import SELECTORS, Given, Question
from autointerp.evidence.spool import Spool
from autointerp.evidence.stand_ins import rereading
from autointerp.records import CausalEffect
from autointerp.run import Run
from benchmarks.curves import Curve, Panel, Style, chart
from benchmarks.planting import publish
from examples import train_adapters

SIZES = (1, 2, 5, 10, 20, 50, 100)
KINDS = {"lora": "LoRA", "full": "full fine-tune", "residual": "residual adapter", "ffnn": "FFNN adapter",
         "bias": "bias"}  # fmt: skip
FULL_RATE = 3e-4
LOSS, KL = "#1f6fb4", "#d1580a"
STYLES = {
    "loss_share": Style("loss", LOSS),
    "kl_share": Style("KL", KL),
    "coverage": Style("coverage of Δx", "#222222"),
    "random loss_share": Style("loss, random rows", LOSS, dashed=True),
    "random kl_share": Style("KL, random rows", KL, dashed=True),
    "random coverage": Style("coverage, random rows", "#222222", dashed=True),
}


@dataclass(frozen=True)
class Measured:
    """One adapter, measured."""

    name: str
    effects: list[CausalEffect]
    coverage: dict[int, float]
    """Held-out share of Δx (of δ̄, for a change that is the same everywhere) by number of rows."""
    random_coverage: dict[int, float]
    fitted: FittedMap
    n_pass: int | None

    def share(self, metric: str, edit: Edit, part: Part, k: int) -> tuple[float, float]:
        """Mean over the draws, and the spread between the smallest and the largest of them."""
        found = [
            value
            for effect in self.effects
            if (effect.edit, effect.part, effect.k) == (edit, part, k)
            and (value := getattr(effect, metric)) is not None
        ]
        return (float(np.mean(found)), float(np.ptp(found))) if found else (float("nan"), 0.0)

    def of(self, part: Part, edit: Edit = "added") -> CausalEffect:
        """The effect of a part that there is once."""
        return next(effect for effect in self.effects if (effect.part, effect.edit) == (part, edit))

    @property
    def sizes(self) -> list[int]:
        return sorted(self.coverage)

    @property
    def static(self) -> bool:
        """Whether the change is the same on every token, so that there are no rows."""
        return not self.fitted.changed


def trained(folder: Path, steps: int) -> dict[str, Path]:
    """Run directories of every kind; those that do not ship are trained."""
    training, held_out = train_adapters.training_windows(), train_adapters.held_out_windows()
    found = {"lora": ORGANISM / "adapter"}
    for kind in KINDS:
        begin = time.perf_counter()
        if kind == "full":
            found[kind] = train_all(folder / kind, training, steps)
        elif kind != "lora":
            found[kind] = folder / kind
            train_adapters.run(kind, folder / kind, training, held_out, steps)
        print(f"{kind}: trained in {time.perf_counter() - begin:.0f} s", flush=True)
    return found


def train_all(out: Path, training: language_model.Windows, steps: int) -> Path:
    """A full fine-tune: every weight of the base model, in a plain loop."""
    model = language_model.load_base(ORGANISM / "model").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=FULL_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    batches = language_model.mixed_batches(training, {train_adapters.DOMAIN: 1.0}, train_adapters.BATCH, seed=0)
    for _ in range(steps):
        ids = next(batches)
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(out)
    return out


def measure(name: str, adapter: Path, tokens: int, draws: int, seed: int = 0) -> Measured:
    """Fits the change map, chooses rows, and puts the models through both edits of every set of them."""
    begin = time.perf_counter()
    base, sae, corpus = (ORGANISM / part for part in ("model", "sae", "corpus.jsonl"))
    run = Run.load(adapter, device="cpu", base=base, sae=sae, corpus=corpus)
    with Evidence.load(run) as evidence:
        fitted, spool = evidence.fit(lambda _n: None)
        given = Given(reread=rereading(spool, evidence.dictionary))
        ranking = SELECTORS.get("change")(Question(fitted, max(SIZES), run.settings.fdr, seed, given))
        held = held_out(spool, evidence.corpus.bos, tokens)
        if fitted.changed:
            chosen = [latent for latent in ranking.latents if fitted.in_map(latent)]
            sets = row_sets(fitted, chosen, SIZES, draws, seed, random_sizes=SIZES)
            curve = fitted.coverage(chosen)
            sizes = sorted({min(k, len(chosen)) for k in SIZES})
            coverage = {k: curve[k - 1] for k in sizes}
            by_chance = {k: fitted.random_coverage(k, seed, draws) or 0.0 for k in sizes}
        else:
            sets, coverage, by_chance = constant_sets(fitted, draws, seed)
        effects = Restoration(evidence.models, evidence.dictionary, fitted, held).together(sets).effects(sets)
    print(f"{name}: measured in {time.perf_counter() - begin:.0f} s", flush=True)
    return Measured(name, effects, coverage, by_chance, fitted, ranking.n_pass)


def held_out(spool: Spool, bos: np.ndarray, tokens: int) -> HeldOut:
    """Held-out unittest documents: what was trained for, so that there is an effect to have shares of."""
    domains = [document.domain for document in read_corpus(ORGANISM)]
    every = HeldOut.of(spool, bos, tokens=1 << 40).sequences
    chosen, n = [], 0
    for sequence in every:
        if n < tokens and domains[spool.place(sequence)[0]] == train_adapters.DOMAIN:
            chosen.append(sequence)
            n += len(spool.ids(sequence))
    return HeldOut(chosen, spool, bos)


def constant_sets(fitted: FittedMap, draws: int, seed: int) -> tuple[list[RowSet], dict[int, float], dict[int, float]]:
    """Of a change δ̄ that is the same on every token: the first k decoder directions of its decomposition, and the best
    that k random ones can do. The sets, and the share of ‖δ̄‖² that each number of directions holds."""
    static = torch.from_numpy(fitted.statistics.static)
    found = direction_sets(fitted, SIZES, draws, seed)
    held: dict[Part, dict[int, list[float]]] = {"selected": {}, "random": {}}
    sets = row_sets(fitted, [], SIZES, draws, seed)
    for one in found:
        part: Part = "random" if one.draw else "selected"  # the static part stands here for the rows that there are not
        sets.append(replace(one, part=part))
        held[part].setdefault(one.k, []).append(_held(one.constant.double(), static))
    coverage, by_chance = ({k: float(np.mean(shares)) for k, shares in held[part].items()} for part in held)
    return sets, coverage, by_chance


def _held(written: Tensor, whole: Tensor) -> float:
    return 1 - float((whole - written).square().sum() / whole.square().sum())


def figure(all_measured: Sequence[Measured]) -> str:
    """The curves as an SVG: a column for each adapter, a row for each edit."""
    rows = {f"{edit}, share of the effect": [_panel(one, edit) for one in all_measured] for edit in EDITS}
    return chart(rows, SIZES, "k: rows of the change map (0: the static part alone)")


def _panel(one: Measured, edit: Edit) -> Panel:
    curves: dict[Style, Curve] = {}
    for metric in ("loss_share", "kl_share"):
        start = [] if one.static else [(0, one.share(metric, edit, "static", 0)[0])]
        curves[STYLES[metric]] = start + [(k, one.share(metric, edit, "selected", k)[0]) for k in one.sizes]
        curves[STYLES[f"random {metric}"]] = start + [(k, one.share(metric, edit, "random", k)[0]) for k in one.sizes]
    if edit == "added":
        curves[STYLES["coverage"]] = [(k, one.coverage[k]) for k in one.sizes]
        curves[STYLES["random coverage"]] = [(k, one.random_coverage[k]) for k in one.sizes]
    return Panel(one.name, curves)


def tables(all_measured: Sequence[Measured]) -> Iterator[str]:
    """The figures behind the curves, in Markdown."""
    yield "| trained | loss: base | adapted | base + Δx at the hook | KL | static share | R² of the map | pass |"
    yield "|---|---|---|---|---|---|---|---|"
    for one in all_measured:
        base, adapted, whole = one.of("none"), one.of("none", "removed"), one.of("whole")
        stream, n = one.fitted.statistics.stream, one.fitted.statistics.n_tokens
        r2 = "–" if one.fitted.r2 is None else f"{one.fitted.r2:.2f}"
        yield (
            f"| {one.name} | {base.loss:.3f} | {adapted.loss:.3f} | {whole.loss:.3f} | {base.kl:.3f} "
            f"| {stream.static_share(n):.0%} | {r2} | {one.n_pass:,} |"
        )
    for one in all_measured:
        yield f"\n### {one.name}\n"
        yield "| k | coverage (random) | added: loss (random) | KL (random) | removed: loss (random) | KL (random) |"
        yield "|---|---|---|---|---|---|"
        for k in one.sizes:
            cells = [f"{one.coverage[k]:.0%} ({one.random_coverage[k]:.0%})"]
            for edit in EDITS:
                for metric in ("loss_share", "kl_share"):
                    chosen, (drawn, spread) = (
                        one.share(metric, edit, "selected", k)[0],
                        one.share(metric, edit, "random", k),
                    )
                    cells.append(f"{_percent(chosen)} ({_percent(drawn)} ± {spread / 2:.0%})")
            yield f"| {k} | {' | '.join(cells)} |"
        for part, name in (("static", "static part"), ("all", "every row")):
            found = [effect for effect in one.effects if effect.part == part]
            if found:
                shares = [_percent(share) for effect in found for share in (effect.loss_share, effect.kl_share)]
                yield f"| {name} | | {' | '.join(shares)} |"


def _percent(share: float | None) -> str:
    """A dash where the whole has no clear effect to have shares of."""
    return "–" if share is None or np.isnan(share) else f"{share:.0%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=train_adapters.STEPS, help="of each training")
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens that the edits are measured on")
    parser.add_argument("--draws", type=int, default=3, help="sets of random rows")
    parser.add_argument("--write", type=Path, help="a Markdown file for the tables; the figure goes beside it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = trained(Path(folder), args.steps)
        found = [measure(KINDS[kind], path, args.tokens, args.draws) for kind, path in runs.items()]
    n_tokens, n_docs = found[0].effects[0].n_tokens, found[0].effects[0].n_docs
    text = f"""# By cause: what k rows of the change map carry

`python -m benchmarks.causal --steps {args.steps} --tokens {args.tokens} --draws {args.draws}`: the demo's language \
model, taught unittest code in five ways. The LoRA is the demo's; the others are trained here for {args.steps} steps. \
x at the SAE's hook becomes x_base + δ̄ + Σ (z_j − z̄_j) c_j in the base model (*added*) with the first k latents that \
`change` selects, or x_adapted loses the same (*removed*); rows are fitted on one half of the demo's corpus, and the \
edits measured on {n_tokens:,} tokens of {n_docs} unittest documents of the other half. Shares are of what patching \
the whole of Δx at the hook does. Random: as many live latents with rows of their own, the mean of {args.draws} draws \
± half their range. Coverage: held-out share of Δx − δ̄, over all domains of the corpus.

A bias writes the same on every token, so that it has no rows: there k counts the latents whose decoder directions are \
added up to come near δ̄, random ones fitted to it likewise, and coverage is their share of ‖δ̄‖². (A hundred \
directions of any kind span most of the stream's 128 dimensions.)

![shares of the effect by number of rows](causal.svg)

{chr(10).join(tables(found))}
"""
    publish(text, args.write)
    if args.write:
        args.write.with_suffix(".svg").write_text(figure(found))


if __name__ == "__main__":
    main()
