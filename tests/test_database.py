"""The journal's file: what it takes to be one, and what becomes of it when it is damaged, moved, locked or shared.

M and T numbers are rows of the fault matrix.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import QUICK
from journals import claim, journal_path, pay, raw

from conceptviz import AsyncConceptViz, Journal, JournalError, _database
from conceptviz._database import is_alive, this_process
from conceptviz.simulator import Simulator, render_tiny

PAGE = 4096


@pytest.fixture
def path() -> Iterator[Path]:
    with journal_path() as path:
        yield path


def opens_as(path: Path, says: str) -> None:
    with pytest.raises(JournalError, match=says):
        Journal(path)


def pragma(path: Path, name: str) -> Any:
    return raw(path, f"PRAGMA {name}")[0][0]


def test_a_new_journal_is_its_owners_alone(path: Path) -> None:
    """T14: so are the files that SQLite puts beside it, whatever the umask would allow."""
    before = os.umask(0)
    try:
        with Journal(path) as journal:
            claim(journal)
            files = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
    finally:
        os.umask(before)
    assert files == {"journal": 0o600, "journal-wal": 0o600, "journal-shm": 0o600}


def test_each_commit_is_synced(path: Path) -> None:
    with Journal(path) as journal, journal._database.transaction() as db:
        assert db.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
        assert db.execute("PRAGMA synchronous").fetchone()[0] >= 2
        assert db.execute("PRAGMA fullfsync").fetchone()[0] == 1


def test_a_closed_journal_says_so(path: Path) -> None:
    journal = Journal(path)
    journal.close()
    journal.close()
    with pytest.raises(JournalError, match="is closed"):
        journal.entries()


def test_m82_a_journal_that_is_deleted_while_open_takes_nothing_more(path: Path) -> None:
    """Others would make a new one in its place, in which every key is unpaid."""
    with Journal(path) as journal:
        attempt = claim(journal).entry.id
        path.unlink()
        for use in (journal.entries, lambda: claim(journal, "b"), lambda: journal.sending(attempt)):
            with pytest.raises(JournalError, match="deleted or replaced while it was open"):
                use()
        opens_as(path, "is empty, though its log is not")
        for left in path.parent.iterdir():
            left.unlink()
        with Journal(path) as new:
            assert new.entries() == []
            with pytest.raises(JournalError, match="deleted or replaced"):
                journal.sending(attempt)


def test_m82_a_journal_that_is_deleted_is_not_made_anew_after_a_fork(path: Path) -> None:
    with Journal(path) as journal:
        journal._database._disconnect()
        path.unlink()
        with pytest.raises(JournalError):
            journal.entries()
        assert not path.exists()


@pytest.mark.parametrize("is_dangling", [False, True])
def test_m82_a_symbolic_link_is_refused(path: Path, is_dangling: bool) -> None:
    target = path.with_name("target")
    if not is_dangling:
        Journal(target).close()
    path.symlink_to(target)
    opens_as(path, "is not a regular file")
    assert target.exists() is not is_dangling


def test_m82_what_is_no_file_is_refused(path: Path) -> None:
    path.mkdir()
    opens_as(path, "is not a regular file")
    fifo = path / "fifo"
    os.mkfifo(fifo, 0o600)
    opens_as(fifo, "is not a regular file")
    opens_as(path / "missing" / "journal", "No such file")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o601])
def test_m82_a_file_that_others_can_use_is_refused(path: Path, mode: int) -> None:
    Journal(path).close()
    path.chmod(mode)
    opens_as(path, "by others.*chmod 600")


@contextmanager
def somebody() -> Iterator[None]:
    """Be a user whom the permissions of files bind."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_m82_a_read_only_file_or_folder_takes_nothing(path: Path) -> None:
    Journal(path).close()
    path.chmod(0o400)
    if os.geteuid() == 0:
        os.chown(path.parent, 65534, -1)
        os.chown(path, 65534, -1)
    with somebody():
        with Journal(path) as journal, pytest.raises(JournalError, match="readonly"):
            claim(journal)
        path.parent.chmod(0o500)
        opens_as(path.with_name("new"), "Permission denied")
        path.parent.chmod(0o700)


def test_m78_what_is_not_a_database_is_refused_and_left_as_it_is(path: Path) -> None:
    for content in (b"not one", b"not a database" * 1000, b"SQLite format 3\0" + bytes(PAGE)):
        path.write_bytes(content)
        path.chmod(0o600)
        opens_as(path, "could not be used")
        assert path.read_bytes() == content


def test_m78_somebody_elses_database_is_refused_and_left_as_it_is(path: Path) -> None:
    raw(path, "CREATE TABLE notes (text)")
    path.chmod(0o600)
    content = path.read_bytes()
    opens_as(path, "not a journal of this package")
    assert path.read_bytes() == content
    raw(path, "PRAGMA application_id = 7")
    opens_as(path, "not a journal of this package")
    assert pragma(path, "journal_mode") == "delete"


@pytest.mark.parametrize("version", [0, 2, 99])
def test_m78_a_journal_of_another_version_is_refused(path: Path, version: int) -> None:
    Journal(path).close()
    raw(path, f"PRAGMA user_version = {version}")
    opens_as(path, f"is of version {version}, and this package reads version 1")


def test_an_empty_file_of_ones_own_becomes_a_journal(path: Path) -> None:
    """What a process leaves that dies as it makes its journal."""
    path.touch(0o600)
    with Journal(path) as journal:
        assert claim(journal).is_ours


def keys_of(path: Path, keys: list[str]) -> str:
    """Say what a damaged journal makes of paid keys: "refused", "kept", or the key that it would pay for again."""
    try:
        with Journal(path) as journal:
            for key in keys:
                if claim(journal, key).is_ours:
                    return key
    except JournalError:
        return "refused"
    return "kept"


def test_m78_a_damaged_journal_pays_for_nothing_again(path: Path) -> None:
    """Cut at each page, and each page made zeroes, ones and noise: refused, or every paid key is still known."""
    keys = [f"key-{n}" for n in range(40)]
    with Journal(path) as journal:
        for n, key in enumerate(keys):
            pay(journal, key, f"task-{n}")
    content = path.read_bytes()
    noise = Random(7).randbytes(PAGE)
    pages = len(content) // PAGE
    assert pages > 8
    found = {}
    copy = path.with_name("copy")
    for page in range(pages):
        at = page * PAGE
        damages = [content[:at] + filling + content[at + PAGE :] for filling in (bytes(PAGE), b"\xff" * PAGE, noise)]
        if page:
            damages += [content[:at], content[: at + 100]]
        for number, damaged in enumerate(damages):
            for old in path.parent.glob("copy*"):
                old.unlink()
            copy.write_bytes(damaged)
            copy.chmod(0o600)
            found[page, number] = keys_of(copy, keys)
    assert set(found.values()) <= {"refused", "kept"}, found
    refused = [page for (page, _), outcome in found.items() if outcome == "refused"]
    assert set(refused) == set(range(pages)), "each page matters to somebody"


def copied(path: Path, *, cut: int = 0) -> Path:
    """Copy a journal that is open, as a killed process leaves it; by another program, which has no locks to lose."""
    copy = path.with_name("copy")
    for suffix in ("", "-wal"):
        subprocess.run(["cp", "-p", f"{path}{suffix}", f"{copy}{suffix}"], check=True)
    if cut:
        os.truncate(f"{copy}-wal", cut)
    copy.with_name("copy-shm").unlink(missing_ok=True)
    return copy


def test_m78_a_log_left_behind_is_read(path: Path) -> None:
    with Journal(path) as journal:
        pay(journal, "a", "task-a")
        copy = copied(path)
        with Journal(copy) as again:
            assert [entry.task_id for entry in again.entries()] == ["task-a"]


def test_m78_a_log_that_is_cut_is_read_to_its_last_whole_commit(path: Path) -> None:
    with Journal(path) as journal:
        pay(journal, "a", "task-a")
        pay(journal, "b", "task-b")
        size = Path(f"{path}-wal").stat().st_size
        seen = []
        for cut in range(size, 0, -2500):
            with Journal(copied(path, cut=cut)) as again:
                seen.append([entry.state.value for entry in again.entries()])
    assert seen[0] == ["accepted", "accepted"]
    history = [[], ["intent"], ["sending"], ["accepted"], *(["accepted", s] for s in ("intent", "sending", "accepted"))]
    assert all(states in history for states in seen)
    assert [history.index(states) for states in seen] == sorted((history.index(s) for s in seen), reverse=True)


def test_m78_a_journal_that_was_emptied_beside_its_log_is_refused(path: Path) -> None:
    """SQLite would throw the log away, and every paid key with it."""
    with Journal(path) as journal:
        pay(journal, "a", "task-a")
        copy = copied(path)
    os.truncate(copy, 0)
    opens_as(copy, "is empty, though its log is not")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        db.execute("BEGIN EXCLUSIVE")
        yield
    finally:
        db.close()


def test_m80_a_lock_of_a_moment_is_waited_for(path: Path) -> None:
    with Journal(path) as journal:
        with locked(path):
            thread = threading.Thread(target=claim, args=(journal,))
            thread.start()
            time.sleep(0.1)
            assert thread.is_alive()
        thread.join()
        assert len(journal.entries()) == 1


@pytest.mark.anyio
async def test_m80_a_lock_for_good_is_an_error_before_anything_is_sent(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_database, "_BUSY_SECONDS", 0.02)
    simulator = Simulator(render=render_tiny)
    client = AsyncConceptViz(simulator.api_key, transport=simulator.transport(), journal=path, retries=QUICK)
    async with client:
        with locked(path), pytest.raises(JournalError, match="locked"):
            await client.submit("a", key="k")
        assert simulator.requests["submit"] == 0
        await client.submit("a", key="k")


class Contended(sqlite3.Connection):
    """A connection that finds the file locked, so many times, when it is to be given a log."""

    failures = 0
    says = "database is locked"

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if sql == "PRAGMA journal_mode = WAL" and Contended.failures:
            Contended.failures -= 1
            raise sqlite3.OperationalError(Contended.says)
        return super().execute(sql, *values)


@pytest.fixture
def contended(monkeypatch: pytest.MonkeyPatch) -> type[Contended]:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Contended, **k))
    monkeypatch.setattr(Contended, "failures", 3)
    monkeypatch.setattr(Contended, "says", "database is locked")
    return Contended


def test_processes_that_make_a_journal_together_wait_for_each_other(path: Path, contended: type[Contended]) -> None:
    Journal(path).close()
    assert contended.failures == 0


def test_a_journal_that_cannot_be_made_is_not_waited_for(
    path: Path, contended: type[Contended], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contended, "says", "disk I/O error")
    opens_as(path, "disk I/O error")
    assert contended.failures == 2
    monkeypatch.setattr(contended, "says", "database is locked")
    monkeypatch.setattr(_database, "_BUSY_SECONDS", -1.0)
    opens_as(path, "locked")
    assert contended.failures == 1


@pytest.mark.parametrize(("column", "value"), [("key", "\ud800"), ("expected_credits", 2**70)])
def test_what_a_file_cannot_hold_is_an_error_and_leaves_nothing_behind(path: Path, column: str, value: Any) -> None:
    with Journal(path) as journal:
        with pytest.raises(JournalError, match="could not be used"):
            claim(journal, **{column: value})
        assert journal.entries() == []


def test_an_interruption_leaves_no_lock_behind(path: Path) -> None:
    with Journal(path) as journal, Journal(path) as other:
        with pytest.raises(KeyboardInterrupt), journal._database.transaction():
            raise KeyboardInterrupt
        assert claim(other).is_ours


@pytest.mark.parametrize("journals", [1, 2])
def test_threads_together_claim_each_key_once(path: Path, journals: int) -> None:
    """With one journal, and with several in one process on one file."""
    opened = [Journal(path) for _ in range(journals)]
    start = threading.Barrier(6)
    ours: list[str] = []
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            start.wait()
            for n in range(12):
                made = claim(opened[number % journals], f"key-{(n + number) % 12}")
                if made.is_ours:
                    ours.append(str(made.entry.key))
        except BaseException as error:  # noqa: BLE001 - the test shows it
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for journal in opened:
        journal.close()
    assert errors == []
    assert sorted(ours) == sorted(f"key-{n}" for n in range(12))


def test_a_file_is_never_opened_but_by_sqlite(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To close another descriptor of it would drop the locks of every journal on it in this process."""
    Journal(path).close()
    monkeypatch.setattr(os, "close", lambda _: pytest.fail("a descriptor was closed"))
    Journal(path).close()


def test_nobody_opens_a_new_file_before_its_maker_has_closed_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = threading.Event()
    close = os.close

    def slow_close(descriptor: int) -> None:
        made.set()
        time.sleep(0.05)
        close(descriptor)
        order.append("made")

    def second() -> None:
        made.wait()
        Journal(path).close()
        order.append("opened")

    order: list[str] = []
    monkeypatch.setattr(os, "close", slow_close)
    thread = threading.Thread(target=second)
    thread.start()
    Journal(path).close()
    thread.join()
    assert order == ["made", "opened"]


def test_no_connection_and_no_transaction_crosses_a_fork(path: Path) -> None:
    with Journal(path) as journal:
        claim(journal)
        database = journal._database
        inside, go = threading.Event(), threading.Event()

        def work() -> None:
            with database.transaction():
                inside.set()
                go.wait(5)

        thread = threading.Thread(target=work)
        thread.start()
        inside.wait()

        def fork() -> None:
            _database._before_fork()
            _database._after_fork()

        forking = threading.Thread(target=fork)
        forking.start()
        forking.join(0.05)
        assert forking.is_alive(), "a fork does not wait for a transaction"
        go.set()
        forking.join()
        thread.join()
        assert database._connection is None

        _database._before_fork()
        waiting = threading.Thread(target=journal.entries)
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive(), "a transaction does not wait for a fork"
        assert _database._making.acquire(blocking=False)
        _database._after_fork_in_child()
        assert not _database._making.locked()
        waiting.join()
        assert len(journal.entries()) == 1


def test_a_fork_that_python_did_not_see_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is the parent's, and may not even be closed."""
    journal = Journal(path)
    connection = journal._database._connection
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for use in (journal.entries, lambda: Journal(path)):
        with pytest.raises(JournalError, match="was forked"):
            use()
    journal.close()
    opens_as(path, "was forked")
    assert _database._left_behind.pop() is connection
    assert connection is not None
    connection.execute("SELECT 1")
    connection.close()


def test_which_processes_are_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    me, _, rest = this_process().partition(":")
    started, _, namespace = rest.partition(":")
    other = f"{process.pid}:{_database._started_at(process.pid)}:{namespace}"
    assert is_alive(this_process())
    assert is_alive(other)
    process.kill()
    if hasattr(os, "waitid"):
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if Path("/proc/self/stat").exists():
        assert not is_alive(other), "a process that nobody has waited for is dead all the same"
        assert not is_alive(f"{me}:{int(started) + 1}:{namespace}"), "another process had this id"
    process.communicate()
    assert not is_alive(other)
    assert is_alive(f"{process.pid}:1:another container"), "nobody knows: it cannot be seen from here"
    monkeypatch.setattr(os, "kill", lambda *_: (_ for _ in ()).throw(PermissionError))
    assert is_alive(other)


def test_where_there_is_no_proc_an_id_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_database, "Path", lambda _: Path("/nowhere"))
    assert this_process() == f"{os.getpid()}::"
    assert is_alive(this_process())
    assert is_alive(f"{os.getpid()}:123:")


def test_where_there_is_no_posix_everybody_may_be_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_database, "os", SimpleNamespace(name="nt"))
    assert is_alive("999999999:1:")


def test_a_copy_of_a_journal_is_a_journal(path: Path) -> None:
    with Journal(path) as journal:
        pay(journal, "a", "task-a")
    copy = path.with_name("copy")
    shutil.copy(path, copy)
    with Journal(copy) as again:
        assert [entry.task_id for entry in again.entries()] == ["task-a"]
