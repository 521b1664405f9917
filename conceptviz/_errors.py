"""Every error a caller can see.

    ConceptVizError                      .task_id (or None)   .credits (Credits)   picklable
    ├ InvalidRequestError (ValueError)   caught here, nothing sent
    ├ BudgetExceededError                refused before sending
    ├ NotSentError                       certainly not received: safe to submit again
    ├ SubmissionUnknownError             sent, no readable answer: MAY be charged; never sent again by itself
    ├ PollInterruptedError               reads kept failing; the task lives on
    ├ UnexpectedResponseError            an answer that is not the documented shape
    ├ APIStatusError                     .status_code .code (verbatim) .message .body .retry_after (seconds, or None)
    │  ├ BadRequestError 400
    │  │  ├ ModerationBlockedError
    │  │  └ InvalidImageError
    │  ├ AuthenticationError 401
    │  ├ InsufficientCreditsError 402    .credits_remaining
    │  ├ PlanError 403
    │  │  └ PlanLimitExceededError
    │  ├ TaskNotFoundError 404
    │  ├ RateLimitedError 429
    │  └ ServerError 5xx
    ├ GenerationFailedError              the task ended as failed: .code .credits_refunded
    ├ WaitTimeoutError (TimeoutError)    we stopped waiting: .last_state; the task lives on
    ├ JournalError                       .submission: the receipt, so that its id is not lost
    └ DownloadError                      .url .path

An answer is mapped by its `code` first and by its HTTP status second; an unknown code keeps its text and falls to the
family of its status. Every message says what happened, what was spent and what to do next.

What must never live here: I/O, a type of the HTTP library, the API key, a whole request.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from ._models import Submission, TaskState


class Credits(enum.Enum):
    """What is known of the credits of the work that an error is about."""

    NOT_SPENT = "not spent"
    SPENT = "spent"
    REFUNDED = "refunded"
    UNKNOWN = "unknown"


class ConceptVizError(Exception):
    """The base of every error this package raises on purpose.

    Attributes:
        task_id: The task the error is about, or None if there is none.
        credits: What is known of its credits.
    """

    task_id: str | None
    credits: Credits

    def __init__(self, message: str, *, task_id: str | None = None, credits: Credits = Credits.NOT_SPENT) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.credits = credits

    def __reduce__(self) -> tuple[Any, ...]:
        # BaseException's own version calls the class with `args` alone and fails on keyword-only arguments.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[ConceptVizError], args: tuple[Any, ...], state: dict[str, Any]) -> ConceptVizError:
    """Make a pickled error again, without calling its `__init__`."""
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidRequestError(ConceptVizError, ValueError):
    """The request or the configuration is wrong; it was caught here and nothing was sent or spent."""


class BudgetExceededError(ConceptVizError):
    """The request would, or could, cost more than is left of the budget. Nothing was sent or spent."""


class NotSentError(ConceptVizError):
    """The request certainly did not reach the service: no connection was made. Nothing was spent."""


class SubmissionUnknownError(ConceptVizError):
    """A submit was sent and no readable answer came back: it may have been charged.

    It is never sent again by itself, because the service has no idempotency key: a second submit may be a second
    charge. The attributes are what is known, for a look at the account or a word with the service's support.

    Attributes:
        status_code: The HTTP status of the answer, or None if none arrived.
        headers: Those headers of the answer that identify it at the service; empty if none arrived.
        body: The first 4 KiB of what arrived of an answer.
        expected_credits: The credits that the submit costs if it was accepted, or None for a model without a price.
        attempt_id: The attempt in the journal, or None without a journal.
        endpoint: "/generate" or "/edit".
        sent_at: When it was sent, in seconds since 1970 (UTC), or None if it was not this process that sent it.
        request_sha256: The SHA-256 (hex) of what was asked for, in place of the prompts.
        last_step: The last step of the exchange that was begun, in the HTTP library's words, or None.
        credits_remaining: The credits in the account as of the last answer before it, or None.
    """

    status_code: int | None
    headers: dict[str, str]
    body: bytes
    expected_credits: int | None
    attempt_id: str | None
    endpoint: str | None
    sent_at: float | None
    request_sha256: str | None
    last_step: str | None
    credits_remaining: int | None

    def __init__(
        self,
        message: str,
        *,
        status_code: int | None = None,
        headers: dict[str, str] | None = None,
        body: bytes = b"",
        expected_credits: int | None = None,
        attempt_id: str | None = None,
        endpoint: str | None = None,
        sent_at: float | None = None,
        request_sha256: str | None = None,
        last_step: str | None = None,
        credits_remaining: int | None = None,
    ) -> None:
        super().__init__(message, credits=Credits.UNKNOWN)
        self.status_code = status_code
        self.headers = headers or {}
        self.body = body[:4096]
        self.expected_credits = expected_credits
        self.attempt_id = attempt_id
        self.endpoint = endpoint
        self.sent_at = sent_at
        self.request_sha256 = request_sha256
        self.last_step = last_step
        self.credits_remaining = credits_remaining


class PollInterruptedError(ConceptVizError):
    """Looking at a task kept failing. The task goes on at the service and can be taken up again by its id."""


class UnexpectedResponseError(ConceptVizError):
    """The service answered with something that is not the documented shape.

    Attributes:
        status_code: The HTTP status of the answer.
        body: The first 4 KiB of the answer.
    """

    status_code: int
    body: bytes

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        body: bytes = b"",
        task_id: str | None = None,
        credits: Credits = Credits.UNKNOWN,
    ) -> None:
        super().__init__(message, task_id=task_id, credits=credits)
        self.status_code = status_code
        self.body = body[:4096]


class APIStatusError(ConceptVizError):
    """The service refused a request with an HTTP error status.

    Source: "Error Handling".

    Attributes:
        status_code: The HTTP status.
        code: The service's own code, verbatim, or None if the answer held none.
        message: The service's own sentence, or None.
        body: The decoded answer, or None if it was not a JSON object.
        retry_after: Seconds the service asked to wait, or None if it did not say.
    """

    status_code: int
    code: str | None
    message: str | None
    body: Any
    retry_after: float | None

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        code: str | None = None,
        api_message: str | None = None,
        body: Any = None,
        retry_after: float | None = None,
        task_id: str | None = None,
        credits: Credits = Credits.NOT_SPENT,
    ) -> None:
        super().__init__(message, task_id=task_id, credits=credits)
        self.status_code = status_code
        self.code = code
        self.message = api_message
        self.body = body
        self.retry_after = retry_after


class BadRequestError(APIStatusError):
    """400, or another 4xx that has no class of its own: the service found the request wrong."""


class ModerationBlockedError(BadRequestError):
    """INPUT_MODERATION_BLOCKED: a prompt or an input image was blocked by the service's safety checks."""


class InvalidImageError(BadRequestError):
    """INVALID_IMAGE: the service could not use an input image."""


class AuthenticationError(APIStatusError):
    """401: the API key is missing, wrong or disabled."""


class InsufficientCreditsError(APIStatusError):
    """402: the account has not enough credits. Nothing was spent.

    Attributes:
        credits_remaining: The credits left, or None if the answer did not say.
    """

    credits_remaining: int | None

    def __init__(self, message: str, *, credits_remaining: int | None = None, **kwargs: Any) -> None:
        super().__init__(message, **kwargs)
        self.credits_remaining = credits_remaining


class PlanError(APIStatusError):
    """403: the account's plan does not allow the request. Nothing was spent."""


class PlanLimitExceededError(PlanError):
    """PLAN_LIMIT_EXCEEDED: the plan allows fewer prompts in one request."""


class TaskNotFoundError(APIStatusError):
    """404: the service knows no such task, or it belongs to another account."""


class RateLimitedError(APIStatusError):
    """429: too many requests in a short period. Nothing was spent; `retry_after` may say how long to wait."""


class ServerError(APIStatusError):
    """5xx: the service failed."""


class GenerationFailedError(ConceptVizError):
    """The task ended as failed.

    Source: "Response (failed)" and GENERATION_FAILED of "Error Codes".

    Attributes:
        code: The service's own code, verbatim, or None if the answer held none.
        message: The service's own sentence, or None.
        credits_refunded: True or False as the service said, None if it did not say.
    """

    code: str | None
    message: str | None
    credits_refunded: bool | None

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        api_message: str | None = None,
        credits_refunded: bool | None = None,
        task_id: str | None = None,
        credits: Credits = Credits.UNKNOWN,
    ) -> None:
        super().__init__(message, task_id=task_id, credits=credits)
        self.code = code
        self.message = api_message
        self.credits_refunded = credits_refunded


class WaitTimeoutError(ConceptVizError, TimeoutError):
    """We stopped waiting before the task ended. The task goes on, is paid for, and can be taken up by its id.

    Attributes:
        last_state: The task as it was last seen, or None if no look at it succeeded.
    """

    last_state: TaskState | None

    def __init__(self, message: str, *, task_id: str, last_state: TaskState | None = None) -> None:
        super().__init__(message, task_id=task_id, credits=Credits.SPENT)
        self.last_state = last_state


class JournalError(ConceptVizError):
    """The journal could not be read or written.

    Before a submit is sent this means that nothing is sent. After it was accepted, the error carries the receipt.

    Attributes:
        submission: The receipt of a paid task that could not be written down, or None if nothing was sent.
    """

    submission: Submission | None

    def __init__(self, message: str, *, submission: Submission | None = None) -> None:
        super().__init__(
            message,
            task_id=submission.task_id if submission else None,
            credits=Credits.SPENT if submission else Credits.NOT_SPENT,
        )
        self.submission = submission


class DownloadError(ConceptVizError):
    """An image could not be fetched, verified or written. The task and its image are paid for and still there.

    Attributes:
        url: Where the image was to be fetched from. It identifies an account: treat it as private.
        path: The file that was to be written, or None.
    """

    url: str
    path: Path | None

    def __init__(self, message: str, *, url: str, path: Path | None = None, task_id: str | None = None) -> None:
        super().__init__(message, task_id=task_id, credits=Credits.SPENT)
        self.url = url
        self.path = path
