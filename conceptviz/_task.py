"""AsyncTask: one task at the service, ours or picked up by its id.

What lives here: the public methods of a task. What must never live here: HTTP, a JSON key, a decision about time.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable

import anyio

from ._models import Result, Submission, TaskState
from ._poller import Looks, Poller
from ._wire import build_result

logger = logging.getLogger("conceptviz")


class AsyncTask:
    """A task at the service: submitted by us, or picked up by its id.

    Made by `AsyncConceptViz.submit`, `submit_edit` and `task`.
    """

    def __init__(
        self,
        poller: Poller,
        task_id: str,
        submission: Submission | None = None,
        accepted_at: float | None = None,
        settle: Callable[[TaskState], Awaitable[None]] | None = None,
        end: TaskState | None = None,
        kind: Hashable = None,
    ) -> None:
        self._poller = poller
        self._id = task_id
        self._submission = submission
        self._accepted_at = accepted_at
        self._settle = settle
        self._end = end
        self._kind = kind

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._id}>"

    @property
    def id(self) -> str:
        """The task's id: all that is needed to take it up again."""
        return self._id

    @property
    def submission(self) -> Submission | None:
        """The receipt, or None for a task that was picked up by its id."""
        return self._submission

    async def status(self) -> TaskState:
        """Look at the task once, now.

        Raises:
            PollInterruptedError: The look kept failing. The task goes on.
            APIStatusError: The service refused it: TaskNotFoundError for an unknown id.
            UnexpectedResponseError: The answer is not the documented shape.

        Credits:
            None.

        Source: "Step 2: Poll for Results".
        """
        return await self._poller.transport.look_patiently(self._id, self._prompts)

    async def wait(self, *, timeout: float | None = None) -> Result:
        """Wait until the task has ended, looking at it every 3 to 5 s.

        Being cancelled, or stopping to wait, does not stop the task: it is paid for and goes on.

        Args:
            timeout: Seconds, a bound on everything that is done meanwhile; None is `polling.timeout`.

        Returns:
            The images, matched with their prompts as far as these are known.

        Raises:
            GenerationFailedError: The task ended as failed.
            ModerationBlockedError: It ended as failed because its input was blocked.
            WaitTimeoutError: The time ran out. The task goes on.
            PollInterruptedError: Looks kept failing. The task goes on.
            APIStatusError: The service refuses to be asked: TaskNotFoundError, AuthenticationError.
            UnexpectedResponseError: The task is completed without images.

        Credits:
            None: the submit has paid.

        Source: "Step 2: Poll for Results", "Limits".
        """
        return await self._wait_until(anyio.current_time(), timeout)

    def watch(self, *, timeout: float | None = None) -> AsyncIterator[TaskState]:
        """Iterate over the looks at the task, the last of which finds it ended.

        Args:
            timeout: Seconds from the first look asked for; None is `polling.timeout`.

        Yields:
            The task as each look finds it; a failed task is a state here, not an error.

        Raises:
            WaitTimeoutError: The time ran out. The task goes on.
            PollInterruptedError: Looks kept failing. The task goes on.
            APIStatusError: The service refuses to be asked: TaskNotFoundError, AuthenticationError.
            UnexpectedResponseError: The task is completed without images.

        Credits:
            None.

        Source: "Step 2: Poll for Results".
        """
        return self._looks(anyio.current_time(), timeout)

    @property
    def _prompts(self) -> tuple[str, ...]:
        return self._submission.prompts if self._submission else ()

    def _looks(self, started: float, timeout: float | None) -> Looks:
        return self._poller.looks(
            self._id, self._prompts, kind=self._kind, accepted_at=self._accepted_at, started=started, timeout=timeout
        )

    async def _wait_until(self, started: float, timeout: float | None) -> Result:
        """Wait as `wait` does, with the time counted from `started` on the event loop's clock."""
        if self._end is None:
            looks = self._looks(started, timeout)
            looks.enter()
            try:
                async for state in looks:
                    self._end = state if state.is_terminal else None
            except anyio.get_cancelled_exc_class():
                logger.warning(
                    "Stopped waiting for task %s. It goes on at the service and is paid for; take it up again with "
                    "task(%r).wait().",
                    self._id,
                    self._id,
                )
                raise
            finally:
                looks.leave()
            elapsed = anyio.current_time() - looks.started_at
            assert self._end is not None  # the looks end with the task, or raise
            if self._settle is not None:
                await self._settle(self._end)
            return await self._poller.announce(self._end, self._submission, elapsed)
        return build_result(self._end, self._submission)
