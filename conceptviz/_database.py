"""The SQLite file under the journal: opened with care, and written so that what is committed is on the disk.

What lives here: the schema, the file's checks, transactions, and which processes are still alive. What must never live
here: what the rows mean (`_journal`).
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ._errors import JournalError

_APPLICATION_ID = 0x43565A4A
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE attempts (
    id TEXT PRIMARY KEY,
    state TEXT NOT NULL,
    key TEXT,
    fingerprint TEXT NOT NULL,
    account TEXT NOT NULL,
    base_url TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    prompts TEXT NOT NULL,
    settings TEXT NOT NULL,
    expected_credits INTEGER,
    owner TEXT NOT NULL,
    stale_at REAL NOT NULL,
    created_at REAL NOT NULL,
    updated_at REAL NOT NULL,
    task_id TEXT,
    credits_used INTEGER,
    credits_remaining INTEGER,
    receipt TEXT,
    answer TEXT,
    is_refunded INTEGER,
    error TEXT
);
CREATE INDEX attempts_by_key ON attempts (key, created_at) WHERE key IS NOT NULL;
CREATE INDEX attempts_by_state ON attempts (state);
CREATE INDEX attempts_by_task ON attempts (task_id) WHERE task_id IS NOT NULL;
"""
# How long a writer waits for another process's lock before it gives up, in seconds.
_BUSY_SECONDS = 5.0


class Database:
    """A journal's file, for any number of threads and processes.

    Args:
        path: The file; made, readable by its owner alone, if it is not there.

    Raises:
        JournalError: It cannot be opened, or is not a journal of this version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._left_behind: list[sqlite3.Connection] = []
        self._closed = False
        with self.transaction():
            pass

    def close(self) -> None:
        """Close the file. Closing again does nothing."""
        with self._lock:
            self._closed = True
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the file's write lock; what happens within is committed and synced at the end, or did not happen."""
        with self._lock:
            try:
                db = self._open()
                db.execute("BEGIN IMMEDIATE")
                try:
                    yield db
                except BaseException:
                    with suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                    raise
                db.execute("COMMIT")
            except (sqlite3.Error, OSError) as error:
                if self._connection is not None:
                    with suppress(sqlite3.Error):
                        self._connection.execute("ROLLBACK")
                raise JournalError(f"The journal {self._path} could not be used: {error}.") from error

    def _open(self) -> sqlite3.Connection:
        if self._closed:
            raise JournalError(f"The journal {self._path} is closed.")
        if self._connection is not None and self._pid == os.getpid():
            return self._connection
        if self._connection is not None:
            # After a fork the connection is the parent's. SQLite forbids so much as closing it here.
            self._left_behind.append(self._connection)
            self._connection = None
        _check_file(self._path)
        db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            db.row_factory = sqlite3.Row
            self._prepare(db)
        except BaseException:
            db.close()
            raise
        self._connection, self._pid = db, os.getpid()
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("BEGIN IMMEDIATE")
        version = db.execute("PRAGMA user_version").fetchone()[0]
        application = db.execute("PRAGMA application_id").fetchone()[0]
        is_new = version == 0 and application == 0 and not db.execute("SELECT 1 FROM sqlite_master").fetchone()
        if is_new:
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute("COMMIT")
        if not is_new and application != _APPLICATION_ID:
            raise JournalError(f"{self._path} is a database, but not a journal of this package.")
        if not is_new and version != _SCHEMA_VERSION:
            raise JournalError(
                f"The journal {self._path} is of version {version}, and this package reads version {_SCHEMA_VERSION}."
            )


def _check_file(path: Path) -> None:
    """Make the file for its owner alone, or refuse one that is not a plain file of ours.

    SQLite gives its own extra files the permissions of this one.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise JournalError(f"The journal {path} could not be opened: {error.strerror or error}.") from error
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise JournalError(f"The journal {path} is not a regular file.")
    if os.name == "posix" and status.st_mode & 0o077:
        raise JournalError(
            f"The journal {path} can be read or written by others (mode {stat.filemode(status.st_mode)}), and it holds "
            "prompts and task ids: run chmod 600 on it."
        )


def this_process() -> str:
    return f"{os.getpid()}:{_started_at(os.getpid())}"


def _started_at(pid: int) -> str:
    """Return when a process started, where the platform says so: ids of processes are used again."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(owner: str) -> bool:
    """Say whether the process that owns an attempt may still be at work; when in doubt, it may."""
    pid, _, started = owner.partition(":")
    if os.name != "posix" or not pid.isdecimal():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return not started or _started_at(int(pid)) in {started, ""}
