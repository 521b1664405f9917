"""Waiting: its spacing, its bounds, and what each look's outcome means for it. On trio's virtual clock: no test waits.

The numbers M41 to M46, M87 and M90 are rows of the fault matrix.
"""

import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import anyio
import httpx
import pytest
from helpers import (
    KEY,
    RECEIPT,
    RUNNING,
    TASK,
    Chunks,
    Script,
    answer,
    assert_no_key,
    assert_no_key_logged,
    client,
    completed,
    failing,
    in_virtual_time,
    silence,
)

from conceptviz import (
    AsyncConceptViz,
    AsyncTask,
    AuthenticationError,
    ConceptVizError,
    Credits,
    GenerationFailedError,
    InvalidRequestError,
    ModerationBlockedError,
    PlanError,
    Polled,
    Polling,
    PollInterruptedError,
    Result,
    Retries,
    Retrying,
    TaskNotFoundError,
    UnexpectedResponseError,
    WaitTimeoutError,
)

NOT_FOUND = answer(404, {"error": "no", "code": "TASK_NOT_FOUND"})
FAILED_500 = answer(500, {"error": "Image generation failed", "code": "GENERATION_FAILED", "credits_refunded": True})
BUSY = {"error": "slow down", "code": "MODERATION_RATE_LIMITED"}


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


class Clocked(Script):
    """A script that notes when it is asked."""

    def __init__(self, *answers: Any) -> None:
        super().__init__(*answers)
        self.times: list[float] = []

    def __call__(self, request: httpx.Request) -> Any:
        self.times.append(anyio.current_time())
        return super().__call__(request)

    @property
    def gaps(self) -> list[float]:
        return [after - before for before, after in zip(self.times, self.times[1:], strict=False)]


def waiting(
    *answers: Any,
    submit: bool = True,
    wait: Callable[[AsyncTask], Awaitable[Any]] = lambda task: task.wait(),
    **options: Any,
) -> tuple[Any, Clocked, float]:
    """Wait for a task of ours (or one picked up by its id) with the documented times.

    Returns:
        The result or the error; the script; the seconds it took.
    """
    script = Clocked(*([RECEIPT] if submit else []), *answers)

    async def main() -> tuple[Any, float]:
        cv, _ = client(script, polling=options.pop("polling", Polling()), retries=Retries(), **options)
        async with cv:
            task = await cv.submit("a") if submit else cv.task(TASK)
            outcome: Any
            try:
                outcome = await wait(task)
            except ConceptVizError as error:
                assert_no_key(error)
                outcome = error
            return outcome, anyio.current_time()

    outcome, seconds = in_virtual_time(main)
    return outcome, script, seconds


def test_the_documented_spacing() -> None:
    """A look every 3 to 5 s from the submit on, each pause drawn anew."""
    outcome, script, _ = waiting(*[RUNNING] * 20, completed("a"))
    assert isinstance(outcome, Result)
    assert all(3.0 <= gap <= 5.0 for gap in script.gaps)
    assert len(set(script.gaps)) == 21
    assert script.count == 1 + 21


def test_a_task_picked_up_by_its_id_is_looked_at_at_once() -> None:
    outcome, script, seconds = waiting(completed("a"), submit=False)
    assert isinstance(outcome, Result)
    assert (script.count, seconds) == (1, 0.0)


def test_the_first_look_counts_from_the_submit() -> None:
    """Who waits later waits less; the look is due 3 to 5 s after the accept, not after the call of `wait`."""

    async def late(task: AsyncTask) -> Result:
        await anyio.sleep(2)
        return await task.wait()

    _, script, _ = waiting(completed("a"), wait=late)
    [gap] = script.gaps
    assert 3.0 <= gap <= 5.0


def test_another_loops_clock_does_not_put_the_first_look_off() -> None:
    """A task submitted in one loop may be waited for in another, whose clock began elsewhere."""
    script = Clocked(RECEIPT, completed("a"))
    cv, _ = client(script, polling=Polling())
    tasks: list[AsyncTask] = []

    async def submit() -> None:
        await anyio.sleep(10_000)
        tasks.append(await cv.submit("a"))

    async def wait() -> None:
        await tasks[0].wait()
        assert 3.0 <= anyio.current_time() <= 5.0
        await cv.aclose()

    in_virtual_time(submit)
    in_virtual_time(wait)


def test_custom_spacing() -> None:
    polling = Polling(min_interval=1, max_interval=1, first_look=10)
    _, script, _ = waiting(RUNNING, RUNNING, completed("a"), polling=polling)
    assert script.gaps == [10.0, 1.0, 1.0]


@pytest.mark.parametrize("timeout", [0.0, 2.0, 10.0, 87.0])
@pytest.mark.parametrize("look", [RUNNING, silence, answer(502, b""), answer(429, BUSY, {"retry-after": "45"})])
def test_the_deadline_bounds_everything(timeout: float, look: Any) -> None:
    """M91: looks that hang, their repetition, the pauses, the HTTP: the wait ends at its time, to the moment."""
    outcome, _, seconds = waiting(look, wait=lambda task: task.wait(timeout=timeout))
    assert isinstance(outcome, WaitTimeoutError)
    assert isinstance(outcome, TimeoutError)
    assert seconds == timeout
    assert (outcome.task_id, outcome.credits) == (TASK, Credits.SPENT)
    assert f"{timeout:g} s" in str(outcome)


def test_the_default_deadline_is_of_polling() -> None:
    outcome, _, seconds = waiting(RUNNING, polling=Polling(timeout=33))
    assert isinstance(outcome, WaitTimeoutError)
    assert seconds == 33


def test_a_body_that_drips_does_not_outlive_the_deadline() -> None:
    drip = lambda _: httpx.Response(200, stream=Chunks(b'{"status":', None))  # noqa: E731 - as short as it is clear
    outcome, _, seconds = waiting(drip, wait=lambda task: task.wait(timeout=20))
    assert isinstance(outcome, WaitTimeoutError)
    assert seconds == 20


def test_a_wait_that_timed_out_tells_what_it_saw_and_can_be_taken_up_elsewhere() -> None:
    """The error's id and last state are enough for another client, in another process."""
    outcome, _, _ = waiting(RUNNING, wait=lambda task: task.wait(timeout=10))
    assert isinstance(outcome, WaitTimeoutError)
    assert outcome.last_state is not None
    assert outcome.last_state.status == "processing"
    assert f"task({TASK!r})" in str(outcome)
    again, script, _ = waiting(
        completed("a"), submit=False, wait=lambda _: AsyncTask(_._poller, str(outcome.task_id)).wait()
    )
    assert isinstance(again, Result)
    assert script.paths == [f"GET /api/v1/task/{TASK}"]


def test_a_wait_without_an_answered_look_says_so() -> None:
    outcome, _, _ = waiting(failing(httpx.ReadError), wait=lambda task: task.wait(timeout=20))
    assert isinstance(outcome, WaitTimeoutError)
    assert outcome.last_state is None
    assert "no look at it was answered" in str(outcome)
    assert "looks failed" in str(outcome)


def test_a_wait_can_be_repeated_after_its_timeout() -> None:
    async def twice(task: AsyncTask) -> Result:
        with pytest.raises(WaitTimeoutError):
            await task.wait(timeout=5)
        return await task.wait()

    outcome, _, _ = waiting(*[RUNNING] * 3, completed("a"), wait=twice)
    assert isinstance(outcome, Result)


@pytest.mark.parametrize(
    "bad",
    [
        answer(500, {"error": "x"}),
        answer(502, b"<html>bad gateway"),
        answer(520, b""),
        answer(200, b"<html>"),
        answer(200, b"null"),
        answer(302, b"", {"location": "https://elsewhere.example"}),
        answer(429, BUSY),
        failing(httpx.ReadError),
        failing(httpx.ConnectError),
        failing(httpx.RemoteProtocolError),
        silence,
    ],
)
def test_20_bad_looks_and_then_completed_is_a_success(bad: Any) -> None:
    """M41: a hiccup is never a failed task."""
    outcome, script, _ = waiting(*[bad] * 20, completed("a"), timeout=5)
    assert isinstance(outcome, Result)
    assert script.count == 1 + 21


def test_looks_are_spaced_wider_when_they_keep_failing() -> None:
    """At least the documented spacing, up to `max_delay`, and never a row of repetitions within one look."""
    _, script, _ = waiting(*[answer(500, b"")] * 40, completed("a"))
    gaps = script.gaps[1:]
    assert min(gaps) >= 3.0
    assert 5.0 < max(gaps) <= 8.0


def test_looks_that_never_stop_failing_end_the_wait() -> None:
    """After `max_failures` in a row, with the last reason; a wait after that starts to count anew."""
    polling = Polling(max_failures=4)

    async def twice(task: AsyncTask) -> None:
        with pytest.raises(PollInterruptedError, match="4 looks"):
            await task.wait()
        await task.wait()

    outcome, script, _ = waiting(answer(503, b""), wait=twice, polling=polling)
    assert isinstance(outcome, PollInterruptedError)
    assert (outcome.task_id, outcome.credits) == (TASK, Credits.SPENT)
    assert "HTTP 503" in str(outcome)
    assert script.count == 1 + 4 + 4


def test_only_failures_in_a_row_count() -> None:
    bad = answer(503, b"")
    outcome, _, _ = waiting(bad, bad, RUNNING, bad, bad, completed("a"), polling=Polling(max_failures=3))
    assert isinstance(outcome, Result)


def test_retry_after_of_a_look_is_honoured() -> None:
    """M87."""
    _, script, _ = waiting(answer(429, BUSY, {"retry-after": "20"}), completed("a"))
    assert script.gaps[1] == pytest.approx(20.0)


@pytest.mark.parametrize("seen", [1, 4])
def test_a_404_within_30_s_of_our_own_accept_is_not_yet_visible(seen: int) -> None:
    """M42: the first look comes at 3 s, the fourth, with pauses of 8 s at the most, by 27 s."""
    outcome, script, _ = waiting(*[NOT_FOUND] * seen, completed("a"))
    assert isinstance(outcome, Result)
    assert script.count == 1 + seen + 1


def test_a_404_later_is_not_found() -> None:
    outcome, script, _ = waiting(NOT_FOUND)
    assert isinstance(outcome, TaskNotFoundError)
    assert (outcome.task_id, outcome.credits) == (TASK, Credits.UNKNOWN)
    assert script.times[-2] < 30 <= script.times[-1]


def test_a_404_after_the_task_was_seen_is_final_too() -> None:
    outcome, script, _ = waiting(*[RUNNING] * 10, NOT_FOUND)
    assert isinstance(outcome, TaskNotFoundError)
    assert script.count == 1 + 11


def test_a_404_for_a_task_picked_up_by_its_id_is_final() -> None:
    outcome, script, seconds = waiting(NOT_FOUND, submit=False)
    assert isinstance(outcome, TaskNotFoundError)
    assert (script.count, seconds) == (1, 0.0)


def test_generation_failed_as_http_500_once_is_a_hiccup() -> None:
    """M90."""
    outcome, _, _ = waiting(FAILED_500, RUNNING, FAILED_500, completed("a"))
    assert isinstance(outcome, Result)


def test_generation_failed_as_http_500_twice_is_the_end() -> None:
    """M90: seen twice in a row and at least 3 s apart, it is the documented failure, with its refund."""
    outcome, script, _ = waiting(FAILED_500)
    assert isinstance(outcome, GenerationFailedError)
    assert (outcome.code, outcome.credits_refunded, outcome.credits) == ("GENERATION_FAILED", True, Credits.REFUNDED)
    assert outcome.task_id == TASK
    assert script.count == 3
    assert script.gaps[1] >= 3.0


def test_generation_failed_as_http_500_within_3_s_is_not_yet_the_end() -> None:
    outcome, script, _ = waiting(FAILED_500, polling=Polling(min_interval=1, max_interval=1, first_look=1))
    assert isinstance(outcome, GenerationFailedError)
    assert script.times[-1] - script.times[1] >= 3.0
    assert script.count > 3


@pytest.mark.parametrize(
    ("refunded", "credits"), [(True, Credits.REFUNDED), (False, Credits.SPENT), (None, Credits.UNKNOWN)]
)
def test_a_failed_task(refunded: bool | None, credits: Credits) -> None:
    """M90: the refund is what the service said, and not said is not false."""
    body: dict[str, Any] = {"status": "failed", "error": "no luck", "code": "GENERATION_FAILED"}
    outcome, script, _ = waiting(body if refunded is None else body | {"credits_refunded": refunded})
    assert isinstance(outcome, GenerationFailedError)
    assert (outcome.credits_refunded, outcome.credits, outcome.message) == (refunded, credits, "no luck")
    assert script.count == 2


def test_a_task_that_moderation_ends() -> None:
    outcome, _, _ = waiting({"status": "failed", "code": "INPUT_MODERATION_BLOCKED", "credits_refunded": True})
    assert isinstance(outcome, ModerationBlockedError)
    assert outcome.task_id == TASK


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (401, "INVALID_API_KEY", AuthenticationError),
        (401, "UNAUTHORIZED", AuthenticationError),
        (403, "PLAN_REQUIRED", PlanError),
    ],
)
def test_a_refused_look_ends_the_wait_with_the_id(status: int, code: str, expected: type[ConceptVizError]) -> None:
    """M43: the key was disabled in the middle; the task is not failed, and its id is in the error."""
    outcome, script, _ = waiting(RUNNING, answer(status, {"error": "x", "code": code}))
    assert type(outcome) is expected
    assert (outcome.task_id, outcome.credits) == (TASK, Credits.SPENT)
    assert script.count == 3


@pytest.mark.parametrize("word", ["queued", "", None, 5, "in progress"])
def test_an_unknown_word_is_still_running(word: Any, caplog: pytest.LogCaptureFixture) -> None:
    """M44: with one warning, however often it is seen."""
    outcome, script, _ = waiting(*[{"status": word}] * 3, completed("a"))
    assert isinstance(outcome, Result)
    assert script.count == 5
    assert sum("undocumented status" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("word", ["COMPLETED", "Completed"])
def test_a_terminal_word_is_known_however_it_is_cased(word: str) -> None:
    outcome, script, _ = waiting(completed("a") | {"status": word})
    assert isinstance(outcome, Result)
    assert script.count == 2


@pytest.mark.parametrize("images", [[], None, "x", [{}], [{"url": None}]])
def test_completed_without_images_is_looked_at_three_times(images: Any) -> None:
    """M46: then it is malformed, and paid for."""
    outcome, script, _ = waiting({"status": "completed", "images": images})
    assert isinstance(outcome, UnexpectedResponseError)
    assert (outcome.task_id, outcome.credits) == (TASK, Credits.SPENT)
    assert script.count == 1 + 3
    assert min(script.gaps) >= 3.0


def test_images_that_come_with_the_third_look() -> None:
    empty = {"status": "completed", "images": []}
    outcome, _, _ = waiting(empty, empty, completed("a"))
    assert isinstance(outcome, Result)


def test_the_first_end_counts() -> None:
    """M45: after the end nothing is asked again, whatever would come."""

    async def twice(task: AsyncTask) -> tuple[Result, Result]:
        return await task.wait(), await task.wait()

    outcome, script, seconds = waiting(completed("a"), RUNNING, {"status": "failed"}, wait=twice)
    first, second = outcome
    assert first == second
    assert script.count == 2
    assert 3.0 <= seconds <= 5.0


def test_a_failed_end_is_kept_too() -> None:
    async def twice(task: AsyncTask) -> None:
        with pytest.raises(GenerationFailedError):
            await task.wait()
        await task.wait()

    outcome, script, _ = waiting({"status": "failed"}, completed("a"), wait=twice)
    assert isinstance(outcome, GenerationFailedError)
    assert script.count == 2


def test_the_events_of_a_wait() -> None:
    """One for each look that counts, one for each that failed, and the times since the submit."""
    events: list[Any] = []
    waiting(RUNNING, answer(502, b""), completed("a"), on_event=events.append)
    assert [type(event).__name__ for event in events] == ["Submitted", "Polled", "Retrying", "Polled", "Completed"]
    polled = [event for event in events if isinstance(event, Polled)]
    [retrying] = [event for event in events if isinstance(event, Retrying)]
    assert [event.state.status for event in polled] == ["processing", "completed"]
    assert 3.0 <= polled[0].elapsed <= 5.0
    assert retrying.attempt == 1
    assert 3.0 <= retrying.delay <= 5.0
    assert polled[1].elapsed == events[-1].elapsed >= 9.0


def test_a_hook_that_uses_up_the_time_does_not_hide_the_end() -> None:
    """The look found the end before the deadline came: that is the result."""

    async def slow(event: Any) -> None:
        if isinstance(event, Polled):
            await anyio.sleep(100)

    outcome, _, seconds = waiting(completed("a"), wait=lambda task: task.wait(timeout=10), on_event=slow)
    assert isinstance(outcome, Result)
    assert seconds == 10.0


def test_a_hook_that_uses_up_the_time_of_a_running_task() -> None:
    async def slow(event: Any) -> None:
        if isinstance(event, Polled):
            await anyio.sleep(100)

    outcome, _, _ = waiting(RUNNING, wait=lambda task: task.wait(timeout=10), on_event=slow)
    assert isinstance(outcome, WaitTimeoutError)
    assert outcome.last_state is not None


def test_generates_timeout_counts_the_submit_and_never_cuts_it() -> None:
    """The answer to a POST holds the id of a paid task: it is read to its end, and then there is no time left."""

    async def slow(_: httpx.Request) -> httpx.Response:
        await anyio.sleep(20)
        return httpx.Response(200, json=RECEIPT)

    async def main() -> None:
        cv, script = client(slow, polling=Polling())
        async with cv:
            with pytest.raises(WaitTimeoutError) as caught:
                await cv.generate("a", timeout=5)
            assert caught.value.task_id == TASK
            assert anyio.current_time() == 20
            assert script.count == 1
            with pytest.raises(WaitTimeoutError):
                await cv.edit("a", "https://example.com/a.png", timeout=26)
            assert anyio.current_time() == 46
            assert script.paths[1] == "POST /api/v1/edit"

    in_virtual_time(main)


def test_status_repeats_its_look_within_moments() -> None:
    """A single look is not spaced: it is repeated after the backoff."""

    async def main() -> None:
        cv, script = client(answer(502, b""), answer(502, b""), RUNNING, retries=Retries())
        async with cv:
            assert (await cv.task(TASK).status()).status == "processing"
        assert script.count == 3
        assert anyio.current_time() <= 0.5 + 1.0

    in_virtual_time(main)


def test_many_tasks_wait_side_by_side() -> None:
    """Twenty waits on a client with two connections: each is looked at in its time, and all end."""
    ends: dict[str, float] = {}

    def service(request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            return httpx.Response(200, json=RECEIPT | {"taskId": f"t{len(ends)}"})
        return httpx.Response(200, json=completed("a") if anyio.current_time() > 60 else RUNNING)

    async def main() -> None:
        cv = AsyncConceptViz(KEY, transport=httpx.MockTransport(service), max_connections=2)

        async def wait(n: int) -> None:
            await cv.task(f"t{n}").wait()
            ends[f"t{n}"] = anyio.current_time()

        async with cv, anyio.create_task_group() as group:
            for n in range(20):
                group.start_soon(wait, n)

    in_virtual_time(main)
    assert len(ends) == 20
    assert all(60 <= end <= 66 for end in ends.values())


def test_a_wait_on_a_closed_client_ends_at_once() -> None:
    async def closed(task: AsyncTask) -> None:
        await task._poller.transport.aclose()
        await task.wait()

    outcome, script, _ = waiting(RUNNING, wait=closed)
    assert isinstance(outcome, InvalidRequestError)
    assert script.count == 1


def test_logging_is_quiet_when_all_goes_well(caplog: pytest.LogCaptureFixture) -> None:
    waiting(RUNNING, completed("a"))
    assert [record for record in caplog.records if record.name == "conceptviz" and record.levelno > logging.INFO] == []
