"""httpx as its users want it: clients that follow nothing and keep nothing, and exchanges with the API through one.

What lives here: what the image host is fetched with, and the API too where a transport of the caller's, a proxy or an
instrumentation of httpx stands before it. What must never live here: a decision about what is sent again.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any

import anyio
import anyio.lowlevel
import httpcore
import httpx

from ._calls import ApiCall
from ._exchange import PIECE, USER_AGENT, Pieces, Received, Trace, finish
from ._json import MAX_ANSWER_BYTES

# What httpx raises for an exchange that fails. Two are for a Location that it cannot read: it reads each, though it is
# told to follow none, and lets the errors of its IDNA library through; as it does with what OpenSSL says of a record.
EXCHANGE_ERRORS = (
    httpx.HTTPError,
    httpx.StreamError,
    httpx.InvalidURL,
    UnicodeError,
    ssl.SSLError,
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.UnsupportedProtocol,
)
# asyncio receives this much at once. httpcore asks for a quarter, and each time what is left over is copied.
_READ = 256 * 1024


@functools.cache
def ssl_context() -> ssl.SSLContext:
    """Build the SSL context once: it takes longer than the rest of a client."""
    context = httpx.create_ssl_context()
    context.set_alpn_protocols(["http/1.1"])  # as httpx says it, for connections that are not made by httpx
    return context


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
        verify=ssl_context() if tls and transport is None else False,
    )


class LargeReads(httpx.AsyncBaseTransport):
    """httpx's own transport but for what is read at a time: large bodies cost half. It sends no bodies.

    It must not stand where httpx's own is looked for: it knows no proxy, and nothing that was put into httpx.

    Args:
        max_connections: How many connections it may open, and keep.
    """

    def __init__(self, max_connections: int) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context(),
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=httpx.Limits().keepalive_expiry,
            network_backend=_Backend(),
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request through the pool.

        Raises:
            Exception: One of `EXCHANGE_ERRORS`.
        """
        url, asked = request.url, request.extensions
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        sent = httpcore.Request(request.method, target, headers=request.headers.raw, extensions=asked)
        answer = await self._pool.handle_async_request(sent)
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer), extensions=dict(answer.extensions)
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    """An answer's body, as httpx takes it."""

    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._answer.aiter_stream())

    async def aclose(self) -> None:
        await self._answer.aclose()


class _Backend(httpcore.AsyncNetworkBackend):
    """httpcore's way to the network through anyio."""

    def __init__(self) -> None:
        self._anyio: Any = httpcore.AnyIOBackend()  # to a checker of types, anyio might not be installed

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        return _Stream(await self._anyio.connect_tcp(host, port, timeout, local_address, socket_options))


class _Stream(httpcore.AsyncNetworkStream):
    """A stream that is read in large pieces, whatever is asked for: httpcore takes what comes."""

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return await self._stream.read(max(max_bytes, _READ), timeout)

    async def write(self, buffer: bytes, timeout: float | None = None) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.AsyncNetworkStream:
        # TLS gives a record at a time, whatever is asked for.
        return await self._stream.start_tls(ssl_context, server_hostname, timeout)

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


@asynccontextmanager
async def reading(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """Give a body as it came over the wire, and close the response at the end, however that comes."""
    chunks = _chunks(response)
    try:
        yield chunks
    finally:
        with anyio.CancelScope(shield=True), anyio.move_on_after(1):
            await finish(chunks, EXCHANGE_ERRORS)
            await response.aclose()


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    # A mock's answer may have been read before it arrives.
    if response.is_stream_consumed:
        yield response.content
    else:
        async for chunk in response.aiter_raw():
            yield chunk


def is_own_transport(transport: httpx.AsyncBaseTransport | None) -> bool:
    """Say whether a client's transport is httpx's own, and nothing that was made of it."""
    return transport is None or type(transport) is httpx.AsyncHTTPTransport


class ThroughHttpx:
    """Exchanges with the API through an httpx client, in one event loop.

    Args:
        base_url: A checked base URL.
        client: The client, which is closed with it.
        is_traced: Whether its transport is known to report its steps.
    """

    errors: tuple[type[Exception], ...] = EXCHANGE_ERRORS

    def __init__(self, base_url: str, client: httpx.AsyncClient, *, is_traced: bool) -> None:
        self._base_url = base_url
        self._client = client
        self.is_traced = is_traced

    async def exchange(self, call: ApiCall, authorization: str, received: Received, trace: Trace | None) -> None:
        """Send a request and read its answer, up to the size that an answer may have, into `received`.

        Raises:
            Exception: One of `errors`.
        """

        async def watch(step: str, info: Mapping[str, Any]) -> None:
            # The beginning of the step that is reported when a connection is made, rather than one used that was kept.
            received.is_certain = received.is_certain or step.startswith("connection.connect_")
            if trace is not None:
                await trace(step, info)

        # A transport that is no connection may never wait: whoever else has work is given a turn, and a cancellation.
        await anyio.lowlevel.checkpoint()
        received.is_certain = not self.is_traced
        response = await self._client.send(self._request(call, authorization, watch), stream=True)
        async with reading(response) as chunks:
            received.status_code = response.status_code
            received.headers = {name.lower(): value for name, value in response.headers.items()}
            async for chunk in chunks:
                received.body += chunk
                if len(received.body) > MAX_ANSWER_BYTES:
                    break

    async def aclose(self) -> None:
        """Close the client."""
        await self._client.aclose()

    def _request(self, call: ApiCall, authorization: str, trace: Trace) -> httpx.Request:
        headers = httpx.Headers({"Authorization": authorization})
        if call.content_type is not None:
            headers["Content-Type"] = call.content_type
            headers["Content-Length"] = str(call.content_length)
        whole = b"".join(call.body) if call.content_length <= PIECE else None
        request = self._client.build_request(
            call.method, self._base_url + call.path, headers=headers, content=whole, extensions={"trace": trace}
        )
        pieces = _Pieces(call.body)
        if whole is None:
            return httpx.Request(
                request.method, request.url, headers=request.headers, stream=pieces, extensions=request.extensions
            )
        # A small body can still be read off the request, as mocks do.
        request.stream = pieces
        return request


class _Pieces(Pieces, httpx.AsyncByteStream):
    """A body in pieces, as httpx takes it."""
