"""The answer to a query as a table for the eye, or as CSV, JSON or Parquet for the next program."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import IO, Any

import pyarrow as pa
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from autointerp.errors import InputError
from autointerp.terminal import console as make_console
from autointerp.terminal import visible

MAX_ROWS = 200
"""A table for the eye ends here and says so; the other formats never leave a row out."""
_COLUMN_WIDTH = 12
"""Columns that do not get this much (or what they need, where that is less) are shown row by row instead."""


def query_table(table: pa.Table, format: str = "table", out: str | None = None, console: Console | None = None) -> None:
    """Print `table` in a format (table, csv, json, parquet), to standard output or to the file `out`.

    InputError: unknown format, a file that cannot be written, Parquet onto a terminal.
    """
    if format not in FORMATS:
        raise InputError(f"unknown format {format!r}: choose one of {', '.join(FORMATS)}")
    if format == "parquet" and out is None and sys.stdout.isatty():
        raise InputError("Parquet is not for a terminal: redirect the output into a file")
    if format == "table" and out is None:
        _print_table(table, console or make_console())
        return
    try:
        if out is None:
            _to_stdout(table, format)
        else:
            with open(out, "wb") as file:
                FORMATS[format](table, file)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise InputError(f"cannot write {out or 'the output'}: {error.strerror or error}") from error


def as_text(table: pa.Table, width: int | None = None) -> str:
    """`table` as text without escape sequences; as wide as the terminal unless told."""
    text = make_console(file=io.StringIO(), width=width)
    with text.capture() as captured:
        _print_table(table, text)
    return captured.get().rstrip("\n")


def _to_stdout(table: pa.Table, format: str) -> None:
    if not sys.stdout.isatty():
        sys.stdout.flush()
        FORMATS[format](table, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    buffer = io.BytesIO()
    FORMATS[format](table, buffer)
    for line in buffer.getvalue().decode().splitlines(keepends=True):
        sys.stdout.write(visible(line.removesuffix("\n")) + "\n")


def _write_table(table: pa.Table, file: IO[bytes]) -> None:
    file.write((as_text(table, width=120) + "\n").encode())


def _write_csv(table: pa.Table, file: IO[bytes]) -> None:
    from pyarrow import csv

    for index, field in enumerate(table.schema):
        if pa.types.is_nested(field.type):  # CSV has no lists; JSON has
            texts = [
                None if v is None else json.dumps(v, ensure_ascii=False, default=str) for v in table[index].to_pylist()
            ]
            table = table.set_column(index, field.name, pa.array(texts, pa.string()))
    csv.write_csv(table, file, csv.WriteOptions(quoting_style="needed"))


def _write_json(table: pa.Table, file: IO[bytes]) -> None:
    rows = [{name: _json_value(value) for name, value in row.items()} for row in table.to_pylist()]
    file.write((json.dumps(rows, ensure_ascii=False, indent=1, default=str) + "\n").encode())


def _write_parquet(table: pa.Table, file: IO[bytes]) -> None:
    from pyarrow import parquet

    parquet.write_table(table, file)


FORMATS: dict[str, Callable[[pa.Table, IO[bytes]], None]] = {
    "table": _write_table,
    "csv": _write_csv,
    "json": _write_json,
    "parquet": _write_parquet,
}


def _json_value(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, list):
        return [_json_value(v) for v in value]
    return float(value) if isinstance(value, Decimal) else value


def _print_table(table: pa.Table, console: Console) -> None:
    rows = table.slice(0, MAX_ROWS).to_pylist()
    cells = {name: [_cell(row[name]) for row in rows] for name in table.column_names}
    natural = [max([len(name), *(len(text) for text in column)]) for name, column in cells.items()]
    if sum(min(width, _COLUMN_WIDTH) + 1 for width in natural) <= console.width:
        console.print(_grid(table, cells))
    else:
        _print_records(cells, len(rows), console)
    left = table.num_rows - len(rows)
    more = f"; {left:,} more are not shown: --format csv, json or parquet has them" if left else ""
    console.print(Text(f"{table.num_rows:,} row{'' if table.num_rows == 1 else 's'}{more}", style="dim"))


def _grid(table: pa.Table, cells: dict[str, list[Text]]) -> Table:
    grid = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    for field in table.schema:
        number = pa.types.is_integer(field.type) or pa.types.is_floating(field.type) or pa.types.is_decimal(field.type)
        grid.add_column(
            Text(visible(field.name)), justify="right" if number else "left", no_wrap=number, overflow="fold"
        )
    for row in zip(*cells.values(), strict=True):
        grid.add_row(*row)
    return grid


def _print_records(cells: dict[str, list[Text]], n_rows: int, console: Console) -> None:
    """Each row as a block of `column value` lines, for answers with more columns than the terminal is wide."""
    for index in range(n_rows):
        console.print(Rule(Text(f"row {index + 1}"), align="left", style="dim", characters="─"))
        block = Table.grid(padding=(0, 2))
        block.add_column(style="dim", no_wrap=True)
        block.add_column(overflow="fold")
        for name, column in cells.items():
            block.add_row(Text(visible(name)), column[index])
        console.print(block)


def _cell(value: Any) -> Text:
    if value is None:
        return Text("NULL", style="dim")
    if isinstance(value, float):
        return Text(f"{value:.4g}")
    if isinstance(value, list):
        return Text("[" + ", ".join(_cell(v).plain for v in value) + "]")
    return Text(visible(str(value)))
