"""One paid submit, from the reservation of its credits to the receipt: where money is spent, and nowhere else.

The order is the promise. Credits are reserved and the attempt is written down (INTENT); a fresh connection is made; the
attempt is written down again at the last moment before its first byte (SENDING); the answer is read, its task id is
written down (ACCEPTED), and only then does anybody hear of it. All of it runs in a task that the caller's cancellation
does not reach once a byte may have left. What must never live here: a JSON key, HTTP, a rule about what may be sent
again (`_policy`).
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from random import Random
from typing import TYPE_CHECKING

import anyio
from anyio import to_thread
from attrs import define, evolve, field, frozen

from ._budget import Budget, Reservation
from ._calls import ApiCall, fingerprint
from ._detached import GRACE, Stake, to_the_end
from ._errors import (
    ConceptVizError,
    Credits,
    GenerationFailedError,
    InsufficientCreditsError,
    JournalError,
    NotSentError,
    SubmissionUnknownError,
)
from ._events import Event, Retrying, Submitted, differences
from ._models import Retries, Submission, TaskState
from ._policy import retry_delay
from ._spec import STATUS_FAILED
from ._transport import Transport
from ._wire import read_receipt, read_state

if TYPE_CHECKING:
    from ._journal import Claim, Journal, JournalEntry
    from ._requests import EditRequest, GenerateRequest

logger = logging.getLogger("conceptviz")

# Seconds between two looks into the journal for what another caller's submit of the same key has come to.
_JOURNAL_PAUSE = 0.1


@frozen
class Paid:
    """A task that is paid for: by this submit, or by an earlier one of the same key.

    Attributes:
        submission: The receipt.
        is_new: Whether this submit made the task.
        end: How the task ended, if the journal knows that already.
        reservation: What the task cost of the budget, to be given back if it is refunded.
    """

    submission: Submission
    is_new: bool = True
    end: TaskState | None = None
    reservation: Reservation | None = None


@define
class Submits:
    """Where credits are spent.

    Attributes:
        transport: The API.
        retries: How often what is safe to repeat is repeated.
        budget: What may be spent, or None for anything.
        journal: Where it is written down, or None.
        account: A fingerprint of the API key.
        base_url: The API's base URL.
        timeout: Seconds for one HTTP exchange.
        emit: Called with each event.
        rng: The randomness of the pauses.
        credits_remaining: The credits left in the account as of the last answer that said so.
    """

    transport: Transport
    retries: Retries
    budget: Budget | None
    journal: Journal | None
    account: str
    base_url: str
    timeout: float
    emit: Callable[[Event], Awaitable[None]]
    rng: Random
    credits_remaining: int | None = None
    _under_way: set[_Submit] = field(factory=set, init=False)

    async def submit(self, call: ApiCall, request: GenerateRequest | EditRequest) -> Paid:
        """Pay for a piece of work, or find that it is paid for, and tell the hook what came of it.

        Raises:
            BudgetExceededError: The budget does not allow it. Nothing was sent.
            NotSentError: No connection was made. Nothing was spent.
            SubmissionUnknownError: It was sent and may have been charged, now or by an earlier submit of this key.
            JournalError: It could not be written down: before it was sent, or after, with the receipt.
            APIStatusError: The service refused it.
            GenerationFailedError: The service failed at once.
        """
        submit = _Submit(self, call, request)
        self._under_way.add(submit)
        try:
            try:
                paid = await to_the_end(submit.run)
            finally:
                self._under_way.discard(submit)
                submit.done.set()
            if paid.is_new:
                await self.emit(Submitted(task_id=paid.submission.task_id, submission=paid.submission))
                for difference in differences(request, paid.submission):
                    logger.warning("%s", difference)
                    await self.emit(difference)
        except (JournalError, SubmissionUnknownError):
            raise  # they carry what is known
        except BaseException:
            submit.warn()
            raise
        return paid

    async def settled(self) -> None:
        """Wait for the answers to what has been sent, whose ids would be lost with the connections; not for ever."""
        if self._under_way:
            with anyio.move_on_after(GRACE):
                while sent := [submit for submit in self._under_way if submit.is_held]:
                    await sent[0].done.wait()

    async def unended(self) -> list[Paid]:
        """Return what the journal knows as paid for and not ended, by this account at this API."""
        if self.journal is None:
            return []
        from ._attempts import AttemptState

        entries = await to_thread.run_sync(self.journal.entries, AttemptState.ACCEPTED)
        ours = [e for e in entries if (e.account, e.base_url) == (self.account, self.base_url)]
        return [paid for entry in ours if (paid := _recall(entry)) is not None]

    async def end(self, state: TaskState, reservation: Reservation | None) -> None:
        """Take in how a task ended: a refund goes back into the budget, the end into the journal.

        To lose this costs a look at the task, never money: an error of the journal is logged.
        """
        if reservation is not None and state.credits_refunded:
            reservation.refund()
        if self.journal is not None:
            try:
                await to_thread.run_sync(self.journal.finished, state)
            except JournalError as error:
                logger.warning("The end of task %s was not written down: %s", state.task_id, error)


class _Submit:
    """One call of `Submits.submit`."""

    def __init__(self, submits: Submits, call: ApiCall, request: GenerateRequest | EditRequest) -> None:
        self._submits = submits
        self._journal = submits.journal
        self._call = call
        self._request = request
        self._stake = Stake()
        self._attempt: str | None = None
        self._reservation: Reservation | None = None
        self._sent_at: float | None = None
        self._refusal: ConceptVizError | None = None
        self._is_unknown = False
        self.submission: Submission | None = None
        self.done = anyio.Event()

    @property
    def is_held(self) -> bool:
        """Whether it must not be broken off: whoever was interrupted in waiting for it sees to that himself."""
        return self._stake.is_held and not self._stake.is_stopped

    async def run(self, stake: Stake) -> Paid:
        """Submit, again and again where that is safe, until it is paid, refused or unknown, or is to stop."""
        self._stake = stake
        # Before anything is written down: an INTENT has a time limit, and a queue may be long.
        turns = await self._submits.transport.take_turn()
        try:
            return await self._run()
        finally:
            turns.give_back("submit")

    async def _run(self) -> Paid:
        try:
            known = await self._begin()
            if known is not None:
                return known
            submission = await self._send()
        except BaseException as error:
            with anyio.CancelScope(shield=True):
                # What ends the pause after a refusal changes nothing about the refusal.
                await self._give_up(self._refusal or error)
            raise
        return Paid(submission, reservation=self._reservation)

    def warn(self) -> None:
        """Tell the log what an interrupted caller does not hear."""
        if self.submission is not None:
            logger.warning(
                "Interrupted after task %s was accepted: it is paid for and goes on; task(%r).wait() takes it up.",
                self.submission.task_id,
                self.submission.task_id,
            )
        elif self._is_unknown:
            logger.warning(
                "Interrupted after a submit was sent and before its answer was read: it may have been charged%s.",
                f" (attempt {self._attempt} in the journal)" if self._attempt else "",
            )

    async def _begin(self) -> Paid | None:
        """Reserve the credits and write INTENT down, unless the key's work is paid for already."""
        if self._journal is None:
            self._reserve()
            return None
        sha256 = await to_thread.run_sync(fingerprint, self._call)
        while True:
            claim = await to_thread.run_sync(self._claim, self._journal, sha256)
            if claim.is_ours:
                self._attempt = claim.entry.id
                return None
            known = _recall(claim.entry)
            if known is not None:
                return known
            await anyio.sleep(_JOURNAL_PAUSE)

    def _reserve(self) -> None:
        budget = self._submits.budget
        if budget is not None:
            self._reservation = budget.reserve(self._request.expected_credits)

    def _claim(self, journal: Journal, sha256: str) -> Claim:
        submits, request, retries = self._submits, self._request, self._submits.retries
        return journal.claim(
            key=request.key,
            fingerprint=sha256,
            account=submits.account,
            base_url=submits.base_url,
            endpoint=self._call.path,
            prompts=request.prompts,
            settings=request.settings,
            expected_credits=request.expected_credits,
            seconds=retries.attempts * (submits.timeout + max(retries.max_retry_after, retries.max_delay)) + GRACE,
            reserve=self._reserve,
        )

    async def _send(self) -> Submission:
        for number in itertools.count(1):
            try:
                submission = await self._submits.transport.submit(self._call, self._request, self._before_first_byte)
            except ConceptVizError as error:  # noqa: PERF203 - a try is what an attempt is
                delay = retry_delay(error, number, self._submits.retries, self._submits.rng, spends=True)
                if delay is None or self._stake.is_stopped:
                    raise
                self._refusal = error
                self._stake.is_held = False
                await self._submits.emit(Retrying(task_id=None, attempt=number, delay=delay, error=error))
                await anyio.sleep(delay)
                if self._journal is not None and self._attempt is not None:
                    await to_thread.run_sync(self._journal.send_again, self._attempt)
                self._refusal = self._sent_at = None
            else:
                await self._accept(submission)
                return submission
        raise AssertionError("unreachable")  # pragma: no cover - itertools.count has no end

    async def _before_first_byte(self) -> None:
        """Write SENDING down. If that fails no byte has left, and none will."""
        if self._stake.is_stopped:
            raise NotSentError("Stopped at the last moment before it was sent. Nothing was spent.")
        self._stake.is_held = True
        if self._journal is not None and self._attempt is not None:
            await to_thread.run_sync(self._journal.sending, self._attempt)
        self._sent_at = time.time()

    async def _accept(self, submission: Submission) -> None:
        self.submission = submission
        if submission.credits_remaining is not None:
            self._submits.credits_remaining = submission.credits_remaining
        if self._reservation is not None:
            self._reservation.settle(submission.credits_used)
        if self._journal is not None and self._attempt is not None:
            try:
                await to_thread.run_sync(self._journal.accepted, self._attempt, submission)
            except Exception as error:  # whatever it is, the id must not be lost
                logger.error(  # noqa: TRY400 - the sentence says it all, and holds the id
                    "Task %s is paid for, and could not be written into the journal: keep this id. %s",
                    submission.task_id,
                    error,
                )
                raise JournalError(
                    f"Task {submission.task_id} was accepted and is paid for, but could not be written down: {error} "
                    "Keep the id: task(id).wait() takes it up.",
                    submission=submission,
                ) from error

    async def _give_up(self, error: BaseException) -> None:
        """Write down what an attempt came to, and give back what it certainly did not cost."""
        from ._attempts import AttemptState  # loaded by those who keep a journal, and where a submit came to nothing

        if isinstance(error, JournalError) and error.submission is not None:
            return
        if isinstance(error, SubmissionUnknownError):
            error.attempt_id = error.attempt_id or self._attempt
            error.endpoint = self._call.path
            error.sent_at = self._sent_at
            error.request_sha256 = await to_thread.run_sync(fingerprint, self._call)
            error.credits_remaining = self._submits.credits_remaining
        if isinstance(error, InsufficientCreditsError) and error.credits_remaining is not None:
            self._submits.credits_remaining = error.credits_remaining
        if isinstance(error, SubmissionUnknownError):
            state = AttemptState.UNKNOWN
        elif isinstance(error, GenerationFailedError):
            state = AttemptState.FAILED
        elif isinstance(error, ConceptVizError) and error.credits is Credits.NOT_SPENT:
            is_unsent = self._sent_at is None or isinstance(error, NotSentError)
            state = AttemptState.NOT_SENT if is_unsent else AttemptState.REJECTED
        else:
            state = AttemptState.UNKNOWN if self._sent_at is not None else AttemptState.NOT_SENT
        self._is_unknown = state is AttemptState.UNKNOWN
        if self._reservation is not None and state in {AttemptState.NOT_SENT, AttemptState.REJECTED}:
            self._reservation.release()
        if self._journal is not None and self._attempt is not None:
            # The text of a cancellation says nothing to a reader, and that of a hook's error may say too much.
            reason = str(error)[:1000] if isinstance(error, ConceptVizError) else f"stopped ({type(error).__name__})"
            try:
                await to_thread.run_sync(self._journal.ended, self._attempt, state, reason)
            except JournalError as failure:
                # What stands there is read rightly all the same: INTENT was not sent, SENDING may have been charged.
                logger.warning("The end of attempt %s was not written down: %s", self._attempt, failure)


def _recall(entry: JournalEntry) -> Paid | None:
    """Return what an earlier submit of the key has paid for, or None while it is under way.

    Raises:
        SubmissionUnknownError: It may have been charged, and nobody knows.
    """
    from ._attempts import AttemptState

    if entry.state is AttemptState.UNKNOWN:
        error = SubmissionUnknownError(
            f"An earlier submit of the key {entry.key!r} was sent and never answered: it may have been charged, so it "
            "is not sent again. Compare the credits in your account, then settle it: `conceptviz journal resolve "
            f"{entry.id}`, or Journal.resolve.",
            expected_credits=entry.expected_credits,
        )
        error.attempt_id = entry.id
        raise error
    if entry.task_id is None:
        return None
    end = None if entry.answer is None else read_state(entry.task_id, entry.prompts, entry.answer)
    if end is not None and entry.state is AttemptState.FAILED:
        end = evolve(end, status=STATUS_FAILED)  # an HTTP 500 says so without the word
    return Paid(read_receipt(entry.task_id, entry.prompts, entry.receipt or {}), is_new=False, end=end)
