"""Connections to the API of our own: a few that are kept, without a pool that looks through them all.

Rules: one exchange at a time on each. A kept connection is used again only if what came over it was one answer and not
a byte more, and if nothing has come since: what is read next can then only answer what is asked next. What must never
live here: the key beyond the one request that carries it, a decision about what is sent again.
"""

from __future__ import annotations

import os
import select
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream

from ._calls import ApiCall
from ._exchange import PIECE, Pieces, Received, Trace
from ._http1 import AnswerReader, NotPlainError, build_head
from ._json import MAX_ANSWER_BYTES

# Seconds after which an idle connection is not used again: common servers keep theirs for a minute or so.
_IDLE_SECONDS = 30.0
# Seconds for which an address that was connected to is believed to be the host's, and to answer: it may have several.
_KNOWN_SECONDS = 10.0
_KNOWN_PATIENCE = 1.0
_READ = 64 * 1024


class ExchangeError(Exception):
    """An exchange failed. What its classes are called is what httpx and httpcore call it."""


class ConnectError(ExchangeError):
    """No connection was made."""


class ConnectTimeout(ConnectError):  # noqa: N818 - their word
    """Nor in the time that there was."""


class NetworkError(ExchangeError):
    """A connection broke."""


class RemoteProtocolError(ExchangeError):
    """An answer ended before its end, or is none."""


class Connections:
    """Connections to one origin, in one event loop: the one that was used last is used next, so that few are open.

    Args:
        base_url: A checked base URL.
        context: What TLS is spoken with, or None for http.
        timeout: Seconds in which a connection is to be made; the whole is bounded by the caller's cancel scope.
        keep_alive: Whether a connection serves more than one request.
    """

    errors: tuple[type[Exception], ...] = (
        ExchangeError,
        UnicodeError,  # for a host that is no name
    )
    is_traced = True

    def __init__(self, base_url: str, *, context: ssl.SSLContext | None, timeout: float, keep_alive: bool) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None  # it was checked
        self._way = _Way(parts.hostname, parts.port or (443 if parts.scheme == "https" else 80), context, timeout / 2)
        self._host = parts.netloc
        self._path = parts.path
        self._keep_alive = keep_alive
        self._idle: list[_Stream] = []
        self._busy: set[_Stream] = set()

    async def exchange(self, call: ApiCall, authorization: str, received: Received, trace: Trace | None) -> None:
        """Send a request and read its answer, up to the size that an answer may have, into `received`.

        Raises:
            Exception: One of `errors`.
        """
        head = build_head(call, host=self._host, base_path=self._path, authorization=authorization)
        stream = await self._stream(trace)
        self._busy.add(stream)
        may_be_kept = False
        try:
            await _send(stream, head, call, trace)
            may_be_kept = await _receive(stream, received, trace)
        finally:
            self._busy.discard(stream)
            if may_be_kept and self._keep_alive and not self._way.is_closed:
                stream.expires_at = anyio.current_time() + _IDLE_SECONDS
                self._idle.append(stream)
            else:
                await stream.close()

    async def aclose(self) -> None:
        """Close the connections; what is under way on them, or would make one, ends with an error."""
        self._way.is_closed = True
        for stream in [*self._idle, *self._busy]:
            await stream.close()
        self._idle.clear()

    async def _stream(self, trace: Trace | None) -> _Stream:
        while self._idle:
            stream = self._idle.pop()
            # What there is to read is the end of the connection, or what nobody has asked for.
            if anyio.current_time() < stream.expires_at and not stream.is_readable():
                return stream
            await stream.close()
        return await self._way.connect(trace)


async def _send(stream: _Stream, head: bytes, call: ApiCall, trace: Trace | None) -> None:
    if trace is not None:
        await trace("http11.send_request_headers.started", {})
    # A service that refuses a request may close before it has read it all: its answer is to be read all the same.
    with suppress(NetworkError):
        if call.content_length <= PIECE:
            await stream.send(b"".join((head, *call.body)))
        else:
            await stream.send(head)
            if trace is not None:
                await trace("http11.send_request_body.started", {})
            async for piece in Pieces(call.body):
                await stream.send(piece)


async def _receive(stream: _Stream, received: Received, trace: Trace | None) -> bool:
    """Read an answer; return whether another can come over the connection, and nothing but that."""
    if trace is not None:
        await trace("http11.receive_response_headers.started", {})
    reader = AnswerReader(received)
    data, is_whole = b"", False
    try:
        while not is_whole and len(received.body) <= MAX_ANSWER_BYTES:
            data = await stream.receive()
            if not data:
                raise RemoteProtocolError
            is_whole = reader.feed(data)
    except NotPlainError:
        from ._httpcore import UnreadableError, read_again  # takes longer to load than all the rest

        try:
            await read_again(bytes(reader.came), stream.receive, received, limit=MAX_ANSWER_BYTES)
        except UnreadableError as error:
            raise RemoteProtocolError from error
        return False
    # A read that was filled may have left something behind, in a buffer of the event loop's.
    is_exact = is_whole and not reader.is_last and reader.holds_nothing_more and len(data) < _READ
    return is_exact and stream.holds_nothing_more()


class _Way:
    """The way to a host: anyio's streams, on asyncio and trio.

    Args:
        host: A name or an address.
        port: The port.
        context: What TLS is spoken with, or None.
        timeout: Seconds for TCP, and again for TLS, so that they come to an end before the bound on the whole.

    Attributes:
        is_closed: Whether no connection is to be made any more: what has not sent a byte yet does not.
    """

    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, timeout: float) -> None:
        self.is_closed = False
        self._host = host
        self._port = port
        self._context = context
        self._timeout = timeout
        self._known: tuple[int, Any, float] | None = None  # family and address, and until when they are believed

    async def connect(self, trace: Trace | None) -> _Stream:
        """Make a connection.

        Raises:
            ConnectError: None was made.
        """
        self.check()
        if trace is not None:
            await trace("connection.connect_tcp.started", {})
        stream = await self._reach_again() or await self._reach()
        try:
            self.check()
            if self._context is not None:
                if trace is not None:
                    await trace("connection.start_tls.started", {})
                with _connecting(self._timeout):
                    await stream.start_tls(self._context, self._host)
                self.check()
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _reach(self) -> _Stream:
        """Connect to whichever address of the host answers first, and keep it in mind."""
        with _connecting(self._timeout):
            tcp = await anyio.connect_tcp(self._host, self._port)
        sock = tcp.extra(SocketAttribute.raw_socket)  # noqa: S610 - anyio's, not Django's
        if os.name == "posix":  # elsewhere one waits for a connection otherwise
            with suppress(OSError):  # it was closed at once
                self._known = sock.family, sock.getpeername(), anyio.current_time() + _KNOWN_SECONDS
        return _Stream(tcp, sock)

    async def _reach_again(self) -> _Stream | None:
        """Connect to where a connection was made a moment ago, if there was one; None where that does not do.

        To ask the resolver, and to have addresses race each other, for each submit anew takes longer than to connect.
        """
        if self._known is None:
            return None
        family, address, until = self._known
        if anyio.current_time() < until:
            with suppress(OSError), anyio.move_on_after(min(_KNOWN_PATIENCE, self._timeout / 2)):
                return await _connect(family, address)
        self._known = None
        return None

    def check(self) -> None:
        """Refuse to go on if no connection is to be made any more."""
        if self.is_closed:
            raise ConnectError


class _Stream:
    """A connection. Its reads and writes have no time limits of their own: the whole exchange has one.

    Attributes:
        expires_at: When it is not used any more, as long as it is idle.
    """

    def __init__(self, tcp: SocketStream, sock: Any) -> None:
        self.expires_at = 0.0
        self._stream: ByteStream = tcp
        self._socket = sock
        self._tls: ssl.SSLObject | None = None

    async def start_tls(self, context: ssl.SSLContext, host: str) -> None:
        from anyio.streams.tls import TLSAttribute, TLSStream  # loaded by those who speak it

        stream = await TLSStream.wrap(
            self._stream, hostname=host, ssl_context=context, standard_compatible=False, server_side=False
        )
        self._stream, self._tls = stream, stream.extra(TLSAttribute.ssl_object)  # noqa: S610 - likewise

    async def send(self, data: bytes) -> None:
        try:
            await self._stream.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError) as error:
            raise NetworkError from error

    async def receive(self) -> bytes:
        """Return what has come, or nothing at the end of the connection."""
        try:
            return await self._stream.receive(_READ)
        except anyio.EndOfStream:
            return b""
        except (anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError) as error:
            raise NetworkError from error

    async def close(self) -> None:
        """Close it, whether or not the caller is cancelled."""
        with anyio.CancelScope(shield=True):
            await self._stream.aclose()

    def is_readable(self) -> bool:
        """Say whether its socket has something to read, the end of its connection included."""
        if not hasattr(select, "poll"):  # on Windows, where `select` has no limit that matters here
            return bool(select.select([self._socket], [], [], 0)[0])
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def holds_nothing_more(self) -> bool:
        """Say whether nothing lies between the socket and us: deciphered on demand, and seen on no descriptor."""
        if self._tls is None:
            return True
        try:
            self._tls.read(1)
        except ssl.SSLWantReadError:
            return True
        except ssl.SSLError:
            return False
        return False


async def _connect(family: int, address: Any) -> _Stream:
    """Connect to one address."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with suppress(BlockingIOError):
            sock.connect(address)
        await anyio.wait_writable(sock)
        failure = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if failure:
            raise OSError(failure, os.strerror(failure))  # noqa: TRY301 - to close the socket
        return _Stream(await SocketStream.from_socket(sock), sock)
    except BaseException:
        sock.close()
        raise


@contextmanager
def _connecting(timeout: float | None) -> Iterator[None]:
    """Bound what makes a connection, and say how it failed."""
    try:
        with anyio.fail_after(timeout):
            yield
    except TimeoutError as error:
        raise ConnectTimeout from error
    except (OSError, anyio.BrokenResourceError, anyio.EndOfStream) as error:  # ssl.SSLError is an OSError
        raise ConnectError from error
