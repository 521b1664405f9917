"""Requests become bytes.

Rules: only this module knows the JSON keys and form fields of requests, and only `_wire` those of answers. Pure.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from attrs import field, frozen

from . import _spec
from ._errors import InvalidRequestError
from ._images import ImageFormat

if TYPE_CHECKING:
    from ._requests import EditRequest, GenerateRequest

_TASK_ID = re.compile(_spec.TASK_ID_CHARACTERS)


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


def fingerprint(call: ApiCall) -> str:
    """Return the SHA-256 (hex) of what a submit asks for: the same request has the same, whatever its boundary."""
    digest = hashlib.sha256(call.path.encode())
    boundary = (call.content_type or "").partition("boundary=")[2].encode()
    for piece in call.body:
        digest.update(piece.removeprefix(b"--" + boundary) if boundary else piece)
    return digest.hexdigest()


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


def _settings(request: GenerateRequest | EditRequest) -> dict[str, str]:
    return {"aspectRatio" if name == "aspect_ratio" else name: value for name, value in request.settings.items()}


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
