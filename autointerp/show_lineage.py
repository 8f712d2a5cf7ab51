"""Latents from layer to layer on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autointerp.lineage import Chain, Lineage, Member
from autointerp.terminal import console as make_console
from autointerp.terminal import visible


def lineage(found: Lineage, console: Console | None = None) -> None:
    """Print the chains, and what of the selection has no counterpart."""
    console = console or make_console()
    lines = [
        f"{at} {layer.hook} · run {layer.run_id} · {layer.n_selected} selected"
        for at, layer in enumerate(found.layers, start=1)
    ]
    for at, (forward, back) in enumerate(found.chances, start=1):
        lines.append(
            f"chance {at} → {at + 1}: cosine {forward.limit:.2f} (median {forward.median:.2f});"
            f" back: {back.limit:.2f} ({back.median:.2f})"
        )
    console.print(Panel(Text(visible_lines(lines)), title="lineage", title_align="left", border_style="dim"))
    if found.chains:
        console.print(_table(found.chains))
        console.print(
            Text("↔ nearest both ways, → one way; #: rank where selected; (label): carried along", style="dim")
        )
    for at, _ in enumerate(found.layers):
        alone = [str(chain.members[0].latent) for chain in found.alone if chain.members[0].layer == at]
        if alone:
            console.print(Text(f"no counterpart nearer than chance, of {at + 1}: {', '.join(alone)}", style="dim"))


def visible_lines(lines: list[str]) -> str:
    """Each line made harmless, and the lines put together."""
    return "\n".join(map(visible, lines))


def _table(chains: list[Chain]) -> Table:
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    for name in ("", "latent", "#", "cosine"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("label", ratio=1, overflow="fold")
    for chain in chains:
        steps = ["", *(f"{'↔' if step.mutual else '→'} {step.cosine:.2f}" for step in chain.steps)]
        for at, (member, step) in enumerate(zip(chain.members, steps, strict=True)):
            rank = "" if member.rank is None else str(member.rank)
            last = at == len(chain.members) - 1
            out.add_row(str(member.layer + 1), str(member.latent), rank, step, _label(member))
            if last and chain is not chains[-1]:
                out.add_row()
    return out


def _label(member: Member) -> Text:
    if member.label is not None:
        return Text(visible(member.label))
    return Text("" if member.carried is None else f"({visible(member.carried)})", style="dim")
