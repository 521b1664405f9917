"""Connections of our own to the API: what goes over them, which is used again, and which way is taken."""

from __future__ import annotations

import functools
import gc
import select
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import anyio
import httpcore
import httpx
import pytest
import respx
import trustme
from helpers import API, KEY, QUICK, QUICK_POLLING, RECEIPT, TASK, completed, in_virtual_time
from raw_server import Connection, RawServer, answering

from conceptviz import AsyncConceptViz, GenerateRequest, SubmissionUnknownError, _connections, _http
from conceptviz._calls import ApiCall, build_generate, build_look
from conceptviz._connections import ConnectError, Connections, ConnectTimeout, NetworkError, RemoteProtocolError, _Way
from conceptviz._exchange import PIECE, Received
from conceptviz._http import ThroughHttpx

WHOLE = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2\r\nlo\r\n0\r\n\r\n"
EMPTY = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
LOUD = b"HTTP/1.1 200 OK\r\nX-Other: 1\r\nCONTENT-LENGTH:  5 \r\nConnection: keep-alive\r\n\r\nhello"
BIG = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + b"1F40\r\n" + b"x" * 8000 + b"\r\n0\r\n\r\n"


def saying(*answers: bytes, then: Callable[[Connection], object] | None = None) -> Callable[[Connection], None]:
    """Answer request after request on one connection, and then hear whether another comes."""

    def behave(connection: Connection) -> None:
        for answer in answers:
            connection.read()
            connection.send(answer)
        if then is not None:
            then(connection)
        connection.read()

    return behave


def connections(server: RawServer, *, keep_alive: bool = True, context: ssl.SSLContext | None = None) -> Connections:
    url = server.base_url if context is None else f"https://127.0.0.1:{server.port}/api/v1"
    return Connections(url, context=context, timeout=5.0, keep_alive=keep_alive)


def way_to(server: RawServer) -> _Way:
    return _Way("127.0.0.1", server.port, None, 5.0)


async def look(ways: Connections) -> Received:
    received = Received()
    with anyio.fail_after(5):
        await ways.exchange(build_look("a-task"), f"Bearer {KEY}", received, None)
    return received


@pytest.mark.anyio
async def test_what_goes_over_the_wire() -> None:
    with RawServer(saying(WHOLE, WHOLE)) as server:
        ways = connections(server)
        received = await look(ways)
        call = build_generate(GenerateRequest("a"))
        await ways.exchange(call, f"Bearer {KEY}", Received(), None)
        await ways.aclose()
    assert (received.status_code, bytes(received.body), received.headers) == (200, b"hello", {"content-length": "5"})
    assert received.is_certain
    get, post = server.requests
    assert (get.method, get.path, get.body) == ("GET", "/api/v1/task/a-task", b"")
    assert get.headers["authorization"] == f"Bearer {KEY}"
    assert get.headers["host"] == f"127.0.0.1:{server.port}"
    assert get.headers["accept-encoding"] == "identity"
    assert get.headers["user-agent"].startswith("conceptviz-python/")
    assert (post.method, post.path, post.body) == ("POST", "/api/v1/generate", b"".join(call.body))
    assert post.headers["content-type"] == "application/json"


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [WHOLE, CHUNKED, EMPTY, LOUD, BIG], ids=["whole", "chunked", "empty", "loud", "big"])
async def test_a_connection_that_carried_one_answer_is_used_again(answer: bytes) -> None:
    with RawServer(saying(answer, answer, answer)) as server:
        ways = connections(server)
        for _ in range(3):
            assert (await look(ways)).status_code == 200
        await ways.aclose()
    assert (server.connections, len(server.requests)) == (1, 3)


@pytest.mark.anyio
async def test_a_submit_s_is_not() -> None:
    with RawServer(saying(WHOLE, WHOLE)) as server:
        ways = connections(server, keep_alive=False)
        for _ in range(2):
            await look(ways)
        await ways.aclose()
    assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.anyio
async def test_the_last_used_is_used_next() -> None:
    """So that few stay open: what was needed once, for a moment, is left to expire."""
    both = threading.Barrier(2)

    def behave(connection: Connection) -> None:
        connection.read()
        both.wait(5)
        saying_on(connection)

    def saying_on(connection: Connection) -> None:
        connection.send(WHOLE)
        while True:
            connection.read()
            connection.send(WHOLE)

    with RawServer(behave) as server:
        ways = connections(server)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look, ways)
            tasks.start_soon(look, ways)
        last = ways._idle[-1]
        for _ in range(3):
            await look(ways)
            assert ways._idle[-1] is last
        assert len(ways._idle) == 2
        await ways.aclose()
    assert (server.connections, len(server.requests)) == (2, 5)


NOT_KEPT = {
    "a byte more": WHOLE + b"\n",
    "another answer": WHOLE + WHOLE,
    "chunks, and another answer": CHUNKED + WHOLE,
    "trailers": CHUNKED[:-2] + b"X-Sum: 1\r\n\r\n",
    "a chunk with a word of its own": CHUNKED.replace(b"\r\n2\r\n", b"\r\n2;a=b\r\n"),
    "chunks and a length": CHUNKED.replace(b"\r\n\r\n3", b"\r\nContent-Length: 5\r\n\r\n3"),
    "hints before it": b"HTTP/1.1 103 Early Hints\r\n\r\n" + WHOLE,
    "a last word": WHOLE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"),
    "an old version": WHOLE.replace(b"1.1", b"1.0"),
    "lines that end otherwise": WHOLE.replace(b"\r\n", b"\n"),
}


@pytest.mark.anyio
@pytest.mark.parametrize("answer", NOT_KEPT.values(), ids=NOT_KEPT)
async def test_a_connection_that_carried_anything_else_is_not(answer: bytes) -> None:
    """M35: an answer too many would be taken for the answer to the next look."""
    with RawServer(saying(answer), saying(WHOLE)) as server:
        ways = connections(server)
        assert (await look(ways)).body == b"hello"
        assert not ways._idle
        assert (await look(ways)).body == b"hello"
        await ways.aclose()
    assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["another answer", "a byte", "the end"])
async def test_what_comes_while_it_is_idle_ends_its_use(what: str) -> None:
    """M35: seen before the next request is written."""
    idle = threading.Event()

    def speak(connection: Connection) -> None:
        idle.wait(5)
        if what == "the end":
            raise EOFError  # which closes it
        connection.send(WHOLE if what == "another answer" else b"x")

    with RawServer(saying(WHOLE, then=speak), saying(WHOLE)) as server:
        ways = connections(server)
        await look(ways)
        [kept] = ways._idle
        assert not kept.is_readable()
        idle.set()
        readable, _, _ = await anyio.to_thread.run_sync(select.select, [kept._socket], [], [], 5)
        assert readable
        assert kept.is_readable()
        assert (await look(ways)).body == b"hello"
        assert ways._idle != [kept]
        await ways.aclose()
    assert (server.connections, len(server.requests)) == (2, 2)


@pytest.mark.anyio
@pytest.mark.parametrize("answer", [WHOLE, CHUNKED], ids=["whole", "chunked"])
async def test_an_answer_that_breaks_off(answer: bytes) -> None:
    """After each of its bytes: an error, what came before it, and a connection that is gone."""

    def behave(connection: Connection) -> None:
        connection.read()
        connection.send(answer[: server.connections - 1])

    with RawServer(behave) as server:
        ways = connections(server)
        for cut in range(len(answer)):
            received = Received()
            with pytest.raises(ways.errors):
                await ways.exchange(build_look("a"), "Bearer x", received, None)
            head = answer.index(b"\r\n\r\n") + 4
            assert received.status_code == (200 if cut >= head else 0)
            assert b"hello".startswith(bytes(received.body))
            assert not ways._idle
            assert not ways._busy
        await ways.aclose()
    assert server.connections == len(answer)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "answer", [b"{}\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n"], ids=["no head", "no length"]
)
async def test_an_answer_that_is_none(answer: bytes) -> None:
    """Not even httpcore can make anything of it; said in one word all the same."""
    with RawServer(saying(answer)) as server:
        ways = connections(server)
        with pytest.raises(RemoteProtocolError):
            await look(ways)
        assert not ways._idle
        assert not ways._busy
        await ways.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("size", [PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
async def test_a_large_body_arrives_whole(size: int) -> None:
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    with RawServer(saying(WHOLE)) as server:
        ways = connections(server)
        call = ApiCall("POST", "/edit", "multipart/form-data", (body[:1000], body[1000:]))
        received = Received()
        await ways.exchange(call, "Bearer x", received, None)
        await ways.aclose()
    assert received.body == b"hello"
    [request] = server.requests
    assert request.body == body


@pytest.mark.anyio
async def test_the_steps_of_an_exchange() -> None:
    """Told in httpcore's words, each before it is begun: the one before the first byte may still stop it."""

    async def trace(step: str, _: object) -> None:
        steps.append((step, len(server.requests)))

    async def refuse_to_send(step: str, _: object) -> None:
        if step == "http11.send_request_headers.started":
            raise ZeroDivisionError

    steps: list[tuple[str, int]] = []
    with RawServer(answering(b"hello")) as server:
        ways = connections(server, keep_alive=False)
        await ways.exchange(build_look("a"), "Bearer x", Received(), trace)
        asked = len(server.requests)
        with pytest.raises(ZeroDivisionError):
            await ways.exchange(build_look("a"), "Bearer x", Received(), refuse_to_send)
        await ways.aclose()
    assert [step for step, _ in steps] == [
        "connection.connect_tcp.started",
        "http11.send_request_headers.started",
        "http11.receive_response_headers.started",
    ]
    assert {seen for _, seen in steps[:2]} == {0}
    assert len(server.requests) == asked


@pytest.mark.anyio
async def test_the_steps_of_a_large_upload_over_tls(authority: trustme.CA, context: ssl.SSLContext) -> None:
    async def trace(step: str, _: object) -> None:
        steps.append(step)

    def behave(connection: Connection) -> None:
        tls = Ciphered(connection, authority)
        tls.shake()
        tls.read()

    steps: list[str] = []
    with RawServer(behave) as server:
        ways = connections(server, context=context, keep_alive=False)
        call = ApiCall("POST", "/edit", "multipart/form-data", (bytes(PIECE), b"x"))
        with pytest.raises(ways.errors):
            await ways.exchange(call, "Bearer x", Received(), trace)
        await ways.aclose()
    assert steps == [
        "connection.connect_tcp.started",
        "connection.start_tls.started",
        "http11.send_request_headers.started",
        "http11.send_request_body.started",
        "http11.receive_response_headers.started",
    ]


@pytest.mark.anyio
async def test_an_answer_without_an_end_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connections, "MAX_ANSWER_BYTES", 1000)

    def pour(connection: Connection) -> None:
        connection.read()
        connection.send(b"HTTP/1.1 200 OK\r\nContent-Length: 3000\r\n\r\n" + b"x" * 2000)
        connection.hold()

    with RawServer(pour) as server:
        ways = connections(server)
        received = await look(ways)
        assert 1000 < len(received.body) <= 2000
        assert not ways._idle
        assert not ways._busy
        await ways.aclose()


@pytest.mark.anyio
async def test_an_exchange_that_is_cancelled_leaves_nothing_behind() -> None:
    """In the middle of a body, as a time limit would."""

    def begin(connection: Connection) -> None:
        connection.read()
        connection.send(WHOLE[:-2])
        connection.hold()

    with RawServer(begin, saying(WHOLE)) as server:
        ways = connections(server)
        received = Received()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(ways.exchange, build_look("a"), "Bearer x", received, None)
            with anyio.fail_after(5):
                while bytes(received.body) != b"hel":
                    await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        assert not ways._idle
        assert not ways._busy
        assert (await look(ways)).body == b"hello"
        await ways.aclose()


@pytest.mark.anyio
async def test_what_a_full_read_may_have_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """On asyncio what is read from the socket beyond what was asked for lies in a queue that nobody can see."""
    for size, kept in ((len(WHOLE), 0), (len(WHOLE) + 1, 1)):
        monkeypatch.setattr(_connections, "_READ", size)
        with RawServer(saying(WHOLE)) as server:
            ways = connections(server)
            assert (await look(ways)).body == b"hello"
            assert len(ways._idle) == kept
            await ways.aclose()


@pytest.mark.anyio
async def test_a_connection_that_is_closed_before_its_first_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the moment between the two, as closing the client does."""
    with RawServer(saying(WHOLE)) as server:
        ways = connections(server)
        made = _Way.connect

        async def connect(self: _Way, trace: Any) -> Any:
            stream = await made(self, trace)
            await stream.close()
            return stream

        monkeypatch.setattr(_Way, "connect", connect)
        with pytest.raises(NetworkError):
            await look(ways)
        assert not ways._idle
        assert not ways._busy
    assert server.requests == []


@pytest.mark.anyio
async def test_nobody_there() -> None:
    """Said in words that mean that nothing was sent."""
    with RawServer(listening=False) as server, pytest.raises(ConnectError):
        await look(connections(server))


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("url", "port"),
    [("https://api.example/v1", 443), ("http://localhost/v1", 80), ("https://api.example:8443/v1", 8443)],
)
async def test_where_it_connects_to(url: str, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    async def connect(host: str, port: int) -> None:
        asked.append((host, port))
        raise OSError

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    with pytest.raises(ConnectError):
        await look(Connections(url, context=ssl.create_default_context(), timeout=5.0, keep_alive=True))
    assert asked == [(urlsplit(url).hostname, port)]


def test_a_connection_has_half_the_time_of_an_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that it comes to an end of its own, and is closed, before the bound on the whole."""
    monkeypatch.setattr(anyio, "connect_tcp", lambda *_: anyio.sleep_forever())

    async def main() -> float:
        ways = Connections("http://localhost/v1", context=None, timeout=8.0, keep_alive=True)
        start = anyio.current_time()
        with pytest.raises(ConnectTimeout):
            await ways.exchange(build_look("a-task"), f"Bearer {KEY}", Received(), None)
        return anyio.current_time() - start

    assert in_virtual_time(main) == 4.0


@pytest.mark.parametrize(("timeout", "taken"), [(8.0, 1.0 + 4.0), (1.0, 0.25 + 0.5)])
def test_an_address_has_a_second_and_no_more_than_half_of_the_time(
    timeout: float, taken: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then there is still time for another."""
    monkeypatch.setattr(anyio, "connect_tcp", lambda *_: anyio.sleep_forever())
    monkeypatch.setattr(anyio, "wait_writable", lambda _: anyio.sleep_forever())

    async def main() -> float:
        ways = Connections("http://localhost/v1", context=None, timeout=timeout, keep_alive=True)
        with socket.create_server(("127.0.0.1", 0)) as server:
            ways._way._known = socket.AF_INET, server.getsockname(), anyio.current_time() + 1
            start = anyio.current_time()
            with pytest.raises(ConnectTimeout):
                await ways.exchange(build_look("a-task"), f"Bearer {KEY}", Received(), None)
            return anyio.current_time() - start

    assert in_virtual_time(main) == taken


@pytest.mark.anyio
@pytest.mark.parametrize("error", [anyio.BrokenResourceError, anyio.ClosedResourceError, ssl.SSLError])
async def test_what_breaks_is_said_in_one_word(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(saying(WHOLE)) as server:
        stream: Any = await way_to(server).connect(None)

        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(stream._stream, "send", fail)
        monkeypatch.setattr(stream._stream, "receive", fail)
        with pytest.raises(NetworkError):
            await stream.send(b"x")
        with pytest.raises(NetworkError):
            await stream.receive()
        await stream.close()


class Deciphered:
    """Stands for the end of TLS: what it still gives, or raises."""

    def __init__(self, gives: bytes | Exception) -> None:
        self._gives = gives

    def read(self, size: int) -> bytes:
        if isinstance(self._gives, Exception):
            raise self._gives
        return self._gives[:size]


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("gives", "is_empty"),
    [(ssl.SSLWantReadError(), True), (ssl.SSLError("garbled"), False), (b"more", False), (b"", False)],
    ids=["nothing", "garbage", "more", "the end"],
)
async def test_what_lies_behind_an_answer_under_tls(gives: bytes | Exception, is_empty: bool) -> None:
    with RawServer(saying(WHOLE)) as server:
        stream: Any = await way_to(server).connect(None)
        assert stream.holds_nothing_more()
        stream._tls = Deciphered(gives)
        assert stream.holds_nothing_more() is is_empty
        await stream.close()


# What is known of a host from a moment ago.


@pytest.fixture(name="races")
def _races(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The hosts whose addresses were asked for."""
    made, hosts = anyio.connect_tcp, list[str]()

    async def connect(host: str, port: int) -> Any:
        hosts.append(host)
        return await made(host, port)

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    return hosts


@pytest.mark.anyio
async def test_an_address_is_asked_for_once_in_a_while(races: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(answering(WHOLE[-5:])) as server:
        ways = connections(server, keep_alive=False)
        for _ in range(3):
            assert (await look(ways)).body == b"hello"
        assert races == ["127.0.0.1"]
        monkeypatch.setattr(_connections, "_KNOWN_SECONDS", 0.0)
        ways._way._known = None
        for _ in range(3):
            await look(ways)
        assert len(races) == 4
        await ways.aclose()
    assert server.connections == 6


@pytest.mark.anyio
@pytest.mark.parametrize("what", ["refuses", "is silent", "cannot be connected to"])
async def test_an_address_that_is_no_good_any_more(
    what: str, races: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is asked for anew, within the same attempt."""
    monkeypatch.setattr(_connections, "_KNOWN_PATIENCE", 0.01)
    with RawServer(answering(WHOLE[-5:])) as server, RawServer(listening=False) as gone:
        ways = connections(server, keep_alive=False)
        await look(ways)
        family, (host, _), until = ways._way._known or pytest.fail("nothing is known")
        ways._way._known = family, (host, gone.port), until
        if what == "is silent":
            monkeypatch.setattr(anyio, "wait_writable", lambda _: anyio.sleep_forever())
        elif what == "cannot be connected to":
            monkeypatch.setattr(_connections, "_connect", refuse)
        assert (await look(ways)).body == b"hello"
        assert len(races) == 2
        monkeypatch.undo()
        await look(ways)  # and so the good one is known
        assert len(races) == 2
        await ways.aclose()


async def refuse(*_: object) -> None:
    raise PermissionError


@pytest.mark.anyio
async def test_a_host_that_is_gone() -> None:
    with RawServer(answering(WHOLE[-5:])) as server:
        ways = connections(server, keep_alive=False)
        await look(ways)
    with pytest.raises(ConnectError):
        await look(ways)
    assert ways._way._known is None


class Watched(socket.socket):
    """A socket that must not hold up the event loop."""

    def connect(self, address: Any) -> None:
        assert self.gettimeout() == 0
        super().connect(address)


@pytest.mark.anyio
async def test_connecting_never_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    with RawServer(saying(WHOLE)) as server:
        monkeypatch.setattr(socket, "socket", Watched)
        stream = await _connections._connect(socket.AF_INET, ("127.0.0.1", server.port))
        monkeypatch.undo()
        # asyncio leaves it out where the socket is not said to be one of TCP.
        assert stream._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        await stream.close()


class Gone:
    """A socket whose other end went away before anybody could ask where it was."""

    def __init__(self, sock: Any) -> None:
        self.family, self.fileno = sock.family, sock.fileno

    def getpeername(self) -> None:
        raise OSError


@pytest.mark.anyio
async def test_an_address_that_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made = anyio.connect_tcp

    async def connect(host: str, port: int) -> Any:
        stream: Any = await made(host, port)
        sock = Gone(stream.extra(anyio.abc.SocketAttribute.raw_socket))
        monkeypatch.setattr(type(stream), "extra", lambda *_: sock)
        return stream

    with RawServer(answering(WHOLE[-5:])) as server:
        ways = connections(server, keep_alive=False)
        monkeypatch.setattr(anyio, "connect_tcp", connect)
        assert (await look(ways)).body == b"hello"
        monkeypatch.undo()
        assert ways._way._known is None
        assert (await look(ways)).body == b"hello"


@pytest.mark.anyio
async def test_a_connection_that_is_given_up_while_it_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its socket is closed: that one is left open is an error in these tests."""
    with RawServer(answering(WHOLE[-5:])) as server:
        ways = connections(server, keep_alive=False)
        await look(ways)
        monkeypatch.setattr(anyio, "wait_writable", lambda _: anyio.sleep_forever())
        with anyio.move_on_after(0.05) as scope:
            await look(ways)
        assert scope.cancelled_caught
        gc.collect()


@pytest.mark.anyio
async def test_an_address_of_version_six(races: list[str]) -> None:
    async def serve(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(WHOLE)

    try:
        listener = await anyio.create_tcp_listener(local_host="::1")
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        ways = Connections(f"http://[::1]:{port}/api/v1", context=None, timeout=5.0, keep_alive=False)
        for _ in range(2):
            assert (await look(ways)).body == b"hello"
        await ways.aclose()
        tasks.cancel_scope.cancel()
    assert races == ["::1"]


@pytest.mark.anyio
async def test_closing_ends_what_is_under_way() -> None:
    def hold(connection: Connection) -> None:
        connection.read()
        connection.hold()

    with RawServer(hold) as server:
        ways = connections(server)
        ended: list[Exception] = []

        async def wait() -> None:
            try:
                await look(ways)
            except ways.errors as error:
                ended.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(wait)
            await anyio.to_thread.run_sync(server.asked.wait, 5)
            await anyio.wait_all_tasks_blocked()
            await ways.aclose()
        assert len(ended) == 1
        assert not ways._idle
        assert not ways._busy


@pytest.mark.anyio
async def test_closing_while_tcp_is_agreed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is sent over it, and it is not left open."""
    made = anyio.connect_tcp

    async def connect(*args: Any, **kwargs: Any) -> Any:
        stream = await made(*args, **kwargs)
        await ways.aclose()
        return stream

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    with RawServer(saying(WHOLE)) as server:
        ways = connections(server)
        with pytest.raises(ConnectError):
            await look(ways)
        assert not ways._idle
        assert not ways._busy
    assert server.requests == []


@pytest.mark.anyio
@pytest.mark.parametrize("used", [False, True])
async def test_after_the_end_no_connection_is_made(used: bool) -> None:
    """For who had its turn before the end came, and comes to use it afterwards."""
    with RawServer(saying(WHOLE)) as server:
        ways = connections(server)
        if used:
            await look(ways)
        await ways.aclose()
        with pytest.raises(ConnectError):
            await look(ways)
    assert server.connections == used


@pytest.fixture(scope="module", name="authority")
def _authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(name="context")
def _context(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


class Ciphered:
    """A server's end of TLS, whose records leave when the test says so."""

    def __init__(self, connection: Connection, authority: trustme.CA, *, asks: bool = False) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert("127.0.0.1").configure_cert(context)
        context.set_alpn_protocols(["h2", "http/1.1"])
        if asks:
            context.verify_mode = ssl.CERT_REQUIRED
        self.connection = connection
        self._in, self._out = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._in, self._out, server_side=True)

    def shake(self) -> None:
        self._through(self._tls.do_handshake)
        self.protocol = self._tls.selected_alpn_protocol()

    def read(self) -> bytes:
        """Read a request without a body."""
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            data += self._through(lambda: self._tls.read(65536))
        return data

    def records(self, *texts: bytes) -> bytes:
        """One record for each text."""
        for text in texts:
            self._tls.write(text)
        return self._out.read()

    def _through(self, step: Callable[[], Any]) -> Any:
        while True:
            try:
                done = step()
            except ssl.SSLWantReadError:  # noqa: PERF203 - it is how a buffer asks for more
                self.flush()
                self._in.write(self.connection.read_some(65536) or self._end())
            else:
                self.flush()
                return done

    def flush(self) -> None:
        if self._out.pending:
            self.connection.send(self._out.read())

    def _end(self) -> bytes:
        raise EOFError


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("records", "kept"),
    [((WHOLE,), True), ((WHOLE[:-2], b"lo"), True), ((WHOLE, WHOLE), False), ((WHOLE, b"x"), False)],
    ids=["one answer", "one in two records", "two answers", "a byte more"],
)
async def test_what_lies_deciphered_behind_an_answer(
    records: tuple[bytes, ...], kept: bool, authority: trustme.CA, context: ssl.SSLContext
) -> None:
    """M35: in a segment of its own record, where neither the answer's reader nor the socket shows it."""

    def behave(connection: Connection) -> None:
        tls = Ciphered(connection, authority)
        tls.shake()
        while True:
            tls.read()
            heard.append(server.connections)
            connection.send(tls.records(*records))

    heard: list[int] = []
    with RawServer(behave) as server:
        ways = connections(server, context=context)
        for _ in range(2):
            assert (await look(ways)).body == b"hello"
            assert len(ways._idle) == kept
        await ways.aclose()
    assert heard == ([1, 1] if kept else [1, 2])


@pytest.mark.anyio
async def test_which_http_is_spoken_is_agreed_on(
    authority: trustme.CA, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that could speak HTTP/2 is told not to."""
    agreed: list[str | None] = []

    def behave(connection: Connection) -> None:
        tls = Ciphered(connection, authority)
        tls.shake()
        agreed.append(tls.protocol)
        tls.read()
        connection.send(tls.records(b'HTTP/1.1 200 OK\r\nContent-Length: 21\r\n\r\n{"status": "pending"}'))

    monkeypatch.setattr(httpx, "create_ssl_context", lambda: context)
    _http.ssl_context.cache_clear()
    try:
        with RawServer(behave) as server:
            url = f"https://127.0.0.1:{server.port}/api/v1"
            async with AsyncConceptViz(KEY, base_url=url, timeout=5.0, retries=QUICK) as cv:
                assert (await cv.task(TASK).status()).status == "pending"
    finally:
        _http.ssl_context.cache_clear()
    assert agreed == ["http/1.1"]


@pytest.mark.anyio
async def test_a_record_that_is_none(authority: trustme.CA, context: ssl.SSLContext) -> None:
    """An error of the connection, as one that broke, and not one of OpenSSL's."""

    def behave(connection: Connection) -> None:
        tls = Ciphered(connection, authority)
        tls.shake()
        tls.read()
        connection.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    with RawServer(behave) as server:
        ways = connections(server, context=context)
        with pytest.raises(NetworkError):
            await look(ways)
        assert not ways._busy
        await ways.aclose()


@pytest.mark.anyio
@pytest.mark.parametrize("direct", [True, False])
async def test_a_client_s_certificate_that_was_asked_for(
    direct: bool, authority: trustme.CA, context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With TLS 1.3 that is said when the request has been sent: so nobody knows, and it is not sent again."""
    if context.maximum_version is ssl.TLSVersion.TLSv1_2:
        pytest.skip("TLS 1.3 only")
    monkeypatch.setattr(_http, "ssl_context", lambda: context)
    transport = None if direct else httpx.AsyncHTTPTransport(verify=context)

    def behave(connection: Connection) -> None:
        tls = Ciphered(connection, authority, asks=True)
        try:
            tls.shake()
        except ssl.SSLError:
            tls.flush()  # the alert
            while connection.read_some(65536):
                pass

    with RawServer(behave) as server:
        url = f"https://127.0.0.1:{server.port}/api/v1"
        async with AsyncConceptViz(KEY, base_url=url, timeout=5.0, retries=QUICK, transport=transport) as cv:
            with pytest.raises(SubmissionUnknownError):
                await cv.submit("a")
    assert server.connections == 1


@pytest.mark.anyio
async def test_closing_while_a_connection_is_made(authority: trustme.CA, context: ssl.SSLContext) -> None:
    """Nothing is sent over it, and it is not left open."""
    closed, asked = threading.Event(), threading.Event()
    heard: list[bytes] = []

    def behave(connection: Connection) -> None:
        tls = Ciphered(connection, authority)
        asked.set()
        closed.wait(5)
        tls.shake()
        heard.append(tls.read())

    with RawServer(behave) as server:
        ways = connections(server, context=context)
        ended: list[Exception] = []

        async def connect() -> None:
            try:
                await look(ways)
            except ways.errors as error:
                ended.append(error)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(connect)
            await anyio.to_thread.run_sync(asked.wait, 5)
            await ways.aclose()
            closed.set()
        [error] = ended
        assert isinstance(error, ConnectError)  # which means that nothing was sent
        assert not ways._idle
    assert heard == []


def carrier(base_url: str = API, **options: Any) -> tuple[type, bool]:
    """What a client's looks go through, and whether that says when it sends."""
    cv = AsyncConceptViz(KEY, base_url=base_url, **options)

    async def see() -> tuple[type, bool]:
        line = cv._core.transport._line.get()
        assert type(line.looks) is type(line.submits)
        found = type(line.looks), line.looks.is_traced
        await cv.aclose()
        return found

    return anyio.run(see)


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


DIRECT = (Connections, True)
UNTRACED = (ThroughHttpx, False)


@pytest.mark.parametrize("url", [API, "http://127.0.0.1:9/api/v1"])
def test_by_itself_it_is_the_direct_one(url: str) -> None:
    assert carrier(url) == DIRECT


def test_a_transport_is_gone_through() -> None:
    assert carrier(transport=httpx.MockTransport(lambda _: httpx.Response(200))) == UNTRACED
    assert carrier(transport=httpx.AsyncHTTPTransport()) == (ThroughHttpx, True)


class Special(httpx.AsyncHTTPTransport):
    """Made of httpx's own: whether it passes the steps on nobody knows."""


def test_a_transport_made_of_httpx_s_own() -> None:
    assert carrier(transport=Special()) == UNTRACED


@pytest.mark.skipif(sys.platform in {"darwin", "win32"}, reason="proxies are configured elsewhere too")
@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"])
def test_where_a_proxy_may_be_configured_httpx_decides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not without TLS: that is this machine, and the proxy would be handed the key."""
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert carrier() == (ThroughHttpx, True)
    assert carrier("http://127.0.0.1:9/api/v1") == DIRECT
    monkeypatch.setenv(name, "")
    assert carrier() == DIRECT


class Proxied:
    """A wrapper that takes on the class and the module of what it wraps, as wrapt's do: OpenTelemetry's, for one."""

    def __init__(self, wrapped: Any) -> None:
        self._wrapped = wrapped
        self.__module__ = wrapped.__module__

    @property
    def __class__(self) -> Any:
        return type(self._wrapped)

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise AttributeError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._wrapped(*args, **kwargs)


def plain(method: Any) -> Any:
    """As pytest-httpx does it."""

    async def replaced(self: Any, request: Any) -> Any:
        return await method(self, request)

    return replaced


def wrapped(method: Any) -> Any:
    return functools.wraps(method)(plain(method))


@pytest.mark.parametrize("wrap", [plain, wrapped, Proxied])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (httpx.AsyncHTTPTransport, "handle_async_request"),
        (httpx.AsyncClient, "send"),
        (httpx.AsyncClient, "_send_single_request"),
        (httpx.AsyncClient, "_transport_for_url"),
        (httpcore.AsyncConnectionPool, "handle_async_request"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_who_puts_himself_into_httpx_is_gone_through(
    cls: Any, name: str, wrap: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cls, name, wrap(getattr(cls, name)))
    assert carrier() == UNTRACED
    assert carrier("http://127.0.0.1:9/api/v1") == UNTRACED
    monkeypatch.undo()
    assert carrier() == DIRECT


def test_who_puts_a_class_of_his_own_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    class Watched(httpx.AsyncClient):
        pass

    monkeypatch.setattr(httpx, "AsyncClient", Watched)
    assert carrier() == UNTRACED


@pytest.mark.anyio
@pytest.mark.parametrize("using", ["httpx", "httpcore"])
async def test_respx_is_asked_and_nobody_else(using: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever way it puts itself in: a test of a user's must not reach the service, and pay."""

    async def connect(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was made")

    monkeypatch.setattr(anyio, "connect_tcp", connect)
    with respx.mock(base_url=API, using=using) as mock:
        mock.post("/generate").respond(200, json=RECEIPT)
        mock.get(f"/task/{TASK}").respond(200, json=completed("a"))
        async with AsyncConceptViz(KEY, base_url=API, retries=QUICK, polling=QUICK_POLLING) as cv:
            assert (await cv.generate("a")).task_id == TASK
        assert mock.calls.call_count >= 2


IMPORTS = """
import sys
import anyio
import conceptviz
from conceptviz import AsyncConceptViz, ConceptViz

def loaded():
    return {"httpx", "httpcore"} & set(sys.modules)

cv = AsyncConceptViz("cvk_x", base_url=sys.argv[1])
ConceptViz("cvk_x", base_url=sys.argv[1])
AsyncConceptViz("cvk_x")
assert not loaded(), loaded()

async def main():
    async with cv:
        await cv.submit("a")

anyio.run(main)
assert not loaded(), loaded()
"""


def test_neither_library_is_imported_by_making_a_client() -> None:
    """Nor by a submit: to import either takes longer than all the rest."""
    answer = b'{"taskId": "t-1"}'

    def behave(connection: Connection) -> None:
        connection.read()
        connection.answer(answer)

    with RawServer(behave) as server:
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS, server.base_url], capture_output=True, text=True, timeout=30, check=False
        )
    assert done.stderr == ""
    assert done.returncode == 0
