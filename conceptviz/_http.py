"""httpx as both of its users want it: clients that follow nothing and keep nothing, their event loops, and bodies.

What lives here: what `_transport` and `_downloads` share. What must never live here: the key, the API.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy

import anyio
import anyio.lowlevel
import httpx

from ._errors import InvalidRequestError
from ._version import __version__

USER_AGENT = f"conceptviz-python/{__version__}"
# Bodies are handed to the socket in pieces of this size: asyncio copies what a full socket does not take at once.
PIECE = 256 * 1024
# What httpx raises for an exchange that fails. The last two are for a Location that it cannot read: it reads each,
# though it is told to follow none, and lets the errors of its IDNA library through.
EXCHANGE_ERRORS = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError)


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    """Build the SSL context once: it takes longer than the rest of a client."""
    return httpx.create_ssl_context()


def open_http_client(
    transport: httpx.AsyncBaseTransport | None,
    *,
    timeout: float,
    max_connections: int,
    keep_alive: bool = True,
    tls: bool = True,
    proxies: bool = True,
) -> httpx.AsyncClient:
    """Open an httpx client that follows no redirect, keeps no cookie and asks for bodies as they are.

    Args:
        transport: The caller's own, or None for httpx's.
        timeout: Seconds that any single step may take; the whole is bounded by the caller's cancel scope.
        max_connections: How many connections it may open.
        keep_alive: Whether a connection serves more than one request.
        tls: Whether it will speak TLS: without, the certificates are not even read.
        proxies: Whether proxies are looked up in the environment.
    """
    return httpx.AsyncClient(
        transport=transport,
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        # TCP and TLS have half each: httpcore closes a socket that is late by its own clock, and drops one that is
        # cancelled, as it would be by the bound on the whole.
        timeout=httpx.Timeout(timeout, connect=timeout / 2),
        limits=httpx.Limits(
            max_connections=max_connections, max_keepalive_connections=max_connections if keep_alive else 0
        ),
        follow_redirects=False,
        trust_env=proxies,
        verify=_ssl_context() if tls and transport is None else False,
    )


class LoopBound:
    """An httpx client, and the limit on its use, for the event loop it is used in.

    A client's connections belong to one event loop. A program that runs several after another with one client of ours
    (`asyncio.run` twice) gets a new httpx client in each; those of a loop that has ended have ended with it.
    """

    def __init__(self, open_client: Callable[[], httpx.AsyncClient], limit: int) -> None:
        self._open = open_client
        self._limit = limit
        self._token: object = None
        self._closed = False

    def get(self) -> tuple[httpx.AsyncClient, anyio.CapacityLimiter]:
        """Return the client and the limiter of the running event loop.

        Raises:
            InvalidRequestError: The client was closed.
        """
        if self._closed:
            raise InvalidRequestError("The client is closed: make a new one. Nothing was sent.")
        token = anyio.lowlevel.current_token()
        if token is not self._token and token != self._token:
            self._token = token
            self._client, self._limiter = self._open(), anyio.CapacityLimiter(self._limit)
        return self._client, self._limiter

    async def aclose(self) -> None:
        """Close the client; whatever is asked of it afterwards is refused."""
        self._closed = True
        token, self._token = self._token, None
        if token is not None:
            client = self._client
            del self._client
            # In another loop than its own it can only be dropped.
            if token == anyio.lowlevel.current_token():
                await client.aclose()


@asynccontextmanager
async def reading(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """Give a body as it came over the wire, and close the response at the end, however that comes."""
    chunks = _chunks(response)
    try:
        yield chunks
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await _finish(chunks)
            await response.aclose()


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    # A mock's answer may have been read before it arrives.
    if response.is_stream_consumed:
        yield response.content
    else:
        async for chunk in response.aiter_raw():
            yield chunk


async def _finish(chunks: AsyncIterator[bytes]) -> None:
    """End a body that was left before its end.

    httpx reads through a chain of generators, and trio complains of each that the garbage collector finds unfinished.
    The next read, cancelled, ends them all from within. A stream that never waits cannot be cancelled: hence the bound.
    """
    with anyio.CancelScope() as scope, suppress(*EXCHANGE_ERRORS, StopAsyncIteration):
        scope.cancel()
        for _ in range(1000):
            await anext(chunks)


class Pieces(httpx.AsyncByteStream):
    """A body in pieces. No generator, as httpx has: trio complains of one that a broken connection leaves open."""

    def __init__(self, body: tuple[bytes, ...]) -> None:
        self._left = (part[at : at + PIECE] for part in body for at in range(0, len(part), PIECE))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._left:
            return piece
        raise StopAsyncIteration
