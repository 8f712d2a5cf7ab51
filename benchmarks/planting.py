"""The command line that the benchmarks on planted truth share, and how any benchmark hands its table on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from autointerp.demo import ORGANISM
from autointerp.run import Run
from tests.planted.recording import Recording, record


def recorded(
    description: str | None, tokens: int, seeds: int, parts: Sequence[str] = ()
) -> tuple[argparse.Namespace, Recording]:
    """The command's options (tokens, seeds, write, and which of its `parts` to do), defaults as given, and one pass
    over the run that they name."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--run", type=Path, default=ORGANISM, help="a run directory (default: the demo's)")
    for key in ("base", "adapter", "sae", "corpus"):
        parser.add_argument(f"--{key}", help="where the run directory does not name it")
    parser.add_argument("--tokens", type=int, default=tokens)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    if parts:
        parser.add_argument("--parts", nargs="+", choices=parts, default=list(parts), help="tables (default: all)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {key: getattr(args, key) for key in ("base", "adapter", "sae", "corpus") if getattr(args, key)}
    return args, record(Run.load(args.run, device="cpu", **given), args.tokens)


def publish(text: str, path: Path | None) -> None:
    """Prints a table, and writes it where one asked for that."""
    print(text)
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
