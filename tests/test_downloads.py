"""Saving: what is refused, what is tried again, what lies on disk afterwards, and who sees the key.

The numbers M47 to M58 and M65 are rows of the fault matrix.
"""

import asyncio
import errno
import hashlib
import io
import os
import stat
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import anyio
import httpx
import pytest
from helpers import (
    IMAGE_HOST,
    JPEG,
    KEY,
    QUICK,
    QUICK_POLLING,
    TASK,
    Chunks,
    Script,
    answer,
    assert_no_key,
    assert_no_key_logged,
    client,
    failing,
    image_url,
    png,
)
from raw_server import Connection, RawServer

from conceptviz import (
    AsyncConceptViz,
    Credits,
    DownloadError,
    Image,
    InvalidRequestError,
    Result,
    Retries,
    Retrying,
    Saved,
    _downloads,
)
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.anyio

PNG = png()
WEBP = b"RIFF" + (40).to_bytes(4, "little") + b"WEBP" + bytes(36)
GIF = b"GIF89a" + bytes(20) + b"\x3b"


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def picture(url: str = image_url(), **fields: Any) -> Image:
    return Image(url, **{"index": 0, "task_id": TASK, **fields})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


async def refused(cv: AsyncConceptViz, image: Image, folder: Path, match: str = "The image") -> DownloadError:
    """Save and read an image that is not to be had; nothing is left on disk, and no secret in the error."""
    async with cv:
        with pytest.raises(DownloadError, match=match) as caught:
            await cv.save(image, folder)
        with pytest.raises(DownloadError, match=match):
            await cv.read(image)
    assert names(folder) == []
    error = caught.value
    assert (error.url, error.task_id, error.credits) == (image.url, image.task_id, Credits.SPENT)
    assert_no_key(error)
    return error


@pytest.mark.parametrize(
    ("content", "extension"),
    [(PNG, ".png"), (JPEG, ".jpg"), (WEBP, ".webp"), (GIF, ".gif")],
    ids=["png", "jpg", "webp", "gif"],
)
@pytest.mark.parametrize("with_hash", [True, False])
async def test_the_bytes_decide_the_extension_and_stay_as_they_are(
    content: bytes, extension: str, with_hash: bool, tmp_path: Path
) -> None:
    """M53: the URL says .png and the header says text; the leading bytes are believed."""
    cv, _ = client(answer(200, content, {"content-type": "text/plain"}))
    async with cv:
        image = picture(sha256=sha(content) if with_hash else None)
        path = await cv.save(image, tmp_path / "new" / "folder")
        assert await cv.read(image) == content
    assert path == tmp_path / "new" / "folder" / f"{TASK}-0{extension}"
    assert path.read_bytes() == content
    assert names(path.parent) == [path.name]


@pytest.mark.parametrize("size", [_downloads._BLOCK - 1, _downloads._BLOCK, 3 * _downloads._BLOCK + 5])
async def test_images_of_more_than_one_block(size: int, tmp_path: Path) -> None:
    content = png(size)
    pieces = [content[at : at + 100_001] for at in range(0, len(content), 100_001)]
    cv, _ = client(lambda _: httpx.Response(200, stream=Chunks(*pieces)))
    async with cv:
        path = await cv.save(picture(sha256=sha(content)), tmp_path)
        assert await cv.read(picture()) == content
    assert path.read_bytes() == content


class SlowDisk(io.BytesIO):
    """A file whose writes take their time, and may fail."""

    def __init__(self, *, fails: bool) -> None:
        super().__init__()
        self.fails = fails

    def write(self, data: Any) -> int:
        time.sleep(0.02)
        if self.fails:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


async def test_a_slow_disk_holds_the_download_back() -> None:
    """No more than two blocks wait for it in memory, and all of them arrive in their order."""
    file = SlowDisk(fails=False)
    blocks = [bytes([n]) * _downloads._BLOCK for n in range(8)]
    async with _downloads._Sink(file) as sink:
        for block in blocks:
            await sink.put(block)
            assert sink._blocks.qsize() <= 2
    assert file.getvalue() == b"".join(blocks)
    assert sink.size == 8 * _downloads._BLOCK


async def test_a_full_disk_ends_the_download_at_once() -> None:
    sink = _downloads._Sink(SlowDisk(fails=True))

    async def fill() -> None:
        async with sink:
            while sink.size < 8 * _downloads._BLOCK:
                await sink.put(bytes(_downloads._BLOCK))

    with pytest.raises(OSError, match="No space"):
        await fill()
    assert sink.size < 6 * _downloads._BLOCK


async def test_a_result_gives_a_list_and_an_image_one_path(tmp_path: Path) -> None:
    events: list[Any] = []
    contents = [png(seed=n) for n in range(3)]
    cv, script = client(*[answer(200, content) for content in contents], on_event=events.append)
    images = tuple(picture(image_url(n), index=n, prompt=f"p{n}") for n in range(3))
    async with cv:
        paths = await cv.save(Result(TASK, images), tmp_path)
        assert await cv.save(Result(TASK, ()), tmp_path) == []
        single = await cv.save(Result(TASK, images[:1]), str(tmp_path / "b"))
        one = await cv.save(images[2], tmp_path / "c")
    assert paths == [tmp_path / f"{TASK}-{n}.png" for n in range(3)]
    assert [path.read_bytes() for path in paths] == contents
    assert single == [tmp_path / "b" / f"{TASK}-0.png"]
    assert one == tmp_path / "c" / f"{TASK}-2.png"
    assert [(event.image, event.path) for event in events if isinstance(event, Saved)] == [
        *zip(images, paths, strict=True),
        (images[0], single[0]),
        (images[2], one),
    ]
    assert script.count == 5


async def test_images_that_were_saved_before_a_failure_stay(tmp_path: Path) -> None:
    cv, _ = client(answer(200, PNG), answer(200, b"<html>"))
    async with cv:
        with pytest.raises(DownloadError):
            await cv.save(Result(TASK, (picture(), picture(image_url(1), index=1))), tmp_path)
    assert names(tmp_path) == [f"{TASK}-0.png"]


@pytest.mark.parametrize("task_id", ["../../etc/passwd", "a\0b", "CON", "-rf", "é" * 300, "..", "", None])
@pytest.mark.parametrize("path", ["/..%2f..%2fetc", "/%00", "/" + "x" * 4000, "/CON.png", "/"])
async def test_names_come_from_the_task_and_stay_in_the_folder(task_id: str | None, path: str, tmp_path: Path) -> None:
    """M54: nothing that a server says becomes a path."""
    cv, _ = client(answer(200, PNG))
    async with cv:
        for index in (0, None):
            saved = await cv.save(picture(IMAGE_HOST + path, task_id=task_id, index=index), tmp_path)
            assert saved.parent == tmp_path
            assert saved.suffix == ".png"
            assert len(saved.name) <= 150
            assert set(saved.stem) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert len(names(tmp_path)) == 2


async def test_images_without_an_index_do_not_meet(tmp_path: Path) -> None:
    """Two images that matched no prompt are told apart by their URLs."""
    cv, _ = client(answer(200, png(seed=1)), answer(200, png(seed=2)))
    async with cv:
        first = await cv.save(picture(image_url(1), index=None), tmp_path)
        second = await cv.save(picture(image_url(2), index=None), tmp_path)
    assert first != second


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"<!DOCTYPE html><html>", "not an image"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image"),
        (b"", "not an image"),
        (b"\x89PN", "not an image"),
        (PNG[:-5], "cut short"),
        (PNG[: len(PNG) // 2], "cut short"),
        (JPEG[:-2], "cut short"),
        (WEBP[:-3], "cut short"),
        (PNG + b"PK\x03\x04 a zip file", "cut short"),
    ],
    ids=["html", "svg", "empty", "three bytes", "no end", "half", "jpeg", "webp", "polyglot"],
)
async def test_what_is_not_a_whole_image_is_never_saved(body: bytes, match: str, tmp_path: Path) -> None:
    """M50: tried again, as a proxy's page may be gone the next time, and then refused."""
    events: list[Any] = []
    cv, script = client(answer(200, body, {"content-type": "image/png"}), on_event=events.append)
    await refused(cv, picture(), tmp_path, match)
    assert script.count == 3 + 3
    assert all(isinstance(event, Retrying) and event.task_id == TASK for event in events)
    assert len(events) == 4


async def test_bytes_with_another_hash_are_never_saved(tmp_path: Path) -> None:
    cv, script = client(answer(200, PNG))
    await refused(cv, picture(sha256=sha(b"other")), tmp_path, "SHA-256")
    assert script.count == 6


@pytest.mark.parametrize(
    "bad",
    [
        answer(500, b""),
        answer(503, b"<html>"),
        answer(429, b""),
        answer(204, b""),
        answer(206, PNG),
        answer(304, b""),
        answer(401, b""),
        answer(302, b""),
        answer(200, PNG[:40]),
        answer(200, PNG, {"content-encoding": "gzip"}),
        failing(httpx.ConnectError),
        failing(httpx.ReadError),
        lambda _: httpx.Response(200, stream=Chunks(PNG[:30], httpx.ReadError("cut"))),
        lambda _: httpx.Response(200, headers={"content-length": str(len(PNG) + 1)}, stream=Chunks(PNG)),
        lambda _: httpx.Response(200, headers={"content-length": str(len(PNG) - 1)}, stream=Chunks(PNG)),
    ],
)
@pytest.mark.parametrize("then", ["good", "bad"])
async def test_a_passing_fault_is_tried_again(bad: Any, then: str, tmp_path: Path) -> None:
    """M47, M48, M51, M52: from the first byte, so that nothing of the failed attempt is left in the file."""
    cv, script = client(*[bad, bad, answer(200, PNG)] if then == "good" else [bad])
    if then == "bad":
        await refused(cv, picture(), tmp_path)
        return
    async with cv:
        path = await cv.save(picture(), tmp_path)
    assert path.read_bytes() == PNG
    assert script.count == 3
    assert names(tmp_path) == [path.name]


async def test_the_number_of_attempts_is_of_retries(tmp_path: Path) -> None:
    cv, script = client(answer(500, b""), retries=Retries(attempts=1))
    await refused(cv, picture(), tmp_path, "HTTP 500")
    assert script.count == 2


def part_of(length: int | None, body: bytes) -> Callable[[Connection], None]:
    def behave(connection: Connection) -> None:
        connection.read()
        if length is None:
            connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        elif length:
            connection.answer(body, length=length)
        else:
            connection.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body) + body)

    return behave


@pytest.mark.parametrize(
    "fault",
    [
        part_of(len(PNG), PNG[:50]),
        part_of(0, PNG[:50]),
        part_of(None, PNG[:50]),
        lambda connection: (connection.read(), connection.reset()),
    ],
    ids=["content-length", "chunked", "until closed", "reset"],
)
async def test_a_cut_download_over_a_real_connection(fault: Any, tmp_path: Path) -> None:
    """M47."""
    with RawServer(fault, fault, part_of(len(PNG), PNG)) as server:
        image = picture(f"http://127.0.0.1:{server.port}/images/a.png")
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK) as cv:
            path = await cv.save(image, tmp_path)
    assert path.read_bytes() == PNG
    assert len(server.requests) == 3
    assert all(not {"authorization", "cookie", "referer"} & set(request.headers) for request in server.requests)


async def test_a_silent_image_host_is_bounded(tmp_path: Path) -> None:
    """M49: no byte for as long as the timeout."""

    def hold(connection: Connection) -> None:
        connection.read()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + PNG[:20])
        connection.hold()

    with RawServer(hold) as server:
        image = picture(f"http://127.0.0.1:{server.port}/images/a.png")
        retries = Retries(attempts=1)
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=retries, timeout=0.05) as cv:
            with anyio.fail_after(3), pytest.raises(DownloadError, match="ReadTimeout") as caught:
                await cv.save(image, tmp_path)
    assert names(tmp_path) == []
    assert caught.value.__context__ is None


async def test_a_drip_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M49: a byte now and then keeps the connection from falling silent, but not for ever."""
    monkeypatch.setattr(_downloads, "PATIENCE", 2.0)

    def drip(connection: Connection) -> None:
        connection.read()
        connection.send(b"HTTP/1.1 200 OK\r\n\r\n" + PNG[:20])
        connection.drip(b"x", pause=0.005)

    with RawServer(drip) as server:
        image = picture(f"http://127.0.0.1:{server.port}/images/a.png")
        retries = Retries(attempts=1)
        async with AsyncConceptViz(KEY, base_url=server.base_url, retries=retries, timeout=0.1) as cv:
            with anyio.fail_after(3), pytest.raises(DownloadError, match=r"longer than 0\.2 s"):
                await cv.save(image, tmp_path)
    assert names(tmp_path) == []


async def test_an_image_without_end_is_left_at_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M49: no more than the cap is ever written, nothing is left, and it is not tried again."""
    monkeypatch.setattr(_downloads, "MAX_IMAGE_BYTES", 2**20)
    given = 0
    largest = 0

    class Endless(httpx.AsyncByteStream):
        def __aiter__(self) -> "Endless":
            return self

        async def __anext__(self) -> bytes:
            nonlocal given, largest
            largest = max([largest, *(entry.stat().st_size for entry in os.scandir(tmp_path))])
            await anyio.lowlevel.checkpoint()
            given += 1
            return PNG if given == 1 else bytes(65536)

    cv, script = client(lambda _: httpx.Response(200, stream=Endless()))
    async with cv:
        with warnings.catch_warnings(), pytest.raises(DownloadError, match="larger than 1 MiB"):
            await cv.save(picture(), tmp_path)
    assert script.count == 1
    assert 0 < largest <= 2**20
    assert given <= 2**20 // 65536 + 3
    assert names(tmp_path) == []


def test_the_cap() -> None:
    assert _downloads.MAX_IMAGE_BYTES == 64 * 2**20


def redirect(to: str, status: int = 302) -> Any:
    return answer(status, b"", {"location": to, "set-cookie": "a=b; Domain=conceptviz.app"})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_three_redirects_are_followed_without_the_key(status: int, tmp_path: Path) -> None:
    """M58, M65: relative ones too; no hop sees the key, a cookie or where it came from."""
    cv, script = client(
        redirect("https://a.example/1", status),
        redirect("2?x=y", status),
        redirect("//b.example/3", status),
        answer(200, PNG),
    )
    async with cv:
        path = await cv.save(picture(), tmp_path)
    assert path.read_bytes() == PNG
    assert [str(request.url) for request in script.requests] == [
        image_url(),
        "https://a.example/1",
        "https://a.example/2?x=y",
        "https://b.example/3",
    ]
    for request in script.requests:
        assert request.method == "GET"
        assert not {"authorization", "cookie", "referer"} & set(request.headers)
        assert KEY not in repr(request.headers.raw)


async def test_a_fourth_redirect_is_not_followed(tmp_path: Path) -> None:
    cv, script = client(*[redirect(f"https://a.example/{n}") for n in range(9)])
    await refused(cv, picture(), tmp_path, "more than 3 times")
    assert script.count == 4 + 4


BAD_URLS = [
    ("http://r2.conceptviz.app/a.png", "not https"),
    ("file:///etc/passwd", "not https"),
    ("ftp://a.example/a.png", "not https"),
    ("data:image/png;base64,AAAA", "not https"),
    ("https://169.254.169.254/latest/meta-data", "private"),
    ("https://10.0.0.7/a.png", "private"),
    ("https://192.168.1.1/a.png", "private"),
    ("https://172.16.0.1/a.png", "private"),
    ("https://127.0.0.1/a.png", "private"),
    ("https://localhost/a.png", "private"),
    ("https://a.localhost/a.png", "private"),
    ("https://[::1]/a.png", "private"),
    ("https://[::ffff:127.0.0.1]/a.png", "private"),
    ("https://[fd00::1]/a.png", "private"),
    ("https://0.0.0.0/a.png", "private"),
    ("https://127.1/a.png", "private"),
    ("https://2130706433/a.png", "private"),
    ("https://0x7f.0.0.1/a.png", "private"),
    ("https://127.0.0.1./a.png", "private"),
    ("https://user:pass@127.0.0.1/a.png", "private"),
    ("https://a.example:0/a.png", "port"),
    ("https://a.example:65536/a.png", "port"),
    ("http://127.0.0.1/a.png", "not https"),
]


@pytest.mark.parametrize(("url", "match"), BAD_URLS)
@pytest.mark.parametrize("by", ["url", "redirect"])
async def test_urls_that_are_never_asked_for(url: str, match: str, by: str, tmp_path: Path) -> None:
    """M58: whether the service names them or the image host does."""
    cv, script = client(redirect(url))
    await refused(cv, picture(url) if by == "url" else picture(), tmp_path, match if by == "url" else "The image")
    assert {str(request.url) for request in script.requests} == (set() if by == "url" else {image_url()})


@pytest.mark.parametrize("url", ["https://", "", "/a.png", "https://[::g]/a", "https://a.example:x/", "https://xn--a/"])
async def test_urls_that_cannot_be_read(url: str, tmp_path: Path) -> None:
    """Nor are they tried again: they would read no better."""
    events: list[Any] = []
    cv, script = client(answer(200, PNG), on_event=events.append)
    await refused(cv, picture(url), tmp_path)
    assert script.count == 0
    assert events == []


@pytest.mark.parametrize("to", ["//[", "https://[::g]/", "https://xn--a/", "https://a.example:99999999/", "\x00"])
async def test_redirects_that_cannot_be_read(to: str, tmp_path: Path) -> None:
    cv, _ = client(lambda _: httpx.Response(302, headers={"location": to}))
    await refused(cv, picture(), tmp_path)


async def test_a_loopback_client_may_fetch_from_loopback_and_others_stay_refused(tmp_path: Path) -> None:
    """The simulator's server and its pictures; a private address is refused all the same."""
    cv, script = client(answer(200, PNG), base_url="http://127.0.0.1:8787/api/v1")
    async with cv:
        await cv.save(picture("http://127.0.0.1:8787/images/a.png"), tmp_path)
        await cv.save(picture("http://localhost:8787/images/a.png"), tmp_path)
        for url in ("http://10.0.0.1/a.png", "https://10.0.0.1/a.png", "http://r2.conceptviz.app/a.png"):
            with pytest.raises(DownloadError):
                await cv.save(picture(url), tmp_path / "b")
    assert script.count == 2


async def test_a_file_with_the_same_bytes_is_left_as_it_is(tmp_path: Path) -> None:
    """M55: with the announced hash it is not even fetched, without one it is fetched and compared."""
    target = tmp_path / f"{TASK}-0.png"
    target.write_bytes(PNG)
    os.utime(target, (1, 1))
    cv, script = client(answer(200, PNG))
    async with cv:
        for overwrite in (False, True):
            assert await cv.save(picture(sha256=sha(PNG)), tmp_path, overwrite=overwrite) == target
        assert script.count == 0
        assert await cv.save(picture(), tmp_path) == target
    assert script.count == 1
    assert target.stat().st_mtime == 1
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize("with_hash", [True, False])
async def test_a_file_with_other_bytes_is_replaced_only_on_demand(with_hash: bool, tmp_path: Path) -> None:
    target = tmp_path / f"{TASK}-0.png"
    target.write_bytes(b"mine")
    cv, _ = client(answer(200, PNG))
    image = picture(sha256=sha(PNG) if with_hash else None)
    async with cv:
        with pytest.raises(DownloadError, match="overwrite=True") as caught:
            await cv.save(image, tmp_path)
        assert caught.value.path == target
        assert target.read_bytes() == b"mine"
        assert names(tmp_path) == [target.name]
        assert await cv.save(image, tmp_path, overwrite=True) == target
    assert target.read_bytes() == PNG
    assert names(tmp_path) == [target.name]


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize("dangling", [True, False])
async def test_a_symbolic_link_in_the_way(overwrite: bool, dangling: bool, tmp_path: Path) -> None:
    """M55: what it points to is never written to."""
    victim = tmp_path / "victim"
    if not dangling:
        victim.write_bytes(b"mine")
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / f"{TASK}-0.png"
    target.symlink_to(victim)
    cv, _ = client(answer(200, PNG))
    async with cv:
        if overwrite:
            assert await cv.save(picture(), folder, overwrite=True) == target
            assert not target.is_symlink()
            assert target.read_bytes() == PNG
        else:
            with pytest.raises(DownloadError):
                await cv.save(picture(), folder)
            assert target.is_symlink()
    assert victim.exists() != dangling
    assert dangling or victim.read_bytes() == b"mine"
    assert names(folder) == [target.name]


@pytest.mark.parametrize("overwrite", [True, False])
async def test_a_directory_in_the_way(overwrite: bool, tmp_path: Path) -> None:
    target = tmp_path / f"{TASK}-0.png"
    target.mkdir()
    cv, _ = client(answer(200, PNG))
    async with cv:
        with pytest.raises(DownloadError):
            await cv.save(picture(), tmp_path, overwrite=overwrite)
    assert target.is_dir()
    assert names(tmp_path) == [target.name]


async def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    """The message is about the folder, and does not suggest to overwrite it."""
    (tmp_path / "out").write_bytes(b"mine")
    cv, script = client(answer(200, PNG))
    async with cv:
        with pytest.raises(DownloadError, match="could not be written") as caught:
            await cv.save(picture(), tmp_path / "out")
    assert "overwrite" not in str(caught.value)
    assert (tmp_path / "out").read_bytes() == b"mine"
    assert script.count == 0


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.jpg", "a.jpeg", "a.webp", "a.gif"])
async def test_a_file_name_is_not_a_folder(name: str, tmp_path: Path) -> None:
    cv, script = client(answer(200, PNG))
    async with cv:
        with pytest.raises(InvalidRequestError, match="looks like a file"):
            await cv.save(picture(), tmp_path / name)
        assert names(tmp_path) == []
        (tmp_path / name).mkdir()
        assert (await cv.save(picture(), tmp_path / name)).parent == tmp_path / name
    assert script.count == 1


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    tmp_path.chmod(0o500)
    return tmp_path


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
async def test_a_folder_that_cannot_be_written_to(locked: Path) -> None:
    cv, _ = client(answer(200, PNG))
    async with cv:
        with pytest.raises(DownloadError, match="could not be written"):
            await cv.save(picture(), locked)


async def test_a_disk_that_fills_up_while_the_last_bytes_arrive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure of one block is told, though the next was already handed over."""

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            writes.append(len(data))
            handed_over.wait(5)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writes: list[int] = []
    handed_over = threading.Event()
    real = threading.Thread.join

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        handed_over.set()
        real(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", join)
    monkeypatch.setattr(_downloads, "create", lambda path: Full(path, "w"))
    content = png(_downloads._BLOCK + 100)
    cv, _ = client(lambda _: httpx.Response(200, stream=Chunks(content[:-50], content[-50:])))
    async with cv:
        with pytest.raises(DownloadError, match="No space left"):
            await cv.save(picture(), tmp_path)
    assert names(tmp_path) == []
    assert len(writes) == 1


async def test_a_full_disk_ends_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not read to its end for nothing."""
    content = png(20 * _downloads._BLOCK)
    pieces = [content[at : at + 2**16] for at in range(0, len(content), 2**16)]
    body = Chunks(*pieces)
    monkeypatch.setattr(_downloads, "create", lambda path: io.FileIO("/dev/full", "w"))
    cv, script = client(lambda _: httpx.Response(200, stream=body))
    async with cv:
        with pytest.raises(DownloadError, match="No space left"):
            await cv.save(picture(), tmp_path)
    assert body.given <= 4 * _downloads._BLOCK
    assert script.count == 1


@pytest.mark.parametrize("at", ["fsync", "write", "close", "link"])
async def test_a_full_disk(at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M56: the error says why, nothing is left behind, and the image can be saved again."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def create(path: Path) -> IO[bytes]:
        path.touch()
        return Path("/dev/full").open("wb", buffering=0 if at == "write" else -1)

    # Of several blocks, so that a block cannot be written while others are still to come.
    content = PNG if at == "close" else png(5 * _downloads._BLOCK)
    pieces = range(0, len(content), 2**16)
    with monkeypatch.context() as patch:
        if at == "fsync":
            patch.setattr(os, "fsync", full)
        elif at == "link":
            patch.setattr(os, "link", full)
            patch.setattr(Path, "replace", full)
        else:
            patch.setattr(_downloads, "create", create)
        cv, _ = client(lambda _: httpx.Response(200, stream=Chunks(*[content[at : at + 2**16] for at in pieces])))
        with pytest.raises(DownloadError, match="No space left") as caught:
            await cv.save(picture(), tmp_path)
    assert caught.value.path == tmp_path
    assert names(tmp_path) == []
    async with cv:
        assert (await cv.save(picture(), tmp_path)).read_bytes() == content


@pytest.mark.parametrize("existing", [None, PNG, b"mine"])
async def test_a_file_system_without_links(
    existing: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    target = tmp_path / f"{TASK}-0.png"
    if existing is not None:
        target.write_bytes(existing)
    cv, _ = client(answer(200, PNG))
    async with cv:
        if existing == b"mine":
            with pytest.raises(DownloadError, match="overwrite=True"):
                await cv.save(picture(), tmp_path)
        else:
            assert await cv.save(picture(), tmp_path) == target
    assert target.read_bytes() == (existing or PNG)
    assert names(tmp_path) == [target.name]


async def test_the_file_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the folder after: a power cut leaves the whole file or none."""
    steps: list[str] = []
    sync, link = os.fsync, os.link

    def note_sync(descriptor: int) -> None:
        steps.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def note_link(*args: Any) -> None:
        steps.append("name")
        link(*args)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "link", note_link)
    cv, _ = client(answer(200, PNG))
    async with cv:
        await cv.save(picture(), tmp_path)
    assert steps == ["file", "name", "folder"]


async def test_where_folders_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no way to open one."""
    monkeypatch.delattr(os, "O_DIRECTORY")
    cv, _ = client(answer(200, PNG))
    async with cv:
        assert (await cv.save(picture(), tmp_path)).read_bytes() == PNG


async def test_a_new_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    cv, _ = client(answer(200, PNG))
    async with cv:
        path = await cv.save(picture(), tmp_path)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    assert path.stat().st_nlink == 1


class TwoHosts:
    """The API and the image host behind one transport."""

    def __init__(self, looks: list[Any], images: list[Any]) -> None:
        self.looks, self.images = Script(*looks), Script(*images)

    def __call__(self, request: httpx.Request) -> Any:
        is_image = request.url.host == "r2.conceptviz.app"
        assert is_image != ("authorization" in request.headers)
        return (self.images if is_image else self.looks)(request)


def fresh_look(*urls: str, **more: Any) -> dict[str, Any]:
    return {"status": "completed", "images": [{"url": url, "prompt": "a", **more} for url in urls]}


@pytest.mark.parametrize("status", [403, 404, 410])
@pytest.mark.parametrize("how", ["save", "read"])
async def test_an_expired_url_is_refreshed_by_one_look(status: int, how: str, tmp_path: Path) -> None:
    hosts = TwoHosts([fresh_look(f"{image_url()}?fresh")], [answer(status, b""), answer(200, PNG)])
    events: list[Any] = []
    cv, _ = client(hosts, on_event=events.append)
    async with cv:
        image = picture(prompt="a", sha256=None)
        if how == "save":
            assert (await cv.save(image, tmp_path)).read_bytes() == PNG
        else:
            assert await cv.read(image) == PNG
    assert hosts.looks.paths == [f"GET /api/v1/task/{TASK}"]
    assert [str(request.url) for request in hosts.images.requests] == [image_url(), f"{image_url()}?fresh"]
    assert [event.image.prompt for event in events] == (["a"] if how == "save" else [])


@pytest.mark.parametrize(
    ("image", "chosen"),
    [
        (picture(index=2), 2),
        (picture(index=1, sha256="b" * 64), 1),
        (picture(index=0, sha256="c" * 64), 2),
        (picture(index=7), None),
        (picture(index=None), None),
        (picture(index=0, sha256="d" * 64), None),
    ],
)
async def test_the_fresh_url_is_that_of_the_same_image(image: Image, chosen: int | None) -> None:
    """By its hash if it has one, by its index otherwise; never another image's."""
    body = fresh_look(*[f"{image_url(n)}" for n in range(3)])
    for entry, letter in zip(body["images"], "abc", strict=True):
        entry["imageHash"] = letter * 64
    hosts = TwoHosts([body], [answer(410, b"")])
    cv, _ = client(hosts)
    async with cv:
        with pytest.raises(DownloadError, match="expired"):
            await cv.read(image)
    assert [str(request.url) for request in hosts.images.requests[1:]] == (
        [] if chosen is None else [image_url(chosen)]
    )


@pytest.mark.parametrize(
    "looks",
    [
        [fresh_look(image_url())],
        [{"status": "completed", "images": []}],
        [answer(404, {"code": "TASK_NOT_FOUND"})],
        [answer(401, {"code": "INVALID_API_KEY"})],
        [answer(502, b"")],
        [answer(200, b"<html>")],
    ],
    ids=["same", "none", "not found", "key", "gateway", "html"],
)
@pytest.mark.parametrize("how", ["save", "read"])
async def test_a_url_that_stays_expired(looks: list[Any], how: str, tmp_path: Path) -> None:
    hosts = TwoHosts(looks, [answer(403, b"")])
    cv, _ = client(hosts)
    async with cv:
        with pytest.raises(DownloadError, match="expired") as caught:
            await (cv.save(picture(), tmp_path) if how == "save" else cv.read(picture()))
    assert hosts.images.count <= 2
    assert names(tmp_path) == []
    assert (caught.value.task_id, caught.value.credits) == (TASK, Credits.SPENT)
    assert_no_key(caught.value)


async def test_an_expired_image_without_a_task_cannot_be_refreshed() -> None:
    hosts = TwoHosts([fresh_look(image_url())], [answer(403, b"")])
    cv, _ = client(hosts)
    async with cv:
        with pytest.raises(DownloadError, match="expired"):
            await cv.read(picture(task_id=None))
    assert (hosts.looks.count, hosts.images.count) == (0, 1)


async def test_the_simulators_expired_url(tmp_path: Path) -> None:
    """The whole road, with the simulator's own first URL of each image expired."""
    simulator = Simulator(speed=100_000, render=render_tiny)
    async with AsyncConceptViz(simulator.api_key, transport=simulator.transport(), polling=QUICK_POLLING) as cv:
        image = (await cv.generate("a [sim:expired-url]")).image
        path = await cv.save(image, tmp_path)
    assert sha(path.read_bytes()) == image.sha256
    assert simulator.requests["image"] == 2


async def test_a_cancelled_download_leaves_nothing(tmp_path: Path) -> None:
    body = Chunks(PNG[:20], None)
    cv, script = client(lambda _: httpx.Response(200, stream=body))
    async with cv:
        with anyio.move_on_after(0.05) as scope:
            await cv.save(picture(), tmp_path)
        assert scope.cancelled_caught
        assert names(tmp_path) == []
        assert body.closed
        script.answers = [answer(200, PNG)]
        assert (await cv.save(picture(), tmp_path)).read_bytes() == PNG


def test_a_download_that_asyncio_cancels_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        cv, _ = client(lambda _: httpx.Response(200, stream=Chunks(png(2**20)[:-1], None)))
        async with cv:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(cv.save(picture(), tmp_path), 0.05)

    asyncio.run(main())
    assert names(tmp_path) == []


async def test_cancelled_at_any_moment_there_is_the_whole_file_or_none(tmp_path: Path) -> None:
    """A sweep over the moments of a download, real threads included."""
    content = png(2_000_000)
    pieces = [content[at : at + 200_000] for at in range(0, len(content), 200_000)]
    cv, _ = client(lambda _: httpx.Response(200, stream=Chunks(*pieces)))
    async with cv:
        for moment in range(24):
            folder = tmp_path / str(moment)
            with anyio.move_on_after(moment * 0.0004):
                await cv.save(picture(), folder)
            left = names(folder) if folder.exists() else []
            assert left in ([], [f"{TASK}-0.png"])
            if left:
                assert (folder / left[0]).read_bytes() == content


async def test_two_saves_of_the_same_image_at_once(tmp_path: Path) -> None:
    """Both get the path, and there is one file."""
    paths: list[Path] = []

    async def save() -> None:
        paths.append(await cv.save(picture(), tmp_path))

    cv, _ = client(answer(200, PNG))
    async with cv, anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(save)
    assert set(paths) == {tmp_path / f"{TASK}-0.png"}
    assert names(tmp_path) == [f"{TASK}-0.png"]


async def test_downloads_at_a_time_are_bounded(tmp_path: Path) -> None:
    now = most = 0

    async def count(_: httpx.Request) -> httpx.Response:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await anyio.sleep(0.001)
        now -= 1
        return httpx.Response(200, content=PNG)

    cv, _ = client(count, max_connections=2)
    async with cv, anyio.create_task_group() as group:
        for n in range(8):
            group.start_soon(cv.save, picture(index=n), tmp_path)
    assert most == 2
    assert len(names(tmp_path)) == 8


async def test_an_error_names_the_task_and_what_to_do(tmp_path: Path) -> None:
    cv, _ = client(answer(500, b""))
    error = await refused(cv, picture(), tmp_path)
    assert TASK in str(error)
    assert "at no cost" in str(error)
    error = await refused(client(answer(500, b""))[0], picture(task_id=None), tmp_path)
    assert error.task_id is None
