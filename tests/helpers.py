"""What the tests of the async shell share: a key to look for, scripted answers, images, and virtual time."""

import json
import logging
import pickle
import struct
import traceback
import zlib
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anyio
import httpx
import pytest
from raw_server import RawServer
from trio.testing import MockClock

from conceptviz import AsyncConceptViz, ConceptVizError, Polling, Retries

T = TypeVar("T")

KEY = "cvk_TheKeyThatNobodyMaySee0123456789"
API = "https://conceptviz.app/api/v1"
IMAGE_HOST = "https://r2.conceptviz.app"
TASK = "vaW29_MJ1wbnyFU4bl_pd"

# No test waits for real: pauses of a millisecond, and the same rules.
QUICK = Retries(base_delay=0.001, max_delay=0.001)
QUICK_POLLING = Polling(min_interval=0.001, max_interval=0.002, first_look=0.001)

RECEIPT: dict[str, Any] = {
    "taskId": TASK,
    "status": "pending",
    "model": "cv-2",
    "quality": "2k",
    "aspect_ratio": "16:9",
    "credits_used": 2,
    "credits_remaining": 79,
    "poll_url": f"/api/v1/task/{TASK}",
}
RUNNING = {"status": "processing"}


def png(size: int = 0, *, seed: int = 0) -> bytes:
    """A whole PNG file of one pixel, made at least `size` bytes long by a chunk of its own."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ends = (chunk(b"IDAT", zlib.compress(bytes([0, seed]))), chunk(b"IEND", b""))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    filling = max(0, size - len(start) - sum(map(len, ends)) - 12)
    return start + (chunk(b"fiLl", bytes(filling)) if filling else b"") + b"".join(ends)


JPEG = b"\xff\xd8\xff\xe0" + bytes(64) + b"\xff\xd9"


def image_url(index: int = 0, extension: str = "png") -> str:
    return f"{IMAGE_HOST}/images/account/{TASK}/{index}-0123456789abcdef.{extension}"


def completed(*prompts: str, **more: Any) -> dict[str, Any]:
    images = [{"url": image_url(n), "prompt": prompt, **more} for n, prompt in enumerate(prompts or ("a",))]
    return {"status": "completed", "images": images}


Answer = Callable[[httpx.Request], httpx.Response | Awaitable[httpx.Response]]


def answer(status: int = 200, body: Any = None, headers: dict[str, str] | None = None) -> Answer:
    """An answer of the API or of the image host: JSON, or bytes as they are, in a body that was not read before."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    every = {"content-length": str(len(content)), **(headers or {})}
    return lambda _: httpx.Response(status, headers=every, stream=Chunks(content))


def failing(error: type[httpx.TransportError]) -> Answer:
    """A connection that fails, as httpx says it: the request, with the key in it, hangs on the error."""

    def fail(request: httpx.Request) -> httpx.Response:
        raise error(f"with {request.headers.get('authorization')}", request=request)

    return fail


async def silence(_: httpx.Request) -> httpx.Response:
    """An answer that never comes."""
    await anyio.sleep_forever()
    raise AssertionError


class Chunks(httpx.AsyncByteStream):
    """A body that arrives in pieces; an error among them breaks it off, None makes it fall silent."""

    def __init__(self, *pieces: bytes | Exception | None) -> None:
        self.pieces = pieces
        self.given = 0
        self.closed = False

    async def __aiter__(self):  # type: ignore[no-untyped-def]  # an async generator, as httpx's own are
        for piece in self.pieces:
            await anyio.lowlevel.checkpoint()
            if isinstance(piece, Exception):
                raise piece
            if piece is None:
                await anyio.sleep_forever()
            else:
                self.given += len(piece)
                yield piece

    async def aclose(self) -> None:
        self.closed = True


class Script:
    """A service that gives its answers in order, the last one again and again, and keeps the requests."""

    def __init__(self, *answers: Answer | Any) -> None:
        self.answers: list[Any] = [given if callable(given) else answer(200, given) for given in answers]
        self.requests: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> Any:
        self.requests.append(request)
        return self.answers[min(len(self.requests), len(self.answers)) - 1](request)

    @property
    def count(self) -> int:
        return len(self.requests)

    @property
    def paths(self) -> list[str]:
        return [f"{request.method} {request.url.raw_path.decode()}" for request in self.requests]


def client(*answers: Any, **options: Any) -> tuple[AsyncConceptViz, Script]:
    """A client whose service is a script; times are short unless they are given."""
    script = answers[0] if len(answers) == 1 and isinstance(answers[0], Script) else Script(*answers)

    async def handle(request: httpx.Request) -> httpx.Response:
        given = script(request)
        return given if isinstance(given, httpx.Response) else await given

    settings: dict[str, Any] = {"retries": QUICK, "polling": QUICK_POLLING, **options}
    return AsyncConceptViz(KEY, transport=httpx.MockTransport(handle), **settings), script


def raw_client(server: RawServer, **options: Any) -> AsyncConceptViz:
    """A client of a server on raw sockets; times are short unless they are given."""
    return AsyncConceptViz(KEY, base_url=server.base_url, **{"timeout": 2.0, "retries": QUICK, **options})


def in_virtual_time(main: Callable[[], Awaitable[T]]) -> T:
    """Run on trio with a clock that jumps to the next thing to happen: minutes of waiting take no time."""
    clock = MockClock(autojump_threshold=0)
    return anyio.run(main, backend="trio", backend_options={"clock": clock})


def assert_no_key(error: BaseException, key: str = KEY, *, frames: bool = True) -> None:
    """Look for the key in everything an error leads to: text, fields, pickle, causes, and the locals of its frames."""
    seen: set[int] = set()
    pending: list[BaseException] = [error]
    while pending:
        one = pending.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        assert not type(one).__module__.startswith(("httpx", "httpcore", "h11")), f"{one!r} is chained"
        told = traceback.TracebackException.from_exception(one, capture_locals=frames)
        texts = [str(one), repr(one), repr(vars(one)), "".join(told.format())]
        if isinstance(one, ConceptVizError):
            texts.append(repr(pickle.dumps(one)))
        assert key[4:] not in "".join(texts)
        pending += [next_ for next_ in (one.__cause__, one.__context__) if next_ is not None]


def assert_no_key_logged(caplog: pytest.LogCaptureFixture, key: str = KEY) -> None:
    for record in caplog.get_records("call"):
        assert key[4:] not in logging.Formatter().format(record)
        assert key[4:] not in repr(vars(record))
