"""Time and repetition, without a clock: the retry table row by row, the pauses, and what the looks at a task mean."""

from __future__ import annotations

import json
import logging
import ssl
from random import Random
from typing import Any

import pytest

from conceptviz import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConceptVizError,
    Credits,
    DownloadError,
    GenerationFailedError,
    Image,
    InsufficientCreditsError,
    InvalidImageError,
    InvalidRequestError,
    JournalError,
    ModerationBlockedError,
    NotSentError,
    PlanError,
    PlanLimitExceededError,
    Polling,
    PollInterruptedError,
    RateLimitedError,
    Retries,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    TaskState,
    UnexpectedResponseError,
    WaitTimeoutError,
)
from conceptviz._policy import Watch, backoff, ends_submitting, is_divisible, pause_after_look, retry_delay

ID = "vaW29_MJ1wbnyFU4bl_pd"


class Loaded(Random):
    """Randomness that always falls on one end of the range, or anywhere between."""

    def __init__(self, share: float) -> None:
        super().__init__(0)
        self.share = share

    def uniform(self, a: float, b: float) -> float:
        return a + (b - a) * self.share


LOW, HIGH = Loaded(0.0), Loaded(1.0)
RETRIES = Retries(attempts=3, base_delay=0.5, max_delay=8.0, max_retry_after=60.0)
POLLING = Polling()


def error_of(cls: type[ConceptVizError], **more: Any) -> ConceptVizError:
    if issubclass(cls, APIStatusError):
        more.setdefault("status_code", 500)
        return cls("x", **more)
    if cls is UnexpectedResponseError:
        return UnexpectedResponseError("x", status_code=200)
    if cls is DownloadError:
        return DownloadError("x", url="https://h/")
    if cls is WaitTimeoutError:
        return WaitTimeoutError("x", task_id=ID)
    return cls("x")


# Class, may a submit that ended so be sent again, may a read.
TABLE: list[tuple[type[ConceptVizError], bool, bool]] = [
    (NotSentError, True, True),
    (RateLimitedError, True, True),
    (SubmissionUnknownError, False, False),
    (PollInterruptedError, False, True),
    (UnexpectedResponseError, False, True),
    (ServerError, False, True),
    (DownloadError, False, True),
    (InvalidRequestError, False, False),
    (BudgetExceededError, False, False),
    (JournalError, False, False),
    (APIStatusError, False, False),
    (BadRequestError, False, False),
    (ModerationBlockedError, False, False),
    (InvalidImageError, False, False),
    (AuthenticationError, False, False),
    (InsufficientCreditsError, False, False),
    (PlanError, False, False),
    (PlanLimitExceededError, False, False),
    (TaskNotFoundError, False, False),
    (GenerationFailedError, False, False),
    (WaitTimeoutError, False, False),
    (ConceptVizError, False, False),
]


def subclasses(cls: type[ConceptVizError]) -> set[type[ConceptVizError]]:
    return {cls}.union(*(subclasses(sub) for sub in cls.__subclasses__()))


def test_the_table_has_a_row_for_each_error() -> None:
    """A new way to fail takes a decision about money."""
    ours = {cls for cls in subclasses(ConceptVizError) if cls.__module__.startswith("conceptviz.")}
    assert {row[0] for row in TABLE} == ours


@pytest.mark.parametrize(("cls", "submit", "read"), TABLE)
def test_the_retry_table(cls: type[ConceptVizError], submit: bool, read: bool) -> None:
    """A submit is sent again only if it was never sent, or was refused for its haste."""
    for attempt in (1, 2):
        assert (retry_delay(error_of(cls), attempt, RETRIES, HIGH, spends=True) is not None) is submit
        assert (retry_delay(error_of(cls), attempt, RETRIES, HIGH, spends=False) is not None) is read
    for spends in (True, False):
        assert retry_delay(error_of(cls), 3, RETRIES, HIGH, spends=spends) is None
        assert retry_delay(error_of(cls), 1, Retries(attempts=1), HIGH, spends=spends) is None


@pytest.mark.parametrize("spends", [True, False])
def test_tls_that_was_refused_is_not_asked_again(spends: bool) -> None:
    """A certificate will be the same the next time."""
    error = NotSentError("x")
    error.__cause__ = ssl.SSLCertVerificationError()
    assert retry_delay(error, 1, RETRIES, HIGH, spends=spends) is None
    error.__cause__ = OSError()
    assert retry_delay(error, 1, RETRIES, HIGH, spends=spends) is not None


DIVISIBLE: set[type[ConceptVizError]] = {ModerationBlockedError, PlanLimitExceededError, BudgetExceededError}


@pytest.mark.parametrize("cls", [row[0] for row in TABLE])
def test_what_a_batch_is_taken_apart_for(cls: type[ConceptVizError]) -> None:
    """What is refused for one of its prompts, or for their number, and only if nothing was spent on it."""
    more: dict[str, Any] = {"credits": Credits.NOT_SPENT} if issubclass(cls, APIStatusError) else {}
    assert is_divisible(error_of(cls, **more)) is (cls in DIVISIBLE)
    if issubclass(cls, APIStatusError):
        for credits in (Credits.SPENT, Credits.UNKNOWN, Credits.REFUNDED):
            assert not is_divisible(error_of(cls, credits=credits))


FINAL: set[type[ConceptVizError]] = {InsufficientCreditsError, AuthenticationError, PlanError}


@pytest.mark.parametrize("cls", [row[0] for row in TABLE])
def test_what_ends_the_submitting(cls: type[ConceptVizError]) -> None:
    """What any other submit would be refused for too; what is said of one request, or of a task, is not."""
    assert ends_submitting(error_of(cls)) is (cls in FINAL)
    if issubclass(cls, APIStatusError):
        assert ends_submitting(error_of(cls, code="PLAN_REQUIRED")) is (cls in FINAL)
        assert not ends_submitting(error_of(cls, code="QUALITY_NOT_ALLOWED"))
        assert not ends_submitting(error_of(cls, task_id=ID))


@pytest.mark.parametrize(
    ("attempt", "longest"), [(1, 0.5), (2, 1.0), (3, 2.0), (4, 4.0), (5, 8.0), (6, 8.0), (9**9, 8.0)]
)
def test_backoff_doubles_up_to_its_bound(attempt: int, longest: float) -> None:
    """Full jitter: anything from none to the bound."""
    assert backoff(attempt, RETRIES, LOW) == 0.0
    assert backoff(attempt, RETRIES, HIGH) == longest
    assert backoff(attempt, RETRIES, Loaded(0.5)) == longest / 2


def test_backoff_is_spread() -> None:
    """Clients that failed together do not come back together."""
    rng = Random(1)
    delays = {backoff(5, RETRIES, rng) for _ in range(50)}
    assert len(delays) == 50
    assert min(delays) < 2.0
    assert max(delays) > 6.0


@pytest.mark.parametrize(
    ("asked", "delay"), [(None, 0.5), (0.0, 0.5), (0.1, 0.5), (7.0, 7.0), (60.0, 60.0), (60.5, None), (1e9, None)]
)
def test_a_pause_that_was_asked_for_is_kept_within_bounds(asked: float | None, delay: float | None) -> None:
    """M87: never sooner than asked, and not at all if that is too long to wait for."""
    error = error_of(RateLimitedError, retry_after=asked)
    for spends in (True, False):
        assert retry_delay(error, 1, RETRIES, HIGH, spends=spends) == delay
    assert retry_delay(error_of(ServerError, retry_after=asked), 1, RETRIES, HIGH, spends=False) == delay


def test_the_pause_after_a_look() -> None:
    """Regular after an answer; after failures longer and longer, and as long as the service asks."""
    watch = Watch(ID)
    assert pause_after_look(watch, None, 5.0, RETRIES, HIGH) == 5.0
    error = error_of(ServerError)
    pauses = []
    for _ in range(6):
        watch.judge_error(error, 0.0)
        pauses.append(pause_after_look(watch, error, 5.0, RETRIES, HIGH))
    assert pauses == [5.0, 5.0, 5.0, 5.0, 8.0, 8.0]
    assert pause_after_look(watch, error, 3.0, RETRIES, LOW) == 3.0
    assert pause_after_look(watch, error_of(RateLimitedError, retry_after=90.0), 5.0, RETRIES, HIGH) == 90.0
    assert pause_after_look(watch, error_of(ServerError, retry_after=20.0), 3.0, RETRIES, LOW) == 20.0
    assert pause_after_look(watch, None, 4.0, RETRIES, Loaded(0.5)) == 4.0


@pytest.mark.parametrize(
    "cls", [ServerError, UnexpectedResponseError, PollInterruptedError, RateLimitedError, NotSentError]
)
def test_a_row_of_hiccups_is_never_a_failed_task(cls: type[ConceptVizError]) -> None:
    """M41: 20 in a row, then completed."""
    watch = Watch(ID, accepted_at=0.0)
    for n in range(20):
        assert watch.judge_error(error_of(cls), now=4.0 * n) is False
        assert watch.failures == n + 1
    assert watch.judge_state(TaskState(ID, "processing")) is True
    assert watch.failures == 0


@pytest.mark.parametrize(
    "cls",
    [
        AuthenticationError,
        PlanError,
        BadRequestError,
        InsufficientCreditsError,
        GenerationFailedError,
        InvalidRequestError,
    ],
)
def test_a_refused_look_ends_the_wait(cls: type[ConceptVizError]) -> None:
    """M43: looking again would be refused again; the error itself is raised, and says nothing of a failed task."""
    error = error_of(cls)
    with pytest.raises(cls) as caught:
        Watch(ID, accepted_at=0.0).judge_error(error, now=1.0)
    assert caught.value is error


def test_a_task_may_be_invisible_for_a_moment_after_its_accept() -> None:
    """M42: 30 seconds from our own accept."""
    watch, error = Watch(ID, accepted_at=100.0), error_of(TaskNotFoundError)
    assert watch.judge_error(error, now=100.0) is False
    assert watch.judge_error(error, now=129.9) is False
    assert watch.judge_state(TaskState(ID, "processing"))
    with pytest.raises(TaskNotFoundError):
        watch.judge_error(error, now=130.0)


def test_a_task_picked_up_by_its_id_is_not_found_at_once() -> None:
    """M42: nobody knows when it was accepted, if it ever was."""
    with pytest.raises(TaskNotFoundError):
        Watch(ID).judge_error(error_of(TaskNotFoundError), now=0.0)


def failed_look(**more: Any) -> ConceptVizError:
    return error_of(ServerError, code="GENERATION_FAILED", **more)


def test_a_failure_as_http_500_must_be_seen_twice() -> None:
    """M90: at least 3 seconds apart."""
    watch = Watch(ID)
    assert watch.judge_error(failed_look(), now=10.0) is False
    assert watch.judge_error(failed_look(), now=12.9) is False
    assert watch.judge_error(failed_look(), now=13.0) is True


@pytest.mark.parametrize("between", ["answer", "other error"])
def test_the_two_must_follow_one_another(between: str) -> None:
    """M90: an answer, or another hiccup, between them starts the count anew."""
    watch = Watch(ID)
    assert watch.judge_error(failed_look(), now=10.0) is False
    if between == "answer":
        watch.judge_state(TaskState(ID, "processing"))
    else:
        watch.judge_error(error_of(ServerError), now=12.0)
    assert watch.judge_error(failed_look(), now=14.0) is False
    assert watch.judge_error(failed_look(), now=17.0) is True


def test_another_500_is_not_a_failure_however_often() -> None:
    watch = Watch(ID)
    for n in range(10):
        assert watch.judge_error(error_of(ServerError, code="CREDIT_CONSUMPTION_FAILED"), now=10.0 * n) is False


def test_a_failed_body_counts_at_once() -> None:
    """Source: "Response (failed)": the service says it with HTTP 200."""
    assert Watch(ID).judge_state(TaskState(ID, "failed")) is True


def test_a_completed_task_counts_at_once() -> None:
    assert Watch(ID).judge_state(TaskState(ID, "completed", (Image("https://h/x.png"),))) is True


def test_a_completed_task_without_images_is_looked_at_three_times() -> None:
    """M46: then it is malformed, and its answer is kept."""
    watch, raw = Watch(ID), {"status": "completed", "images": None}
    state = TaskState(ID, "completed", raw=raw)
    assert watch.judge_state(state) is False
    assert watch.judge_state(state) is False
    with pytest.raises(UnexpectedResponseError) as caught:
        watch.judge_state(state)
    error = caught.value
    assert (error.task_id, error.status_code, error.credits) == (ID, 200, Credits.SPENT)
    assert json.loads(error.body) == raw
    assert "look again later" in str(error)


def test_images_that_come_late_are_taken() -> None:
    """M46."""
    watch = Watch(ID)
    assert watch.judge_state(TaskState(ID, "completed")) is False
    assert watch.judge_state(TaskState(ID, "completed", (Image("https://h/x.png"),))) is True


def test_an_unknown_status_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """M44: it is waited for."""
    watch = Watch(ID)
    for status in ("pending", "processing"):
        assert watch.judge_state(TaskState(ID, status)) is True
    assert not caplog.records
    for status in ("queued", "enhancing", ""):
        assert watch.judge_state(TaskState(ID, status)) is True
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "'queued'" in caplog.text
    assert ID in caplog.text


def test_a_terminal_status_is_no_unknown_one(caplog: pytest.LogCaptureFixture) -> None:
    Watch(ID).judge_state(TaskState(ID, "failed"))
    assert not caplog.records
