"""What the commands do: a client, a task, files in a folder, and lines on stdout.

What can fail for free fails before anything is paid for; what is paid for is never lost without a word on how to get
it. What must never live here: a command's option, a sentence that several commands share (`_report`, `_exits`).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import ConceptViz, Journal, Polling, Task
from .._errors import DownloadError, InvalidRequestError, JournalError
from .._files import check_folder
from .._models import Image, Result, TaskState
from .._spec import DEFAULT_BASE_URL
from ._exits import DONE, PARTIAL, in_shell_words
from ._report import Report, printable

# A generation of 30 to 90 s takes about a second and a half: long enough to be seen to wait, short enough to do so.
SIMULATED_SPEED = 40.0

_REFUNDED = {
    True: "Its credits were refunded.",
    False: "Its credits were not refunded.",
    None: "The service did not say whether its credits were refunded.",
}


def journal_file(named: Path | None, *, make_folder: bool = False) -> Path:
    """Return where the journal is: the file named, or CONCEPTVIZ_JOURNAL, or one in the user's folder for such things.

    Only this last folder is made, if that is asked for. A named file has a place already: a journal begun anew there,
    because its disk is missing, would know nothing of what is paid for.

    Raises:
        JournalError: There is no such folder, and none can be made.
    """
    given = named or os.environ.get("CONCEPTVIZ_JOURNAL")
    if given:
        return Path(given)
    try:
        folder = _state_folder() / "conceptviz"
        if make_folder:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # the second if there is no home
        reason = error.strerror if isinstance(error, OSError) else error
        raise JournalError(f"The journal's folder cannot be made: {reason}.") from None
    return folder / "journal.sqlite3"


def _state_folder() -> Path:
    state = os.environ.get("XDG_STATE_HOME", "")
    if Path(state).is_absolute():
        return Path(state)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    if os.name == "nt":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    return Path.home() / ".local" / "state"


def open_client(report: Report, *, journal: Path | None = None, budget: int | None = None) -> ConceptViz:
    """Open the client of a command: for the service, or for a simulator that ends with this process.

    Raises:
        InvalidRequestError: There is no usable API key or base URL.
        JournalError: The journal cannot be used.
        ModuleNotFoundError: The simulator's libraries are missing.
    """
    if not report.simulated:
        return ConceptViz(budget=budget, journal=journal, on_event=report)
    from ..simulator import Simulator

    simulator = Simulator(speed=SIMULATED_SPEED)
    transport = simulator.transport()
    report.say("Simulating: no key, no network, and nothing is charged.")
    documented = Polling()
    scaled = Polling(
        min_interval=documented.min_interval / SIMULATED_SPEED,
        max_interval=documented.max_interval / SIMULATED_SPEED,
        first_look=documented.first_look / SIMULATED_SPEED,
        typical=(documented.typical[0] / SIMULATED_SPEED, documented.typical[1] / SIMULATED_SPEED),
    )
    return ConceptViz(
        simulator.api_key,
        base_url=DEFAULT_BASE_URL,
        budget=budget,
        polling=scaled,
        on_event=report,
        transport=transport,
    )


def deliver(
    begin: Callable[[ConceptViz], Task],
    report: Report,
    *,
    output: Path,
    timeout: float | None,
    as_json: bool,
    budget: int | None = None,
) -> int:
    """Have a task submitted or picked up, and collect it.

    Args:
        begin: Submits the task or picks it up.
        report: What is said meanwhile.
        output: The folder to save in.
        timeout: Seconds to wait for the images, or None for the client's own.
        as_json: Whether a result is printed as JSON instead of as its path.
        budget: The credits that may be spent, or None for any number.

    Returns:
        The exit code.

    Raises:
        ConceptVizError: As `ConceptViz.generate` and `save`.
    """
    is_new = report.task_id is None
    if is_new:
        journal = journal_file(report.journal, make_folder=True) if report.keeps_journal else None
    else:
        journal = _journal_to_tell(report)
    with open_client(report, journal=journal, budget=budget) as cv:
        folder = make_folder(output)
        report.begin_line("submitting" if is_new else "waiting")
        with _answer_awaited(report):
            task = begin(cv)
        if report.task_id is None:  # no submit was told of
            report.take_up(task.id)
        return collect(cv, task, report, folder=folder, timeout=timeout, as_json=as_json)


def collect(cv: ConceptViz, task: Task, report: Report, *, folder: Path, timeout: float | None, as_json: bool) -> int:
    """Wait for a task, save its images and print where they are; return the exit code.

    Raises:
        ConceptVizError: As `Task.wait` and `ConceptViz.save`; a DownloadError after the other images have been saved.
    """
    failures: list[DownloadError] = []
    saved: list[tuple[Image, Path]] = []
    result = task.wait(timeout=timeout)
    for image in result.images:
        try:
            saved.append((image, cv.save(image, folder)))
        except DownloadError as error:  # noqa: PERF203 - one lost image does not lose the others
            failures.append(error)
    report.end_line()
    print_lines(_describe(result, image, path) if as_json else str(path) for image, path in saved)
    missing = result.missing_prompts
    if missing:
        report.say(f"No image came back for {len(missing)} of {len(missing) + len(result.images)} prompts:")
        for prompt in missing:
            report.say(f"  {textwrap.shorten(prompt, 72, placeholder=' ...')}")
    if failures:
        for failure in failures[1:]:
            report.say(f"Error: {in_shell_words(failure)}")
        raise failures[0]
    return PARTIAL if missing else DONE


def tell_status(report: Report, *, task_id: str, as_json: bool) -> int:
    """Look at a task once, print its status and say what follows from it; return the exit code."""
    with open_client(report) as cv:
        state = cv.task(task_id).status()
    print_lines([_describe_state(state) if as_json else printable(state.status)])
    if state.images:
        report.resume()
    elif state.is_terminal:
        code = f" ({state.code})" if state.code else ""
        report.say(f"{state.error or 'The service gave no reason'}{code}. {_REFUNDED[state.credits_refunded]}")
    return DONE


def print_lines(lines: Iterable[str]) -> None:
    """Print results.

    Raises:
        OSError: They cannot be written; a BrokenPipeError if the reader has gone.
    """
    for line in lines:
        print(line, flush=True)


def _journal_to_tell(report: Report) -> Path | None:
    """Return the journal that may be told how a task ended, if there is one: without it, nothing is lost but that."""
    try:
        path = journal_file(report.journal)
        if not os.path.lexists(path):
            return None
        with Journal(path):
            return path
    except JournalError as error:
        report.say(f"Warning: {error} It is not told how the task ends.")
        return None


def make_folder(output: Path) -> Path:
    """Make the folder now: that it cannot be written to is better known before anything is paid for."""
    folder = check_folder(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequestError(f"The folder {folder} cannot be made: {error.strerror}. Nothing was sent.") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InvalidRequestError(f"The folder {folder} cannot be written to. Nothing was sent.")
    return folder


@contextmanager
def _answer_awaited(report: Report) -> Iterator[None]:
    """Let a first Ctrl-C wait for the answer to a submit: the id of a paid task is in it. A second one does not."""
    report.submitting = True
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield  # whoever has set a handler of their own has decided what Ctrl-C does
        report.submitting = False
        return
    pressed = False

    def hold(number: int, frame: Any) -> None:
        nonlocal pressed
        if pressed:
            report.gave_up = True
            signal.default_int_handler(number, frame)
        pressed = True
        report.say("Waiting for the answer, which names the task that is paid for; Ctrl-C again gives that up.")

    signal.signal(signal.SIGINT, hold)
    try:
        yield
        report.submitting = False
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if pressed:
        raise KeyboardInterrupt


def _describe(result: Result, image: Image, path: Path) -> str:
    """Return a saved image as a line of JSON. Its URL stays out: it identifies an account."""
    submission = result.submission
    return json.dumps(
        {
            "task_id": result.task_id,
            "path": str(path),
            "prompt": image.prompt,
            "index": image.index,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "model": submission and submission.model,
            "quality": submission and submission.quality,
            "aspect_ratio": submission and submission.aspect_ratio,
            "credits_used": submission and submission.credits_used,
            "credits_remaining": submission and submission.credits_remaining,
        }
    )


def _describe_state(state: TaskState) -> str:
    return json.dumps(
        {
            "task_id": state.task_id,
            "status": state.status,
            "images": len(state.images),
            "error": state.error,
            "code": state.code,
            "credits_refunded": state.credits_refunded,
        }
    )
