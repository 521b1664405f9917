"""The API's answers become values or errors.

Rules: only this module knows the JSON keys of answers, and only `_calls` those of requests. It is pure: no clock,
no socket, no file. Whatever bytes, JSON and headers are given to a `parse_*`, it returns a value or raises a
ConceptVizError.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attrs import evolve, field, frozen

from . import _refusals, _spec
from ._errors import (
    APIStatusError,
    Credits,
    GenerationFailedError,
    InsufficientCreditsError,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    UnexpectedResponseError,
)
from ._json import count_or_none, flag_or_none, read_mapping, text_or_none
from ._matching import match_images
from ._models import Image, Result, Submission, TaskState

if TYPE_CHECKING:
    from ._requests import EditRequest, GenerateRequest

logger = logging.getLogger("conceptviz")

# A task id in a body that is not as documented: the id of a paid task is worth more than the body's good form.
_SALVAGE = re.compile(rb'"task(?:Id|_id)"\s*:\s*"(%s)"' % _spec.TASK_ID_CHARACTERS.encode())
_IDENTIFYING_HEADERS = frozenset({"cf-ray", "content-type", "date", "location", "server", "x-request-id"})
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@frozen
class Answer:
    """An answer of the API, read to its end.

    Attributes:
        status_code: The HTTP status.
        headers: The headers, names in lower case.
        body: The body, decoded from any content encoding.
    """

    status_code: int
    headers: Mapping[str, str] = field(factory=dict)
    body: bytes = field(default=b"", repr=False)


def parse_submission(answer: Answer, request: GenerateRequest | EditRequest) -> Submission:
    """Read the answer to a submit.

    A task id in an answer of any status means that the task exists and is paid for; without one, only a documented
    refusal means that nothing was charged.

    Source: "Response" of "Step 1: Submit Generation Request" and of "Edit Images"; "Error Codes".

    Raises:
        APIStatusError: The service refused the request: nothing was spent.
        GenerationFailedError: HTTP 500 GENERATION_FAILED, documented as refunded.
        SubmissionUnknownError: It cannot be told whether the request was accepted.
    """
    data, status = read_mapping(answer.body), answer.status_code
    task_id = _find_task_id(data, answer.body)
    if task_id is not None:
        salvaged = task_id not in (data.get("taskId"), data.get("task_id"))
        if salvaged or not 200 <= status < 300:
            logger.warning(
                "A submit was answered with HTTP %d and not as documented, but the answer names task %s: it counts as "
                "accepted and paid for.",
                status,
                task_id,
            )
        return read_receipt(task_id, request.prompts, data)
    code = text_or_none(data.get("code"))
    if not _refusals.is_refusal(code, status):
        expected = request.expected_credits
        raise SubmissionUnknownError(
            "The submit was answered without the id of a task "
            f"({_refusals.quoted(text_or_none(data.get('error')), code, status)}). "
            f"{_refusals.may_be_charged(expected)}",
            status_code=status,
            headers=_identifying(answer),
            body=answer.body,
            expected_credits=expected,
        )
    if code == _spec.GENERATION_FAILED:
        raise _failed_at_once(data, status)
    raise parse_error(answer)


def read_receipt(task_id: str, prompts: Sequence[str], data: Mapping[str, Any]) -> Submission:
    """Read a receipt: from the answer to a submit, or from what the journal has kept of it.

    Source: "Response" of "Step 1: Submit Generation Request" and of "Edit Images".
    """
    return Submission(
        task_id=task_id,
        status=_word(data.get("status")) or "pending",
        model=_word(data.get("model")),
        quality=_word(data.get("quality")),
        aspect_ratio=_word(data.get("aspect_ratio")),
        credits_used=count_or_none(data.get("credits_used")),
        credits_remaining=count_or_none(data.get("credits_remaining")),
        prompts=tuple(prompts),
        raw=data,
    )


def read_state(task_id: str, prompts: Sequence[str], data: Mapping[str, Any]) -> TaskState:
    """Read a task's state: from the answer to a look, or from what the journal has kept of it.

    Source: "Step 2: Poll for Results".
    """
    status = _word(data.get("status")) or ""
    # A terminal status is recognised however it is cased: to miss one is to wait for a task that has ended.
    if status.lower() in _spec.TERMINAL_STATUSES:
        status = status.lower()
    images = data.get("images")
    return TaskState(
        task_id=task_id,
        status=status,
        images=_images(images, task_id, prompts) if isinstance(images, list) else (),
        error=text_or_none(data.get("error")),
        code=text_or_none(data.get("code")),
        credits_refunded=flag_or_none(data.get("credits_refunded")),
        raw=data,
    )


def unanswered_submission(
    reason: str, partial: Answer | None, request: GenerateRequest | EditRequest, last_step: str | None = None
) -> Submission:
    """Read what is known of a submit that was sent but whose answer did not arrive whole.

    Raises:
        SubmissionUnknownError: What arrived holds no task id.
    """
    if partial is not None and _find_task_id(read_mapping(partial.body), partial.body) is not None:
        return parse_submission(partial, request)
    expected = request.expected_credits
    raise SubmissionUnknownError(
        f"The submit was sent, but {reason} before an answer was read. {_refusals.may_be_charged(expected)}",
        status_code=partial.status_code if partial else None,
        headers=_identifying(partial) if partial else None,
        body=partial.body if partial else b"",
        expected_credits=expected,
        last_step=last_step,
    )


def _word(value: object) -> str | None:
    """Read one of the service's few words, and keep it once for any number of tasks."""
    return sys.intern(value) if isinstance(value, str) and len(value) < 32 else text_or_none(value)


def _identifying(answer: Answer) -> dict[str, str]:
    """Return the headers by which a service's support can find an exchange again, and no others."""
    return {name: value[:200] for name, value in answer.headers.items() if name in _IDENTIFYING_HEADERS}


def parse_task(answer: Answer, task_id: str, prompts: Sequence[str] = ()) -> TaskState:
    """Read the answer to a look at a task.

    Source: "Step 2: Poll for Results"; "Error Codes".

    Args:
        answer: The answer.
        task_id: The task that was asked for.
        prompts: The prompts that were submitted, if they are known, to match the images with.

    Raises:
        APIStatusError: The service answered with an error status.
        UnexpectedResponseError: The answer is not the documented shape.
    """
    data = read_mapping(answer.body)
    # A body that is an error's is one, whatever the HTTP status: there is nothing in it to wait for.
    is_error = "status" not in data and text_or_none(data.get("code")) in _spec.ERROR_CODES
    if is_error or not 200 <= answer.status_code < 300:
        raise parse_error(answer, task_id)
    if not data:
        raise UnexpectedResponseError(
            f"A look at task {task_id} was answered without a readable JSON object. The task itself goes on and is "
            "paid for: look again later.",
            status_code=answer.status_code,
            body=answer.body,
            task_id=task_id,
            credits=Credits.SPENT,
        )
    return read_state(task_id, prompts, data)


def failed_state(error: ServerError, task_id: str) -> TaskState:
    """Read an HTTP 500 GENERATION_FAILED, answered to look after look, as the end of the task.

    Source: "Error Codes", where GENERATION_FAILED is an HTTP 500; "Response (failed)", where it is not.
    """
    data = error.body if isinstance(error.body, dict) else {}
    return evolve(read_state(task_id, (), data), status=_spec.STATUS_FAILED, error=error.message, code=error.code)


def build_result(state: TaskState, submission: Submission | None) -> Result:
    """Make the result of a task that has ended.

    Source: "Response (completed)" and "Response (failed)"; "Error Codes".

    Raises:
        GenerationFailedError: It ended as failed.
        APIStatusError: It ended as failed with another documented code, such as ModerationBlockedError.
    """
    if state.status == _spec.STATUS_FAILED:
        raise _failure(state)
    prompts = submission.prompts if submission else ()
    found = {image.index for image in state.images}
    return Result(
        task_id=state.task_id,
        images=state.images,
        submission=submission,
        missing_prompts=tuple(prompt for n, prompt in enumerate(prompts) if n not in found),
    )


def parse_error(answer: Answer, task_id: str | None = None) -> APIStatusError | UnexpectedResponseError:
    """Return the error that an answer stands for: by its code first, by its status second.

    Source: "Error Handling", "Error Codes".

    Args:
        answer: An answer that is not a success.
        task_id: The task that was asked for; None if the answer refuses a submit.
    """
    data, status = read_mapping(answer.body), answer.status_code
    code, message = text_or_none(data.get("code")), text_or_none(data.get("error"))
    cls = _refusals.error_class(code, status)
    if task_id is None:
        spent, credits = "Nothing was spent.", Credits.NOT_SPENT
    elif cls is TaskNotFoundError:
        spent, credits = f"Whether task {task_id} was paid for is not known.", Credits.UNKNOWN
    else:
        spent, credits = f"Task {task_id} itself is paid for and keeps its id.", Credits.SPENT
    if cls is None:
        return UnexpectedResponseError(
            f"The service answered in a way that is not documented ({_refusals.quoted(message, code, status)}), and "
            f"that is not followed. {spent} Look again later.",
            status_code=status,
            body=answer.body,
            task_id=task_id,
            credits=credits,
        )
    left, after = count_or_none(data.get("credits_remaining")), _refusals.parse_retry_after(answer.headers)
    if after is not None:
        spent = f"The service asks to wait {after:g} s. {spent}"
    details: dict[str, Any] = {}
    if cls is InsufficientCreditsError:
        details["credits_remaining"] = left
        spent = spent if left is None else f"{left} credits are left. {spent}"
    return cls(
        f"The service refused the request ({_refusals.quoted(message, code, status)}). {spent} "
        f"{_refusals.advice(code, cls, task_id)}",
        status_code=status,
        code=code,
        api_message=message,
        body=data or None,
        retry_after=after,
        task_id=task_id,
        credits=credits,
        **details,
    )


def _find_task_id(data: Mapping[str, Any], body: bytes) -> str | None:
    """Return the id of the task that an answer to a submit names, wherever it stands, or None.

    Of two different ids in a body that is not as documented neither is taken: to wait for another's task is worse than
    to say that nobody knows.
    """
    for value in (data.get("taskId"), data.get("task_id")):
        if isinstance(value, str) and 0 < len(value) <= 512 and value not in {".", ".."}:
            return value
    if text_or_none(data.get("code")) in _spec.ERROR_CODES:
        # A refusal that was read whole: an id somewhere inside it is some other task's.
        return None
    # Without the zero bytes, UTF-16 is readable too.
    found = set(_SALVAGE.findall(body.replace(b"\0", b"")))
    return found.pop().decode() if len(found) == 1 else None


def _failed_at_once(data: Mapping[str, Any], status: int) -> GenerationFailedError:
    """Source: "Error Codes": GENERATION_FAILED, "credits auto-refunded"."""
    message, refunded = text_or_none(data.get("error")), flag_or_none(data.get("credits_refunded"))
    said, credits = _refusals.refund(refunded)
    if refunded is None:
        said, credits = "The API page says that the credits are refunded.", Credits.REFUNDED
    return GenerationFailedError(
        f"The service could not generate ({_refusals.quoted(message, _spec.GENERATION_FAILED, status)}). {said} There "
        "is no task id to look it up by. It can be submitted again.",
        code=_spec.GENERATION_FAILED,
        api_message=message,
        credits_refunded=refunded,
        credits=credits,
    )


def _failure(state: TaskState) -> GenerationFailedError | APIStatusError:
    """Return the error of a task that ended as failed: by its code, which may be any of the documented ones."""
    code, message = state.code, state.error
    said, credits = _refusals.refund(state.credits_refunded)
    happened = f"Task {state.task_id} ended as failed ({_refusals.quoted(message, code)}). {said}"
    if code is not None and code != _spec.GENERATION_FAILED and code in _spec.ERROR_CODES:
        status = _spec.ERROR_CODES[code]
        cls = _refusals.error_class(code, status)
        assert cls is not None  # each documented code has a class
        return cls(
            f"{happened} {_refusals.advice(code, cls, state.task_id)}",
            status_code=status,
            code=code,
            api_message=message,
            body=dict(state.raw),
            task_id=state.task_id,
            credits=credits,
        )
    return GenerationFailedError(
        f"{happened} It can be submitted again.",
        code=code,
        api_message=message,
        credits_refunded=state.credits_refunded,
        task_id=state.task_id,
        credits=credits,
    )


def _images(items: Sequence[Any], task_id: str, prompts: Sequence[str]) -> tuple[Image, ...]:
    images = [
        Image(
            url=item["url"],
            prompt=text_or_none(item.get("prompt")) or "",
            sha256=hash_.lower() if _HASH.fullmatch(hash_ := text_or_none(item.get("imageHash")) or "") else None,
            raw=item,
            task_id=task_id,
        )
        for item in items
        if isinstance(item, dict) and text_or_none(item.get("url"))
    ]
    return match_images(images, prompts)
