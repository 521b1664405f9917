"""The one place that speaks HTTP to the API: send, classify, retry.

Rules: the key is added here and goes to the API's origin alone. Redirects are not followed, cookies and netrc are not
used. No more requests are under way than there may be connections, so that none ever queues in httpx's pool. An error
of the HTTP library becomes a sentence and is dropped: it holds the request, and the request holds the key.
"""

from __future__ import annotations

import ssl
import zlib
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import httpx
from attrs import frozen

from . import _calls, _wire
from ._calls import ApiCall
from ._config import Secret
from ._errors import ConceptVizError, Credits, InvalidRequestError, NotSentError, PollInterruptedError, ServerError
from ._events import Event, Retrying
from ._http import EXCHANGE_ERRORS, PIECE, LoopBound, Pieces, open_http_client, reading
from ._json import MAX_ANSWER_BYTES
from ._models import EditRequest, GenerateRequest, Retries, Submission, TaskState
from ._policy import SAFE_TO_READ_AGAIN, retry_delay
from ._wire import Answer

# The step that a transport reports before it writes a request's head.
_FIRST_BYTE = "send_request_headers.started"
# The beginning of the step that it reports when it makes a connection, rather than using one that it has kept.
_CONNECT = "connection.connect_"
# Raised before a connection exists, whatever the transport is.
_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol, httpx.ProxyError)


@frozen
class _Unanswered:
    """An exchange that brought no whole answer: what it means depends on the request.

    It is a value: an error raised in the exchange would keep its frame, and with it the request and what came back.

    Attributes:
        reason: What happened, in our words.
        sent: Whether the service may have the request.
        partial: What arrived of an answer.
        last_step: The last step that was begun, in the transport's words, or None.
        refused_by: Why TLS was refused, for good, or None.
    """

    reason: str
    sent: bool
    partial: Answer | None
    last_step: str | None
    refused_by: ssl.SSLError | None = None


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
            message = "The base URL's host is not one that can be connected to. Nothing was sent."
            raise InvalidRequestError(message) from None
        tls = base_url.startswith("https:")
        # Only httpx's own transport is known to say when it is about to send; what is made of it may not.
        self._is_traced = transport is None or type(transport) is httpx.AsyncHTTPTransport

        def open_client(keep_alive: bool) -> httpx.AsyncClient:
            # Without TLS the host is this machine, and a proxy would be handed the key.
            return open_http_client(
                transport, timeout=timeout, max_connections=max_connections, keep_alive=keep_alive, tls=tls, proxies=tls
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
            NotSentError: No connection was made. An `ssl.SSLError` as its cause will be there the next time too.
            SubmissionUnknownError: It was sent and may have been charged.
            APIStatusError: It was refused.
            GenerationFailedError: It failed at once, documented as refunded.
        """
        answer = await self._exchange(call, self._submits, [], before_first_byte)
        if isinstance(answer, Answer):
            return _wire.parse_submission(answer, request)
        if answer.sent:
            return _wire.unanswered_submission(answer.reason, answer.partial, request, answer.last_step)
        raise NotSentError(
            f"The request was not sent: {answer.reason} ({self._host}). Nothing was spent; it is safe to submit again."
        ) from answer.refused_by

    async def look(self, task_id: str, prompts: tuple[str, ...]) -> TaskState:
        """Look at a task once.

        Raises:
            PollInterruptedError: No answer came.
            APIStatusError: The service answered with an error status.
            UnexpectedResponseError: The answer is not the documented shape.
        """
        steps: list[str] = []
        try:
            state = await self._look_over(self._looks, steps, task_id, prompts)
            if not state.is_terminal or self._was_new(steps):
                return state
        except ConceptVizError as error:
            if isinstance(error, SAFE_TO_READ_AGAIN) or self._was_new(steps):
                raise
        # A connection that was used before may still hold an answer to somebody else's request, and an answer does not
        # say which task it is about: what would end the wait is asked for again over a connection of its own.
        return await self._look_over(self._submits, [], task_id, prompts)

    def _was_new(self, steps: list[str]) -> bool:
        """Say whether an exchange had a connection of its own, as far as one can tell."""
        return not self._is_traced or any(step.startswith(_CONNECT) for step in steps)

    async def _look_over(self, over: LoopBound, steps: list[str], task_id: str, prompts: tuple[str, ...]) -> TaskState:
        answer = await self._exchange(_calls.build_look(task_id), over, steps)
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
        number = 0
        while True:
            number += 1
            try:
                return await self.look(task_id, prompts)
            except ConceptVizError as error:
                delay = retry_delay(error, number, self._retries, self._rng, spends=False)
                if delay is not None:
                    await self._emit(Retrying(task_id=task_id, attempt=number, delay=delay, error=error))
                elif isinstance(error, ServerError):
                    status = error.status_code
                    break
                else:
                    raise
            await anyio.sleep(delay)
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

    async def _exchange(
        self,
        call: ApiCall,
        connections: LoopBound,
        steps: list[str],
        before_first_byte: Callable[[], Awaitable[None]] | None = None,
    ) -> Answer | _Unanswered:
        """Send one request and read its answer to the end, within the timeout; `steps` takes what is reported of it."""
        client, limiter = connections.get()
        received: dict[str, Any] = {}
        reason = ""
        never_sent = not self._is_traced
        refused_by = None

        async def trace(step: str, info: Mapping[str, Any]) -> None:
            is_first = step.endswith(_FIRST_BYTE) and not any(earlier.endswith(_FIRST_BYTE) for earlier in steps)
            if is_first and getattr(info.get("request"), "method", None) == b"CONNECT":
                return  # to a proxy, which has not seen the request yet
            if is_first and before_first_byte is not None and self._is_traced:
                await before_first_byte()
            steps.append(step)

        async with limiter:
            with anyio.move_on_after(self._timeout) as scope:
                if before_first_byte is not None and not self._is_traced:
                    await before_first_byte()
                never_sent = False
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
                    refused_by = _refused_by(error)
                    reason = _reason(error) if refused_by is None else f"TLS was refused ({refused_by})"
                    never_sent = isinstance(error, _NEVER_SENT)
                except anyio.get_cancelled_exc_class() as error:
                    # It comes up through frames of the HTTP library that hold the key.
                    raise error.with_traceback(None)  # noqa: B904 - it is the same error
        if scope.cancelled_caught:
            reason = f"no whole answer came within {self._timeout:g} s"
        answer = self._answer(received) if received else None
        if answer is not None and not reason:
            return answer
        # The line between "not sent" and "may have been sent" is the first byte of the request's head. The transports
        # that report their steps say when they cross it; for the others there is only the kind of the error.
        sent = any(step.endswith(_FIRST_BYTE) for step in steps) if steps else not never_sent
        last_step = next((s for s in reversed(steps) if s.endswith(".started") and "close" not in s), None)
        return _Unanswered(reason, sent, answer, last_step, refused_by)

    def _request(self, client: httpx.AsyncClient, call: ApiCall, trace: Any) -> httpx.Request:
        headers = httpx.Headers({"Authorization": f"Bearer {self._key.reveal()}"})
        if call.content_type is not None:
            headers["Content-Type"] = call.content_type
            headers["Content-Length"] = str(call.content_length)
        whole = b"".join(call.body) if call.content_length <= PIECE else None
        request = client.build_request(
            call.method, self._base_url + call.path, headers=headers, content=whole, extensions={"trace": trace}
        )
        pieces = Pieces(call.body)
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


def _refused_by(error: BaseException | None) -> ssl.SSLError | None:
    """Return why TLS was refused, if it was: a certificate, or a version. The other classes say that it broke off."""
    while error is not None and type(error) not in {ssl.SSLError, ssl.SSLCertVerificationError}:
        error = error.__cause__ or error.__context__
    # A copy: the error itself leads to frames that hold the key.
    return type(error)(*error.args) if isinstance(error, ssl.SSLError) else None


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
