"""HTTP/1.1 as plain as an API speaks it: the head of a request, and an answer that is read as it comes.

What is read here is read as h11 reads it, which a test holds it to, in a small part of the time. Whatever is not plain
(an interim answer, a body up to the end of the connection, trailers, a line that ends otherwise) is left to a library:
`NotPlainError` says so, whenever it is found out. What must never live here: a socket, a decision about what an
answer means.
"""

from __future__ import annotations

import re

from ._calls import ApiCall
from ._exchange import USER_AGENT, Received

_NAME = rb"[-!#$%&'*+.^_`|~0-9A-Za-z]+"
_HEAD = re.compile(
    rb"HTTP/1\.1 ([2-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*)?\r\n((?:%s:[\t\x20-\x7e\x80-\xff]*\r\n)*)\r\n" % _NAME
)
_BEGINNING = b"HTTP/1.1 "
# An answer whose head is longer is not plain.
_MAX_HEAD = 64 * 1024
_LENGTH = re.compile(r"[0-9]{1,15}")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n")
# How a size line begins that may become one.
_PART_OF_CHUNK = re.compile(rb"[0-9A-Fa-f]{0,15}\r?")
_WITHOUT_BODY = {204, 304}


class NotPlainError(Exception):
    """An answer is not as plain as what is read here: it is to be read from its beginning by a library."""


def build_head(call: ApiCall, *, host: str, base_path: str, authorization: str) -> bytes:
    """Write the head of a request."""
    head = (
        f"{call.method} {base_path}{call.path} HTTP/1.1\r\n"
        f"Host: {host}\r\nAccept: */*\r\nAccept-Encoding: identity\r\nUser-Agent: {USER_AGENT}\r\n"
        f"Authorization: {authorization}\r\n"
    )
    if call.content_type is not None:
        head += f"Content-Type: {call.content_type}\r\nContent-Length: {call.content_length}\r\n"
    return (head + "\r\n").encode("ascii")


class AnswerReader:
    """Reads one plain answer as it comes.

    Args:
        received: What it is read into.

    Attributes:
        came: All that came.
        is_last: Whether the service said that the connection will carry no other.
    """

    def __init__(self, received: Received) -> None:
        self.came = bytearray()
        self.is_last = False
        self._received = received
        self._at: int  # up to where it is read, once the head is
        self._left: int  # bytes to come of the body, or of a chunk
        self._is_chunked = self._is_behind_chunk = False

    @property
    def holds_nothing_more(self) -> bool:
        """Whether not a byte came beyond what was read."""
        return self._at == len(self.came)

    def feed(self, data: bytes) -> bool:
        """Read on; return whether the answer is whole.

        Raises:
            NotPlainError: It is not plain.
        """
        self.came += data
        if not self._received.status_code and not self._read_head():
            return False
        if self._is_chunked:
            return self._read_chunks()
        self._read_body()
        return not self._left

    def _read_head(self) -> bool:
        came = self.came
        end = came.find(b"\r\n\r\n", 0, _MAX_HEAD)
        if end < 0:
            # Nor must anything be waited for that a library would not wait for.
            is_plain = _BEGINNING.startswith(came[: len(_BEGINNING)]) and came.count(b"\n") == came.count(b"\r\n")
            if not is_plain or len(came) >= _MAX_HEAD:
                raise NotPlainError
            return False
        head = _HEAD.fullmatch(came, 0, end + 4)
        if head is None or int(head[1]) in _WITHOUT_BODY:
            raise NotPlainError
        headers: dict[str, str] = {}
        framing = []
        for line in head[2].decode("latin-1").split("\r\n")[:-1]:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip(" \t")
            headers[name] = value
            if name in {"content-length", "transfer-encoding"}:
                framing.append((name, value))
            elif name == "connection" and value.lower() != "keep-alive":
                self.is_last = True
        # One word on where the body ends, and a plain one.
        if len(framing) != 1:
            raise NotPlainError
        [(name, value)] = framing
        self._is_chunked = name == "transfer-encoding"
        if not (value == "chunked" if self._is_chunked else _LENGTH.fullmatch(value)):
            raise NotPlainError
        self._left = 0 if self._is_chunked else int(value)
        self._at = end + 4
        self._received.status_code = int(head[1])
        self._received.headers = headers
        return True

    def _read_body(self) -> None:
        piece = self.came[self._at : self._at + self._left]
        self._received.body += piece
        self._at += len(piece)
        self._left -= len(piece)

    def _read_chunks(self) -> bool:
        came = self.came
        while True:
            self._read_body()
            if self._is_behind_chunk:
                if not self._passes_line_end():
                    return False
                self._is_behind_chunk = False
            size = _CHUNK.match(came, self._at)
            if size is None:
                if _PART_OF_CHUNK.fullmatch(came, self._at) is None:
                    raise NotPlainError
                return False
            self._left = int(size[1], 16)
            if self._left:
                self._at = size.end()
                self._is_behind_chunk = True
            else:
                before, self._at = self._at, size.end()
                if self._passes_line_end():
                    return True
                self._at = before
                return False

    def _passes_line_end(self) -> bool:
        """Go past the end of a line, if it has come."""
        end = self.came[self._at : self._at + 2]
        if not b"\r\n".startswith(end):
            raise NotPlainError
        if len(end) < 2:
            return False
        self._at += 2
        return True
