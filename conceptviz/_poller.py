"""Waiting for tasks: every look at a waiting task is made from here.

What lives here: the looks at one task, their pauses, the deadline that bounds them all, and the few workers that look
at many tasks as they become due. What a look's outcome means is decided in `_policy`, when to look in `_schedule`. What
must never live here: HTTP, a JSON key.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import anyio
import anyio.abc
from attrs import define, field

from ._errors import ConceptVizError, Credits, PollInterruptedError, ServerError, WaitTimeoutError
from ._models import Polling, Result, Retries, Submission, TaskState
from ._policy import Watch, pause_after_look
from ._schedule import Durations, Schedule, seen_duration
from ._transport import Transport
from ._wire import build_result, failed_state

if TYPE_CHECKING:
    from ._events import Event


@define(eq=False)
class Poller:
    """What every wait of one client shares.

    Attributes:
        transport: The API.
        polling: How tasks are waited for.
        retries: How often what is safe to repeat is repeated.
        emit: Called with each event, or None if nobody listens.
        rng: The randomness of the pauses.
        schedule: When to look, learnt from the tasks before.
        waiting: How many tasks are waited for.
    """

    transport: Transport
    polling: Polling
    retries: Retries
    emit: Callable[[Event], Awaitable[None]] | None
    rng: Random
    schedule: Schedule = field(init=False)
    waiting: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.schedule = Schedule(self.polling, self.rng)

    def looks(
        self,
        task_id: str,
        prompts: tuple[str, ...],
        *,
        kind: Hashable = None,
        accepted_at: float | None,
        started: float,
        timeout: float | None,
    ) -> Looks:
        """Make the looks at one task.

        Args:
            task_id: The task.
            prompts: Its prompts, if they are known.
            kind: What tells tasks apart that take differently long; only those of our own submits have one.
            accepted_at: The clock at our own submit of it, or None for a task that was picked up.
            started: The clock at which the timeout begins to count.
            timeout: Seconds, or None for those of `polling`.
        """
        if timeout is None:
            timeout = self.polling.timeout
        now = anyio.current_time()
        durations = self.schedule.of(kind)
        # Never later than that from now: the clock of another event loop may have been ahead of this one's.
        first = 0.0 if accepted_at is None else self.schedule.first_look(durations)
        return Looks(
            self,
            task_id,
            prompts,
            durations=durations,
            started_at=now if accepted_at is None else accepted_at,
            next_at=now if accepted_at is None else min(max(now, accepted_at + first), now + first),
            waited_from=started,
            timeout=timeout,
            watch=Watch(task_id, accepted_at),
        )

    async def announce(self, end: TaskState, submission: Submission | None, elapsed: float) -> Result:
        """Tell the hook how a task ended, and return its result.

        Raises:
            ConceptVizError: It ended as failed.
        """
        if self.emit is None:
            return build_result(end, submission)
        from ._events import Completed, Failed  # events are loaded by those who listen

        try:
            result = build_result(end, submission)
        except ConceptVizError as error:
            await self.emit(Failed(task_id=end.task_id, error=error, elapsed=elapsed))
            raise
        await self.emit(Completed(task_id=end.task_id, result=result, elapsed=elapsed))
        return result


@define(eq=False, repr=False, weakref_slot=False)
class Looks(AsyncIterator[TaskState]):
    """The looks at one task, up to the one that finds it ended.

    An iterator without a suspended frame: nothing is left open when it is dropped, and any task of the event loop may
    ask for the next look.

    Attributes:
        poller: The client's.
        task_id: The task.
        prompts: Its prompts, if they are known.
        durations: How long tasks of its kind took.
        started_at: The clock when the task was submitted, or picked up.
        next_at: The clock at the next look.
        waited_from: The clock at which the timeout began to count.
        timeout: Seconds after which waiting ends, whatever is under way.
        watch: What the looks have shown so far.
    """

    poller: Poller
    task_id: str
    prompts: tuple[str, ...]
    durations: Durations
    started_at: float
    next_at: float
    waited_from: float
    timeout: float
    watch: Watch
    _seen: TaskState | str | None = field(default=None, init=False)
    _error: ConceptVizError | None = field(default=None, init=False)
    _ran_until: float | None = field(default=None, init=False)
    _place: int | None = field(default=None, init=False)

    def enter(self) -> None:
        """Count the task among those that are waited for."""
        self.poller.waiting += 1
        if self.watch.is_ours:
            self._place = self.durations.begin()

    def leave(self) -> None:
        """Count it no more, and learn how long it took if that was seen."""
        self.poller.waiting -= 1
        if self._place is not None:
            is_seen = self._end is not None and self._error is None
            age = self.next_at - self.started_at
            self.durations.end(self._place, seen_duration(self._ran_until, age) if is_seen else None)
            self._place = None

    async def __anext__(self) -> TaskState:
        """Wait until the next look is due, look, and return what it shows.

        Raises:
            WaitTimeoutError: The deadline came first.
            PollInterruptedError: Too many looks in a row failed.
            APIStatusError: The service refuses to be asked about this task.
            UnexpectedResponseError: The task is completed without images.
        """
        if self._end is not None:
            raise StopAsyncIteration
        state = None
        while state is None:
            await anyio.sleep_until(self.due)
            state = await self.look()
        return state

    @property
    def deadline(self) -> float:
        """The clock at which waiting ends."""
        return self.waited_from + self.timeout

    @property
    def due(self) -> float:
        """The clock at which there is something to do."""
        return min(self.next_at, self.deadline)

    def put_off(self, now: float) -> bool:
        """Have a look that is late come later still, if that leaves room for those that find something."""
        if not self.watch.is_ours or now >= self.deadline:
            return False
        by = self.poller.schedule.put_off(self.durations, now - self.started_at, now - self.next_at)
        self.next_at = now + by if by else self.next_at
        return by > 0

    async def look(self) -> TaskState | None:
        """Look once, now; None if the look does not count.

        Raises:
            ConceptVizError: As for `__anext__`.
        """
        now = anyio.current_time()
        if now < self.deadline:
            with anyio.move_on_after(self.deadline - now):
                return await self._look()
        # A slow hook may have used up the time after the look that found the end.
        if self._end is not None:
            return self._end
        raise self._timed_out()

    @property
    def _end(self) -> TaskState | None:
        return self._seen if isinstance(self._seen, TaskState) and self._seen.is_terminal else None

    async def _look(self) -> TaskState | None:
        poller = self.poller
        self._error = state = None
        try:
            state = await poller.transport.look(self.task_id, self.prompts)
        except ConceptVizError as error:
            self._error = error
        now = anyio.current_time()
        if self._error is not None:
            if self.watch.judge_error(self._error, now) and isinstance(self._error, ServerError):
                state = failed_state(self._error, self.task_id)
            elif self.watch.failures >= poller.polling.max_failures:
                raise self._interrupted(self._error)
        elif state is not None and not self.watch.judge_state(state):
            state = None
        if state is not None:
            # Thousands may wait: of an answer that says nothing else, the word is kept.
            is_bare = not state.is_terminal and state.raw == {"status": state.status}
            self._seen = state.status if is_bare else state
            if state.is_terminal:
                self.next_at = now
            else:
                self._ran_until = now - self.started_at
        if state is None or not state.is_terminal:
            # How old a task is that was picked up nobody knows: it may be done at any moment.
            age = now - self.started_at if self.watch.is_ours else math.inf
            regular = poller.schedule.next_look(self.durations, age, poller.waiting)
            self.next_at = now + pause_after_look(self.watch, self._error, regular, poller.retries, poller.rng)
        if poller.emit is not None:
            await self._tell(poller.emit, state, now)
        return state

    async def _tell(self, emit: Callable[[Event], Awaitable[None]], state: TaskState | None, now: float) -> None:
        from ._events import Polled, Retrying  # events are loaded by those who listen

        if state is not None:
            await emit(Polled(task_id=self.task_id, state=state, elapsed=now - self.started_at))
        elif self._error is not None:
            pause = self.next_at - now
            await emit(Retrying(task_id=self.task_id, attempt=self.watch.failures, delay=pause, error=self._error))

    def _timed_out(self) -> WaitTimeoutError:
        last = self._seen
        if isinstance(last, str):
            last = TaskState(self.task_id, last, raw={"status": last})
        seen = f"it was last seen as {last.status!r}" if last else "no look at it was answered"
        failed = f", and the last {self.watch.failures} looks failed ({self._error})" if self._error else ""
        return WaitTimeoutError(
            f"Task {self.task_id} had not ended after {self.timeout:g} s: {seen}{failed}. It goes on at the service "
            f"and is paid for; take it up again with task({self.task_id!r}).wait().",
            task_id=self.task_id,
            last_state=last,
        )

    def _interrupted(self, error: ConceptVizError) -> PollInterruptedError:
        return PollInterruptedError(
            f"{self.watch.failures} looks at task {self.task_id} in a row failed, the last one thus: {error} The task "
            f"goes on at the service and is paid for; take it up again with task({self.task_id!r}).wait().",
            task_id=self.task_id,
            credits=Credits.SPENT,
        )


def kind_of(endpoint: str, submission: Submission) -> Hashable:
    """Return what tells tasks apart that take differently long."""
    return endpoint, submission.model, submission.quality, len(submission.prompts)


class Signal:
    """Wakes whoever waits for something to change; what has changed is looked at, not remembered here."""

    def __init__(self) -> None:
        self._event: anyio.Event | None = None

    def set(self) -> None:
        """Wake those who wait."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Wait for the next `set`. Whoever has looked in the same step as this call misses none."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()


class Waiting(Protocol):
    """Something that waits for a task."""

    @property
    def looks(self) -> Looks:
        """The looks at it."""
        ...


W = TypeVar("W", bound=Waiting)


class Board(Generic[W]):
    """Many waiting tasks, in the order in which they are due, and the few workers that look at them.

    A task that waits costs its entry here, and no task of the event loop. There are as many workers as it takes to look
    in time, and never more than may have a request under way.

    Args:
        tasks: Where the workers run, until it is cancelled.
        most: How many there may be, asked again and again.
        ended: Awaited with each task that has ended, or that is not waited for any longer, and with why.
    """

    def __init__(
        self,
        tasks: anyio.abc.TaskGroup,
        most: Callable[[], int],
        ended: Callable[[W, TaskState | ConceptVizError], Awaitable[None]],
    ) -> None:
        self._tasks = tasks
        self._most = most
        self._ended = ended
        self._heap: list[tuple[float, int, W]] = []
        self._numbers = itertools.count()
        self._pushed = Signal()
        self._lead = anyio.Lock(fast_acquire=True)
        self._workers = self._idle = 0

    def push(self, waiting: W) -> None:
        """Have a task looked at when it is due, again and again."""
        entry = (waiting.looks.due, next(self._numbers), waiting)
        heappush(self._heap, entry)
        if self._heap[0] is entry:
            self._pushed.set()
        if not self._workers:
            self._hire()

    def is_late(self, seconds: float) -> bool:
        """Say whether a look has been due for longer than that."""
        return bool(self._heap) and anyio.current_time() - self._heap[0][0] > seconds

    def _hire(self) -> None:
        self._workers += 1
        self._tasks.start_soon(self._work)

    async def _work(self) -> None:
        while (waiting := await self._next()) is not None:
            try:
                state = await waiting.looks.look()
            except ConceptVizError as error:  # noqa: PERF203 - a try is what a look is
                await self._ended(waiting, error)
            else:
                if state is not None and state.is_terminal:
                    await self._ended(waiting, state)
                else:
                    self.push(waiting)
        self._workers -= 1

    async def _next(self) -> W | None:
        """Wait for the next that is due; None for a worker too many."""
        self._idle += 1
        async with self._lead:  # one waits for what is due, the others for their turn to
            waiting = await self._due()
        self._idle -= 1
        return waiting

    async def _due(self) -> W | None:
        while True:
            now, due = anyio.current_time(), self._heap[0][0] if self._heap else math.inf
            if due <= now:
                if self._workers > self._most():
                    return None
                waiting = heappop(self._heap)[2]
                if waiting.looks.put_off(now):
                    self.push(waiting)
                    continue
                if self._heap and self._heap[0][0] <= now and self._idle == 1 and self._workers < self._most():
                    self._hire()
                return waiting
            with anyio.move_on_after(due - now):
                await self._pushed.wait()
