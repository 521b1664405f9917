"""The API's wire format: requests become bytes, answers become values or errors.

Rules: this is the only module that knows a JSON key. It is pure: no clock, no socket, no file. Whatever bytes, JSON
and headers are given to a `parse_*`, it returns a value or raises a ConceptVizError.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

from attrs import field, frozen

from . import _spec
from ._errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ConceptVizError,
    Credits,
    GenerationFailedError,
    InsufficientCreditsError,
    InvalidImageError,
    InvalidRequestError,
    ModerationBlockedError,
    PlanError,
    PlanLimitExceededError,
    RateLimitedError,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    UnexpectedResponseError,
)
from ._images import ImageFormat
from ._json import count_or_none, flag_or_none, read_mapping, text_or_none
from ._matching import match_images
from ._models import EditRequest, GenerateRequest, Image, Result, Submission, TaskState

_TASK_ID = re.compile(_spec.TASK_ID_CHARACTERS)
# A task id in a body that is otherwise unreadable: the id of a paid task is worth more than the body's good form.
_SALVAGE = re.compile(rb'"task(?:I|_i)d"\s*:\s*"(' + _spec.TASK_ID_CHARACTERS.encode() + rb')"')
_HASH = re.compile(r"[0-9a-fA-F]{64}")


@frozen
class ApiCall:
    """A request to the API, ready to be sent.

    Attributes:
        method: "GET" or "POST".
        path: The path below the base URL.
        content_type: The body's media type, or None without a body.
        body: The body's bytes in pieces, so that large images are never joined into a second copy.
    """

    method: str
    path: str
    content_type: str | None = None
    body: tuple[bytes, ...] = field(default=(), repr=False)

    @property
    def content_length(self) -> int:
        """The size of the body in bytes."""
        return sum(map(len, self.body))


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


@frozen
class ImageFile:
    """An image that was read and checked, ready to be uploaded.

    Attributes:
        content: Its bytes.
        format: What its leading bytes say it is.
    """

    content: bytes = field(repr=False)
    format: ImageFormat


def build_generate(request: GenerateRequest) -> ApiCall:
    """Build POST /generate; settings are on the wire only if they were given.

    Source: "Step 1: Submit Generation Request".
    """
    prompts = request.prompts
    payload: dict[str, Any] = {"prompt": prompts[0]} if len(prompts) == 1 else {"prompts": list(prompts)}
    payload |= _settings(request)
    return ApiCall("POST", _spec.GENERATE_PATH, "application/json", (_dump(payload),))


def build_edit(request: EditRequest, images: Sequence[ImageFile | str], *, boundary: str) -> ApiCall:
    """Build POST /edit: multipart if every image is a file, JSON with data URLs for the files if any is a URL.

    Source: "JSON Request Body" and "Multipart Upload" of "Edit Images".

    Args:
        request: The edit; its own `images` are not looked at.
        images: Those images, as read: files, or URLs.
        boundary: A multipart boundary that no image holds: 32 random hex digits.
    """
    fields = {"prompt": request.prompt} | _settings(request)
    files = [image for image in images if isinstance(image, ImageFile)]
    if len(files) < len(images):
        return ApiCall("POST", _spec.EDIT_PATH, "application/json", tuple(_json_edit(fields, images)))
    body = tuple(_multipart_edit(fields, files, boundary))
    return ApiCall("POST", _spec.EDIT_PATH, f"multipart/form-data; boundary={boundary}", body)


def build_look(task_id: str) -> ApiCall:
    """Build GET /task/{taskId} from the id alone: the `poll_url` of an answer is never followed.

    Source: "Step 2: Poll for Results".
    """
    if task_id in {"", ".", ".."}:
        raise InvalidRequestError(f"{task_id!r} is not a task id. Nothing was sent.")
    return ApiCall("GET", _spec.TASK_PATH + quote(task_id, safe="", errors="replace"))


def check_task_id(task_id: object) -> str:
    """Return a caller's task id if it can be one.

    Raises:
        InvalidRequestError: It cannot: 1 to 128 of the letters A-Z, a-z, 0-9, "_" and "-" are expected.
    """
    if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id):
        shown = repr(task_id) if len(repr(task_id)) <= 80 else repr(task_id)[:77] + "..."
        raise InvalidRequestError(
            f"{shown} is not a task id: 1 to 128 of A-Z, a-z, 0-9, '_' and '-' are expected. Nothing was sent."
        )
    return task_id


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
    data = read_mapping(answer.body)
    task_id = data.get("taskId") or data.get("task_id")
    if not isinstance(task_id, str) or len(task_id) > 512 or task_id in {".", ".."}:
        salvaged = _SALVAGE.search(answer.body)
        task_id = salvaged[1].decode() if salvaged else None
    if task_id:
        return Submission(
            task_id=task_id,
            status=text_or_none(data.get("status")) or "pending",
            model=text_or_none(data.get("model")),
            quality=text_or_none(data.get("quality")),
            aspect_ratio=text_or_none(data.get("aspect_ratio")),
            credits_used=count_or_none(data.get("credits_used")),
            credits_remaining=count_or_none(data.get("credits_remaining")),
            prompts=request.prompts,
            raw=data,
        )
    status, code = answer.status_code, text_or_none(data.get("code"))
    if code == _spec.GENERATION_FAILED:
        raise GenerationFailedError(
            f"The service could not generate ({_said(data, code, status)}). The API page says that the credits were "
            "refunded; the answer held no task id to check it by. It can be submitted again.",
            code=code,
            api_message=text_or_none(data.get("error")),
            credits_refunded=flag_or_none(data.get("credits_refunded")),
            credits=Credits.REFUNDED,
        )
    # 408 and 409 may come from a gateway behind which the request went on.
    if code in _spec.ERROR_CODES or (400 <= status < 500 and status not in {408, 409}):
        raise parse_error(answer, credits=Credits.NOT_SPENT)
    expected = request.expected_credits
    raise SubmissionUnknownError(
        f"The submit was answered with HTTP {status} but without a task id ({_said(data, code, status)}). "
        f"{_may_be_charged(expected)}",
        status_code=status,
        body=answer.body,
        expected_credits=expected,
    )


def unanswered_submission(reason: str, partial: Answer | None, request: GenerateRequest | EditRequest) -> Submission:
    """Read what is known of a submit that was sent but whose answer did not arrive whole.

    Raises:
        SubmissionUnknownError: What arrived holds no task id.
    """
    if partial is not None and _SALVAGE.search(partial.body):
        return parse_submission(partial, request)
    expected = request.expected_credits
    raise SubmissionUnknownError(
        f"The submit was sent, but {reason} before an answer was read. {_may_be_charged(expected)}",
        status_code=partial.status_code if partial else None,
        body=partial.body if partial else b"",
        expected_credits=expected,
    )


def _may_be_charged(expected: int | None) -> str:
    cost = "its credits" if expected is None else f"{expected} credits"
    return (
        f"It may have been accepted and {cost} charged, so it is not sent again by itself. Compare the credits in your "
        "account before you submit it again."
    )


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
    if not 200 <= answer.status_code < 300:
        raise parse_error(answer, credits=Credits.SPENT, task_id=task_id)
    data = read_mapping(answer.body)
    if not data:
        raise UnexpectedResponseError(
            f"A look at task {task_id} was answered with something that is not a JSON object. The task itself goes on "
            "and is paid for; look again later.",
            status_code=answer.status_code,
            body=answer.body,
            task_id=task_id,
            credits=Credits.SPENT,
        )
    status = text_or_none(data.get("status")) or ""
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


def failed_state(error: ServerError, task_id: str) -> TaskState:
    """Read an HTTP 500 GENERATION_FAILED, answered to look after look, as the end of the task.

    Source: "Error Codes", where GENERATION_FAILED is an HTTP 500; "Response (failed)", where it is not.
    """
    data = error.body if isinstance(error.body, dict) else {}
    refunded = flag_or_none(data.get("credits_refunded"))
    return TaskState(task_id, _spec.STATUS_FAILED, (), error.message, error.code, refunded, raw=data)


def build_result(state: TaskState, submission: Submission | None) -> Result:
    """Make the result of a task that has ended.

    Source: "Response (completed)" and "Response (failed)".

    Raises:
        GenerationFailedError: It ended as failed.
        ModerationBlockedError: It ended as failed because the service's safety checks blocked it.
    """
    if state.status == _spec.STATUS_FAILED:
        refund = {
            True: "The service says that the credits were refunded.",
            False: "The service says that the credits were not refunded.",
            None: "The service did not say whether the credits were refunded.",
        }[state.credits_refunded]
        credits = {True: Credits.REFUNDED, False: Credits.SPENT, None: Credits.UNKNOWN}[state.credits_refunded]
        said = _said({"error": state.error}, state.code, None)
        if state.code == "INPUT_MODERATION_BLOCKED":
            raise ModerationBlockedError(
                f"Task {state.task_id} was blocked by the service's safety checks ({said}). {refund} "
                f"{_ADVICE['INPUT_MODERATION_BLOCKED']}",
                status_code=_spec.ERROR_CODES["INPUT_MODERATION_BLOCKED"],
                code=state.code,
                api_message=state.error,
                body=dict(state.raw),
                task_id=state.task_id,
                credits=credits,
            )
        raise GenerationFailedError(
            f"Task {state.task_id} ended as failed ({said}). {refund} It can be submitted again.",
            code=state.code,
            api_message=state.error,
            credits_refunded=state.credits_refunded,
            task_id=state.task_id,
            credits=credits,
        )
    prompts = submission.prompts if submission else ()
    found = {image.index for image in state.images}
    return Result(
        task_id=state.task_id,
        images=state.images,
        submission=submission,
        missing_prompts=tuple(prompt for n, prompt in enumerate(prompts) if n not in found),
    )


_CODE_CLASSES: dict[str, type[APIStatusError]] = {
    "INPUT_MODERATION_BLOCKED": ModerationBlockedError,
    "INVALID_IMAGE": InvalidImageError,
    "INSUFFICIENT_CREDITS": InsufficientCreditsError,
    "PLAN_LIMIT_EXCEEDED": PlanLimitExceededError,
}
_STATUS_CLASSES: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    402: InsufficientCreditsError,
    403: PlanError,
    404: TaskNotFoundError,
    429: RateLimitedError,
}
_ADVICE = {
    "INVALID_IMAGE": "Give PNG, JPEG or WebP files of at most 20 MB, or URLs that anyone can fetch.",
    "UNSUPPORTED_MODEL": "The API page lists cv-2 and cv-1.",
    "UNAUTHORIZED": "Give the key as api_key= or in CONCEPTVIZ_API_KEY.",
    "INVALID_API_KEY": "The key is wrong, disabled, or was replaced: see Settings > API Keys.",
    "INSUFFICIENT_CREDITS": "Add credits to the account, or ask for fewer or cheaper images.",
    "PLAN_REQUIRED": "API access needs a Pro plan or higher.",
    "QUALITY_NOT_ALLOWED": "Ask for a lower quality, or for a plan that has this one.",
    "PLAN_LIMIT_EXCEEDED": "Submit fewer prompts in one request.",
    "TASK_NOT_FOUND": "The id is wrong, or the task belongs to the account of another API key.",
    "MODERATION_RATE_LIMITED": "Wait a little and submit more slowly.",
    "INPUT_MODERATION_BLOCKED": "Change the prompt or the image.",
    "CREDIT_CONSUMPTION_FAILED": "Try again later.",
}


def parse_error(answer: Answer, *, credits: Credits, task_id: str | None = None) -> ConceptVizError:
    """Return the error that an error status stands for: by its code first, by its status second.

    Source: "Error Handling", "Error Codes".

    Args:
        answer: An answer that is not a success.
        credits: What is known of the credits: of this submit, or of the task that was asked for.
        task_id: The task that was asked for, if any.
    """
    data, status = read_mapping(answer.body), answer.status_code
    code = text_or_none(data.get("code"))
    family = _spec.ERROR_CODES.get(code or "", status)
    cls = _CODE_CLASSES.get(code or "") or _STATUS_CLASSES.get(family)
    if cls is None:
        cls = ServerError if family >= 500 else BadRequestError if family >= 400 else None
    if cls is None:
        return UnexpectedResponseError(
            f"The service answered with HTTP {status}, which is not documented, and which is not followed.",
            status_code=status,
            body=answer.body,
            task_id=task_id,
            credits=credits,
        )
    spent = {
        Credits.NOT_SPENT: "Nothing was spent.",
        Credits.SPENT: f"Task {task_id} itself is paid for and keeps its id.",
    }.get(credits, "Whether credits were spent is not known.")
    extra: dict[str, Any] = {}
    if cls is InsufficientCreditsError:
        extra["credits_remaining"] = left = count_or_none(data.get("credits_remaining"))
        spent = spent if left is None else f"{left} credits are left. {spent}"
    elif cls is RateLimitedError:
        extra["retry_after"] = after = parse_retry_after(answer.headers)
        spent = spent if after is None else f"The service asks to wait {after:g} s. {spent}"
    advice = _ADVICE.get(code or "", "")
    return cls(
        f"The service refused the request ({_said(data, code, status)}). {spent} {advice}".rstrip(),
        status_code=status,
        code=code,
        api_message=text_or_none(data.get("error")),
        body=data or None,
        task_id=task_id,
        credits=credits,
        **extra,
    )


def parse_retry_after(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that a `Retry-After` header asks to wait, or None if it is absent, past or unreadable.

    A date is measured against the answer's own `Date`, so that a wrong local clock does no harm.
    """
    value = headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value, re.ASCII):
        return float(value)
    try:
        seconds = (parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])).total_seconds()
    except (ValueError, TypeError, KeyError, IndexError, OverflowError):
        return None
    return seconds if seconds > 0 else None


def _said(data: Mapping[str, Any], code: str | None, status: int | None) -> str:
    """Quote the service: its sentence, its code and the HTTP status, as far as there are any."""
    sentence = (text_or_none(data.get("error")) or "no readable message")[:500]
    return ", ".join(filter(None, [sentence, code, f"HTTP {status}" if status else None]))


def _settings(request: GenerateRequest | EditRequest) -> dict[str, str]:
    settings = {"model": request.model, "quality": request.quality, "aspectRatio": request.aspect_ratio}
    return {key: str(value) for key, value in settings.items() if value is not None}


def _dump(payload: Mapping[str, Any]) -> bytes:
    return json.dumps(payload, ensure_ascii=False, separators=(",", ":")).encode()


def _json_edit(fields: Mapping[str, str], images: Sequence[ImageFile | str]) -> Iterable[bytes]:
    """Write the JSON edit with the images in pieces of their own: base64 needs no escaping."""
    yield _dump(fields)[:-1] + b',"images":['
    for n, image in enumerate(images):
        comma = b"," if n else b""
        if isinstance(image, str):
            yield comma + json.dumps(image).encode()
        else:
            yield comma + b'"data:' + image.format.media_type.encode() + b";base64,"
            yield base64.b64encode(image.content)
            yield b'"'
    yield b"]}"


def _multipart_edit(fields: Mapping[str, str], files: Sequence[ImageFile], boundary: str) -> Iterable[bytes]:
    """Write the multipart edit. File names are ours: a caller's could carry line breaks into a part's header."""
    start = b"--" + boundary.encode() + b'\r\nContent-Disposition: form-data; name="'
    for name, value in fields.items():
        yield start + name.encode() + b'"\r\n\r\n' + value.encode() + b"\r\n"
    for n, file in enumerate(files, 1):
        filename = f"image-{n}{file.format.extension}".encode()
        kind = file.format.media_type.encode()
        yield start + b'image"; filename="' + filename + b'"\r\nContent-Type: ' + kind + b"\r\n\r\n"
        yield file.content
        yield b"\r\n"
    yield b"--" + boundary.encode() + b"--\r\n"


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
