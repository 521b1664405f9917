"""generate_many: any number of prompts, submitted, waited for and saved, with one outcome for each.

It goes on in the background while its user works on an outcome: one task draws items and submits batches, a few workers
look at all that wait (`_poller.Board`), and whatever ends is delivered. What must never live here: HTTP, a JSON key, a
decision about money (`_policy`).
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, suppress

import anyio
import anyio.abc
from attrs import define, evolve

from ._batches import Batch, Items, Options, as_batch, check_items, draw
from ._budget import Reservation
from ._calls import build_generate
from ._core import Core
from ._detached import GRACE, spawn
from ._errors import (
    ConceptVizError,
    DownloadError,
    InvalidRequestError,
    JournalError,
    NotSentError,
    PlanLimitExceededError,
)
from ._models import Outcome, Result, Submission, TaskState
from ._outcomes import no_image, not_submitted, outcomes_of
from ._policy import ends_submitting, is_divisible
from ._poller import Board, Looks, Signal, kind_of
from ._requests import EditRequest
from ._spec import EDIT_PATH, GENERATE_PATH
from ._submits import Paid
from ._uploads import build_edit_call

logger = logging.getLogger("conceptviz")

# Seconds without a new item after which a batch is sent that is not full.
_PAUSE = 0.1
# What part of the looks there may be while submits go as fast as they may, and until they are late by so many times the
# longest time between two.
_FEW = 8
_LATE = 2.0


@define(eq=False, repr=False, weakref_slot=False)
class _Flight:
    """A batch that is paid for, and waits for its task. There may be thousands: it holds no more than it must.

    Attributes:
        batch: The batch.
        looks: The looks at its task.
        credits_used: What it cost, as far as the service said.
        reservation: The same, of the budget.
        submission: The receipt, if there is a hook that will want it.
    """

    batch: Batch
    looks: Looks
    credits_used: int | None
    reservation: Reservation | None
    submission: Submission | None


class Run:
    """One call of generate_many.

    Args:
        core: The client's parts.
        items: What to generate.
        options: How.
    """

    def __init__(self, core: Core, items: Items, options: Options) -> None:
        check_items(items)
        self._core = core
        self._items = items
        self._options = options
        self._size = options.batch_size
        # Drawn and not yet put together, put together and refused, ready to be taken by the user, and out of order.
        self._drawn: deque[tuple[int, object]] = deque()
        self._again: deque[Batch] = deque()
        self._ready: deque[Outcome] = deque()
        self._early: dict[int, Outcome] = {}
        self._drawn_prompts = self._delivered = 0
        self._is_drawn = False
        self._unfinished = self._submitting = 0
        self._refusal: ConceptVizError | None = None
        self._error: BaseException | None = None
        self._keys: dict[str, tuple[Batch, list[Batch], list[Outcome]]] = {}
        self._flights: set[_Flight] = set()
        self._changed, self._space, self._arrived = Signal(), Signal(), Signal()
        self._task: object = None
        self._is_over = self._is_left = False

    async def next(self) -> Outcome:
        """Return the next outcome.

        Raises:
            StopAsyncIteration: There is none any more.
            Exception: What the items or a hook raised, when all that was accepted has been delivered.
        """
        if self._task is None and not self._is_over:
            self._begin()
        while not self._ready:
            if self._is_over:
                error, self._error = self._error, None
                if error is not None:
                    raise error
                raise StopAsyncIteration
            await self._arrived.wait()
        self._changed.set()
        return self._ready.popleft()

    async def stop(self) -> None:
        """Begin nothing new, hear the answers to submits under way, and stop. Paid tasks go on at the service."""
        self.leave()
        self._is_over = self._is_over or self._task is None
        with anyio.move_on_after(2 * GRACE):  # not for ever, should its event loop have ended
            while not self._is_over:
                await self._arrived.wait()

    def leave(self) -> None:
        """Have it stop soon, without waiting; from any thread."""
        self._is_left = True
        self._refusal = self._refusal or NotSentError("Not submitted: the run was left. Nothing was spent.")
        if not self._is_over and self._task is not None and threading.get_ident() == self._thread:
            with suppress(RuntimeError):  # the event loop has ended, and this with it
                self._scope.cancel()

    def _begin(self) -> None:
        self._thread = threading.get_ident()
        self._scope = anyio.CancelScope()
        self._core.background.add(self)
        self._task = spawn(self._work)

    async def _work(self) -> None:
        try:
            with self._scope:
                async with anyio.create_task_group() as tasks:
                    self._tasks = tasks
                    self._board: Board[_Flight] = Board(tasks, self._most_looks, self._ended)
                    tasks.start_soon(self._draw)
                    await self._submit_all()
                    while self._unfinished:
                        await self._changed.wait()
                    tasks.cancel_scope.cancel()
        except anyio.get_cancelled_exc_class():
            raise  # the event loop ends
        except BaseException as error:  # noqa: BLE001 - raised to the user
            self._error = _single(error)
        finally:
            self._is_over = True
            self._core.background.discard(self)
            self._tell_unfinished()
            self._arrived.set()

    def _tell_unfinished(self) -> None:
        """Name the tasks that are paid for and not waited for any more: none is lost in silence."""
        for flight in self._flights:
            flight.looks.leave()
        # What is ready can be taken still, unless the run was left; what is out of order waits for what never comes.
        untaken = [*(self._ready if self._is_left else ()), *self._early.values()]
        ids = {flight.looks.task_id for flight in self._flights}
        ids |= {outcome.task_id for outcome in untaken if outcome.task_id}
        if ids:
            logger.warning(
                "Left %d tasks whose outcomes nobody took. They are paid for and go on at the service; %s",
                len(ids),
                "the journal has them: run the same keys again, or take them up with resume()."
                if self._core.journal is not None
                else f"task(id).wait() takes each up again: {' '.join(sorted(ids))}",
            )

    async def _draw(self) -> None:
        """Draw the items, and no more of them than are soon submitted."""
        index = 0
        try:
            async with aclosing(draw(self._items)) as items:
                async for item in items:
                    self._drawn.append((index, item))
                    index += 1
                    self._changed.set()
                    while len(self._drawn) >= self._size * max(1, self._room()):
                        await self._space.wait()
        except Exception as error:  # noqa: BLE001 - raised to the user, when what was accepted has been delivered
            self._error = error
        self._is_drawn = True
        self._changed.set()

    async def _submit_all(self) -> None:
        """Submit batch after batch, as there is room for them."""
        while True:
            while not self._room():
                await self._changed.wait()
            batch = await self._next_batch()
            if batch is None:
                return
            key = batch.request.key
            if key is not None and key in self._keys:
                self._repeat(batch, key)
            elif self._refusal is not None:
                self._fail(batch, not_submitted(self._refusal))
            else:
                if key is not None:
                    self._keys[key] = (batch, [], [])
                self._unfinished += 1
                self._submitting += 1
                self._tasks.start_soon(self._submit, batch)

    def _room(self) -> int:
        """Return how many tasks may be begun: not too many unfinished, nor too many that nobody has taken."""
        options = self._options
        if len(self._ready) >= options.max_in_flight * options.batch_size:
            return 0
        submits = self._core.transport.most_submits - self._submitting
        return max(0, submits if self._refusal is not None else min(submits, options.max_in_flight - self._unfinished))

    def _most_looks(self) -> int:
        """Return how many looks may be under way: few of them while submits go as fast as they may.

        A submit that comes later has its task end later; a look that comes later finds what has ended all the same. But
        nobody is to wait for long to hear of it.
        """
        transport = self._core.transport
        is_submitting = 2 * self._submitting > transport.most_submits
        if not is_submitting or self._board.is_late(_LATE * self._core.poller.polling.max_interval):
            return transport.most_looks
        return max(1, transport.most_looks // _FEW)

    async def _next_batch(self) -> Batch | None:
        """Wait for a batch that is full, or that nothing is added to for a moment; None when there will be no more."""
        batch: Batch | None = None
        while True:
            if batch is None and self._again:
                return self._again.popleft()
            if self._drawn:
                index, item = self._drawn[0]
                try:
                    # One number for both where they are equal: it is kept for as long as the task waits.
                    place = index if index == self._drawn_prompts else self._drawn_prompts
                    next_ = as_batch(item, place, index)
                except InvalidRequestError as error:
                    self._take()
                    self._deliver(
                        self._drawn_prompts,
                        Outcome(index, item if isinstance(item, str) else "", error=error, credits_used=0),
                    )
                    self._drawn_prompts += 1
                    continue
                if batch is not None and not batch.takes(next_):
                    return batch
                self._take()
                self._drawn_prompts += next_.size
                batch = next_ if batch is None else batch.join(next_)
                if batch.size >= self._size or not batch.can_grow:
                    return batch
            elif self._is_drawn and (batch is not None or not self._submitting):
                return batch
            else:
                with anyio.move_on_after(math.inf if batch is None else _PAUSE) as scope:
                    await self._changed.wait()
                if scope.cancelled_caught:
                    return batch

    def _take(self) -> None:
        self._drawn.popleft()
        self._space.set()

    async def _submit(self, batch: Batch) -> None:
        request = batch.request
        endpoint = EDIT_PATH if isinstance(request, EditRequest) else GENERATE_PATH
        try:
            if isinstance(request, EditRequest):
                call = await build_edit_call(request)
            else:
                call = build_generate(request)
            paid = await self._core.submits.submit(call, request)
        except ConceptVizError as error:
            submission = error.submission if isinstance(error, JournalError) else None
            if submission is None:
                self._refused(batch, error)
                return
            paid = Paid(submission)  # its id is not in the journal, and in the log; the task is there all the same
        finally:
            self._submitting -= 1
            self._changed.set()
        now = anyio.current_time()
        looks = self._core.poller.looks(
            paid.submission.task_id,
            request.prompts,
            kind=kind_of(endpoint, paid.submission),
            accepted_at=now if paid.is_new else None,
            started=now,
            timeout=self._options.timeout,
        )
        submission = paid.submission if self._core.has_hook else None
        flight = _Flight(batch, looks, paid.submission.credits_used, paid.reservation, submission)
        looks.enter()
        self._flights.add(flight)
        if paid.end is None:
            self._board.push(flight)
        else:
            await self._ended(flight, paid.end)

    def _refused(self, batch: Batch, error: ConceptVizError) -> None:
        if is_divisible(error) and batch.can_be_halved:
            if isinstance(error, PlanLimitExceededError):
                self._size = min(self._size, batch.size // 2)
            self._again.extendleft(reversed(batch.halves()))
            self._unfinished -= 1
            self._changed.set()
            return
        if ends_submitting(error):
            self._refusal = self._refusal or error
        self._finish(batch, [error] * batch.size)

    async def _ended(self, flight: _Flight, end: TaskState | ConceptVizError) -> None:
        looks, batch = flight.looks, flight.batch
        if isinstance(end, TaskState):
            await self._core.submits.end(end, flight.reservation)
            try:
                elapsed = anyio.current_time() - looks.started_at
                result = await self._core.poller.announce(end, flight.submission, elapsed)
            except ConceptVizError as error:
                end = error
            else:
                self._tasks.start_soon(self._save, flight, result)
                return
        self._land(flight, [end] * batch.size)

    async def _save(self, flight: _Flight, result: Result) -> None:
        """Save the images, if they are to be saved, and deliver what became of each prompt."""
        found = {image.index: image for image in result.images}
        results: list[ConceptVizError | Outcome] = []
        for n, name in enumerate(flight.batch.names):
            image = found.get(n)
            if image is None:
                results.append(no_image(result))
                continue
            outcome = Outcome(0, "", image=image)
            if self._options.folder is not None:
                try:
                    path = await self._core.downloads.save(image, self._options.folder, overwrite=False, stem=name)
                except DownloadError as error:
                    outcome = evolve(outcome, error=error)
                else:
                    outcome = evolve(outcome, path=path)
                    await self._core.announce_saved(image, path)
            results.append(outcome)
        self._land(flight, results)

    def _land(self, flight: _Flight, results: Sequence[ConceptVizError | Outcome]) -> None:
        flight.looks.leave()
        self._flights.discard(flight)
        self._finish(flight.batch, results, flight.looks.task_id, flight.credits_used)

    def _finish(
        self,
        batch: Batch,
        results: Sequence[ConceptVizError | Outcome],
        task_id: str | None = None,
        credits_used: int | None = None,
    ) -> None:
        self._unfinished -= 1
        self._changed.set()
        outcomes = outcomes_of(batch, results, task_id, credits_used)
        for n, outcome in enumerate(outcomes):
            self._deliver(batch.place + n, outcome)
        key = batch.request.key
        if key is not None:
            _, repeats, kept = self._keys[key]
            kept += outcomes
            for repeat in repeats:
                self._copy(repeat, kept)

    def _fail(self, batch: Batch, error: ConceptVizError) -> None:
        for n, outcome in enumerate(outcomes_of(batch, [error] * batch.size)):
            self._deliver(batch.place + n, outcome)

    def _repeat(self, batch: Batch, key: str) -> None:
        """Give an item whose key was met before the outcome of the first: a key is one piece of work."""
        first, repeats, outcomes = self._keys[key]
        if evolve(batch.request, name=None) != evolve(first.request, name=None):
            self._fail(
                batch,
                InvalidRequestError(
                    f"The key {key!r} is that of item {first.index}, which asks for something else: a key names one "
                    "piece of work. Nothing was sent for this one: use another key."
                ),
            )
        elif outcomes:
            self._copy(batch, outcomes)
        else:
            repeats.append(batch)

    def _copy(self, batch: Batch, outcomes: Sequence[Outcome]) -> None:
        for n, outcome in enumerate(outcomes):
            # What it cost stands with the first of them, so that a sum over all counts it once.
            self._deliver(batch.place + n, evolve(outcome, index=batch.index, credits_used=0))

    def _deliver(self, place: int, outcome: Outcome) -> None:
        if self._options.ordered:
            self._early[place] = outcome
            while self._delivered in self._early:
                self._ready.append(self._early.pop(self._delivered))
                self._delivered += 1
        else:
            self._ready.append(outcome)
        self._arrived.set()


class Outcomes(AsyncIterator[Outcome]):
    """The outcomes of a run, which stops when this is closed or forgotten."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def __anext__(self) -> Outcome:
        return await self._run.next()

    async def aclose(self) -> None:
        """Stop: begin nothing new, and hear the answers to submits under way."""
        await self._run.stop()

    def __del__(self) -> None:
        self._run.leave()


def _single(error: BaseException) -> BaseException:
    """Return the error that a group of errors is about: no public call raises a group."""
    while inner := getattr(error, "exceptions", None):
        error = next((e for e in inner if not isinstance(e, anyio.get_cancelled_exc_class())), inner[0])
    return error
