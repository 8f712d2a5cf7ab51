"""`Store`: one DuckDB file, opened to write (one thread commits) or to read."""

from __future__ import annotations

import asyncio
import atexit
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa

from autointerp.errors import InputError
from autointerp.records import Context, DecoderToken, Label, LatentEvidence, Ngrams, Prediction, Score, Unit, Write
from autointerp.store import files, schema
from autointerp.store.rows import latents_table, to_arrow
from autointerp.store.writer import Statement, Step, Upsert, Writer

Params = Sequence[Any] | Mapping[str, Any] | None


class Store:
    """The results of all runs in one file. Made by `Store.open`; a context manager.

    Writing methods queue and return a future that resolves when the row is committed; they never wait for a disk.
    Reading methods see what is committed (`flush` first to see what is queued). All are safe to call from any thread.
    """

    def __init__(self, handle: files.Handle, path: str, writer: Writer | None):
        """Use `Store.open`."""
        self.path = path
        self._handle = handle
        self._writer = writer
        self._tables = schema.table_schemas(handle.connection)
        self._closed = False
        self._unused = False
        """Whether this store made the file and has written nothing."""
        self._folders: list[Path] = []
        """The folders it made for the file, innermost first."""

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        mode: Literal["write", "read"] = "write",
        lock_wait_s: float = files.LOCK_WAIT_S,
    ) -> Store:
        """Open the store at `path`; `write` makes file and folder where there are none, `read` never makes anything.

        While another process writes, `read` shows its replica: the state of about a second ago. A reader that uses
        the file itself keeps writers out, so open it for one question, not for an afternoon.

        Raises InputError, leaving all as it was: no store to read; a read-only file or folder; a file that is not
        ours; a newer version's store; another process that still writes after `lock_wait_s`.
        """
        resolved = files.resolve(path)
        if mode == "read":
            return cls(files.connect_for_reading(resolved, lock_wait_s), resolved, None)
        made = not os.path.lexists(resolved)
        folders = [folder for folder in Path(resolved).parents if not folder.exists()]
        handle = files.connect_for_writing(resolved, lock_wait_s)
        writer = Writer(handle.connection.cursor(), resolved)
        store = cls(handle, resolved, writer)
        store._unused, store._folders = made, folders
        files.register_publisher(resolved, lambda: writer.publish().result())
        atexit.register(store.close)
        return store

    def close(self) -> None:
        """Commit what is queued and give the file back. Raises what failed since the last flush. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._writer is None:
            self._handle.close()
            return
        atexit.unregister(self.close)
        files.unregister_publisher(self.path)
        last = self._writer.stop()
        self._handle.close()  # DuckDB's last connection: it checkpoints and removes its log
        self._writer.remove_replica()
        last.result()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            unmade = error is not None and self._unused and not self._closed
            if unmade:
                os.unlink(self.path)  # there was none before; while we still hold its lock
            self.close()
            if unmade:
                for folder in self._folders:
                    folder.rmdir()
        except Exception as closing:
            if error is None:
                raise
            error.add_note(f"while closing the store: {closing}")

    # Writing

    def upsert(self, table: str, rows: Sequence[Mapping[str, Any]] | pa.Table) -> Future[None]:
        """Insert rows, or update just the given columns of those whose key exists. JSON columns take objects.

        Raises ValueError or pyarrow.ArrowInvalid at once for rows that do not fit the table, StoreError once the
        store has failed.
        """
        return self._submit(*self._upserts(table, rows))

    def insert(self, table: str, rows: Sequence[Mapping[str, Any]]) -> Future[None]:
        """As `upsert`, for rows whose keys are new, and committed at once: for what somebody waits for.

        A key that exists fails the future (duckdb.ConstraintException).
        """
        fresh = [replace(step, fresh=True) for step in self._upserts(table, rows)]
        self._unused = False
        return self._writing().submit(*fresh, urgent=True)

    def execute(self, sql: str, params: Sequence[Any] = ()) -> Future[None]:
        """Run one statement on the writer thread, in order with the upserts."""
        return self._submit(Statement(sql, params))

    def flush(self) -> None:
        """Wait until all that is queued is committed. Raises the first failure since the last flush."""
        self._writing().flush().result()

    async def aflush(self) -> None:
        """As `flush`, inside an event loop."""
        await asyncio.wrap_future(self._writing().flush())

    def write_latents(self, run_id: str, columns: Mapping[str, np.ndarray]) -> Future[None]:
        """Replace the `latents` rows of a run: one array of shape [m] per column; `latent` defaults to 0 … m−1.

        NaN is stored as NULL; columns that are not given are NULL.
        """
        table = latents_table(self._tables["latents"], run_id, columns)
        return self._submit(
            Statement("DELETE FROM latents WHERE run_id = ?", [run_id]), Upsert(self._tables["latents"], table)
        )

    def write_selector_ranks(self, run_id: str, selector: str, columns: Mapping[str, np.ndarray]) -> Future[None]:
        """Insert or replace what one selector says of latents: arrays `latent`, `change`, `statistic`, `rank`, all [n].

        NaN is stored as NULL.
        """
        n = len(columns["latent"])
        arrays = {name: pa.array(column, from_pandas=True) for name, column in columns.items()}
        return self.upsert("selector_ranks", pa.table({"run_id": [run_id] * n, "selector": [selector] * n} | arrays))

    def write_writes(self, run_id: str, writes: Iterable[Write], latents: Iterable[int] | None = None) -> Future[None]:
        """Replace the writes of the latents named in `writes`; of all `latents` where given, also those without any."""
        rows = [_row(run_id, write, _WRITE_COLUMNS) for write in writes]
        replaced = sorted({row["latent"] for row in rows} if latents is None else set(latents))
        delete = Statement("DELETE FROM writes WHERE run_id = ? AND list_contains(?, latent)", [run_id, replaced])
        return self._submit(delete, *self._upserts("writes", rows))

    def write_units(self, run_id: str, units: Iterable[Unit]) -> Future[None]:
        """Replace the units of a run."""
        rows = [_row(run_id, unit, _UNIT_COLUMNS) for unit in units]
        return self._submit(Statement("DELETE FROM units WHERE run_id = ?", [run_id]), *self._upserts("units", rows))

    def write_contexts(
        self, run_id: str, latent: int, contexts: Iterable[Context], predictions: Iterable[Prediction] = ()
    ) -> Future[None]:
        """Replace the contexts and predictions of one latent, all in one commit."""
        return self._submit(
            Statement("DELETE FROM contexts WHERE run_id = ? AND latent = ?", [run_id, latent]),
            Statement("DELETE FROM predictions WHERE run_id = ? AND latent = ?", [run_id, latent]),
            *self._upserts("contexts", [_row(run_id, context, _CONTEXT_COLUMNS) for context in contexts]),
            *self._upserts("predictions", [_row(run_id, p, _PREDICTION_COLUMNS) for p in predictions]),
        )

    def write_label(self, run_id: str, label: Label) -> Future[None]:
        """Insert or replace what one labeler says of one latent."""
        return self.upsert("labels", [{**_row(run_id, label, _LABEL_COLUMNS), "created_at": datetime.now(UTC)}])

    def write_score(self, run_id: str, score: Score) -> Future[None]:
        """Insert or replace one scorer's value for one label."""
        return self.upsert("scores", [{**_row(run_id, score, _SCORE_COLUMNS), "created_at": datetime.now(UTC)}])

    # Reading

    def arrow(self, sql: str, params: Params = None) -> pa.Table:
        """The whole answer of one statement, of what is committed. StoreError once the store has failed."""
        cursor = self._handle.connection.cursor()
        try:
            relation = cursor.sql(sql, params=params) if params else cursor.sql(sql)
            return relation.to_arrow_table() if relation is not None else pa.table({})
        except duckdb.FatalException as error:
            if self._writer is None:
                raise
            raise self._writer.failed(error) from error  # after a failed write DuckDB reads no more either
        finally:
            cursor.close()

    def read(self, sql: str, params: Params = None) -> list[dict[str, Any]]:
        """As `arrow`, one dict per row. JSON columns are text."""
        return self.arrow(sql, params).to_pylist()

    def run_id(self, wanted: str | None = None) -> str:
        """The run meant by a full id or an unambiguous beginning of one; the newest run when none is named.

        InputError when there is no such run, or more than one.
        """
        rows = self.read("SELECT run_id FROM runs ORDER BY created_at DESC NULLS LAST, run_id DESC")
        ids: list[str] = [row["run_id"] for row in rows]
        if not ids:
            raise InputError(f"{self.path} holds no run yet: run `autointerp label --run PATH` first")
        if wanted is None:
            return ids[0]
        found = [run_id for run_id in ids if run_id == wanted] or [r for r in ids if r.startswith(wanted)]
        if len(found) != 1:
            shown = ", ".join((found or ids)[:5]) + (" …" if len(found or ids) > 5 else "")
            raise InputError(
                f"{'several runs begin with' if found else 'there is no run'} {wanted!r}: choose one of {shown}"
            )
        return found[0]

    def selected(self, run_id: str) -> list[int]:
        """The selected latents, by rank."""
        sql = "SELECT latent FROM latents WHERE run_id = ? AND selected ORDER BY rank NULLS LAST, latent"
        return [row["latent"] for row in self.read(sql, [run_id])]

    def labels(self, run_id: str, labeler: str) -> dict[int, Label]:
        """Latent → what this labeler says of it."""
        rows = self.read("SELECT * FROM labels WHERE run_id = ? AND labeler = ? ORDER BY latent", [run_id, labeler])
        return {row["latent"]: _label(row) for row in rows}

    def ngrams(self, run_id: str) -> dict[int, Ngrams]:
        """Latent → how much of it its n-grams tell, where that was measured."""
        rows = self.read("SELECT * EXCLUDE (run_id) FROM ngrams WHERE run_id = ?", [run_id])
        found = [(row, json.loads(row.pop("grams") or "[]")) for row in rows]
        return {row["latent"]: Ngrams(**row, grams=tuple(map(tuple, grams))) for row, grams in found}

    def dead(self, run_id: str) -> set[int]:
        """The selected latents that fire in neither model: there is nothing to label."""
        sql = "SELECT latent FROM latents WHERE run_id = ? AND selected AND state = 'dead'"
        return {row["latent"] for row in self.read(sql, [run_id])}

    def evidence(self, run_id: str, latent: int) -> LatentEvidence:
        """All that is known of one latent before it is labelled. InputError when the run has no such latent."""
        key = [run_id, latent]
        rows = self.read("SELECT * FROM latents WHERE run_id = ? AND latent = ?", key)
        if not rows:
            raise InputError(f"run {run_id} has no latent {latent}: `autointerp show` lists the selected ones")
        row = rows[0]
        contexts = self.read("SELECT * FROM contexts WHERE run_id = ? AND latent = ? ORDER BY context_id", key)
        writes = self.read("SELECT * FROM writes WHERE run_id = ? AND latent = ? ORDER BY kind, rank", key)
        predictions = self.read(
            "SELECT * FROM predictions WHERE run_id = ? AND latent = ? ORDER BY context_id, side, rank", key
        )
        decoder = self.read("SELECT * FROM decoder_tokens WHERE run_id = ? AND latent = ? ORDER BY kind, rank", key)
        return LatentEvidence(
            run_id=run_id,
            latent=latent,
            rank=row["rank"] or 0,
            role=row["role"] or "read",
            state=row["state"] or "live",
            gain=row["gain"],
            change=row["change"],
            **{name: float("nan") if row[name] is None else row[name] for name in _MEASURED},
            contexts=tuple(Context(**{name: _frozen(c[name]) for name in _CONTEXT_COLUMNS}) for c in contexts),
            writes=tuple(Write(**{name: w[name] for name in _WRITE_COLUMNS}) for w in writes),
            predictions=tuple(Prediction(**{name: p[name] for name in _PREDICTION_COLUMNS}) for p in predictions),
            decoder=tuple(DecoderToken(**{name: d[name] for name in _DECODER_COLUMNS}) for d in decoder),
        )

    def _upserts(self, table: str, rows: Sequence[Mapping[str, Any]] | pa.Table) -> list[Upsert]:
        if table not in self._tables:
            raise ValueError(f"the store has no table {table!r}")
        return [Upsert(self._tables[table], part) for part in to_arrow(self._tables[table], rows)]

    def _submit(self, *steps: Step) -> Future[None]:
        self._unused = False
        return self._writing().submit(*steps)

    def _writing(self) -> Writer:
        if self._writer is None:
            raise ValueError(f"the store {self.path} is open for reading only")
        return self._writer


_MEASURED = ("mean_base", "mean_adapted", "freq_base", "freq_adapted", "max_base", "max_adapted")
_CONTEXT_COLUMNS = tuple(Context.__dataclass_fields__)
_UNIT_COLUMNS = tuple(Unit.__dataclass_fields__)
_WRITE_COLUMNS = tuple(Write.__dataclass_fields__)
_PREDICTION_COLUMNS = tuple(Prediction.__dataclass_fields__)
_DECODER_COLUMNS = tuple(DecoderToken.__dataclass_fields__)
_LABEL_COLUMNS = tuple(Label.__dataclass_fields__)
_SCORE_COLUMNS = tuple(Score.__dataclass_fields__)


def _row(run_id: str, record: Any, columns: Sequence[str]) -> dict[str, Any]:
    """A record's fields as a row; NaN, which only a failed computation gives, as NULL."""
    values = {name: getattr(record, name) for name in columns}
    return {"run_id": run_id, **{k: None if isinstance(v, float) and v != v else v for k, v in values.items()}}


def _label(row: dict[str, Any]) -> Label:
    values = {name: row[name] for name in _LABEL_COLUMNS}
    return Label(**values | {"rule": json.loads(row["rule"] or "null"), "salvaged": bool(row["salvaged"])})


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
