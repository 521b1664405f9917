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

import enum
import json
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ._errors import InvalidRequestError, JournalError
from ._models import Submission, TaskState
from ._spec import STATUS_COMPLETED

if TYPE_CHECKING:
    import sqlite3
    from types import TracebackType

    from typing_extensions import Self


class AttemptState(str, enum.Enum):
    """What is known of one attempt to submit."""

    INTENT = "intent"
    """Written down, and certainly not sent yet."""
    SENDING = "sending"
    """Its first byte may have left; no answer yet."""
    ACCEPTED = "accepted"
    """The service gave a task id: it is paid for."""
    COMPLETED = "completed"
    """The task ended well."""
    FAILED = "failed"
    """The task ended as failed."""
    REJECTED = "rejected"
    """The service refused it: nothing was spent."""
    NOT_SENT = "not_sent"
    """It certainly never reached the service."""
    UNKNOWN = "unknown"
    """Sent, and no readable answer: it may have been charged. Only a person can resolve it."""
    ABANDONED = "abandoned"
    """An UNKNOWN that a person has given up: the same key may be submitted again."""


# The states after which the same key may be paid for again, because the first time came to nothing.
_FREE = frozenset({AttemptState.REJECTED, AttemptState.NOT_SENT, AttemptState.ABANDONED})


@frozen
class JournalEntry:
    """One attempt to submit, as the journal knows it. Times are seconds since 1970 (UTC), money is in credits.

    Attributes:
        id: The attempt's own id.
        state: What is known of it.
        key: The caller's name for the piece of work, or None.
        account: A fingerprint of the API key, which tells accounts apart and opens nothing.
        base_url: The API it was sent to.
        endpoint: "/generate" or "/edit".
        prompts: What was asked for.
        settings: The model, quality and aspect ratio that were asked for.
        expected_credits: What it costs by the API page, or None without a documented price.
        created_at: When it was written down.
        updated_at: When it last changed.
        task_id: The task, once it was accepted.
        credits_used: What the service charged, as far as it said.
        credits_remaining: What was left after it, as far as the service said.
        is_refunded: Whether the credits of a failed task were given back, as far as the service said.
        error: What went wrong, in one sentence, or None.
    """

    id: str
    state: AttemptState
    key: str | None
    account: str
    base_url: str
    endpoint: str
    prompts: tuple[str, ...]
    settings: dict[str, str]
    expected_credits: int | None
    created_at: float
    updated_at: float
    task_id: str | None = None
    credits_used: int | None = None
    credits_remaining: int | None = None
    is_refunded: bool | None = None
    error: str | None = None
    fingerprint: str = field(default="", repr=False)
    receipt: dict[str, Any] | None = field(default=None, repr=False, eq=False)
    answer: dict[str, Any] | None = field(default=None, repr=False, eq=False)
    stale_at: float = field(default=0.0, repr=False)
    owner: str = field(default="", repr=False)


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

    Every method takes a lock and may wait for the disk: async code calls them in a worker thread.

    Args:
        path: The file; made, readable by its owner alone, if it is not there.

    Raises:
        JournalError: The file is not a journal, is of another version, is open to others, or cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from . import _database  # SQLite is loaded by those who keep a journal

        self._path = Path(path)
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
            return [_entry(row) for row in db.execute(query + " ORDER BY created_at, rowid", values)]

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
                row = db.execute(
                    "SELECT * FROM attempts WHERE key = ? ORDER BY created_at DESC, rowid DESC LIMIT 1", (key,)
                ).fetchone()
                if row is not None:
                    entry = _entry(row)
                    if not _is_free(entry):
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
            return Claim(_entry(db.execute("SELECT * FROM attempts WHERE id = ?", (attempt,)).fetchone()), is_ours=True)

    def sending(self, attempt: str) -> None:
        """Write SENDING down: the first byte may leave when this has returned, and not before.

        Raises:
            JournalError: It could not be written, or the attempt has been taken over: nothing may be sent.
        """
        self._move(attempt, AttemptState.SENDING, from_=(AttemptState.INTENT,))

    def send_again(self, attempt: str) -> None:
        """Write INTENT down again, for an attempt that was refused for its haste or never sent."""
        self._move(attempt, AttemptState.INTENT, from_=(AttemptState.SENDING, AttemptState.INTENT))

    def accepted(self, attempt: str, submission: Submission) -> None:
        """Write the task id down, before anybody hears of it.

        Raises:
            JournalError: It could not be written: whoever calls must not lose the id.
        """
        # From any state: a process that was taken for dead and comes back with an id knows more than whoever took over.
        self._move(
            attempt,
            AttemptState.ACCEPTED,
            from_=tuple(AttemptState),
            task_id=submission.task_id,
            credits_used=submission.credits_used,
            credits_remaining=submission.credits_remaining,
            receipt=json.dumps(dict(submission.raw)),
            error=None,
        )

    def ended(self, attempt: str, state: AttemptState, error: str | None = None) -> None:
        """Write down that an attempt came to nothing: REJECTED, NOT_SENT, UNKNOWN or FAILED."""
        self._move(attempt, state, from_=(AttemptState.INTENT, AttemptState.SENDING), error=error)

    def finished(self, state: TaskState) -> None:
        """Write down how a task ended, with the service's answer."""
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

    def resolve(self, attempt: str, *, task_id: str | None = None) -> JournalEntry:
        """Settle an UNKNOWN attempt by hand, after a look at the account.

        Args:
            attempt: The attempt's id.
            task_id: The task that it turned out to be: it is taken up as ACCEPTED. None: it was not charged, or you are
                willing to pay again: the attempt is ABANDONED, and its key may be submitted anew.

        Raises:
            InvalidRequestError: There is no such attempt, or it is not UNKNOWN.
            JournalError: It could not be written.
        """
        with self._database.transaction() as db:
            self._sweep(db)
            row = db.execute("SELECT * FROM attempts WHERE id = ?", (attempt,)).fetchone()
            if row is None:
                raise InvalidRequestError(f"The journal {self._path} has no attempt {attempt!r}.")
            if row["state"] != AttemptState.UNKNOWN.value:
                raise InvalidRequestError(
                    f"Attempt {attempt} is {row['state']}, and only an unknown one can be resolved."
                )
            state = AttemptState.ABANDONED if task_id is None else AttemptState.ACCEPTED
            db.execute(
                "UPDATE attempts SET state = ?, task_id = ?, updated_at = ? WHERE id = ?",
                (state.value, task_id, time.time(), attempt),
            )
            return _entry(db.execute("SELECT * FROM attempts WHERE id = ?", (attempt,)).fetchone())

    def prune(self, *, older_than: float) -> int:
        """Forget what ended more than `older_than` seconds ago; what is unknown or still paid for and waiting stays.

        Returns:
            How many attempts were forgotten. Their keys may be paid for again.
        """
        ends = [s.value for s in (*_FREE, AttemptState.COMPLETED, AttemptState.FAILED)]
        with self._database.transaction() as db:
            cursor = db.execute(
                f"DELETE FROM attempts WHERE updated_at < ? AND state IN ({', '.join('?' * len(ends))})",  # noqa: S608
                (time.time() - older_than, *ends),
            )
            return cursor.rowcount

    def _move(self, attempt: str, to: AttemptState, *, from_: Sequence[AttemptState], **values: Any) -> None:
        columns = "".join(f", {name} = ?" for name in values)
        with self._database.transaction() as db:
            cursor = db.execute(
                f"UPDATE attempts SET state = ?, updated_at = ?{columns}"  # noqa: S608 - the names are this module's own
                f" WHERE id = ? AND state IN ({', '.join('?' * len(from_))})",
                (to.value, time.time(), *values.values(), attempt, *(state.value for state in from_)),
            )
            if cursor.rowcount != 1:
                raise JournalError(
                    f"Attempt {attempt} is no longer this process's own: it was taken for dead after its time limit. "
                    "Nothing was sent for it since."
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
        running = (AttemptState.INTENT.value, AttemptState.SENDING.value)
        query = "SELECT id, state, owner, stale_at FROM attempts WHERE state IN (?, ?)"
        values: tuple[Any, ...] = running
        if key is not None:
            query, values = query + " AND key = ?", (*running, key)
        now = time.time()
        for row in db.execute(query, values).fetchall():
            if row["stale_at"] < now or not self._file.is_alive(row["owner"]):
                was_sent = row["state"] == AttemptState.SENDING.value
                db.execute(
                    "UPDATE attempts SET state = ?, error = ?, updated_at = ? WHERE id = ? AND state = ?",
                    (
                        (AttemptState.UNKNOWN if was_sent else AttemptState.NOT_SENT).value,
                        "the process ended before an answer was written down" if was_sent else None,
                        now,
                        row["id"],
                        row["state"],
                    ),
                )


def resolve_journal(journal: Journal | str | os.PathLike[str] | None) -> Journal | None:
    """Return a client's journal, opened if it was given as a file.

    Raises:
        JournalError: It cannot be used.
    """
    return Journal(journal) if journal is not None and not isinstance(journal, Journal) else journal


def _is_free(entry: JournalEntry) -> bool:
    """Say whether the key of an attempt may be paid for again, because nothing was, or it was all given back."""
    if entry.state is AttemptState.FAILED:
        # Without a task id it was an HTTP 500 GENERATION_FAILED, which the API page calls refunded.
        return entry.task_id is None or entry.is_refunded is True
    return entry.state in _FREE


def _entry(row: sqlite3.Row) -> JournalEntry:
    """Read a row; what another program may have written into it is checked again."""
    try:
        return JournalEntry(
            id=row["id"],
            state=AttemptState(row["state"]),
            key=row["key"],
            fingerprint=row["fingerprint"],
            account=row["account"],
            base_url=row["base_url"],
            endpoint=row["endpoint"],
            prompts=tuple(map(str, json.loads(row["prompts"]))),
            settings=dict(json.loads(row["settings"])),
            expected_credits=row["expected_credits"],
            owner=row["owner"],
            stale_at=row["stale_at"],
            created_at=row["created_at"],
            updated_at=row["updated_at"],
            task_id=row["task_id"],
            credits_used=row["credits_used"],
            credits_remaining=row["credits_remaining"],
            receipt=json.loads(row["receipt"]) if row["receipt"] else None,
            answer=json.loads(row["answer"]) if row["answer"] else None,
            is_refunded=None if row["is_refunded"] is None else bool(row["is_refunded"]),
            error=row["error"],
        )
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise JournalError(f"The journal holds a row that this package did not write ({error}).") from error
