"""Finished images: fetched from the image host, verified, and written so that a file is there whole or not at all.

Rules: an HTTP client of its own, which never holds the key. The bytes are kept exactly as received. Nothing that the
host says decides a file's name or kind: the name is the task's id and the image's index, the extension comes from the
leading bytes. Files are written in threads of their own.
"""

from __future__ import annotations

import hashlib
import itertools
import queue
import secrets
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import IO, TYPE_CHECKING, TypeAlias, TypeVar

import anyio
import httpx
from anyio import to_thread

from ._config import is_loopback, is_private
from ._errors import ConceptVizError, DownloadError
from ._events import Event, Retrying
from ._exchange import LoopBound, may_go_direct
from ._files import TakenError, create, file_stem, find_saved, publish, rewind, sync
from ._http import EXCHANGE_ERRORS, LargeReads, open_http_client, reading
from ._images import HEAD_BYTES, TAIL_BYTES, ends_properly, sniff
from ._models import Image, Retries, TaskState
from ._policy import retry_delay

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

T = TypeVar("T")
_Client: TypeAlias = tuple[httpx.AsyncClient, anyio.CapacityLimiter]

MAX_IMAGE_BYTES = 64 * 2**20
MAX_REDIRECTS = 3
# A stalled download ends after the client's timeout; one that moves may take this many times longer.
PATIENCE = 10.0
# Written at a time: large enough to cost few calls, small enough to hold two of them while the next one arrives.
_BLOCK = 256 * 1024
_EXPIRED = frozenset({403, 404, 410})


class _Expired(Exception):  # noqa: N818 - a signal to look at the task once more, not an error
    """The image host no longer knows the URL. Never leaves this module."""


class _Unusable(Exception):  # noqa: N818 - not an error yet: another attempt may do better
    """A download that brought no usable image. Never leaves this module.

    Args:
        reason: What is wrong with it.
        final: Whether another attempt would only bring the same.
    """

    def __init__(self, reason: str, *, final: bool = False) -> None:
        super().__init__(reason)
        self.final = final


class _Sink:
    """Where an image's bytes go, counted, hashed and checked on the way.

    Into a file they are written by a thread of the sink's own, while more of them arrive: to hop to a worker thread
    with each block, and to wait there for the disk, would cost half as much again as the download.
    """

    def __init__(self, file: IO[bytes] | None) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self._parts: list[bytes] = []
        self._held = 0
        self._blocks: queue.SimpleQueue[list[bytes]] = queue.SimpleQueue()
        self._written = threading.Semaphore(2)
        self._failure: Exception | None = None
        self.size = 0
        self.head = b""
        self.tail = b""

    async def __aenter__(self) -> Self:
        if self._file is not None:
            self._thread = threading.Thread(target=self._write, args=(self._file,), daemon=True)
            self._thread.start()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            if exc is None:
                self._blocks.put(self._parts)
            self._blocks.put([])
            # The file may only be closed, or begun anew, when nobody writes to it any more.
            with anyio.CancelScope(shield=True):
                await to_thread.run_sync(self._thread.join)
            if exc is None and self._failure is not None:
                raise self._failure

    async def put(self, part: bytes) -> None:
        """Take the next bytes.

        Raises:
            OSError: Earlier ones could not be written.
        """
        self.size += len(part)
        if len(self.head) < HEAD_BYTES:
            self.head += part[: HEAD_BYTES - len(self.head)]
        self.tail = part[-TAIL_BYTES:] if len(part) >= TAIL_BYTES else (self.tail + part)[-TAIL_BYTES:]
        self._hash.update(part)
        self._parts.append(part)
        self._held += len(part)
        if self._file is not None and self._held >= _BLOCK:
            if self._failure is not None:
                raise self._failure
            if not self._written.acquire(blocking=False):
                await to_thread.run_sync(self._written.acquire)
            self._blocks.put(self._parts)
            self._parts, self._held = [], 0

    def _write(self, file: IO[bytes]) -> None:
        """Write block after block, up to an empty one; after a failure only take them, so that nobody waits."""
        while block := self._blocks.get():
            if self._failure is None:
                try:
                    for part in block:
                        file.write(part)
                except Exception as error:  # noqa: BLE001 - raised where it is waited for
                    self._failure = error
            block = []  # written, and not held until the next one
            self._written.release()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    @property
    def content(self) -> bytes:
        return b"".join(self._parts)


class Downloads:
    """The image host.

    Args:
        look: Looks at a task, for a fresh URL when one has expired.
        timeout: Seconds a connection may stay silent; a whole download may take PATIENCE times as long.
        retries: How often a download is tried.
        max_connections: How many downloads may run at a time.
        transport: The caller's own httpx transport, or None.
        allow_loopback: Whether images may come from this machine over http, as the simulator's do.
        emit: Called with each event.
        rng: The randomness of the pauses.
    """

    def __init__(
        self,
        *,
        look: Callable[[str], Awaitable[TaskState]],
        timeout: float,
        retries: Retries,
        max_connections: int,
        transport: httpx.AsyncBaseTransport | None,
        allow_loopback: bool,
        emit: Callable[[Event], Awaitable[None]],
        rng: Random,
    ) -> None:
        self._look = look
        self._timeout = timeout
        self._retries = retries
        self._allow_loopback = allow_loopback
        self._emit = emit
        self._rng = rng

        def open_client() -> _Client:
            proxies = not allow_loopback
            way = transport
            if way is None and may_go_direct(tls=proxies):
                way = LargeReads(max_connections)
            client = open_http_client(way, timeout=timeout, max_connections=max_connections, proxies=proxies)
            return client, anyio.CapacityLimiter(max_connections)

        async def close(opened: _Client) -> None:
            await opened[0].aclose()

        self._http = LoopBound(open_client, close)

    async def read(self, image: Image) -> bytes:
        """Fetch an image into memory.

        Raises:
            DownloadError: It could not be fetched or is not what it should be.
        """

        async def read(image: Image) -> bytes:
            return (await self._fetch(image, None)).content

        return await self._refreshing(read, image)

    async def save(self, image: Image, folder: Path, *, overwrite: bool, stem: str | None = None) -> Path:
        """Fetch an image into a folder, which is made if need be.

        Args:
            image: The image.
            folder: The folder.
            overwrite: Whether a file of the same name with other bytes is replaced.
            stem: The file's name without its extension, or None for one made of the task's id.

        Raises:
            DownloadError: It could not be fetched, is not what it should be, or could not be written.
        """

        async def save(image: Image) -> Path:
            return await self._save(image, folder, overwrite, stem or file_stem(image))

        return await self._refreshing(save, image)

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def _refreshing(self, act: Callable[[Image], Awaitable[T]], image: Image) -> T:
        """Do something with an image's URL, and once more with a fresh one if it has expired."""
        with suppress(_Expired):
            return await act(image)
        image = await self._refreshed(image)
        with suppress(_Expired):
            return await act(image)
        raise _expired(image)

    async def _refreshed(self, image: Image) -> Image:
        """Look at an image's task once more, for a fresh URL."""
        if image.task_id is None:
            raise _expired(image)
        try:
            state = await self._look(image.task_id)
        except ConceptVizError as error:
            raise _expired(image) from error
        for fresh in state.images:
            same = fresh.sha256 == image.sha256 if image.sha256 else fresh.index == image.index
            if same or len(state.images) == 1:
                return Image(fresh.url, image.prompt, image.index, image.sha256, fresh.raw, image.task_id)
        raise _expired(image)

    async def _save(self, image: Image, folder: Path, overwrite: bool, stem: str) -> Path:
        try:
            known = await to_thread.run_sync(find_saved, folder, stem, image.sha256)
            if known is not None:
                return known
            partial = folder / f".{stem}.{secrets.token_hex(4)}.part"
            try:
                with await to_thread.run_sync(create, partial) as file:
                    sink = await self._fetch(image, file)
                    await to_thread.run_sync(sync, file)
                kind = sniff(sink.head)
                assert kind is not None  # _fetch has seen to it
                path = folder / f"{stem}{kind.extension}"
                return await to_thread.run_sync(publish, partial, path, sink.sha256, overwrite)
            finally:
                with suppress(OSError):
                    partial.unlink(missing_ok=True)
        except TakenError as taken:
            why = f"{taken.path} exists with other bytes; overwrite=True replaces it"
            raise self._failed(image, why, path=taken.path) from None
        except OSError as error:
            raise self._failed(image, f"it could not be written: {error}", path=folder) from error

    async def _fetch(self, image: Image, file: IO[bytes] | None) -> _Sink:
        for attempt in itertools.count(1):
            sink = _Sink(file)
            try:
                await self._receive(image, sink)
                _verify(image, sink)
            except _Unusable as unusable:
                error = self._failed(image, str(unusable))
                delay = None if unusable.final else retry_delay(error, attempt, self._retries, self._rng, spends=False)
            else:
                return sink
            if delay is None:
                raise error
            await self._emit(Retrying(task_id=image.task_id, attempt=attempt, delay=delay, error=error))
            await anyio.sleep(delay)
            if file is not None:
                await to_thread.run_sync(rewind, file)
        raise AssertionError("unreachable")  # pragma: no cover - itertools.count has no end

    async def _receive(self, image: Image, sink: _Sink) -> None:
        client, limiter = self._http.get()
        reason = ""
        async with limiter:
            with anyio.move_on_after(self._timeout * PATIENCE) as scope:
                try:
                    response = await self._open(client, image.url)
                    async with reading(response) as chunks:
                        await self._drain(response, chunks, sink)
                except EXCHANGE_ERRORS as error:
                    reason = f"the connection to the image host failed ({type(error).__name__})"
        if scope.cancelled_caught:
            reason = f"it took longer than {self._timeout * PATIENCE:g} s"
        if reason:
            raise _Unusable(reason)

    async def _open(self, client: httpx.AsyncClient, address: str) -> httpx.Response:
        """Ask for an image, following at most three redirects, each one checked."""
        url = self._checked(address)
        for _ in range(MAX_REDIRECTS + 1):
            response = await client.send(client.build_request("GET", url), stream=True)
            if response.status_code == 200:
                return response
            await response.aclose()
            if response.status_code in _EXPIRED:
                raise _Expired
            location = response.headers.get("location")
            if response.status_code not in {301, 302, 303, 307, 308} or location is None:
                raise _Unusable(f"the image host answered with HTTP {response.status_code}")
            url = self._checked(location, url)
        raise _Unusable(f"the image host redirected more than {MAX_REDIRECTS} times", final=True)

    def _checked(self, address: str, base: httpx.URL | str = "") -> httpx.URL:
        """Read an address as httpx itself will, so that what is checked is what is connected to."""
        try:
            url = httpx.URL(base).join(address)
            host, port = url.host, url.port
        except (httpx.InvalidURL, ValueError):
            raise _Unusable("its URL cannot be read", final=True) from None
        loopback = self._allow_loopback and is_loopback(host)
        if not host or (url.scheme != "https" and not (url.scheme == "http" and loopback)):
            raise _Unusable("its URL is not https", final=True)
        if port is not None and not 0 < port < 2**16:
            raise _Unusable("its URL has a port that there is not", final=True)
        if not loopback and is_private(host):
            raise _Unusable("its URL points into a private network", final=True)
        return url

    async def _drain(self, response: httpx.Response, chunks: AsyncIterator[bytes], sink: _Sink) -> None:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _Unusable("the image host sent it compressed, which was not asked for")
        async with sink:
            async for chunk in chunks:
                if sink.size + len(chunk) > MAX_IMAGE_BYTES:
                    raise _Unusable(f"it is larger than {MAX_IMAGE_BYTES // 2**20} MiB", final=True)
                await sink.put(chunk)
        announced = response.headers.get("content-length", "")
        if announced.isdecimal() and announced != str(sink.size):
            raise _Unusable(f"{sink.size} of {announced} bytes arrived")

    def _failed(self, image: Image, why: str, *, path: Path | None = None) -> DownloadError:
        of = f" of task {image.task_id}" if image.task_id else ""
        return DownloadError(
            f"The image{of} was not saved: {why}. It is paid for and still at the service: save it again, at no cost.",
            url=image.url,
            path=path,
            task_id=image.task_id,
        )


def _verify(image: Image, sink: _Sink) -> None:
    if sniff(sink.head) is None:
        raise _Unusable("what the image host sent is not an image")
    if image.sha256 is not None:
        if sink.sha256 != image.sha256:
            raise _Unusable("its bytes do not have the SHA-256 that the service announced")
    elif not ends_properly(sink.head, sink.tail, sink.size):
        raise _Unusable("it ends before its end: the download was cut short")


def _expired(image: Image) -> DownloadError:
    return DownloadError(
        "The image's URL has expired, and a fresh look at its task gave no other. It is paid for: look at the task "
        "again later, or ask the service's support.",
        url=image.url,
        task_id=image.task_id,
    )
