"""The commands and their options.

What lives here: how a command line is read, and what becomes of every error. What must never live here: the work itself
(`_work`), and an import that makes `--help` wait.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from .. import __version__
from .._errors import ConceptVizError
from ._exits import DONE, INTERRUPTED, OTHER, READER_GONE, USAGE, in_shell_words
from ._task_ids import TaskCommand

if TYPE_CHECKING:
    from .. import ConceptViz, Task
    from ._report import Report

_URL = re.compile(r"https?://|data:", re.IGNORECASE)

app = typer.Typer(
    name="conceptviz",
    help="Diagrams from text prompts and from images to edit, by the ConceptViz API.",
    epilog="The API key is read from CONCEPTVIZ_API_KEY. Try it without one: "
    'conceptviz generate "the water cycle" --simulate',
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

journal_app = typer.Typer(
    help="Show and settle what is known of paid work.\n\nEvery submit of `generate` and `edit` is written down before "
    "it is sent, and its task before anything else happens.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(journal_app, name="journal")


def run(argv: Sequence[str] | None) -> int:
    """Read a command line, run its command and return the exit code."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a path that the terminal cannot spell is still a result
    code: Any = DONE
    try:
        app(args=None if argv is None else list(argv), prog_name="conceptviz")
    except SystemExit as end:
        code = end.code
    _let_go_of_stdout()
    return int(code or DONE)


def _let_go_of_stdout() -> None:
    """Give up what a reader who left, or a full disk, did not take: Python would try again at exit, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _seconds(value: float | None) -> float | None:
    if value is not None and not 0 < value < math.inf:
        raise typer.BadParameter(f"{value:g} is not a number of seconds above 0.")
    return value


Model = Annotated[
    str | None, typer.Option("--model", help="cv-2, which the service takes by itself, or cv-1.", metavar="M")
]
Quality = Annotated[str | None, typer.Option("--quality", help="2k; or 4k, which cv-1 has.", metavar="Q")]
AspectRatio = Annotated[
    str | None, typer.Option("--aspect-ratio", help="Such as 16:9, 1:1, 4:3, 9:16, a4-portrait.", metavar="R")
]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder to save in, made if need be.")]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", metavar="S", callback=_seconds, help="Seconds to wait for the images.  [default: 600]"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print each result as one line of JSON.")]
Simulate = Annotated[
    bool,
    typer.Option("--simulate", help="Let the embedded simulator answer: no key, no network, nothing charged."),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key", metavar="NAME", help="Your name for this work: it is paid for once, however often it is asked for."
    ),
]
Budget = Annotated[
    int | None, typer.Option("--budget", metavar="N", min=0, help="Send nothing if it costs more than N credits.")
]
JournalFile = Annotated[
    Path | None, typer.Option("--journal", metavar="FILE", help="The journal's file, in place of the usual one.")
]
NoJournal = Annotated[
    bool, typer.Option("--no-journal", help="Write nothing down: what a crash interrupts may be lost.")
]
TaskId = Annotated[str, typer.Argument(metavar="TASK_ID", show_default=False)]

_DIAGRAMS = Path("diagrams")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"conceptviz {__version__}")
        raise typer.Exit


@app.callback()
def _conceptviz(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Hold what belongs to every command."""


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One to four prompts, submitted as one task.")],
    output: Output = _DIAGRAMS,
    model: Model = None,
    quality: Quality = None,
    aspect_ratio: AspectRatio = None,
    key: Key = None,
    budget: Budget = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    simulate: Simulate = False,
    journal: JournalFile = None,
    no_journal: NoJournal = False,
) -> None:
    """Make diagrams from prompts.

    One task is submitted and waited for; its images are saved, and their paths printed.
    """

    def begin(cv: ConceptViz) -> Task:
        return cv.submit(prompts, model=model, quality=quality, aspect_ratio=aspect_ratio, key=key)

    keeps_journal = _keeps_journal(journal, no_journal, key, simulate)
    _deliver(begin, output, timeout, as_json, budget, simulated=simulate, keeps_journal=keeps_journal, journal=journal)


@app.command()
def edit(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to change.")],
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="One to four images: paths or URLs.")],
    output: Output = _DIAGRAMS,
    model: Model = None,
    quality: Quality = None,
    aspect_ratio: AspectRatio = None,
    key: Key = None,
    budget: Budget = None,
    timeout: Timeout = None,
    as_json: AsJson = False,
    simulate: Simulate = False,
    journal: JournalFile = None,
    no_journal: NoJournal = False,
) -> None:
    """Make a diagram from images to edit.

    One task is submitted and waited for; its image is saved, and its path printed.
    """
    inputs = [image if _URL.match(image) else Path(image) for image in images]

    def begin(cv: ConceptViz) -> Task:
        return cv.submit_edit(prompt, inputs, model=model, quality=quality, aspect_ratio=aspect_ratio, key=key)

    keeps_journal = _keeps_journal(journal, no_journal, key, simulate)
    _deliver(begin, output, timeout, as_json, budget, simulated=simulate, keeps_journal=keeps_journal, journal=journal)


@app.command(cls=TaskCommand)
def status(task_id: TaskId, as_json: AsJson = False) -> None:
    """Print a task's status."""

    def work(report: Report) -> int:
        from ._work import tell_status

        return tell_status(report, task_id=task_id, as_json=as_json)

    _finish(work, task_id=task_id)


@app.command(cls=TaskCommand)
def wait(
    task_id: TaskId,
    output: Output = _DIAGRAMS,
    timeout: Timeout = None,
    as_json: AsJson = False,
    journal: JournalFile = None,
) -> None:
    """Take up a task again, at no cost.

    It is waited for; its images are saved, and their paths printed.
    """
    _deliver(lambda cv: cv.task(task_id), output, timeout, as_json, task_id=task_id, journal=journal)


@app.command()
def estimate(
    count: Annotated[int, typer.Argument(metavar="COUNT", min=0, help="How many images.")] = 1,
    model: Model = None,
    quality: Quality = None,
) -> None:
    """Print what images cost, in credits.

    The prices are those of the API reference; the service is not asked.
    """

    def work(_: Report) -> int:
        from .._requests import estimate

        print(estimate(count, model=model, quality=quality), flush=True)
        return DONE

    _finish(work)


@journal_app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="Also what has ended.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print each attempt as one line of JSON.")] = False,
    journal: JournalFile = None,
) -> None:
    """Print what is unfinished or unknown.

    Unfinished is what is paid for and has not ended; unknown, what may have been charged without an answer.
    """

    def work(report: Report) -> int:
        from ._journal import list_attempts

        return list_attempts(report, everything=everything, as_json=as_json)

    _finish(work, journal=journal)


@journal_app.command()
def resume(
    output: Output = _DIAGRAMS,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", metavar="S", callback=_seconds, help="Seconds to wait for each.  [default: 600]"),
    ] = None,
    as_json: AsJson = False,
    journal: JournalFile = None,
) -> None:
    """Save all that is paid for and not ended.

    One task after another is waited for, at no cost: those of this API key and this API.
    """

    def work(report: Report) -> int:
        from ._journal import resume

        return resume(report, output=output, timeout=timeout, as_json=as_json)

    _finish(work, folder=output, journal=journal)


@journal_app.command()
def resolve(
    attempt: Annotated[str, typer.Argument(metavar="ATTEMPT", show_default=False)],
    task_id: Annotated[
        str | None, typer.Option("--task-id", metavar="ID", help="It was accepted, and this is its task: take it up.")
    ] = None,
    retry: Annotated[
        bool, typer.Option("--retry", help="It was not charged, or may be paid for again: free its key.")
    ] = False,
    abandon: Annotated[
        bool, typer.Option("--give-up", help="It was accepted, and the service no longer knows its task.")
    ] = False,
    journal: JournalFile = None,
) -> None:
    """Settle an unknown attempt, or give up an accepted one.

    Without an option, what is known of it is printed, and what to compare before it is settled.
    """
    if (retry or abandon) and task_id is not None:
        raise typer.BadParameter("--task-id takes it up, and --retry and --give-up give it up: choose one.")

    def work(report: Report) -> int:
        from ._journal import explain, settle

        if task_id is None and not (retry or abandon):
            return explain(report, attempt=attempt)
        return settle(report, attempt=attempt, task_id=task_id, abandon=abandon)

    _finish(work, journal=journal)


@journal_app.command()
def prune(
    older_than: Annotated[
        float, typer.Option("--older-than", metavar="DAYS", min=0, help="How long ago it ended.", show_default=False)
    ],
    journal: JournalFile = None,
) -> None:
    """Forget what ended long ago.

    Its keys may be paid for again. What is unfinished or unknown stays.
    """

    def work(report: Report) -> int:
        from ._journal import prune

        return prune(report, days=older_than)

    _finish(work, journal=journal)


@app.command()
def simulator(
    host: Annotated[str, typer.Option(help="A loopback address.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8787,
    speed: Annotated[float, typer.Option(help="Simulated seconds in a real one: at 30, 60 s take 2 s.")] = 1.0,
    credits: Annotated[int, typer.Option(min=0, help="What the account has to spend.")] = 100,
    plan: Annotated[str, typer.Option(help="pro, pro-single (one prompt, 2k only) or free (no API).")] = "pro",
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON when ready to answer.")] = False,
) -> None:
    """Serve the simulated API until Ctrl-C."""

    def work(report: Report) -> int:
        from ..simulator import Simulator, run

        def announce(base_url: str) -> None:
            if as_json:
                print(json.dumps({"base_url": base_url, "api_key": service.api_key}), flush=True)
                return
            report.say(
                f"The ConceptViz API, simulated: {base_url}\n"
                f"{credits} credits, plan {plan}, speed {speed:g}. Nothing is charged. Ctrl-C ends it.\n"
                "For another terminal:"
            )
            print(f"export CONCEPTVIZ_BASE_URL={base_url}\nexport CONCEPTVIZ_API_KEY={service.api_key}", flush=True)

        try:
            service = Simulator(credits=credits, plan=plan, speed=speed)
            run(service, host=host, port=port, on_ready=announce)
        except ValueError as error:
            raise typer.BadParameter(in_shell_words(error)) from None
        except BrokenPipeError:
            raise
        except OSError as error:
            report.say(f"Error: The simulator cannot listen on {host}:{port}: {error.strerror}. Try --port 0.")
            return OTHER
        return DONE

    _finish(work)


def _keeps_journal(journal: Path | None, no_journal: bool, key: str | None, simulate: bool) -> bool:
    if no_journal and (journal is not None or key is not None):
        raise typer.BadParameter("--no-journal goes with neither --journal nor --key, which works by the journal.")
    return not (no_journal or simulate)


def _deliver(
    begin: Callable[[ConceptViz], Task],
    output: Path,
    timeout: float | None,
    as_json: bool,
    budget: int | None = None,
    **about: Any,
) -> NoReturn:
    def work(report: Report) -> int:
        from ._work import deliver

        return deliver(begin, report, output=output, timeout=timeout, as_json=as_json, budget=budget)

    _finish(work, folder=output, **about)


def _finish(work: Callable[[Report], int], **about: Any) -> NoReturn:
    """Do a command's work, tell what stopped it, and exit. The report is made from what it is `about`."""
    from ._report import Report

    report = Report(**about)
    try:
        with report:
            code = work(report)
    except ConceptVizError as error:
        code = report.tell(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
        report.say(_farewell(report))
        report.resume()
    except ModuleNotFoundError as error:
        if error.name is not None:  # a bug of ours; the simulator's own says what to install
            raise
        code = USAGE
        report.say(f"Error: {error}")
    except OSError as error:
        code = READER_GONE if isinstance(error, BrokenPipeError) else OTHER
        if code == OTHER:
            report.say(f"Error: The results could not be printed: {error.strerror}.")
            report.resume()
    raise typer.Exit(code)


def _farewell(report: Report) -> str:
    if report.simulated:
        return "Stopped."
    if report.task_id is not None:
        return f"Stopped. Task {report.task_id} is paid for and goes on at the service."
    if report.submitting:
        known = f" What is known of it:\n  {report.command('journal', 'list')}" if report.keeps_journal else ""
        return f"Stopped before the service had answered: the request may have been accepted and charged.{known}"
    return "Stopped. Nothing was sent."
