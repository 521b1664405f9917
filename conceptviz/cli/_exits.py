"""How a command ends: one exit code for each class of error, and the error's sentence in a shell's words.

What lives here: the table that `docs/reference/command-line.md` shows. What must never live here: output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from .. import _errors as e

DONE: Final = 0
OTHER: Final = 1
USAGE: Final = 2
PARTIAL: Final = 10
INTERRUPTED: Final = 130  # 128 + SIGINT, as shells count
READER_GONE: Final = 141  # 128 + SIGPIPE

# A class without a row of its own ends as the nearest class above it.
EXIT_CODES: Final[Mapping[type[e.ConceptVizError], int]] = MappingProxyType(
    {
        e.ConceptVizError: OTHER,
        e.InvalidRequestError: USAGE,
        e.NotSentError: 3,
        e.SubmissionUnknownError: 4,
        e.PollInterruptedError: 5,
        e.UnexpectedResponseError: 6,
        e.GenerationFailedError: 7,
        e.WaitTimeoutError: 8,
        e.DownloadError: 9,
        e.BudgetExceededError: 11,
        e.JournalError: 12,
        e.APIStatusError: 20,
        e.BadRequestError: 21,
        e.ModerationBlockedError: 22,
        e.InvalidImageError: 23,
        e.AuthenticationError: 24,
        e.InsufficientCreditsError: 25,
        e.PlanError: 26,
        e.PlanLimitExceededError: 27,
        e.TaskNotFoundError: 28,
        e.RateLimitedError: 29,
        e.ServerError: 30,
    }
)

# The core gives its advice in Python; the same advice for somebody at a prompt.
_SHELL_WORDS: Final = (
    (re.compile(r"pass api_key=, or set"), "set"),
    (re.compile(r"as api_key= or in"), "in"),
    (re.compile(r"; take it up again with task\([^)]*\)\.wait\(\)"), ""),
    (re.compile(r"[;:] task\([^)]*\)\.wait\(\) takes it up"), ""),
    (re.compile(r" Compare the credits in your account, then settle it: `[^`]*`, or Journal\.resolve\."), ""),
    (re.compile(r"a client without a budget"), "leave out --budget"),
    (re.compile(r"; overwrite=True replaces it"), "; move it away, or choose another folder with -o"),
    (re.compile(r" If the service has changed since, quality=conceptviz\.Unchecked\([^)]*\) sends it as it is\."), ""),
    (re.compile(r"save takes a folder"), "-o takes a folder"),
    (re.compile(r"The returned path"), "The printed path"),
    (re.compile(r" Pass allow_remote=True if they are meant to reach it\."), ""),
)


def exit_code(error: e.ConceptVizError) -> int:
    """Return the exit code of an error."""
    return next(EXIT_CODES[kind] for kind in type(error).__mro__ if kind in EXIT_CODES)


def in_shell_words(error: Exception | str) -> str:
    """Return the message of an error, or of a warning, with advice that can be followed at a prompt."""
    message = str(error)
    for pattern, words in _SHELL_WORDS:
        message = pattern.sub(words, message)
    return message
