"""Reading results in Python: `autointerp.open(path)` and what `autointerp.label(...)` returns."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from autointerp.store import Store
from autointerp.store.query import run_query

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Answer:
    """The rows that a query gave, held in memory."""

    table: pa.Table

    def df(self) -> pd.DataFrame:
        """As a pandas DataFrame."""
        return self.table.to_pandas()

    def arrow(self) -> pa.Table:
        return self.table

    def fetchall(self) -> list[tuple[Any, ...]]:
        """As tuples, in the order of `columns`."""
        return [tuple(row.values()) for row in self.table.to_pylist()]

    def fetchone(self) -> tuple[Any, ...] | None:
        """The first row, if any."""
        return next(iter(Answer(self.table.slice(0, 1)).fetchall()), None)

    @property
    def columns(self) -> list[str]:
        return self.table.column_names

    def __len__(self) -> int:
        return self.table.num_rows

    def __repr__(self) -> str:
        from autointerp.tabulate import as_text

        return as_text(self.table)

    def _repr_html_(self) -> str:
        return self.df().to_html(index=False, escape=True)


class Results:
    """The results in a store, read-only. Each question opens and closes the file: a job may write in between."""

    def __init__(self, path: str | os.PathLike[str], run_id: str | None = None, exit_status: int = 0):
        """`run_id` (or an unambiguous beginning) names the run meant by `df` and `status`: the newest by default.

        InputError when there is no store at `path` or no such run in it.
        """
        self.path = os.fspath(path)
        self.exit_status = exit_status
        """What the command line would have returned (0 done, 3 partial, 4 budget, 5 provider)."""
        with Store.open(self.path, mode="read") as store:
            self.run_id = store.run_id(run_id)

    @property
    def status(self) -> str | None:
        """`runs.status` as it stands now."""
        row = self.sql("SELECT status FROM runs WHERE run_id = ?", [self.run_id]).fetchone()
        return row[0] if row else None

    def sql(self, query: str, params: list[Any] | dict[str, Any] | None = None) -> Answer:
        """The answer to one SELECT over the store; InputError for anything else."""
        return Answer(run_query(self.path, query, params))

    def df(self) -> pd.DataFrame:
        """The changed latents of this run, by rank, as a pandas DataFrame."""
        return self.sql("SELECT * FROM changed_latents WHERE run_id = ? ORDER BY rank", [self.run_id]).df()

    def summary(self) -> dict[str, Any]:
        """The run's figures and its changed latents: what `--json` prints."""
        run = self.sql("SELECT * FROM runs WHERE run_id = ?", [self.run_id]).arrow().to_pylist()[0]
        rows = self.sql("SELECT * FROM changed_latents WHERE run_id = ? ORDER BY rank", [self.run_id]).arrow()
        selectors = self.sql("SELECT * FROM selectors WHERE run_id = ? ORDER BY position", [self.run_id]).arrow()
        said = [{key: value for key, value in row.items() if key != "run_id"} for row in selectors.to_pylist()]
        followed = "SELECT * EXCLUDE (run_id) FROM checkpoints WHERE run_id = ? ORDER BY step NULLS LAST"
        newest = "SELECT summary FROM summaries WHERE run_id = ? ORDER BY created_at DESC LIMIT 1"
        summary = self.sql(newest, [self.run_id]).fetchone()
        return {
            **run,
            "exit_status": self.exit_status,
            "summary": summary[0] if summary else None,
            "spent": self._spent(),
            "latents": rows.to_pylist(),
            "selectors": said,
            "checkpoints": self.sql(followed, [self.run_id]).arrow().to_pylist(),
        }

    def _spent(self) -> list[dict[str, Any]]:
        rows = self.sql("SELECT * EXCLUDE (run_id) FROM spent WHERE run_id = ? ORDER BY ALL", [self.run_id])
        return rows.arrow().to_pylist()

    def __repr__(self) -> str:
        return f"Results({self.path!r}, run_id={self.run_id!r}, exit_status={self.exit_status})"
