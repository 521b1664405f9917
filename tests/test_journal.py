"""The journal: what each attempt may become, and what that means to whoever submits the same key.

How the file itself fails is in `test_database`, other processes are in `test_journal_processes`. M and T numbers are
rows of the fault matrix.
"""

import hashlib
import logging
import resource
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from faults.server import Server
from faults.steps import Script
from helpers import KEY, QUICK, TASK
from journals import DEAD, RECEIPT, claim, journal_path, raw

from conceptviz import (
    AsyncConceptViz,
    AttemptState,
    Budget,
    BudgetExceededError,
    Credits,
    InvalidRequestError,
    Journal,
    JournalEntry,
    JournalError,
    Submission,
    TaskState,
)
from conceptviz import _attempts as attempts_module
from conceptviz import _journal as journal_module
from conceptviz._database import this_process
from conceptviz._journal import resolve_journal
from conceptviz.simulator import Simulator, render_tiny

INTENT, SENDING, ACCEPTED = AttemptState.INTENT, AttemptState.SENDING, AttemptState.ACCEPTED
REJECTED, NOT_SENT, UNKNOWN = AttemptState.REJECTED, AttemptState.NOT_SENT, AttemptState.UNKNOWN
COMPLETED, FAILED, ABANDONED = AttemptState.COMPLETED, AttemptState.FAILED, AttemptState.ABANDONED

OTHER_TASK = "another_task-1"


@pytest.fixture
def path() -> Iterator[Path]:
    with journal_path() as path:
        yield path


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    with Journal(path) as opened:
        yield opened


class Clock:
    """The wall clock of the journal, to be set."""

    def __init__(self) -> None:
        self.now = time.time()

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(journal_module, "time", clock)
    return clock


def ended(task_id: str = TASK, status: str = "completed", **more: Any) -> TaskState:
    return TaskState(task_id, status, raw={"status": status}, **more)


def finish(journal: Journal, status: str, refunded: bool | None = None) -> None:
    journal.finished(ended(status=status, credits_refunded=refunded))


# The ways to each state, for a fresh claim.
def to_state(journal: Journal, state: AttemptState, key: str | None = "a") -> str:
    attempt = claim(journal, key).entry.id
    if state is not INTENT:
        journal.sending(attempt)
    if state in {REJECTED, NOT_SENT, UNKNOWN, ABANDONED}:
        journal.ended(attempt, UNKNOWN if state is ABANDONED else state, "why")
    if state is ABANDONED:
        journal.resolve(attempt)
    if state in {ACCEPTED, COMPLETED, FAILED}:
        journal.accepted(attempt, RECEIPT)
    if state in {COMPLETED, FAILED}:
        finish(journal, state.value)
    return attempt


def state_of(journal: Journal, attempt: str) -> AttemptState:
    [state] = [entry.state for entry in journal.entries() if entry.id == attempt]
    return state


def test_a_claim_is_written_down_with_all_that_was_asked_for(journal: Journal, path: Path, clock: Clock) -> None:
    made = claim(journal)
    assert made.is_ours
    assert made.entry == JournalEntry(
        id=made.entry.id,
        state=INTENT,
        key="a",
        account="acc",
        base_url="https://conceptviz.app/api/v1",
        endpoint="/generate",
        prompts=("the water cycle \u6c34\U0001f4a7",),
        settings={"model": "cv-2"},
        expected_credits=2,
        created_at=clock.now,
        updated_at=clock.now,
        fingerprint="f",
        stale_at=clock.now + 60,
        owner=this_process(),
    )
    with Journal(path) as again:
        assert again.entries() == [made.entry]


def test_a_journal_names_its_file_wherever_the_program_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is where it was at the beginning, and ":memory:" is a file like any other."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Journal(":memory:") as journal:
        monkeypatch.chdir("elsewhere")
        claim(journal)
        assert repr(journal) == f"<Journal {tmp_path / ':memory:'}>"
    assert journal.path == tmp_path / ":memory:"
    with Journal(tmp_path / ":memory:") as again:
        assert len(again.entries()) == 1


def test_what_a_client_is_given_as_a_journal(path: Path) -> None:
    with Journal(path) as journal:
        assert resolve_journal(journal) is journal
    opened = resolve_journal(str(path))
    assert opened is not None
    opened.close()


def test_work_without_a_key_is_always_its_own(journal: Journal) -> None:
    assert claim(journal, None).is_ours
    assert claim(journal, None).is_ours
    assert len(journal.entries()) == 2


@pytest.mark.parametrize("state", list(AttemptState))
def test_which_states_free_the_key(journal: Journal, state: AttemptState) -> None:
    """Only what certainly cost nothing may be paid for again; all else is given back as it stands."""
    attempt = to_state(journal, state)
    assert state_of(journal, attempt) is state
    again = claim(journal)
    assert again.is_ours is (state in {REJECTED, NOT_SENT, ABANDONED})
    assert (again.entry.id == attempt) is not again.is_ours
    assert again.entry.state is (INTENT if again.is_ours else state)


@pytest.mark.parametrize(("refunded", "is_free"), [(True, True), (False, False), (None, False)])
def test_a_failed_task_frees_its_key_only_if_it_was_refunded(
    journal: Journal, refunded: bool | None, is_free: bool
) -> None:
    attempt = to_state(journal, ACCEPTED)
    finish(journal, "failed", refunded)
    assert journal.entries(FAILED)[0].is_refunded is refunded
    again = claim(journal)
    assert again.is_ours is is_free
    assert is_free or (again.entry.id, again.entry.task_id) == (attempt, TASK)


def test_a_submit_that_failed_at_once_frees_its_key(journal: Journal) -> None:
    """HTTP 500 GENERATION_FAILED has no task to be taken up, and is documented as refunded."""
    attempt = to_state(journal, SENDING)
    journal.ended(attempt, FAILED, "x")
    assert claim(journal).is_ours


def test_what_counts_is_found_behind_what_does_not(journal: Journal, clock: Clock) -> None:
    """The clock went back between two attempts of one key: the paid one is still seen."""
    to_state(journal, REJECTED)
    clock.now -= 3600
    paid = to_state(journal, ACCEPTED)
    again = claim(journal)
    assert (again.is_ours, again.entry.id) == (False, paid)
    assert [entry.state for entry in journal.entries()] == [REJECTED, ACCEPTED]


def test_the_steps_of_an_attempt(journal: Journal) -> None:
    """INTENT, SENDING, INTENT again after a refusal, SENDING, ACCEPTED: and nothing out of turn."""
    attempt = claim(journal).entry.id
    journal.send_again(attempt)
    journal.sending(attempt)
    with pytest.raises(JournalError, match="It did not become sending"):
        journal.sending(attempt)
    journal.send_again(attempt)
    assert state_of(journal, attempt) is INTENT
    journal.sending(attempt)
    journal.accepted(attempt, RECEIPT)
    [entry] = journal.entries()
    assert (entry.state, entry.task_id, entry.credits_used, entry.credits_remaining) == (ACCEPTED, TASK, 2, 79)
    assert entry.receipt == {"taskId": TASK}
    for late in (journal.sending, journal.send_again, lambda a: journal.ended(a, REJECTED)):
        with pytest.raises(JournalError):
            late(attempt)
    assert state_of(journal, attempt) is ACCEPTED


@pytest.mark.parametrize("state", [REJECTED, NOT_SENT, UNKNOWN, FAILED])
def test_an_attempt_that_came_to_nothing_says_why(journal: Journal, state: AttemptState) -> None:
    attempt = to_state(journal, SENDING)
    journal.ended(attempt, state, "no connection")
    [entry] = journal.entries(state)
    assert (entry.id, entry.error) == (attempt, "no connection")


@pytest.mark.parametrize("status", ["completed", "failed"])
def test_the_first_end_of_a_task_counts(journal: Journal, status: str) -> None:
    to_state(journal, ACCEPTED)
    journal.finished(ended(OTHER_TASK))
    assert [entry.state for entry in journal.entries()] == [ACCEPTED]
    journal.finished(ended(status=status, error="e", credits_refunded=None))
    journal.finished(ended(status="failed", credits_refunded=True))
    [entry] = journal.entries()
    assert (entry.state.value, entry.answer, entry.error) == (status, {"status": status}, "e")
    assert entry.is_refunded is None


@pytest.mark.parametrize("state", list(AttemptState))
def test_an_id_is_taken_in_from_any_state(journal: Journal, state: AttemptState) -> None:
    """Invariant B: who comes back with an id knows more than whoever took over, or settled it by hand."""
    attempt = to_state(journal, state)
    journal.accepted(attempt, Submission(OTHER_TASK, raw={"taskId": OTHER_TASK}))
    [entry] = journal.entries()
    assert (entry.state, entry.task_id, entry.receipt) == (ACCEPTED, OTHER_TASK, {"taskId": OTHER_TASK})
    assert (entry.answer, entry.error, entry.is_refunded) == (None, None, None)
    assert not claim(journal).is_ours


def test_an_attempt_that_is_gone_says_so(journal: Journal) -> None:
    attempt = to_state(journal, REJECTED)
    journal.prune(older_than=0)
    with pytest.raises(JournalError, match="no longer as this process left it"):
        journal.accepted(attempt, RECEIPT)


def test_a_dead_process_that_was_about_to_send(journal: Journal, path: Path) -> None:
    """INTENT of a dead process was never sent: its key is free, and its ghost can send nothing."""
    attempt = to_state(journal, INTENT)
    raw(path, "UPDATE attempts SET owner = ?", DEAD)
    again = claim(journal)
    assert again.is_ours
    assert state_of(journal, attempt) is NOT_SENT
    for late in (journal.sending, journal.send_again):
        with pytest.raises(JournalError, match="taken for dead"):
            late(attempt)
    assert state_of(journal, attempt) is NOT_SENT


def test_a_dead_process_that_was_sending(journal: Journal, path: Path) -> None:
    """SENDING of a dead process may have been charged: only a person, or its own answer, says more."""
    attempt = to_state(journal, SENDING)
    raw(path, "UPDATE attempts SET owner = ?", DEAD)
    again = claim(journal)
    assert not again.is_ours
    assert (again.entry.id, again.entry.state) == (attempt, UNKNOWN)
    assert "process ended" in str(again.entry.error)
    journal.ended(attempt, REJECTED, "it was refused after all")
    assert claim(journal).is_ours


def test_a_listing_reads_what_dead_processes_left_of_every_key(journal: Journal, path: Path) -> None:
    for key in ("a", "b", None):
        to_state(journal, SENDING, key)
        to_state(journal, INTENT, f"{key}2")
    raw(path, "UPDATE attempts SET owner = ?", DEAD)
    assert [entry.state for entry in journal.entries()] == [UNKNOWN, NOT_SENT] * 3


def test_a_claim_leaves_other_keys_to_their_own(journal: Journal, path: Path) -> None:
    to_state(journal, SENDING, "b")
    raw(path, "UPDATE attempts SET owner = ?", DEAD)
    claim(journal, "a")
    assert raw(path, "SELECT state FROM attempts WHERE key = 'b'") == [("sending",)]


@pytest.mark.parametrize(("state", "becomes"), [(INTENT, NOT_SENT), (SENDING, UNKNOWN)])
def test_a_living_process_is_waited_for_until_its_time_is_up(
    journal: Journal, clock: Clock, state: AttemptState, becomes: AttemptState
) -> None:
    attempt = to_state(journal, state)
    clock.now += 60
    assert claim(journal).entry.state is state
    clock.now += 1
    assert claim(journal).is_ours is (becomes is NOT_SENT)
    assert state_of(journal, attempt) is becomes


def test_each_step_begins_the_time_anew(journal: Journal, clock: Clock) -> None:
    """An attempt that is made again and again is alive, however long all of them take together."""
    attempt = to_state(journal, SENDING)
    for step in (journal.send_again, journal.sending, journal.send_again, journal.sending):
        clock.now += 50
        step(attempt)
        assert not claim(journal).is_ours
    [entry] = journal.entries()
    assert entry.state is SENDING
    assert entry.stale_at == pytest.approx(clock.now + 60)


def test_a_clock_that_goes_back_frees_nothing(journal: Journal, clock: Clock) -> None:
    to_state(journal, SENDING)
    clock.now -= 10**6
    assert not claim(journal).is_ours
    assert journal.prune(older_than=0) == 0


def test_an_accepted_task_stops_an_attempt_that_was_made_in_its_place(journal: Journal) -> None:
    """Invariant A: given up as not charged, made again, and then the first one's answer arrives."""
    first = to_state(journal, ABANDONED)
    second = claim(journal)
    assert second.is_ours
    journal.accepted(first, RECEIPT)
    with pytest.raises(JournalError, match=f"Task {TASK} of the same key"):
        journal.sending(second.entry.id)
    assert state_of(journal, second.entry.id) is INTENT
    again = claim(journal)
    assert (again.is_ours, again.entry.id) == (False, first)


@pytest.mark.parametrize("key", ["b", None])
def test_an_accepted_task_stops_nobody_else(journal: Journal, key: str | None) -> None:
    to_state(journal, ACCEPTED, "a" if key else None)
    to_state(journal, SENDING, key)


def test_a_reservation_that_fails_leaves_nothing_behind(journal: Journal) -> None:
    def refuse() -> None:
        raise BudgetExceededError("too much")

    with pytest.raises(BudgetExceededError, match="too much"):
        claim(journal, reserve=refuse)
    assert journal.entries() == []
    to_state(journal, ACCEPTED)
    assert not claim(journal, reserve=refuse).is_ours


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"fingerprint": "g"}, "other work"),
        ({"account": "acc2"}, "another API key"),
        ({"base_url": "http://127.0.0.1:1"}, "work at https://conceptviz.app/api/v1"),
    ],
    ids=["request", "account", "base-url"],
)
@pytest.mark.parametrize("state", [INTENT, UNKNOWN, ACCEPTED, COMPLETED])
def test_m83_one_key_is_one_piece_of_work(
    journal: Journal, state: AttemptState, other: dict[str, str], says: str
) -> None:
    to_state(journal, state)
    with pytest.raises(InvalidRequestError, match=f"{says}.*Nothing was sent"):
        claim(journal, **other)
    assert len(journal.entries()) == 1


def test_m83_a_free_key_may_name_other_work(journal: Journal) -> None:
    to_state(journal, REJECTED)
    assert claim(journal, fingerprint="g", account="acc2", base_url="https://x/api/v1").is_ours


def test_entries_are_chosen_by_state_and_by_key(journal: Journal) -> None:
    ids = {state: to_state(journal, state, state.value) for state in AttemptState}
    assert [entry.id for entry in journal.entries()] == list(ids.values())
    assert [entry.id for entry in journal.entries(UNKNOWN, INTENT)] == [ids[INTENT], ids[UNKNOWN]]
    assert [entry.id for entry in journal.entries(key="failed")] == [ids[FAILED]]
    assert journal.entries(UNKNOWN, key="failed") == []


def test_an_unknown_attempt_is_given_up(journal: Journal) -> None:
    attempt = to_state(journal, UNKNOWN)
    entry = journal.resolve(attempt)
    assert (entry.id, entry.state, entry.task_id, entry.error) == (attempt, ABANDONED, None, "why")
    assert claim(journal).is_ours


def test_an_unknown_attempt_turns_out_to_be_a_task(journal: Journal) -> None:
    attempt = to_state(journal, UNKNOWN)
    entry = journal.resolve(attempt, task_id=TASK)
    assert (entry.id, entry.state, entry.task_id) == (attempt, ACCEPTED, TASK)
    again = claim(journal)
    assert (again.is_ours, again.entry) == (False, entry)


@pytest.mark.parametrize("state", [state for state in AttemptState if state is not UNKNOWN])
@pytest.mark.parametrize("task_id", [None, OTHER_TASK])
def test_only_an_unknown_attempt_is_settled_by_hand(journal: Journal, state: AttemptState, task_id: str | None) -> None:
    attempt = to_state(journal, state)
    with pytest.raises(InvalidRequestError, match=f"is {state.value}"):
        journal.resolve(attempt, task_id=task_id)
    assert state_of(journal, attempt) is state


def test_what_is_paid_for_is_given_up_only_on_request(journal: Journal) -> None:
    """Its task's id and its cost are kept, and the key is free; an end that comes in late does not bring it back."""
    attempt = to_state(journal, ACCEPTED)
    with pytest.raises(InvalidRequestError, match=f"task {TASK} is paid for.*abandon=True gives it up"):
        journal.resolve(attempt)
    before = journal.entries()[0]
    entry = journal.resolve(attempt, abandon=True)
    assert (entry.state, entry.task_id, entry.credits_used) == (ABANDONED, TASK, before.credits_used)
    journal.finished(TaskState(TASK, "completed"))
    assert state_of(journal, attempt) is ABANDONED
    assert claim(journal).is_ours


def test_an_unknown_attempt_is_given_up_on_request_too(journal: Journal) -> None:
    attempt = to_state(journal, UNKNOWN)
    assert journal.resolve(attempt, abandon=True).state is ABANDONED


@pytest.mark.parametrize("state", [state for state in AttemptState if state not in {UNKNOWN, ACCEPTED}])
def test_nothing_else_is_given_up(journal: Journal, state: AttemptState) -> None:
    attempt = to_state(journal, state)
    with pytest.raises(InvalidRequestError, match=f"is {state.value}"):
        journal.resolve(attempt, abandon=True)
    assert state_of(journal, attempt) is state


@pytest.mark.parametrize("state", [UNKNOWN, ACCEPTED])
def test_an_attempt_is_not_taken_up_and_given_up_at_once(journal: Journal, state: AttemptState) -> None:
    attempt = to_state(journal, state)
    with pytest.raises(InvalidRequestError, match="not both"):
        journal.resolve(attempt, task_id=OTHER_TASK, abandon=True)
    assert state_of(journal, attempt) is state


def test_an_attempt_of_a_dead_process_can_be_settled_at_once(journal: Journal, path: Path) -> None:
    attempt = to_state(journal, SENDING)
    raw(path, "UPDATE attempts SET owner = ?", DEAD)
    assert journal.resolve(attempt).state is ABANDONED


def test_an_attempt_that_is_not_there_is_not_settled(journal: Journal) -> None:
    with pytest.raises(InvalidRequestError, match="no attempt 'nobody'"):
        journal.resolve("nobody")


@pytest.mark.parametrize("task_id", ["", "../account", "a b", "x?y", "x" * 129, ".", "x\n"])
def test_t14_what_cannot_be_a_task_id_is_not_taken_up(journal: Journal, task_id: str) -> None:
    attempt = to_state(journal, UNKNOWN)
    with pytest.raises(InvalidRequestError, match="is not a task id"):
        journal.resolve(attempt, task_id=task_id)
    assert state_of(journal, attempt) is UNKNOWN


def test_a_task_of_one_attempt_is_not_taken_up_for_another(journal: Journal) -> None:
    """That would lose the other's own task for good."""
    first = to_state(journal, ACCEPTED, "first")
    attempt = to_state(journal, UNKNOWN)
    with pytest.raises(InvalidRequestError, match=f"attempt {first} already"):
        journal.resolve(attempt, task_id=TASK)
    assert state_of(journal, attempt) is UNKNOWN


def test_what_has_ended_is_forgotten_when_it_is_old(journal: Journal, clock: Clock) -> None:
    """What may still cost money, or has paid work to be fetched, is kept however old it is."""
    kept = {state: to_state(journal, state, state.value) for state in (INTENT, SENDING, UNKNOWN, ACCEPTED)}
    raw(journal.path, "UPDATE attempts SET stale_at = 1e12")
    for state in (REJECTED, NOT_SENT, ABANDONED):
        to_state(journal, state, state.value)
    attempt = claim(journal, "completed").entry.id
    journal.accepted(attempt, Submission(OTHER_TASK))
    journal.finished(ended(OTHER_TASK))
    attempt = claim(journal, "failed").entry.id
    journal.accepted(attempt, Submission("third_task"))
    journal.finished(ended("third_task", "failed"))
    clock.now += 100
    assert journal.prune(older_than=101) == 0
    assert journal.prune(older_than=99) == 5
    assert [entry.id for entry in journal.entries()] == list(kept.values())
    assert claim(journal, "completed").is_ours


@pytest.mark.parametrize("seconds", [-1, float("nan")])
def test_a_time_to_keep_that_is_none_is_refused(journal: Journal, seconds: float) -> None:
    with pytest.raises(InvalidRequestError, match="0 seconds or more"):
        journal.prune(older_than=seconds)


HOSTILE: list[tuple[str, Any]] = [
    ("id", b"x"),
    ("state", "paid"),
    ("key", b"a"),
    ("fingerprint", b"f"),
    ("account", b"\0"),
    ("base_url", b"http://evil"),
    ("endpoint", b"x"),
    ("owner", b"1:1:"),
    ("prompts", "["),
    ("prompts", '"abc"'),
    ("prompts", "[1]"),
    ("prompts", b"\xff"),
    ("prompts", "[" * 100_000),
    ("settings", "[]"),
    ("settings", '{"model": 1}'),
    ("expected_credits", "two"),
    ("expected_credits", 2.5),
    ("stale_at", "soon"),
    ("created_at", b"x"),
    ("updated_at", "never"),
    ("task_id", b"x"),
    ("task_id", ""),
    ("task_id", "."),
    ("task_id", ".."),
    ("task_id", "x" * 513),
    ("task_id", None),
    ("credits_used", "2 credits"),
    ("credits_remaining", b"1"),
    ("receipt", "[]"),
    ("receipt", ""),
    ("receipt", "{"),
    ("answer", "7"),
    ("is_refunded", 2),
    ("is_refunded", "yes"),
    ("error", b"x"),
]


@pytest.mark.parametrize(("column", "value"), HOSTILE)
def test_m84_a_row_that_somebody_else_wrote_is_one_clear_error(
    journal: Journal, path: Path, column: str, value: Any
) -> None:
    """T14: whatever stands there, neither a listing nor a claim acts on it."""
    to_state(journal, ACCEPTED)
    raw(path, f"UPDATE attempts SET {column} = ?", value)
    with pytest.raises(JournalError, match="a row that this package did not write") as caught:
        journal.entries()
    assert len(str(caught.value)) < 400
    if column != "key":
        with pytest.raises(JournalError):
            claim(journal)


@pytest.mark.parametrize(("column", "value"), [("stale_at", "soon"), ("owner", b"\xff"), ("prompts", "{}")])
def test_m84_a_running_attempt_that_somebody_else_wrote(journal: Journal, path: Path, column: str, value: Any) -> None:
    to_state(journal, SENDING)
    raw(path, f"UPDATE attempts SET {column} = ?", value)
    for use in (claim, Journal.entries):
        with pytest.raises(JournalError, match="did not write"):
            use(journal)
    assert raw(path, "SELECT state FROM attempts") == [("sending",)]


@pytest.mark.parametrize("owner", ["", "x", ":", "0:1:", "1" * 30, "9" * 5000, "٣:1:", "-1:1:", "1:1:elsewhere"])
def test_m84_an_owner_that_cannot_be_asked_for_may_be_alive(journal: Journal, path: Path, owner: str) -> None:
    to_state(journal, SENDING)
    raw(path, "UPDATE attempts SET owner = ?", owner)
    assert [entry.state for entry in journal.entries()] == [SENDING]


def test_m84_text_that_is_not_text_is_one_clear_error(journal: Journal, path: Path) -> None:
    to_state(journal, ACCEPTED)
    raw(path, "UPDATE attempts SET error = CAST(x'ff' AS TEXT)")
    with pytest.raises(JournalError, match="could not be used"):
        journal.entries()


def test_m84_a_table_of_another_shape_is_one_clear_error(journal: Journal, path: Path) -> None:
    to_state(journal, ACCEPTED)
    raw(path, "ALTER TABLE attempts RENAME COLUMN receipt TO invoice")
    with pytest.raises(JournalError):
        journal.entries()


def test_a_service_may_give_ids_that_nobody_would_type(journal: Journal) -> None:
    attempt = to_state(journal, SENDING)
    odd = "../x ?#\0\u6c34" * 10
    journal.accepted(attempt, Submission(odd))
    assert claim(journal).entry.task_id == odd


def test_m84_a_large_journal_is_not_read_whole(journal: Journal, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What costs time with 100,000 rows is reading them; a look at a few reads those few, by an index."""
    to_state(journal, COMPLETED, "old")
    to_state(journal, UNKNOWN, "new")
    columns: list[str] = [row[1] for row in raw(path, "PRAGMA table_info(attempts)")]
    changed = {"id": "value", "key": "'k' || value", "task_id": "'t' || value"}
    values = ", ".join(changed.get(c, c) for c in columns)
    raw(
        path,
        f"INSERT INTO attempts SELECT {values} FROM (SELECT * FROM attempts WHERE key = 'old'),"
        " (WITH RECURSIVE n(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < 100000)"
        " SELECT value FROM n)",
    )
    read: list[str] = []

    def counting(row: sqlite3.Row) -> JournalEntry:
        read.append(row["id"])
        return attempts_module.read_entry(row)

    monkeypatch.setattr(journal_module, "read_entry", counting)
    asked: list[str] = []
    with Journal(path) as again:
        again._database._connection.set_trace_callback(asked.append)  # type: ignore[union-attr]  # it is open
        assert len(again.entries(UNKNOWN)) == 1
        assert not claim(again, "k50000").is_ours
        assert claim(again, "another").is_ours
        assert again.entries(ACCEPTED, INTENT, key="k7") == []
        again.finished(ended("t7"))
        with pytest.raises(InvalidRequestError, match="already"):
            again.resolve(again.entries(UNKNOWN)[0].id, task_id="t9")
        again._database._connection.set_trace_callback(None)  # type: ignore[union-attr]  # likewise
    assert len(read) < 12
    for statement in asked:
        if "attempts" in statement and not statement.startswith("INSERT"):
            plan = " ".join(str(step) for step in raw(path, f"EXPLAIN QUERY PLAN {statement}"))
            assert "SCAN" not in plan, (statement, plan)


class Breaking(sqlite3.Connection):
    """A connection on which statements that begin so fail; at a COMMIT, what was done is on the disk or is not."""

    beginning = ""
    is_durable = False

    def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
        if Breaking.beginning and sql.startswith(Breaking.beginning):
            if Breaking.is_durable:
                super().execute(sql, *values)
            raise sqlite3.OperationalError("disk I/O error")
        return super().execute(sql, *values)


@contextmanager
def broken(beginning: str, *, is_durable: bool = False) -> Iterator[None]:
    Breaking.beginning, Breaking.is_durable = beginning, is_durable
    try:
        yield
    finally:
        Breaking.beginning, Breaking.is_durable = "", False


@pytest.fixture
def breaking(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Journal]:
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: connect(*a, factory=Breaking, **k))
    with Journal(path) as journal:
        yield journal


STEPS: dict[str, tuple[AttemptState | None, Callable[[Journal, str], object], AttemptState]] = {
    "claim": (None, lambda journal, _: claim(journal), INTENT),
    "sending": (INTENT, lambda journal, attempt: journal.sending(attempt), SENDING),
    "send_again": (SENDING, lambda journal, attempt: journal.send_again(attempt), INTENT),
    "accepted": (SENDING, lambda journal, attempt: journal.accepted(attempt, RECEIPT), ACCEPTED),
    "rejected": (SENDING, lambda journal, attempt: journal.ended(attempt, REJECTED), REJECTED),
    "unknown": (SENDING, lambda journal, attempt: journal.ended(attempt, UNKNOWN), UNKNOWN),
    "finished": (ACCEPTED, lambda journal, _: journal.finished(ended()), COMPLETED),
    "given up": (UNKNOWN, lambda journal, attempt: journal.resolve(attempt), ABANDONED),
    "taken up": (UNKNOWN, lambda journal, attempt: journal.resolve(attempt, task_id=TASK), ACCEPTED),
}


@pytest.mark.parametrize("statement", ["BEGIN", "INSERT,UPDATE", "COMMIT", "COMMIT, durable"])
@pytest.mark.parametrize("step", STEPS)
def test_m77_each_transition_happens_whole_or_not_at_all(
    breaking: Journal, path: Path, step: str, statement: str
) -> None:
    """The statement fails: the state before stands, or, if the commit reached the disk all the same, the one after."""
    before, act, after = STEPS[step]
    attempt = to_state(breaking, before) if before else ""
    beginning, _, durable = statement.partition(", ")
    if "," in beginning:
        beginning = "INSERT" if step == "claim" else "UPDATE"
    with (
        broken(beginning, is_durable=bool(durable)),
        pytest.raises(JournalError, match="could not be used: disk I/O error") as caught,
    ):
        act(breaking, attempt)
    assert caught.value.submission is None
    expected = after if durable else before
    with Journal(path) as other:
        assert [entry.state for entry in other.entries()] == ([expected] if expected else [])
    if not durable:
        act(breaking, attempt)
        assert [entry.state for entry in breaking.entries()] == [after]


def test_m77_an_attempt_whose_refusal_was_not_written_down_is_read_on_the_safe_side(
    breaking: Journal, path: Path
) -> None:
    attempt = to_state(breaking, SENDING)
    with broken("COMMIT"), pytest.raises(JournalError):
        breaking.ended(attempt, REJECTED)
    raw(path, "UPDATE attempts SET owner = ?", DEAD)
    assert claim(breaking).entry.state is UNKNOWN


@contextmanager
def _full_disk(_: Journal) -> Iterator[None]:
    """A real one, to SQLite: the kernel refuses every write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def _read_only(journal: Journal) -> Iterator[None]:
    """SQLite's own refusal to write."""
    db = journal._database._connection
    assert db is not None
    db.execute("PRAGMA query_only = ON")
    try:
        yield
    finally:
        db.execute("PRAGMA query_only = OFF")


FAILURES: dict[str, Callable[[Journal], AbstractContextManager[None]]] = {
    "full": _full_disk,
    "read-only": _read_only,
    "io": lambda _: broken("COMMIT"),
}


def fail_at(monkeypatch: pytest.MonkeyPatch, step: str, failure: str) -> None:
    original = getattr(Journal, step)

    def failing(self: Journal, *args: Any, **kwargs: Any) -> Any:
        with FAILURES[failure](self):
            return original(self, *args, **kwargs)

    monkeypatch.setattr(Journal, step, failing)


@pytest.mark.anyio
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("step", ["claim", "sending"])
async def test_m79_what_cannot_be_written_down_is_not_sent(
    breaking: Journal, monkeypatch: pytest.MonkeyPatch, step: str, failure: str
) -> None:
    """Fail closed: not one byte reaches the server, and the budget has its credits back."""
    fail_at(monkeypatch, step, failure)
    budget = Budget(2)
    with Server(Script()) as server:
        client = AsyncConceptViz(KEY, base_url=server.base_url, journal=breaking, budget=budget, retries=QUICK)
        async with client:
            with pytest.raises(JournalError) as caught:
                await client.submit("a", key="k")
            assert (caught.value.submission, caught.value.credits) == (None, Credits.NOT_SPENT)
            assert budget.remaining == 2
            monkeypatch.undo()
            await client.submit("a", key="k")
    assert len(server.ledger.heads) == len(server.ledger.accepted) == 1
    assert budget.spent == 2


@pytest.mark.anyio
@pytest.mark.parametrize("failure", FAILURES)
async def test_m79_an_accepted_id_that_cannot_be_written_down_is_in_the_error(
    breaking: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: str
) -> None:
    """Fail loud: the receipt is in the error, the id in the log, and the key is never paid for again."""
    simulator = Simulator(render=render_tiny)
    fail_at(monkeypatch, "accepted", failure)
    client = AsyncConceptViz(simulator.api_key, transport=simulator.transport(), journal=breaking, retries=QUICK)
    async with client:
        with pytest.raises(JournalError, match="is paid for, but could not be written down") as caught:
            await client.submit("a", key="k")
    receipt = caught.value.submission
    assert receipt is not None
    assert (receipt.credits_used, caught.value.task_id, caught.value.credits) == (2, receipt.task_id, Credits.SPENT)
    assert [r.levelno for r in caplog.records if receipt.task_id in r.getMessage()] == [logging.ERROR]
    assert simulator.ledger.submissions == 1
    assert [entry.state for entry in breaking.entries()] == [SENDING]
    monkeypatch.undo()
    breaking.accepted(breaking.entries()[0].id, receipt)
    assert [entry.task_id for entry in breaking.entries(ACCEPTED)] == [receipt.task_id]


@pytest.mark.anyio
async def test_nothing_that_opens_an_account_is_in_the_file(path: Path) -> None:
    """The journal holds a fingerprint of the API key, under another name than the key's own hash."""
    simulator = Simulator(render=render_tiny)

    async with AsyncConceptViz(simulator.api_key, transport=simulator.transport(), journal=path) as client:
        await client.submit("the water cycle", key="k")
        content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert b"the water cycle" in content
    assert simulator.api_key[4:].encode() not in content
    assert hashlib.sha256(simulator.api_key.encode()).hexdigest()[:16].encode() not in content
