"""The journal: a durable record of every paid submit, in one SQLite file that many processes may share.

Rules: a submit is written down before it is sent (INTENT; SENDING at the last moment before its first byte), and its
task id before anybody hears of it (ACCEPTED). A crash leaves one of these behind: INTENT was never sent, SENDING may
have been charged, ACCEPTED is paid for. An attempt changes only from the state that its writer believes it to be in, so
that a process that slept through its own time limit cannot send what another has taken over.

SQLite brings what a log of our own would have to earn: torn writes, locks between processes, recovery. What it cannot
mend: disks that lie about having written, and network file systems. What must never live here: the API key (a
fingerprint tells accounts apart), HTTP, an await.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import frozen

from ._attempts import FREE, PAID, AttemptState, JournalEntry, is_free, read_entry
from ._calls import check_task_id
from ._errors import InvalidRequestError, JournalError
from ._models import Submission, TaskState
from ._spec import STATUS_COMPLETED

if TYPE_CHECKING:
    import sqlite3
    from types import TracebackType

    from typing_extensions import Self

__all__ = ["AttemptState", "Claim", "Journal", "JournalEntry", "resolve_journal"]


@frozen
class Claim:
    """What the journal says to a caller who wants to submit a piece of work.

    Attributes:
        entry: The attempt that counts.
        is_ours: Whether it was made by this very claim, and is to be sent by the caller.
    """

    entry: JournalEntry
    is_ours: bool


class Journal:
    """A durable record of paid work, in one file that many processes may share.

    Every method takes a lock and may wait for the disk: async code calls them in a worker thread. Threads may share
    one, several may be open on one file, and a forked child may go on with its parent's. Leave the file itself to it: a
    program that opens and closes the file under an open journal, if only to copy it, takes the journal's locks away.

    Args:
        path: The file; made, readable by its owner alone, if it is not there.

    Raises:
        JournalError: The file is not a journal, is of another version, is open to others, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from . import _database  # SQLite is loaded by those who keep a journal

        # The program may change its folder, and SQLite gives ":memory:" a meaning of its own.
        self._path = Path(path).absolute()
        self._file = _database
        self._database = _database.Database(self._path)

    def __repr__(self) -> str:
        return f"<Journal {self._path}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    def close(self) -> None:
        """Close the file. Closing again does nothing."""
        self._database.close()

    def entries(self, *states: AttemptState, key: str | None = None) -> list[JournalEntry]:
        """Return the attempts in the given states (all, if none are given), the oldest first."""
        with self._database.transaction() as db:
            self._sweep(db)
            query = "SELECT * FROM attempts WHERE 1"
            values: list[Any] = []
            if states:
                query += f" AND state IN ({', '.join('?' * len(states))})"
                values += [state.value for state in states]
            if key is not None:
                query += " AND key = ?"
                values.append(key)
            return [read_entry(row) for row in db.execute(query + " ORDER BY rowid", values)]

    def claim(
        self,
        *,
        key: str | None,
        fingerprint: str,
        account: str,
        base_url: str,
        endpoint: str,
        prompts: Sequence[str],
        settings: dict[str, str],
        expected_credits: int | None,
        seconds: float,
        reserve: Callable[[], None] = lambda: None,
    ) -> Claim:
        """Write INTENT down for a new attempt, unless its key has one that counts already.

        Args:
            key: The caller's name for the piece of work, or None for work that is its own.
            fingerprint: What was asked for, hashed: one key is one piece of work.
            account: A fingerprint of the API key.
            base_url: The API.
            endpoint: "/generate" or "/edit".
            prompts: What is asked for.
            settings: Model, quality and aspect ratio, as far as they were given.
            expected_credits: What it should cost.
            seconds: How long the attempt may take: after that it is taken for dead.
            reserve: Called before a new attempt is written down; if it raises, none is.

        Raises:
            InvalidRequestError: The key names other work, or work of another account or API.
            JournalError: It could not be written: nothing may be sent.
        """
        now = time.time()
        with self._database.transaction() as db:
            if key is not None:
                self._sweep(db, key)
                rows = db.execute("SELECT * FROM attempts WHERE key = ? ORDER BY rowid DESC", (key,))
                counting = [entry for entry in map(read_entry, rows) if not is_free(entry)]
                if counting:
                    # There are two if one was given up as not charged, and then accepted after all.
                    entry = next((entry for entry in counting if entry.task_id is not None), counting[0])
                    self._check_same(entry, fingerprint, account, base_url)
                    return Claim(entry, is_ours=False)
            reserve()
            attempt = secrets.token_hex(8)
            db.execute(
                "INSERT INTO attempts (id, state, key, fingerprint, account, base_url, endpoint, prompts, settings,"
                " expected_credits, owner, stale_at, created_at, updated_at) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    attempt,
                    AttemptState.INTENT.value,
                    key,
                    fingerprint,
                    account,
                    base_url,
                    endpoint,
                    json.dumps(list(prompts)),
                    json.dumps(settings),
                    expected_credits,
                    self._file.this_process(),
                    now + seconds,
                    now,
                    now,
                ),
            )
            return Claim(
                read_entry(db.execute("SELECT * FROM attempts WHERE id = ?", (attempt,)).fetchone()), is_ours=True
            )

    def sending(self, attempt: str) -> None:
        """Write SENDING down: the first byte may leave when this has returned, and not before.

        Raises:
            JournalError: It could not be written, or the attempt has been taken over: nothing may be sent.
        """
        with self._database.transaction() as db:
            self._move(db, attempt, AttemptState.SENDING, from_=(AttemptState.INTENT,))
            paid = db.execute(
                "SELECT other.task_id FROM attempts AS this JOIN attempts AS other ON other.key = this.key"
                " WHERE this.id = ? AND other.id != this.id AND other.state IN (?, ?)",
                (attempt, *(state.value for state in PAID)),
            ).fetchone()
            if paid is not None:
                raise JournalError(
                    f"Task {paid[0]} of the same key turned out to be accepted after all. Nothing was sent: submit it "
                    "again to take that task up."
                )

    def send_again(self, attempt: str) -> None:
        """Write INTENT down again, for an attempt that was refused for its haste or never sent.

        Raises:
            JournalError: As for `sending`.
        """
        with self._database.transaction() as db:
            self._move(db, attempt, AttemptState.INTENT, from_=(AttemptState.SENDING, AttemptState.INTENT))

    def accepted(self, attempt: str, submission: Submission) -> None:
        """Write the task id down, before anybody hears of it.

        Raises:
            JournalError: It could not be written: whoever calls must not lose the id.
        """
        with self._database.transaction() as db:
            # From any state: a process that was taken for dead and comes back with an id knows more than whoever took
            # over, or settled the attempt by hand.
            self._move(
                db,
                attempt,
                AttemptState.ACCEPTED,
                from_=tuple(AttemptState),
                task_id=submission.task_id,
                credits_used=submission.credits_used,
                credits_remaining=submission.credits_remaining,
                receipt=json.dumps(dict(submission.raw)),
                answer=None,
                is_refunded=None,
                error=None,
            )

    def ended(self, attempt: str, state: AttemptState, error: str | None = None) -> None:
        """Write down that an attempt came to nothing: REJECTED, NOT_SENT, UNKNOWN or FAILED.

        Raises:
            JournalError: It could not be written: what stands there errs to the safe side.
        """
        with self._database.transaction() as db:
            # UNKNOWN is what a process that was taken for dead finds, and it knows better.
            from_ = (AttemptState.INTENT, AttemptState.SENDING, AttemptState.UNKNOWN)
            self._move(db, attempt, state, from_=from_, error=error)

    def finished(self, state: TaskState) -> None:
        """Write down how a task ended, with the service's answer. The first end counts.

        Raises:
            JournalError: It could not be written: the task can be looked at again.
        """
        to = AttemptState.COMPLETED if state.status == STATUS_COMPLETED else AttemptState.FAILED
        with self._database.transaction() as db:
            db.execute(
                "UPDATE attempts SET state = ?, answer = ?, error = ?, is_refunded = ?, updated_at = ?"
                " WHERE task_id = ? AND state = ?",
                (
                    to.value,
                    json.dumps(dict(state.raw)),
                    state.error,
                    state.credits_refunded,
                    time.time(),
                    state.task_id,
                    AttemptState.ACCEPTED.value,
                ),
            )

    def resolve(self, attempt: str, *, task_id: str | None = None, abandon: bool = False) -> JournalEntry:
        """Settle an UNKNOWN attempt by hand, after a look at the account; or give up one that is paid for.

        Args:
            attempt: The attempt's id.
            task_id: The task that it turned out to be: it is taken up as ACCEPTED. None: it was not charged, or you are
                willing to pay again: the attempt is ABANDONED, and its key may be submitted anew.
            abandon: Whether to give up an ACCEPTED attempt too, whose task the service no longer knows. It keeps the
                task's id, but is not taken up any more.

        Credits:
            What an ACCEPTED attempt cost is lost with it. The next submit of a given-up key is paid for, even if the
            first was too.

        Raises:
            InvalidRequestError: There is no such attempt, it is not UNKNOWN (nor ACCEPTED and to be given up), or the
                task id cannot be its.
            JournalError: It could not be written.
        """
        if task_id is not None:
            check_task_id(task_id)
            if abandon:
                raise InvalidRequestError("An attempt is taken up with its task id, or given up: not both.")
        with self._database.transaction() as db:
            self._sweep(db)
            row = db.execute("SELECT * FROM attempts WHERE id = ?", (attempt,)).fetchone()
            if row is None:
                raise InvalidRequestError(f"The journal {self._path} has no attempt {attempt!r}.")
            if row["state"] == AttemptState.ACCEPTED.value and not abandon:
                raise InvalidRequestError(
                    f"Attempt {attempt} is accepted: its task {row['task_id']} is paid for, and taken up at no cost. "
                    "If the service no longer knows it, abandon=True gives it up, with what it cost."
                )
            if row["state"] not in {AttemptState.UNKNOWN.value, AttemptState.ACCEPTED.value}:
                raise InvalidRequestError(
                    f"Attempt {attempt} is {row['state']}, and only an unknown one can be resolved."
                )
            other = db.execute("SELECT id FROM attempts WHERE task_id = ?", (task_id,)).fetchone()
            if other is not None:
                raise InvalidRequestError(f"Task {task_id} is that of attempt {other[0]} already.")
            state = AttemptState.ABANDONED if task_id is None else AttemptState.ACCEPTED
            db.execute(
                "UPDATE attempts SET state = ?, task_id = coalesce(?, task_id), updated_at = ? WHERE id = ?",
                (state.value, task_id, time.time(), attempt),
            )
            return read_entry(db.execute("SELECT * FROM attempts WHERE id = ?", (attempt,)).fetchone())

    def prune(self, *, older_than: float) -> int:
        """Forget what ended more than `older_than` seconds ago; what is unknown or still paid for and waiting stays.

        Returns:
            How many attempts were forgotten. Their keys may be paid for again.

        Raises:
            InvalidRequestError: The time is not 0 or more.
            JournalError: It could not be written.
        """
        if not older_than >= 0:
            raise InvalidRequestError(f"A time to keep is 0 seconds or more, not {older_than!r}.")
        ends = [state.value for state in (*FREE, AttemptState.COMPLETED, AttemptState.FAILED)]
        with self._database.transaction() as db:
            cursor = db.execute(
                f"DELETE FROM attempts WHERE updated_at <= ? AND state IN ({', '.join('?' * len(ends))})",  # noqa: S608
                (time.time() - older_than, *ends),
            )
            return cursor.rowcount

    def _move(
        self,
        db: sqlite3.Connection,
        attempt: str,
        to: AttemptState,
        *,
        from_: Sequence[AttemptState],
        **values: Any,
    ) -> None:
        columns = "".join(f", {name} = ?" for name in values)
        now = time.time()
        # `updated_at` on the right is the old one: each step begins the attempt's time anew.
        cursor = db.execute(
            f"UPDATE attempts SET state = ?, stale_at = stale_at - updated_at + ?, updated_at = ?{columns}"  # noqa: S608 - the names are this module's own
            f" WHERE id = ? AND state IN ({', '.join('?' * len(from_))})",
            (to.value, now, now, *values.values(), attempt, *(state.value for state in from_)),
        )
        if cursor.rowcount != 1:
            raise JournalError(
                f"Attempt {attempt} in the journal {self._path} is no longer as this process left it: it was taken for "
                f"dead after its time limit, or settled by hand. It did not become {to.value}."
            )

    def _check_same(self, entry: JournalEntry, fingerprint: str, account: str, base_url: str) -> None:
        what = (
            "other work: a key names one piece of work, with one request"
            if entry.fingerprint != fingerprint
            else "work of another API key: a paid task can be taken up only by the account that paid for it"
            if entry.account != account
            else f"work at {entry.base_url}"
            if entry.base_url != base_url
            else None
        )
        if what is not None:
            raise InvalidRequestError(
                f"The key {entry.key!r} is in the journal {self._path} as {what}. Nothing was sent: use another key, "
                "or another journal."
            )

    def _sweep(self, db: sqlite3.Connection, key: str | None = None) -> None:
        """Read what dead processes left behind: INTENT was never sent, SENDING may have been charged."""
        query = "SELECT * FROM attempts WHERE state IN (?, ?)"
        values: list[Any] = [AttemptState.INTENT.value, AttemptState.SENDING.value]
        if key is not None:
            query += " AND key = ?"
            values.append(key)
        now = time.time()
        for entry in map(read_entry, db.execute(query, values).fetchall()):
            if entry.stale_at >= now and self._file.is_alive(entry.owner):
                continue
            was_sent = entry.state is AttemptState.SENDING
            db.execute(
                "UPDATE attempts SET state = ?, error = ?, updated_at = ? WHERE id = ?",
                (
                    (AttemptState.UNKNOWN if was_sent else AttemptState.NOT_SENT).value,
                    "the process ended before an answer was written down" if was_sent else None,
                    now,
                    entry.id,
                ),
            )


def resolve_journal(journal: Journal | str | os.PathLike[str]) -> Journal:
    """Return a client's journal, opened if it was given as a file.

    Raises:
        JournalError: It cannot be used.
    """
    return journal if isinstance(journal, Journal) else Journal(journal)
