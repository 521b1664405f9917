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

from .._events import Completed, Event, Polled, Retrying, Submitted
from ._exits import in_shell_words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status
    from rich.text import Text
    from typing_extensions import Self

    from .._models import Submission

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

    Attributes:
        task_id: The task it is about, as soon as there is one.
        submitting: Whether a submit may be under way.
    """

    def __init__(self, folder: Path | None = None, task_id: str | None = None, *, simulated: bool = False) -> None:
        super().__init__(logging.WARNING)
        self.folder = folder
        self.task_id = task_id
        self.simulated = simulated
        self.submitting = False
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
        self._word = word
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

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning of the package."""
        # These two tell a program how to take up a wait that was stopped; `resume` tells a person.
        if record.module not in {"_task", "_sync"}:
            self.say(f"Warning: {record.getMessage()}")

    def resume(self) -> None:
        """Say how to take up the task again, if there is one that lives on."""
        if self.simulated:
            self.say("It was simulated: nothing was charged, and nothing goes on.")
        elif self.task_id is not None:
            command = shlex.join(["conceptviz", "wait", self.task_id, "-o", str(self.folder or "diagrams")])
            self.say(f"Take it up again, at no further cost:\n  {command}")


def _after_colon(text: str) -> str:
    return f": {text}" if text else ""


def _receipt(submission: Submission) -> str:
    used, left = submission.credits_used, submission.credits_remaining
    parts = [] if used is None else [f"{used} credit{'' if used == 1 else 's'} used"]
    if left is not None:
        parts.append(f"{left} left")
    return ", ".join(parts)
