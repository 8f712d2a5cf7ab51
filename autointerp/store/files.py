"""The store's file: what may be opened, how, and what a user is told when it may not.

DuckDB lets one process hold a file; even readers of other processes are refused meanwhile. A writer therefore
publishes a replica beside the file (replica.py), and `connect_for_reading` chooses between the two.

The lock is a POSIX one: when a process closes *any* handle on a file, it loses its locks on it. Nothing in this
package may therefore open and close a store that this process has open in DuckDB; `_held` keeps count.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import duckdb

from autointerp.errors import InputError
from autointerp.store import schema

REPLICA_SUFFIX = ".replica"
LOCK_WAIT_S = 2.0
"""How long to wait for a lock: a query holds it for milliseconds, a writer shows a replica soon after its start."""

# DuckDB 2 writes files that 1.x cannot read unless it is told not to.
_Config = dict[str, str | bool | int | float | list[str]]
_WRITE_CONFIG: _Config = {"storage_compatibility_version": "v1.4.0", "python_enable_replacements": "false"}
# One configuration for all readers of a process: DuckDB refuses to open one file under two.
_READ_CONFIG: _Config = {
    "enable_external_access": "false",
    "python_enable_replacements": "false",
    "autoinstall_known_extensions": "false",
    "autoload_known_extensions": "false",
    "lock_configuration": "true",
}
_WAIT_OR_QUERY = "wait until it ends, or name another --db; `autointerp query` works meanwhile"
_TRY_AGAIN = "it shows no copy to readers yet; try again in a moment"
_MAGIC_OFFSET, _MAGIC = 8, b"DUCK"

_held: Counter[str] = Counter()
_publishers: dict[str, Callable[[], None]] = {}
_guard = threading.RLock()


class _LockedError(Exception):
    """Another process holds the file; `pid` when DuckDB names it."""

    def __init__(self, pid: str | None):
        self.pid = pid


class Handle:
    """A DuckDB connection and the file behind it. `close` gives the file back; it may be called twice."""

    def __init__(self, connection: duckdb.DuckDBPyConnection, path: str):
        self.connection = connection
        self.path = path
        self._closed = False

    def close(self) -> None:
        with _guard:
            if not self._closed:
                self._closed = True
                self.connection.close()
                _held[self.path] -= 1


def resolve(path: str | os.PathLike[str]) -> str:
    """Absolute, without links: DuckDB would take `md:x` or `s3://x` for a service."""
    return os.path.realpath(os.path.expanduser(path))


def replica_of(path: str) -> str:
    return path + REPLICA_SUFFIX


def connect_for_writing(path: str, lock_wait_s: float = LOCK_WAIT_S) -> Handle:
    """The migrated store at `path` (as `resolve` gives it), made when there is none.

    Raises InputError, with the file as it was, when it is read-only, foreign, of a newer version or held by another
    process.
    """
    with _guard:
        if _held[path]:
            raise InputError(f"{path} is already open in this process: close the other store or results first")
        _check_writable(path)
        if not os.path.lexists(path):
            _create(path)
        _check_magic(path)
        # Somebody else's database must not be touched: DuckDB checkpoints what it opens for writing.
        checked = _wait_for(lambda: _connect(path, read_only=True), path, lock_wait_s, _WAIT_OR_QUERY)
        try:
            schema.check(checked.connection, path)
        finally:
            checked.close()
        handle = _wait_for(lambda: _connect(path, read_only=False), path, lock_wait_s, _WAIT_OR_QUERY)
        try:
            schema.migrate(handle.connection, path)
        except duckdb.Error as error:
            handle.close()
            raise InputError(f"cannot bring {path} to this version's schema: {first_line(error)}") from error
        return handle


def connect_for_reading(path: str, lock_wait_s: float = LOCK_WAIT_S) -> Handle:
    """The store at `path` (as `resolve` gives it) read-only: the file, or its replica while a writer holds the file.

    InputError when there is no store, when it is not one of ours, or when its writer shows no replica.
    """
    publish = _publishers.get(path)
    if publish:  # The writer is this very process, and DuckDB would hand out its connection, which can write.

        def published() -> Handle:
            publish()
            return _connect(replica_of(path), read_only=True)

        return _wait_for(published, path, lock_wait_s)
    if not os.path.lexists(path):
        raise InputError(f"there is no store at {path}: run `autointerp label` first, or name another --db")

    def either() -> Handle:
        try:
            _check_magic(path)
            return _connect(path, read_only=True)
        except _LockedError:
            if not os.path.exists(replica_of(path)):
                raise
            return _connect(replica_of(path), read_only=True)

    handle = _wait_for(either, path, lock_wait_s)
    try:
        missing = schema.check(handle.connection, path)
    except InputError:
        handle.close()
        raise
    if len(missing) == len(schema.steps()):
        handle.close()
        raise InputError(f"{path} is an empty database: run `autointerp label` first, or name another --db")
    return handle


def register_publisher(path: str, publish: Callable[[], None]) -> None:
    """`publish` brings the replica of a store that this process writes up to date."""
    _publishers[path] = publish


def unregister_publisher(path: str) -> None:
    _publishers.pop(path, None)


def first_line(error: BaseException) -> str:
    """DuckDB's message in one line, without the excerpt and the links that follow."""
    return " ".join(re.split(r"\n\s*\n|\nLINE \d", str(error), maxsplit=1)[0].split())


def _connect(path: str, *, read_only: bool) -> Handle:
    try:
        with _guard:
            connection = duckdb.connect(path, read_only=read_only, config=_READ_CONFIG if read_only else _WRITE_CONFIG)
            _held[path] += 1
            return Handle(connection, path)
    except duckdb.Error as error:
        message = first_line(error)
        if "lock on file" in message:
            pid = re.search(r"PID (\d+)", message)
            raise _LockedError(pid.group(1) if pid else None) from error
        if "different configuration" in message:
            raise InputError(f"{path} is open in this process by other means: close that connection first") from error
        if "version number" in message:
            raise InputError(
                f"{path} was written by another version of DuckDB: `pip install -U duckdb` ({message})"
            ) from error
        if "does not exist" in message:  # the replica of a writer that has just finished: the file itself is free now
            raise _LockedError(None) from error
        raise InputError(f"{path} cannot be opened as a DuckDB file: {message}; name another file with --db") from error


def _wait_for(attempt: Callable[[], Handle], path: str, lock_wait_s: float, mend: str = _TRY_AGAIN) -> Handle:
    deadline, pause = time.monotonic() + lock_wait_s, 0.005
    while True:
        try:
            return attempt()
        except _LockedError as error:
            if time.monotonic() + pause > deadline:
                holder = f"another process (PID {error.pid})" if error.pid else "another process"
                raise InputError(f"{path} is in use by {holder}: {mend}") from error
        time.sleep(pause)
        pause = min(2 * pause, 0.1)


def _check_writable(path: str) -> None:
    """InputError unless file and folder may be written. Mode bits count even for root, who could override them."""
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder: name a file with --db")
    folder = Path(path).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"{path} cannot be made: {folder} is not a folder; name another --db")
    for place, kind in ((path, "file"), (str(folder), "folder")):
        if os.path.exists(place) and not (_has_write_bit(place) and os.access(place, os.W_OK)):
            raise InputError(f"the {kind} {place} is read-only: make it writable, or name another --db")


def _has_write_bit(path: str) -> bool:
    return bool(os.stat(path).st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))


def _check_magic(path: str) -> None:
    """InputError unless the file starts like a DuckDB database (DuckDB itself would go looking for a reader of it)."""
    with _guard:
        if _held[path]:
            return
        try:
            with open(path, "rb") as file:
                head = file.read(_MAGIC_OFFSET + len(_MAGIC))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}; name another file with --db") from error
    if head[_MAGIC_OFFSET:] != _MAGIC:
        raise InputError(f"{path} is not an autointerp store: name another file with --db")


def _create(path: str) -> None:
    """A new store appears under its name whole or not at all, and never in the place of another process's."""
    draft = f"{path}.{os.getpid()}.new"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        connection = duckdb.connect(draft, config=_WRITE_CONFIG)
        try:
            schema.migrate(connection, path)
        finally:
            connection.close()
        _put_in_place(draft, path)
    except (duckdb.Error, OSError) as error:
        raise InputError(f"{path} cannot be made: {first_line(error)}; name another --db") from error
    finally:
        for leftover in (draft, draft + ".wal"):
            if os.path.exists(leftover):
                os.unlink(leftover)


def _put_in_place(draft: str, path: str) -> None:
    try:
        os.link(draft, path)
    except FileExistsError:
        pass  # another process was first; its store is as good
    except OSError:  # a file system without hard links
        os.rename(draft, path)
