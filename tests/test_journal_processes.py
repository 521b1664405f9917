"""Several processes, one journal: forks, deaths, locks, and who pays. M numbers are rows of the fault matrix."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import anyio
import pytest
from anyio import to_thread
from faults.many_processes import run
from helpers import QUICK
from journals import claim, journal_path

from conceptviz import AsyncConceptViz, AttemptState, Journal
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.skipif(os.name != "posix", reason="processes are forked and killed here")

INTENT, SENDING, ACCEPTED = AttemptState.INTENT, AttemptState.SENDING, AttemptState.ACCEPTED
REJECTED, NOT_SENT, UNKNOWN = AttemptState.REJECTED, AttemptState.NOT_SENT, AttemptState.UNKNOWN

PREAMBLE = """
import ctypes, os, signal, sys, threading
from pathlib import Path
from conceptviz import AttemptState, Journal, JournalError, Submission, _database
from journals import claim, pay
path = Path(sys.argv[1])

def tell(what):
    print(what, flush=True)

def wait():
    assert sys.stdin.readline()

def child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            tell(f"child: {error!r}")
            os._exit(1)
        os._exit(0)
    return pid

def ended_well(pid):
    assert os.waitpid(pid, 0)[1] == 0
"""


@pytest.fixture
def path() -> Iterator[Path]:
    with journal_path() as path:
        yield path


@contextmanager
def program(code: str, path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process, which is killed at the end if it has not ended."""
    here = Path(__file__).parent
    # What is killed would leave half a file of coverage behind.
    others = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PREAMBLE + dedent(code), str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**others, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def say(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def finished(code: str, path: Path) -> list[str]:
    """Run another process to its end, which must be a good one; return the lines it printed."""
    with program(code, path) as process:
        output = process.communicate(timeout=30)[0]
        assert process.returncode == 0, output
    return output.splitlines()


def keys_seen_elsewhere(path: Path) -> str:
    return finished("with Journal(path) as j: tell(' '.join(e.key for e in j.entries()))", path)[0]


def test_a_second_journal_on_the_file_costs_the_first_no_lock(path: Path) -> None:
    """Another process that closes the file must not take its log away from under an open journal."""
    with Journal(path) as first:
        Journal(path).close()
        claim(first, "a")
        assert keys_seen_elsewhere(path) == "a"
        with Journal(path):
            claim(first, "b")
        assert keys_seen_elsewhere(path) == "a b"


def test_a_fork_leaves_both_sides_a_journal_of_their_own(path: Path) -> None:
    """Parent and child write in turns, each closes first once, and nothing is lost to anybody."""
    lines = finished(
        """
        used = []
        class Watched(_database.sqlite3.Connection):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.pid = os.getpid()
            def execute(self, *args):
                assert self.pid == os.getpid(), "a connection was used on the other side of a fork"
                return super().execute(*args)
            def close(self):
                assert self.pid == os.getpid(), "a connection was closed on the other side of a fork"
                super().close()
            def __del__(self):
                assert self.pid == os.getpid(), "a connection was dropped on the other side of a fork"
        connect = _database.sqlite3.connect
        _database.sqlite3.connect = lambda *a, **k: connect(*a, factory=Watched, **k)

        journal = Journal(path)
        pay(journal, "before", "t1")
        there, back = os.pipe(), os.pipe()
        def work():
            assert not claim(journal, "before").is_ours
            pay(journal, "child", "t2")
            os.write(back[1], b"x")
            os.read(there[0], 1)
            pay(journal, "child again", "t4")
            journal.close()
        pid = child(work)
        os.read(back[0], 1)
        assert not claim(journal, "child").is_ours
        pay(journal, "parent", "t3")
        journal.close()
        os.write(there[1], b"x")
        ended_well(pid)
        with Journal(path) as again:
            tell(" ".join(entry.task_id for entry in again.entries(AttemptState.ACCEPTED)))
        """,
        path,
    )
    assert lines == ["t1 t2 t3 t4"]


def test_a_child_that_drops_its_parents_journal_does_no_harm(path: Path) -> None:
    lines = finished(
        """
        journal = Journal(path)
        pay(journal, "a", "t1")
        def work():
            global journal
            journal.close()
            del journal
        ended_well(child(work))
        pay(journal, "b", "t2")
        tell(" ".join(entry.task_id for entry in journal.entries()))
        journal.close()
        """,
        path,
    )
    assert lines == ["t1 t2"]


@pytest.mark.skipif(sys.platform != "linux", reason="it calls the C library's own fork")
def test_a_fork_that_python_did_not_see_is_refused_in_the_child(path: Path) -> None:
    lines = finished(
        """
        journal = Journal(path)
        pid = ctypes.CDLL(None).fork()
        if pid == 0:
            try:
                claim(journal)
            except JournalError as error:
                tell("after such a fork only" in str(error))
            os._exit(0)
        ended_well(pid)
        tell(claim(journal).is_ours)
        journal.close()
        """,
        path,
    )
    assert lines == ["True", "True"]


@pytest.mark.parametrize(("state", "becomes"), [(INTENT, NOT_SENT), (SENDING, UNKNOWN), (ACCEPTED, ACCEPTED)])
def test_m77_what_a_killed_process_leaves_is_read_rightly(
    path: Path, state: AttemptState, becomes: AttemptState
) -> None:
    """Killed after INTENT: free. After SENDING: unknown. After ACCEPTED: taken up. Before its death: waited for."""
    code = f"""
        journal = Journal(path)
        attempt = claim(journal).entry.id
        if {state.value!r} != "intent":
            journal.sending(attempt)
        if {state.value!r} == "accepted":
            journal.accepted(attempt, Submission("t1"))
        tell(attempt)
        wait()
        """
    with Journal(path) as journal, program(code, path) as process:
        attempt = heard(process)
        before = claim(journal)
        assert (before.is_ours, before.entry.id, before.entry.state) == (False, attempt, state)
        process.send_signal(signal.SIGKILL)
        # Not waited for: its id is still taken.
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        after = claim(journal)
        assert after.is_ours is (becomes is NOT_SENT)
        assert [entry.state for entry in journal.entries() if entry.id == attempt] == [becomes]


def test_m77_killed_within_a_commit_is_killed_before_or_after_it(path: Path) -> None:
    """Just before and just after each statement of each step: what is found is the state before, or the one after."""
    lines = finished(
        """
        class Deadly(_database.sqlite3.Connection):
            at = None
            def execute(self, sql, *values):
                deadly = Deadly.at is not None and sql.startswith(Deadly.at[0])
                if deadly and Deadly.at[1] == "before":
                    os.kill(os.getpid(), signal.SIGKILL)
                cursor = super().execute(sql, *values)
                if deadly:
                    os.kill(os.getpid(), signal.SIGKILL)
                return cursor
        connect = _database.sqlite3.connect
        _database.sqlite3.connect = lambda *a, **k: connect(*a, factory=Deadly, **k)

        def work():
            journal = Journal(path)
            Deadly.at = at if step == "claim" else None
            attempt = claim(journal, key).entry.id
            Deadly.at = at if step == "sending" else None
            journal.sending(attempt)
            Deadly.at = at
            journal.accepted(attempt, Submission(key.replace(" ", "-")))

        for step in ("claim", "sending", "accepted"):
            for statement in ("BEGIN", "INSERT" if step == "claim" else "UPDATE", "COMMIT"):
                for when in ("before", "after"):
                    at, key = (statement, when), f"{when} {statement} of {step}"
                    assert os.waitpid(child(work), 0)[1] == signal.SIGKILL
                    with Journal(path) as journal:
                        found = [entry.state.value for entry in journal.entries(key=key)]
                    tell(f"{key}: {' '.join(found)}")
        """,
        path,
    )
    found = {key: state.strip() for key, _, state in (line.partition(":") for line in lines)}
    before = {"claim": "", "sending": "not_sent", "accepted": "unknown"}
    after = {"claim": "not_sent", "sending": "unknown", "accepted": "accepted"}
    assert len(found) == 18
    for key, state in found.items():
        step = key.rpartition(" ")[2]
        assert state == (after if key.startswith("after COMMIT") else before)[step], key


def test_m80_a_lock_of_another_process_is_waited_for(path: Path) -> None:
    code = """
        with Journal(path) as journal, journal._database.transaction():
            tell("locked")
            threading.Event().wait(0.1)
            tell("free")
        """
    with Journal(path) as journal, program(code, path) as process:
        assert heard(process) == "locked"
        assert claim(journal).is_ours
        assert heard(process) == "free"


@pytest.mark.anyio
async def test_a_key_under_way_in_another_process_is_waited_for_and_taken_up(path: Path) -> None:
    """Nothing is sent, and the task is the other's."""
    simulator = Simulator(render=render_tiny, speed=1e6)
    async with AsyncConceptViz(
        simulator.api_key, transport=simulator.transport(), journal=path, retries=QUICK
    ) as client:
        paid = await client.submit("a", key="k")
        journal = Journal(path)
        [entry] = journal.entries()
        journal.close()
        # The same attempt, as it was when the other process had sent it.
        code = f"""
            db = _database.sqlite3.connect(path, isolation_level=None)
            db.execute("UPDATE attempts SET state = 'sending', task_id = NULL, receipt = NULL, owner = ?",
                       (_database.this_process(),))
            db.close()
            tell("sending")
            wait()
            with Journal(path) as journal:
                journal.accepted({entry.id!r}, Submission({paid.id!r}))
            tell("accepted")
            wait()
            """
        with program(code, path) as process:
            assert await to_thread.run_sync(heard, process) == "sending"
            ids: list[str] = []

            async def submit() -> None:
                ids.append((await client.submit("a", key="k")).id)

            async with anyio.create_task_group() as tasks:
                tasks.start_soon(submit)
                await anyio.sleep(0.1)
                assert ids == []
                say(process)
            assert ids == [paid.id]
            say(process)
    assert simulator.ledger.submissions == simulator.requests["submit"] == 1


def test_processes_that_open_a_new_journal_together(path: Path) -> None:
    """Eight at a time, forked to the same moment: all of them get it."""
    finished(
        """
        import time
        for number in range(3):
            at = time.monotonic() + 0.02
            def work():
                while time.monotonic() < at:
                    pass
                with Journal(path.with_name(f"journal-{number}")) as journal:
                    claim(journal, str(os.getpid()))
            for pid in [child(work) for _ in range(8)]:
                ended_well(pid)
            with Journal(path.with_name(f"journal-{number}")) as journal:
                assert len(journal.entries()) == 8
        """,
        path,
    )


def test_m81_many_processes_pay_for_each_key_once(path: Path) -> None:
    """`python -m tests.faults.many_processes --items 1000` is the long version."""
    found = run(processes=8, items=10, keys=12, folder=path.parent)
    assert found["broken"] == []
    assert (found["items"], found["charges"]) == (80, found["keys"])
    assert found["unknown"] > 0
