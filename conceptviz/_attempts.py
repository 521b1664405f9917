"""One attempt to submit: what is known of it, and how it is read from its row.

What lives here: the states, the public entry, and the checks of what a file holds. Pure. What must never live here: a
file, a clock, what follows from what (`_journal`).
"""

from __future__ import annotations

import enum
import json
from typing import TYPE_CHECKING, Any

from attrs import field, frozen

from ._errors import JournalError

if TYPE_CHECKING:
    import sqlite3


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
    """An UNKNOWN or an ACCEPTED that a person has given up: the same key may be submitted again."""


# The states after which the same key may be paid for again, because the first time came to nothing.
FREE = frozenset({AttemptState.REJECTED, AttemptState.NOT_SENT, AttemptState.ABANDONED})
# The states in which there is a task for the key.
PAID = (AttemptState.ACCEPTED, AttemptState.COMPLETED)


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


def is_free(entry: JournalEntry) -> bool:
    """Say whether the key of an attempt may be paid for again, because nothing was, or it was all given back."""
    if entry.state is AttemptState.FAILED:
        # Without a task id it was an HTTP 500 GENERATION_FAILED, which the API page calls refunded.
        return entry.task_id is None or entry.is_refunded is True
    return entry.state in FREE


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("id", "state", "fingerprint", "account", "base_url", "endpoint", "owner"), (str,)),
    **dict.fromkeys(("key", "task_id", "error"), (str, type(None))),
    **dict.fromkeys(("stale_at", "created_at", "updated_at"), (float,)),
    **dict.fromkeys(("expected_credits", "credits_used", "credits_remaining"), (int, type(None))),
}


def read_entry(row: sqlite3.Row) -> JournalEntry:
    """Read a row; what another program may have written into it is checked again."""
    try:
        values = {name: _typed(row[name], name) for name in _KINDS}
        values |= {
            "state": _checked(AttemptState(row["state"]), row["task_id"]),
            "prompts": tuple(_decode(row["prompts"], list, str)),
            "settings": _decode(row["settings"], dict, str),
            "receipt": None if row["receipt"] is None else _decode(row["receipt"], dict),
            "answer": None if row["answer"] is None else _decode(row["answer"], dict),
            "is_refunded": {None: None, 0: False, 1: True}[row["is_refunded"]],
        }
        return JournalEntry(**values)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError) as error:
        raise JournalError(f"The journal holds a row that this package did not write ({error!s:.200}).") from error


def _decode(text: str, kind: type[list[Any] | dict[str, Any]], inner: type = object) -> Any:
    value = json.loads(text)
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, kind) or not all(isinstance(item, inner) for item in items):
        raise ValueError(f"no {kind.__name__} of {inner.__name__}")
    return value


def _typed(value: Any, name: str) -> Any:
    if type(value) not in _KINDS[name]:
        raise TypeError(f"{name} is a {type(value).__name__}")
    return value


def _checked(state: AttemptState, task_id: str | None) -> AttemptState:
    """Check the task id as one that a service could have given: what a person may type is stricter."""
    if (state in PAID) if task_id is None else not (0 < len(task_id) <= 512 and task_id not in {".", ".."}):
        raise ValueError(f"{state.value} with the task id {task_id!r:.80}")
    return state
