"""An answer that is not plain, read by httpcore from its first byte, as if it came to a request of httpcore's own.

What must never live here: the key. The request was sent already, and nothing is written here.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import httpcore

from ._exchange import Received, finish

# What httpcore raises for an answer that it cannot read either.
UnreadableError = httpcore.ProtocolError
_ANY_URL = httpcore.URL(b"http://api/")


async def read_again(came: bytes, read: Callable[[], Awaitable[bytes]], received: Received, *, limit: int) -> None:
    """Read an answer, up to the size that it may have, into `received`.

    Args:
        came: What has come of it.
        read: Reads on; empty at the end of the connection.
        received: Where to.
        limit: The size in bytes.

    Raises:
        UnreadableError: It is none.
        Exception: Whatever `read` raises.
    """
    received.status_code, received.headers = 0, {}
    received.body.clear()
    connection = httpcore.AsyncHTTP11Connection(_ANY_URL.origin, _Again(came, read))
    response = await connection.handle_async_request(httpcore.Request(b"GET", _ANY_URL, headers=[(b"Host", b"api")]))
    received.status_code = response.status
    received.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
    chunks = aiter(response.aiter_stream())
    async for chunk in chunks:
        received.body += chunk
        if len(received.body) > limit:
            await finish(chunks, (UnreadableError,))
            return


class _Again(httpcore.AsyncNetworkStream):
    """A stream that gives what has come once more, then what comes; what is written goes nowhere."""

    def __init__(self, came: bytes, read: Callable[[], Awaitable[bytes]]) -> None:
        self._came = came
        self._read = read

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002 - its signature
        if not self._came:
            return await self._read()
        came, self._came = self._came, b""
        return came

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        """Write nothing: the request was sent."""

    async def aclose(self) -> None:
        """Close nothing: whose the connection is, closes it."""
