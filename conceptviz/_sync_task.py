"""Task: the same names as the async task's, for blocking callers.

What lives here: one line for each public method, with the async twin's signature and text (a test compares them). What
must never live here: behaviour, which belongs to `_task`.
"""

from __future__ import annotations

from collections.abc import Iterator

from ._blocking import Blocking
from ._client import AsyncConceptViz
from ._models import Result, Submission, TaskState
from ._task import AsyncTask


class Task:
    """A task at the service: submitted by us, or picked up by its id.

    Made by `ConceptViz.submit`, `submit_edit` and `task`.
    """

    def __init__(self, blocking: Blocking[AsyncConceptViz], task: AsyncTask) -> None:
        self._blocking = blocking
        self._task = task
        self._home = blocking.client

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id}>"

    @property
    def id(self) -> str:
        """The task's id: all that is needed to take it up again."""
        return self._task.id

    @property
    def submission(self) -> Submission | None:
        """The receipt, or None for a task that was picked up by its id."""
        return self._task.submission

    def status(self) -> TaskState:
        """Look at the task once, now.

        Raises:
            PollInterruptedError: The look kept failing. The task goes on.
            APIStatusError: The service refused it: TaskNotFoundError for an unknown id.
            UnexpectedResponseError: The answer is not the documented shape.

        Credits:
            None.

        Source: "Step 2: Poll for Results".
        """
        return self._blocking.run(lambda cv: self._of(cv).status())

    def wait(self, *, timeout: float | None = None) -> Result:
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
        return self._blocking.run(lambda cv: self._of(cv).wait(timeout=timeout))

    def watch(self, *, timeout: float | None = None) -> Iterator[TaskState]:
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
        return self._blocking.iterate(lambda cv: self._of(cv).watch(timeout=timeout))

    def _of(self, client: AsyncConceptViz) -> AsyncTask:
        """Return the task as one of this process's client, which after a fork is another."""
        if client is not self._home:
            self._task, self._home = client._resumed(self.id, self.submission), client
        return self._task
