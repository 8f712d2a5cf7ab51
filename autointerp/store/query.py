"""SQL that a user types: one statement that reads, over the store and nothing else."""

from __future__ import annotations

import os
from typing import Any

import duckdb
import pyarrow as pa

from autointerp.errors import InputError
from autointerp.store import files

_READING = {"SELECT", "EXPLAIN", "MULTI"}  # MULTI is what DuckDB makes of a PIVOT


def run_query(path: str | os.PathLike[str], sql: str, params: list[Any] | dict[str, Any] | None = None) -> pa.Table:
    """The answer to one SQL statement over the store at `path`, also while another process writes it.

    The connection is read-only, sees no file but the store, and cannot change its own settings. InputError, in one
    line, for anything but one reading statement, and for whatever DuckDB says of it.
    """
    try:
        _check_reads(sql)
        handle = files.connect_for_reading(files.resolve(path))
        try:
            relation = handle.connection.sql(sql, params=params) if params else handle.connection.sql(sql)
            return _with_unique_names(relation.to_arrow_table())
        finally:
            handle.close()
    except duckdb.Error as error:
        raise InputError(f"the query failed: {files.first_line(error)}") from error


def _check_reads(sql: str) -> None:
    statements = duckdb.extract_statements(sql)
    kinds = [statement.type.name for statement in statements]
    if not kinds:
        raise InputError("the query is empty: give one SELECT")
    if kinds in (["CREATE", "SELECT"], ["MULTI"]) and statements[0].query == "":  # a PIVOT, as DuckDB 1 splits it
        return
    if len(kinds) > 1:
        raise InputError(f"the query holds {len(kinds)} statements: give one SELECT at a time")
    if kinds[0] not in _READING:
        raise InputError(f"the query is a {kinds[0]} statement: queries only read; give one SELECT")


def _with_unique_names(table: pa.Table) -> pa.Table:
    """`SELECT 1 AS a, 2 AS a` gives a and a_1, so that no reader by name loses a column."""
    names: list[str] = []
    for name in table.column_names:
        unique, n = name, 0
        while unique in names:
            n += 1
            unique = f"{name}_{n}"
        names.append(unique)
    return table.rename_columns(names)
