"""Waiting for tasks: the one loop of looks, for every way of waiting.

What lives here: the pauses, the deadline that bounds them all, and what a look's outcome means for the wait (decided in
`_policy`). What must never live here: HTTP, a JSON key.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from random import Random

import anyio
from attrs import define, field, frozen

from ._errors import ConceptVizError, Credits, PollInterruptedError, ServerError, WaitTimeoutError
from ._events import Event, Polled, Retrying
from ._models import Polling, Retries, TaskState
from ._policy import Watch, pause_after_look
from ._transport import Transport
from ._wire import failed_state


@frozen
class Poller:
    """What every wait of one client shares."""

    transport: Transport
    polling: Polling
    retries: Retries
    emit: Callable[[Event], Awaitable[None]]
    rng: Random


@define
class Looks(AsyncIterator[TaskState]):
    """The looks at one task, up to the one that finds it ended.

    An iterator without a suspended frame: nothing is left open when it is dropped, and any task of the event loop may
    ask for the next look.

    Attributes:
        poller: The client's.
        task_id: The task.
        prompts: Its prompts, if they are known.
        started_at: The clock when the task was submitted, or picked up.
        next_at: The clock at the first look.
        deadline: The clock at which waiting ends, whatever is under way.
        timeout: The seconds that the deadline was made from.
        watch: What the looks have shown so far.
    """

    poller: Poller
    task_id: str
    prompts: tuple[str, ...]
    started_at: float
    next_at: float
    deadline: float
    timeout: float
    watch: Watch
    _last: TaskState | None = field(default=None, init=False)
    _error: ConceptVizError | None = field(default=None, init=False)

    async def __anext__(self) -> TaskState:
        """Wait until the next look is due, look, and return what it shows.

        Raises:
            WaitTimeoutError: The deadline came first.
            PollInterruptedError: Too many looks in a row failed.
            APIStatusError: The service refuses to be asked about this task.
            UnexpectedResponseError: The task is completed without images.
        """
        if self._last is not None and self._last.is_terminal:
            raise StopAsyncIteration
        with anyio.move_on_after(max(0.0, self.deadline - anyio.current_time())):
            state = None
            while state is None:
                await anyio.sleep(max(0.0, self.next_at - anyio.current_time()))
                state = await self._look()
            return state
        # A slow hook may have used up the time after the look that found the end.
        if self._last is not None and self._last.is_terminal:
            return self._last
        raise self._timed_out()

    async def _look(self) -> TaskState | None:
        """Look once; None if the look does not count."""
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
        pause = pause_after_look(self.watch, self._error, poller.polling, poller.retries, poller.rng)
        self.next_at = now + pause
        if state is not None:
            self._last = state
            await poller.emit(Polled(task_id=self.task_id, state=state, elapsed=now - self.started_at))
        elif self._error is not None:
            await poller.emit(
                Retrying(task_id=self.task_id, attempt=self.watch.failures, delay=pause, error=self._error)
            )
        return state

    def _timed_out(self) -> WaitTimeoutError:
        seen = f"it was last seen as {self._last.status!r}" if self._last else "no look at it was answered"
        failed = f", and the last {self.watch.failures} looks failed ({self._error})" if self._error else ""
        return WaitTimeoutError(
            f"Task {self.task_id} had not ended after {self.timeout:g} s: {seen}{failed}. It goes on at the service "
            f"and is paid for; take it up again with task({self.task_id!r}).wait().",
            task_id=self.task_id,
            last_state=self._last,
        )

    def _interrupted(self, error: ConceptVizError) -> PollInterruptedError:
        return PollInterruptedError(
            f"{self.watch.failures} looks at task {self.task_id} in a row failed, the last one thus: {error} The task "
            f"goes on at the service and is paid for; take it up again with task({self.task_id!r}).wait().",
            task_id=self.task_id,
            credits=Credits.SPENT,
        )
