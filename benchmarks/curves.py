"""Small line charts side by side as one SVG: rows of panels over one logarithmic axis that begins at 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 176, 150
"""Of a panel's axes, in pixels."""
LEFT, TOP, GAP_X, GAP_Y, BELOW = 62, 70, 26, 48, 46
FONT = "font-family='Helvetica, Arial, sans-serif'"


@dataclass(frozen=True)
class Style:
    """How a curve is drawn, and what the legend calls it."""

    name: str
    colour: str
    dashed: bool = False


Curve = Sequence[tuple[int, float]]
"""(k, share) in rising k; shares are drawn in per cent."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    curves: Mapping[Style, Curve]


def chart(rows: Mapping[str, Sequence[Panel]], ticks: Sequence[int], x_label: str, low: float = -0.12) -> str:
    """The SVG. rows: what the y axis of each row says → its panels; ticks: values of k marked below."""
    columns = max(map(len, rows.values()))
    width = LEFT + columns * (WIDTH + GAP_X)
    height = TOP + len(rows) * (HEIGHT + GAP_Y) + BELOW - GAP_Y
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>",
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
        *_legend([style for panels in rows.values() for panel in panels for style in panel.curves]),
    ]
    most = max(ticks)
    for at_row, (label, panels) in enumerate(rows.items()):
        y = TOP + at_row * (HEIGHT + GAP_Y)
        parts.append(_text(14, y + HEIGHT / 2, label, 13, "middle", turned=True))
        for at, panel in enumerate(panels):
            x = LEFT + at * (WIDTH + GAP_X)
            parts += _axes(x, y, panel.title, ticks, low, labelled=at == 0)
            for style, curve in panel.curves.items():
                points = " ".join(
                    f"{x + _across(k, most):.1f},{y + _down(max(share, low), low):.1f}" for k, share in curve
                )
                dash = " stroke-dasharray='4 3'" if style.dashed else ""
                parts.append(
                    f"<polyline points='{points}' fill='none' stroke='{style.colour}' stroke-width='2'{dash}/>"
                )
    parts.append(_text(LEFT + (width - LEFT) / 2, height - 8, x_label, 13, "middle"))
    return "\n".join([*parts, "</svg>", ""])


def _across(k: int, most: int) -> float:
    """0 stands at the left, 1 a tenth further on, and from there on the axis is logarithmic."""
    return 0.0 if k == 0 else WIDTH * (0.12 + 0.88 * log10(k) / log10(most))


def _down(share: float, low: float) -> float:
    return HEIGHT * (1.1 - share) / (1.1 - low)


def _axes(x: float, y: float, title: str, ticks: Sequence[int], low: float, labelled: bool) -> list[str]:
    parts = [_text(x + WIDTH / 2, y - 8, title, 13, "middle", bold=True)]
    for share in (0.0, 0.5, 1.0):
        at = y + _down(share, low)
        parts.append(f"<line x1='{x}' y1='{at:.1f}' x2='{x + WIDTH}' y2='{at:.1f}' stroke='#d5d5d5'/>")
        if labelled:
            parts.append(_text(x - 6, at + 4, f"{share:.0%}", 11, "end"))
    for k in (0, *ticks):
        parts.append(_text(x + _across(k, max(ticks)), y + HEIGHT + 14, str(k), 11, "middle"))
    return parts


def _legend(styles: Sequence[Style]) -> list[str]:
    parts, x, y = [], LEFT, 22
    for style in dict.fromkeys(styles):
        if x > LEFT + 4 * (WIDTH + GAP_X):
            x, y = LEFT, y + 22
        dash = " stroke-dasharray='4 3'" if style.dashed else ""
        parts.append(
            f"<line x1='{x}' y1='{y}' x2='{x + 30}' y2='{y}' stroke='{style.colour}' stroke-width='2.5'{dash}/>"
        )
        parts.append(_text(x + 36, y + 4, style.name, 13))
        x += 60 + 7 * len(style.name)
    return parts


def _text(
    x: float, y: float, words: str, size: int, anchor: str = "start", bold: bool = False, turned: bool = False
) -> str:
    weight = " font-weight='bold'" if bold else ""
    turn = f" transform='rotate(-90 {x} {y})'" if turned else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {FONT} font-size='{size}' text-anchor='{anchor}' fill='#222222'{weight}{turn}>"
        f"{escape(words)}</text>"
    )
