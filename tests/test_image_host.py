"""The way to the image host: its certificate, proxies, what stands in httpx, and how much is read at a time."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import httpcore
import httpx
import pytest
import trustme
from helpers import IMAGE_HOST, KEY, QUICK, TASK, assert_no_key, assert_no_key_logged, image_url, png
from raw_server import Behaviour, Connection, RawServer

from conceptviz import AsyncConceptViz, DownloadError, Image, _http

pytestmark = pytest.mark.anyio

PNG = png()
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


@pytest.fixture(name="authority")
def _authority(monkeypatch: pytest.MonkeyPatch) -> trustme.CA:
    """Have the client trust one authority of our own."""
    authority = trustme.CA()
    context = ssl.create_default_context()
    authority.configure_trust(context)
    monkeypatch.setattr(_http, "ssl_context", lambda: context)
    return authority


def secured(authority: trustme.CA, heard: list[bytes], host: str = "127.0.0.1") -> Behaviour:
    """Make a server's behaviour: shake hands, hear what is asked, and give the picture."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(host).configure_cert(context)

    def behave(connection: Connection) -> None:
        with suppress(ssl.SSLError, OSError), context.wrap_socket(connection._sock, server_side=True) as sock:
            heard.append(sock.recv(65536))
            sock.sendall(HEAD % len(PNG) + PNG)
            sock.unwrap()

    return behave


async def test_over_tls(authority: trustme.CA, tmp_path: Path) -> None:
    """The bytes are those that were sent; the key stays at home."""
    heard: list[bytes] = []
    with RawServer(secured(authority, heard)) as server:
        image = Image(f"https://127.0.0.1:{server.port}/a.png", task_id=TASK)
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK) as cv:
            assert (await cv.save(image, tmp_path)).read_bytes() == PNG
    assert len(heard) == 1
    assert heard[0].startswith(b"GET /a.png HTTP/1.1\r\n")
    assert KEY.encode() not in heard[0]


async def test_a_certificate_that_is_not_to_be_trusted(authority: trustme.CA, tmp_path: Path) -> None:
    heard: list[bytes] = []
    with RawServer(*[secured(trustme.CA(), heard)] * 3) as server:
        image = Image(f"https://127.0.0.1:{server.port}/a.png", task_id=TASK)
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK) as cv:
            with pytest.raises(DownloadError, match="ConnectError") as caught:
                await cv.save(image, tmp_path)
    assert heard == []
    assert_no_key(caught.value)


async def test_through_a_proxy_of_the_environment(
    authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    heard: list[bytes] = []
    connects: list[bytes] = []
    host = IMAGE_HOST.removeprefix("https://")
    behave = secured(authority, heard, host)

    def tunnel(connection: Connection) -> None:
        connects.append(connection.read_some(65536))
        connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        behave(connection)

    with RawServer(tunnel) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        async with AsyncConceptViz(KEY, retries=QUICK) as cv:
            assert (await cv.save(Image(image_url(), task_id=TASK), tmp_path)).read_bytes() == PNG
    assert len(connects) == len(heard) == 1
    assert connects[0].startswith(f"CONNECT {host}:443 ".encode())
    assert KEY.encode() not in connects[0] + heard[0]


async def test_what_is_put_into_httpx_stands_before_the_image_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a mock or an instrumentation of httpx does it."""
    urls: list[str] = []

    async def stand_in(_: object, request: httpx.Request) -> httpx.Response:
        urls.append(str(request.url))
        return httpx.Response(200, content=PNG)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", stand_in)
    async with AsyncConceptViz(KEY, retries=QUICK) as cv:
        assert (await cv.save(Image(image_url(), task_id=TASK), tmp_path)).read_bytes() == PNG
    assert urls == [image_url()]


@pytest.mark.parametrize("size", [5, 65536, 300_000])
async def test_much_is_read_at_a_time(size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each read takes what the event loop has received, in one piece."""
    asked: list[int] = []
    content = PNG[:-12] + bytes(size) + PNG[-12:]
    backend: Any = httpcore.AnyIOBackend
    connect = backend.connect_tcp

    async def connect_and_watch(*arguments: object) -> httpcore.AsyncNetworkStream:
        stream: httpcore.AsyncNetworkStream = await connect(*arguments)
        read = stream.read

        async def watch(max_bytes: int, timeout: float | None = None) -> bytes:
            asked.append(max_bytes)
            return await read(max_bytes, timeout)

        monkeypatch.setattr(stream, "read", watch)
        return stream

    monkeypatch.setattr(backend, "connect_tcp", connect_and_watch)

    def serve(connection: Connection) -> None:
        connection.read_some(65536)
        connection.send(HEAD % len(content) + content)

    with RawServer(serve) as server:
        image = Image(f"http://127.0.0.1:{server.port}/a.png", task_id=TASK)
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK) as cv:
            assert (await cv.save(image, tmp_path)).read_bytes() == content
    assert set(asked) == {256 * 1024}


async def test_connections_are_kept_and_closed_with_the_client(tmp_path: Path) -> None:
    def serve(connection: Connection) -> None:
        for _ in range(3):
            assert b"GET" in connection.read_some(65536)
            connection.send(HEAD % len(PNG) + PNG)
        assert connection.read_some(1) == b""  # the client has gone
        ended.append(True)

    ended: list[bool] = []
    with RawServer(serve) as server:
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK) as cv:
            for n in range(3):
                await cv.save(Image(f"http://127.0.0.1:{server.port}/{n}.png", index=n, task_id=TASK), tmp_path)
        with anyio.fail_after(5):
            while not ended:  # noqa: ASYNC110 - the server is a thread
                await anyio.sleep(0.01)
    assert server.connections == 1
