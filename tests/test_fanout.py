"""generate_many: one outcome for each prompt, in batches, in order or as they come, saved, stopped, taken up again."""

from __future__ import annotations

import gc
import logging
import pickle
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from helpers import QUICK, in_virtual_time
from journals import journal_path

from conceptviz import (
    AsyncConceptViz,
    Completed,
    ConceptViz,
    Credits,
    DownloadError,
    EditRequest,
    Failed,
    GenerateRequest,
    GenerationFailedError,
    InvalidRequestError,
    Journal,
    JournalError,
    ModerationBlockedError,
    Outcome,
    Polling,
    Saved,
    Submitted,
    UnexpectedResponseError,
    WaitTimeoutError,
)
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.anyio

PNG_URL = "https://example.com/a.png"

# A simulated minute takes 20 ms, and the spacing of looks goes with it.
SPEED = 3000.0
POLLING = Polling(
    min_interval=3 / SPEED, max_interval=5 / SPEED, first_look=3 / SPEED, typical=(30 / SPEED, 90 / SPEED)
)


@pytest.fixture
def simulator() -> Simulator:
    return Simulator(credits=1000, speed=SPEED, render=render_tiny, seed=1)


def client_of(simulator: Simulator, **options: Any) -> AsyncConceptViz:
    settings: dict[str, Any] = {"polling": POLLING, "retries": QUICK, **options}
    return AsyncConceptViz(simulator.api_key, transport=simulator.transport(), **settings)


async def outcomes_of(cv: AsyncConceptViz, items: Any, **options: Any) -> list[Outcome]:
    """All outcomes, in the order of the items."""
    with anyio.fail_after(20):
        return sorted([outcome async for outcome in cv.generate_many(items, **options)], key=lambda o: o.index)


async def test_each_prompt_has_its_own_image(simulator: Simulator) -> None:
    """Strings are put together by fours; each outcome has the image, the task and the cost of its own prompt."""
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, [f"p{n}" for n in range(10)])
    assert [outcome.index for outcome in outcomes] == list(range(10))
    assert all(outcome.ok and outcome.image is not None for outcome in outcomes)
    assert [outcome.image and outcome.image.prompt for outcome in outcomes] == [f"p{n}" for n in range(10)]
    assert [outcome.credits_used for outcome in outcomes] == [2] * 10
    assert len({outcome.task_id for outcome in outcomes}) == 3
    assert (simulator.ledger.submissions, simulator.ledger.charged) == (3, 20)


@pytest.mark.parametrize(("size", "submissions"), [(1, 7), (2, 4), (3, 3), (4, 2)])
async def test_the_size_of_a_batch(simulator: Simulator, size: int, submissions: int) -> None:
    async with client_of(simulator) as cv:
        await outcomes_of(cv, [f"p{n}" for n in range(7)], batch_size=size)
    assert simulator.ledger.submissions == submissions


async def test_requests_and_strings_mixed(simulator: Simulator) -> None:
    """What has other settings, several prompts of its own, or images is a request of its own."""
    items = [
        "a",
        GenerateRequest("b"),
        GenerateRequest("c", model="cv-1"),
        GenerateRequest("d", model="cv-1"),
        GenerateRequest(["e", "f"]),
        EditRequest("g", PNG_URL),
        "h",
    ]
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, items)
    assert [(outcome.index, outcome.prompt) for outcome in outcomes] == [
        *((0, "a"), (1, "b"), (2, "c"), (3, "d"), (4, "e"), (4, "f"), (5, "g"), (6, "h"))
    ]
    assert [outcome.credits_used for outcome in outcomes] == [2, 2, 1, 1, 2, 2, 2, 2]
    # a and b, c and d, e and f, g, h
    assert simulator.ledger.submissions == 5


async def test_a_bad_item_is_its_own_outcome(simulator: Simulator) -> None:
    """Nothing is sent for it, and its neighbours know nothing of it."""
    items: list[Any] = ["a", "", 7, None, "\ud800", b"b", ["c"], "d"]
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, items)
    assert [outcome.ok for outcome in outcomes] == [True, *[False] * 6, True]
    for outcome in outcomes[1:7]:
        assert isinstance(outcome.error, InvalidRequestError)
        assert (outcome.credits_used, outcome.task_id, outcome.image) == (0, None, None)
    assert simulator.ledger.charged == 4


async def test_a_moderated_batch_is_taken_apart(simulator: Simulator) -> None:
    """The good prompts go on, and are paid for once."""
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, ["a", "b", "[sim:blocked] c", "d", "e"])
    assert [outcome.ok for outcome in outcomes] == [True, True, False, True, True]
    assert isinstance(outcomes[2].error, ModerationBlockedError)
    assert outcomes[2].credits_used == 0
    assert simulator.ledger.charged == 8


async def test_the_size_that_a_plan_allows_is_remembered() -> None:
    """After the first refusals no batch is sent that would be refused."""
    simulator = Simulator(credits=100, speed=SPEED, plan="pro-single", render=render_tiny)
    tried: list[int] = []
    transport = simulator.transport()
    handle = transport.handle_async_request

    async def count(request: Any) -> Any:
        if request.method == "POST":
            tried.append(request.content.count(b'","') + 1)
        return await handle(request)

    transport.handle_async_request = count  # type: ignore[method-assign]  # to see what is sent
    async with AsyncConceptViz(simulator.api_key, transport=transport, polling=POLLING) as cv:
        outcomes = await outcomes_of(cv, [f"p{n}" for n in range(12)], max_in_flight=1)
    assert all(outcome.ok for outcome in outcomes)
    assert simulator.ledger.submissions == 12
    assert len(tried) - 12 <= 4


async def test_a_failed_batch_is_reported_prompt_by_prompt(simulator: Simulator) -> None:
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, ["a", "[sim:failed] b", "c", "d", "e"])
    for outcome in outcomes[:4]:
        assert isinstance(outcome.error, GenerationFailedError)
        assert outcome.error.credits is Credits.REFUNDED
        assert outcome.credits_used == 0
        assert outcome.task_id is not None
    assert outcomes[4].ok


async def test_a_short_answer_names_what_is_missing(simulator: Simulator) -> None:
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, ["a", "b [sim:partial]", "c"])
    missing = [outcome for outcome in outcomes if not outcome.ok]
    assert len(missing) >= 1
    assert len(missing) < 3
    for outcome in missing:
        assert isinstance(outcome.error, UnexpectedResponseError)
        assert outcome.error.credits is Credits.SPENT
        assert outcome.task_id is not None
        assert outcome.credits_used == 2


async def test_repeated_prompts_are_each_made(simulator: Simulator) -> None:
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, ["a"] * 6)
    assert all(outcome.ok for outcome in outcomes)
    assert len({outcome.image.url for outcome in outcomes if outcome.image}) == 6
    assert simulator.ledger.charged == 12


@pytest.mark.parametrize("journaled", [False, True])
async def test_a_key_is_paid_for_once(simulator: Simulator, journaled: bool) -> None:
    """However often it stands among the items; other work under the same key is refused."""
    items = [GenerateRequest("a", key="k"), GenerateRequest("a", key="k"), GenerateRequest("b", key="k"), "c"]
    with journal_path() as path:
        async with client_of(simulator, journal=path if journaled else None) as cv:
            outcomes = await outcomes_of(cv, items)
            again = await outcomes_of(cv, items[:1]) if journaled else []
    assert [outcome.ok for outcome in outcomes] == [True, True, False, True]
    assert outcomes[0].task_id == outcomes[1].task_id
    assert [outcome.key for outcome in outcomes] == ["k", "k", "k", None]
    assert isinstance(outcomes[2].error, InvalidRequestError)
    assert [outcome.task_id for outcome in again] == [outcomes[0].task_id] * journaled
    assert simulator.ledger.charged == sum(outcome.credits_used or 0 for outcome in outcomes) == 4
    assert [outcome.credits_used for outcome in again] == [2] * journaled


async def test_the_same_program_run_again_pays_for_nothing_twice(simulator: Simulator, tmp_path: Path) -> None:
    """It goes on where it stopped, and saved files are left as they are."""
    items = [GenerateRequest(f"p{n}", key=f"k{n}", name=f"figure {n}") for n in range(8)]
    with journal_path() as path:
        async with client_of(simulator, journal=path) as cv:
            first = []
            async for outcome in cv.generate_many(items, save_to=tmp_path, max_in_flight=2):
                first.append(outcome)
                if len(first) == 3:
                    break
        async with client_of(simulator, journal=path) as cv:
            outcomes = await outcomes_of(cv, items, save_to=tmp_path)
    assert [outcome.path and outcome.path.stem for outcome in outcomes] == [f"figure {n}" for n in range(8)]
    assert simulator.ledger.submissions == 8
    assert simulator.ledger.charged == 16
    known = {outcome.key: outcome.task_id for outcome in outcomes}
    assert all(known[outcome.key] == outcome.task_id for outcome in first)


async def test_images_are_saved_as_tasks_finish(simulator: Simulator, tmp_path: Path) -> None:
    """Under the given name, or that of the task; several prompts of one request are numbered."""
    items = ["a", GenerateRequest("b", name="the cell"), GenerateRequest(["c", "d"], name="pair")]
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, items, save_to=tmp_path / "made")
    stems = [outcome.path.stem for outcome in outcomes if outcome.path]
    assert stems == [f"{outcomes[0].task_id}-0", "the cell", "pair-0", "pair-1"]
    assert sorted(path.stem for path in (tmp_path / "made").iterdir()) == sorted(stems)


async def test_an_image_that_cannot_be_saved_is_not_lost(simulator: Simulator, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"other")
    (tmp_path / "x.jpg").write_bytes(b"other")
    async with client_of(simulator) as cv:
        [outcome] = await outcomes_of(cv, [GenerateRequest("a", name="x")], save_to=tmp_path)
        assert isinstance(outcome.error, DownloadError)
        assert outcome.image is not None
        assert (outcome.path, outcome.credits_used) == (None, 2)
        assert await cv.read(outcome.image)


async def test_in_order_or_as_they_come(simulator: Simulator) -> None:
    items = ["[sim:slow] a", "b", "c"]
    async with client_of(simulator) as cv:
        with anyio.fail_after(20):
            as_they_come = [outcome.index async for outcome in cv.generate_many(items, batch_size=1)]
            in_order = [outcome.index async for outcome in cv.generate_many(items, batch_size=1, ordered=True)]
    assert as_they_come[-1] == 0
    assert in_order == [0, 1, 2]


@pytest.mark.parametrize("most", [1, 3])
async def test_no_more_tasks_are_unfinished_than_allowed(simulator: Simulator, most: int) -> None:
    unfinished = peak = 0

    def count(event: Any) -> None:
        nonlocal unfinished, peak
        unfinished += isinstance(event, Submitted)
        unfinished -= isinstance(event, Completed)
        peak = max(peak, unfinished)

    async with client_of(simulator, on_event=count) as cv:
        await outcomes_of(cv, [f"p{n}" for n in range(9)], batch_size=1, max_in_flight=most)
    assert peak == most


async def test_items_are_drawn_as_the_work_goes_on(simulator: Simulator) -> None:
    """Neither all at once, nor ahead of a user who does not take the outcomes: nobody pays for what is not wanted."""
    drawn = 0

    def items() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield f"p{drawn}"

    async with client_of(simulator) as cv:
        outcomes = cv.generate_many(items(), batch_size=2, max_in_flight=2)
        await anext(outcomes)
        await anyio.sleep(0.1)  # a dozen tasks could have been made meanwhile
        assert simulator.ledger.submissions <= 5
        assert drawn <= 14


async def test_an_async_source_that_pauses_does_not_hold_a_batch_back(simulator: Simulator) -> None:
    """Who waits for the first outcome before giving the next item is not waited for in turn."""
    send, receive = anyio.create_memory_object_stream[str](10)

    async def items() -> AsyncIterator[str]:
        async with receive:
            async for item in receive:
                yield item

    async with client_of(simulator) as cv, send:
        with anyio.fail_after(10):
            outcomes = cv.generate_many(items())
            await send.send("a")
            await send.send("b")
            first = {(await anext(outcomes)).prompt, (await anext(outcomes)).prompt}
            await send.send("c")
            third = (await anext(outcomes)).prompt
            await send.aclose()
            with pytest.raises(StopAsyncIteration):
                await anext(outcomes)
    assert (first, third) == ({"a", "b"}, "c")


async def test_leaving_the_loop_stops_it(simulator: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    """The client lives on, nothing more is submitted, and the log names what is paid for."""
    caplog.set_level(logging.WARNING)
    async with client_of(simulator) as cv:
        async for _ in cv.generate_many((f"p{n}" for n in range(1000)), batch_size=1, max_in_flight=4):
            break
        gc.collect()
        for run in list(cv._core.background):
            assert run._is_left  # type: ignore[attr-defined]  # it was told to stop: wait for its end
            await run.stop()
        submissions = simulator.ledger.submissions
        assert (await cv.generate("x")).image
        assert simulator.ledger.submissions == submissions + 1
        assert cv._core.poller.waiting == 0
    text = caplog.text
    assert "paid for" in text
    assert text.count("task(id).wait()") == 1


async def test_closing_the_client_stops_it(simulator: Simulator) -> None:
    cv = client_of(simulator)
    outcomes = cv.generate_many((f"p{n}" for n in range(1000)), batch_size=1)
    await anext(outcomes)
    with anyio.fail_after(5):
        await cv.aclose()
    assert simulator.ledger.submissions < 30
    with anyio.fail_after(5):
        assert len([outcome async for outcome in outcomes]) < 30


async def test_a_step_that_is_cancelled_does_not_end_the_run(simulator: Simulator) -> None:
    """A time limit on one step is a time limit on that step."""
    async with client_of(simulator) as cv:
        outcomes = cv.generate_many(["a", "b"], batch_size=1)
        with anyio.move_on_after(0.001) as scope:
            await anext(outcomes)
        with anyio.fail_after(10):
            rest = [outcome async for outcome in outcomes]
    assert scope.cancelled_caught
    assert {outcome.prompt for outcome in rest} == {"a", "b"}


async def test_what_the_source_raises_comes_after_what_was_accepted(simulator: Simulator) -> None:
    def items() -> Iterator[str]:
        yield "a"
        yield "b"
        raise LookupError("no more")

    async with client_of(simulator) as cv:
        outcomes = cv.generate_many(items(), batch_size=1)
        with anyio.fail_after(10):
            taken = [await anext(outcomes) for _ in range(2)]
            with pytest.raises(LookupError, match="no more"):
                await anext(outcomes)
    assert sorted(outcome.prompt for outcome in taken) == ["a", "b"]
    assert all(outcome.ok for outcome in taken)


async def test_what_a_hook_raises_ends_the_run(simulator: Simulator) -> None:
    """As the error itself, not as a group."""

    def hook(event: Any) -> None:
        if type(event).__name__ == "Completed":
            raise LookupError("hook")

    async with client_of(simulator, on_event=hook) as cv:
        with anyio.fail_after(10), pytest.raises(LookupError, match="hook"):
            await anext(cv.generate_many(["a", "b", "c"], batch_size=1))
        gc.collect()
        assert cv._core.poller.waiting == 0


async def test_the_events_of_a_run(simulator: Simulator, tmp_path: Path) -> None:
    events: list[Any] = []
    async with client_of(simulator, on_event=events.append) as cv:
        await outcomes_of(cv, ["a", "b", "[sim:failed] c"], batch_size=2, save_to=tmp_path)
    kinds = [type(event) for event in events]
    assert (kinds.count(Submitted), kinds.count(Completed), kinds.count(Failed), kinds.count(Saved)) == (2, 1, 1, 2)
    [completed] = [event for event in events if isinstance(event, Completed)]
    assert completed.result.submission is not None
    assert completed.result.submission.model == "cv-2"


async def test_each_task_has_its_own_time(simulator: Simulator) -> None:
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, ["[sim:slow] a", "b"], batch_size=1, timeout=0.12)
    assert isinstance(outcomes[0].error, WaitTimeoutError)
    assert outcomes[0].task_id == outcomes[0].error.task_id
    assert outcomes[0].credits_used == 2
    assert outcomes[1].ok


async def test_a_stall_does_not_put_looks_off_for_long(simulator: Simulator) -> None:
    """Also where the typical time is far from what the tasks take."""

    def stall(event: Any) -> None:
        if isinstance(event, Submitted):
            time.sleep(0.01)

    polling = Polling(min_interval=0.001, max_interval=0.002, first_look=0.001)
    async with client_of(simulator, polling=polling, on_event=stall) as cv:
        outcomes = await outcomes_of(cv, ["a", "b", "c"], batch_size=1)
    assert all(outcome.ok for outcome in outcomes)


async def test_a_task_that_the_journal_cannot_take_is_waited_for_all_the_same(
    simulator: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is paid for: the error would lose the image too."""

    def fail(*_: object) -> None:
        raise JournalError("full")

    monkeypatch.setattr(Journal, "accepted", fail)
    with journal_path() as path:
        async with client_of(simulator, journal=path) as cv:
            [outcome] = await outcomes_of(cv, ["a"])
    assert outcome.ok
    assert outcome.task_id is not None


@pytest.mark.parametrize(
    "options",
    [
        *({"batch_size": value} for value in (0, 5, -1, True, 2.0, "2", None)),
        *({"max_in_flight": value} for value in (0, -1, True, 1.5, None)),
        *({"timeout": value} for value in (0, -1, True, "1")),
        {"save_to": "a.png"},
    ],
)
async def test_options_that_cannot_be_used(simulator: Simulator, options: dict[str, Any]) -> None:
    """Refused by the call, before anything is drawn."""
    async with client_of(simulator) as cv:
        with pytest.raises(InvalidRequestError, match=next(iter(options)) if "save_to" not in options else "folder"):
            cv.generate_many(["a"], **options)


@pytest.mark.parametrize("items", ["abc", b"abc", GenerateRequest("a"), EditRequest("a", b"x"), 7, None])
async def test_what_is_no_items(simulator: Simulator, items: Any) -> None:
    """A single prompt above all: its letters are no prompts."""
    async with client_of(simulator) as cv:
        with pytest.raises(InvalidRequestError, match=r"generate_many|iterable"):
            cv.generate_many(items)
    blocking = ConceptViz(simulator.api_key, transport=simulator.transport())
    with blocking, pytest.raises(InvalidRequestError, match=r"generate_many|iterable"):
        blocking.generate_many(items)


async def test_no_items(simulator: Simulator) -> None:
    async with client_of(simulator) as cv:
        assert await outcomes_of(cv, []) == []


def test_blocking(simulator: Simulator) -> None:
    """The same, one blocking step at a time; a generator may call the client itself."""
    with ConceptViz(simulator.api_key, transport=simulator.transport(), polling=POLLING) as cv:

        def items() -> Iterator[str]:
            yield "a"
            yield f"after {cv.generate('b').image.prompt}"

        outcomes = list(cv.generate_many(items(), ordered=True))
        for _ in cv.generate_many([f"p{n}" for n in range(1000)], batch_size=1):
            break
        submissions = simulator.ledger.submissions
        assert cv.generate("c").image
    assert [outcome.prompt for outcome in outcomes] == ["a", "after b"]
    assert submissions < 30


async def test_an_outcome_can_be_pickled(simulator: Simulator) -> None:
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, ["a", ""])
    copies = pickle.loads(pickle.dumps(outcomes))
    assert copies[0] == outcomes[0]
    assert str(copies[1].error) == str(outcomes[1].error)


def test_five_hundred_figures_in_no_time() -> None:
    """In real time: no look comes later than 5 s after a task is ready, and few are made while none can be."""
    simulator = Simulator(credits=2000, render=render_tiny, seed=3)
    looks = 0

    def count(event: Any) -> None:
        nonlocal looks
        looks += type(event).__name__ == "Polled"

    async def main() -> float:
        async with AsyncConceptViz(simulator.api_key, transport=simulator.transport(), on_event=count) as cv:
            items = (f"figure {n}" for n in range(500))
            return len([o async for o in cv.generate_many(items, batch_size=1, max_in_flight=20) if o.ok])

    assert in_virtual_time(main) == 500
    assert simulator.ledger.charged == 1000
    # The API page's own loop makes 13 looks at a task.
    assert looks < 12 * 500
