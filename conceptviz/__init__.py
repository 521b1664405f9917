"""The Python SDK for the ConceptViz REST API: text prompts, and images to edit, become diagrams.

Only names live here. They are loaded when they are first used, so that `import conceptviz` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from ._attempts import AttemptState, JournalEntry
    from ._budget import Budget
    from ._client import AsyncConceptViz
    from ._errors import (
        APIStatusError,
        AuthenticationError,
        BadRequestError,
        BudgetExceededError,
        ConceptVizError,
        Credits,
        DownloadError,
        GenerationFailedError,
        InsufficientCreditsError,
        InvalidImageError,
        InvalidRequestError,
        JournalError,
        ModerationBlockedError,
        NotSentError,
        PlanError,
        PlanLimitExceededError,
        PollInterruptedError,
        RateLimitedError,
        ServerError,
        SubmissionUnknownError,
        TaskNotFoundError,
        UnexpectedResponseError,
        WaitTimeoutError,
    )
    from ._events import Completed, Differed, Event, EventHook, Failed, Polled, Retrying, Saved, Submitted
    from ._journal import Journal
    from ._models import Image, Outcome, Polling, Result, Retries, Submission, TaskState
    from ._requests import EditRequest, GenerateRequest, ImageInput, Prompts, Unchecked
    from ._spec import AspectRatio, Model, Quality
    from ._sync import ConceptViz
    from ._sync_task import Task
    from ._task import AsyncTask

__all__ = [
    "APIStatusError",
    "AspectRatio",
    "AsyncConceptViz",
    "AsyncTask",
    "AttemptState",
    "AuthenticationError",
    "BadRequestError",
    "Budget",
    "BudgetExceededError",
    "Completed",
    "ConceptViz",
    "ConceptVizError",
    "Credits",
    "Differed",
    "DownloadError",
    "EditRequest",
    "Event",
    "EventHook",
    "Failed",
    "GenerateRequest",
    "GenerationFailedError",
    "Image",
    "ImageInput",
    "InsufficientCreditsError",
    "InvalidImageError",
    "InvalidRequestError",
    "Journal",
    "JournalEntry",
    "JournalError",
    "Model",
    "ModerationBlockedError",
    "NotSentError",
    "Outcome",
    "PlanError",
    "PlanLimitExceededError",
    "PollInterruptedError",
    "Polled",
    "Polling",
    "Prompts",
    "Quality",
    "RateLimitedError",
    "Result",
    "Retries",
    "Retrying",
    "Saved",
    "ServerError",
    "Submission",
    "SubmissionUnknownError",
    "Submitted",
    "Task",
    "TaskNotFoundError",
    "TaskState",
    "Unchecked",
    "UnexpectedResponseError",
    "WaitTimeoutError",
    "__version__",
]

_HOMES = {
    "_spec": {"AspectRatio", "Model", "Quality"},
    "_attempts": {"AttemptState", "JournalEntry"},
    "_budget": {"Budget"},
    "_client": {"AsyncConceptViz"},
    "_journal": {"Journal"},
    "_task": {"AsyncTask"},
    "_sync": {"ConceptViz"},
    "_sync_task": {"Task"},
    "_events": {"Completed", "Differed", "Event", "EventHook", "Failed", "Polled", "Retrying", "Saved", "Submitted"},
    "_models": {"Image", "Outcome", "Polling", "Result", "Retries", "Submission", "TaskState"},
    "_requests": {"EditRequest", "GenerateRequest", "ImageInput", "Prompts", "Unchecked"},
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = next((home for home, names in _HOMES.items() if name in names), "_errors")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
