"""What a refusal means: the class of its error, what became of the credits, what to do next and when.

What lives here: pure tables and sentences, over values that `_wire` has read from an answer. What must never live here:
a JSON key, I/O.

Source: "Error Handling", "Error Codes".
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ._errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    Credits,
    InsufficientCreditsError,
    InvalidImageError,
    ModerationBlockedError,
    PlanError,
    PlanLimitExceededError,
    RateLimitedError,
    ServerError,
    TaskNotFoundError,
)
from ._spec import ERROR_CODES

# Without a documented code these may come from a gateway behind which the request went on: they refuse nothing.
_FROM_A_GATEWAY = frozenset({408, 409, 425})
# A `Retry-After` beyond this is read as this: it is never waited for, and no sum with it overflows.
_LONGEST_PAUSE = 1e9

_BY_CODE: dict[str, type[APIStatusError]] = {
    "INPUT_MODERATION_BLOCKED": ModerationBlockedError,
    "INVALID_IMAGE": InvalidImageError,
    "PLAN_LIMIT_EXCEEDED": PlanLimitExceededError,
}
_BY_STATUS: dict[int, type[APIStatusError]] = {
    401: AuthenticationError,
    402: InsufficientCreditsError,
    403: PlanError,
    404: TaskNotFoundError,
    429: RateLimitedError,
}
_ADVICE = {
    "INVALID_BODY": "The SDK or something on the way garbled it: report it if it happens again.",
    "IMAGE_REQUIRED": "Give one to four images.",
    "INVALID_IMAGE": "Give PNG, JPEG or WebP files of at most 20 MB, or URLs that anyone can fetch.",
    "PROMPT_REQUIRED": "Give a prompt.",
    "TOO_MANY_IMAGES": "Give at most four images in one edit.",
    "TOO_MANY_PROMPTS": "Give at most four prompts in one request.",
    "UNSUPPORTED_MODEL": "The API page lists cv-2 and cv-1.",
    "UNAUTHORIZED": "Give the key as api_key= or in CONCEPTVIZ_API_KEY.",
    "INVALID_API_KEY": "The key is wrong, disabled, or was replaced: see Settings > API Keys.",
    "INSUFFICIENT_CREDITS": "Add credits to the account, or ask for fewer or cheaper images.",
    "PLAN_REQUIRED": "API access needs a Pro plan or higher.",
    "QUALITY_NOT_ALLOWED": "Ask for a lower quality, or for a plan that has this one.",
    "PLAN_LIMIT_EXCEEDED": "Submit fewer prompts in one request.",
    "TASK_NOT_FOUND": "The id is wrong, or the task belongs to the account of another API key.",
    "MODERATION_RATE_LIMITED": "Wait a little, and submit more slowly.",
    "INPUT_MODERATION_BLOCKED": "Change the prompt or the image.",
    "CREDIT_CONSUMPTION_FAILED": "Try again later.",
    "GENERATION_FAILED": "It can be submitted again.",
}
_ADVICE_BY_CLASS: dict[type[APIStatusError], str] = {
    BadRequestError: "Change the request before you submit it again.",
    AuthenticationError: "Check the API key: see Settings > API Keys.",
    InsufficientCreditsError: _ADVICE["INSUFFICIENT_CREDITS"],
    PlanError: "Check what the account's plan allows, and whether something on the way blocks the API.",
    TaskNotFoundError: "Check the base URL.",
    RateLimitedError: _ADVICE["MODERATION_RATE_LIMITED"],
    ServerError: "Try again later.",
}


def is_refusal(code: str | None, status: int) -> bool:
    """Say whether an answer to a submit refuses it for certain, so that nothing was charged.

    A success that names no task, a redirect, and a gateway's or a server's error refuse nothing: behind them the submit
    may have been accepted.
    """
    if code in ERROR_CODES:
        return status >= 400
    return 400 <= status < 500 and status not in _FROM_A_GATEWAY


def error_class(code: str | None, status: int) -> type[APIStatusError] | None:
    """Return the class of an error, by its code first and by its status second; None if the status is no refusal."""
    if code not in ERROR_CODES and (status < 400 or status in _FROM_A_GATEWAY):
        return None
    status = ERROR_CODES.get(code or "", status)
    by_family = ServerError if status >= 500 else BadRequestError
    return _BY_CODE.get(code or "") or _BY_STATUS.get(status, by_family)


def advice(code: str | None, cls: type[APIStatusError], task_id: str | None) -> str:
    """Say what to do next."""
    if code in ERROR_CODES:
        return _ADVICE[code or ""]
    return "Take the task up again by its id later." if task_id else _ADVICE_BY_CLASS[cls]


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a `Retry-After` header asks to wait, or None if it is absent, past or unreadable.

    A date is measured against the answer's own `Date`, so that a wrong local clock does no harm.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", value, re.ASCII):
        return min(float(value), _LONGEST_PAUSE)
    if not value:
        return None
    from email.utils import parsedate_to_datetime  # hardly any service sends a date

    try:
        seconds = (parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])).total_seconds()
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return None
    return min(seconds, _LONGEST_PAUSE) if seconds > 0 else None


def quoted(message: str | None, code: str | None, status: int | None = None) -> str:
    """Quote the service: its sentence, its code and the HTTP status, as far as there are any, on one short line."""
    sentence = " ".join((message or "").split()) or "no readable message"
    parts = [sentence[:500], (code or "")[:100], f"HTTP {status}" if status else ""]
    return ", ".join(filter(None, parts))


def refund(credits_refunded: bool | None) -> tuple[str, Credits]:
    """Say what became of the credits of a failed task: what the service said, and nothing inferred."""
    if credits_refunded is None:
        return "The service did not say whether the credits were refunded.", Credits.UNKNOWN
    if credits_refunded:
        return "The service says that the credits were refunded.", Credits.REFUNDED
    return "The service says that the credits were not refunded.", Credits.SPENT


def may_be_charged(expected_credits: int | None) -> str:
    """Say what an unreadable answer to a submit means for the credits, and what to do."""
    cost = "its credits" if expected_credits is None else f"{expected_credits} credits"
    return (
        f"It may have been accepted and {cost} charged, so it is not sent again by itself. Compare the credits in your "
        "account before you submit it again."
    )
