"""What a caller can watch: one small value for each thing that happens, and the hook they are given to.

Events hold what is public; never a key, a request or a client. A hook's own error goes to the caller of the method that
was running.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from attrs import frozen

from ._errors import ConceptVizError
from ._models import Image, Result, Submission, TaskState

if TYPE_CHECKING:
    from ._requests import EditRequest, GenerateRequest


@frozen(kw_only=True)
class Event:
    """The base of all events.

    Attributes:
        task_id: The task it is about, or None before there is one.
    """

    task_id: str | None


@frozen(kw_only=True)
class Submitted(Event):
    """A submit was accepted: the task exists and is paid for.

    Attributes:
        submission: The receipt.
    """

    task_id: str
    submission: Submission


@frozen(kw_only=True)
class Polled(Event):
    """A task was looked at.

    Attributes:
        state: The task as it was.
        elapsed: Seconds since its submit, or since it was picked up by its id.
    """

    task_id: str
    state: TaskState
    elapsed: float


@frozen(kw_only=True)
class Retrying(Event):
    """A request failed in a passing way and is made again: never one that may have been charged.

    Attributes:
        attempt: How often it has failed so far, from 1.
        delay: Seconds until the next attempt.
        error: What went wrong.
    """

    attempt: int
    delay: float
    error: ConceptVizError


@frozen(kw_only=True)
class Completed(Event):
    """A task ended well.

    Attributes:
        result: What it made.
        elapsed: Seconds since its submit, or since it was picked up by its id.
    """

    task_id: str
    result: Result
    elapsed: float


@frozen(kw_only=True)
class Failed(Event):
    """A task ended as failed.

    Attributes:
        error: The error that the waiting caller gets.
        elapsed: Seconds since its submit, or since it was picked up by its id.
    """

    task_id: str
    error: ConceptVizError
    elapsed: float


@frozen(kw_only=True)
class Saved(Event):
    """An image lies on disk, verified.

    Attributes:
        image: The image.
        path: Its file.
    """

    image: Image
    path: Path


@frozen(kw_only=True)
class Differed(Event):
    """A submit was accepted otherwise than it was asked for, or than the API page says: the service has changed.

    Attributes:
        what: "credits", "model", "quality" or "aspect_ratio".
        expected: What was asked for, or what the API page says.
        actual: What the service says.
    """

    task_id: str
    what: str
    expected: int | str
    actual: int | str

    def __str__(self) -> str:
        return f"Task {self.task_id} was accepted with {self.what} {self.actual}, where {self.expected} was expected."


def differences(request: GenerateRequest | EditRequest, submission: Submission) -> list[Differed]:
    """Return where a receipt differs from what was asked for, as far as both say.

    Source: "Response" of "Step 1: Submit Generation Request"; "Credit Cost".
    """
    asked = {"credits": request.expected_credits, **request.settings}
    got = {"credits": submission.credits_used, "model": submission.model, "quality": submission.quality}
    got["aspect_ratio"] = submission.aspect_ratio
    return [
        Differed(task_id=submission.task_id, what=what, expected=expected, actual=actual)
        for what, expected in asked.items()
        if expected is not None and (actual := got[what]) is not None and actual != expected
    ]


EventHook: TypeAlias = Callable[[Event], Any]
"""Called with each event; an awaitable that it returns is awaited."""
