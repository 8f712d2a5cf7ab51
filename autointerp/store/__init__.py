"""Results in one DuckDB file: schema, one writer thread, read-only queries, export. Loads no torch."""

from autointerp.store.store import Store
from autointerp.store.writer import StoreError

__all__ = ["Store", "StoreError"]
