"""The schema as numbered steps (`schema/NNN_name.sql`), and what the writer must know of its tables.

A step is applied once, in order, by name, and recorded in `schema_steps`. A step that was released is never edited: a
change is a new file.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import resources

import duckdb
import pyarrow as pa

from autointerp.errors import InputError

_ARROW_TYPES: dict[str, pa.DataType] = {
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "FLOAT": pa.float32(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us"),
    "VARCHAR[]": pa.list_(pa.string()),
    "FLOAT[]": pa.list_(pa.float32()),
}


@dataclass(frozen=True)
class TableSchema:
    """Columns of one table as the writer needs them."""

    name: str
    columns: dict[str, pa.DataType]
    json_columns: frozenset[str]
    key: tuple[str, ...]


def steps() -> dict[str, str]:
    """Name → SQL of every step that this version knows, in order of application."""
    files = (f for f in resources.files("autointerp.store").joinpath("schema").iterdir() if f.name.endswith(".sql"))
    return {f.name.removesuffix(".sql"): f.read_text(encoding="utf-8") for f in sorted(files, key=lambda f: f.name)}


def applied(connection: duckdb.DuckDBPyConnection) -> list[str] | None:
    """Names of the steps in this database; None when it is a database without our bookkeeping."""
    tables = {name for (name,) in connection.execute("SELECT table_name FROM duckdb_tables()").fetchall()}
    if "schema_steps" not in tables:
        return None if tables else []
    return [name for (name,) in connection.execute("SELECT step FROM schema_steps ORDER BY step").fetchall()]


def check(connection: duckdb.DuckDBPyConnection, path: str) -> list[str]:
    """The steps that are missing here. InputError for somebody else's database and for a newer version's store."""
    known, done = steps(), applied(connection)
    if done is None:
        raise InputError(f"{path} is a DuckDB database, but not an autointerp store: name another file with --db")
    newer = [name for name in done if name not in known]
    if newer:
        raise InputError(f"{path} was written by a newer autointerp (schema step {newer[-1]}): upgrade autointerp")
    return [name for name in known if name not in done]


def migrate(connection: duckdb.DuckDBPyConnection, path: str) -> None:
    """Apply the missing steps, each in a transaction of its own."""
    known = steps()
    for name in check(connection, path):
        connection.execute("BEGIN")
        try:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS schema_steps (step VARCHAR PRIMARY KEY, applied_at TIMESTAMP)"
            )
            connection.execute(known[name])
            now = datetime.now(UTC).replace(tzinfo=None)
            connection.execute("INSERT INTO schema_steps VALUES (?, ?)", [name, now])
            connection.execute("COMMIT")
        except BaseException:
            connection.execute("ROLLBACK")
            raise


def table_schemas(connection: duckdb.DuckDBPyConnection) -> dict[str, TableSchema]:
    """What the database says of its own tables."""
    columns: dict[str, dict[str, str]] = {}
    for table, column, kind in connection.execute(
        "SELECT table_name, column_name, data_type FROM duckdb_columns() WHERE NOT internal ORDER BY column_index"
    ).fetchall():
        columns.setdefault(table, {})[column] = kind
    keys = connection.execute(
        "SELECT table_name, constraint_column_names FROM duckdb_constraints() WHERE constraint_type = 'PRIMARY KEY'"
    ).fetchall()
    return {
        table: TableSchema(
            name=table,
            columns={column: _ARROW_TYPES[kind] for column, kind in columns[table].items()},
            json_columns=frozenset(column for column, kind in columns[table].items() if kind == "JSON"),
            key=tuple(key),
        )
        for table, key in keys
    }
