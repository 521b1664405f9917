"""How blocking callers reach the async core: one event loop in one daemon thread, and the way there and back.

What lives here: the thread and its loop; calls and iterators carried into it; what becomes of them on Ctrl-C, after a
fork, when a client is forgotten and at interpreter exit. What must never live here: anything that knows ConceptViz,
whose names are in `_sync`. The reasons are told in `docs/design/sync-facade.md`.
"""

import atexit
import logging
import os
import queue
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import suppress
from contextvars import Context, copy_context
from functools import partial
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import anyio
import anyio.abc

C = TypeVar("C")
T = TypeVar("T")

_logger = logging.getLogger("conceptviz")

_GRACE = 1.0  # seconds an interrupted caller waits for its cancelled work: whoever pressed Ctrl-C wants to be gone
_EXIT_GRACE = 0.5  # seconds all cancelled work together may hold up interpreter exit
_TICK = 0.5 if os.name == "nt" else None  # seconds; on Windows Ctrl-C does not end an untimed wait on a lock


_Outcome: TypeAlias = "queue.SimpleQueue[tuple[Any, BaseException | None]]"


class _Call(Generic[T]):
    """One blocking call: a caller waits on it, the loop thread settles it."""

    def __init__(self) -> None:
        self.scope: anyio.CancelScope | None = None  # set in the loop thread, before the work starts
        self._outcome: _Outcome = queue.SimpleQueue()
        self._awaited = self._outcome  # by the caller, who may not wait yet when the outcome is turned away

    async def settle(self, work: Callable[[], Awaitable[T]]) -> None:
        """Do the work and hand over whatever comes of it; only the cancellation of this very call goes further."""
        try:
            self.finish(await work())
        except anyio.get_cancelled_exc_class() as exc:
            if self.scope is not None and self.scope.cancel_called:
                self.fail(StopAsyncIteration())  # who still waits is drawing on an iterator: it has ended
                raise
            error = RuntimeError("The work was cancelled within the event loop, not by its caller")
            error.__cause__ = exc
            self.fail(error)
        except BaseException as exc:  # noqa: BLE001 - SystemExit too is the caller's: let out, it ends the loop for all
            self.fail(exc)

    def finish(self, value: T) -> None:
        """Let the caller return `value`."""
        self._outcome.put((value, None))

    def fail(self, error: BaseException) -> None:
        """Let the caller raise `error`."""
        self._outcome.put((None, error))

    def cancel(self) -> None:
        """Cancel the work; in the loop thread."""
        if self.scope is not None:
            self.scope.cancel()

    def wait(self) -> tuple[Any, BaseException | None]:
        """Wait for the outcome, open to Ctrl-C."""
        while True:
            with suppress(queue.Empty):
                return self._awaited.get(timeout=_TICK)

    def wait_briefly(self) -> T | None:
        """Give cancelled work a moment to end, and return its value if it had been done after all."""
        value: T | None = None
        with suppress(queue.Empty):
            value = self._awaited.get(timeout=_GRACE)[0]
        return value

    def take_over(self) -> _Outcome:
        """Turn the outcome away from the caller, who then waits for good, towards whoever asks."""
        self._outcome = queue.SimpleQueue()
        return self._outcome


class _LoopThread:
    """One event loop in a daemon thread, shared by all blocking clients of a process.

    A daemon, because a thread that is joined at exit would hang every script that does not close its client.
    """

    lock: ClassVar["threading.RLock"] = threading.RLock()
    _shared: ClassVar["_LoopThread | None"] = None
    _left_behind: ClassVar["list[_LoopThread]"] = []

    def __init__(self) -> None:
        self.alive = True
        self._posted: deque[tuple[Context, Callable[[], object]]] = deque()
        self._ear, self._mouth = socket.socketpair()
        self._ear.setblocking(False)
        self._mouth.setblocking(False)
        self._tasks: anyio.abc.TaskGroup
        self._calls: set[_Call[Any]] = set()
        # Clients until they have been closed. The running frames of the thread refer to this object, and nobody unwinds
        # them at interpreter exit: so no connection is collected then, with warnings that nobody can act upon.
        self.clients: set[object] = set()
        self._killer: BaseException | None = None
        # An empty context: the loop must not live on in that of whoever happened to call first.
        self._thread = threading.Thread(target=Context().run, args=(self._work,), name="conceptviz-loop", daemon=True)
        self._thread.start()

    @classmethod
    def shared(cls) -> "_LoopThread":
        """Return the loop thread of this process, started by the first call."""
        loop = cls._shared
        if loop is None or not loop.alive:
            with cls.lock:
                loop = cls._shared
                if loop is None or not loop.alive:
                    loop = cls._shared = _LoopThread()
        return loop

    @classmethod
    def leave_behind(cls) -> None:
        """In a forked child: keep the parent's loop, whose thread does not exist here, and never touch it.

        Its epoll instance is shared with the parent. To close what is registered there, or to have it collected, would
        take the registration from the parent too, whose loop would then wait for good.
        """
        cls.lock = threading.RLock()  # another thread of the parent may hold the old one, for ever
        if cls._shared is not None:
            cls._shared.alive = False
            cls._left_behind.append(cls._shared)
            cls._shared = None

    @classmethod
    def settle_down(cls) -> None:
        """At interpreter exit: cancel what daemon threads still wait for, so that the core logs the task ids.

        Those threads are not woken: they could do nothing but print a traceback. The loop goes on, for exit handlers
        that run later and close their client.
        """
        if cls._shared is None:
            return
        deadline = time.monotonic() + _EXIT_GRACE
        endings = []
        for call in list(cls._shared._calls):
            endings.append(call.take_over())
            cls._shared.post(call.cancel)
        for ending in endings:
            with suppress(queue.Empty):
                ending.get(timeout=max(0.0, deadline - time.monotonic()))

    def post(self, act: Callable[[], object]) -> None:
        """Have the loop thread call `act` soon, in a copy of the caller's context.

        It neither waits nor takes a lock, so a finalizer may post from whatever thread the collector runs in.
        """
        self._posted.append((copy_context(), act))
        if self.alive:
            with suppress(OSError):  # full: a wake-up is on its way; closed: the loop has just ended
                self._mouth.send(b"\0")

    def carry(self, call: _Call[T], begin: Callable[[], object], lost: Callable[[T], object] | None = None) -> T:
        """Post `begin`, which sets the call going, and wait until it is settled.

        On Ctrl-C, or whatever else is raised in the waiting thread, the work is cancelled and given a second to end;
        `lost` is told what it returned if it was done by then.

        Raises:
            RuntimeError: The caller is the loop thread itself, or the loop has ended.
        """
        self.refuse_inside()
        try:
            self._calls.add(call)
            self.post(begin)
            if not self.alive:  # asked after the post: whoever ends the loop looks at `_calls` after clearing `alive`
                call.fail(self._ended())
            value, error = call.wait()
        except BaseException:  # raised in this thread: an error of the work is part of the outcome
            self.post(call.cancel)
            done = call.wait_briefly()
            if done is not None and lost is not None:
                lost(done)
            raise
        finally:
            self._calls.discard(call)
        if error is not None:
            try:
                raise error
            finally:
                del error, call, begin  # else traceback and frame keep each other alive, and the client with them
        result: T = value
        return result

    def refuse_inside(self) -> None:
        """Raise RuntimeError in the loop thread, which would wait for itself."""
        if self.alive and threading.get_ident() == self._thread.ident:
            raise RuntimeError(
                "A blocking call made within the client's event loop, as by an on_event hook, would wait for itself: "
                "make it from another thread, or use AsyncConceptViz"
            )

    def start(self, call: _Call[T], work: Callable[[], Awaitable[T]]) -> None:
        """Set a call going in a task of its own; in the loop thread."""
        call.scope = anyio.CancelScope()
        self._tasks.start_soon(self._serve, call.scope, call, work)

    def release(self, client: C, close: Callable[[C], Awaitable[None]]) -> None:
        """Close a client and let go of it, without waiting; in a forked child, do neither."""
        if self.alive:
            call: _Call[None] = _Call()
            self.post(partial(self.start, call, partial(self.see_off, client, close)))

    async def see_off(self, client: C, close: Callable[[C], Awaitable[None]]) -> None:
        """Close a client and let go of it; in the loop thread."""
        try:
            await close(client)
        finally:
            self.clients.discard(client)

    @staticmethod
    async def _serve(scope: anyio.CancelScope, call: _Call[T], work: Callable[[], Awaitable[T]]) -> None:
        with scope:
            await call.settle(work)

    def _work(self) -> None:
        try:
            anyio.run(self._listen, backend="asyncio")
        except BaseException as exc:  # whatever it was, callers are waiting and must hear of it
            self._killer = exc
            _logger.exception("The event loop of the blocking clients has ended; the next call starts a new one")
        for call in list(self._calls):
            call.fail(self._ended())
        self._ear.close()
        self._mouth.close()

    async def _listen(self) -> None:
        own = copy_context()
        async with anyio.create_task_group() as self._tasks:
            try:
                while True:
                    await anyio.wait_readable(self._ear)
                    with suppress(BlockingIOError):
                        self._ear.recv(4096)
                    while self._posted:
                        context, act = self._posted.popleft()
                        for var, value in own.items():  # what anyio keeps there names this loop, not the caller's
                            context.run(var.set, value)
                        context.run(act)
            finally:
                self.alive = False  # at once: whoever calls from now on starts another loop

    def _ended(self) -> RuntimeError:
        error = RuntimeError("The event loop this call belongs to has ended, or was left in the parent by a fork")
        error.__cause__ = self._killer
        return error


class Blocking(Generic[C]):
    """An async client for blocking callers: made again in a forked child, closed when it is forgotten.

    Args:
        make: Makes the async client, without I/O and outside any loop. What it raises at first, this constructor
            raises.
        close: Closes such a client. Whatever is asked of it afterwards, it refuses.
        lost: Told what a call returned when its caller was interrupted and will never see it.
        fork_safe: Whether `make` makes an independent client again once the first one has been used.
    """

    def __init__(
        self,
        make: Callable[[], C],
        close: Callable[[C], Awaitable[None]],
        *,
        lost: Callable[[object], object] | None = None,
        fork_safe: bool = True,
    ) -> None:
        self._make = make
        self._close = close
        self._lost = lost
        self._fork_safe = fork_safe
        self._client = make()
        self._loop: _LoopThread | None = None  # that the client has been used in
        self._forget: weakref.finalize[..., Any] | None = None
        self._closed = False

    @property
    def client(self) -> C:
        """The async client, for what needs no loop."""
        return self._client

    def run(self, work: Callable[[C], Awaitable[T]]) -> T:
        """Await `work(client)` in the loop thread, in a copy of the caller's context, and return its value.

        Raises:
            RuntimeError: This is the loop thread; or the client's transport cannot be used after a fork.
            BaseException: Whatever the work raises, unchanged.
        """
        loop, client = self.bind()
        call: _Call[T] = _Call()
        try:
            return loop.carry(call, partial(loop.start, call, partial(work, client)), self._lost)
        except RuntimeError as exc:
            # No coroutine can raise StopIteration: Python wraps it. A hook that raised it means it, as it would in any
            # blocking code.
            if isinstance(exc.__cause__, StopIteration) and exc.args == ("coroutine raised StopIteration",):
                raise exc.__cause__ from None
            raise

    def iterate(self, source: Callable[[C], AsyncIterator[T]]) -> Iterator[T]:
        """Carry the async iterator `source(client)`: made by the first step, one step at a time, closed when left."""
        return _Carried(self, source)

    def close(self) -> None:
        """Close the client; again, or in a child forked after its first use, this does nothing."""
        if self._closed:
            return
        if self._loop is None or self._loop.alive:
            loop, client = self.bind()
            loop.refuse_inside()
            self._closed = True
            if self._forget is not None:
                self._forget.detach()
            call: _Call[None] = _Call()
            loop.carry(call, partial(loop.start, call, partial(loop.see_off, client, self._close)))
        self._closed = True

    def bind(self) -> tuple[_LoopThread, C]:
        """Return the loop of this process and the client that lives in it."""
        loop = _LoopThread.shared()
        if self._loop is not loop and not self._closed:
            with _LoopThread.lock:
                if self._loop is not loop:
                    self._move_to(loop)
        return loop, self._client

    def _move_to(self, loop: _LoopThread) -> None:
        if self._forget is not None:
            # The old client stays with the old loop, kept and untouched: its sockets are the parent's too.
            if not self._fork_safe:
                raise RuntimeError(
                    "This client was used before the fork, with a transport of your own: its connections belong to the "
                    "parent process. Make a new client, with a new transport, in the child"
                )
            self._client = self._make()
            self._forget.detach()
        loop.clients.add(self._client)
        self._forget = weakref.finalize(self, loop.release, self._client, self._close)
        self._forget.atexit = False
        self._loop = loop  # last: a thread that sees it takes the client without the lock


class _Carried(Iterator[T]):
    """The near end of an async iterator that runs in the loop thread."""

    def __init__(self, blocking: Blocking[C], source: Callable[[C], AsyncIterator[T]]) -> None:
        self._source: Callable[[Any], AsyncIterator[T]] = source
        self._blocking = blocking  # held, so that the client is not closed as forgotten
        self._turn = threading.Lock()
        self._far: _FarEnd[T] | None = None
        self._ended = False

    def __next__(self) -> T:
        with self._turn:
            if self._ended:
                raise StopIteration
            if self._far is None:
                loop, client = self._blocking.bind()
                self._far = _FarEnd(loop, partial(self._source, client))
                weakref.finalize(self, loop.post, self._far.leave).atexit = False
            call: _Call[T] = _Call()
            try:
                return self._far.loop.carry(call, partial(self._far.draw, call))
            except BaseException as exc:
                self._ended = True
                self._far.loop.post(self._far.leave)
                if isinstance(exc, StopAsyncIteration):
                    raise StopIteration from None
                raise

    def close(self) -> None:
        """End the iteration, wait until the async iterator has been closed, and raise what its closing raised."""
        with self._turn:
            ended, self._ended = self._ended, True
            if self._far is not None and not ended:
                self._far.loop.carry(self._far.ended, self._far.leave)


class _FarEnd(Generic[T]):
    """The far end of a carried iterator: one task for the whole iteration, as under `async for`.

    One, because a cancel scope or a task group that is open across a `yield` belongs to the task that opened it.
    """

    def __init__(self, loop: _LoopThread, source: Callable[[], AsyncIterator[T]]) -> None:
        self.loop = loop
        self.ended: _Call[None] = _Call()
        self._source = source
        self._items: AsyncIterator[T] | None = None
        self._asked: anyio.Event
        self._call: _Call[T] | None = None

    def draw(self, call: _Call[T]) -> None:
        """Let the task draw one item for `call`; in the loop thread."""
        if self.ended.scope is None:
            self._asked = anyio.Event()
            self.loop.start(self.ended, self._work)
        call.scope = self.ended.scope  # to cancel one step is to end the iteration
        self._call = call
        self._asked.set()

    def leave(self) -> None:
        """Let the task, if it was ever begun, close the iterator and end; in the loop thread."""
        if self.ended.scope is None:
            self.ended.finish(None)
        else:
            self._call = None
            self._asked.set()

    async def _work(self) -> None:
        try:
            while True:
                await self._asked.wait()
                self._asked = anyio.Event()
                if self._call is None:
                    return
                await self._call.settle(self._step)
        finally:
            aclose = getattr(self._items, "aclose", None)
            if aclose is not None:
                await aclose()

    async def _step(self) -> T:
        if self._items is None:
            self._items = aiter(self._source())
        return await anext(self._items)


atexit.register(_LoopThread.settle_down)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_LoopThread.leave_behind)
