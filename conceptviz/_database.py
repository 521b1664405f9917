"""The SQLite file under the journal: opened with care, and written so that what is committed is on the disk.

Two rules of POSIX shape it. A process loses all its locks on a file as soon as it closes any descriptor of it: so only
SQLite opens the file here, and everything else goes by its name. And locks do not cross a fork: so no connection does;
it is closed before, and opened anew on either side.

What lives here: the schema, the file's checks, transactions, and which processes are still alive. What must never live
here: what the rows mean (`_journal`).
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
import weakref
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
CREATE INDEX attempts_by_key ON attempts (key) WHERE key IS NOT NULL;
CREATE INDEX attempts_by_state ON attempts (state);
CREATE INDEX attempts_by_task ON attempts (task_id) WHERE task_id IS NOT NULL;
"""
# How long a writer waits for another process's lock before it gives up, in seconds.
_BUSY_SECONDS = 5.0

_making = threading.Lock()
_forking = threading.Lock()
_databases: weakref.WeakSet[Database] = weakref.WeakSet()
_held: list[Database] = []
# Connections of a parent whose fork Python did not see. SQLite forbids so much as closing them here.
_left_behind: list[sqlite3.Connection] = []


class Database:
    """A journal's file, for any number of threads and processes.

    Args:
        path: The file, as an absolute path; made, readable by its owner alone, if it is not there.

    Raises:
        JournalError: It cannot be opened, or is not a journal of this version.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._pid = 0
        self._closed = False
        _databases.add(self)
        try:
            with self.transaction():
                pass
        except JournalError:
            self.close()
            raise

    def close(self) -> None:
        """Close the file. Closing again does nothing."""
        with self._lock:
            self._closed = True
            self._disconnect()

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Hold the file's write lock; what happens within is committed and synced at the end, or did not happen.

        Raises:
            JournalError: The file could not be used, or is no longer the one that was opened.
        """
        with self._lock:
            try:
                db = self._connected()
                try:
                    db.execute("BEGIN IMMEDIATE")
                    self._check_place()
                    yield db
                    db.execute("COMMIT")
                except BaseException:
                    with suppress(sqlite3.Error):
                        db.execute("ROLLBACK")
                    raise
            # The last two are for values that SQLite cannot hold.
            except (sqlite3.Error, OSError, UnicodeError, OverflowError) as error:
                raise JournalError(f"The journal {self._path} could not be used: {error}.") from error

    def _connected(self) -> sqlite3.Connection:
        if self._closed:
            raise JournalError(f"The journal {self._path} is closed.")
        if _left_behind or any(database._is_inherited() for database in list(_databases)):
            # SQLite believes itself in possession of the parent's locks, even for a connection of this process's own.
            raise JournalError(
                f"The journal {self._path} cannot be used: one was open when this process was forked in a way that "
                "Python did not see. Open it after such a fork only."
            )
        if self._connection is None:
            if self._identity is None:
                _make(self._path)
            identity = _identify(self._path)
            db = sqlite3.connect(self._path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            try:
                db.row_factory = sqlite3.Row
                self._prepare(db)
            except BaseException:
                db.close()
                raise
            self._connection, self._pid = db, os.getpid()
            self._identity = self._identity or identity
        return self._connection

    def _disconnect(self) -> None:
        is_inherited = self._is_inherited()
        db, self._connection = self._connection, None
        if db is not None and is_inherited:
            _left_behind.append(db)
        elif db is not None:
            with suppress(sqlite3.Error):
                db.close()

    def _is_inherited(self) -> bool:
        return self._connection is not None and self._pid != os.getpid()

    def _check_place(self) -> None:
        """Refuse to write into a file that others no longer find: to them its keys are unpaid."""
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._identity:
            raise JournalError(f"The journal {self._path} was deleted or replaced while it was open.")

    def _prepare(self, db: sqlite3.Connection) -> None:
        # As FULL, which syncs each commit, and durable even where there can be no WAL.
        db.execute("PRAGMA synchronous = EXTRA")
        # macOS has a sync that reaches the disk's own cache, and one that does not.
        db.execute("PRAGMA fullfsync = ON")
        # Before the first change: it may be somebody else's database.
        self._is_empty(db)
        _use_wal(db)
        db.execute("BEGIN IMMEDIATE")
        if self._is_empty(db):
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
        db.execute("COMMIT")

    def _is_empty(self, db: sqlite3.Connection) -> bool:
        """Say whether the database is still to become a journal; refuse one that is something else."""
        # One statement, so that it sees one moment of the file.
        application, version, tables = db.execute(
            "SELECT application_id, user_version, (SELECT count(*) FROM sqlite_master)"
            " FROM pragma_application_id, pragma_user_version"
        ).fetchone()
        if (application, version, tables) == (0, 0, 0):
            return True
        if application != _APPLICATION_ID:
            raise JournalError(f"{self._path} is a database, but not a journal of this package.")
        if version != _SCHEMA_VERSION:
            raise JournalError(
                f"The journal {self._path} is of version {version}, and this package reads version {_SCHEMA_VERSION}."
            )
        return False


def _use_wal(db: sqlite3.Connection) -> None:
    """Wait here for processes that make the same file at this moment: for this statement SQLite itself may not."""
    until = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:  # noqa: PERF203 - it is tried again
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return


def _make(path: Path) -> None:
    """Make the file for its owner alone, if it is not there. SQLite gives its own extra files the same permissions."""
    # Held until the descriptor is closed: that drops the locks of whoever in this process opens the new file.
    with _making, suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))


def _identify(path: Path) -> tuple[int, int]:
    """Return which file it is, or refuse one that is not a plain file of its owner alone."""
    # Asked for before the size: a new file is given its first page before its log.
    has_log = path.with_name(path.name + "-wal").exists()
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise JournalError(f"The journal {path} is not a regular file ({stat.filemode(status.st_mode)}).")
    if os.name == "posix" and status.st_mode & 0o077:
        raise JournalError(
            f"The journal {path} can be read or written by others (mode {stat.filemode(status.st_mode)}), and it holds "
            "prompts and task ids: run chmod 600 on it."
        )
    if has_log and status.st_size == 0:
        raise JournalError(
            f"The journal {path} is empty, though its log is not: it was emptied or deleted while it was in use. Bring "
            "it back, or take its log away too and lose what it knows."
        )
    return status.st_dev, status.st_ino


def _before_fork() -> None:
    """Let no transaction be under way in the fork, and take no connection across it."""
    _forking.acquire()
    for database in list(_databases):
        database._lock.acquire()
        _held.append(database)
        database._disconnect()


def _after_fork() -> None:
    while _held:
        _held.pop()._lock.release()
    _forking.release()


def _after_fork_in_child() -> None:
    global _making  # noqa: PLW0603 - a thread that is not here may have held it
    _making = threading.Lock()
    _after_fork()


if hasattr(os, "register_at_fork"):  # pragma: no branch - there is no fork on Windows
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)


def this_process() -> str:
    """Return this process's name: its id, when it was started, and the world in which its id means something."""
    return f"{os.getpid()}:{_started_at(os.getpid())}:{_namespace()}"


def _started_at(pid: int) -> str:
    """Return when a process was started, where the platform says so: ids of processes are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # One that has ended, and whose parent has not asked how, still has its id.
        return "ended" if fields[0] in {"Z", "X"} else fields[19]
    except (OSError, IndexError):
        return ""


def _namespace() -> str:
    """Return which processes can be seen from here: a container does not see those of another."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def is_alive(owner: str) -> bool:
    """Say whether the process that owns an attempt may still be at work; when in doubt, it may."""
    pid, _, rest = owner.partition(":")
    started, _, namespace = rest.partition(":")
    if os.name != "posix" or not pid.isdecimal() or namespace != _namespace():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, ValueError):
        return True
    return not started or _started_at(int(pid)) in {started, ""}
