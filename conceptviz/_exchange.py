"""One HTTP exchange, whichever library carries it: what goes out, what has come back so far, and how many at a time.

What lives here: what `_connections` (httpcore) and `_http` (httpx) share, what belongs to one event loop, and whether
somebody has put himself into either library. What must never live here: an import of them, the key, a decision about
money or time.
"""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from types import FunctionType
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import anyio
import anyio.lowlevel
from attrs import define, field

from ._calls import ApiCall
from ._errors import InvalidRequestError
from ._version import __version__

T = TypeVar("T")

USER_AGENT = f"conceptviz-python/{__version__}"
# Bodies are handed to the socket in pieces of this size: asyncio copies what a full socket does not take at once.
PIECE = 256 * 1024

# What a request passes on its way through httpx. Whoever traces or mocks it puts himself into one of these.
_SEAMS = {
    "httpx.AsyncClient": (
        "send",
        "_send_handling_auth",
        "_send_handling_redirects",
        "_send_single_request",
        "_transport_for_url",
    ),
    "httpx.AsyncHTTPTransport": ("handle_async_request",),
    "httpcore.AsyncConnectionPool": ("handle_async_request",),
}

Trace: TypeAlias = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""Told each step of an exchange, in the words of httpcore's `trace` extension."""

Kind: TypeAlias = Literal["submit", "look"]


@define(eq=False, repr=False)
class Received:
    """What has arrived of an answer so far.

    Attributes:
        status_code: The HTTP status; 0 before there is one.
        headers: The headers, names in lower case.
        body: The body as it came over the wire.
        is_certain: Whether it can only be the answer to this request: the connection has carried no other, or was seen
            to hold nothing before it.
    """

    status_code: int = 0
    headers: dict[str, str] = field(factory=dict)
    body: bytearray = field(factory=bytearray)
    is_certain: bool = True


class Carrier(Protocol):
    """What carries exchanges to the API, in one event loop.

    Attributes:
        errors: What it raises for an exchange that fails.
        is_traced: Whether it is known to report its steps.
    """

    errors: tuple[type[Exception], ...]
    is_traced: bool

    async def exchange(self, call: ApiCall, authorization: str, received: Received, trace: Trace | None) -> None:
        """Send a request and read its answer, up to the size that an answer may have, into `received`."""

    async def aclose(self) -> None:
        """Close the connections."""


class LoopBound(Generic[T]):
    """What belongs to the event loop that it is used in: connections, and the limits on their use.

    A program that runs several event loops after another with one client of ours (`asyncio.run` twice) gets it made
    anew in each; the connections of a loop that has ended have ended with it.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._token: object = None
        self._closed = False

    def get(self) -> T:
        """Return what belongs to the running event loop.

        Raises:
            InvalidRequestError: The client was closed.
        """
        self.check()
        token = anyio.lowlevel.current_token()
        if token is not self._token and token != self._token:
            self._token = token
            self._thing = self._make()
        return self._thing

    def check(self) -> None:
        """Refuse to go on if the client was closed.

        Raises:
            InvalidRequestError: It was.
        """
        if self._closed:
            raise InvalidRequestError("The client is closed: make a new one. Nothing was sent.")

    async def aclose(self) -> None:
        """Close it; whatever is asked of it afterwards is refused."""
        self._closed = True
        token, self._token = self._token, None
        if token is not None:
            thing = self._thing
            del self._thing
            # In another loop than its own it can only be dropped.
            if token == anyio.lowlevel.current_token():
                await self._close(thing)


def share_of(limit: int) -> int:
    """Return how many of the connections submits alone, or looks alone, may hold."""
    return limit - limit // 4


class Turns:
    """Who may have a request under way: never more than there may be connections, so that none ever queues in a pool.

    Submits and looks share the places, and neither takes the last quarter from the other: a thousand waiting tasks do
    not keep a submit out, nor a thousand submits the looks. First come, first served within that.
    """

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._most = share_of(limit)
        self._taken: dict[Kind, int] = {"submit": 0, "look": 0}
        self._waiting: dict[Kind, deque[anyio.Event]] = {"submit": deque(), "look": deque()}

    async def take(self, kind: Kind) -> None:
        """Wait for a place."""
        queue = self._waiting[kind]
        if not queue and self._is_free(kind):
            self._grant(kind)
            return
        granted = anyio.Event()
        queue.append(granted)
        try:
            await granted.wait()
        except BaseException:
            if granted.is_set():
                self.give_back(kind)  # it was given in the moment in which nobody wanted it any more
            else:
                queue.remove(granted)
            raise

    def give_back(self, kind: Kind) -> None:
        """Give a place to whoever waits for it."""
        self._free += 1
        self._taken[kind] -= 1
        other: Kind = "look" if kind == "submit" else "submit"
        for candidate in (other, kind):
            while self._waiting[candidate] and self._is_free(candidate):
                self._grant(candidate)
                self._waiting[candidate].popleft().set()

    def _is_free(self, kind: Kind) -> bool:
        return self._free > 0 and self._taken[kind] < self._most

    def _grant(self, kind: Kind) -> None:
        self._free -= 1
        self._taken[kind] += 1


class Pieces:
    """A body in pieces. No generator: trio complains of one that a broken connection leaves open."""

    def __init__(self, body: tuple[bytes, ...]) -> None:
        self._left = (part[at : at + PIECE] for part in body for at in range(0, len(part), PIECE))

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        for piece in self._left:
            return piece
        raise StopAsyncIteration


async def finish(chunks: AsyncIterator[bytes], errors: tuple[type[Exception], ...]) -> None:
    """End a body that was left before its end.

    Bodies are read through chains of generators, and trio complains of each that the garbage collector finds
    unfinished. The next read, cancelled, ends them all from within. A stream that never waits cannot be cancelled:
    hence the bound.
    """
    with anyio.CancelScope() as scope, suppress(*errors, StopAsyncIteration):
        scope.cancel()
        for _ in range(1000):
            await anext(chunks)


def may_go_direct(*, tls: bool) -> bool:
    """Say whether nothing may stand before a service that only httpx knows: an instrumentation, or a proxy."""
    return not is_httpx_changed() and not (tls and _may_have_proxy())


def _may_have_proxy() -> bool:
    """Say whether a proxy may be configured; httpx knows for which hosts. Exceptions alone are none."""
    if sys.platform in {"darwin", "win32"}:
        from urllib.request import getproxies

        return bool(getproxies().keys() - {"no"})
    given = {name.lower() for name, value in os.environ.items() if value}
    return any(name.endswith("_proxy") for name in given - {"no_proxy"})


def is_httpx_changed() -> bool:
    """Say whether something has put itself into httpx, or the pool that it stands on: tracing, or a test's mock.

    Into what was never imported, nothing has.
    """
    for seam, methods in _SEAMS.items():
        package, _, name = seam.partition(".")
        if package in sys.modules:
            cls = getattr(sys.modules[package], name)
            if cls.__module__ != package or any(_is_changed(getattr(cls, m, None), package) for m in methods):
                return True
    return False


def _is_changed(method: Any, package: str) -> bool:
    """Say whether a method is not its package's own; one that its version does not have is not changed."""
    # Wrappers take on the class and the module of what they wrap. The globals of a function cannot be lent.
    return method is not None and not (
        type(method) is FunctionType and method.__globals__["__name__"].startswith(f"{package}.")
    )
