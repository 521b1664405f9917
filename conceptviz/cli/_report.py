"""What a command says while it works, all of it on stderr: stdout belongs to the results.

On a terminal one line is kept up to date; elsewhere each change is a short line of its own. What must never live here:
a result, an exit code, an error that stops the work: that nobody reads along is no reason to give up a paid task.
"""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from .._errors import (
    ConceptVizError,
    GenerationFailedError,
    InvalidRequestError,
    JournalError,
    ModerationBlockedError,
    SubmissionUnknownError,
    TaskNotFoundError,
)
from .._events import Completed, Event, Polled, Retrying, Submitted
from ._exits import exit_code, in_shell_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text
    from typing_extensions import Self

    from .._models import Submission

# After these, there is nothing to take up again.
_ENDED = (GenerationFailedError, ModerationBlockedError, InvalidRequestError)

# What a service's words may not do to a terminal: move the cursor, set its title, or be half a character.
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def printable(text: str) -> str:
    """Return a text that cannot command the terminal it is printed on."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text)


class Report(logging.Handler):
    """The words of one command, from its client's events and the package's warnings.

    Args:
        folder: Where images will be saved, for advice; None if this command saves none.
        task_id: The task it is about, if that is known from the start.
        simulated: Whether the embedded simulator does the work.
        keeps_journal: Whether what is paid for is written down.
        journal: The journal's file, if the command line names it.

    Attributes:
        task_id: The task it is about, as soon as there is one.
        submitting: Whether a submit may be under way.
        gave_up: Whether somebody would not wait for the answer to a submit.
    """

    def __init__(
        self,
        folder: Path | None = None,
        task_id: str | None = None,
        *,
        simulated: bool = False,
        keeps_journal: bool = False,
        journal: Path | None = None,
    ) -> None:
        super().__init__(logging.WARNING)
        self.folder = folder
        self.task_id = task_id
        self.simulated = simulated
        self.keeps_journal = keeps_journal
        self.journal = journal
        self.submitting = False
        self.gave_up = False
        self._word = ""
        self._receipt = ""
        self._started = time.monotonic()
        self._console: Console | None = None
        self._status: Status | None = None

    def __enter__(self) -> Self:
        logging.getLogger("conceptviz").addHandler(self)
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.end_line()
        if not self.gave_up:  # else the work goes on for a moment, and what it logs would find no handler
            logging.getLogger("conceptviz").removeHandler(self)

    def say(self, text: str) -> None:
        """Print a message."""
        text = printable(text)
        if self._console is not None:
            from rich.text import Text

            self._console.print(Text(text), soft_wrap=True)
        elif sys.stderr is not None:  # it is, when the shell has closed it; print would take stdout
            with suppress(OSError):  # nobody reads along
                print(text, file=sys.stderr, flush=True)

    def begin_line(self, word: str) -> None:
        """Show on a terminal, from now on, what is going on."""
        self._word, self._receipt = word, ""
        self._started = time.monotonic()
        if sys.stderr is None or not sys.stderr.isatty():
            return
        from rich.console import Console

        console = Console(stderr=True)
        if not console.is_dumb_terminal:
            self._console = console
            spinner = "dots" if console.encoding.startswith("utf") else "line"
            self._status = console.status(self, spinner=spinner)
            self._status.start()

    def end_line(self) -> None:
        """Stop showing what is going on; what is printed to stdout is printed after this."""
        if self._status is not None:
            self._status.stop()
            self._status = None

    def __rich__(self) -> Text:
        """Draw the line that is kept up to date; asked for several times a second."""
        from rich.text import Text

        elapsed = f"{time.monotonic() - self._started:.0f} s"
        task = f"task {self.task_id}" if self.task_id is not None else ""
        parts = filter(None, (self._word, elapsed, task, self._receipt))
        return Text(printable(" · ".join(parts)), no_wrap=True, overflow="ellipsis")

    def __call__(self, event: Event) -> None:
        """Take in an event of the client."""
        if isinstance(event, Submitted):
            self.task_id = event.task_id
            self._word = event.submission.status
            self._receipt = _receipt(event.submission)
            if self._status is None:
                self.say(f"Task {event.task_id} submitted{_after_colon(self._receipt)}.")
        elif isinstance(event, Polled):
            word = event.state.status
            if self._status is None and word != self._word and not event.state.is_terminal:
                self.say(f"{word}, {event.elapsed:.0f} s")
            self._word = word
        elif isinstance(event, Retrying):
            reason = in_shell_words(event.error).partition(". ")[0]
            self.say(f"{reason}. Trying again in {event.delay:.1f} s.")
        elif isinstance(event, Completed):
            cost = _after_colon(self._receipt) if self._status is not None else ""
            self.say(f"Task {event.task_id} completed after {event.elapsed:.1f} s{cost}.")
            self._word = "saving"

    def take_up(self, task_id: str) -> None:
        """Say that a submit has come upon a task that is paid for."""
        self.task_id = task_id
        self._word = "waiting"
        self.say(f"Task {task_id} was paid for by an earlier submit of this key: nothing is spent.")

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning of the package."""
        if self.gave_up and self.keeps_journal:
            return  # the journal knows, and the command that shows it is advised
        # These two tell a program how to take up a wait that was stopped, and `resume` tells a person; what is logged
        # as an error is raised too.
        if record.module not in {"_task", "_sync"} and record.levelno < logging.ERROR:
            self.say(f"Warning: {in_shell_words(record.getMessage())}")

    def tell(self, error: ConceptVizError) -> int:
        """Say what went wrong and what can be done about it, and return its exit code."""
        self.task_id = self.task_id or error.task_id
        self.say(f"Error: {in_shell_words(error)}")
        if isinstance(error, TaskNotFoundError):
            self.say("A task of --simulate ends with its command; `conceptviz simulator` keeps tasks between commands.")
        elif isinstance(error, SubmissionUnknownError) and error.attempt_id is not None:
            command = self.command("journal", "resolve", error.attempt_id)
            self.say(f"What to compare first, and how to settle it:\n  {command}")
        elif isinstance(error, JournalError) and error.submission is None and self.keeps_journal:
            # A journal that was opened may know of this very work: to go without it then may be to pay twice.
            ways = " Mend the journal, name another with --journal, or go without: --no-journal."
            self.say(f"Nothing was sent.{'' if self.submitting else ways}")
        elif not isinstance(error, _ENDED):
            self.resume()
        return exit_code(error)

    def resume(self) -> None:
        """Say how to take up the task again, if there is one that lives on."""
        if self.simulated:
            self.say("It was simulated: nothing was charged, and nothing goes on.")
        elif self.task_id is not None:
            command = self.command("wait", self.task_id, "-o", str(self.folder or "diagrams"))
            self.say(f"Take it up again, at no further cost:\n  {command}")

    def command(self, *words: str) -> str:
        """Return a command to advise, about the same journal as this one's."""
        journal = [] if self.journal is None else ["--journal", str(self.journal)]
        return shlex.join(["conceptviz", *words, *journal])


def _after_colon(text: str) -> str:
    return f": {text}" if text else ""


def _receipt(submission: Submission) -> str:
    used, left = submission.credits_used, submission.credits_remaining
    parts = [] if used is None else [f"{used} credit{'' if used == 1 else 's'} used"]
    if left is not None:
        parts.append(f"{left} left")
    return ", ".join(parts)
