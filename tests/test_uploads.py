"""Images to edit: what is refused before anything is sent, what arrives, and what it costs in time and memory.

The numbers M59 and M67 to M72 are rows of the fault matrix. What the service saw is the oracle.
"""

import base64
import io
import json
import logging
import os
import socket
import threading
import tracemalloc
from collections.abc import Iterator
from email.parser import BytesParser
from email.policy import HTTP
from pathlib import Path
from typing import IO, Any

import anyio
import httpx
import pytest
from helpers import (
    JPEG,
    RECEIPT,
    Script,
    assert_no_key,
    assert_no_key_logged,
    client,
    png,
)

from conceptviz import AsyncConceptViz, Credits, InvalidRequestError, _uploads
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.anyio

PNG = png()
URL = "https://example.com/a.png"
LIMIT = 20 * 2**20


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def parts(request: httpx.Request) -> list[tuple[dict[str, str], bytes]]:
    """Take a multipart body apart with another library's parser: its headers, and the bytes between them."""
    head = f"Content-Type: {request.headers['content-type']}\r\n\r\n".encode()
    message = BytesParser(policy=HTTP).parsebytes(head + request.content)
    assert not message.defects
    return [
        (
            {
                "name": str(part.get_param("name", header="content-disposition")),
                "filename": str(part.get_filename() or ""),
                "type": part.get_content_type() if part["content-type"] else "",
            },
            bytes(part.get_payload(decode=True)),
        )
        for part in message.iter_parts()
    ]


async def refused(images: Any, match: str, *, frames: bool = True) -> InvalidRequestError:
    """Edit with images that are to be refused here: the service sees nothing."""
    cv, script = client(RECEIPT)
    async with cv:
        with anyio.fail_after(5), pytest.raises(InvalidRequestError, match=match) as caught:
            await cv.edit("a", images)
    assert script.count == 0
    assert caught.value.credits is Credits.NOT_SPENT
    assert "Nothing was sent" in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert_no_key(caught.value, frames=frames)
    return caught.value


async def sent(images: Any, **settings: Any) -> httpx.Request:
    cv, script = client(RECEIPT)
    async with cv:
        await cv.submit_edit("make it blue", images, **settings)
    [request] = script.requests
    return request


async def test_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M67, and no descriptor is left open."""
    closed: list[int] = []
    opened: list[int] = []
    real_open, real_close = os.open, os.close

    def note_open(*args: Any) -> int:
        opened.append(real_open(*args))
        return opened[-1]

    def note_close(descriptor: int) -> None:
        closed.append(descriptor)
        real_close(descriptor)

    monkeypatch.setattr(os, "open", note_open)
    monkeypatch.setattr(os, "close", note_close)
    await refused(tmp_path, "not a regular file")
    assert len(opened) == 1
    assert set(opened) <= set(closed)


async def test_a_fifo_without_a_writer(tmp_path: Path) -> None:
    """To open it in the usual way would wait for ever."""
    os.mkfifo(tmp_path / "fifo.png")
    await refused(tmp_path / "fifo.png", "not a regular file")


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
async def test_a_device(device: str) -> None:
    await refused(Path(device), "not a regular file")


async def test_a_socket(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening, pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)  # the path of a socket has room for few characters
        listening.bind("s.png")
        await refused(tmp_path / "s.png", "could not be read")


async def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    await refused(tmp_path / "a.png", "is empty")
    await refused(b"", "is empty")
    await refused(io.BytesIO(), "is empty")


@pytest.mark.parametrize("content", [b"just text", b"<svg/>", b"%PDF-1.7", b"\x89PN", b"\xff\xd8", b"RIFF0000WAVE"])
async def test_a_text_file_called_png(content: bytes, tmp_path: Path) -> None:
    """The leading bytes decide."""
    (tmp_path / "a.png").write_bytes(content)
    await refused(tmp_path / "a.png", r"a\.png.* not an image by its leading bytes")
    await refused(content, "not an image")
    await refused(data_url(content), "not an image")


async def test_a_missing_file(tmp_path: Path) -> None:
    await refused(tmp_path / "none.png", "No such file")
    (tmp_path / "link.png").symlink_to(tmp_path / "none.png")
    await refused(tmp_path / "link.png", "No such file")


async def test_a_path_that_no_file_can_have() -> None:
    await refused(Path("a\0b.png"), "could not be read")
    await refused(Path("x" * 300), "could not be read")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
async def test_a_file_without_permission(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "a.png").chmod(0)
    await refused(tmp_path / "a.png", "Permission denied")


async def test_a_symbolic_link_to_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "link").symlink_to(tmp_path / "a.png")
    [_, (_, content)] = parts(await sent(tmp_path / "link"))
    assert content == PNG


async def test_a_file_opened_as_text(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with (tmp_path / "a.png").open() as file:
        await refused(file, "'rb'")
    await refused(io.StringIO("text"), "'rb'")


async def test_a_closed_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    with (tmp_path / "a.png").open("rb") as file:
        pass
    await refused(file, "could not be read")


async def test_a_file_that_fails_to_read() -> None:
    class Broken(io.RawIOBase):
        def read(self, size: int = -1) -> bytes:
            raise OSError(5, "Input/output error")

    await refused(Broken(), "Input/output error")


@pytest.mark.parametrize(
    "path", ["sketch.png", "/etc/passwd", "C:\\a.png", "~/a.png", "", "file:///a.png", "ftp://a/b"]
)
async def test_a_str_that_is_a_path(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path never arrives by accident, though the file is there."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sketch.png").write_bytes(PNG)
    await refused(path, "wrap it in Path")
    await refused([URL, path], "Image 2 .*wrap it in Path")


@pytest.mark.parametrize(
    "url", ["https://", "http:///a.png", "https://[", "https://a b.example/", "https://a.example/\n"]
)
async def test_a_str_that_is_no_url(url: str) -> None:
    await refused(url, "not an http")


async def test_a_long_str_is_shown_in_part() -> None:
    error = await refused("secret-" * 1000, "wrap it in Path")
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("data:image/png;base64,!!!", "broken base64"),
        ("data:image/png;base64,iVBORw0KGgo", "broken base64"),
        (data_url(PNG)[:-10] + "\n" + data_url(PNG)[-10:], "broken base64"),
        ("data:image/png;base64,é", "broken base64"),
        ("data:image/png;base64,", "is empty"),
        ("data:text/html;base64,aGk=", "not a data:image"),
        ("data:image/png,abc", "not a data:image"),
        ("data:", "not a data:image"),
        ("DATA:image/svg+xml;base64,PHN2Zy8+", "not an image"),
    ],
)
async def test_a_data_url_that_is_none(url: str, match: str) -> None:
    """M59."""
    await refused(url, match)


async def test_a_data_url_is_measured_decoded() -> None:
    await refused(data_url(png(LIMIT + 1)), "larger than 20 MB", frames=False)


@pytest.mark.parametrize("count", [0, 5])
async def test_the_number_of_images(count: int) -> None:
    await refused([PNG] * count, "images were given: one edit takes one to 4")


@pytest.mark.parametrize("thing", [7, None, {"a": 1}])
async def test_things_that_are_no_images(thing: Any) -> None:
    await refused([thing], type(thing).__name__)


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        (20 * 10**6, "path"),
        (20 * 10**6 + 1, "path"),
        (LIMIT, "path"),
        (LIMIT + 1, "path"),
        (LIMIT + 1, "file"),
        (LIMIT + 1, "bytes"),
    ],
)
async def test_20_megabytes(size: int, kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """M68: which megabyte is meant the page does not say: above the small one we warn, above the large we refuse."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    os.truncate(path, size)  # sparse: no disk is filled
    with path.open("rb") as file:
        image: Any = {"path": path, "file": file, "bytes": path.read_bytes() if kind == "bytes" else b""}[kind]
        if size > LIMIT:
            await refused(image, "larger than 20 MB", frames=False)
            return
        request = await sent(image)
    assert size < len(request.content) < size + 1000
    warned = [record for record in caplog.records if "a little above 20 MB" in record.message]
    assert len(warned) == (size > 20 * 10**6)
    assert all(record.levelno == logging.WARNING for record in warned)


async def test_every_form_of_a_local_image_goes_as_multipart(tmp_path: Path) -> None:
    """Byte for byte, in order, the `image` field repeated, and the file names ours."""
    contents = [png(300, seed=1), JPEG, png(300, seed=3), b"GIF89a" + b"\r\n--x\r\n" * 5]
    path = tmp_path / 'a";\r\nX-Evil: 1;.png'
    path.write_bytes(contents[0])
    with io.BytesIO(contents[2]) as file:
        request = await sent([path, contents[1], file, bytearray(contents[3])], model="cv-1", aspect_ratio="1:1")
    fields = parts(request)
    assert [(part["name"], body) for part, body in fields if not part["filename"]] == [
        ("prompt", b"make it blue"),
        ("model", b"cv-1"),
        ("aspectRatio", b"1:1"),
    ]
    files = [(part["name"], part["type"], body) for part, body in fields if part["filename"]]
    assert files == [
        ("image", kind, body)
        for kind, body in zip(["image/png", "image/jpeg", "image/png", "image/gif"], contents, strict=True)
    ]
    assert b"Evil" not in request.content
    assert request.headers["content-length"] == str(len(request.content))
    assert request.url.path == "/api/v1/edit"


async def test_urls_go_as_json_as_they_are() -> None:
    urls = [URL, "HTTP://example.com/b.png?x=é#y", data_url(PNG), data_url(JPEG, "image/jpeg")]
    request = await sent(urls, quality="2k")
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.content) == {"prompt": "make it blue", "images": urls, "quality": "2k"}


async def test_a_mix_goes_as_json_with_data_urls(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(PNG)
    request = await sent([tmp_path / "a.jpg", URL, JPEG])
    assert json.loads(request.content)["images"] == [data_url(PNG), URL, data_url(JPEG, "image/jpeg")]


@pytest.mark.parametrize("images", [[png(70_000)] * 4, [png(70_000), URL], [URL], [PNG]])
async def test_the_simulator_takes_them(images: list[Any]) -> None:
    """A second reading of the API page, with a parser of its own."""
    simulator = Simulator(render=render_tiny)
    async with AsyncConceptViz(simulator.api_key, transport=simulator.transport()) as cv:
        task = await cv.submit_edit("é", images)
    assert task.submission is not None
    assert task.submission.credits_used == 2
    assert simulator.ledger.submissions == 1


async def test_a_file_object_is_read_from_where_it_is_and_to_its_end() -> None:
    """Also one that gives a little at a time, as a raw file or a download may."""

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            return super().read(min(size or 0, 7))

    file: IO[bytes] = Slow(b"skipped" + PNG)
    file.seek(7)
    [_, (_, content)] = parts(await sent(file))
    assert content == PNG


async def test_a_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M69: what was checked is what is sent, whatever becomes of the file, and however often the POST is made."""
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    opened: list[int] = []
    real = os.open

    def note(*args: Any) -> int:
        opened.append(real(*args))
        return opened[-1]

    monkeypatch.setattr(os, "open", note)
    script = Script(RECEIPT)
    bodies: list[bytes] = []

    def service(request: httpx.Request) -> httpx.Response:
        path.write_bytes(b"changed")
        bodies.append(request.content)
        if len(bodies) < 3:
            raise httpx.ConnectError("refused")
        return script(request)  # type: ignore[no-any-return]  # a Script answers with what it was given

    cv, _ = client(service)
    async with cv:
        await cv.submit_edit("a", path)
    assert len(opened) == 1
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
    assert PNG in bodies[0]


async def test_a_slow_disk_does_not_stall_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M70: while a read is stuck, other tasks of the event loop go on: it ends only when they have."""
    (tmp_path / "a.png").write_bytes(PNG)
    ticked = threading.Event()
    real = _uploads._read_path
    waited: list[bool] = []

    def stuck(*args: Any) -> bytes:
        waited.append(ticked.wait(5))
        return real(*args)

    monkeypatch.setattr(_uploads, "_read_path", stuck)

    async def tick() -> None:
        for _ in range(10):
            await anyio.sleep(0.001)
        ticked.set()

    async with anyio.create_task_group() as group:
        group.start_soon(tick)
        await sent(tmp_path / "a.png")
    assert waited == [True]


async def test_base64_does_not_stall_the_loop_either(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 MB take tens of milliseconds to encode: that is work for a thread too."""
    threads: list[int] = []
    real = base64.b64encode

    def note(content: bytes) -> bytes:
        threads.append(threading.get_ident())
        return real(content)

    monkeypatch.setattr(base64, "b64encode", note)
    await sent([PNG, URL])
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("kind", ["multipart", "json", "data URLs"])
def test_memory_stays_below_twice_the_payload(kind: str, tmp_path: Path) -> None:
    """M99: at most 2.2 times the images' own bytes (data URLs: their text), against a service that drains the body."""
    size = 20 * 10**6
    path = tmp_path / "a.png"
    path.write_bytes(PNG)
    os.truncate(path, size)
    drained = 0

    class Drain(httpx.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            nonlocal drained
            assert isinstance(request.stream, httpx.AsyncByteStream)
            async for piece in request.stream:
                drained += len(piece)
            return httpx.Response(200, json=RECEIPT)

    async def main() -> None:
        images: dict[str, list[Any]] = {
            "multipart": [path] * 4,
            "json": [path] * 3 + [URL],
            "data URLs": [data_url(path.read_bytes())] * 4 if kind == "data URLs" else [],
        }
        async with AsyncConceptViz("cvk_x", transport=Drain()) as cv:
            tracemalloc.start()
            try:
                await cv.submit_edit("a", images[kind])
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        payload = {"multipart": 4 * size, "json": 3 * size, "data URLs": 4 * size * 4 // 3}[kind]
        assert drained > payload
        assert peak < 2.2 * payload, peak / payload

    anyio.run(main)
