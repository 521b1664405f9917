"""generate_many when things go wrong: refusals that end it, lost answers, budgets, storms of 429, every way of leaving.

The service's own book is what counts. No paid task is lost in silence: its id is in an outcome, in the log or in the
journal. No test waits for real, and none hangs.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from helpers import QUICK, in_virtual_time
from journals import journal_path

from conceptviz import (
    AsyncConceptViz,
    AuthenticationError,
    Budget,
    BudgetExceededError,
    Credits,
    Event,
    GenerateRequest,
    InsufficientCreditsError,
    Journal,
    NotSentError,
    Outcome,
    PlanError,
    Polling,
    Retries,
    SubmissionUnknownError,
    Submitted,
)
from conceptviz import _pace as pace_module
from conceptviz.simulator import Fault, Simulator, render_tiny
from conceptviz.simulator._world import Request

pytestmark = pytest.mark.anyio

# A simulated minute takes 3 ms, and the spacing of looks goes with it.
SPEED = 20_000.0
POLLING = Polling(
    min_interval=3 / SPEED, max_interval=5 / SPEED, first_look=3 / SPEED, typical=(30 / SPEED, 90 / SPEED)
)
# Seconds after which a test is taken for hanging.
HANG = 10


@pytest.fixture
def simulator() -> Simulator:
    return Simulator(credits=1000, speed=SPEED, render=render_tiny, seed=1)


def client_of(simulator: Simulator, **options: Any) -> AsyncConceptViz:
    settings: dict[str, Any] = {"polling": POLLING, "retries": QUICK, **options}
    return AsyncConceptViz(simulator.api_key, transport=simulator.transport(), **settings)


async def outcomes_of(cv: AsyncConceptViz, items: Any, **options: Any) -> list[Outcome]:
    """All outcomes, in the order of the items."""
    with anyio.fail_after(HANG):
        return sorted([outcome async for outcome in cv.generate_many(items, **options)], key=lambda o: o.index)


def ids_of(simulator: Simulator) -> set[str]:
    """The tasks that the service has charged for."""
    return set(simulator._world._tasks)


def ids_in(outcomes: list[Outcome]) -> set[str]:
    return {outcome.task_id for outcome in outcomes if outcome.task_id is not None}


def prompts(count: int) -> list[str]:
    return [f"prompt {n}" for n in range(count)]


# What ends the submitting.


@pytest.mark.parametrize(("size", "in_flight"), [(1, 1), (1, 5), (1, 40), (4, 1), (4, 5)])
async def test_m85_no_credits_in_the_middle(size: int, in_flight: int) -> None:
    """M85: what was paid for is collected; the rest is not sent, and is told so."""
    simulator = Simulator(credits=40, speed=SPEED, render=render_tiny, seed=1)
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, prompts(60), batch_size=size, max_in_flight=in_flight)
    assert [outcome.index for outcome in outcomes] == list(range(60))
    done = [outcome for outcome in outcomes if outcome.ok]
    rest = [outcome for outcome in outcomes if not outcome.ok]
    # Those that are submitted at once reach the service in whatever order.
    assert len(done) == 20
    assert max(outcome.index for outcome in done) < 20 + size * min(in_flight, 15)
    assert ids_in(outcomes) == ids_of(simulator)
    refused = [outcome for outcome in rest if isinstance(outcome.error, InsufficientCreditsError)]
    unsent = [outcome for outcome in rest if isinstance(outcome.error, NotSentError)]
    assert len(refused) + len(unsent) == 40
    assert size <= len(refused) <= size * in_flight
    assert simulator.requests["submit"] == (20 + len(refused)) / size
    assert (simulator.ledger.credits, simulator.ledger.charged) == (0, 40)
    assert {(outcome.credits_used, outcome.task_id) for outcome in rest} == {(0, None)}
    for outcome in unsent:
        assert isinstance(outcome.error, NotSentError)
        assert outcome.error.credits is Credits.NOT_SPENT
        assert isinstance(outcome.error.__cause__, InsufficientCreditsError)


REFUSALS: list[Any] = [
    ({"status": 401, "body": {"error": "No.", "code": "INVALID_API_KEY"}}, AuthenticationError),
    ({"status": 401, "body": {"error": "No.", "code": "UNAUTHORIZED"}}, AuthenticationError),
    ({"status": 403, "body": {"error": "No.", "code": "PLAN_REQUIRED"}}, PlanError),
    ({"status": 403, "body": "<html>"}, PlanError),
]


@pytest.mark.parametrize(("refusal", "error"), REFUSALS)
@pytest.mark.parametrize("in_flight", [1, 5, 30])
async def test_m86_no_access_in_the_middle(
    simulator: Simulator, refusal: dict[str, Any], error: type[Exception], in_flight: int
) -> None:
    """M86: as M85."""
    simulator.faults.add("submit", skip=20, times=None, **refusal)
    async with client_of(simulator) as cv:
        outcomes = await outcomes_of(cv, prompts(50), batch_size=1, max_in_flight=in_flight)
    refused = [outcome for outcome in outcomes if isinstance(outcome.error, error)]
    assert sum(outcome.ok for outcome in outcomes) == 20
    assert sum(isinstance(outcome.error, NotSentError) for outcome in outcomes) == 30 - len(refused)
    assert 1 <= len(refused) <= in_flight
    assert simulator.requests["submit"] == 20 + len(refused)
    assert ids_in(outcomes) == ids_of(simulator)


async def test_m86_a_key_that_is_disabled_in_the_middle(simulator: Simulator) -> None:
    """M86: the looks are refused too. A paid task is not called failed for that; another key takes it up."""
    other, accepted = simulator.add_key(), 0

    def on_event(event: Event) -> None:
        nonlocal accepted
        accepted += isinstance(event, Submitted)
        if accepted == 40:
            simulator.disable_key()

    async with client_of(simulator, on_event=on_event) as cv:
        outcomes = await outcomes_of(cv, prompts(100), batch_size=1, max_in_flight=10)
    assert len(outcomes) == 100
    refused = [outcome for outcome in outcomes if isinstance(outcome.error, AuthenticationError)]
    paid = [outcome for outcome in outcomes if outcome.task_id is not None]
    assert ids_in(outcomes) == ids_of(simulator)
    assert len(paid) == simulator.ledger.submissions
    assert 40 <= len(paid) <= 50
    assert simulator.requests["submit"] <= len(paid) + 10
    unseen = [outcome for outcome in paid if not outcome.ok]
    assert unseen
    assert all(outcome in refused and outcome.credits_used == 2 for outcome in unseen)
    charged = simulator.ledger.charged
    async with AsyncConceptViz(other, transport=simulator.transport(), polling=POLLING) as cv:
        with anyio.fail_after(HANG):
            for outcome in unseen:
                assert (await cv.task(str(outcome.task_id)).wait()).image.prompt == outcome.prompt
    assert simulator.ledger.charged == charged


# What hits one item.


@pytest.mark.parametrize("is_charged", [True, False])
@pytest.mark.parametrize("size", [1, 4])
async def test_m88_one_unknown_among_twenty(simulator: Simulator, size: int, is_charged: bool) -> None:
    """M88: its neighbours are unharmed, it is not sent again, and the budget keeps what it may have cost."""
    simulator.faults.add("submit", skip=3, close=True, accept=is_charged)
    budget = Budget(100)
    async with client_of(simulator, budget=budget) as cv:
        outcomes = await outcomes_of(cv, prompts(20), batch_size=size)
    unknown = [outcome for outcome in outcomes if isinstance(outcome.error, SubmissionUnknownError)]
    assert len(unknown) == size
    assert {(outcome.task_id, outcome.credits_used) for outcome in unknown} == {(None, None)}
    assert sum(outcome.ok for outcome in outcomes) == 20 - size
    assert simulator.requests["submit"] == 20 / size
    assert simulator.ledger.charged == (40 if is_charged else 40 - 2 * size)
    assert (budget.spent, budget.reserved) == (40 - 2 * size, 2 * size)


@pytest.mark.parametrize("in_flight", [1, 20])
@pytest.mark.parametrize("keyed", [False, True])
async def test_m89_a_budget_of_seven(simulator: Simulator, in_flight: int, keyed: bool) -> None:
    """M89: three items of 2, and no more than three submits."""
    budget = Budget(7)
    items = [GenerateRequest(text, key=text) for text in prompts(20)] if keyed else prompts(20)
    async with client_of(simulator, budget=budget) as cv:
        outcomes = await outcomes_of(cv, items, batch_size=4 if keyed else 1, max_in_flight=in_flight)
    assert simulator.requests["submit"] == 3
    refused = [outcome for outcome in outcomes if isinstance(outcome.error, BudgetExceededError)]
    assert (sum(outcome.ok for outcome in outcomes), len(refused)) == (3, 17)
    assert {(outcome.credits_used, outcome.task_id) for outcome in refused} == {(0, None)}
    assert (budget.spent, budget.reserved) == (6, 0)


@pytest.mark.parametrize("in_flight", [1, 5])
async def test_m89_a_budget_of_seven_for_batches(simulator: Simulator, in_flight: int) -> None:
    """M89: a batch that costs too much is taken apart, so that the budget is used up."""
    budget = Budget(7)
    async with client_of(simulator, budget=budget) as cv:
        outcomes = await outcomes_of(cv, prompts(20), batch_size=4, max_in_flight=in_flight)
    assert sum(outcome.ok for outcome in outcomes) == 3
    assert sum(isinstance(outcome.error, BudgetExceededError) for outcome in outcomes) == 17
    assert simulator.ledger.charged == budget.spent == 6


# Storms.


class Timed(Simulator):
    """A simulator that notes when each submit came, and which it refused."""

    def __init__(self, **options: Any) -> None:
        super().__init__(credits=1000, render=render_tiny, seed=1, **options)
        self.submits: list[tuple[float, Fault | None]] = []

    def strike(self, request: Request) -> Fault | None:
        fault = super().strike(request)
        if request.kind == "submit":
            self.submits.append((anyio.current_time(), fault))
        return fault


def storm(simulator: Simulator, refusals: int, retry_after: str) -> None:
    """Refuse every third submit, so many times."""
    for n in range(refusals):
        simulator.faults.add(
            "submit",
            skip=2 * (n + 1),  # a fault does not count those that an earlier one has struck
            status=429,
            headers={"retry-after": retry_after},
            body={"error": "Slowly.", "code": "MODERATION_RATE_LIMITED"},
        )


@pytest.mark.parametrize("size", [1, 4])
async def test_m87_a_storm_of_429(simulator: Simulator, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """M87: everything is done in the end, and paid for once."""
    for name in ("_FIRST_GAP", "_LONGEST_GAP", "_LEAST_GAP"):
        monkeypatch.setattr(pace_module, name, getattr(pace_module, name) / 200)
    storm(simulator, 10, "0.001")
    async with client_of(simulator, retries=Retries(attempts=10, base_delay=0.001, max_delay=0.001)) as cv:
        outcomes = await outcomes_of(cv, prompts(80 * size), batch_size=size, max_in_flight=10)
        assert cv._core.transport._line.get().paces["submit"]._gap == 0.0
    assert all(outcome.ok for outcome in outcomes)
    assert (simulator.requests["submit"], simulator.ledger.submissions) == (90, 80)


def test_m87_a_storm_pauses_all_and_then_the_pace_recovers() -> None:
    """M87: the pause that one submit is asked for is kept by all, and no slot stays slow for good."""
    simulator = Timed()
    storm(simulator, 5, "7")

    async def main() -> list[Outcome]:
        retries = Retries(attempts=10)
        async with AsyncConceptViz(simulator.api_key, transport=simulator.transport(), retries=retries) as cv:
            items = prompts(100)
            return [outcome async for outcome in cv.generate_many(items, batch_size=1, max_in_flight=100)]

    outcomes = in_virtual_time(main)
    assert sum(outcome.ok for outcome in outcomes) == 100
    times = [at for at, _ in simulator.submits]
    refused = [at for at, fault in simulator.submits if fault is not None]
    assert len(refused) == 5
    for start in refused:
        assert not [at for at in times if start < at < start + 6.999]
    assert times[-1] - times[-40] < 0.1


# Leaving, in every way.


class LeavingError(Exception):
    """What the items, a hook or the body of the loop raises."""


class Mark:
    """Told of each outcome or event; says when it is time to leave."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self) -> bool:
        self.left -= 1
        return self.left == -1


async def take(cv: AsyncConceptViz, taken: list[Outcome], items: Any = None, **options: Any) -> None:
    """Take the outcomes one by one, and keep those that came if an error comes after them."""
    async for outcome in cv.generate_many(items or prompts(40), batch_size=1, max_in_flight=8, **options):
        taken.append(outcome)  # noqa: PERF401 - see above


async def leave(cv: AsyncConceptViz, taken: list[Outcome], after: int, **options: Any) -> None:
    is_time = Mark(after)
    async for outcome in cv.generate_many(prompts(40), batch_size=1, max_in_flight=8, **options):
        taken.append(outcome)
        if is_time():
            break


async def raise_in_the_loop(cv: AsyncConceptViz, taken: list[Outcome], after: int, **options: Any) -> None:
    is_time = Mark(after)
    with suppress(LeavingError):
        async for outcome in cv.generate_many(prompts(40), batch_size=1, max_in_flight=8, **options):
            taken.append(outcome)
            if is_time():
                raise LeavingError


async def cancel_the_consumer(cv: AsyncConceptViz, taken: list[Outcome], after: int, **options: Any) -> None:
    is_time = Mark(after)

    async def consume() -> None:
        async for outcome in cv.generate_many(prompts(40), batch_size=1, max_in_flight=8, **options):
            taken.append(outcome)
            if is_time():
                tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(consume)


async def close_the_iterator(cv: AsyncConceptViz, taken: list[Outcome], after: int, **options: Any) -> None:
    is_time = Mark(after)
    outcomes = cv.generate_many(prompts(40), batch_size=1, max_in_flight=8, **options)
    async for outcome in outcomes:
        taken.append(outcome)
        if is_time():
            await outcomes.aclose()  # type: ignore[attr-defined]


async def exhaust_items_that_raise(cv: AsyncConceptViz, taken: list[Outcome], after: int, **options: Any) -> None:
    def items() -> Iterator[str]:
        yield from prompts(after + 1)
        raise LeavingError

    with pytest.raises(LeavingError):
        await take(cv, taken, items(), **options)
    assert len(taken) == after + 1


WAYS = [leave, raise_in_the_loop, cancel_the_consumer, close_the_iterator, exhaust_items_that_raise]


async def settle(cv: AsyncConceptViz) -> None:
    """Wait until nothing goes on any more."""
    gc.collect()
    with anyio.fail_after(HANG):
        while cv._core.background:  # noqa: ASYNC110 - to call stop() would be one more way of leaving
            await anyio.sleep(0.001)


async def check_usable(cv: AsyncConceptViz, simulator: Simulator) -> None:
    """Nothing more is submitted by itself; nothing is held; the client does its work."""
    submissions = simulator.requests["submit"]
    assert cv._core.poller.waiting == 0
    with anyio.fail_after(HANG):
        outcomes = [outcome async for outcome in cv.generate_many(prompts(8), batch_size=1)]
        assert (await cv.generate("x")).image
    assert all(outcome.ok for outcome in outcomes)
    assert simulator.requests["submit"] == submissions + 9
    turns = cv._core.transport._line.get().turns
    assert set(turns._taken.values()) == {0}


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("after", [0, 7, 20])
@pytest.mark.parametrize("way", WAYS)
async def test_leaving_loses_no_id(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, way: Any, after: int, ordered: bool
) -> None:
    taken: list[Outcome] = []
    async with client_of(simulator) as cv:
        with anyio.fail_after(HANG):
            await way(cv, taken, after, ordered=ordered)
        await settle(cv)
        paid = ids_of(simulator)
        assert {id_ for id_ in paid - ids_in(taken) if id_ not in caplog.text} == set()
        if way is not exhaust_items_that_raise:
            assert simulator.requests["submit"] < 40, "it went on to the end"
        await check_usable(cv, simulator)


@pytest.mark.parametrize("way", WAYS)
async def test_leaving_with_a_journal_loses_no_id(simulator: Simulator, way: Any) -> None:
    """And what is taken up again costs nothing."""
    with journal_path() as path:
        async with client_of(simulator, journal=path) as cv:
            with anyio.fail_after(HANG):
                await way(cv, [], 5)
            await settle(cv)
            with Journal(path) as journal:
                assert {entry.task_id for entry in journal.entries()} - {None} == ids_of(simulator)
            charged = simulator.ledger.charged
            with anyio.fail_after(HANG):
                for task in await cv.resume():
                    await task.wait()
            assert simulator.ledger.charged == charged
            await check_usable(cv, simulator)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("after", [0, 7, 20])
async def test_closing_the_client_in_the_middle_loses_no_id(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, after: int, ordered: bool
) -> None:
    is_time, taken = Mark(after), list[Outcome]()
    cv = client_of(simulator)
    with anyio.fail_after(HANG):
        async for outcome in cv.generate_many(prompts(40), batch_size=1, max_in_flight=8, ordered=ordered):
            taken.append(outcome)
            if is_time():
                await cv.aclose()
    assert {id_ for id_ in ids_of(simulator) - ids_in(taken) if id_ not in caplog.text} == set()
    assert simulator.requests["submit"] < 40
    assert not cv._core.background


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("after", [0, 7, 20])
@pytest.mark.parametrize("kind", ["Submitted", "Polled", "Completed"])
async def test_a_hook_that_raises_loses_no_id(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, kind: str, after: int, ordered: bool
) -> None:
    """What it raises ends the run, as the error itself; the ids of what is still under way are in the log."""
    is_time, taken = Mark(after), list[Outcome]()

    def on_event(event: Event) -> None:
        if type(event).__name__ == kind and is_time():
            raise LeavingError

    async with client_of(simulator, on_event=on_event) as cv:
        with anyio.fail_after(HANG), pytest.raises(LeavingError):
            await take(cv, taken, ordered=ordered)
        await settle(cv)
        assert {id_ for id_ in ids_of(simulator) - ids_in(taken) if id_ not in caplog.text} == set()
        assert simulator.requests["submit"] < 40
        await check_usable(cv, simulator)


# On asyncio a task that is cancelled before it has begun leaves a coroutine that was never awaited.
@pytest.mark.filterwarnings("ignore:.*was never awaited:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_loop_that_ends_in_the_middle_loses_no_id(
    simulator: Simulator, caplog: pytest.LogCaptureFixture, backend: str
) -> None:
    """The program fails while its client is open: the event loop ends, and the run with it.

    The end of asyncio's loop reaches a submit under way too: it is said to be unknown.
    """
    taken: list[Outcome] = []

    async def main() -> None:
        cv = client_of(simulator)
        async for outcome in cv.generate_many(prompts(40), batch_size=1, max_in_flight=8):
            taken.append(outcome)
            if len(taken) == 7:
                raise LeavingError

    with pytest.raises(LeavingError):
        anyio.run(main, backend=backend)
    gc.collect()
    silent = {id_ for id_ in ids_of(simulator) - ids_in(taken) if id_ not in caplog.text}
    assert len(silent) <= (caplog.text.count("it may have been charged") if backend == "asyncio" else 0)
    assert ids_of(simulator) - ids_in(taken) - silent


def suffixes(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


async def test_saved_images_of_a_run_that_is_left(simulator: Simulator, tmp_path: Path) -> None:
    """What is in the folder is whole: a download that is broken off leaves nothing."""
    taken: list[Outcome] = []
    async with client_of(simulator) as cv:
        with anyio.fail_after(HANG):
            await leave(cv, taken, 7, save_to=tmp_path)
        await settle(cv)
        assert all(outcome.path is not None and outcome.path.stat().st_size for outcome in taken)
        await check_usable(cv, simulator)
    assert suffixes(tmp_path) <= {".png", ".jpg", ".jpeg"}
