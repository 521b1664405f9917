"""The Simulator: a world with a clock, faults and a renderer, and the way in for both shells."""

import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from random import Random
from typing import TYPE_CHECKING, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import attrs

from ._body import Body, BodyReader
from ._faults import Fault, Faults
from ._page import PLANS
from ._pictures import Picture, Render, page_renderer
from ._world import Account, Ledger, Reply, Request, World

if TYPE_CHECKING:
    from ._transport import SimulatorTransport

T = TypeVar("T")

# A JSON body above this size is decoded in a worker thread: base64 of 20 MB would hold the loop for too long.
_LARGE_BODY = 256 * 1024

# Pictures drawn at the same time for one event loop. A 4k page takes about 50 MB while it is drawn.
_DRAWN_AT_ONCE = 2


@attrs.frozen
class _Loop:
    """What the simulator keeps for one event loop."""

    ahead: float
    drawing: anyio.CapacityLimiter


class Simulator:
    """The ConceptViz API, served locally: every endpoint, limit, price and error of the API reference.

    No request leaves the machine and no credit is real. It is driven through `transport()`, in the same
    process and without a socket, or through `serve()`, by any HTTP client; one simulator can be used through
    both at once.

    Prompts that hold one of these words get the answer they name, as test cards do in payments:
    `[sim:blocked]`, `[sim:failed]`, `[sim:partial]`, `[sim:slow]`, `[sim:rate-limited]`,
    `[sim:credit-error]`, `[sim:server-error]`, `[sim:unknown-status]`, `[sim:expired-url]` (the first URL of
    each image has expired, the next look gives a fresh one). An input image whose URL or bytes hold
    `[sim:blocked]` is blocked too.

    Args:
        credits: What the account has to spend.
        plan: "pro", "pro-single" (one prompt a request, 2k only) or "free" (no API).
        speed: Simulated seconds in one real second: at 30, a generation of 60 s takes 2 s.
        seed: Makes durations, ids, the key and file formats repeatable.
        render: Draws the pictures; `render_tiny` costs nothing and needs no Pillow, for load tests. None:
            whole pages.
        moderation_limit: Requests to generate or edit per 60 simulated seconds before
            MODERATION_RATE_LIMITED; None: any number (the real limit is not known).
        observed_fields: Images carry `imageHash` and `storageKey`, which the service sends but the page does
            not show.
        clock: Seconds on a clock that never goes back; None: the clock of the event loop that asks.

    Attributes:
        faults: What should go wrong on the wire: `simulator.faults.add("submit", close=True, accept=True)`.
        requests: How many requests arrived, by kind: "submit", "poll", "image", "other".

    Raises:
        ValueError: An argument outside its range.
    """

    def __init__(
        self,
        *,
        credits: int = 100,
        plan: str = "pro",
        speed: float = 1.0,
        seed: int | None = None,
        render: Render | None = None,
        moderation_limit: int | None = None,
        observed_fields: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        if credits < 0:
            raise ValueError(f"credits must be 0 or more, not {credits}.")
        if plan not in PLANS:
            raise ValueError(f"plan must be one of {', '.join(PLANS)}, not {plan!r}.")
        if not (speed > 0 and math.isfinite(speed)):
            raise ValueError(f"speed must be a finite number above 0, not {speed}.")
        self.faults: Faults = Faults()
        self.requests: Counter[str] = Counter()
        self._speed = speed
        self._world = World(
            rng=Random(seed),  # noqa: S311 - repeatable on purpose; the key it makes opens nothing
            speed=speed,
            moderation_limit=moderation_limit,
            observed_fields=observed_fields,
        )
        self._account = self._world.open_account(credits, plan)
        self._render = render
        self._clock = clock
        self._latest = -math.inf
        self._loop_state: anyio.lowlevel.RunVar[_Loop] = anyio.lowlevel.RunVar(f"conceptviz.simulator.{id(self)}")
        # One world may be asked from several threads: a server's, and those of clients in this process.
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Simulator plan={self._account.plan!r} credits={self.ledger.credits} speed={self._speed:g}>"

    @property
    def api_key(self) -> str:
        """The account's first API key. It opens this simulator and nothing else."""
        return self._account.api_key

    @property
    def ledger(self) -> Ledger:
        """The service's own book: `.credits`, `.charged`, `.refunded`, `.submissions`.

        A failed generation is refunded at the end of its time, and written down with the first request after
        that.
        """
        return self._account.ledger

    def add_account(self, *, credits: int = 100, plan: str = "pro") -> Account:
        """Open a second account, whose tasks the first cannot see.

        Returns:
            The account, with its own `.api_key` and `.ledger`.
        """
        with self._lock:
            return self._world.open_account(credits, plan)

    def add_key(self) -> str:
        """One more API key for the account.

        Raises:
            ValueError: The account has five, which is the limit.
        """
        with self._lock:
            return self._world.add_key(self._account)

    def disable_key(self, key: str | None = None) -> None:
        """Disable one of the account's keys (None: the first): from now on it is INVALID_API_KEY.

        Raises:
            KeyError: The account has no such key.
        """
        key = self.api_key if key is None else key
        if key not in self._account.keys:
            raise KeyError("The account has no such key.")
        self._account.keys[key] = False

    def transport(self) -> "SimulatorTransport":
        """An `httpx.AsyncBaseTransport` that answers for https://conceptviz.app and https://r2.conceptviz.app.

        No socket and no thread for a poll; a picture is drawn in a worker thread when its task is first seen
        to be completed. Works on asyncio and trio, with trio's `MockClock` too.

        Raises:
            ModuleNotFoundError: Pillow is missing, and no `render` was given.
        """
        from ._transport import SimulatorTransport

        self._prepare()
        return SimulatorTransport(self)

    def serve(
        self, host: str = "127.0.0.1", port: int = 0, *, allow_remote: bool = False
    ) -> AbstractContextManager[str]:
        """Serve over HTTP from a background thread.

        Args:
            host: A loopback address or "localhost".
            port: 0 takes a free one.
            allow_remote: Accept another host, so that other machines can reach it.

        Returns:
            A context manager that gives the base URL, "/api/v1" included, and stops the server at its end.

        Raises:
            ValueError: The host is not loopback and `allow_remote` is not set.
            ModuleNotFoundError: Pillow or uvicorn is missing.
            OSError: The port is taken.
        """
        from ._server import serve

        self._prepare()
        return serve(self, host=host, port=port, allow_remote=allow_remote)

    def strike(self, request: Request) -> Fault | None:
        """The fault that is due for this request, now used up. Each shell asks once, before anything else."""
        with self._lock:
            return self.faults.take(request)

    async def exchange(self, request: Request, fault: Fault | None) -> Reply | None:
        """Answer one request that has arrived. Both shells come through here.

        Args:
            request: What came in.
            fault: What `strike` gave for it.

        Returns:
            The answer, or None when the connection is to end without one.

        Raises:
            ModuleNotFoundError: A picture must be drawn and the library for it is missing.
        """
        with self._lock:
            self.requests[request.kind] += 1
        truth = None if fault is not None and fault.is_instead else await self._act(request)
        if fault is None:
            return truth
        await anyio.sleep(fault.delay)
        return None if fault.close else fault.reply(truth)

    def _prepare(self) -> Render:
        if self._render is None:
            self._render = page_renderer()
        return self._render

    async def _act(self, request: Request) -> Reply:
        while True:
            now = self._now()
            with self._lock:
                outcome = self._world.answer(request, now)
            if isinstance(outcome, Reply):
                return outcome
            await self._draw(outcome)

    async def _draw(self, pictures: tuple[Picture, ...]) -> None:
        render = self._prepare()

        def draw() -> None:
            for picture in pictures:
                picture.draw(render)

        await _outside_the_loop(draw, self._loop().drawing)

    def _now(self) -> float:
        if self._clock is not None:
            return self._clock()
        self._latest = max(self._latest, anyio.current_time() + self._loop().ahead)
        return self._latest

    def _loop(self) -> _Loop:
        """What belongs to the running event loop.

        Each loop counts its own seconds (trio's from a random start, a MockClock's from zero), and a task may
        be submitted in one loop and looked at in another: at first sight a loop's clock is set beside the
        others'.
        """
        try:
            return self._loop_state.get()
        except LookupError:
            ahead = max(time.monotonic(), self._latest) - anyio.current_time()
            state = _Loop(ahead, anyio.CapacityLimiter(_DRAWN_AT_ONCE))
            self._loop_state.set(state)
            return state


async def finish_body(reader: BodyReader) -> Body | None:
    """The body that `reader` has taken in; a large one is decoded in a worker thread."""
    if reader.size <= _LARGE_BODY:
        return reader.finish()
    return await _outside_the_loop(reader.finish, None)


async def _outside_the_loop(work: Callable[[], T], limiter: anyio.CapacityLimiter | None) -> T:
    """Run slow work in a worker thread.

    Under trio's MockClock it runs here and now: that clock does not know of threads, and would jump to the
    caller's next deadline while one works. No real waiting is lost where time is not real.
    """
    if _time_is_virtual():
        return work()
    return await anyio.to_thread.run_sync(work, limiter=limiter, abandon_on_cancel=True)


def _time_is_virtual() -> bool:
    testing = sys.modules.get("trio.testing")
    if testing is None:
        return False
    from trio.lowlevel import current_clock

    try:
        return isinstance(current_clock(), testing.MockClock)
    except RuntimeError:  # not a trio loop
        return False
