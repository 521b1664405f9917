"""The one place that speaks HTTP to the API: send, classify, retry.

Rules: the key is added here and goes to the API's origin alone. Redirects are not followed, cookies and netrc are not
used. No more requests are under way than there may be connections, so that none ever queues in httpx's pool. An error
of the HTTP library becomes a sentence and is dropped: it holds the request, and the request holds the key.
"""

from __future__ import annotations

import functools
import itertools
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import anyio
import anyio.lowlevel
import httpx
from attrs import frozen

from . import _calls, _wire
from ._calls import ApiCall
from ._config import Secret
from ._errors import ConceptVizError, Credits, InvalidRequestError, NotSentError, PollInterruptedError, ServerError
from ._events import Event, Retrying
from ._json import MAX_ANSWER_BYTES
from ._models import EditRequest, GenerateRequest, Retries, Submission, TaskState
from ._policy import retry_delay
from ._version import __version__
from ._wire import Answer

if TYPE_CHECKING:
    import ssl

T = TypeVar("T")

USER_AGENT = f"conceptviz-python/{__version__}"
# Bodies are handed to the socket in pieces of this size: asyncio copies what a full socket does not take at once.
_PIECE = 256 * 1024
# What httpx raises for an exchange that fails. The last two are for a Location that it cannot read: it reads each,
# though it is told to follow none, and lets the errors of its IDNA library through.
EXCHANGE_ERRORS = (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, UnicodeError)
# The step that a transport reports before it writes a request's head.
_FIRST_BYTE = "send_request_headers.started"
# Raised before a connection exists, whatever the transport is.
_NEVER_SENT = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.UnsupportedProtocol,
    httpx.ProxyError,
)


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


class _Pieces(httpx.AsyncByteStream):
    """A body in pieces. No generator, as httpx has: trio complains of one that a broken connection leaves open."""

    def __init__(self, body: tuple[bytes, ...]) -> None:
        self._left = (part[at : at + _PIECE] for part in body for at in range(0, len(part), _PIECE))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._left:
            return piece
        raise StopAsyncIteration


@frozen
class _Unanswered:
    """An exchange that brought no whole answer: what it means depends on the request.

    It is a value: an error raised in the exchange would keep its frame, and with it the request and what came back.

    Attributes:
        reason: What happened, in our words.
        sent: Whether the service may have the request.
        partial: What arrived of an answer.
        last_step: The last step that the transport reported, or None.
    """

    reason: str
    sent: bool
    partial: Answer | None
    last_step: str | None


class Transport:
    """The API over HTTP.

    Args:
        api_key: The key.
        base_url: A checked base URL.
        timeout: Seconds for one whole exchange, however the bytes drip.
        retries: How often what is safe to repeat is repeated.
        max_connections: How many connections, and so requests at a time, there may be.
        transport: The caller's own httpx transport, or None.
        emit: Called with each event.
        rng: The randomness of the pauses.
    """

    def __init__(
        self,
        api_key: Secret,
        base_url: str,
        *,
        timeout: float,
        retries: Retries,
        max_connections: int,
        transport: httpx.AsyncBaseTransport | None,
        emit: Callable[[Event], Awaitable[None]],
        rng: Random,
    ) -> None:
        self._key = api_key
        self._base_url = base_url
        self._timeout = timeout
        self._retries = retries
        self._emit = emit
        self._rng = rng
        try:
            self._host = httpx.URL(base_url).host
        except (httpx.InvalidURL, UnicodeError):  # the first for most, the second for a bad "xn--" label
            raise InvalidRequestError(
                "The base URL's host is not one that can be connected to. Nothing was sent."
            ) from None
        tls = base_url.startswith("https:")
        # Only httpx's own transport is known to say when it is about to send.
        self._is_traced = transport is None or isinstance(transport, httpx.AsyncHTTPTransport)

        def open_client(keep_alive: bool) -> httpx.AsyncClient:
            # Without TLS the host is this machine, and a proxy would be handed the key.
            return open_http_client(
                transport,
                timeout=timeout,
                max_connections=max_connections,
                keep_alive=keep_alive,
                tls=tls,
                proxies=tls,
            )

        self._looks = LoopBound(lambda: open_client(keep_alive=True), max_connections)
        # Each submit has a connection of its own: one that was used before may be closing, or may still hold an answer
        # to somebody else's request, and a submit that meets either cannot be told from one that was charged.
        self._submits = LoopBound(lambda: open_client(keep_alive=False), max_connections)

    async def submit(
        self,
        call: ApiCall,
        request: GenerateRequest | EditRequest,
        before_first_byte: Callable[[], Awaitable[None]],
    ) -> Submission:
        """Send a submit, once.

        Args:
            call: The submit.
            request: What it asks for.
            before_first_byte: Awaited at the last moment before a byte of it may leave; if it raises, none does.

        Raises:
            NotSentError: No connection was made.
            SubmissionUnknownError: It was sent and may have been charged.
            APIStatusError: It was refused.
            GenerationFailedError: It failed at once, documented as refunded.
        """
        answer = await self._exchange(call, self._submits, before_first_byte)
        if isinstance(answer, Answer):
            return _wire.parse_submission(answer, request)
        if answer.sent:
            return _wire.unanswered_submission(answer.reason, answer.partial, request, answer.last_step)
        raise NotSentError(
            f"The request was not sent: {answer.reason} ({self._host}). Nothing was spent; it is safe to submit again."
        )

    async def look(self, task_id: str, prompts: tuple[str, ...]) -> TaskState:
        """Look at a task once.

        Raises:
            PollInterruptedError: No answer came.
            APIStatusError: The service answered with an error status.
            UnexpectedResponseError: The answer is not the documented shape.
        """
        answer = await self._exchange(_calls.build_look(task_id), self._looks)
        if isinstance(answer, Answer):
            return _wire.parse_task(answer, task_id, prompts)
        raise PollInterruptedError(
            f"A look at task {task_id} failed: {answer.reason}. The task goes on at the service and is paid for: "
            "take it up again by its id.",
            task_id=task_id,
            credits=Credits.SPENT,
        )

    async def look_patiently(self, task_id: str, prompts: tuple[str, ...]) -> TaskState:
        """Look at a task, again and again if the look itself fails in a passing way.

        Raises:
            PollInterruptedError: No attempt was answered readably.
            APIStatusError: The service refused the look.
        """
        try:
            return await self._retrying(lambda: self.look(task_id, prompts), task_id, spends=False)
        except ServerError as error:
            status = error.status_code
        raise PollInterruptedError(
            f"Looks at task {task_id} kept failing: HTTP {status}. The task goes on at the service and is paid for: "
            "take it up again by its id.",
            task_id=task_id,
            credits=Credits.SPENT,
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._looks.aclose()
        await self._submits.aclose()

    async def _retrying(self, attempt: Callable[[], Awaitable[T]], task_id: str | None, *, spends: bool) -> T:
        for number in itertools.count(1):
            try:
                return await attempt()
            except ConceptVizError as error:
                delay = retry_delay(error, number, self._retries, self._rng, spends=spends)
                if delay is None:
                    raise
                await self._emit(Retrying(task_id=task_id, attempt=number, delay=delay, error=error))
            await anyio.sleep(delay)
        raise AssertionError("unreachable")  # pragma: no cover - itertools.count has no end

    async def _exchange(
        self,
        call: ApiCall,
        connections: LoopBound,
        before_first_byte: Callable[[], Awaitable[None]] | None = None,
    ) -> Answer | _Unanswered:
        """Send one request and read its answer to the end, within the timeout."""
        client, limiter = connections.get()
        steps: list[str] = []
        received: dict[str, Any] = {}
        reason = ""
        never_sent = False

        async def trace(step: str, _: Any) -> None:
            # A proxy's CONNECT makes the same step before the request does: that errs to the safe side.
            is_first = step.endswith(_FIRST_BYTE) and not any(earlier.endswith(_FIRST_BYTE) for earlier in steps)
            if is_first and before_first_byte is not None and self._is_traced:
                await before_first_byte()
            steps.append(step)

        async with limiter:
            with anyio.move_on_after(self._timeout) as scope:
                if before_first_byte is not None and not self._is_traced:
                    await before_first_byte()
                try:
                    request = self._request(client, call, trace)
                    response = await client.send(request, stream=True)
                    async with reading(response) as chunks:
                        received["status_code"] = response.status_code
                        received["headers"] = {k.lower(): v for k, v in response.headers.items()}
                        body = received["body"] = bytearray()
                        async for chunk in chunks:
                            body += chunk
                            if len(body) > MAX_ANSWER_BYTES:
                                break
                except EXCHANGE_ERRORS as error:
                    reason = _reason(error)
                    never_sent = isinstance(error, _NEVER_SENT)
        if scope.cancelled_caught:
            reason = f"no whole answer came within {self._timeout:g} s"
        answer = self._answer(received) if received else None
        if answer is not None and not reason:
            return answer
        # The line between "not sent" and "may have been sent" is the first byte of the request's head. The transports
        # that report their steps say when they cross it; for the others there is only the kind of the error.
        sent = any(step.endswith(_FIRST_BYTE) for step in steps) if steps else not never_sent
        return _Unanswered(reason, sent, answer, steps[-1] if steps else None)

    def _request(self, client: httpx.AsyncClient, call: ApiCall, trace: Any) -> httpx.Request:
        headers = httpx.Headers({"Authorization": f"Bearer {self._key.reveal()}"})
        if call.content_type is not None:
            headers["Content-Type"] = call.content_type
            headers["Content-Length"] = str(call.content_length)
        whole = b"".join(call.body) if call.content_length <= _PIECE else None
        request = client.build_request(
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

    def _answer(self, received: dict[str, Any]) -> Answer:
        """Make the answer, without the key should the service have repeated it."""
        key = self._key.reveal()
        headers = {name: value.replace(key, repr(self._key)) for name, value in received["headers"].items()}
        body = _decoded(bytes(received.get("body", b"")), headers.get("content-encoding", ""))
        return Answer(received["status_code"], headers, body.replace(key.encode(), repr(self._key).encode()))


def _decoded(body: bytes, encoding: str) -> bytes:
    """Undo a gzip that was not asked for, up to the size that an answer may have."""
    if encoding.strip().lower() not in {"gzip", "x-gzip"}:
        return body
    try:
        return zlib.decompressobj(wbits=31).decompress(body, MAX_ANSWER_BYTES + 1)
    except zlib.error:
        return body


def _reason(error: Exception) -> str:
    """Say what happened in our own words: the library's may hold a header's value."""
    kinds: list[tuple[type[Exception], str]] = [
        (httpx.ConnectTimeout, "no connection was made in time"),
        (httpx.ConnectError, "no connection could be made"),
        (httpx.ProxyError, "the proxy made no connection"),
        (httpx.PoolTimeout, "no connection was free in time"),
        (httpx.TimeoutException, "the connection fell silent"),
        (httpx.RemoteProtocolError, "the connection ended or was garbled"),
        (httpx.NetworkError, "the connection broke"),
    ]
    return next((text for kind, text in kinds if isinstance(error, kind)), f"it failed ({type(error).__name__})")
