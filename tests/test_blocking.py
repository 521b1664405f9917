"""The way into the loop thread and back, shown on toy clients; `test_sync` shows it on the real one."""

import contextvars
import gc
import logging
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import pytest

from conceptviz import _blocking
from conceptviz._blocking import Blocking

pytestmark = pytest.mark.timeout(20)  # what is wrong here hangs

variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")


class Toy:
    """An async client of nothing."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.closed = threading.Event()

    async def echo(self, value: object) -> object:
        await anyio.lowlevel.checkpoint()
        return value

    async def fail(self, error: BaseException) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    async def thread(self) -> str:
        return threading.current_thread().name

    async def aclose(self) -> None:
        self.closed.set()


@pytest.fixture(autouse=True)
def _sigint() -> Iterator[None]:
    """Have Ctrl-C raise: a suite that a shell started in the background inherits it as ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def blocking(lost: Callable[[object], object] | None = None) -> Blocking[Toy]:
    return Blocking(Toy, Toy.aclose, lost=lost)


def interrupt() -> None:
    """Press Ctrl-C."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def test_a_call_returns_the_value_and_its_clients_share_one_thread() -> None:
    one, other = blocking(), blocking()
    assert one.run(lambda toy: toy.echo(None)) is None
    assert one.run(lambda toy: toy.echo(3)) == 3
    assert one.run(Toy.thread) == other.run(Toy.thread) == "conceptviz-loop"
    assert [thread.name for thread in threading.enumerate()].count("conceptviz-loop") == 1


def test_what_make_raises_is_raised_by_the_constructor() -> None:
    def make() -> Toy:
        raise ValueError("no key")

    with pytest.raises(ValueError, match="no key"):
        Blocking(make, Toy.aclose)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        SystemExit(3),
        KeyboardInterrupt(),
        GeneratorExit(),
        StopIteration(5),
        StopAsyncIteration(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_the_caller_unchanged_and_leave_the_loop_running(error: BaseException) -> None:
    client = blocking()
    with pytest.raises(type(error)) as caught:
        client.run(lambda toy: toy.fail(error))
    assert caught.value is error
    if not isinstance(error, StopIteration):  # Python replaces that one, and its traceback, inside a coroutine
        assert "raise error" in "".join(traceback.format_tb(error.__traceback__))
    assert client.run(lambda toy: toy.echo("still there")) == "still there"
    assert Toy.made


def test_an_error_of_its_own_about_a_stop_iteration_stays_what_it_is() -> None:
    async def chained(_: Toy) -> None:
        raise RuntimeError("mine") from StopIteration()

    with pytest.raises(RuntimeError, match="mine"):
        blocking().run(chained)


def test_an_error_keeps_nothing_alive_once_it_is_dropped() -> None:
    class Big:
        pass

    def fail_once() -> "weakref.ref[Big]":
        big = Big()

        async def work(_: Toy) -> None:
            raise ValueError(big)

        with pytest.raises(ValueError):  # noqa: PT011 - any
            client.run(work)
        return weakref.ref(big)

    client = blocking()
    gc.disable()
    try:
        ref = fail_once()
        client.run(lambda toy: toy.echo(None))  # until the loop thread has let go of its task
        client.run(lambda toy: toy.echo(None))
        assert ref() is None
    finally:
        gc.enable()


def test_the_work_sees_the_callers_context_and_cannot_change_it() -> None:
    async def work(_: Toy) -> str:
        seen = variable.get()
        variable.set("changed")
        return seen

    client = blocking()
    token = variable.set("the caller's")
    try:
        assert client.run(work) == "the caller's"
        assert variable.get() == "the caller's"
    finally:
        variable.reset(token)
    assert client.run(work) == "unset"


@pytest.mark.anyio
async def test_it_works_inside_a_running_loop_of_either_kind() -> None:
    """The loop thread is asyncio's whatever the caller's loop is, and says so to anyio."""

    async def work(_: Toy) -> str:
        await anyio.lowlevel.checkpoint()
        return await anyio.to_thread.run_sync(lambda: "worked")

    client = blocking()
    assert client.run(work) == "worked"
    client.close()


def test_many_threads_at_once_are_served_side_by_side() -> None:
    """Eight calls that wait for each other end only if all eight are under way together."""
    client = blocking()
    arrived: list[int] = []
    complete: list[anyio.Event] = []

    async def meet(_: Toy) -> int:
        arrived.append(1)
        if not complete:
            complete.append(anyio.Event())
        if len(arrived) == 8:
            complete[0].set()
        with anyio.fail_after(10):
            await complete[0].wait()
        return len(arrived)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda _: client.run(meet), range(8))) == [8] * 8


def test_a_call_from_the_loop_thread_is_refused() -> None:
    client = blocking()

    async def call_back(_: Toy) -> None:
        client.run(lambda toy: toy.echo(1))

    async def close(_: Toy) -> None:
        client.close()

    with pytest.raises(RuntimeError, match="would wait for itself"):
        client.run(call_back)
    with pytest.raises(RuntimeError, match="would wait for itself"):
        client.run(close)
    assert client.run(lambda toy: toy.echo(2)) == 2
    client.close()
    assert client.client.closed.is_set()


def test_work_cancelled_from_within_is_an_error_not_a_hang() -> None:
    async def cancelled(_: Toy) -> None:
        raise anyio.get_cancelled_exc_class()

    with pytest.raises(RuntimeError, match="cancelled within the event loop"):
        blocking().run(cancelled)


posix = pytest.mark.skipif(os.name == "nt", reason="sends SIGINT to a thread")


@posix
def test_ctrl_c_cancels_the_work_and_waits_for_its_end() -> None:
    ended: list[str] = []

    async def work(_: Toy) -> None:
        try:
            interrupt()
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            ended.append("in order")

    client = blocking()
    with pytest.raises(KeyboardInterrupt):
        client.run(work)
    assert ended == ["in order"]
    assert client.run(lambda toy: toy.echo(1)) == 1


@posix
def test_ctrl_c_does_not_wait_for_work_that_will_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocking, "_GRACE", 0.05)
    release = threading.Event()

    async def stubborn(_: Toy) -> None:
        interrupt()
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(release.wait)

    client = blocking()
    with pytest.raises(KeyboardInterrupt):
        client.run(stubborn)
    assert not release.is_set()
    release.set()
    assert client.run(lambda toy: toy.echo(1)) == 1


@posix
def test_what_was_done_when_ctrl_c_came_is_not_lost_in_silence() -> None:
    async def accepted(_: Toy) -> str:
        with anyio.CancelScope(shield=True):
            interrupt()
            await anyio.sleep(0.05)
        return "paid"

    lost: list[object] = []
    with pytest.raises(KeyboardInterrupt):
        blocking(lost.append).run(accepted)
    assert lost == ["paid"]


def test_close_is_idempotent_and_a_forgotten_client_is_closed_too() -> None:
    client = blocking()
    client.run(lambda toy: toy.echo(1))
    toy = client.client
    client.close()
    assert toy.closed.is_set()
    toy.closed.clear()
    client.close()
    assert not toy.closed.is_set()

    client = blocking()
    client.run(lambda toy: toy.echo(1))
    forgotten = client.client.closed
    del client
    assert forgotten.wait(10)


def test_a_finalizer_in_the_loop_thread_does_not_wait_for_it() -> None:
    """The collector runs anywhere: also in the loop thread, where waiting would be for ever."""
    box = [blocking()]
    box[0].run(lambda toy: toy.echo(1))
    closed = box[0].client.closed

    async def forget(_: Toy) -> None:
        box.clear()

    blocking().run(forget)
    assert closed.wait(10)


def test_a_closed_client_is_not_made_again() -> None:
    """Refusing is the async client's part: here it gets the call, and no new client takes its place."""
    client = blocking()
    client.close()
    made = Toy.made
    assert client.run(lambda toy: toy.echo(toy.closed.is_set())) is True
    assert Toy.made == made


def test_when_the_loop_is_ended_from_inside_callers_hear_of_it_and_the_next_call_starts_another(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The loop of asyncio ends on a SystemExit in any task, also in one that the work started."""
    client = blocking()
    waiting = threading.Event()
    heard: list[BaseException] = []

    async def wait(_: Toy) -> None:
        waiting.set()
        await anyio.sleep_forever()

    def caller() -> None:
        try:
            client.run(wait)
        except BaseException as exc:  # noqa: BLE001 - kept for the assertion
            heard.append(exc)

    async def exit_in_a_task(_: Toy) -> None:
        async def leave() -> None:
            raise SystemExit(4)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)

    first = client.client
    thread = threading.Thread(target=caller)
    thread.start()
    assert waiting.wait(10)
    with caplog.at_level(logging.ERROR), pytest.raises(BaseException):  # noqa: B017, PT011 - which, is anyio's affair
        client.run(exit_in_a_task)
    thread.join(10)
    assert isinstance(heard[0], RuntimeError)
    deadline = time.monotonic() + 10
    while "event loop of the blocking clients has ended" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.001)
    assert client.run(lambda toy: toy.echo(1)) == 1
    assert client.client is not first


def test_a_call_that_the_loop_did_not_live_to_begin_is_an_error_not_a_hang(caplog: pytest.LogCaptureFixture) -> None:
    client, other = blocking(), blocking()
    other.run(lambda toy: toy.echo(1))

    def stand_still_until_it_calls() -> None:
        calls = other.bind()[0]._calls
        before = len(calls)
        late.start()
        while len(calls) == before:
            time.sleep(0.001)

    async def end_the_loop(_: Toy) -> None:
        async def leave() -> None:
            stand_still_until_it_calls()
            raise SystemExit

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leave)

    heard: list[BaseException] = []

    def call_late() -> None:
        try:
            other.run(lambda toy: toy.echo(2))
        except BaseException as exc:  # noqa: BLE001 - kept for the assertion
            heard.append(exc)

    late = threading.Thread(target=call_late)
    with caplog.at_level(logging.CRITICAL), pytest.raises(BaseException):  # noqa: B017, PT011 - as above
        client.run(end_the_loop)
    late.join(10)
    assert "has ended" in str(heard[0])


class Numbers:
    """An async iterator without `aclose`."""

    def __init__(self, *numbers: int) -> None:
        self._rest = iter(numbers)

    def __aiter__(self) -> "Numbers":
        return self

    async def __anext__(self) -> int:
        try:
            return next(self._rest)
        except StopIteration:
            raise StopAsyncIteration from None


class Counting:
    """A source that says what becomes of it, and holds a cancel scope open across its yields."""

    def __init__(self) -> None:
        self.drawn = 0
        self.closed = threading.Event()
        self.tasks: set[int] = set()

    async def __call__(self, toy: Toy) -> AsyncIterator[int]:
        try:
            with anyio.move_on_after(60):
                while True:
                    self.tasks.add(anyio.get_current_task().id)
                    self.drawn += 1
                    yield self.drawn
                    await anyio.lowlevel.checkpoint()
        finally:
            assert not toy.closed.is_set()
            self.tasks.add(anyio.get_current_task().id)
            self.closed.set()


@contextmanager
def drawing(source: Callable[[Toy], AsyncIterator[int]]) -> Iterator[Iterator[int]]:
    client = blocking()
    yield client.iterate(source)
    client.close()


def test_an_iterator_is_drawn_to_its_end_and_stays_ended() -> None:
    with drawing(lambda _: Numbers(1, 2, 3)) as numbers:
        assert list(numbers) == [1, 2, 3]
        assert list(numbers) == []


def test_a_step_draws_one_item_and_all_steps_run_in_one_task() -> None:
    source = Counting()
    with drawing(source) as numbers:
        assert source.drawn == 0
        assert next(numbers) == 1
        assert next(numbers) == 2
        assert source.drawn == 2
        numbers.close()  # type: ignore[attr-defined]  # a caller sees an Iterator; closing is for who knows
        assert source.closed.is_set()
        assert len(source.tasks) == 1
        numbers.close()  # type: ignore[attr-defined]
        assert list(numbers) == []


def test_leaving_a_loop_early_closes_the_iterator() -> None:
    source = Counting()
    client = blocking()
    for number in client.iterate(source):
        if number == 2:
            break
    assert source.closed.wait(10)
    assert source.drawn == 2
    assert len(source.tasks) == 1


def test_an_iterator_that_was_never_drawn_can_be_dropped_and_closed() -> None:
    with drawing(Counting()) as numbers:
        numbers.close()  # type: ignore[attr-defined]  # as above
        assert list(numbers) == []


def test_an_iterator_alone_keeps_its_client_open() -> None:
    source = Counting()
    numbers = blocking().iterate(source)
    assert next(numbers) == 1
    gc.collect()
    assert next(numbers) == 2  # the source asserts at its end that the toy is open
    del numbers
    assert source.closed.wait(10)


def test_an_error_in_a_step_reaches_the_caller_and_ends_the_iterator() -> None:
    async def source(_: Toy) -> AsyncIterator[int]:
        yield 1
        raise SystemExit(2)

    with drawing(source) as numbers:
        assert next(numbers) == 1
        with pytest.raises(SystemExit):
            next(numbers)
        assert list(numbers) == []


def test_a_source_that_cannot_be_made_is_an_error_of_the_first_step() -> None:
    def source(_: Toy) -> AsyncIterator[int]:
        raise ValueError("no such task")

    with drawing(source) as numbers:
        with pytest.raises(ValueError, match="no such task"):
            next(numbers)
        assert list(numbers) == []


def test_a_hooks_stop_iteration_does_not_pass_for_the_end() -> None:
    async def source(_: Toy) -> AsyncIterator[int]:
        yield 1
        raise StopIteration

    with drawing(source) as numbers, pytest.raises(RuntimeError, match="raised StopIteration"):
        list(numbers)


def test_an_error_of_the_closing_is_raised_by_close_and_harmless_otherwise() -> None:
    async def source(_: Toy) -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            raise ValueError("cannot close")

    client = blocking()
    numbers = client.iterate(source)
    next(numbers)
    with pytest.raises(ValueError, match="cannot close"):
        numbers.close()  # type: ignore[attr-defined]  # as above
    next(client.iterate(source))
    assert client.run(lambda toy: toy.echo(1)) == 1


def test_an_iterator_in_the_loop_thread_is_refused_and_harmless() -> None:
    client = blocking()

    async def draw(_: Toy) -> None:
        next(client.iterate(Counting()))

    with pytest.raises(RuntimeError, match="would wait for itself"):
        client.run(draw)
    assert client.run(lambda toy: toy.echo(1)) == 1


def test_two_threads_that_draw_on_one_iterator_take_turns() -> None:
    with drawing(lambda _: Numbers(*range(200))) as numbers, ThreadPoolExecutor(4) as pool:
        drawn = [number for part in pool.map(lambda _: list(numbers), range(4)) for number in part]
    assert sorted(drawn) == list(range(200))


@posix
def test_ctrl_c_in_a_step_ends_the_iterator() -> None:
    closed = threading.Event()

    async def source(_: Toy) -> AsyncIterator[int]:
        try:
            yield 1
            interrupt()
            await anyio.sleep_forever()
        finally:
            closed.set()

    with drawing(source) as numbers:
        assert next(numbers) == 1
        with pytest.raises(KeyboardInterrupt):
            next(numbers)
        assert closed.is_set()
        assert list(numbers) == []


def test_an_outcome_that_was_turned_away_does_not_reach_a_caller_who_comes_to_wait_later() -> None:
    """At exit: all that a daemon thread could do with it is to print a traceback."""
    call, heard = _blocking._Call[str](), list[object]()
    ending = call.take_over()
    late = threading.Thread(target=lambda: heard.append(call.wait()), daemon=True)
    late.start()
    call.finish("done")
    assert ending.get(timeout=5) == ("done", None)
    late.join(0.05)
    assert heard == []
    call._awaited.put(("the test is over", None))
    late.join(5)
    assert heard == [("the test is over", None)]
