"""Every decision about time and repetition.

What lives here: pure functions and one small state machine: the clock and the randomness are arguments, and nothing is
awaited. What must never live here: I/O, a JSON key.
"""

from __future__ import annotations

import json
import logging
import ssl
from random import Random

from attrs import define, field

from ._errors import (
    APIStatusError,
    AuthenticationError,
    BudgetExceededError,
    ConceptVizError,
    Credits,
    DownloadError,
    InsufficientCreditsError,
    ModerationBlockedError,
    NotSentError,
    PlanError,
    PlanLimitExceededError,
    PollInterruptedError,
    RateLimitedError,
    ServerError,
    TaskNotFoundError,
    UnexpectedResponseError,
)
from ._models import Retries, TaskState
from ._spec import (
    GENERATION_FAILED,
    NOT_YET_VISIBLE_SECONDS,
    POLL_INTERVAL,
    QUALITY_NOT_ALLOWED,
    RUNNING_STATUSES,
    STATUS_COMPLETED,
)

logger = logging.getLogger("conceptviz")

# The retry table. A submit is sent again only if it was never sent or was refused: whatever is not in the first row may
# have been charged. A read costs nothing.
SAFE_TO_SUBMIT_AGAIN = (NotSentError, RateLimitedError)
SAFE_TO_READ_AGAIN = (
    NotSentError,
    RateLimitedError,
    ServerError,
    PollInterruptedError,
    UnexpectedResponseError,
    DownloadError,
)

# A completed task without usable images is looked at this often before it counts as malformed.
_LOOKS_AT_EMPTY = 3


def backoff(attempt: int, retries: Retries, rng: Random) -> float:
    """Return the seconds to pause after the failed attempt number `attempt` (from 1): full jitter."""
    # The exponent is bounded so that a long row of failures cannot overflow a float.
    return rng.uniform(0.0, min(retries.max_delay, retries.base_delay * 2.0 ** min(attempt - 1, 32)))


def retry_delay(error: ConceptVizError, attempt: int, retries: Retries, rng: Random, *, spends: bool) -> float | None:
    """Return the seconds after which a request may be made again, or None if it must not be.

    Args:
        error: What the attempt came to.
        attempt: Its number, from 1.
        retries: How often at the most.
        rng: The randomness of the pause.
        spends: Whether the request spends credits if it is accepted.
    """
    safe = SAFE_TO_SUBMIT_AGAIN if spends else SAFE_TO_READ_AGAIN
    if attempt >= retries.attempts or not isinstance(error, safe):
        return None
    if isinstance(error.__cause__, ssl.SSLError):
        return None  # a certificate that is refused now will be refused again
    asked = _asked(error)
    if asked > retries.max_retry_after:
        return None
    return max(asked, backoff(attempt, retries, rng))


def _asked(error: ConceptVizError) -> float:
    """Return the seconds that the service asked to wait."""
    return (error.retry_after or 0.0) if isinstance(error, APIStatusError) else 0.0


@define(eq=False, repr=False, weakref_slot=False)
class Watch:
    """What the looks at one task have shown so far: which of them count, and when to give up.

    Attributes:
        task_id: The task.
        accepted_at: The clock at our own submit of it, or None for a task that was picked up.
        failures: How many looks have failed in a row.
    """

    task_id: str
    accepted_at: float | None = None
    failures: int = field(default=0, init=False)
    _warned: bool = field(default=False, init=False)
    _empty_looks: int = field(default=0, init=False)
    _failed_at: float | None = field(default=None, init=False)

    @property
    def is_ours(self) -> bool:
        """Whether it is known when the task was submitted."""
        return self.accepted_at is not None

    def judge_state(self, state: TaskState) -> bool:
        """Take in a look that was answered; return whether it counts.

        Raises:
            UnexpectedResponseError: The task is completed, and look after look shows no image.
        """
        self.failures = 0
        self._failed_at = None
        if state.status == STATUS_COMPLETED and not state.images:
            self._empty_looks += 1
            if self._empty_looks < _LOOKS_AT_EMPTY:
                return False
            raise UnexpectedResponseError(
                f"Task {self.task_id} is completed, but its answer names no image. It is paid for: look again later, "
                "or ask the service's support with this id.",
                status_code=200,
                body=json.dumps(dict(state.raw)).encode(),
                task_id=self.task_id,
                credits=Credits.SPENT,
            )
        if not state.is_terminal and state.status not in RUNNING_STATUSES and not self._warned:
            self._warned = True
            logger.warning(
                "Task %s has the undocumented status %r: it is waited for as if it were running.",
                self.task_id,
                state.status,
            )
        return True

    def judge_error(self, error: ConceptVizError, now: float) -> bool:
        """Take in a look that failed; return whether the failure is the task's own end, or else look again.

        A hiccup is never a failed task: only GENERATION_FAILED as an HTTP 500, seen twice in a row and at least 3
        seconds apart, is one.

        Raises:
            ConceptVizError: The error itself, when looking again would not help.
        """
        self.failures += 1
        if isinstance(error, ServerError) and error.code == GENERATION_FAILED:
            if self._failed_at is None:
                self._failed_at = now
            return now - self._failed_at >= POLL_INTERVAL[0]
        self._failed_at = None
        if isinstance(error, TaskNotFoundError):
            if self.accepted_at is None or now - self.accepted_at >= NOT_YET_VISIBLE_SECONDS:
                raise error
        elif not isinstance(error, SAFE_TO_READ_AGAIN):
            raise error
        return False


def pause_after_look(
    watch: Watch, error: ConceptVizError | None, regular: float, retries: Retries, rng: Random
) -> float:
    """Return the seconds to the next look: longer than is regular after failures in a row, or if the service asks."""
    return regular if error is None else max(regular, _asked(error), backoff(watch.failures, retries, rng))


# What is refused for one prompt, or for their number, and not for all: the others may be taken without it.
_DIVISIBLE = (ModerationBlockedError, PlanLimitExceededError, BudgetExceededError)
# What would be refused to any other submit of the same client too.
_FINAL = (InsufficientCreditsError, AuthenticationError, PlanError)


def is_divisible(error: ConceptVizError) -> bool:
    """Say whether parts of a refused batch may be accepted. Nothing was spent on it."""
    return isinstance(error, _DIVISIBLE) and error.credits is Credits.NOT_SPENT


def ends_submitting(error: ConceptVizError) -> bool:
    """Say whether a refusal means that no further submit would be accepted.

    Source: "Error Codes", of which QUALITY_NOT_ALLOWED and PLAN_LIMIT_EXCEEDED speak of one request.
    """
    return (
        isinstance(error, _FINAL)
        and not isinstance(error, PlanLimitExceededError)
        and error.code != QUALITY_NOT_ALLOWED
        and error.task_id is None
    )
