"""The API over HTTP: what goes over the wire, what is sent again, and what an exchange that went wrong came to.

The numbers M1 to M43 are rows of the fault matrix.
"""

import asyncio
import gc
import gzip
import json
import ssl
import warnings
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import anyio
import httpx
import pytest
import respx
import trio
from helpers import (
    API,
    KEY,
    QUICK,
    RECEIPT,
    RUNNING,
    TASK,
    Chunks,
    answer,
    assert_no_key,
    assert_no_key_logged,
    client,
    completed,
    failing,
    in_virtual_time,
    png,
    raw_client,
    silence,
)
from raw_server import Connection, RawServer, answering

import conceptviz
from conceptviz import (
    AsyncConceptViz,
    ConceptVizError,
    Credits,
    InvalidRequestError,
    NotSentError,
    PollInterruptedError,
    RateLimitedError,
    Retries,
    Retrying,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    UnexpectedResponseError,
    _http,
)

pytestmark = pytest.mark.anyio

RECEIPT_BYTES = json.dumps(RECEIPT).encode()


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """M63: no log of any library, at any level, holds the key."""
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


async def test_headers_of_every_request() -> None:
    """The key as a bearer token, our name, no coding of the answer, and nothing that identifies more."""
    cv, script = client(RECEIPT, RUNNING)
    async with cv:
        await (await cv.submit("a")).status()
    for request in script.requests:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        assert request.headers["accept-encoding"] == "identity"
        assert request.headers["user-agent"] == f"conceptviz-python/{conceptviz.__version__}"
        assert "cookie" not in request.headers
        assert "referer" not in request.headers
    assert script.requests[0].headers["content-type"] == "application/json"
    assert script.paths == ["POST /api/v1/generate", f"GET /api/v1/task/{TASK}"]


async def test_headers_on_a_real_connection() -> None:
    with RawServer(answering(RECEIPT_BYTES)) as server:
        async with raw_client(server) as cv:
            assert (await cv.submit("é")).id == TASK
    [request] = server.requests
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.headers["accept-encoding"] == "identity"
    assert request.headers["host"] == f"127.0.0.1:{server.port}"
    assert json.loads(request.body) == {"prompt": "é"}
    assert "transfer-encoding" not in request.headers


async def test_a_cookie_is_not_sent_back() -> None:
    """F18: nothing that an answer sets comes back with the next request."""
    cv, script = client(answer(200, RECEIPT, {"set-cookie": "a=b; Path=/"}), RUNNING)
    async with cv:
        await (await cv.submit("a")).status()
    assert "cookie" not in script.requests[1].headers


async def test_respx_can_stand_in() -> None:
    """Users' mocks work, whose answers are already read when they arrive."""
    with respx.mock(base_url=API) as mock:
        mock.post("/generate").respond(json=RECEIPT)
        mock.get(f"/task/{TASK}").respond(json=completed())
        async with AsyncConceptViz(KEY) as cv:
            state = await (await cv.submit("a")).status()
    assert state.status == "completed"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize(
    "to", ["/elsewhere", "https://elsewhere.example/x", "https://xn--a/", "//[", "data:x", "\x00", "http://x:y/"]
)
async def test_a_submit_is_not_redirected(status: int, to: str) -> None:
    """M36: a redirect of a POST may stand for an accepted one; the target sees nothing."""
    cv, script = client(answer(status, b"", {"location": to}))
    async with cv:
        with pytest.raises(SubmissionUnknownError) as caught:
            await cv.submit("a")
    # httpx itself fails over a Location that it cannot read.
    assert caught.value.status_code in ({status} if "elsewhere" in to else {status, None})
    assert script.count == 1
    assert_no_key(caught.value)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_look_is_not_redirected(status: int) -> None:
    """M37: with real servers, the target of which sees not even a connection."""
    with RawServer(answering(b"{}")) as target:
        away = f"Location: {target.base_url}/task/{TASK}\r\n"
        with RawServer(answering(b"", f"{status} Away", more=away)) as server:
            async with raw_client(server) as cv:
                with pytest.raises(UnexpectedResponseError, match=f"HTTP {status}") as caught:
                    await cv.task(TASK).status()
    assert len(server.requests) == 3
    assert target.connections == 0
    assert_no_key(caught.value)


@pytest.mark.parametrize("url", ["//evil.example/x", "https://u@evil.example", "../../x", "https://conceptviz.app:444"])
async def test_poll_url_is_never_followed(url: str) -> None:
    """M38: the URL of a look is made from the id alone."""
    cv, script = client(RECEIPT | {"poll_url": url}, RUNNING)
    async with cv:
        await (await cv.submit("a")).status()
    assert str(script.requests[1].url) == f"{API}/task/{TASK}"


@pytest.mark.parametrize("task_id", ["../account", "a?b=1", "a#b", "a b", "é", "%2e%2e"])
async def test_a_hostile_task_id_stays_in_its_place(task_id: str) -> None:
    """F11: whatever id the service gives, a look at it stays below /task/."""
    cv, script = client(RECEIPT | {"taskId": task_id}, RUNNING)
    async with cv:
        await (await cv.submit("a")).status()
    path = script.requests[1].url.raw_path.decode()
    assert path.startswith("/api/v1/task/")
    assert not set(path.removeprefix("/api/v1/task/")) & set("/?# ")


async def test_a_large_body_goes_out_whole_and_with_its_length() -> None:
    """A body that is sent in pieces is announced with its length, not chunked, and arrives as it is."""
    image = png(900_000)
    with RawServer(answering(RECEIPT_BYTES)) as server:
        async with raw_client(server) as cv:
            await cv.submit_edit("a", image)
    [request] = server.requests
    assert image in request.body
    assert "transfer-encoding" not in request.headers


async def test_the_key_stays_out_of_the_proxies_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """M66: to a loopback address over http, a proxy would be handed the key."""
    with (
        RawServer(answering(b"{}")) as proxy,
        RawServer(answering(RECEIPT_BYTES)) as server,
    ):
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        async with raw_client(server) as cv:
            await cv.submit("a")
    assert proxy.connections == 0


async def test_through_a_proxy_the_key_is_not_shown_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """M8, M66: CONNECT carries no key; a proxy that refuses is never followed by a second POST."""
    heads: list[bytes] = []

    def refuse(connection: Connection) -> None:
        heads.append(connection.read_some(65536))
        connection.answer(b"", "407 Proxy Authentication Required")

    with RawServer(refuse) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        async with AsyncConceptViz(KEY, base_url="https://api.invalid/api/v1", retries=QUICK, timeout=2) as cv:
            with pytest.raises((NotSentError, SubmissionUnknownError)) as caught:
                await cv.submit("a")
    assert heads[0].startswith(b"CONNECT api.invalid:443")
    assert KEY.encode() not in b"".join(heads)
    assert_no_key(caught.value)


@pytest.mark.parametrize("host", ["999.999.999.999", "xn--a", "xn--"])
def test_a_host_that_cannot_be_connected_to(host: str) -> None:
    """What httpx cannot read as a URL is refused when the client is made, in our words."""
    with pytest.raises(InvalidRequestError, match="host"):
        AsyncConceptViz(KEY, base_url=f"https://{host}/api/v1")


@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", "GZIP"])
async def test_an_answer_that_is_compressed_unasked(encoding: str) -> None:
    cv, _ = client(answer(200, gzip.compress(RECEIPT_BYTES), {"content-encoding": encoding}))
    async with cv:
        assert (await cv.submit("a")).id == TASK


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(bytes(16 * 2**20))),
        ("gzip", gzip.compress(RECEIPT_BYTES)[:12]),
        ("gzip", b"not gzip"),
        ("br", b"\x8b\x00\x80{}\x03"),
    ],
    ids=["bomb", "cut", "not gzip", "brotli"],
)
async def test_an_answer_that_cannot_be_decoded_in_full(encoding: str, body: bytes) -> None:
    """M31: it is not the documented shape, and takes no memory to speak of."""
    cv, script = client(answer(200, body, {"content-encoding": encoding}))
    async with cv:
        with pytest.raises(SubmissionUnknownError):
            await cv.submit("a")
        with pytest.raises(UnexpectedResponseError):
            await cv.task(TASK).status()
    assert script.count == 1 + 3


async def test_an_oversize_answer_is_left_unread() -> None:
    """An answer without an end is closed at 1 MiB; what was read may still hold the id."""
    body = Chunks(RECEIPT_BYTES, *[b" " * 65536] * 100)
    cv, _ = client(lambda _: httpx.Response(200, stream=body))
    async with cv:
        assert (await cv.submit("a")).id == TASK
    assert body.closed


async def test_an_answer_without_end_that_never_waits() -> None:
    """A stream that cannot be cancelled, because it never waits, is left all the same."""

    class Endless(httpx.AsyncByteStream):
        async def __aiter__(self):  # type: ignore[no-untyped-def]  # as httpx's own
            yield bytes(2**20)
            while True:
                yield b"x"

    cv, _ = client(lambda _: httpx.Response(200, stream=Endless()))
    with warnings.catch_warnings():
        # Such a stream's generators are left to the garbage collector, of which trio complains.
        warnings.simplefilter("ignore", ResourceWarning)
        async with cv:
            with anyio.fail_after(5), pytest.raises(SubmissionUnknownError) as caught:
                await cv.submit("a")
        # One generator after another, in tasks of trio's own.
        gc.collect()
        for _ in range(10):
            await anyio.sleep(0.001)
    assert len(caught.value.body) == 4096


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_an_oversize_answer_leaves_no_generator_behind(backend: str) -> None:
    """Trio complains of a generator that is collected unfinished; httpx reads through a chain of them."""

    def flood(connection: Connection) -> None:
        connection.read()
        connection.answer(b"x" * 3 * 2**20)

    async def main() -> None:
        async with raw_client(server) as cv:
            with pytest.raises(SubmissionUnknownError):
                await cv.submit("a")
        gc.collect()

    with RawServer(flood) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anyio.run(main, backend=backend)
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_broken_upload_leaves_no_generator_behind(backend: str) -> None:
    def reset(connection: Connection) -> None:
        connection.read_some(65536)
        connection.reset()

    async def main() -> None:
        async with raw_client(server) as cv:
            with pytest.raises(SubmissionUnknownError):
                await cv.submit_edit("a", [png(8_000_000)] * 3)
        gc.collect()

    with RawServer(reset) as server, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        anyio.run(main, backend=backend)
    assert [str(warning.message) for warning in caught] == []
    assert server.connections == 1


@pytest.mark.parametrize("image", ["https://example.com/a.png", png(900_000)], ids=["small", "large"])
async def test_a_body_that_is_not_read_to_its_end_leaves_no_generator_behind(image: str | bytes) -> None:
    class Stops(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert isinstance(request.stream, httpx.AsyncByteStream)
            await anext(aiter(request.stream))
            raise httpx.WriteError("", request=request)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with AsyncConceptViz(KEY, transport=Stops()) as cv:
            with pytest.raises(SubmissionUnknownError):
                await cv.submit_edit("a", image)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("status", [200, 201, 202, 299, 400, 500, 503])
async def test_an_id_in_an_answer_of_any_status_is_a_task(status: int) -> None:
    """M34: whatever else the answer says, the task exists and is paid for."""
    cv, script = client(answer(status, RECEIPT))
    async with cv:
        assert (await cv.submit("a")).id == TASK
    assert script.count == 1


@pytest.mark.parametrize("body", [b"", b"<html>", b"null", b"[]", b'"x"', b"{}", b'{"taskId": null}', b'{"taskId": 7}'])
async def test_a_success_without_an_id_is_unknown(body: bytes) -> None:
    """M28: never sent again, and kept for the support desk."""
    cv, script = client(answer(200, body))
    async with cv:
        with pytest.raises(SubmissionUnknownError) as caught:
            await cv.submit("a")
    assert (caught.value.body, caught.value.credits, caught.value.expected_credits) == (body, Credits.UNKNOWN, 2)
    assert script.count == 1
    assert_no_key(caught.value)


@pytest.mark.parametrize("status", [408, 409, 500, 502, 503, 504, 520])
async def test_a_submit_that_a_gateway_answers_is_unknown(status: int) -> None:
    cv, script = client(answer(status, b"<html>"))
    async with cv:
        with pytest.raises(SubmissionUnknownError) as caught:
            await cv.submit("a")
    assert script.count == 1
    assert caught.value.status_code == status


async def test_a_key_that_the_service_repeats_is_masked() -> None:
    """M61: neither the body that an error keeps nor its headers bring the key back."""
    cv, _ = client(answer(200, f"you sent Bearer {KEY}".encode(), {"x-echo": KEY}))
    async with cv:
        with pytest.raises(SubmissionUnknownError) as caught:
            await cv.submit("a")
    assert caught.value.body == b"you sent Bearer cvk_***"
    assert_no_key(caught.value)


@pytest.mark.parametrize("attempts", [1, 2, 3])
async def test_a_refused_connection_is_tried_again_and_was_not_sent(attempts: int) -> None:
    """M1: as often as `Retries` says, and it is certain that nothing was spent."""
    events: list[Any] = []
    retries = Retries(attempts=attempts, base_delay=0.001, max_delay=0.001)
    with RawServer(listening=False) as server:
        async with raw_client(server, retries=retries, on_event=events.append) as cv:
            with pytest.raises(NotSentError, match="safe to submit again") as caught:
                await cv.submit("a")
    assert caught.value.credits is Credits.NOT_SPENT
    assert [event.attempt for event in events] == list(range(1, attempts))
    assert all(isinstance(event.error, NotSentError) for event in events)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert_no_key(caught.value)


async def test_refused_twice_then_listening_is_one_post() -> None:
    """M3."""

    def on_event(event: Any) -> None:
        if isinstance(event, Retrying) and event.attempt == 2:
            server.listen()

    with RawServer(answering(RECEIPT_BYTES), listening=False) as server:
        async with raw_client(server, on_event=on_event) as cv:
            assert (await cv.submit("a")).id == TASK
    assert server.posts == 1


async def test_no_answer_to_the_hello_of_tls_was_not_sent() -> None:
    """M5, M7: a connection that does not get through TLS has carried no request."""
    with RawServer(Connection.reset, Connection.hold) as server:
        base_url = f"https://127.0.0.1:{server.port}/api/v1"
        async with AsyncConceptViz(KEY, base_url=base_url, timeout=0.2, retries=QUICK) as cv:
            with pytest.raises(NotSentError) as caught:
                await cv.submit("a")
    assert server.connections == 3
    assert_no_key(caught.value)


def fin(connection: Connection) -> None:
    connection.read()


def rst(connection: Connection) -> None:
    connection.read()
    connection.reset()


def hold(connection: Connection) -> None:
    connection.read()
    connection.hold()


def garbage(connection: Connection) -> None:
    connection.read()
    connection.send(b"220 smtp.example ESMTP\r\n\r\n")


def two_lengths(connection: Connection) -> None:
    connection.read()
    connection.answer(b"{}", more="Content-Length: 7\r\n")


def bad_chunk(connection: Connection) -> None:
    connection.read()
    connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n")


def endless_header(connection: Connection) -> None:
    connection.read()
    connection.send(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 2**20)


@pytest.mark.parametrize("fault", [fin, rst, hold, garbage, two_lengths, bad_chunk, endless_header])
async def test_a_submit_without_an_answer_is_never_sent_again(fault: Callable[[Connection], None]) -> None:
    """M11, M12, M13, M21, M22, M25: the server has it, so it may be charged, and the error says so."""
    events: list[Any] = []
    with RawServer(fault) as server:
        timeout = 0.2 if fault is hold else 2.0
        async with raw_client(server, timeout=timeout, on_event=events.append) as cv:
            with pytest.raises(SubmissionUnknownError, match="may have been accepted") as caught:
                await cv.submit("a")
    assert server.posts == 1
    assert server.connections == 1
    assert events == []
    assert (caught.value.credits, caught.value.expected_credits) == (Credits.UNKNOWN, 2)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert_no_key(caught.value)


async def test_headers_read_then_closed_is_unknown() -> None:
    """M10: F5, from the first byte on nobody knows what the server has."""

    def close_after_head(connection: Connection) -> None:
        connection.read_some(20)

    with RawServer(close_after_head) as server:
        async with raw_client(server) as cv:
            with pytest.raises(SubmissionUnknownError):
                await cv.submit("a")
    assert server.connections == 1


@pytest.mark.parametrize("fault", [fin, rst, hold, garbage, bad_chunk])
async def test_a_look_without_an_answer_is_taken_again(fault: Callable[[Connection], None]) -> None:
    """Reads cost nothing."""
    with RawServer(fault, fault, answering(b'{"status": "processing"}')) as server:
        async with raw_client(server, timeout=0.2) as cv:
            assert (await cv.task(TASK).status()).status == "processing"
    assert len(server.requests) == 3


@pytest.mark.parametrize("fault", [fin, rst])
async def test_looks_that_keep_failing(fault: Callable[[Connection], None]) -> None:
    with RawServer(fault) as server:
        async with raw_client(server) as cv:
            with pytest.raises(PollInterruptedError, match="goes on at the service") as caught:
                await cv.task(TASK).status()
    assert len(server.requests) == 3
    assert (caught.value.task_id, caught.value.credits) == (TASK, Credits.SPENT)
    assert caught.value.__cause__ is None
    assert_no_key(caught.value)


async def test_looks_that_a_gateway_keeps_answering() -> None:
    """A 5xx is never what the task came to."""
    cv, script = client(answer(502, b"<html>"))
    async with cv:
        with pytest.raises(PollInterruptedError, match="HTTP 502") as caught:
            await cv.task(TASK).status()
    assert script.count == 3
    assert caught.value.task_id == TASK


async def test_a_look_that_is_refused_is_not_taken_again() -> None:
    cv, script = client(answer(404, {"error": "no", "code": "TASK_NOT_FOUND"}))
    async with cv:
        with pytest.raises(TaskNotFoundError) as caught:
            await cv.task(TASK).status()
    assert script.count == 1
    assert caught.value.task_id == TASK


async def test_a_cut_body_with_the_id_inside_is_accepted() -> None:
    """M26: the id of a paid task is worth more than the form of its answer."""
    cut = RECEIPT_BYTES[: RECEIPT_BYTES.index(b'"status"') + 12]
    with RawServer(answering(cut, length=len(RECEIPT_BYTES))) as server:
        async with raw_client(server) as cv:
            task = await cv.submit(["a", "b"])
    assert task.id == TASK
    assert task.submission is not None
    assert task.submission.prompts == ("a", "b")
    assert server.posts == 1


@pytest.mark.parametrize("at", range(0, len(RECEIPT_BYTES), 7))
async def test_a_body_cut_anywhere(at: int) -> None:
    """M26: accepted if the whole id arrived, unknown otherwise, and one POST either way."""
    whole_id = RECEIPT_BYTES.index(TASK.encode()) + len(TASK) + 1
    broken = httpx.Response(200, stream=Chunks(RECEIPT_BYTES[:at], httpx.ReadError("cut")))
    cv, script = client(lambda _: broken)
    async with cv:
        if at >= whole_id:
            assert (await cv.submit("a")).id == TASK
        else:
            with pytest.raises(SubmissionUnknownError) as caught:
                await cv.submit("a")
            assert caught.value.body == RECEIPT_BYTES[:at]
    assert script.count == 1


async def test_an_answer_in_pieces_of_one_byte() -> None:
    """M100."""
    pieces = [RECEIPT_BYTES[n : n + 1] for n in range(len(RECEIPT_BYTES))]
    cv, _ = client(lambda _: httpx.Response(200, stream=Chunks(*pieces)))
    async with cv:
        task = await cv.submit("a")
    assert task.submission is not None
    assert dict(task.submission.raw) == RECEIPT


@pytest.mark.parametrize(
    "start",
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 4000\r\n\r\n", b""],
    ids=["header drip", "body drip", "interim answers"],
)
async def test_a_drip_is_bounded_by_the_timeout(start: bytes) -> None:
    """M23, M24, M27: httpx's own timeouts would start again with every byte."""
    drop = b"X-Drip: 1\r\n" if start else b"HTTP/1.1 100 Continue\r\n\r\n"

    def drip(connection: Connection) -> None:
        connection.read()
        connection.send(start)
        connection.drip(drop, pause=0.01)

    with RawServer(drip) as server:
        async with raw_client(server, timeout=0.2) as cv:
            with anyio.fail_after(2), pytest.raises(SubmissionUnknownError, match=r"within 0\.2 s") as caught:
                await cv.submit("a")
    assert server.posts == 1
    assert_no_key(caught.value)


async def test_a_drip_that_held_the_id_is_accepted() -> None:
    """M27: what had arrived when the time was up still counts."""
    cv, script = client(lambda _: httpx.Response(200, stream=Chunks(RECEIPT_BYTES[:60], None)), timeout=0.05)
    async with cv:
        assert (await cv.submit("a")).id == TASK
    assert script.count == 1


async def test_an_upload_that_nobody_reads_is_bounded() -> None:
    """M14: the server takes the head and then no more."""

    def stop_reading(connection: Connection) -> None:
        connection.read_some(100)
        connection.hold()

    with RawServer(stop_reading) as server:
        async with raw_client(server, timeout=0.2) as cv:
            with anyio.fail_after(3), pytest.raises(SubmissionUnknownError):
                await cv.submit_edit("a", png(12_000_000))
    assert server.connections == 1


async def test_an_early_refusal_of_an_upload_is_never_followed_by_a_second() -> None:
    """M16: F6, the answer may be lost to the RST that follows; what it came to is then unknown."""

    def refuse(connection: Connection) -> None:
        connection.read_some(1000)
        connection.answer(json.dumps({"error": "no", "code": "INVALID_API_KEY"}).encode(), "401 Unauthorized")

    with RawServer(refuse) as server:
        async with raw_client(server, timeout=1) as cv:
            with pytest.raises((conceptviz.AuthenticationError, SubmissionUnknownError)) as caught:
                await cv.submit_edit("a", png(4_000_000))
    assert server.connections == 1
    assert_no_key(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (httpx.ConnectError, NotSentError),
        (httpx.ConnectTimeout, NotSentError),
        (httpx.PoolTimeout, NotSentError),
        (httpx.ProxyError, NotSentError),
        (httpx.UnsupportedProtocol, NotSentError),
        (httpx.ReadError, SubmissionUnknownError),
        (httpx.ReadTimeout, SubmissionUnknownError),
        (httpx.WriteError, SubmissionUnknownError),
        (httpx.WriteTimeout, SubmissionUnknownError),
        (httpx.CloseError, SubmissionUnknownError),
        (httpx.RemoteProtocolError, SubmissionUnknownError),
        (httpx.LocalProtocolError, SubmissionUnknownError),
    ],
)
async def test_each_error_of_a_transport_that_reports_no_steps(
    error: type[httpx.TransportError], expected: type[ConceptVizError]
) -> None:
    """Without the steps there is only the kind of error; what is not certain is unknown."""
    cv, script = client(failing(error))
    async with cv:
        with pytest.raises(expected) as caught:
            await cv.submit("a")
        assert script.count == (3 if expected is NotSentError else 1)
        assert_no_key(caught.value)
        with pytest.raises(PollInterruptedError) as read:
            await cv.task(TASK).status()
        assert_no_key(read.value)


class Wrapper:
    """What instrumentations put in the place of a method: it says of itself that it is a function of httpx."""

    def __init__(self, wrapped: Any) -> None:
        self.wrapped = wrapped
        self.seen: list[str] = []
        self.__module__ = wrapped.__module__

    @property  # type: ignore[misc]  # as wrapt has it
    def __class__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return type(self.wrapped)

    def __get__(self, instance: Any, owner: Any) -> Any:
        if instance is None:
            return self

        async def handle(request: httpx.Request) -> httpx.Response:
            self.seen.append(f"{request.method} {request.url.path}")
            answered: httpx.Response = await self.wrapped(instance, request)
            return answered

        return handle


async def test_an_instrumentation_of_httpx_sees_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenTelemetry's does: what is put into httpx's transport stands before the API too."""
    wrapper = Wrapper(httpx.AsyncHTTPTransport.handle_async_request)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", wrapper)
    with RawServer(answering(RECEIPT_BYTES)) as server:
        async with raw_client(server) as cv:
            await (await cv.submit("a")).status()
    assert wrapper.seen == ["POST /api/v1/generate", f"GET /api/v1/task/{TASK}"]


def test_every_error_of_httpx_is_known() -> None:
    """A new kind of error in httpx fails here, and someone decides whether it means that nothing was sent."""

    def leaves(cls: type[Exception]) -> set[str]:
        below = cls.__subclasses__()
        return {name for sub in below for name in leaves(sub)} if below else {cls.__name__}

    assert leaves(httpx.TransportError) == {
        *("ConnectTimeout", "ReadTimeout", "WriteTimeout", "PoolTimeout"),
        *("ConnectError", "ReadError", "WriteError", "CloseError"),
        *("ProxyError", "UnsupportedProtocol", "LocalProtocolError", "RemoteProtocolError"),
    }


class Steps(httpx.AsyncBaseTransport):
    """A transport that reports its steps, as httpx's own does, and then fails."""

    def __init__(self, *steps: str, error: type[httpx.TransportError]) -> None:
        self.steps = steps
        self.error = error
        self.count = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.count += 1
        for step in self.steps:
            await request.extensions["trace"](step, {"request": request})
        raise self.error("", request=request)


@pytest.mark.parametrize("error", [httpx.ReadError, httpx.ConnectError, httpx.WriteTimeout])
async def test_the_steps_decide_whatever_the_error(error: type[httpx.TransportError]) -> None:
    """F4: the first byte of the request's head is the line; before it nothing was sent, after it who knows."""
    before = Steps("connection.connect_tcp.started", "connection.connect_tcp.complete", error=error)
    async with AsyncConceptViz(KEY, transport=before, retries=QUICK) as cv:
        with pytest.raises(NotSentError):
            await cv.submit("a")
    assert before.count == 3
    after = Steps("connection.connect_tcp.started", "http11.send_request_headers.started", error=error)
    async with AsyncConceptViz(KEY, transport=after, retries=QUICK) as cv:
        with pytest.raises(SubmissionUnknownError):
            await cv.submit("a")
    assert after.count == 1


async def test_silence_of_a_transport_that_reports_no_steps_is_unknown() -> None:
    cv, script = client(silence, timeout=0.02)
    async with cv:
        with pytest.raises(SubmissionUnknownError, match=r"no whole answer came within 0\.02 s"):
            await cv.submit("a")
    assert script.count == 1


BUSY = {"error": "Too many", "code": "MODERATION_RATE_LIMITED"}


@pytest.mark.parametrize("asked", [None, 0, 7, 60])
def test_429_then_ok_waits_as_long_as_it_is_asked_to(asked: int | None) -> None:
    """M87, on trio's virtual clock: the pause is the Retry-After, or the backoff if that is longer."""
    headers = {} if asked is None else {"retry-after": str(asked)}
    times: list[float] = []

    async def main() -> None:
        def on_event(event: Any) -> None:
            times.append(anyio.current_time())

        cv, script = client(answer(429, BUSY, headers), RECEIPT, retries=Retries(), on_event=on_event)
        async with cv:
            assert (await cv.submit("a")).id == TASK
        assert script.count == 2

    in_virtual_time(main)
    waited = times[1] - times[0]
    assert (asked or 0) <= waited <= max(asked or 0, 0.5)


def test_a_retry_after_beyond_the_limit_is_not_waited_for() -> None:
    async def main() -> None:
        cv, script = client(answer(429, BUSY, {"retry-after": "61"}), retries=Retries())
        async with cv:
            with pytest.raises(RateLimitedError) as caught:
                await cv.submit("a")
        assert (caught.value.retry_after, script.count, anyio.current_time()) == (61.0, 1, 0.0)

    in_virtual_time(main)


async def test_429_again_and_again() -> None:
    """At most three attempts in all; the error is the refusal."""
    cv, script = client(answer(429, BUSY))
    async with cv:
        with pytest.raises(RateLimitedError) as caught:
            await cv.submit("a")
    assert script.count == 3
    assert_no_key(caught.value)


@pytest.mark.parametrize("limit", [1, 3])
async def test_no_more_requests_are_under_way_than_connections(limit: int) -> None:
    """F2: none ever queues in httpx's pool."""
    now = most = 0

    async def count(request: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await anyio.sleep(0.001)
        now -= 1
        return httpx.Response(200, json=RUNNING)

    cv, script = client(count, max_connections=limit)
    async with cv, anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(cv.task(TASK).status)
    assert most == limit
    assert script.count == 20


async def test_a_cancelled_request_gives_its_place_back() -> None:
    """M76 in small: after requests cancelled while under way and while waiting, the next is answered."""
    cv, script = client(silence, max_connections=2)
    async with cv:
        for _ in range(5):
            with anyio.move_on_after(0.005):
                async with anyio.create_task_group() as group:
                    for _ in range(4):
                        group.start_soon(cv.task(TASK).status)
        script.answers = [answer(200, RUNNING)]
        script.requests.clear()
        with anyio.fail_after(2):
            assert (await cv.task(TASK).status()).status == "processing"


async def test_a_storm_of_cancellations_wedges_nothing() -> None:
    """M76: with real connections; httpx's own pool, left to queue, loses its places for good."""

    def serve(connection: Connection) -> None:
        while True:
            connection.read()
            connection.send(b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"status": "pending"}')

    async def storm(seed: int) -> None:
        rng = Random(seed)
        for _ in range(12):
            with anyio.move_on_after(rng.uniform(0, 0.004)):
                await cv.task(TASK).status()

    with RawServer(serve) as server:
        async with raw_client(server, max_connections=4) as cv:
            async with anyio.create_task_group() as group:
                for seed in range(8):
                    group.start_soon(storm, seed)
            with anyio.fail_after(2):
                for _ in range(8):
                    assert (await cv.task(TASK).status()).status == "pending"


async def test_the_answer_is_closed_when_the_reader_is_cancelled() -> None:
    body = Chunks(b"{", None)
    cv, _ = client(lambda _: httpx.Response(200, stream=body))
    async with cv:
        with anyio.move_on_after(0.02) as scope:
            await cv.task(TASK).status()
    assert scope.cancelled_caught
    assert body.closed


async def test_a_cancellation_that_meets_a_broken_connection_does_not_lead_to_the_key() -> None:
    """M64: while a connection is closed because it broke, what it broke with is held, and its frames hold the key."""
    is_closing = anyio.Event()

    async def breaks(request: httpx.Request) -> httpx.Response:
        authorization = request.headers["authorization"]
        try:
            raise httpx.ReadError(authorization)
        finally:
            is_closing.set()
            await anyio.sleep_forever()

    async def look() -> None:
        try:
            await cv.task(TASK).status()
        except anyio.get_cancelled_exc_class() as error:
            caught.append(error)
            raise

    caught: list[BaseException] = []
    cv, _ = client(breaks)
    async with cv, anyio.create_task_group() as group:
        group.start_soon(look)
        await is_closing.wait()
        group.cancel_scope.cancel()
    [error] = caught
    assert_no_key(error)


def test_a_timeout_is_known_as_one_though_its_cancellation_was_raised_anew() -> None:
    """As frameworks on asyncio do: anyio looks for its own among what a cancellation comes of."""

    async def passes_on(_: httpx.Request) -> httpx.Response:
        try:
            await anyio.sleep_forever()
        except asyncio.CancelledError:
            raise asyncio.CancelledError  # noqa: B904 - without saying of what
        raise AssertionError

    async def main() -> None:
        cv, _ = client(passes_on, timeout=0.02, retries=Retries(attempts=1))
        async with cv:
            with pytest.raises(PollInterruptedError):
                await cv.task(TASK).status()

    asyncio.run(main())


async def test_what_a_foreign_error_comes_of_does_not_lead_to_the_key() -> None:
    """M64: whatever a transport of the caller's raises is his to see, its cause too, and not by way of the request."""

    async def fails(request: httpx.Request) -> httpx.Response:
        authorization = request.headers["authorization"]
        try:
            _ = dict[int, str]()[len(authorization)]
        except KeyError as error:
            raise RuntimeError("a bug") from error
        raise AssertionError

    cv, _ = client(fails)
    async with cv:
        with pytest.raises(RuntimeError, match="a bug") as caught:
            await cv.task(TASK).status()
    assert isinstance(caught.value.__cause__, KeyError)
    assert_no_key(caught.value)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_client_in_two_event_loops_one_after_another(backend: str) -> None:
    """M94: `asyncio.run` twice with one client, over real connections that the first loop kept open."""

    def serve(connection: Connection) -> None:
        while True:
            connection.read()
            connection.send(b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"status": "pending"}')

    with RawServer(serve) as server:
        cv = raw_client(server)

        async def use() -> None:
            assert (await cv.task(TASK).status()).status == "pending"
            assert (await cv.task(TASK).status()).status == "pending"

        with warnings.catch_warnings():
            # The first loop's connection ended with its loop, which asyncio remarks.
            warnings.simplefilter("ignore", ResourceWarning)
            anyio.run(use, backend=backend)
            anyio.run(use, backend=backend)
            # In a third loop it can only let go of them.
            anyio.run(cv.aclose, backend=backend)
            gc.collect()
    assert server.connections == 2  # one for each loop: kept within it
    assert len(server.requests) == 4


async def test_a_closed_client_refuses() -> None:
    cv, script = client(RECEIPT)
    task = await cv.submit("a")
    await cv.aclose()
    await cv.aclose()
    with pytest.raises(InvalidRequestError, match="closed"):
        await cv.submit("a")
    with pytest.raises(InvalidRequestError, match="closed"):
        await task.wait()
    assert script.count == 1


async def test_idle_connections_are_used_again_and_stale_ones_are_not() -> None:
    """M19: a connection that the server has closed meanwhile costs no submit."""
    closed = anyio.Event()

    def once(connection: Connection) -> None:
        connection.read()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(RECEIPT_BYTES) + RECEIPT_BYTES)

    with RawServer(once) as server:
        async with raw_client(server) as cv:
            for _ in range(3):
                await cv.submit("a")
                with anyio.move_on_after(0.05):
                    await closed.wait()  # the FIN is on its way
    assert server.posts == 3


async def test_the_ssl_context_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """F15: it takes longer than all the rest of a client."""
    made: list[ssl.SSLContext] = []
    real = httpx.create_ssl_context

    def make() -> ssl.SSLContext:
        made.append(real())
        return made[-1]

    monkeypatch.setattr(httpx, "create_ssl_context", make)
    _http.ssl_context.cache_clear()
    for _ in range(3):
        async with AsyncConceptViz(KEY, base_url="https://127.0.0.1:9/api/v1", retries=Retries(attempts=1)) as cv:
            with pytest.raises(NotSentError):
                await cv.submit("a")
    assert len(made) == 1


def test_asyncio_timeouts_and_trio_scopes_end_a_look() -> None:
    """A caller's own cancellation passes through, and the client lives on."""

    async def in_asyncio() -> None:
        cv, script = client(silence)
        async with cv:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(cv.task(TASK).status(), 0.02)
            script.answers = [answer(200, RUNNING)]
            assert (await cv.task(TASK).status()).status == "processing"

    async def in_trio() -> None:
        cv, script = client(silence)
        async with cv:
            with trio.move_on_after(0.02):
                await cv.task(TASK).status()
            script.answers = [answer(200, RUNNING)]
            assert (await cv.task(TASK).status()).status == "processing"

    asyncio.run(in_asyncio())
    trio.run(in_trio)


@pytest.mark.parametrize("transport", [None, httpx.AsyncHTTPTransport()], ids=["direct", "httpx"])
async def test_the_log_at_level_1_was_looked_at(
    transport: httpx.AsyncBaseTransport | None, caplog: pytest.LogCaptureFixture
) -> None:
    """The check on the logs would notice: a real exchange is logged, by httpx's way with each step, and not the key."""
    with RawServer(answering(RECEIPT_BYTES)) as server:
        async with raw_client(server, transport=transport) as cv:
            await cv.submit("a")
    told = [record.getMessage() for record in caplog.records if record.name == "conceptviz"]
    assert told == ["POST /generate: 200"]
    steps = [record for record in caplog.records if record.name.startswith("httpcore")]
    assert bool(steps) == (transport is not None)


async def test_an_exchange_that_failed_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with RawServer(listening=False) as server:
        async with raw_client(server, retries=Retries(attempts=1)) as cv:
            with pytest.raises(NotSentError):
                await cv.submit("a")
    assert [record.getMessage() for record in caplog.records if record.name == "conceptviz"] == [
        "POST /generate: no connection could be made"
    ]


async def test_server_error_survives_in_the_event() -> None:
    """Each repetition is told, with the error that caused it."""
    events: list[Any] = []
    cv, _ = client(answer(500, b""), answer(200, RUNNING), on_event=events.append)
    async with cv:
        await cv.task(TASK).status()
    [event] = events
    assert isinstance(event.error, ServerError)
    assert event.task_id == TASK
