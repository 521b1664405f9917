"""The API's wire format: requests become bytes, answers become values or errors.

Rules: this is the only module that knows a JSON key. It is pure: no clock, no socket, no file. Whatever bytes, JSON
and headers are given to a `parse_*`, it returns a value or raises a ConceptVizError.
"""

from __future__ import annotations

import base64
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from urllib.parse import quote

from attrs import field, frozen

from . import _refusals, _spec
from ._errors import (
    APIStatusError,
    Credits,
    GenerationFailedError,
    InsufficientCreditsError,
    InvalidRequestError,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    UnexpectedResponseError,
)
from ._images import ImageFormat
from ._json import count_or_none, flag_or_none, read_mapping, text_or_none
from ._matching import match_images
from ._models import EditRequest, GenerateRequest, Image, Result, Submission, TaskState

logger = logging.getLogger("conceptviz")

_TASK_ID = re.compile(_spec.TASK_ID_CHARACTERS)
# A task id in a body that is not as documented: the id of a paid task is worth more than the body's good form.
_SALVAGE = tuple(
    re.compile(rb'"%s"\s*:\s*"(%s)"' % (key, _spec.TASK_ID_CHARACTERS.encode())) for key in (b"taskId", b"task_id")
)
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
        is_base64: Whether `content` is base64 already, as a JSON edit needs it: then nobody keeps the bytes themselves.
    """

    content: bytes = field(repr=False)
    format: ImageFormat
    is_base64: bool = False


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
    code = text_or_none(data.get("code"))
    if not _refusals.is_refusal(code, status):
        expected = request.expected_credits
        raise SubmissionUnknownError(
            "The submit was answered without the id of a task "
            f"({_refusals.quoted(text_or_none(data.get('error')), code, status)}). "
            f"{_refusals.may_be_charged(expected)}",
            status_code=status,
            body=answer.body,
            expected_credits=expected,
        )
    if code == _spec.GENERATION_FAILED:
        raise _failed_at_once(data, status)
    raise parse_error(answer)


def unanswered_submission(reason: str, partial: Answer | None, request: GenerateRequest | EditRequest) -> Submission:
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
        body=partial.body if partial else b"",
        expected_credits=expected,
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
    """Return the id of the task that an answer to a submit names, wherever it stands, or None."""
    for value in (data.get("taskId"), data.get("task_id")):
        if isinstance(value, str) and 0 < len(value) <= 512 and value not in {".", ".."}:
            return value
    if text_or_none(data.get("code")) in _spec.ERROR_CODES:
        # A refusal that was read whole: an id somewhere inside it is some other task's.
        return None
    # Without the zero bytes, UTF-16 is readable too.
    text = body.replace(b"\0", b"")
    found = next(filter(None, (pattern.search(text) for pattern in _SALVAGE)), None)
    return found[1].decode() if found else None


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
            yield image.content if image.is_base64 else base64.b64encode(image.content)
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
