"""The store on a terminal: a run, its changed latents, one latent with its contexts. Reads the store, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from autointerp.errors import InputError
from autointerp.records import Context, LatentEvidence, Write
from autointerp.show_checks import latent_lines, run_checks
from autointerp.show_course import course_line, courses, header_parts, latent_table
from autointerp.show_money import spending, spent_words
from autointerp.store import Store
from autointerp.tabulate import query_table
from autointerp.terminal import console as make_console
from autointerp.terminal import visible

__all__ = ["header", "latent", "latents_table", "query_table", "table"]

_KINDS = {
    "top": "fires most, adapted",
    "gain": "gained most",
    "loss": "lost most",
    "top_base": "fired most, base",
    "quantile": "over the whole range",
    "silent": "does not fire",
}
FEW_DOCUMENTS = 50
"""The tests weigh documents against each other: with fewer, even a real change may not stand out."""
_WIDE = 120
"""From this width on, label and effect stand side by side."""


def table(store: Store, run_id: str | None = None, console: Console | None = None) -> None:
    """Print a run (the newest by default) and its changed latents. InputError when there is no such run."""
    console = console or make_console()
    run_id = store.run_id(run_id)
    console.print(header(store, run_id))
    for part in run_checks(store, run_id):
        console.print(part)
    for line in summary_lines(store, run_id):
        console.print(line)
    rows = store.read("SELECT * FROM changed_latents WHERE run_id = ? ORDER BY rank", [run_id])
    if rows:
        followed = {latent: course_line(course) for latent, course in courses(store, run_id).items()}
        console.print(latents_table(rows, wide=console.width >= _WIDE, followed=followed))
        console.print(Text("score (null): the best scorer, and the same with another latent's label", style="dim"))
        if followed:
            console.print(Text("▁▃▆█: how much its row writes, from the base over the checkpoints", style="dim"))
    else:
        console.print(Text(f"no latent was selected: {_why_none(store, run_id)}"))


def summary_lines(store: Store, run_id: str) -> list[RenderableType]:
    """What the training changed, of the newest labeler, a sentence a line with its latents; none when there is none."""
    newest = "SELECT * FROM summaries WHERE run_id = ? ORDER BY created_at DESC, labeler LIMIT 1"
    lines: list[RenderableType] = []
    for row in store.read(newest, [run_id]):
        lines.append(_heading(f"what the training changed ({visible(row['labeler'])})"))
        for sentence in json.loads(row["sentences"] or "[]"):
            cited = f" [{', '.join(str(latent) for latent in sentence['latents'])}]"
            lines.append(Text.assemble(("· ", "dim"), visible(sentence["text"]), (cited, "cyan")))
        if row["error"]:
            lines.append(Text(f"no summary: {visible(row['error'])}", style="red"))
        lines.append(Text(""))
    return lines


def _why_none(store: Store, run_id: str) -> str:
    (run,) = store.read("SELECT n_tokens, n_docs, n_pass, delta_fvu, notes FROM runs WHERE run_id = ?", [run_id])
    if run["n_tokens"] is None and run["notes"]:  # by weights alone
        changed = store.read("SELECT 1 FROM latents WHERE run_id = ? AND change IS NOT NULL LIMIT 1", [run_id])
        return (
            "none stands out from what a random direction gets by the weights alone; --selector change reads the change"
            " off a corpus, --fdr allows more false discoveries"
            if changed
            else "the adapter changes nothing: all its weight changes are zero"
        )
    if run["n_tokens"] and run["delta_fvu"] is None:  # relative to the change: there is none
        return "the adapter changes nothing at this hook"
    if (run["n_docs"] or 0) < FEW_DOCUMENTS:
        n_docs = run["n_docs"] or 0
        return f"{n_docs} documents are too few to tell a change from chance; give more, or a larger --max-tokens"
    return "no change was found that stands out from chance"


def latent(
    store: Store, latent: int, run_id: str | None = None, console: Console | None = None, per_kind: int = 5
) -> None:
    """Print one latent: label, statistics, scores, writes, and up to `per_kind` contexts of each kind.

    InputError when the run has no such latent.
    """
    console = console or make_console()
    run_id = store.run_id(run_id)
    evidence = store.evidence(run_id, latent)
    key = [run_id, latent]
    labels = store.read("SELECT * FROM labels WHERE run_id = ? AND latent = ? ORDER BY created_at DESC, labeler", key)
    scores = store.read("SELECT * FROM scores WHERE run_id = ? AND latent = ? ORDER BY labeler, value DESC", key)
    title = (
        f"latent {latent} · rank {evidence.rank} · {evidence.role}"
        if evidence.rank
        else f"latent {latent} · not selected"
    )
    console.print(Panel(_statistics(evidence), title=Text(title), title_align="left", border_style="dim"))
    for row in labels:
        console.print(_label(row, [score for score in scores if score["labeler"] == row["labeler"]]))
    for line in (*_shared(store, key), *latent_lines(store, run_id, latent)):
        console.print(Text(line))
    for course in courses(store, run_id, latent).values():
        console.print(_heading("over the training"))
        console.print(latent_table(course))
    for row in spending(store, run_id, latent):
        console.print(Text(f"asked {visible(row['labeler'])}: {' · '.join(spent_words(row))}", style="dim"))
    if evidence.writes:
        console.print(_heading("when it fires, the adapter"))
        console.print(_writes(evidence.writes))
    for kind, meaning in _KINDS.items():
        contexts = sorted((c for c in evidence.contexts if c.kind == kind), key=lambda c: c.rank)
        if contexts:
            console.print(_heading(f"{kind}: {meaning} (peak activation base → adapted)"))
            console.print(_contexts(contexts[:per_kind], coloured=console.color_system is not None))


def _shared(store: Store, key: Sequence[object]) -> list[str]:
    """How a crosscoder's two decoders share the latent, in a line; the bounds are the literature's."""
    rows = store.read("SELECT relative_norm FROM latents WHERE run_id = ? AND latent = ?", key)
    if not rows or (share := rows[0]["relative_norm"]) is None:
        return []
    words = {0.1: "in the base model alone", 0.4: "more in the base model", 0.6: "shared", 0.9: "more in the adapted"}
    whose = next((word for bound, word in words.items() if share <= bound), "in the adapted model alone")
    return [f"decoder norms {1 - share:.0%} base, {share:.0%} adapted · {whose}"]


def header(store: Store, run_id: str) -> Panel:
    """What the run read, and how far its results go: the honest figures before any label. InputError: no such run."""
    rows = store.read("SELECT * FROM runs WHERE run_id = ?", [run_id])
    if not rows:
        raise InputError(f'there is no run {run_id!r}: `autointerp query "select run_id from runs"` lists them')
    run = rows[0]
    k = len(store.selected(run_id))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    lines: list[tuple[str, list[str | None]]] = [
        (
            "adapter",
            [
                _text(run["adapter"]),
                _together(run["adapters"]),
                _with("since ", run["since"]),
                _with("on ", run["base"]),
            ],
        ),
        ("dictionary", [_text(run["sae"]), _with("at ", run["hook"]), _with("", run["d_sae"], " latents", "{:,}")]),
        (
            "read",
            [
                _with("", run["n_tokens"], " tokens", "{:,}"),
                _with("", run["n_docs"], " documents", "{:,}"),
                _text(run["corpus"]),
            ],
        ),
        (
            "change map",
            [
                _with("held-out R² ", run["change_r2"], form="{:.2f}"),
                _with("static share ", run["static_share"], form="{:.1%}"),
            ],
        ),
        (
            "coverage",
            [
                _with(f"{k} latents ", run["coverage"], form="{:.1%}"),
                _with(f"{k} random ones ", run["random_coverage"], form="{:.1%}"),
                _with("", run["n_pass"], " passed the tests", "{:,}"),
            ],
        ),
        (
            "base → adapted",
            [
                _pair("FVU", run["fvu_base"], run["fvu_adapted"], "{:.3f}"),
                _pair("L0", run["l0_base"], run["l0_adapted"], "{:.1f}"),
                _with("ΔFVU ", run["delta_fvu"], form="{:.2f}"),
            ],
        ),
        ("training", header_parts(store, run_id)),
        ("weights", [_text(run["notes"])]),
        ("assumed", [_text(run["assumed"])]),
    ]
    spent = [(f"{visible(row['labeler'])}", list(spent_words(row))) for row in spending(store, run_id)]
    for name, parts in (*lines, *_selectors(store, run_id), *spent):
        text = " · ".join(part for part in parts if part)
        if text:
            grid.add_row(name, Text(text))
    title = " · ".join(visible(part) for part in ("run " + run_id, run["selector"], run["status"]) if part)
    return Panel(grid, title=Text(title), title_align="left", border_style="dim")


def _selectors(store: Store, run_id: str) -> list[tuple[str, list[str | None]]]:
    """A line for each further selector: how far it agrees with the first; and one for what a selector says besides."""
    rows = store.read("SELECT * FROM selectors WHERE run_id = ? ORDER BY position", [run_id])
    lines: list[tuple[str, list[str | None]]] = []
    for row in rows:
        if row["position"] > 1:
            parts = [
                _with("agrees at ρ ", row["spearman"], form="{:+.2f}"),
                _with("shares ", row["overlap"], f" with {rows[0]['selector']}", "{:.0%}"),
                _with(f"{row['n_selected']} latents cover ", row["coverage"], form="{:.1%}"),
            ]
            lines.append((visible(row["selector"]), parts))
        figures = {key: value for key, value in json.loads(row["figures"] or "{}").items() if value is not None}
        if figures:
            said = [f"{visible(key.replace('_', ' '))} {value:.3g}" for key, value in figures.items()]
            lines.append((visible(row["selector"]), list(said)))
    return lines


def latents_table(
    rows: Sequence[dict[str, Any]], wide: bool = False, followed: Mapping[int, str] | None = None
) -> Table:
    """Rows of `changed_latents` as a table; narrow ones put the effect under the label. followed: latent → its course
    over the training, a line."""
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    out.add_column("#", justify="right", no_wrap=True)
    out.add_column("latent", justify="right", no_wrap=True)
    out.add_column("label" if wide else "label, and what the adapter does", ratio=1, overflow="fold")
    if wide:
        out.add_column("what the adapter does", ratio=1, overflow="fold")
    for name in ("change", "gain", "cover", "score (null)"):
        out.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        label, effect = _label_text(row), Text(visible(_brief(row["effect"] or "")), style="cyan")
        course = Text(followed[row["latent"]], style="dim") if followed and row["latent"] in followed else Text()
        below = [part for part in (effect, course) if part]
        words: list[RenderableType] = [label, Group(*below)] if wide else [Group(label, *below)]
        out.add_row(
            number(row["rank"], "{}"),
            str(row["latent"]),
            *words,
            number(row["change"], "{:.3f}"),
            number(row["gain"], "{:+.0%}"),
            number(row["coverage"], "{:.0%}"),
            _score_text(row["score"], row["null_score"]),
        )
    return out


def _brief(effect: str, clauses: int = 3) -> str:
    """The first clauses of an effect: what a table has room for; `show LATENT` prints the whole."""
    parts = effect.split("; ")
    return effect if len(parts) <= clauses else "; ".join(parts[:clauses]) + " …"


def _label_text(row: dict[str, Any]) -> Text:
    if row["label"]:
        return Text(visible(row["label"]))
    words = {"refused": "refused by the model", "failed": "labelling failed"}
    return Text(words.get(row["status"], "no label" if row["status"] else "not labelled yet"), style="dim")


def _statistics(evidence: LatentEvidence) -> RenderableType:
    measured = evidence.freq_base == evidence.freq_base  # NaN where no corpus was read
    grid = Table.grid(padding=(0, 3))
    for _ in range(4):
        grid.add_column(justify="left", no_wrap=True)
    grid.add_row("", *(Text(name, style="dim") for name in ("mean", "fires on", "max")))
    for side in ("base", "adapted"):
        values = (getattr(evidence, f"{name}_{side}") for name in ("mean", "freq", "max"))
        forms = ("{:.4g}", "{:.3%}", "{:.4g}")
        grid.add_row(Text(side, style="dim"), *(number(v, form) for v, form in zip(values, forms, strict=True)))
    change = [
        _with("change ", evidence.change, form="{:.4f}"),
        _with("gain ", evidence.gain, form="{:+.1%}"),
        evidence.state if measured else "nothing is known of where it fires: no corpus was read",
    ]
    line = Text(" · ".join(part for part in change if part))
    return Group(line, grid) if measured else line


def _label(row: dict[str, Any], scores: Iterable[dict[str, Any]]) -> RenderableType:
    lines = [Text.assemble((f"{visible(row['labeler'])}: ", "dim"), (_label_text(row).plain, "bold"))]
    for name, style in (("explanation", ""), ("effect", "cyan"), ("error", "red")):
        if row[name]:
            lines.append(Text(f"  {visible(row[name])}", style=style))
    if row["salvaged"]:
        lines.append(Text("  salvaged: the answer held more than was asked for, or was cut off", style="yellow"))
    for score in scores:
        interval = "" if score["ci_low"] is None else f" [{score['ci_low']:.2f}, {score['ci_high']:.2f}]"
        null = "" if score["null_value"] is None else f", another latent's label {score['null_value']:.2f}"
        missing = f", {score['n_missing']} missing" if score["n_missing"] else ""
        value = number(score["value"], "{:.2f}")
        lines.append(
            Text(f"  {visible(score['scorer'])} {value}{interval}{null}; {score['n_examples']} examples{missing}")
        )
    return Group(*lines)


def _writes(writes: Sequence[Write]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for kind in ("promotes", "suppresses", "raises", "lowers"):
        parts = []
        for write in sorted((w for w in writes if w.kind == kind), key=lambda w: w.rank):
            target = f"‘{visible(write.target_token)}’" if write.target_token is not None else f"{write.target_latent}"
            hint = f" ({visible(write.target_hint)})" if write.target_hint else ""
            parts.append(f"{target}{hint} {write.weight:+.3g}")
        if parts:
            grid.add_row(kind, Text("  ".join(parts)))
    return grid


def _contexts(contexts: Sequence[Context], coloured: bool) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(justify="right", no_wrap=True, style="dim")
    grid.add_column(overflow="fold", ratio=1)
    largest = max((max((*c.act_base, *c.act_adapted), default=0.0) for c in contexts), default=0.0) or 1.0
    for context in contexts:
        base, adapted = context.act_base[context.peak], context.act_adapted[context.peak]
        # Which side is shaded follows what the kind is about: what fired in the base, or what fires now.
        acts = context.act_base if context.kind in ("top_base", "loss") else context.act_adapted
        grid.add_row(f"{base:.2f} → {adapted:.2f}", shaded(context, [a / largest for a in acts], coloured))
    return grid


def shaded(context: Context, intensities: Sequence[float], coloured: bool) -> Text:
    """A context, each token on a ground as strong as its intensity in [0, 1]; the peak bold, or «so» without colour."""
    text = Text()
    for index, (token, intensity) in enumerate(zip(context.tokens, intensities, strict=True)):
        peak = index == context.peak and context.kind != "silent"
        style = _ground(intensity) + (" bold" if peak else "")
        text.append(f"«{visible(token)}»" if peak and not coloured else visible(token), style=style.strip() or None)
    return text


def _ground(intensity: float) -> str:
    if intensity < 0.02:
        return ""
    t = min(1.0, intensity)
    return f"black on rgb(255,{round(240 - 110 * t)},{round(205 - 195 * t)})"


def _heading(text: str) -> Rule:
    return Rule(Text(text), align="left", style="dim", characters="─")


def _score_text(value: float | None, null: float | None) -> str:
    return number(value, "{:.2f}") + ("" if value is None or null is None else f" ({null:.2f})")


def number(value: float | int | None, form: str) -> str:
    return "–" if value is None or value != value else form.format(value)


def _text(value: str | None) -> str | None:
    return visible(value) if value else None


def _with(before: str, value: Any, after: str = "", form: str = "{}") -> str | None:
    return None if value is None else before + visible(form.format(value)) + after


def _together(adapters: str | None) -> str | None:
    """Names of the adapters that are active together, from their JSON."""
    names = [member["name"] for member in json.loads(adapters or "[]")]
    return visible(f"{', '.join(names[:-1])} and {names[-1]} together") if names else None


def _pair(name: str, base: float | None, adapted: float | None, form: str) -> str | None:
    return None if base is None and adapted is None else f"{name} {number(base, form)} → {number(adapted, form)}"
