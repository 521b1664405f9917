"""The one place that speaks HTTP to the API: send, classify, retry.

Rules: the key is added here and goes to the API's origin alone. Redirects are not followed, cookies and netrc are not
used. No more requests are under way than there may be connections, so that none ever queues in a pool. An error of the
HTTP library becomes a sentence and is dropped: it holds the request, and the request holds the key.

By itself the API is reached over connections of our own (`_connections`). Where the caller has a transport, where a
proxy may be configured, or where something has put itself into httpx, it is reached through httpx.
"""

from __future__ import annotations

import logging
import ssl
import zlib
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
from attrs import frozen

from . import _calls, _wire
from ._calls import ApiCall
from ._config import Secret
from ._errors import ConceptVizError, Credits, NotSentError, PollInterruptedError, ServerError
from ._exchange import Carrier, Kind, LoopBound, Received, Turns, is_httpx_changed, may_go_direct, share_of
from ._json import MAX_ANSWER_BYTES
from ._models import Retries, Submission, TaskState
from ._pace import Pace
from ._policy import SAFE_TO_READ_AGAIN, retry_delay
from ._refusals import parse_retry_after
from ._wire import Answer

if TYPE_CHECKING:
    import httpx

    from ._events import Event
    from ._requests import EditRequest, GenerateRequest

logger = logging.getLogger("conceptviz")

# The step that a transport reports before it writes a request's head.
_FIRST_BYTE = "send_request_headers.started"
# The errors, by the names that httpx and httpcore share, that are raised before a connection exists.
_NEVER_SENT = {"ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError"}


@frozen(eq=False)
class _Line:
    """The way to the API in one event loop.

    Attributes:
        looks: What carries the looks, over connections that are kept.
        submits: What carries the submits. Each has a connection of its own: one that was used before may be closing, or
            may still hold an answer to somebody else's request, and a submit that meets either cannot be told from one
            that was charged.
        turns: Who may have a request under way.
        paces: How fast requests of a kind may follow each other.
    """

    looks: Carrier
    submits: Carrier
    turns: Turns
    paces: Mapping[Kind, Pace]

    async def aclose(self) -> None:
        await self.looks.aclose()
        await self.submits.aclose()


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
        emit: Called with each event, or None if nobody listens.
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
        emit: Callable[[Event], Awaitable[None]] | None,
        rng: Random,
    ) -> None:
        self._key = api_key
        self._base_url = base_url
        self._timeout = timeout
        self._retries = retries
        self._emit = emit
        self._rng = rng
        self._max_connections = max_connections
        self._given = transport
        self._host = urlsplit(base_url).hostname
        self._line = LoopBound(self._open, _Line.aclose)

    def _open(self) -> _Line:
        kinds: tuple[Kind, ...] = ("submit", "look")
        return _Line(
            self._carrier(keep_alive=True),
            self._carrier(keep_alive=False),
            Turns(self._max_connections),
            {kind: Pace() for kind in kinds},
        )

    def _carrier(self, *, keep_alive: bool) -> Carrier:
        # Without TLS the host is this machine, and a proxy would be handed the key.
        tls = self._base_url.startswith("https:")
        is_changed = is_httpx_changed()
        if self._given is None and may_go_direct(tls=tls):
            from ._connections import Connections

            context = None
            if tls:
                from ._http import ssl_context

                context = ssl_context()
            return Connections(self._base_url, context=context, timeout=self._timeout, keep_alive=keep_alive)
        # httpx takes longer to import than all the rest: it is for those who need it.
        from ._http import ThroughHttpx, is_own_transport, open_http_client

        client = open_http_client(
            self._given,
            timeout=self._timeout,
            max_connections=self._max_connections,
            keep_alive=keep_alive,
            tls=tls,
            proxies=tls,
        )
        # Only httpx's own transport is known to say when it is about to send; what is made of it may not.
        is_traced = not is_changed and is_own_transport(self._given)
        return ThroughHttpx(self._base_url, client, is_traced=is_traced)

    @property
    def most_submits(self) -> int:
        """How many submits may be under way at once."""
        return share_of(self._max_connections)

    @property
    def most_looks(self) -> int:
        """How many looks may be under way at once."""
        return share_of(self._max_connections)

    async def take_turn(self) -> Turns:
        """Wait until a submit may be under way, and take its place; it is to be given back."""
        turns = self._line.get().turns
        await anyio.lowlevel.checkpoint()  # nothing is begun for a caller who is cancelled already
        await turns.take("submit")
        return turns

    async def submit(
        self,
        call: ApiCall,
        request: GenerateRequest | EditRequest,
        before_first_byte: Callable[[], Awaitable[None]],
    ) -> Submission:
        """Send a submit, once. The caller has a turn.

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
        line = self._line.get()
        await _keep(line.paces["submit"])
        answer = await self._exchange(call, line.submits, Received(), before_first_byte)
        self._learn(line.paces["submit"], answer)
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
        line, received = self._line.get(), Received()
        try:
            state = await self._look_over(line, line.looks, received, task_id, prompts)
            if not state.is_terminal or received.is_certain:
                return state
        except ConceptVizError as error:
            if isinstance(error, SAFE_TO_READ_AGAIN) or received.is_certain:
                raise
        # A connection that was used before may still hold an answer to somebody else's request, and an answer does not
        # say which task it is about: what would end the wait is asked for again over a connection of its own.
        return await self._look_over(line, line.submits, Received(), task_id, prompts)

    async def _look_over(
        self, line: _Line, carrier: Carrier, received: Received, task_id: str, prompts: tuple[str, ...]
    ) -> TaskState:
        await _keep(line.paces["look"])
        await line.turns.take("look")
        try:
            answer = await self._exchange(_calls.build_look(task_id), carrier, received)
        finally:
            line.turns.give_back("look")
        self._learn(line.paces["look"], answer)
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
                    if self._emit is not None:
                        from ._events import Retrying  # events are loaded by those who listen

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
        await self._line.aclose()

    async def _exchange(
        self,
        call: ApiCall,
        carrier: Carrier,
        received: Received,
        before_first_byte: Callable[[], Awaitable[None]] | None = None,
    ) -> Answer | _Unanswered:
        """Send one request and read its answer to the end, within the timeout."""
        self._line.check()  # refuses if the client was closed while the caller waited for a turn or a slot
        steps: list[str] = []
        reason = ""
        never_sent = not carrier.is_traced
        refused_by = None

        async def trace(step: str, info: Mapping[str, Any]) -> None:
            is_first = step.endswith(_FIRST_BYTE) and not any(earlier.endswith(_FIRST_BYTE) for earlier in steps)
            if is_first and getattr(info.get("request"), "method", None) == b"CONNECT":
                return  # to a proxy, which has not seen the request yet
            if is_first and before_first_byte is not None and carrier.is_traced:
                await before_first_byte()
            steps.append(step)

        with anyio.move_on_after(self._timeout) as scope:
            try:
                if before_first_byte is not None and not carrier.is_traced:
                    await before_first_byte()
                never_sent = False
                watch = None if before_first_byte is None else trace
                await carrier.exchange(call, f"Bearer {self._key.reveal()}", received, watch)
            except carrier.errors as error:
                refused_by = _refused_by(error)
                reason = _reason(error) if refused_by is None else f"TLS was refused ({refused_by})"
                never_sent = not _NEVER_SENT.isdisjoint(_kinds(error))
            except BaseException as error:
                _cut_off(error)
                raise error  # noqa: TRY201 - a bare `raise` would bring the way back
        if scope.cancelled_caught:
            reason = f"no whole answer came within {self._timeout:g} s"
        logger.debug("%s %s: %s", call.method, call.path, reason or received.status_code)
        answer = self._answer(received) if received.status_code else None
        if answer is not None and not reason:
            return answer
        # The line between "not sent" and "may have been sent" is the first byte of the request's head. The transports
        # that report their steps say when they cross it; for the others there is only the kind of the error.
        sent = any(step.endswith(_FIRST_BYTE) for step in steps) if steps else not never_sent
        last_step = next((s for s in reversed(steps) if s.endswith(".started") and "close" not in s), None)
        return _Unanswered(reason, sent, answer, last_step, refused_by)

    def _learn(self, pace: Pace, answer: Answer | _Unanswered) -> None:
        if isinstance(answer, Answer) and answer.status_code == 429:
            asked = parse_retry_after(answer.headers) or 0.0
            pace.refused(anyio.current_time(), min(asked, self._retries.max_retry_after))
        else:
            pace.answered()

    def _answer(self, received: Received) -> Answer:
        """Make the answer, without the key should the service have repeated it."""
        key, mask = self._key.reveal(), repr(self._key)
        headers = {name: value.replace(key, mask) for name, value in received.headers.items()}
        body = _decoded(bytes(received.body), headers.get("content-encoding", ""))
        return Answer(received.status_code, headers, body.replace(key.encode(), mask.encode()))


async def _keep(pace: Pace) -> None:
    """Wait for the next slot of a pace."""
    while (delay := pace.book(anyio.current_time())) > 0:
        await anyio.sleep(delay)
        if not pace.is_paused(anyio.current_time()):
            return


def _cut_off(error: BaseException) -> None:
    """Cut an error off from the way it came and from what it came of: frames of the HTTP library hold the key."""
    pending: list[BaseException | None] = [error]
    while pending:
        one = pending.pop()
        if one is not None and one.__traceback__ is not None:
            one.__traceback__ = None
            # What it came of may be the broken connection that was being closed as it was raised. A cancellation stays:
            # anyio looks for its own there.
            if not isinstance(one.__context__, anyio.get_cancelled_exc_class()):
                one.__context__ = None
            pending += [one.__context__, one.__cause__]


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


def _kinds(error: BaseException) -> list[str]:
    """Return the names of an error's classes, the closest first: httpx has its own by the names of httpcore's."""
    return [cls.__name__ for cls in type(error).__mro__]


_REASONS = {
    "ConnectTimeout": "no connection was made in time",
    "ConnectError": "no connection could be made",
    "ProxyError": "the proxy made no connection",
    "PoolTimeout": "no connection was free in time",
    "TimeoutException": "the connection fell silent",
    "RemoteProtocolError": "the connection ended or was garbled",
    "NetworkError": "the connection broke",
}


def _reason(error: Exception) -> str:
    """Say what happened in our own words: the library's may hold a header's value."""
    known = (_REASONS[name] for name in _kinds(error) if name in _REASONS)
    return next(known, f"it failed ({type(error).__name__})")
