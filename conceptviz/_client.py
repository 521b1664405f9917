"""AsyncConceptViz: the public face of all the rest.

What lives here: the public methods, each a few lines that put the other modules together. What must never live here: a
decision about money or time (`_policy`), a JSON key (`_wire`), HTTP (`_transport`, `_downloads`).
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, overload
from urllib.parse import urlsplit

import anyio

from ._config import is_loopback, resolve_api_key, resolve_base_url
from ._downloads import Downloads, Expired, check_folder
from ._errors import ConceptVizError, DownloadError, InvalidRequestError
from ._events import Event, EventHook, Saved, Submitted
from ._models import (
    EditRequest,
    GenerateRequest,
    Image,
    ImageInput,
    Polling,
    Prompts,
    Result,
    Retries,
    estimate,
)
from ._poller import Poller
from ._spec import AspectRatio, Model, Quality
from ._task import AsyncTask
from ._transport import Transport
from ._uploads import build_edit_call
from ._wire import ApiCall, build_generate, check_task_id

if TYPE_CHECKING:
    from types import TracebackType

    import httpx
    from typing_extensions import Self

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
        on_event: Called with each `Event`; an awaitable that it returns is awaited. Its errors go to the caller of the
            method that was running.
        transport: An `httpx.AsyncBaseTransport` for the API and the image host: a proxy, a mock, the simulator.

    Raises:
        InvalidRequestError: There is no usable API key, or the base URL is not one. Nothing was sent.

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
        on_event: EventHook | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
            raise InvalidRequestError(f"timeout must be a number of seconds above 0, not {timeout!r}.")
        if isinstance(max_connections, bool) or not isinstance(max_connections, int) or max_connections < 1:
            raise InvalidRequestError(f"max_connections must be at least 1, not {max_connections!r}.")
        self._base_url = resolve_base_url(base_url)
        self._on_event = on_event
        self._credits_remaining: int | None = None
        rng = Random()  # noqa: S311 - it spreads pauses, and guards nothing
        self._transport = Transport(
            resolve_api_key(api_key),
            self._base_url,
            timeout=timeout,
            retries=retries,
            max_connections=max_connections,
            transport=transport,
            emit=self._emit,
            rng=rng,
        )
        self._poller = Poller(self._transport, polling, retries, self._emit, rng)
        self._downloads = Downloads(
            timeout=timeout,
            retries=retries,
            max_connections=max_connections,
            transport=transport,
            allow_loopback=is_loopback(urlsplit(self._base_url).hostname or ""),
            emit=self._emit,
            rng=rng,
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._base_url}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections. Tasks go on at the service, and keep their ids."""
        with anyio.CancelScope(shield=True):
            await self._transport.aclose()
            await self._downloads.aclose()

    async def submit(
        self,
        prompt: Prompts,
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
    ) -> AsyncTask:
        """Submit one prompt, or a batch of two to four, as one task.

        Args:
            prompt: A description of the diagram, or a sequence of one to four.
            model: "cv-2" (what the service takes by itself) or "cv-1".
            quality: "2k", or "4k" with cv-1.
            aspect_ratio: Such as "16:9", "1:1", "4:3", "9:16", "a4-portrait".

        Returns:
            The task, whose `submission` is the receipt.

        Raises:
            InvalidRequestError: The request could only be refused. Nothing was sent.
            NotSentError: No connection could be made. Nothing was spent.
            SubmissionUnknownError: It was sent and no readable answer came: it may have been charged.
            APIStatusError: The service refused it. Nothing was spent.
            GenerationFailedError: The service failed at once, documented as refunded.

        Credits:
            For each prompt 2 with cv-2, 1 with cv-1 at 2k, 2 with cv-1 at 4k; spent when the task is accepted.

        Source: "Step 1: Submit Generation Request", "Credit Cost".
        """
        request = GenerateRequest(prompt, model=model, quality=quality, aspect_ratio=aspect_ratio)
        return await self._submit(build_generate(request), request)

    async def submit_edit(
        self,
        prompt: str,
        images: ImageInput | Iterable[ImageInput],
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
    ) -> AsyncTask:
        """Submit an edit of one to four images.

        Args:
            prompt: The edit instruction.
            images: One to four of `Path`, bytes, an open binary file, or a `str` that is an http(s) or data URL, of at
                most 20 MB each. Files are read once, in a worker thread.
            model: As for `submit`.
            quality: As for `submit`.
            aspect_ratio: As for `submit`.

        Returns:
            The task, whose `submission` is the receipt.

        Raises:
            InvalidRequestError: The request could only be refused, or an image cannot be read. Nothing was sent.
            NotSentError: No connection could be made. Nothing was spent.
            SubmissionUnknownError: It was sent and no readable answer came: it may have been charged.
            APIStatusError: The service refused it. Nothing was spent.
            GenerationFailedError: The service failed at once, documented as refunded.

        Credits:
            The price of one image, as for `submit`; the page does not say whether more inputs cost more, so
            `submission.credits_used` is what counts.

        Source: "Edit Images", "Credit Cost".
        """
        request = EditRequest(prompt, images, model=model, quality=quality, aspect_ratio=aspect_ratio)
        return await self._submit(await build_edit_call(request), request)

    async def generate(
        self,
        prompt: Prompts,
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Submit one prompt, or a batch of two to four, and wait for the images.

        Args:
            prompt: As for `submit`.
            model: As for `submit`.
            quality: As for `submit`.
            aspect_ratio: As for `submit`.
            timeout: Seconds for all of it; None is `polling.timeout`. A submit under way is not cut short by it: its
                answer holds the id of a paid task. It has the client's own timeout.

        Returns:
            The images, matched with their prompts.

        Raises:
            InvalidRequestError: The request could only be refused. Nothing was sent.
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
        task = await self.submit(prompt, model=model, quality=quality, aspect_ratio=aspect_ratio)
        return await task._wait_until(started, timeout)

    async def edit(
        self,
        prompt: str,
        images: ImageInput | Iterable[ImageInput],
        *,
        model: Model | None = None,
        quality: Quality | None = None,
        aspect_ratio: AspectRatio | None = None,
        timeout: float | None = None,
    ) -> Result:
        """Submit an edit of one to four images and wait for its image.

        Args:
            prompt: As for `submit_edit`.
            images: As for `submit_edit`.
            model: As for `submit`.
            quality: As for `submit`.
            aspect_ratio: As for `submit`.
            timeout: As for `generate`.

        Returns:
            The edited image.

        Raises:
            InvalidRequestError: The request could only be refused, or an image cannot be read. Nothing was sent.
            NotSentError: No connection could be made. Nothing was spent.
            SubmissionUnknownError: It was sent and no readable answer came: it may have been charged.
            APIStatusError: The service refused the submit, or to be asked about the task.
            GenerationFailedError: The task ended as failed.
            WaitTimeoutError: The time ran out. The task goes on, and its id is in the error.
            PollInterruptedError: Looks at the task kept failing. It goes on, and its id is in the error.
            UnexpectedResponseError: The task is completed without images.

        Credits:
            As for `submit_edit`.

        Source: "Edit Images".
        """
        started = anyio.current_time()
        task = await self.submit_edit(prompt, images, model=model, quality=quality, aspect_ratio=aspect_ratio)
        return await task._wait_until(started, timeout)

    def task(self, task_id: str) -> AsyncTask:
        """Pick a task up again by its id, in any process. Does no I/O.

        Raises:
            InvalidRequestError: It cannot be a task id.

        Source: "Step 2: Poll for Results".
        """
        return AsyncTask(self._poller, check_task_id(task_id))

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
        try:
            return await self._downloads.read(image)
        except Expired:
            image = await self._refreshed(image)
        try:
            return await self._downloads.read(image)
        except Expired:
            raise _expired(image) from None

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
        return estimate(prompts_or_count, model=model, quality=quality)

    @property
    def credits_remaining(self) -> int | None:
        """The credits left in the account as of the last answer that said so, or None: there is no way to ask."""
        return self._credits_remaining

    async def _submit(self, call: ApiCall, request: GenerateRequest | EditRequest) -> AsyncTask:
        try:
            submission = await self._transport.submit(call, request)
        except ConceptVizError as error:
            self._note_credits(getattr(error, "credits_remaining", None))
            raise
        self._note_credits(submission.credits_remaining)
        expected = request.expected_credits
        if expected is not None and submission.credits_used not in {None, expected}:
            logger.warning(
                "Task %s cost %s credits where the API page says %s: the prices may have changed.",
                submission.task_id,
                submission.credits_used,
                expected,
            )
        task = AsyncTask(self._poller, submission.task_id, submission, anyio.current_time())
        try:
            await self._emit(Submitted(task_id=submission.task_id, submission=submission))
        except BaseException:
            logger.warning("on_event ended a submit after it was paid for: take it up with task(%r).", task.id)
            raise
        return task

    async def _save(self, image: Image, folder: Path, overwrite: bool) -> Path:
        try:
            path = await self._downloads.save(image, folder, overwrite=overwrite)
        except Expired:
            image = await self._refreshed(image)
            try:
                path = await self._downloads.save(image, folder, overwrite=overwrite)
            except Expired:
                raise _expired(image) from None
        await self._emit(Saved(task_id=image.task_id, image=image, path=path))
        return path

    async def _refreshed(self, image: Image) -> Image:
        """Look at an image's task once more, for a fresh URL."""
        if image.task_id is None:
            raise _expired(image)
        try:
            state = await self._transport.look_patiently(image.task_id, ())
        except ConceptVizError as error:
            raise _expired(image) from error
        for fresh in state.images:
            same = fresh.sha256 == image.sha256 if image.sha256 else fresh.index == image.index
            if same or len(state.images) == 1:
                return Image(fresh.url, image.prompt, image.index, image.sha256, fresh.raw, image.task_id)
        raise _expired(image)

    def _note_credits(self, credits_remaining: int | None) -> None:
        if credits_remaining is not None:
            self._credits_remaining = credits_remaining

    async def _emit(self, event: Event) -> None:
        if self._on_event is not None:
            outcome = self._on_event(event)
            if inspect.isawaitable(outcome):
                await outcome


def _expired(image: Image) -> DownloadError:
    return DownloadError(
        "The image's URL has expired, and a fresh look at its task gave no other. It is paid for: look at the task "
        "again later, or ask the service's support.",
        url=image.url,
        task_id=image.task_id,
    )
