"""Request bodies, read as they arrive: JSON or multipart/form-data, and the images an edit brings.

What lives here knows bytes and nothing of the API's rules: what a field may hold is decided in `_world`.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from ._pictures import missing

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks


@attrs.frozen
class Upload:
    """One input image whose bytes came with the request."""

    data: bytes | bytearray = attrs.field(repr=False)
    content_type: str = ""


@attrs.frozen
class Body:
    """What a POST carried.

    `images` holds an `Upload`, a URL as it was written, or None for a value that can be no image at all.
    """

    fields: Mapping[str, Any]
    images: tuple[Upload | str | None, ...] = ()


class BodyReader:
    """Takes a body in pieces, so that an upload is held once and parsed while it arrives."""

    def __init__(self, content_type: str) -> None:
        self.size = 0
        self._json = bytearray()
        self._form = _Form(content_type) if content_type.lower().startswith("multipart/form-data") else None

    def feed(self, data: bytes) -> None:
        """Take the next piece."""
        self.size += len(data)
        if self._form is None:
            self._json += data
        else:
            self._form.feed(data)

    def finish(self) -> Body | None:
        """The body, or None when it is neither a JSON object nor a complete form."""
        if self._form is not None:
            return self._form.finish()
        try:
            fields = json.loads(self._json)
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict):
            return None
        images = fields.get("images")
        listed = images if isinstance(images, list) else [] if images is None else [images]
        return Body(fields, tuple(_read_image(value) for value in listed))


def _read_image(value: Any) -> Upload | str | None:
    """A JSON image: `data:image/...;base64,...` becomes its bytes, any other text is taken for a URL."""
    if not isinstance(value, str):
        return None
    if value[:5].lower() != "data:":
        return value
    head, comma, encoded = value[5:].partition(",")
    content_type, *parameters = head.lower().split(";")
    if not comma or not content_type.startswith("image/") or "base64" not in parameters:
        return None
    try:
        return Upload(base64.b64decode(encoded, validate=True), content_type)
    except (binascii.Error, ValueError):
        return None


class _Form:
    """A multipart/form-data body: text fields by name, and the files of the repeated `image` field."""

    def __init__(self, content_type: str) -> None:
        try:
            from python_multipart.multipart import MultipartParser, parse_options_header
        except ModuleNotFoundError as error:
            raise missing("python-multipart", "reading uploaded files") from error

        self._options = parse_options_header
        self._fields: dict[str, str] = {}
        self._images: list[Upload | str | None] = []
        self._headers: dict[str, str] = {}
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._data = bytearray()
        self._ended = False
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        self._parser = MultipartParser(boundary, self._callbacks()) if boundary else None

    def feed(self, data: bytes) -> None:
        if self._parser is None:
            return
        try:
            self._parser.write(data)
        except ValueError:
            self._parser = None

    def finish(self) -> Body | None:
        if self._parser is None or not self._ended:
            return None
        return Body(self._fields, tuple(self._images))

    def _callbacks(self) -> "MultipartCallbacks":
        return {
            "on_part_begin": self._begin_part,
            "on_header_begin": self._begin_header,
            "on_header_field": lambda data, start, end: self._header_name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
            "on_header_end": self._end_header,
            "on_part_data": lambda data, start, end: self._data.extend(memoryview(data)[start:end]),
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        self._headers, self._data = {}, bytearray()

    def _begin_header(self) -> None:
        self._header_name, self._header_value = bytearray(), bytearray()

    def _end_header(self) -> None:
        self._headers[self._header_name.decode("latin-1").lower()] = self._header_value.decode("latin-1")

    def _end_part(self) -> None:
        options = self._options(self._headers.get("content-disposition"))[1]
        name = options.get(b"name", b"").decode("utf-8", "replace")
        is_file = b"filename" in options
        if name == "image":
            kind = self._headers.get("content-type", "").lower()
            self._images.append(Upload(self._data, kind) if is_file else self._data.decode("utf-8", "replace"))
        elif not is_file:
            self._fields[name] = self._data.decode("utf-8", "replace")
        self._data = bytearray()

    def _end(self) -> None:
        self._ended = True
