"""Images to edit: read once, in a worker thread, and checked before anything is sent.

What lives here: from what a caller calls an image to an `ImageFile` or a URL that is worth sending. What must never
live here: HTTP, a JSON key, a file access on the event loop.
"""

from __future__ import annotations

import base64
import binascii
import logging
import os
import re
import secrets
import stat
from pathlib import Path
from urllib.parse import urlsplit

from anyio import to_thread

from . import _calls, _images
from ._calls import ApiCall, ImageFile
from ._errors import InvalidRequestError
from ._requests import EditRequest, ImageInput
from ._spec import IMAGE_BYTES_LIMIT, IMAGE_BYTES_WARN

logger = logging.getLogger("conceptviz")

_DATA_URL = re.compile(r"data:(image/[a-z0-9.+-]+);base64,", re.IGNORECASE)
# Where the platform has them: do not wait for a FIFO's writer, do not leak into a child.
_OPEN_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)


async def build_edit_call(request: EditRequest) -> ApiCall:
    """Read the images of an edit and build its POST, in a worker thread: a slow disk never stalls the event loop.

    Raises:
        InvalidRequestError: An image is missing, empty, too large or not an image. Nothing was sent.
    """
    return await to_thread.run_sync(_build, request)


def _build(request: EditRequest) -> ApiCall:
    # A str is a URL here, and with a URL the edit goes as JSON.
    is_json = any(isinstance(image, str) for image in request.images)
    images = [_read(image, f"Image {n}", is_json) for n, image in enumerate(request.images, 1)]
    return _calls.build_edit(request, images, boundary=secrets.token_hex(16))


def _read(image: ImageInput, name: str, as_base64: bool) -> ImageFile | str:
    if isinstance(image, str):
        return _check_url(image, name)
    file = _read_file(image, name)
    return ImageFile(base64.b64encode(file.content), file.format, is_base64=True) if as_base64 else file


def _read_file(image: ImageInput, name: str) -> ImageFile:
    if isinstance(image, Path):
        return _check_bytes(_read_path(image, name), f"{name} ({image})")
    if isinstance(image, bytes | bytearray | memoryview):
        return _check_bytes(bytes(image), name)
    if hasattr(image, "read") and not isinstance(image, str):
        try:
            content = image.read(IMAGE_BYTES_LIMIT + 1)
            # A raw file may give less than it has.
            while isinstance(content, bytes) and 0 < len(content) <= IMAGE_BYTES_LIMIT:
                more = image.read(IMAGE_BYTES_LIMIT + 1 - len(content))
                if not more:
                    break
                content += more
        except (OSError, ValueError) as error:
            raise InvalidRequestError(f"{name} could not be read: {error}. Nothing was sent.") from error
        if not isinstance(content, bytes):
            raise InvalidRequestError(
                f"{name} is a file that was opened as text: open it with mode 'rb'. Nothing was sent."
            )
        return _check_bytes(content, name)
    raise InvalidRequestError(
        f"{name} is a {type(image).__name__}; a Path, bytes, an open binary file or a URL is expected. Nothing was "
        "sent."
    )


def _check_url(url: str, name: str) -> str:
    if url[:5].lower() == "data:":
        match = _DATA_URL.match(url)
        if match is None:
            raise InvalidRequestError(f"{name} is not a data:image/...;base64 URL. Nothing was sent.")
        try:
            content = base64.b64decode(url[match.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise InvalidRequestError(f"{name} is a data URL with broken base64. Nothing was sent.") from None
        _check_bytes(content, name)
        return url
    try:
        parts = urlsplit(url)
        is_url = parts.scheme.lower() in {"http", "https"} and bool(parts.hostname) and not re.search(r"\s", url)
    except ValueError:
        is_url = False
    if not is_url:
        shown = url if len(url) <= 64 else url[:61] + "..."
        raise InvalidRequestError(
            f"{name} is the str {shown!r}, which is not an http(s) or data URL. If it is a file, wrap it in Path: a "
            "path is never read by accident. Nothing was sent."
        )
    return url


def _read_path(path: Path, name: str) -> bytes:
    """Read a regular file of at most the limit and one byte more, without ever blocking on a FIFO or a device."""
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
        try:
            # Of what was opened, not of the path: that may name another file by now.
            is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            content = b""
            if is_regular:
                with open(descriptor, "rb", closefd=False) as file:
                    content = file.read(IMAGE_BYTES_LIMIT + 1)
        finally:
            os.close(descriptor)
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise InvalidRequestError(f"{name} ({path}) could not be read: {why}. Nothing was sent.") from error
    if not is_regular:
        raise InvalidRequestError(f"{name} ({path}) is not a regular file. Nothing was sent.")
    return content


def _check_bytes(content: bytes, name: str) -> ImageFile:
    """Source: "Edit Images": "Uploaded images can be up to 20MB each"."""
    if not content:
        raise InvalidRequestError(f"{name} is empty. Nothing was sent.")
    if len(content) > IMAGE_BYTES_LIMIT:
        raise InvalidRequestError(f"{name} is larger than 20 MB, which the API does not take. Nothing was sent.")
    format_ = _images.sniff(content[: _images.HEAD_BYTES])
    if format_ is None:
        raise InvalidRequestError(
            f"{name} is not an image by its leading bytes, whatever it is called: PNG, JPEG, WebP or GIF is expected. "
            "Nothing was sent."
        )
    if len(content) > IMAGE_BYTES_WARN:
        logger.warning("%s has %d bytes, a little above 20 MB: the service may refuse it.", name, len(content))
    return ImageFile(content, format_)
