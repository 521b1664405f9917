"""A submit that is cancelled: the id of what was paid for is durable, or the record says truly what is known.

Cancelled in every way there is (an anyio scope, `asyncio.wait_for`, `Task.cancel` once and twice, Ctrl-C in
`faults.interrupts`) and at every instant: at each step of the program, and at each record of the journal. The oracle is
the ledger of the raw server in `faults`.
"""

import asyncio
import builtins
import gc
import inspect
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio
import trio.testing
from faults.server import Server
from faults.steps import End, Script, Step, refuse
from helpers import KEY, QUICK, QUICK_POLLING, assert_no_key_logged

from conceptviz import (
    AsyncConceptViz,
    AttemptState,
    Budget,
    Event,
    Journal,
    JournalEntry,
    Retries,
    Retrying,
    SubmissionUnknownError,
    _detached,
)
from conceptviz._detached import Stake, to_the_end

ACCEPTED, REJECTED = AttemptState.ACCEPTED, AttemptState.REJECTED
NOT_SENT, UNKNOWN = AttemptState.NOT_SENT, AttemptState.UNKNOWN

# Python 3.10 has it from a package that trio needs there.
Group: Any = getattr(builtins, "BaseExceptionGroup", None) or import_module("exceptiongroup").BaseExceptionGroup

BACKENDS = pytest.mark.parametrize("backend", ["asyncio", "trio"])


# asyncio's layer under httpx drops a socket when it is cancelled in the very step in which the connection is made.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    gc.collect()
    assert_no_key_logged(caplog)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def at(server: Server, journal: Journal | None, **options: Any) -> AsyncConceptViz:
    settings: dict[str, Any] = {"timeout": 2.0, "retries": QUICK, "polling": QUICK_POLLING, **options}
    return AsyncConceptViz(KEY, base_url=server.base_url, journal=journal, **settings)


async def arrival(server: Server) -> None:
    """Wait until a submit has arrived at the server."""
    while not server.ledger.posts:  # noqa: ASYNC110 - it is in another thread
        await anyio.sleep(0.002)


async def interrupt_on_arrival(server: Server, scope: anyio.CancelScope) -> None:
    await arrival(server)
    scope.cancel()
    server.tell()


async def interrupt_on_connection(server: Server, scope: anyio.CancelScope) -> None:
    while not server.ledger.connections:  # noqa: ASYNC110 - it is in another thread
        await anyio.sleep(0.002)
    scope.cancel()


class Interrupter:
    """Ends the work it is given at an instant that it is told of, in one of the ways there are."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.called = False
        self._scope = anyio.CancelScope()
        self._task: asyncio.Task[Any] | None = None

    async def watch(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do the work; return what it returned, or None if it was interrupted."""
        if self.way == "scope":
            with self._scope:
                return await work()
            return None
        self._task = asyncio.ensure_future(work())
        try:
            return await self._task
        except asyncio.CancelledError:
            return None

    def now(self) -> None:
        """Interrupt, in the event loop's thread."""
        if self.called:
            return
        self.called = True
        if self._task is None:
            self._scope.cancel()
            return
        self._task.cancel()
        if self.way == "twice":
            asyncio.get_running_loop().call_soon(self._task.cancel)
            asyncio.get_running_loop().call_later(0.003, self._task.cancel)


class Counted(Coroutine[Any, Any, Any]):
    """A coroutine whose steps are counted; for asyncio, which has no instruments."""

    def __init__(self, inner: Any, step: Callable[[], None]) -> None:
        self._inner = inner
        self._step = step

    def send(self, value: Any) -> Any:
        self._step()
        return self._inner.send(value)

    def throw(self, *args: Any) -> Any:
        self._step()
        return self._inner.throw(*args)

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Steps(trio.abc.Instrument):
    """Interrupts at the beginning of the nth step that any task makes, once it was armed."""

    def __init__(self, interrupter: Interrupter, at: int) -> None:
        self._interrupter = interrupter
        self._left = at
        self.armed = False

    def count(self) -> None:
        if self.armed:
            self._left -= 1
            if self._left < 0:
                self._interrupter.now()

    def before_task_step(self, task: Any) -> None:
        self.count()

    def install(self) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            trio.lowlevel.add_instrument(self)
        else:

            def make(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
                return asyncio.Task(Counted(coro, self.count), loop=loop, **options)

            loop.set_task_factory(make)
        self.armed = True

    def remove(self) -> None:
        self.armed = False
        try:
            asyncio.get_running_loop().set_task_factory(None)
        except RuntimeError:
            trio.lowlevel.remove_instrument(self)


def check(server: Server, prompt: str, entries: list[JournalEntry], budget: Budget, spent: int, returned: Any) -> None:
    """What holds whenever a submit of two credits was interrupted, if the server answers in time."""
    posts = [post for post in server.ledger.posts if post.prompts == (prompt,)]
    charged = [post for post in posts if post.task_id is not None]
    assert len(posts) == len(charged) <= 1
    assert len(entries) <= 1
    if charged:
        assert [(entry.state, entry.task_id) for entry in entries] == [(ACCEPTED, charged[0].task_id)]
    else:
        assert [entry.state for entry in entries] in ([], [NOT_SENT])
        assert returned is None
    assert (budget.reserved, budget.spent - spent) == (0, 2 * len(charged))


@pytest.mark.parametrize(
    ("backend", "way"), [("asyncio", "scope"), ("asyncio", "cancel"), ("asyncio", "twice"), ("trio", "scope")]
)
def test_cancelled_at_each_step(backend: str, way: str, path: Path) -> None:
    """M73, M74: at every step that any task makes, from before the first to after the last."""

    async def main() -> None:
        budget = Budget(10_000)
        charged = interrupted = 0
        async with at(server, journal, budget=budget) as cv:
            for n in range(1000):
                interrupter = Interrupter(way)
                steps = Steps(interrupter, n)
                spent = budget.spent

                async def work(steps: Steps = steps, n: int = n) -> Any:
                    steps.install()
                    try:
                        return await cv.submit(f"{n}", key=f"{n}")
                    finally:
                        steps.remove()

                with anyio.fail_after(5):
                    task = await interrupter.watch(work)
                check(server, f"{n}", journal.entries(key=f"{n}"), budget, spent, task)
                interrupted += task is None
                charged += budget.spent > spent
                if not interrupter.called:
                    break
            # The client is as good as new.
            assert (await cv.submit("last")).id
        assert 10 < interrupted < 500
        # Both sides of the line were met: what had not begun did not, and what had was not lost.
        assert 5 < charged < interrupted

    with Server() as server, Journal(path) as journal:
        anyio.run(main, backend=backend)


class Telling(Journal):
    """A journal that tells when a record is about to be written, and when it is committed, from the worker thread."""

    tell: Callable[[str], object] = staticmethod(lambda point: None)

    def _told(self, name: str, *arguments: Any, **options: Any) -> Any:
        self.tell(f"before {name}")
        given = getattr(super(), name)(*arguments, **options)
        self.tell(f"after {name}")
        return given

    def claim(self, **options: Any) -> Any:
        return self._told("claim", **options)

    def sending(self, attempt: str) -> None:
        self._told("sending", attempt)

    def accepted(self, attempt: str, submission: Any) -> None:
        self._told("accepted", attempt, submission)


@pytest.mark.parametrize("point", [f"{w} {n}" for n in ("claim", "sending", "accepted") for w in ("before", "after")])
@pytest.mark.parametrize(
    ("backend", "way"), [("asyncio", "scope"), ("asyncio", "cancel"), ("asyncio", "twice"), ("trio", "scope")]
)
def test_cancelled_while_a_record_is_written(point: str, backend: str, way: str, path: Path) -> None:
    """The worker thread cannot be cancelled, and what it writes is not forgotten."""

    async def main() -> None:
        budget = Budget(4)
        interrupter = Interrupter(way)

        def tell(here: str) -> None:
            if here == point:
                anyio.from_thread.run_sync(interrupter.now)
                time.sleep(0.01)  # for the cancellation to arrive first

        journal.tell = tell
        async with at(server, journal, budget=budget) as cv:
            with anyio.fail_after(5):
                task = await interrupter.watch(lambda: cv.submit("a", key="k"))
            assert task is None
            check(server, "a", journal.entries(), budget, 0, None)
            assert len(server.ledger.posts) == (not point.endswith("claim"))
            # The key is free, or its task is taken up.
            assert (await cv.submit("a", key="k")).id == journal.entries(ACCEPTED)[0].task_id
        assert len(server.ledger.posts) == 1

    with Server() as server, Telling(path) as journal:
        anyio.run(main, backend=backend)


@BACKENDS
def test_cancelled_before_it_begins(backend: str, path: Path) -> None:
    """Nothing is begun for a caller who has gone: no connection, no record."""

    async def main() -> None:
        async with at(server, journal, budget=2) as cv:
            for journaled in (cv, plain):
                with anyio.CancelScope() as scope:
                    scope.cancel()
                    await journaled.submit("a", key="k")
                assert scope.cancelled_caught
        await plain.aclose()
        assert journal.entries() == []

    with Server() as server, Journal(path) as journal:
        plain = at(server, None)
        anyio.run(main, backend=backend)
    assert server.ledger.connections == 0


def test_wait_for_and_timeout(path: Path) -> None:
    """M74: what `asyncio.wait_for` abandons is finished within its grace, and durable when TimeoutError is raised."""

    async def main() -> None:
        async with at(server, journal) as cv:
            task = asyncio.ensure_future(cv.submit("a", key="k"))
            await arrival(server)
            asyncio.get_running_loop().call_later(0.05, server.tell)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task, 0.01)
            [entry] = journal.entries()
            assert (entry.state, entry.task_id) == (ACCEPTED, server.ledger.posts[0].task_id)
            assert (await cv.submit("a", key="k")).id == entry.task_id

    with Server(Script(posts=(Step(until_told=True),))) as server, Journal(path) as journal:
        asyncio.run(main())
    assert len(server.ledger.posts) == 1


@BACKENDS
@pytest.mark.parametrize("refused", [True, False], ids=["refused", "unsent"])
def test_cancelled_in_the_pause_before_another_attempt(backend: str, refused: bool, path: Path) -> None:
    """It stops at once, gives the credits back and frees the key."""
    events: list[Event] = []

    async def main() -> None:
        budget = Budget(2)
        retries = Retries(base_delay=30.0, max_delay=30.0)
        scope = anyio.CancelScope()

        def hook(event: Event) -> None:
            events.append(event)
            if isinstance(event, Retrying):
                scope.cancel()

        async with at(server, journal, budget=budget, retries=retries, on_event=hook) as cv:
            with anyio.fail_after(5), scope:
                await cv.submit("a", key="k")
            assert scope.cancelled_caught
            [entry] = journal.entries()
            assert entry.state is (REJECTED if refused else NOT_SENT)
            assert (budget.reserved, budget.spent) == (0, 0)
            if refused:
                assert (await cv.submit("a", key="k")).id

    script = Script(posts=(refuse(429, "MODERATION_RATE_LIMITED"),))
    with Server(script, listen_after=0.0 if refused else None) as server, Journal(path) as journal:
        anyio.run(main, backend=backend)
    assert len(server.ledger.posts) == 2 * refused


@BACKENDS
def test_a_refusal_that_comes_after_the_cancellation_is_not_followed_by_another_attempt(
    backend: str, path: Path
) -> None:
    async def main() -> None:
        async with at(server, journal, budget=2) as cv, anyio.create_task_group() as group:
            with anyio.CancelScope() as scope:
                group.start_soon(interrupt_on_arrival, server, scope)
                await cv.submit("a", key="k")
            assert scope.cancelled_caught
            assert [entry.state for entry in journal.entries()] == [REJECTED]

    late = Step(charge=False, until_told=True, answer=refuse(429, "MODERATION_RATE_LIMITED").answer)
    with Server(Script(posts=(late,))) as server, Journal(path) as journal:
        anyio.run(main, backend=backend)
    assert len(server.ledger.posts) == 1


@BACKENDS
def test_cancelled_while_it_connects(backend: str, path: Path) -> None:
    """M7: nothing is at stake before the first byte, so nobody is kept waiting for TLS that says nothing."""

    async def main() -> None:
        cv = AsyncConceptViz(
            KEY, base_url=server.base_url.replace("http:", "https:"), timeout=30.0, journal=journal, budget=2
        )
        async with cv:
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                with anyio.fail_after(10), scope:
                    group.start_soon(interrupt_on_connection, server, scope)
                    await cv.submit("a", key="k")
            assert scope.cancelled_caught
            [entry] = journal.entries()
            assert entry.state is NOT_SENT
            assert entry.error is not None
            assert entry.error.startswith("stopped (")

    silent = Script(connections=(Step(read=1, answer=None, end=End.SILENCE),))
    with Server(silent) as server, Journal(path) as journal:
        anyio.run(main, backend=backend)


@BACKENDS
@pytest.mark.parametrize("journaled", [True, False], ids=["journal", "no journal"])
def test_an_answer_that_does_not_come_within_the_grace(
    backend: str, journaled: bool, path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is unknown: in the journal, in the budget, and in the log, as nobody is there to catch an error."""
    monkeypatch.setattr(_detached, "GRACE", 0.1)

    async def main() -> None:
        budget = Budget(2)
        async with at(server, journal if journaled else None, budget=budget, timeout=30.0) as cv:
            scope = anyio.CancelScope()
            async with anyio.create_task_group() as group:
                with anyio.fail_after(10), scope:
                    group.start_soon(interrupt_on_arrival, server, scope)
                    await cv.submit("a", key="k")
            assert scope.cancelled_caught
            assert (budget.reserved, budget.spent) == (2, 0)
            if journaled:
                with pytest.raises(SubmissionUnknownError):
                    await cv.submit("a", key="k")

    lost = Script(posts=(Step(answer=None, end=End.SILENCE),))
    with Server(lost) as server, Journal(path) as journal:
        anyio.run(main, backend=backend)
        assert [entry.state for entry in journal.entries()] == [UNKNOWN] * journaled
        attempt = f" (attempt {journal.entries()[0].id} in the journal)." if journaled else "."
    assert len(server.ledger.posts) == 1
    assert "before its answer was read: it may have been charged" + attempt in caplog.text


@BACKENDS
def test_cancelled_in_the_hook(backend: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The id is durable by then, and the log tells of it."""

    async def hook(event: Event) -> None:
        scopes[0].cancel()
        await anyio.sleep_forever()

    scopes: list[anyio.CancelScope] = []

    async def main() -> None:
        async with at(server, journal, on_event=hook) as cv:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                await cv.submit("a", key="k")
            assert scope.cancelled_caught

    with Server() as server, Journal(path) as journal:
        anyio.run(main, backend=backend)
        [entry] = journal.entries()
    assert (entry.state, entry.task_id) == (ACCEPTED, server.ledger.posts[0].task_id)
    assert f"Interrupted after task {entry.task_id} was accepted" in caplog.text


@BACKENDS
def test_waiting_for_another_callers_submit_can_be_cancelled(backend: str, path: Path) -> None:
    async def main() -> None:
        async with at(server, journal) as first, at(server, journal) as second, anyio.create_task_group() as group:
            group.start_soon(lambda: first.submit("a", key="k"))
            await arrival(server)
            with anyio.fail_after(5), anyio.move_on_after(0.02) as scope:
                await second.submit("a", key="k")
            assert scope.cancelled_caught

    with Server(Script(posts=(Step(delay=0.2),))) as server, Journal(path) as journal:
        anyio.run(main, backend=backend)
        assert [entry.state for entry in journal.entries()] == [ACCEPTED]
    assert len(server.ledger.posts) == 1


class TestToTheEnd:
    """The task of its own, without a submit in it."""

    @BACKENDS
    def test_it_gives_what_the_work_gives(self, backend: str) -> None:
        async def work(stake: Stake) -> int:
            await anyio.lowlevel.checkpoint()
            return 7

        assert anyio.run(to_the_end, work, backend=backend) == 7

    @BACKENDS
    @pytest.mark.parametrize("error", [LookupError, SystemExit, KeyboardInterrupt, GeneratorExit])
    def test_it_raises_what_the_work_raises(self, backend: str, error: type[BaseException]) -> None:
        """Itself, and in no group."""

        async def work(stake: Stake) -> None:
            await anyio.lowlevel.checkpoint()
            raise error

        async def main() -> None:
            with pytest.raises(error):
                await to_the_end(work)

        anyio.run(main, backend=backend)

    def test_a_group_of_one_is_that_one(self) -> None:
        """As trio's Ctrl-C comes out of a task of the HTTP library's own."""

        async def fail() -> None:
            raise KeyboardInterrupt

        async def work(stake: Stake) -> None:
            async with anyio.create_task_group() as outer, anyio.create_task_group() as inner:
                outer.start_soon(anyio.sleep, 0)
                inner.start_soon(fail)

        async def main() -> None:
            with pytest.raises(KeyboardInterrupt):
                await to_the_end(work)

        anyio.run(main, backend="trio")

    @BACKENDS
    def test_work_that_holds_nothing_is_cancelled_at_once(self, backend: str) -> None:
        async def main() -> None:
            with anyio.fail_after(5), anyio.move_on_after(0.01) as scope:
                await to_the_end(lambda stake: anyio.sleep_forever())
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)

    @BACKENDS
    def test_work_that_holds_something_is_finished_first(self, backend: str) -> None:
        ended: list[bool] = []

        async def work(stake: Stake, scope: anyio.CancelScope) -> None:
            stake.is_held = True
            scope.cancel()
            await anyio.sleep(0.05)
            ended.append(stake.is_stopped)

        async def main() -> None:
            with anyio.CancelScope() as scope:
                await to_the_end(lambda stake: work(stake, scope))
            assert scope.cancelled_caught
            assert ended == [True]

        anyio.run(main, backend=backend)

    @BACKENDS
    def test_the_grace_has_an_end(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_detached, "GRACE", 0.05)
        ended: list[str] = []

        async def work(stake: Stake, scope: anyio.CancelScope) -> None:
            stake.is_held = True
            scope.cancel()
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("cancelled")

        async def main() -> None:
            with anyio.fail_after(5), anyio.CancelScope() as scope:
                await to_the_end(lambda stake: work(stake, scope))
            assert scope.cancelled_caught
            assert ended == ["cancelled"]

        anyio.run(main, backend=backend)

    @BACKENDS
    def test_an_interruption_comes_before_an_error(self, backend: str) -> None:
        async def work(stake: Stake, scope: anyio.CancelScope) -> None:
            stake.is_held = True
            scope.cancel()
            await anyio.sleep(0.05)
            raise LookupError

        async def main() -> None:
            with anyio.CancelScope() as scope:
                await to_the_end(lambda stake: work(stake, scope))
            assert scope.cancelled_caught

        anyio.run(main, backend=backend)

    @pytest.mark.parametrize("times", [1, 2, 5])
    def test_asyncios_own_cancellation_however_often(self, times: int) -> None:
        """The task is cancelled once for its callers, after the work has ended, and busy with nothing meanwhile."""
        ended: list[bool] = []
        steps = 0

        async def work(stake: Stake) -> None:
            nonlocal steps
            stake.is_held = True
            before = time.thread_time()
            await anyio.sleep(0.1)
            steps = int(1000 * (time.thread_time() - before))
            ended.append(True)

        async def main() -> None:
            task = asyncio.ensure_future(to_the_end(work))
            for _ in range(times):
                await asyncio.sleep(0.01)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended == [True]

        asyncio.run(main())
        assert steps < 80  # milliseconds of CPU: it does not spin

    @BACKENDS
    def test_a_cancelled_scope_does_not_spin(self, backend: str) -> None:
        async def work(stake: Stake, scope: anyio.CancelScope) -> float:
            stake.is_held = True
            scope.cancel()
            before = time.thread_time()
            await anyio.sleep(0.2)
            used.append(time.thread_time() - before)
            return 0.0

        used: list[float] = []

        async def main() -> None:
            with anyio.CancelScope() as scope:
                await to_the_end(lambda stake: work(stake, scope))

        anyio.run(main, backend=backend)
        assert used[0] < 0.15

    def test_every_task_of_the_loop_is_cancelled(self) -> None:
        """As `asyncio.run` does when it ends: the work itself is reached then, and ends."""
        ended: list[str] = []

        async def work(stake: Stake) -> None:
            stake.is_held = True
            try:
                await anyio.sleep_forever()
            finally:
                ended.append("cancelled")

        async def main() -> None:
            asyncio.ensure_future(to_the_end(work))  # noqa: RUF006 - abandoned: that is the test
            await asyncio.sleep(0.01)

        asyncio.run(main())
        assert ended == ["cancelled"]

    # What anyio wraps the work in is cancelled first, and the work itself never awaited.
    @pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.parametrize("who", ["the work", "who waits", "both"])
    def test_cancelled_before_the_work_has_begun(self, who: str) -> None:
        """A loop that ends at this moment does end; nobody waits for what never begins."""

        async def work(stake: Stake) -> None:
            raise AssertionError

        async def main() -> None:
            before = asyncio.all_tasks()
            task = asyncio.ensure_future(to_the_end(work))
            await asyncio.sleep(0)
            cancelled = {"the work": asyncio.all_tasks() - before - {task}, "who waits": {task}}
            for each in cancelled.get(who, asyncio.all_tasks() - before):
                each.cancel()
            done, _ = await asyncio.wait({task}, timeout=5)
            assert done == {task}
            assert task.cancelled()

        asyncio.run(main())

    def test_only_the_work_is_cancelled_by_somebody(self) -> None:
        """Whoever waits is not left waiting."""

        async def main() -> None:
            before = asyncio.all_tasks()
            task = asyncio.ensure_future(to_the_end(lambda stake: anyio.sleep_forever()))
            await asyncio.sleep(0.01)
            [inner] = asyncio.all_tasks() - before - {task}
            inner.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(task, 5)

        asyncio.run(main())

    def test_trios_ctrl_c_is_not_raised_in_the_work(self) -> None:
        """It would be raised in whatever is running, in the middle of reading an answer."""

        async def work(stake: Stake) -> bool:
            await anyio.lowlevel.checkpoint()
            return trio.lowlevel.currently_ki_protected()

        assert anyio.run(to_the_end, work, backend="trio")

    @pytest.mark.parametrize("where", ["start_soon", "__aexit__"])
    @pytest.mark.parametrize("backend", ["asyncio", "trio"])
    def test_a_ctrl_c_around_the_work_comes_alone(
        self, where: str, backend: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Trio raises it anywhere, and a group of tasks makes a group of it."""

        async def work(stake: Stake) -> None:
            """End at once."""

        async def main() -> None:
            group = type(anyio.create_task_group())
            method = getattr(group, where)

            def interrupt(*_: object) -> None:
                monkeypatch.undo()
                raise KeyboardInterrupt

            async def interrupted_end(*arguments: object) -> None:
                monkeypatch.undo()
                await method(*arguments)
                raise Group("", [Group("", [KeyboardInterrupt()])])

            monkeypatch.setattr(group, where, interrupt if where == "start_soon" else interrupted_end)
            with pytest.raises(KeyboardInterrupt):
                await to_the_end(work)

        anyio.run(main, backend=backend)

    def test_a_second_ctrl_c_on_trio_leaves_at_once(self) -> None:
        """The first is the scope's; the second is raised in the main task, where it waits for the work."""
        ended: list[str] = []

        async def work(stake: Stake, scope: trio.CancelScope) -> None:
            stake.is_held = True
            scope.cancel()
            try:
                await trio.sleep_forever()
            finally:
                ended.append("cancelled")

        async def main() -> None:
            with trio.CancelScope() as scope:
                trio.lowlevel.spawn_system_task(interrupt)
                await to_the_end(lambda stake: work(stake, scope))

        async def interrupt() -> None:
            await trio.testing.wait_all_tasks_blocked(0.01)
            signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            trio.run(main)
        assert ended == ["cancelled"]


def test_the_counting_coroutine_is_one_for_asyncio() -> None:
    async def nothing() -> None: ...

    coroutine = nothing()
    counted = Counted(coroutine, lambda: None)
    assert asyncio.iscoroutine(counted)
    assert inspect.getcoroutinestate(counted) == inspect.CORO_CREATED
    counted.close()
