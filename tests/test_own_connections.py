"""Connections of our own: which are used again, what is left of them, and when httpx stands in their place."""

import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
import respx
import trustme
from anyio import to_thread
from helpers import API, KEY, QUICK, RECEIPT, RUNNING, TASK, assert_no_key_logged, client
from raw_server import Behaviour, Connection, RawServer, answering

from conceptviz import (
    AsyncConceptViz,
    AuthenticationError,
    ConceptVizError,
    InvalidRequestError,
    PollInterruptedError,
    Retries,
    _http,
)
from conceptviz._calls import ApiCall
from conceptviz._connections import Connections, _answer_length
from conceptviz._exchange import Received
from conceptviz._http import ThroughHttpx
from conceptviz._json import MAX_ANSWER_BYTES

pytestmark = pytest.mark.anyio

ONCE = Retries(attempts=1)
LOOK = ApiCall("GET", f"/task/{TASK}")
PENDING = b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"status": "pending"}'
FAILED = b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"status": "failed"}'
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


def client_of(server: RawServer, **options: Any) -> AsyncConceptViz:
    return AsyncConceptViz(KEY, base_url=server.base_url, **{"timeout": 2.0, "retries": ONCE, **options})


def own(cv: AsyncConceptViz) -> Connections:
    """What the looks of a client are carried by."""
    looks = cv._core.transport._line.get().looks
    assert isinstance(looks, Connections)
    return looks


async def look(cv: AsyncConceptViz) -> str:
    return (await cv.task(TASK).status()).status


def keeping(*answers: bytes) -> Behaviour:
    """Answer one request after another over one connection, the last answer again and again."""

    def behave(connection: Connection) -> None:
        for at in range(1000):
            connection.read()
            connection.send(answers[min(at, len(answers) - 1)])

    return behave


# Where an answer ends.

WHOLE = {
    "a length": PENDING,
    "a length of nothing": b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    "odd case and blanks": b"HTTP/1.1 200 OK\r\nX: y\r\nCONTENT-length:\t 2 \r\nZ: 1\r\n\r\n{}",
    "no reason": b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}",
    "an end of head in the body": b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\na\r\n\r\nb\r\n\r\n",
    "chunks": CHUNKED + b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n",
    "a large chunk": CHUNKED + b"0400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n",
    "extensions": CHUNKED + b'aB;a=b;c="d"\r\n' + b"x" * 171 + b"\r\n0;last\r\n\r\n",
    "chunks that look like an end": CHUNKED + b"5\r\n0\r\n\r\n\r\n0\r\n\r\n",
    "chunks and a length": (
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: Chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_the_end_of_a_whole_answer_is_found(name: str) -> None:
    """Also with more behind it; and no proper prefix passes for a whole one."""
    whole = WHOLE[name]
    assert _answer_length(whole) == len(whole)
    assert _answer_length(whole + PENDING) == len(whole)
    for end in range(len(whole)):
        assert _answer_length(whole[:end]) != end, whole[:end]


@pytest.mark.parametrize(
    "came",
    [
        b"",
        b"\r\n\r\n",
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n{}",
        b"HTTP/1.1 100 Continue\r\n\r\n" + PENDING,
        b"HTTP/1.1 103 Early Hints\r\nContent-Length: 0\r\n\r\n" + PENDING,
        b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: 2, 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nX-Content-Length: 2\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\n\r\nContent-Length: 2\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 2\n\n{}",
        CHUNKED + b"zz\r\n{}\r\n0\r\n\r\n",
        CHUNKED + b"\r\n0\r\n\r\n",
        CHUNKED + b"2\r\n{}\r\n",
    ],
    ids=repr,
)
def test_an_end_that_is_not_plain_to_see(came: bytes) -> None:
    assert _answer_length(came) is None


@pytest.mark.parametrize("trailers", [b"X: y\r\n", b"X: y\r\nZ: z\r\n", b":\r\n"])
def test_an_answer_with_trailers_does_not_count_as_whole(trailers: bytes) -> None:
    """They are not looked into: such a connection is simply not kept."""
    came = CHUNKED + b"2\r\n{}\r\n0\r\n" + trailers + b"\r\n"
    assert _answer_length(came) != len(came)


# Which connections are used again.


@pytest.mark.parametrize("last", ["one length", "chunks", "refused"])
async def test_a_kept_connection_is_used_again(last: str) -> None:
    """Whatever the answer was, if it came whole."""
    if last == "chunks":
        body = CHUNKED + b'15\r\n{"status": "pending"}\r\n0\r\n\r\n'
    elif last == "refused":
        body = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 2\r\n\r\n{}"
    else:
        body = PENDING
    with RawServer(keeping(body, PENDING)) as server:
        async with client_of(server) as cv:
            if last == "refused":
                with pytest.raises(AuthenticationError):
                    await look(cv)
            else:
                assert await look(cv) == "pending"
            for _ in range(3):
                assert await look(cv) == "pending"
    assert (server.connections, len(server.requests)) == (1, 4)


async def test_two_looks_at_a_time_have_two_connections_and_the_last_used_is_used_next() -> None:
    """One exchange at a time on each, and few open: a look alone never needs the second."""
    both = threading.Barrier(2, timeout=5)

    def behave(connection: Connection) -> None:
        connection.read()
        both.wait()
        connection.send(PENDING)
        keeping(PENDING)(connection)

    with RawServer(behave) as server:
        async with client_of(server) as cv:
            async with anyio.create_task_group() as group:
                group.start_soon(look, cv)
                group.start_soon(look, cv)
            first, last = own(cv)._idle
            for _ in range(3):
                await look(cv)
            assert own(cv)._idle == [first, last]
            assert "Request Count: 4" in repr(last)
    assert server.connections == 2


@pytest.mark.parametrize("more", [PENDING, FAILED, b"\r\n", b"x", b"HTTP/1.1 4"], ids=repr)
async def test_bytes_behind_an_answer(more: bytes) -> None:
    """They came in the same segment, for nobody: what is asked next is asked over another connection."""
    with RawServer(keeping(PENDING + more)) as server:
        async with client_of(server) as cv:
            for _ in range(3):
                assert await look(cv) == "pending"
            assert own(cv)._idle == []
    assert (server.connections, len(server.requests)) == (3, 3)


@pytest.mark.parametrize("more", [FAILED, b"x", b""], ids=repr)
async def test_bytes_that_come_while_a_connection_is_idle(more: bytes) -> None:
    """Or its end: seen before it is used again."""
    idle, sent = threading.Event(), threading.Event()

    def behave(connection: Connection) -> None:
        connection.read()
        connection.send(PENDING)
        idle.wait(5)
        if more:
            connection.send(more)
        else:
            connection._sock.close()
        sent.set()
        if more:
            connection.hold()

    with RawServer(behave, keeping(PENDING)) as server:
        async with client_of(server) as cv:
            assert await look(cv) == "pending"
            [stale] = own(cv)._idle
            idle.set()
            await to_thread.run_sync(sent.wait, 5)
            assert await look(cv) == "pending"
            assert stale.is_closed()
            assert stale not in own(cv)._idle
    assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.parametrize(
    "end", [b"Connection: close\r\nContent-Length: 21\r\n", b""], ids=["said to close", "ended by closing"]
)
async def test_a_connection_that_will_close_is_not_kept(end: bytes) -> None:
    def behave(connection: Connection) -> None:
        connection.read()
        connection.send(b"HTTP/1.1 200 OK\r\n" + end + b'\r\n{"status": "pending"}')

    with RawServer(behave) as server:
        async with client_of(server) as cv:
            assert await look(cv) == "pending"
            assert own(cv)._idle == []
            assert await look(cv) == "pending"
    assert server.connections == 2


async def test_submits_have_a_connection_each() -> None:
    """Even if what came before it was answered well."""
    receipt = str(RECEIPT).replace("'", '"').encode()
    whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(receipt) + receipt
    with RawServer(keeping(whole)) as server:
        async with client_of(server) as cv:
            for _ in range(3):
                assert (await cv.submit("a")).id == TASK
    assert server.connections == server.posts == 3


# Over TLS.


@pytest.fixture(scope="module", name="authority")
def _authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(name="trusting")
def _trusting(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Have the client trust one authority of our own, and take no proxy of the environment."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    monkeypatch.setattr(_http, "ssl_context", lambda: context)
    without_proxies(monkeypatch)
    return context


def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{scheme}_proxy", raising=False)
        monkeypatch.delenv(f"{scheme}_proxy".upper(), raising=False)


def tls_of(server: RawServer, **options: Any) -> AsyncConceptViz:
    url = f"https://127.0.0.1:{server.port}/api/v1"
    return AsyncConceptViz(KEY, base_url=url, **{"timeout": 5.0, "retries": ONCE, **options})


def secured(authority: trustme.CA, *records: bytes) -> Behaviour:
    """Answer each request over TLS with these records, which leave in one piece."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)

    def behave(connection: Connection) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        end = context.wrap_bio(incoming, outgoing, server_side=True)

        def until_done(step: Callable[[], Any]) -> Any:
            try:
                return step()
            except ssl.SSLWantReadError:
                connection.send(outgoing.read())
            data = connection.read_some(65536)
            if not data:
                raise EOFError
            incoming.write(data)
            return until_done(step)

        until_done(end.do_handshake)
        while True:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += until_done(lambda: end.read(65536))
            for record in records:
                end.write(record)
            connection.send(outgoing.read())

    return behave


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize(
    ("records", "connections"),
    [
        ([PENDING], 1),
        ([PENDING[:30], PENDING[30:]], 1),
        ([PENDING, FAILED], 3),
        ([PENDING, b"x"], 3),
        ([PENDING + b"x"], 3),
    ],
    ids=["one", "one in two records", "two in two records", "a byte in a record of its own", "a byte too many"],
)
async def test_over_tls(records: list[bytes], connections: int, authority: trustme.CA) -> None:
    """What lies deciphered on demand only, on no descriptor to be seen, is found all the same."""
    with RawServer(secured(authority, *records)) as server:
        async with tls_of(server) as cv:
            assert own(cv)  # not through httpx
            for _ in range(3):
                assert await look(cv) == "pending"
    assert server.connections == connections


# What is left of a connection.


@pytest.mark.parametrize(
    ("came", "error"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (2**22) + b" " * (MAX_ANSWER_BYTES + 1), ConceptVizError),
        (PENDING[:-1], PollInterruptedError),
        (b"what?\r\n\r\n", PollInterruptedError),
    ],
    ids=["oversize", "broken off", "garbage"],
)
async def test_an_answer_that_is_not_whole_closes_its_connection(came: bytes, error: type[ConceptVizError]) -> None:
    def behave(connection: Connection) -> None:
        connection.read()
        connection.send(came)

    with RawServer(behave, keeping(PENDING)) as server:
        async with client_of(server) as cv:
            with pytest.raises(error):
                await look(cv)
            assert (own(cv)._idle, own(cv)._busy) == ([], set())
            assert await look(cv) == "pending"
    assert server.connections == 2


async def test_an_oversize_answer_is_not_read_to_its_end() -> None:
    def endless(connection: Connection) -> None:
        connection.read()
        connection.send(CHUNKED)
        while True:
            connection.send(b"10000\r\n" + b" " * 65536 + b"\r\n")

    received = Received()
    with RawServer(endless) as server:
        connections = Connections(server.base_url, context=None, timeout=2.0, keep_alive=True)
        with anyio.fail_after(5):
            await connections.exchange(LOOK, "Bearer x", received, None)
        assert MAX_ANSWER_BYTES < len(received.body) < 2 * MAX_ANSWER_BYTES
        assert (connections._idle, connections._busy) == ([], set())
        await connections.aclose()


async def test_a_refused_connection_leaves_nothing() -> None:
    with RawServer(lambda _: None, listening=False) as server:
        async with client_of(server) as cv:
            with pytest.raises(PollInterruptedError, match="no connection could be made"):
                await look(cv)
            assert (own(cv)._idle, own(cv)._busy) == ([], set())


async def test_a_cancelled_look_closes_its_connection() -> None:
    ended = threading.Event()

    def behave(connection: Connection) -> None:
        connection.read()
        assert connection.read_some(1) == b""
        ended.set()

    with RawServer(behave) as server:
        async with client_of(server) as cv, anyio.create_task_group() as group:
            group.start_soon(look, cv)
            await to_thread.run_sync(server.asked.wait, 5)
            group.cancel_scope.cancel()
        await to_thread.run_sync(ended.wait, 5)
    assert ended.is_set()


async def test_closing_the_client_ends_what_is_under_way_and_what_waits() -> None:
    """The one look with an error, and the one that waits for its turn before it is sent."""
    outcomes: list[Exception] = []

    def behave(connection: Connection) -> None:
        connection.read()
        connection.hold()

    async def ask() -> None:
        with pytest.raises(ConceptVizError) as caught:
            await look(cv)
        outcomes.append(caught.value)

    with RawServer(behave, keeping(PENDING)) as server:
        cv = client_of(server, max_connections=1)
        async with anyio.create_task_group() as group:
            group.start_soon(ask)
            await to_thread.run_sync(server.asked.wait, 5)
            group.start_soon(ask)
            await anyio.wait_all_tasks_blocked()
            connections = own(cv)
            await cv.aclose()
        assert [type(error) for error in outcomes] == [PollInterruptedError, InvalidRequestError]
        assert "the connection broke" in str(outcomes[0])  # at once, rather than after its timeout
        assert (connections._idle, connections._busy) == ([], set())
        assert server.connections == 1


async def test_closing_closes_the_idle_ones() -> None:
    ended = threading.Event()

    def behave(connection: Connection) -> None:
        connection.read()
        connection.send(PENDING)
        if connection.read_some(1) == b"":
            ended.set()

    with RawServer(behave) as server:
        async with client_of(server) as cv:
            await look(cv)
            [kept] = own(cv)._idle
        assert kept.is_closed()
        await to_thread.run_sync(ended.wait, 5)
    assert ended.is_set()


async def test_what_ends_after_the_closing_is_not_kept() -> None:
    """A look whose connection was still being made, which nobody could close yet."""
    with RawServer(keeping(PENDING)) as server:
        connections = Connections(server.base_url, context=None, timeout=2.0, keep_alive=True)
        await connections.aclose()
        received = Received()
        await connections.exchange(LOOK, "Bearer x", received, None)
        assert received.status_code == 200
        assert (connections._idle, connections._busy) == ([], set())


# Which way is taken.


async def carrier(cv: AsyncConceptViz) -> type:
    """The way of the looks, and of the submits too."""
    line = cv._core.transport._line.get()
    assert type(line.looks) is type(line.submits)
    return type(line.looks)


@pytest.mark.parametrize("url", [API, "http://127.0.0.1:9/api/v1"])
async def test_by_itself_it_goes_direct(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)
    async with AsyncConceptViz(KEY, base_url=url) as cv:
        assert await carrier(cv) is Connections


@pytest.mark.parametrize(
    "transport", [httpx.MockTransport(lambda _: httpx.Response(200, json=RUNNING)), httpx.AsyncHTTPTransport()]
)
async def test_a_transport_of_the_callers_is_used(transport: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    without_proxies(monkeypatch)
    async with AsyncConceptViz(KEY, transport=transport) as cv:
        assert await carrier(cv) is ThroughHttpx


@pytest.mark.parametrize(
    ("variable", "value", "way"),
    [
        ("HTTPS_PROXY", "http://127.0.0.1:9", ThroughHttpx),
        ("https_proxy", "http://127.0.0.1:9", ThroughHttpx),
        ("ALL_PROXY", "http://127.0.0.1:9", ThroughHttpx),
        ("HTTPS_PROXY", "", Connections),
        ("NO_PROXY", "example.com", Connections),
        ("no_proxy", "*", Connections),
    ],
)
async def test_proxies_of_the_environment(
    variable: str, value: str, way: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only httpx knows them; who is excepted from them counts for nothing alone, and for http none counts."""
    without_proxies(monkeypatch)
    monkeypatch.setenv(variable, value)
    async with AsyncConceptViz(KEY) as cv:
        assert await carrier(cv) is way
    async with AsyncConceptViz(KEY, base_url="http://127.0.0.1:9/api/v1") as cv:
        assert await carrier(cv) is Connections


async def test_what_wraps_the_transport_of_httpx_sees_every_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """As OpenTelemetry does; the answer comes through it."""
    real = httpx.AsyncHTTPTransport.handle_async_request
    seen: list[str] = []

    async def wrapper(self: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.method} {request.url.path}")
        return await real(self, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", wrapper)
    with RawServer(keeping(PENDING)) as server:
        async with client_of(server) as cv:
            assert await carrier(cv) is ThroughHttpx
            assert await look(cv) == "pending"
    assert seen == [f"GET /api/v1/task/{TASK}"]
    assert len(server.requests) == 1


async def test_what_stands_in_for_the_transport_of_httpx_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As pytest-httpx does; nothing goes over the network."""

    async def stand_in(_: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=RECEIPT if request.method == "POST" else RUNNING)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", stand_in)
    async with AsyncConceptViz(KEY, retries=QUICK) as cv:
        assert await (await cv.submit("a")).status()


async def test_respx_answers_in_place_of_a_server() -> None:
    """Which it would not, if the way went past httpx."""
    with RawServer(answering(b"{}")) as server:
        with respx.mock(base_url=server.base_url) as mock:
            mock.get(f"/task/{TASK}").respond(json=RUNNING)
            async with client_of(server) as cv:
                assert await look(cv) == "processing"
            assert mock.calls.call_count == 1
        assert server.connections == 0


async def test_httpx_as_it_is_is_not_taken_for_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that uses it elsewhere changes nothing."""
    without_proxies(monkeypatch)
    cv, _ = client(RUNNING)
    async with cv:
        await look(cv)
    assert not _http.is_instrumented()


LEAN = """
import sys
import anyio
from conceptviz import AsyncConceptViz, AuthenticationError, Retries

async def main(backend, base_url):
    async with AsyncConceptViz("cvk_x", base_url=base_url, retries=Retries(attempts=1)) as cv:
        try:
            await cv.task("a").status()
        except AuthenticationError:
            print("httpx" in sys.modules, "httpcore" in sys.modules)

anyio.run(main, *sys.argv[1:], backend=sys.argv[1])
"""


def test_a_process_that_needs_no_httpx_does_not_load_it(anyio_backend: str) -> None:
    """It takes longer to load than all the rest."""
    with RawServer(answering(b"{}", "401 Unauthorized")) as server:
        done = subprocess.run(
            [sys.executable, "-c", LEAN, anyio_backend, server.base_url],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert (done.stdout.split(), done.stderr) == (["False", "True"], "")
