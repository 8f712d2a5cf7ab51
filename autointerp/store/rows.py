"""Rows to Arrow: typed by the table's own schema, so that a wrong column or type fails in the caller's thread."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from autointerp.store.schema import TableSchema


def to_arrow(schema: TableSchema, rows: Sequence[Mapping[str, Any]] | pa.Table) -> list[pa.Table]:
    """Tables ready to be upserted, one for each distinct set of columns among `rows`, in their order.

    Raises ValueError for a column that the table lacks or a missing key column; pyarrow.ArrowInvalid/ArrowTypeError
    for a value that does not fit its column.
    """
    if not isinstance(rows, Sequence):
        _check_columns(schema, rows.column_names)
        fields = [pa.field(name, schema.columns[name]) for name in rows.column_names]
        return [rows.cast(pa.schema(fields))] if rows.num_rows else []
    groups: list[tuple[tuple[str, ...], list[Mapping[str, Any]]]] = []
    for row in rows:
        names = tuple(row)
        if not groups or groups[-1][0] != names:
            _check_columns(schema, names)
            groups.append((names, []))
        groups[-1][1].append(row)
    return [
        pa.table({name: _column(schema, name, [row[name] for row in part]) for name in names}) for names, part in groups
    ]


def latents_table(schema: TableSchema, run_id: str, columns: Mapping[str, np.ndarray]) -> pa.Table:
    """The `latents` rows of a run from arrays of shape [m]; `latent` defaults to 0 … m−1. NaN becomes NULL."""
    lengths = {name: len(column) for name, column in columns.items()}
    m = next(iter(lengths.values()), 0)
    if set(lengths.values()) - {m}:
        raise ValueError(f"columns of latents differ in length: {lengths}")
    arrays: dict[str, Any] = {"latent": np.arange(m, dtype=np.int32), **columns}
    _check_columns(schema, ["run_id", *arrays])
    table: dict[str, pa.Array | pa.ChunkedArray] = {"run_id": pa.array([run_id] * m, pa.string())}
    for name, column in arrays.items():
        # Arrow must see NaN as missing before the cast: a rank kept in floats becomes an INTEGER with NULLs.
        table[name] = pa.array(column, from_pandas=True).cast(schema.columns[name])
    return pa.table(table)


def last_per_key(table: pa.Table, key: tuple[str, ...]) -> pa.Table:
    """`table` without rows that a later one with the same key replaces: one statement may not touch a row twice."""
    keys = list(zip(*(table.column(name).to_pylist() for name in key), strict=True))
    last = {value: index for index, value in enumerate(keys)}
    return table if len(last) == len(keys) else table.take(sorted(last.values()))


def _check_columns(schema: TableSchema, names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in schema.columns]
    missing = [name for name in schema.key if name not in names]
    if unknown or missing:
        raise ValueError(f"table {schema.name}: unknown columns {unknown}, missing key columns {missing}")


def _column(schema: TableSchema, name: str, values: list[Any]) -> pa.Array | pa.ChunkedArray:
    if name in schema.json_columns:
        values = [_json(schema, name, v) for v in values]
    try:
        return pa.array(values, schema.columns[name])
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 cannot
        return pa.array([_well_formed(v) for v in values], schema.columns[name])


def _json(schema: TableSchema, name: str, value: Any) -> str | None:
    """JSON text of a value; a str is taken to be JSON text already."""
    if value is None:
        return None
    if isinstance(value, str):
        try:
            json.loads(value)
        except ValueError as error:
            raise ValueError(f"{schema.name}.{name}: a str must be JSON text: {error}") from error
        return value
    return json.dumps(_plain(value), default=str)


def _plain(value: Any) -> Any:
    """`value` without what JSON has no word for: NaN and infinities become null, lone surrogates `?`."""
    if isinstance(value, str):
        return _well_formed(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(str(k)): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def _well_formed(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    return [_well_formed(v) for v in value] if isinstance(value, list | tuple) else value
