"""AsyncConceptViz: the public face of all the rest.

What lives here: the public methods, each a few lines that put the parts of `_core` to use. What must never live here: a
decision about money or time (`_policy`), a JSON key (`_wire`), HTTP (`_transport`, `_downloads`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Hashable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, overload

import anyio

from ._calls import ApiCall, build_generate, check_task_id
from ._core import Core
from ._models import Image, Outcome, Polling, Result, Retries, Submission, TaskState
from ._poller import kind_of
from ._spec import AspectRatio, Model, Quality
from ._task import AsyncTask

if TYPE_CHECKING:
    from types import TracebackType

    import httpx
    from typing_extensions import Self

    from ._batches import Items
    from ._budget import Budget, Reservation
    from ._events import EventHook
    from ._journal import Journal
    from ._requests import EditRequest, GenerateRequest, ImageInput, Prompts
    from ._submits import Paid


logger = logging.getLogger("conceptviz")


class AsyncConceptViz:
    """The ConceptViz API for asyncio and trio programs.

        async with AsyncConceptViz() as cv:
            result = await cv.generate("the water cycle")
            paths = await cv.save(result, "diagrams/")

    One client serves any number of tasks at once. All times are in seconds, money is in credits.

    Args:
        api_key: The API key, or a callable that returns it (a password manager), called once; else
            CONCEPTVIZ_API_KEY.
        base_url: The API's base URL; else CONCEPTVIZ_BASE_URL, else the documented one. https, or a loopback address.
        timeout: Seconds for one whole HTTP exchange with the API, however its bytes drip. An image download may
            take ten times that, but never falls silent for longer than this.
        polling: How tasks are waited for.
        retries: How often what is safe to repeat is repeated.
        max_connections: Connections, and so requests at a time, to the API, and as many to the image host.
        budget: The credits this client may spend, or a `Budget` that several share; None for any number.
        journal: A file, or a `Journal`, in which every paid submit is written down before it is sent; None for none.
        on_event: Called with each `Event`; an awaitable that it returns is awaited. Its errors go to the caller of the
            method that was running.
        transport: An `httpx.AsyncBaseTransport` for the API and the image host: a proxy, a mock, the simulator.

    Raises:
        InvalidRequestError: There is no usable API key, or the base URL is not one. Nothing was sent.
        JournalError: The journal cannot be used.

    Source: "Authentication", "Base URL".
    """

    def __init__(
        self,
        api_key: str | Callable[[], str] | None = None,
        *,
        base_url: str | None = None,
        timeout: float = 30.0,
        polling: Polling = Polling(),  # noqa: B008 - frozen: every client may share it
        retries: Retries = Retries(),  # noqa: B008 - likewise
        max_connections: int = 20,
        budget: Budget | int | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
        on_event: EventHook | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._core = Core(
            api_key,
            base_url=base_url,
            timeout=timeout,
            polling=polling,
            retries=retries,
            max_connections=max_connections,
            budget=budget,
            journal=journal,
            on_event=on_event,
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._core.base_url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Tasks go on at the service, and keep their ids."""
        await self._core.aclose()

    async def submit(
        self,
        prompt: Prompts,
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
        key: str | None = None,
    ) -> AsyncTask:
        """Submit one prompt, or a batch of two to four, as one task.

        Args:
            prompt: A description of the diagram, or a sequence of one to four.
            model: "cv-2" (what the service takes by itself) or "cv-1".
            quality: "2k", or "4k" with cv-1.
            aspect_ratio: Such as "16:9", "1:1", "4:3", "9:16", "a4-portrait".
            key: Your own name for this piece of work. With a journal, what has the same key is paid for once, by
                whatever process; a second call takes up the task of the first.

        Returns:
            The task, whose `submission` is the receipt.

        Raises:
            InvalidRequestError: The request could only be refused. Nothing was sent.
            BudgetExceededError: It would cost more than is left of the budget. Nothing was sent.
            JournalError: It could not be written down. Nothing was sent, or the error carries the receipt.
            NotSentError: No connection could be made. Nothing was spent.
            SubmissionUnknownError: It was sent and no readable answer came: it may have been charged.
            APIStatusError: The service refused it. Nothing was spent.
            GenerationFailedError: The service failed at once, documented as refunded.

        Credits:
            For each prompt 2 with cv-2, 1 with cv-1 at 2k, 2 with cv-1 at 4k; spent when the task is accepted.

        Source: "Step 1: Submit Generation Request", "Credit Cost".
        """
        from ._requests import GenerateRequest

        request = GenerateRequest(prompt, model=model, quality=quality, aspect_ratio=aspect_ratio, key=key)
        return await self._submit(build_generate(request), request)

    async def submit_edit(
        self,
        prompt: str,
        images: ImageInput | Iterable[ImageInput],
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
        key: str | None = None,
    ) -> AsyncTask:
        """Submit an edit of one to four images.

        Args:
            prompt: The edit instruction.
            images: One to four of `Path`, bytes, an open binary file, or a `str` that is an http(s) or data URL, of at
                most 20 MB each. Files are read once, in a worker thread.
            model: As for `submit`.
            quality: As for `submit`.
            aspect_ratio: As for `submit`.
            key: As for `submit`.

        Returns:
            The task, whose `submission` is the receipt.

        Raises:
            InvalidRequestError: Also if an image cannot be read, or is not one. Nothing was sent.
            ConceptVizError: All else as for `submit`.

        Credits:
            The price of one image, as for `submit`; the page does not say whether more inputs cost more, so
            `submission.credits_used` is what counts.

        Source: "Edit Images", "Credit Cost".
        """
        from ._requests import EditRequest
        from ._uploads import build_edit_call

        request = EditRequest(prompt, images, model=model, quality=quality, aspect_ratio=aspect_ratio, key=key)
        return await self._submit(await build_edit_call(request), request)

    async def generate(
        self,
        prompt: Prompts,
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
        key: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Submit one prompt, or a batch of two to four, and wait for the images.

        Args:
            prompt: As for `submit`.
            model: As for `submit`.
            quality: As for `submit`.
            aspect_ratio: As for `submit`.
            key: As for `submit`.
            timeout: Seconds for all of it; None is `polling.timeout`. A submit under way is not cut short by it: its
                answer holds the id of a paid task. It has the client's own timeout.

        Returns:
            The images, matched with their prompts.

        Raises:
            InvalidRequestError: The request could only be refused. Nothing was sent.
            BudgetExceededError: It would cost more than is left of the budget. Nothing was sent.
            JournalError: It could not be written down. Nothing was sent, or the error carries the receipt.
            NotSentError: No connection could be made. Nothing was spent.
            SubmissionUnknownError: It was sent and no readable answer came: it may have been charged.
            APIStatusError: The service refused the submit, or to be asked about the task.
            GenerationFailedError: The task ended as failed.
            WaitTimeoutError: The time ran out. The task goes on, and its id is in the error.
            PollInterruptedError: Looks at the task kept failing. It goes on, and its id is in the error.
            UnexpectedResponseError: The task is completed without images.

        Credits:
            As for `submit`.

        Source: "Generate Diagrams".
        """
        started = anyio.current_time()
        task = await self.submit(prompt, model=model, quality=quality, aspect_ratio=aspect_ratio, key=key)
        return await task._wait_until(started, timeout)

    async def edit(
        self,
        prompt: str,
        images: ImageInput | Iterable[ImageInput],
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
        key: str | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Submit an edit of one to four images and wait for its image.

        Args:
            prompt: As for `submit_edit`.
            images: As for `submit_edit`.
            model: As for `submit`.
            quality: As for `submit`.
            aspect_ratio: As for `submit`.
            key: As for `submit`.
            timeout: As for `generate`.

        Returns:
            The edited image.

        Raises:
            InvalidRequestError: Also if an image cannot be read, or is not one. Nothing was sent.
            ConceptVizError: All else as for `generate`.

        Credits:
            As for `submit_edit`.

        Source: "Edit Images".
        """
        started = anyio.current_time()
        task = await self.submit_edit(prompt, images, model=model, quality=quality, aspect_ratio=aspect_ratio, key=key)
        return await task._wait_until(started, timeout)

    def generate_many(
        self,
        items: Items,
        *,
        batch_size: int = 4,
        max_in_flight: int = 5,
        ordered: bool = False,
        save_to: str | os.PathLike[str] | None = None,
        timeout: float | None = None,
    ) -> AsyncIterator[Outcome]:
        """Generate any number of diagrams, and give the outcome of each: no prompt's failure is another's.

        Prompts are put together into batches, and a batch that is refused for one of them is taken apart. After a
        refusal that would meet every other submit too (no credits, no access) nothing more is submitted; what was
        accepted is still waited for. To stop early, leave the loop: paid tasks go on, and the log names them.

        Args:
            items: Any number of str, `GenerateRequest` or `EditRequest`, in an iterable or async iterable, which is
                drawn from as the work goes on. A request with a `key` is submitted as it is, and with a journal paid
                for once, however often the program runs.
            batch_size: How many prompts without a key, and of equal settings, share one submit: 1 to 4.
            max_in_flight: How many tasks may be unfinished at once.
            ordered: Whether outcomes come in the order of the items, rather than as they are there.
            save_to: A folder to save the images in as they are there, named by `name` or else after their task; None to
                save none.
            timeout: Seconds to wait for each task; None is `polling.timeout`.

        Yields:
            An outcome for each prompt.

        Raises:
            InvalidRequestError: An argument cannot be used. Nothing was sent. A bad item is an outcome, not an error.

        Credits:
            As for `submit`, for each prompt.

        Source: "Generate Diagrams", "Edit Images", "Limits".
        """
        from ._batches import Options
        from ._fanout import Outcomes, Run
        from ._files import check_folder

        folder = None if save_to is None else check_folder(save_to)
        return Outcomes(Run(self._core, items, Options(batch_size, max_in_flight, ordered, folder, timeout)))

    def task(self, task_id: str) -> AsyncTask:
        """Pick a task up again by its id, in any process. Does no I/O.

        Raises:
            InvalidRequestError: It cannot be a task id.

        Source: "Step 2: Poll for Results".
        """
        return self._resumed(check_task_id(task_id), None)

    @overload
    async def save(
        self, result_or_image: Result, to: str | os.PathLike[str], *, overwrite: bool = False
    ) -> list[Path]: ...

    @overload
    async def save(self, result_or_image: Image, to: str | os.PathLike[str], *, overwrite: bool = False) -> Path: ...

    async def save(
        self, result_or_image: Result | Image, to: str | os.PathLike[str], *, overwrite: bool = False
    ) -> list[Path] | Path:
        """Save images in a folder, verified, whole, and exactly as the service made them.

        Files are named after the task's id and the image's index, with the extension that their bytes ask for. A file
        that is already there with the same bytes is left as it is. An expired URL is refreshed by one look at the task.

        Args:
            result_or_image: A result, or one of its images.
            to: The folder; made if need be.
            overwrite: Whether a file of the same name with other bytes is replaced.

        Returns:
            The paths of a result's images, in their order; the one path of an image.

        Raises:
            InvalidRequestError: `to` looks like a file.
            DownloadError: An image could not be fetched, verified or written. Those saved before it stay.

        Credits:
            None: images are paid for already, and can be saved again and again.

        Source: "Response (completed)".
        """
        from ._files import check_folder

        folder = check_folder(to)
        if isinstance(result_or_image, Image):
            return await self._save(result_or_image, folder, overwrite)
        return [await self._save(image, folder, overwrite) for image in result_or_image.images]

    async def read(self, image: Image) -> bytes:
        """Fetch an image into memory: verified, and exactly the bytes that the service made.

        Raises:
            DownloadError: It could not be fetched, or is not what it should be.

        Credits:
            None.

        Source: "Response (completed)".
        """
        return await self._core.downloads.read(image)

    def estimate(
        self, prompts_or_count: Prompts | int, *, model: Model | None = None, quality: Quality | None = None
    ) -> int:
        """Return the credits that images would cost. Does no I/O.

        Args:
            prompts_or_count: A prompt, any number of prompts, or how many there are.
            model: As for `submit`.
            quality: As for `submit`.

        Raises:
            InvalidRequestError: The API page has no price for this model and quality.

        Source: "Credit Cost".
        """
        from ._requests import estimate

        return estimate(prompts_or_count, model=model, quality=quality)

    @property
    def credits_remaining(self) -> int | None:
        """The credits left in the account as of the last answer that said so, or None: there is no way to ask."""
        return self._core.submits.credits_remaining

    async def resume(self) -> list[AsyncTask]:
        """Take up what the journal knows as paid for and not ended, by this account at this API. Costs nothing.

        Returns:
            The tasks, the oldest submit first; none without a journal. `wait` on each brings its images.

        Raises:
            JournalError: The journal could not be read.

        Credits:
            None: they are paid for.

        Source: "Step 2: Poll for Results".
        """
        return [self._task(paid) for paid in await self._core.submits.unended()]

    async def _submit(self, call: ApiCall, request: GenerateRequest | EditRequest) -> AsyncTask:
        paid = await self._core.submits.submit(call, request)
        return self._task(paid, kind_of(call.path, paid.submission))

    async def _settle(self, state: TaskState, reservation: Reservation | None = None) -> None:
        await self._core.submits.end(state, reservation)

    def _resumed(self, task_id: str, submission: Submission | None) -> AsyncTask:
        return AsyncTask(self._core.poller, task_id, submission, settle=self._settle)

    def _task(self, paid: Paid, kind: Hashable = None) -> AsyncTask:
        settle = partial(self._settle, reservation=paid.reservation)
        accepted_at = anyio.current_time() if paid.is_new else None
        return AsyncTask(
            self._core.poller, paid.submission.task_id, paid.submission, accepted_at, settle, paid.end, kind
        )

    async def _save(self, image: Image, folder: Path, overwrite: bool) -> Path:
        path = await self._core.downloads.save(image, folder, overwrite=overwrite)
        await self._core.announce_saved(image, path)
        return path
