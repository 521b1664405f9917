"""The commands about the journal: what is known of paid work, and what can be done about it.

What must never live here: a change of the journal that is not one of its own methods, and a guess about what was
charged. What is written in the journal came from a person or from the service: it is made printable first.
"""

from __future__ import annotations

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from .. import AttemptState, Journal, JournalEntry
from .._calls import check_task_id
from .._config import resolve_base_url
from .._errors import AuthenticationError, ConceptVizError, InvalidRequestError, TaskNotFoundError
from .._spec import DEFAULT_BASE_URL
from ._exits import DONE, PARTIAL, USAGE
from ._report import Report, printable
from ._work import collect, journal_file, make_folder, open_client, print_lines

_UNFINISHED = (AttemptState.INTENT, AttemptState.SENDING, AttemptState.ACCEPTED, AttemptState.UNKNOWN)
_SECONDS_A_DAY = 86_400


def list_attempts(report: Report, *, everything: bool, as_json: bool) -> int:
    """Print what is unfinished or unknown, or everything, and say what can be done about it; return the exit code."""
    path = _existing(report)
    if path is None:
        return DONE
    with Journal(path) as journal:
        entries = journal.entries(*(() if everything else _UNFINISHED))
    if as_json:
        print_lines(map(_as_json, entries))
    elif entries and sys.stdout.isatty():
        _print_table(entries)
    else:
        print_lines(map(_as_line, entries))
    if not entries:
        report.say("Nothing has been written down yet." if everything else "Nothing is unfinished.")
    unknown = [entry.id for entry in entries if entry.state is AttemptState.UNKNOWN]
    paid = sum(entry.state is AttemptState.ACCEPTED for entry in entries)
    if unknown:
        words = ("journal", "resolve", unknown[0] if len(unknown) == 1 else "ATTEMPT")
        report.say(
            f"{_count(len(unknown), 'attempt')} may have been charged without an answer. What to compare, and how to "
            f"settle it:\n  {report.command(*words)}"
        )
    if paid:
        report.say(
            f"{_count(paid, 'task')} paid for and not ended. To wait and save the images, at no further cost:\n"
            f"  {report.command('journal', 'resume')}"
        )
    return DONE


def resume(report: Report, *, output: Path, timeout: float | None, as_json: bool) -> int:
    """Collect all that is paid for and not ended, one after another; return the exit code of the worst that happened.

    Raises:
        AuthenticationError: The API key is not accepted: it would not be for the next task either.
        ConceptVizError: The journal or the folder cannot be used.
    """
    path = _existing(report)
    if path is None:
        return DONE
    codes = [DONE]
    with open_client(report, journal=path) as cv:
        folder = make_folder(output)
        tasks = cv.resume()
        report.say(f"{_count(len(tasks), 'task')} of this account paid for and not ended.")
        for task in tasks:
            report.task_id = task.id
            report.begin_line("waiting")
            try:
                codes.append(collect(cv, task, report, folder=folder, timeout=timeout, as_json=as_json))
            except AuthenticationError:
                raise
            except ConceptVizError as error:
                report.end_line()
                codes.append(report.tell(error))
                if isinstance(error, TaskNotFoundError):
                    command = _resolving(report, path, task.id)
                    report.say(f"If it stays so, what it cost and how to give it up:\n  {command}")
    return max(codes, key=lambda code: (code not in {DONE, PARTIAL}, code))


def explain(report: Report, *, attempt: str) -> int:
    """Say what is known of an attempt, what to compare and how to settle it; return the exit code.

    Raises:
        InvalidRequestError: There is no such attempt, or it is neither unknown nor accepted.
        JournalError: The journal cannot be read.
    """
    with _opened(report) as journal:
        entries = journal.entries()
    entry = _unsettled(entries, attempt)
    command = report.command("journal", "resolve", attempt)
    if entry.state is AttemptState.ACCEPTED:
        report.say(
            f"Attempt {attempt}, made {_when(entry.created_at)} at {entry.base_url}{entry.endpoint}, was accepted: "
            f"task {entry.task_id} is paid for ({_credits(entry)} credits).\n\n"
            "To wait and save its images, at no further cost:\n"
            f"  {report.command('journal', 'resume')}\n"
            "If the service no longer knows the task, give it up: what it cost is lost, and its key is free.\n"
            f"  {command} --give-up"
        )
        return USAGE
    cost = "" if entry.expected_credits is None else f" It costs {_count(entry.expected_credits, 'credit')} if it was."
    report.say(
        f"Attempt {attempt}, made {_when(entry.created_at)} at {entry.base_url}{entry.endpoint}, was never answered "
        f"readably: it may have been accepted and charged.{cost}"
    )
    if entry.key is not None:
        report.say(f"  key: {entry.key}")
    for prompt in entry.prompts:
        report.say(f"  prompt: {_shortened(prompt)}")
    if entry.error is not None:
        report.say(f"  why: {_shortened(entry.error.partition('. ')[0], 160)}")
    report.say(
        "\nCompare first: a second submit may be a second charge, and the service cannot be asked.\n"
        f"{_balance(entries, entry)}"
        "  Look at the credits in your account on the service's site.\n\n"
        "Then settle it.\n"
        "It was charged, and you know its task, from your account or the service's support: take it up, at no cost.\n"
        f"  {command} --task-id ID\n"
        "It was not charged, or you will pay again: give it up, so that it may be submitted anew.\n"
        f"  {command} --retry"
    )
    return USAGE


def settle(report: Report, *, attempt: str, task_id: str | None, abandon: bool = False) -> int:
    """Adopt an unknown attempt's task, or give the attempt up (an accepted one on request); return the exit code.

    Raises:
        InvalidRequestError: There is no such attempt, it is not in such a state, or this account has no such task, or
            it is another attempt's. Nothing was changed.
        ConceptVizError: The task cannot be looked at, or the journal cannot be used. Nothing was changed.
    """
    with _opened(report) as journal:
        entries = journal.entries()
        entry = _unsettled(entries, attempt)
        if entry.state is AttemptState.ACCEPTED and not abandon:
            raise InvalidRequestError(
                f"Attempt {attempt} is accepted: task {entry.task_id} is paid for, and only --give-up gives it up. "
                "Nothing was changed."
            )
        if task_id is not None:
            _check_task(report, entries, entry, check_task_id(task_id))
        journal.resolve(attempt, task_id=task_id, abandon=abandon)
    if entry.state is AttemptState.ACCEPTED:
        report.say(
            f"Task {entry.task_id} is given up: it is not taken up any more, and the {_credits(entry)} credits that it "
            "cost are not given back."
        )
    if task_id is not None:
        report.say(
            f"Attempt {attempt} is task {task_id}. To wait and save its images, at no further cost:\n"
            f"  {report.command('journal', 'resume')}"
        )
    elif entry.key is not None:
        report.say(
            f"Attempt {attempt} is given up. The key {entry.key!r} may be submitted again, and is paid for then."
        )
    else:
        report.say(f"Attempt {attempt} is given up. What is submitted again is paid for again.")
    return DONE


def prune(report: Report, *, days: float) -> int:
    """Forget what ended more than so many days ago; return the exit code."""
    path = _existing(report)
    if path is not None:
        with Journal(path) as journal:
            count = journal.prune(older_than=days * _SECONDS_A_DAY)
        report.say(f"{_count(count, 'attempt')} forgotten.")
    return DONE


def _existing(report: Report) -> Path | None:
    """Return the journal's file if there is one: to look for what is known is no reason to make it."""
    path = journal_file(report.journal)
    if os.path.lexists(path):
        return path
    report.say(f"There is no journal at {path}: nothing has been written down there.")
    return None


def _opened(report: Report) -> Journal:
    path = journal_file(report.journal)
    if not os.path.lexists(path):
        raise InvalidRequestError(f"There is no journal at {path}.")
    return Journal(path)


def _resolving(report: Report, path: Path, task_id: str) -> str:
    """Return the command that says how to settle a task's attempt."""
    with Journal(path) as journal:
        attempt = next((entry.id for entry in journal.entries() if entry.task_id == task_id), "ATTEMPT")
    return report.command("journal", "resolve", attempt)


def _unsettled(entries: Sequence[JournalEntry], attempt: str) -> JournalEntry:
    entry = next((entry for entry in entries if entry.id == attempt), None)
    if entry is None:
        raise InvalidRequestError(
            f"The journal has no attempt {attempt!r}: `conceptviz journal list` shows those it has."
        )
    if entry.state not in {AttemptState.UNKNOWN, AttemptState.ACCEPTED}:
        raise InvalidRequestError(
            f"Attempt {attempt} is {entry.state.value}, and only an unknown one can be resolved. Nothing was changed."
        )
    return entry


def _check_task(report: Report, entries: Sequence[JournalEntry], entry: JournalEntry, task_id: str) -> None:
    """Look at a task before it is adopted: that cannot be undone."""
    other = next((other.id for other in entries if other.task_id == task_id), None)
    if other is not None:
        raise InvalidRequestError(f"Task {task_id} is that of attempt {other}. Nothing was changed.")
    if resolve_base_url(None) != entry.base_url:
        # The address is not taken from the file: the API key would go wherever somebody has written.
        raise InvalidRequestError(
            f"The attempt was sent to {entry.base_url}: set CONCEPTVIZ_BASE_URL to that. Nothing was changed."
        )
    with open_client(report) as cv:
        try:
            cv.task(task_id).status()
        except TaskNotFoundError:
            raise InvalidRequestError(f"This account has no task {task_id}. Nothing was changed.") from None


def _balance(entries: Sequence[JournalEntry], entry: JournalEntry) -> str:
    """Say what the receipts before and after an attempt tell of the credits in between."""
    place = entries.index(entry)

    def receipt(candidates: Sequence[JournalEntry]) -> JournalEntry | None:
        same = (c for c in candidates if (c.account, c.base_url) == (entry.account, entry.base_url))
        return next((c for c in same if c.credits_remaining is not None), None)

    before, after = receipt(entries[:place][::-1]), receipt(entries[place + 1 :])
    if before is None:
        return ""
    said = f"  The last receipt before it ({_when(before.created_at)}) left {before.credits_remaining} credits"
    if after is None or after.credits_used is None:
        return f"{said}: are there fewer now?\n"
    missing = (before.credits_remaining or 0) - after.credits_used - (after.credits_remaining or 0)
    return (
        f"{said}; the next one after it used {after.credits_used} and left {after.credits_remaining}. That makes "
        f"{missing} in between, if nothing else was charged, refunded or bought.\n"
    )


def _print_table(entries: Sequence[JournalEntry]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("state, submitted", "attempt, task", "credits"):
        table.add_column(heading, no_wrap=True)
    table.add_column("key, prompts", overflow="fold")
    for entry in entries:
        work = [] if entry.key is None else [f"key {entry.key}"]
        work += [_shortened(prompt) for prompt in entry.prompts]
        if entry.base_url != DEFAULT_BASE_URL:
            work.append(f"at {entry.base_url.partition('//')[2].partition('/')[0]}")
        when = _when(entry.created_at)
        cells = (f"{entry.state.value}\n{when}", f"{entry.id}\n{entry.task_id or ''}", _credits(entry), "\n".join(work))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    Console().print(table)


def _as_line(entry: JournalEntry) -> str:
    """Return an attempt as a line of fields between tabs."""
    prompts = " | ".join(map(_shortened, entry.prompts))
    key = " ".join((entry.key or "-").split())
    fields = (entry.id, entry.state.value, entry.task_id or "-", _credits(entry), _iso(entry.created_at), key, prompts)
    return "\t".join(map(printable, fields))


def _as_json(entry: JournalEntry) -> str:
    return json.dumps(
        {
            "attempt": entry.id,
            "state": entry.state.value,
            "key": entry.key,
            "task_id": entry.task_id,
            "prompts": entry.prompts,
            "endpoint": entry.endpoint,
            "base_url": entry.base_url,
            "account": entry.account,
            "model": entry.settings.get("model"),
            "quality": entry.settings.get("quality"),
            "aspect_ratio": entry.settings.get("aspect_ratio"),
            "expected_credits": entry.expected_credits,
            "credits_used": entry.credits_used,
            "credits_remaining": entry.credits_remaining,
            "credits_refunded": entry.is_refunded,
            "created_at": _iso(entry.created_at),
            "updated_at": _iso(entry.updated_at),
            "error": entry.error,
        }
    )


def _credits(entry: JournalEntry) -> str:
    """Return what an attempt has cost, with a question mark where that is only expected."""
    if entry.is_refunded or entry.state in {AttemptState.INTENT, AttemptState.NOT_SENT, AttemptState.REJECTED}:
        return "0"
    if entry.credits_used is not None:
        return str(entry.credits_used)
    return "?" if entry.expected_credits is None else f"{entry.expected_credits}?"


def _shortened(text: str, width: int = 60) -> str:
    return textwrap.shorten(text, width, placeholder=" ...")


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).isoformat(timespec="seconds")


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, tz=timezone.utc).astimezone().strftime("%Y-%m-%d %H:%M")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
