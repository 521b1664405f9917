"""AsyncTask on asyncio and trio: receipts, waiting, watching, being cancelled."""

import asyncio
import logging
from collections.abc import Iterator

import anyio
import pytest
from helpers import (
    QUICK_POLLING,
    RECEIPT,
    RUNNING,
    TASK,
    answer,
    assert_no_key_logged,
    client,
    completed,
    in_virtual_time,
    silence,
)

from conceptviz import (
    AsyncTask,
    Completed,
    Failed,
    GenerationFailedError,
    InvalidRequestError,
    Polling,
    Result,
    TaskNotFoundError,
    TaskState,
    WaitTimeoutError,
)

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


async def test_a_submitted_task_carries_its_receipt() -> None:
    cv, _ = client(RECEIPT)
    async with cv:
        task = await cv.submit(["a", "b"])
    assert task.id == TASK
    assert task.submission is not None
    assert task.submission.prompts == ("a", "b")
    assert (task.submission.credits_used, task.submission.credits_remaining) == (2, 79)
    assert repr(task) == f"<AsyncTask {TASK}>"


async def test_a_task_picked_up_by_its_id_does_no_io() -> None:
    cv, script = client(RUNNING)
    async with cv:
        task = cv.task(TASK)
        assert (task.id, task.submission, script.count) == (TASK, None, 0)


@pytest.mark.parametrize("task_id", ["", ".", "..", "../x", "a b", "a/b", "a?b", "a#b", "a\n", "é", "x" * 129, None, 7])
async def test_what_cannot_be_a_task_id_is_refused(task_id: object) -> None:
    """M40: before anything is sent."""
    cv, script = client(RUNNING)
    async with cv:
        with pytest.raises(InvalidRequestError, match="task id"):
            cv.task(task_id)  # type: ignore[arg-type]  # that is the point
    assert script.count == 0


@pytest.mark.parametrize("task_id", ["-abc_", "_", TASK, "x" * 128])
async def test_what_can_be_a_task_id(task_id: str) -> None:
    cv, script = client(RUNNING)
    async with cv:
        await cv.task(task_id).status()
    assert script.paths == [f"GET /api/v1/task/{task_id}"]


async def test_wait_matches_the_images_with_the_prompts() -> None:
    """The task knows its prompts; one picked up by its id takes the service's word for them."""
    cv, _ = client(RECEIPT, completed("b", "a"))
    async with cv:
        result = await (await cv.submit(["a", "b", "c"])).wait()
        anonymous = await cv.task(TASK).wait()
    assert [(image.index, image.prompt) for image in result.images] == [(0, "a"), (1, "b")]
    assert result.missing_prompts == ("c",)
    assert result.submission is not None
    assert [image.prompt for image in anonymous.images] == ["b", "a"]
    assert (anonymous.submission, anonymous.missing_prompts) == (None, ())


async def test_waiting_twice_asks_once() -> None:
    cv, script = client(RECEIPT, completed("a"), RUNNING)
    async with cv:
        task = await cv.submit("a")
        first = await task.wait()
        assert await task.wait() == first
    assert script.count == 2


async def test_status_looks_each_time() -> None:
    """Its purpose: a fresh look, also after the end, when the images' URLs may have changed."""
    cv, script = client(RUNNING, completed("a"))
    async with cv:
        task = cv.task(TASK)
        states = [await task.status() for _ in range(3)]
    assert [state.status for state in states] == ["processing", "completed", "completed"]
    assert script.count == 3


async def test_watch_gives_each_look_up_to_the_end() -> None:
    cv, script = client(RECEIPT, RUNNING, RUNNING, completed("a"), RUNNING)
    async with cv:
        task = await cv.submit("a")
        states = [state.status async for state in task.watch()]
    assert states == ["processing", "processing", "completed"]
    assert script.count == 4


async def test_watching_a_task_that_fails_gives_a_state() -> None:
    cv, _ = client({"status": "failed", "error": "no luck"})
    async with cv:
        [state] = [state async for state in cv.task(TASK).watch()]
    assert (state.status, state.error) == ("failed", "no luck")


async def test_leaving_a_watch_early_leaves_nothing_behind() -> None:
    """No generator to close: another watch, or a wait, goes on from there."""
    cv, script = client(RUNNING, RUNNING, completed("a"))
    async with cv:
        task = cv.task(TASK)
        async for state in task.watch():
            assert isinstance(state, TaskState)
            break
        watch = task.watch()
        assert (await anext(watch)).status == "processing"
        del watch
        assert isinstance(await task.wait(), Result)
    assert script.count == 3


async def test_an_ended_watch_stays_ended() -> None:
    cv, script = client(completed("a"))
    async with cv:
        watch = cv.task(TASK).watch()
        assert aiter(watch) is watch
        await anext(watch)
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(watch)
    assert script.count == 1


def test_a_watch_has_a_deadline_over_all_of_it() -> None:
    async def main() -> None:
        cv, _ = client(RUNNING, polling=Polling())
        async with cv:
            watch = cv.task(TASK).watch(timeout=10)
            seen = [await anext(watch) for _ in range(3)]
            with pytest.raises(WaitTimeoutError) as caught:
                seen += [state async for state in watch]
        assert anyio.current_time() == 10
        assert caught.value.last_state == seen[-1]

    in_virtual_time(main)


async def test_a_watch_raises_what_a_wait_raises() -> None:
    cv, _ = client(answer(404, {"code": "TASK_NOT_FOUND"}))
    async with cv:
        with pytest.raises(TaskNotFoundError):
            await anext(cv.task(TASK).watch())


@pytest.mark.parametrize("during", ["a look", "a pause"])
async def test_a_cancelled_wait_names_the_task_and_leaves_the_client_usable(
    during: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Stopping to wait does not stop the spending: the id must not be lost with it."""
    polling = QUICK_POLLING if during == "a look" else Polling()
    cv, script = client(RECEIPT, silence, polling=polling)
    async with cv:
        task = await cv.submit("a")
        with anyio.move_on_after(0.03) as scope:
            await task.wait()
        assert scope.cancelled_caught
        assert script.count == (2 if during == "a look" else 1)
        [record] = [record for record in caplog.records if "Stopped waiting" in record.message]
        assert TASK in record.message
        assert record.levelno == logging.WARNING
        script.answers = [answer(200, completed("a"))]
        assert isinstance(await cv.task(TASK).wait(), Result)


def test_asyncio_wait_for_around_a_wait(caplog: pytest.LogCaptureFixture) -> None:
    """M74: asyncio's own cancellation, which knows nothing of scopes."""

    async def main() -> None:
        cv, script = client(RECEIPT, silence)
        async with cv:
            task = await cv.submit("a")
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(task.wait(), 0.03)
            assert sum("Stopped waiting" in record.message for record in caplog.records) == 1
            script.answers = [answer(200, completed("a"))]
            assert isinstance(await task.wait(), Result)

    asyncio.run(main())


async def test_the_events_of_the_end_come_once() -> None:
    events: list[object] = []
    cv, _ = client(RECEIPT, completed("a"), on_event=events.append)
    async with cv:
        task = await cv.submit("a")
        result = await task.wait()
        await task.wait()
    [end] = [event for event in events if isinstance(event, Completed)]
    assert (end.task_id, end.result) == (TASK, result)
    assert end.elapsed >= 0


async def test_the_event_of_a_failed_end_holds_the_error() -> None:
    events: list[object] = []
    cv, _ = client({"status": "failed", "code": "X", "credits_refunded": True}, on_event=events.append)
    async with cv:
        with pytest.raises(GenerationFailedError) as caught:
            await cv.task(TASK).wait()
    [end] = [event for event in events if isinstance(event, Failed)]
    assert str(end.error) == str(caught.value)
    assert end.task_id == TASK


async def test_two_waits_for_one_task() -> None:
    """Each sees it to its end, and neither disturbs the other."""
    cv, _ = client(RECEIPT, RUNNING, RUNNING, completed("a"))
    results: list[Result] = []

    async def wait(task: AsyncTask) -> None:
        results.append(await task.wait())

    async with cv:
        task = await cv.submit("a")
        async with anyio.create_task_group() as group:
            group.start_soon(wait, task)
            group.start_soon(wait, task)
    assert results[0] == results[1]
