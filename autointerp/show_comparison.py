"""Two runs side by side on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from autointerp.compare import Comparison
from autointerp.show import number
from autointerp.terminal import console as make_console
from autointerp.terminal import visible


def comparison(found: Comparison, console: Console | None = None) -> None:
    """Print two runs side by side."""
    console = console or make_console()
    counts = " · ".join(f"{n} {relation}" for relation, n in found.counts().items() if n)
    lines = [f"first {found.first} · second {found.second}", counts or "no latent with a row in either"]
    if found.combined is not None:
        lines.append(f"together {found.combined:.2f} of their squared sizes (0 cancel, 1 unrelated, 2 the same)")
    console.print(Panel(Text("\n".join(lines)), title="compare", title_align="left", border_style="dim"))
    out = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", expand=True)
    out.add_column("latent", justify="right", no_wrap=True)
    out.add_column("label", ratio=1, overflow="fold")
    for name in ("size", "→", "gain", "→", "cos"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("relation", no_wrap=True)
    for pair in found.pairs:
        out.add_row(
            str(pair.latent),
            Text(visible(pair.label or "")),
            *(number(size, "{:.3f}") for size in (pair.size_first, pair.size_second)),
            *(number(gain, "{:+.0%}") for gain in (pair.gain_first, pair.gain_second)),
            number(pair.cosine, "{:+.2f}"),
            pair.relation,
        )
    if found.pairs:
        console.print(out)
