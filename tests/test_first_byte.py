"""The transport, looked at closely: when a submit crosses the line from "not sent" to "may have been sent"."""

from __future__ import annotations

import json
import ssl
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpcore
import httpx
import pytest
from helpers import (
    KEY,
    QUICK,
    RECEIPT,
    RUNNING,
    TASK,
    answer,
    assert_no_key,
    client,
    in_virtual_time,
    raw_client,
    silence,
)
from raw_server import Connection, RawServer, answering

from conceptviz import (
    AsyncConceptViz,
    GenerateRequest,
    InvalidRequestError,
    NotSentError,
    RateLimitedError,
    Retries,
    Submission,
    SubmissionUnknownError,
    _http,
    _transport,
)
from conceptviz._calls import ApiCall, build_generate
from conceptviz._exchange import Received, Trace
from conceptviz._pace import Pace
from conceptviz._transport import Transport

pytestmark = pytest.mark.anyio

RECEIPT_BYTES = json.dumps(RECEIPT).encode()


class Reporting:
    """A carrier that reports what it is told to, and never gets an answer."""

    errors: tuple[type[Exception], ...] = (httpx.ReadError,)

    def __init__(self, *steps: str, is_traced: bool = True) -> None:
        self._steps = steps
        self.is_traced = is_traced

    async def exchange(self, call: ApiCall, authorization: str, received: Received, trace: Trace | None) -> None:
        assert trace is not None
        for step in self._steps:
            await trace(step, {})
        raise httpx.ReadError("gone")

    async def aclose(self) -> None:
        """There is nothing to close."""


async def sent_by(cv: AsyncConceptViz, before: Callable[[], Awaitable[None]]) -> Submission:
    request = GenerateRequest("a")
    return await cv._core.transport.submit(build_generate(request), request, before)


FIRST_BYTE = "http11.send_request_headers.started"


@pytest.mark.parametrize(
    "carrier",
    [
        Reporting("connection.connect_tcp.started", FIRST_BYTE, "http11.send_request_headers.complete", FIRST_BYTE),
        # Before it is called, whatever it then reports.
        Reporting(FIRST_BYTE, is_traced=False),
    ],
    ids=["known to report", "not known to"],
)
async def test_the_first_byte_is_announced_once(carrier: Reporting, monkeypatch: pytest.MonkeyPatch) -> None:
    """However often a transport says that it begins."""
    announced = list[str]()
    cv = AsyncConceptViz(KEY)
    monkeypatch.setattr(Transport, "_carrier", lambda *_, **__: carrier)

    async def before() -> None:
        announced.append("now")

    async with cv:
        with pytest.raises(SubmissionUnknownError):
            await sent_by(cv, before)
    assert announced == ["now"]


async def test_the_last_step_is_the_last_that_was_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not the closing, which comes of the failure."""
    begun = "http11.receive_response_headers.started"
    carrier = Reporting(
        FIRST_BYTE,
        begun,
        "http11.receive_response_headers.failed",
        "http11.response_closed.started",
        "http11.response_closed.complete",
    )
    monkeypatch.setattr(Transport, "_carrier", lambda *_, **__: carrier)
    async with AsyncConceptViz(KEY) as cv:
        with pytest.raises(SubmissionUnknownError) as caught:
            await cv.submit("a")
    assert caught.value.last_step == begun


async def test_who_waited_for_a_place_in_a_client_that_is_closed_sends_nothing() -> None:
    """Though there is a place in the end."""
    cv, script = client(silence, max_connections=1)
    caught: list[Exception] = []

    async def wait() -> None:
        try:
            await cv.task(TASK).status()
        except InvalidRequestError as error:
            caught.append(error)

    async with anyio.create_task_group() as second, anyio.create_task_group() as first:
        first.start_soon(cv.task(TASK).status)
        await anyio.wait_all_tasks_blocked()
        second.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        await cv.aclose()
        first.cancel_scope.cancel()
    assert script.count == 1
    [error] = caught
    assert "closed" in str(error)


async def test_errors_that_come_of_each_other_are_cut_off_once() -> None:
    """A loop of them is no endless one."""
    one, other = raised("one"), raised("other")
    one.__cause__, other.__cause__ = other, one
    one.__context__ = raised("context")
    _transport._cut_off(one)
    assert one.__traceback__ is other.__traceback__ is None
    assert one.__context__ is None
    assert one.__cause__ is other


def raised(text: str) -> RuntimeError:
    with pytest.raises(RuntimeError) as caught:
        raise RuntimeError(text)
    return caught.value


async def test_a_timeout_before_the_first_byte_is_nothing_sent() -> None:
    """Of a transport that reports nothing it is still known that it was not yet asked."""
    cv, script = client(RECEIPT, timeout=0.02)
    async with cv:
        with pytest.raises(NotSentError, match="no whole answer came within"):
            await sent_by(cv, anyio.sleep_forever)
    assert script.count == 0


async def test_nobody_there_is_said_in_words() -> None:
    with RawServer(listening=False) as server:
        async with raw_client(server, retries=Retries(attempts=1)) as cv:
            with pytest.raises(NotSentError, match=r"was not sent: no connection could be made \("):
                await cv.submit("a")


async def test_what_a_transport_raises_of_its_own_leads_to_no_key() -> None:
    """It comes to the caller as it is, without the frames that it came through."""

    def fail(request: httpx.Request) -> httpx.Response:
        raise ZeroDivisionError(request.url.host)

    async with AsyncConceptViz(KEY, transport=httpx.MockTransport(fail), retries=QUICK) as cv:
        with pytest.raises(ZeroDivisionError) as caught:
            await cv.task(TASK).status()
    assert_no_key(caught.value)


async def test_a_word_over_a_kept_connection_is_asked_for_once() -> None:
    """That a task is not done yet is believed: who is mistaken there only waits a little longer."""

    def serve(connection: Connection) -> None:
        for _ in range(3):
            connection.read()
            body = json.dumps(RUNNING).encode()
            connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    with RawServer(serve) as server:
        async with raw_client(server, transport=httpx.AsyncHTTPTransport()) as cv:
            for _ in range(3):
                assert not (await cv.task(TASK).status()).is_terminal
    assert (len(server.requests), server.connections) == (3, 1)


async def test_without_tls_no_certificates_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def read() -> None:
        pytest.fail("they are not needed")

    monkeypatch.setattr(_http, "ssl_context", read)
    monkeypatch.setattr(_transport, "may_go_direct", lambda **_: False)
    with RawServer(answering(RECEIPT_BYTES)) as server:
        async with raw_client(server) as cv:
            assert (await cv.submit("a")).id == TASK


async def test_a_client_that_is_closed_while_a_submit_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    made = anyio.connect_tcp

    async def connect(host: str, port: int) -> Any:
        stream = await made(host, port)
        await cv._core.transport.aclose()
        return stream

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    with RawServer(answering(RECEIPT_BYTES)) as server:
        cv = raw_client(server, retries=Retries(attempts=1))
        with pytest.raises(NotSentError):
            await cv.submit("a")
    assert server.requests == []


async def test_a_cancelled_caller_is_given_no_turn() -> None:
    cv, script = client(RECEIPT)
    async with cv:
        with anyio.CancelScope() as scope:
            scope.cancel()
            await cv.submit("a")
        assert scope.cancelled_caught
        with anyio.CancelScope() as scope:
            scope.cancel()
            await cv._core.transport.take_turn()
            pytest.fail("it was given a turn")
    assert script.count == 0


async def test_submits_keep_their_pace() -> None:
    """After a 429 the next submit waits, whoever sends it."""
    slow = answer(429, {"error": "Slowly.", "code": "MODERATION_RATE_LIMITED"}, {"retry-after": "30"})
    cv, script = client(slow, RECEIPT, retries=Retries(attempts=1))
    async with cv:
        with pytest.raises(RateLimitedError):
            await cv.submit("a")
        with anyio.move_on_after(0.05) as scope:
            await cv.submit("b")
        assert scope.cancelled_caught
    assert script.count == 1


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (httpcore.ConnectError(), "no connection could be made"),
        (httpcore.ConnectTimeout(), "no connection was made in time"),
        (httpcore.ReadTimeout(), "the connection fell silent"),
        (httpcore.WriteError(), "the connection broke"),
        (httpcore.RemoteProtocolError(), "the connection ended or was garbled"),
        (httpx.ConnectError(""), "no connection could be made"),
        (httpx.ProxyError(""), "the proxy made no connection"),
        (httpx.PoolTimeout(""), "no connection was free in time"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
async def test_what_is_said_of_an_error(error: Exception, reason: str) -> None:
    assert _transport._reason(error) == reason


async def test_tls_that_was_refused_is_found_behind_other_errors() -> None:
    """Whether they were raised from it or while it was handled; that a connection broke is no refusal."""
    refusal = ssl.SSLCertVerificationError(1, "expired")
    caused, handled = OSError("caused"), httpx.ConnectError("handled")
    caused.__cause__ = refusal
    handled.__context__ = caused
    found = _transport._refused_by(handled)
    assert isinstance(found, ssl.SSLCertVerificationError)
    assert (found.args, found is refusal) == (refusal.args, False)
    caused.__cause__ = ssl.SSLEOFError(8, "the end")
    assert _transport._refused_by(handled) is None


@pytest.mark.parametrize(("connections", "share"), [(1, 1), (4, 3), (20, 15)])
async def test_how_many_may_be_under_way(connections: int, share: int) -> None:
    async with AsyncConceptViz(KEY, max_connections=connections) as cv:
        assert (cv._core.transport.most_submits, cv._core.transport.most_looks) == (share, share)


def test_a_look_that_failed_is_repeated_after_a_pause() -> None:
    async def main() -> float:
        cv, _ = client(answer(503, {}), RUNNING, retries=Retries(base_delay=50.0, max_delay=50.0))
        async with cv:
            start = anyio.current_time()
            await cv.task(TASK).status()
            return anyio.current_time() - start

    assert 0.0 < in_virtual_time(main) <= 50.0


def test_a_pause_that_grows_while_it_is_kept() -> None:
    """The service asked somebody else for more of it meanwhile."""

    async def main() -> float:
        pace, start = Pace(), anyio.current_time()
        pace.refused(start, 10.0)

        async def refuse_again() -> None:
            await anyio.sleep(5.0)
            pace.refused(anyio.current_time(), 10.0)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refuse_again)
            await _transport._keep(pace)
        return anyio.current_time() - start

    assert in_virtual_time(main) >= 15.0
