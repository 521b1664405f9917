"""Connections to the API of our own, on httpcore: a few that are kept, without a pool that looks through them all.

Rules: one exchange at a time on each. A kept connection is used again only if what came over it was one answer and not
a byte more, and if nothing has come since: what is read next can then only answer what is asked next. What must never
live here: the key beyond the one request that carries it, a decision about what is sent again.
"""

from __future__ import annotations

import os
import re
import select
import socket
import ssl
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpcore
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from ._calls import ApiCall
from ._exchange import USER_AGENT, Pieces, Received, Trace, finish
from ._json import MAX_ANSWER_BYTES

# Seconds after which an idle connection is not used again: common servers keep theirs for a minute or so.
_IDLE_SECONDS = 30.0
# Seconds for which an address that was connected to is believed to be the host's, and to answer: it may have several.
_KNOWN_SECONDS = 10.0
_KNOWN_PATIENCE = 1.0
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*([0-9]{1,15})[ \t]*\r\n")
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:[ \t]*chunked[ \t]*\r\n")
_CHUNK = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\r\n]*)?\r\n")


class Connections:
    """Connections to one origin, in one event loop: the one that was used last is used next, so that few are open.

    Args:
        base_url: A checked base URL.
        context: What TLS is spoken with, or None for http.
        timeout: Seconds in which a connection is to be made; the whole is bounded by the caller's cancel scope.
        keep_alive: Whether a connection serves more than one request.
    """

    errors: tuple[type[Exception], ...] = (
        httpcore.TimeoutException,
        httpcore.NetworkError,
        httpcore.ProtocolError,
        httpcore.UnsupportedProtocol,
        httpcore.ConnectionNotAvailable,  # it was closed in the moment before its first byte
        UnicodeError,  # for a host that is no name
    )
    is_traced = True

    def __init__(self, base_url: str, *, context: ssl.SSLContext | None, timeout: float, keep_alive: bool) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None  # it was checked
        scheme, host = parts.scheme.encode(), parts.hostname.encode()
        self._origin = httpcore.Origin(scheme, host, parts.port or (443 if scheme == b"https" else 80))
        self._url = (scheme, host, parts.port)
        self._path = parts.path
        self._context = context
        self._keep_alive = keep_alive
        # TCP and TLS have half each, so that they come to an end before the bound on the whole cancels them.
        self._timeouts = {"connect": timeout / 2}
        self._headers = [
            (b"Host", parts.netloc.encode()),
            (b"Accept", b"*/*"),
            (b"Accept-Encoding", b"identity"),
            (b"User-Agent", USER_AGENT.encode()),
        ]
        self._idle: list[httpcore.AsyncHTTPConnection] = []
        self._busy: set[httpcore.AsyncHTTPConnection] = set()
        self._backend = _Backend()

    async def exchange(self, call: ApiCall, authorization: str, received: Received, trace: Trace | None) -> None:
        """Send a request and read its answer, up to the size that an answer may have, into `received`.

        Raises:
            Exception: One of `errors`.
        """
        request = self._request(call, authorization, trace)
        connection = await self._connection()
        self._busy.add(connection)
        is_whole = False
        try:
            response = await connection.handle_async_request(request)
            received.status_code = response.status
            received.headers = {k.decode("latin-1").lower(): v.decode("latin-1") for k, v in response.headers}
            chunks = aiter(response.aiter_stream())
            try:
                async for chunk in chunks:
                    received.body += chunk
                    if len(received.body) > MAX_ANSWER_BYTES:
                        break
                else:
                    is_whole = True
            finally:
                if not is_whole:
                    with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                        await finish(chunks, self.errors)
            await response.aclose()
            is_whole = is_whole and self._keep_alive and _holds_nothing_more(response.extensions.get("network_stream"))
        finally:
            self._busy.discard(connection)
            if is_whole and connection.is_idle() and not self._backend.is_closed:
                self._idle.append(connection)
            else:
                with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                    await connection.aclose()

    async def aclose(self) -> None:
        """Close the connections; what is under way on them, or would make one, ends with an error."""
        self._backend.is_closed = True
        for connection in [*self._idle, *self._busy]:
            await connection.aclose()
        self._idle.clear()

    async def _connection(self) -> httpcore.AsyncHTTPConnection:
        while self._idle:
            connection = self._idle.pop()
            # Also true when there is something to read: the end of the connection, or what nobody has asked for.
            if not connection.has_expired():
                return connection
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await connection.aclose()
        return httpcore.AsyncHTTPConnection(
            self._origin, self._context, keepalive_expiry=_IDLE_SECONDS, network_backend=self._backend
        )

    def _request(self, call: ApiCall, authorization: str, trace: Trace | None) -> httpcore.Request:
        headers = [*self._headers, (b"Authorization", authorization.encode())]
        if call.content_type is not None:
            length = b"%d" % call.content_length
            headers += [(b"Content-Type", call.content_type.encode()), (b"Content-Length", length)]
        extensions = {"timeout": self._timeouts, "trace": trace}
        scheme, host, port = self._url
        url = httpcore.URL(scheme=scheme, host=host, port=port, target=(self._path + call.path).encode())
        return httpcore.Request(call.method, url, headers=headers, content=Pieces(call.body), extensions=extensions)


class _Backend(httpcore.AsyncNetworkBackend):
    """The way to the network: anyio's streams, on asyncio and trio.

    Attributes:
        is_closed: Whether no connection is to be made any more: what has not sent a byte yet does not.
    """

    is_closed = False

    def __init__(self) -> None:
        self._known: tuple[int, Any, float] | None = None  # family and address, and until when they are believed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,  # noqa: ARG002 - httpcore's signature, and so below
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,  # noqa: ARG002
    ) -> httpcore.AsyncNetworkStream:
        self.check()
        with _connecting(timeout):
            stream = _Tap(await self._reach(host, port), self)
        try:
            self.check()
        except httpcore.ConnectError:
            await stream.aclose()
            raise
        return stream

    async def _reach(self, host: str, port: int) -> SocketStream:
        """Connect to where a connection was made a moment ago, or else to whichever address of the host answers first.

        To ask the resolver, and to have addresses race each other, for each submit anew takes longer than to connect.
        """
        if self._known is not None:
            family, address, until = self._known
            if anyio.current_time() < until:
                with suppress(OSError), anyio.move_on_after(_KNOWN_PATIENCE):
                    return await _connect(family, address)
            self._known = None
        stream = await anyio.connect_tcp(host, port)
        sock = stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - anyio's, not Django's
        if os.name == "posix":  # elsewhere one waits for a connection otherwise
            with suppress(OSError):  # it was closed at once
                self._known = sock.family, sock.getpeername(), anyio.current_time() + _KNOWN_SECONDS
        return stream

    def check(self) -> None:
        """Refuse to go on if no connection is to be made any more."""
        if self.is_closed:
            raise httpcore.ConnectError("closed")


class _Tap(httpcore.AsyncNetworkStream):
    """A stream that remembers what came over it since something was last written to it.

    Its reads and writes have no time limits of their own: the whole exchange has one.
    """

    def __init__(self, stream: ByteStream, backend: _Backend, tls: ssl.SSLObject | None = None) -> None:
        self._stream = stream
        self._backend = backend
        self._socket = stream.extra(SocketAttribute.raw_socket)  # noqa: S610 - anyio's, not Django's
        self.tls = tls
        self.came = bytearray()
        self.is_full = False

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        try:
            data = await self._stream.receive(max_bytes)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError) as error:
            raise httpcore.ReadError(str(error)) from error
        self.is_full = len(data) >= max_bytes
        if len(self.came) <= MAX_ANSWER_BYTES:  # a longer answer is not read to its end
            self.came += data
        return data

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        if not buffer:
            return
        self.came.clear()
        try:
            await self._stream.send(buffer)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError) as error:
            raise httpcore.WriteError(str(error)) from error

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        from anyio.streams.tls import TLSAttribute, TLSStream  # loaded by those who speak it

        try:
            with _connecting(timeout):
                stream = await TLSStream.wrap(
                    self._stream,
                    hostname=server_hostname,
                    ssl_context=ssl_context,
                    standard_compatible=False,
                    server_side=False,
                )
            self._backend.check()
            return _Tap(stream, self._backend, stream.extra(TLSAttribute.ssl_object))  # noqa: S610
        except BaseException:
            with anyio.CancelScope(shield=True), anyio.move_on_after(1):
                await self.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return _is_readable(self._socket) if info == "is_readable" else None


async def _connect(family: int, address: Any) -> SocketStream:
    """Connect to one address."""
    with ExitStack() as stack:
        sock = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            sock.connect(address)
        await anyio.wait_writable(sock)
        failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, os.strerror(failure))
        stream = await SocketStream.from_socket(sock)
        stack.pop_all()  # it is the stream's now
        return stream


@contextmanager
def _connecting(timeout: float | None) -> Iterator[None]:
    """Bound what makes a connection, and say in httpcore's words how it failed."""
    try:
        with anyio.fail_after(timeout):
            yield
    except TimeoutError as error:
        raise httpcore.ConnectTimeout(str(error)) from error
    except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:  # ssl.SSLError is an OSError
        raise httpcore.ConnectError(str(error)) from error


def _is_readable(sock: Any) -> bool:
    """Say whether a socket has something to read, the end of its connection included."""
    if not hasattr(select, "poll"):  # on Windows, where `select` has no limit that matters here
        return bool(select.select([sock], [], [], 0)[0])
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


def _holds_nothing_more(stream: object) -> bool:
    """Say whether what came over a connection was one answer and not a byte more."""
    if not isinstance(stream, _Tap):
        return False
    came = bytes(stream.came)
    # A read that was filled may have left something behind, in a buffer of the event loop's.
    if stream.is_full or _answer_length(came) != len(came):
        return False
    if stream.tls is None:
        return True
    # More may lie between the socket and us: deciphered on demand only, and on no descriptor to be seen.
    try:
        stream.tls.read(1)
    except ssl.SSLWantReadError:
        return True
    except ssl.SSLError:
        return False
    return False


def _answer_length(came: bytes) -> int | None:
    """Return where the answer ends that these bytes begin with, or None where that is not plain to see.

    httpcore has read it as HTTP already: this is only to find its end.
    """
    head, found, _ = came.partition(b"\r\n\r\n")
    start = len(head) + len(found)
    head = head.lower() + b"\r\n"
    if not found or head[8:10] == b" 1":
        return None
    length = _LENGTH.search(head)
    if _CHUNKED.search(head) is None:
        return start + int(length[1]) if length is not None else None
    # Each turn goes on by a size line at least.
    while (chunk := _CHUNK.match(came, start)) is not None:
        size = int(chunk[1], 16)
        start = chunk.end() + size + 2
        if size == 0:
            return start
    return None
