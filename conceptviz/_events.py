"""What a caller can watch: one small value for each thing that happens, and the hook they are given to.

Events hold what is public; never a key, a request or a client. A hook's own error goes to the caller of the method that
was running.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from attrs import frozen

from ._errors import ConceptVizError
from ._models import Image, Result, Submission, TaskState


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


EventHook: TypeAlias = Callable[[Event], Any]
"""Called with each event; an awaitable that it returns is awaited."""
