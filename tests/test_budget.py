"""The budget: exact whatever is done at the same time, and asked before anything is sent. M is a row of the matrix."""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
from helpers import KEY, QUICK, QUICK_POLLING
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from conceptviz import (
    AsyncConceptViz,
    Budget,
    BudgetExceededError,
    Credits,
    InvalidRequestError,
    NotSentError,
    SubmissionUnknownError,
)
from conceptviz._budget import Reservation, resolve_budget
from conceptviz.simulator import Simulator, render_tiny


@contextmanager
def hurried_threads() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def together(count: int, work: Any) -> None:
    start = threading.Barrier(count)

    def run() -> None:
        start.wait()
        work()

    threads = [threading.Thread(target=run) for _ in range(count)]
    with hurried_threads():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("limit", [-1, 1.5, "7", True, None])
def test_a_limit_is_a_whole_number_of_credits(limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="whole number of credits"):
        Budget(limit)


def test_what_a_client_is_given_as_a_budget() -> None:
    budget = Budget(3)
    assert resolve_budget(None) is None
    assert resolve_budget(budget) is budget
    made = resolve_budget(7)
    assert made is not None
    assert made.limit == 7


def test_a_budget_shows_its_book() -> None:
    budget = Budget(9)
    budget.reserve(3)
    budget.reserve(2).settle(None)
    assert repr(budget) == "<Budget 2 spent and 3 reserved of 9>"
    assert (budget.limit, budget.spent, budget.reserved, budget.remaining) == (9, 2, 3, 4)


def test_a_refusal_says_what_is_left() -> None:
    budget = Budget(7)
    budget.reserve(2).settle(2)
    budget.reserve(2)
    with pytest.raises(
        BudgetExceededError, match=r"costs 4 credits, and 3 .* of 7 remain \(2 spent, 2 reserved\)"
    ) as e:
        budget.reserve(4)
    assert e.value.credits is Credits.NOT_SPENT
    assert "Nothing was sent" in str(e.value)
    budget.reserve(3)
    assert budget.remaining == 0


def test_a_model_without_a_price_cannot_be_budgeted() -> None:
    budget = Budget(7)
    with pytest.raises(BudgetExceededError, match="no price"):
        budget.reserve(None)
    assert budget.remaining == 7


@pytest.mark.parametrize(("used", "counts"), [(None, 2), (0, 2), (1, 2), (2, 2), (5, 5)])
def test_what_was_reserved_is_the_least_that_is_counted(used: int | None, counts: int) -> None:
    budget = Budget(4)
    budget.reserve(2).settle(used)
    assert (budget.spent, budget.reserved) == (counts, 0)


def test_a_budget_that_was_overdrawn_has_nothing_left() -> None:
    """The service may charge more than its page says."""
    budget = Budget(4)
    budget.reserve(2).settle(50)
    assert budget.remaining == 0
    with pytest.raises(BudgetExceededError, match="and 0 of"):
        budget.reserve(1)


def test_what_comes_after_the_end_changes_nothing() -> None:
    budget = Budget(10)
    settled, released = budget.reserve(2), budget.reserve(3)
    settled.refund()
    assert (budget.spent, budget.reserved) == (0, 5)
    settled.settle(2)
    released.release()
    for _ in range(2):
        settled.settle(2)
        settled.release()
        released.settle(3)
        released.release()
        released.refund()
        assert (budget.spent, budget.reserved) == (2, 0)
    settled.refund()
    settled.refund()
    settled.settle(2)
    assert (budget.spent, budget.reserved) == (0, 0)


class Book(RuleBasedStateMachine):
    """A budget beside a book that is kept by hand: for each reservation what it holds and what it spent."""

    reservations: Bundle[Reservation] = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.budget = Budget(20)
        self.held: dict[Reservation, int] = {}
        self.spent: dict[Reservation, int] = {}

    @rule(target=reservations, credits=st.integers(0, 8))
    def reserve(self, credits: int) -> Any:
        fits = sum(self.held.values()) + sum(self.spent.values()) + credits <= 20
        try:
            reservation = self.budget.reserve(credits)
        except BudgetExceededError:
            assert not fits
            return multiple()
        assert fits
        self.held[reservation] = credits
        return reservation

    @rule(reservation=reservations)
    def release(self, reservation: Reservation) -> None:
        reservation.release()
        self.held.pop(reservation, None)

    @rule(reservation=reservations, used=st.none() | st.integers(0, 9))
    def settle(self, reservation: Reservation, used: int | None) -> None:
        reservation.settle(used)
        if reservation in self.held:
            self.spent[reservation] = max(self.held.pop(reservation), used or 0)

    @rule(reservation=reservations)
    def refund(self, reservation: Reservation) -> None:
        reservation.refund()
        self.spent.pop(reservation, None)

    @rule(reservation=consumes(reservations))
    def forget(self, reservation: Reservation) -> None:
        """An unknown submit: nobody settles it, and what it holds stays held."""

    @invariant()
    def agrees(self) -> None:
        assert self.budget.reserved == sum(self.held.values())
        assert self.budget.spent == sum(self.spent.values())
        assert self.budget.remaining == max(0, 20 - self.budget.reserved - self.budget.spent)


TestBook = Book.TestCase
TestBook.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_threads_together_never_reserve_more_than_there_is() -> None:
    budget = Budget(50)
    made: list[Reservation] = []

    def work() -> None:
        for _ in range(50):
            try:
                made.append(budget.reserve(1))
            except BudgetExceededError:  # noqa: PERF203 - the end of the budget is what is looked for
                return

    together(8, work)
    assert (len(made), budget.reserved, budget.remaining) == (50, 50, 0)


@pytest.mark.parametrize("end", ["release", "settle", "refund"])
def test_an_end_counts_once_however_many_threads_bring_it(end: str) -> None:
    for _ in range(40):
        budget = Budget(10)
        reservation, _kept = budget.reserve(2), budget.reserve(3)
        if end == "refund":
            reservation.settle(2)
        act = (lambda r=reservation: r.settle(2)) if end == "settle" else getattr(reservation, end)
        together(4, act)
        assert (budget.reserved, budget.spent) == (3, 2 if end == "settle" else 0)


def clients(simulator: Simulator, budget: Budget, count: int = 1, **options: Any) -> list[AsyncConceptViz]:
    return [
        AsyncConceptViz(simulator.api_key, transport=simulator.transport(), budget=budget, retries=QUICK, **options)
        for _ in range(count)
    ]


async def submit_all(all_clients: list[AsyncConceptViz], count: int) -> list[Any]:
    outcomes: list[Any] = []

    async def submit(client: AsyncConceptViz, number: int) -> None:
        try:
            outcomes.append(await client.submit(f"prompt {number}"))
        except BudgetExceededError as error:
            outcomes.append(error)

    async with anyio.create_task_group() as tasks:
        for number in range(count):
            tasks.start_soon(submit, all_clients[number % len(all_clients)], number)
    for client in all_clients:
        await client.aclose()
    return outcomes


@pytest.mark.anyio
@pytest.mark.parametrize("count", [1, 3])
async def test_m89_a_budget_of_seven_pays_for_three_submits_of_two(count: int) -> None:
    """20 at the same time, from one client or from several that share the budget: 3 POSTs by the service's own book."""
    simulator, budget = Simulator(render=render_tiny), Budget(7)
    outcomes = await submit_all(clients(simulator, budget, count), 20)
    refused = [outcome for outcome in outcomes if isinstance(outcome, BudgetExceededError)]
    assert (len(outcomes), len(refused)) == (20, 17)
    assert simulator.requests["submit"] == simulator.ledger.submissions == 3
    assert (budget.spent, budget.reserved, budget.remaining) == (6, 0, 1)


@pytest.mark.anyio
async def test_a_price_that_does_not_fit_is_refused_before_anything_is_sent() -> None:
    simulator, budget = Simulator(render=render_tiny), Budget(7)
    [client] = clients(simulator, budget)
    async with client:
        with pytest.raises(BudgetExceededError):
            await client.submit(["a", "b", "c", "d"])
        await client.submit(["a", "b", "c"])
    assert (simulator.requests["submit"], budget.spent) == (1, 6)


@pytest.mark.anyio
async def test_what_was_never_sent_and_what_was_refused_is_given_back() -> None:
    simulator, budget = Simulator(render=render_tiny), Budget(2)
    simulator.faults.add("submit", refuse=True, times=3)
    [client] = clients(simulator, budget)
    async with client:
        with pytest.raises(NotSentError):
            await client.submit("a")
        with pytest.raises(Exception, match="INPUT_MODERATION_BLOCKED"):
            await client.submit("[sim:blocked]")
        assert (budget.spent, budget.reserved) == (0, 0)
        await client.submit("a")
    assert budget.remaining == 0


@pytest.mark.anyio
async def test_what_nobody_knows_stays_reserved() -> None:
    simulator, budget = Simulator(render=render_tiny), Budget(3)
    simulator.faults.add("submit", close=True, accept=True)
    [client] = clients(simulator, budget)
    async with client:
        with pytest.raises(SubmissionUnknownError):
            await client.submit("a")
        assert (budget.spent, budget.reserved) == (0, 2)
        with pytest.raises(BudgetExceededError):
            await client.submit("b")
    assert simulator.ledger.submissions == 1


@pytest.mark.anyio
async def test_a_refund_can_be_spent_again() -> None:
    simulator, budget = Simulator(render=render_tiny, speed=100_000), Budget(2)
    [client] = clients(simulator, budget, polling=QUICK_POLLING)
    async with client:
        task = await client.submit("[sim:failed]")
        assert budget.remaining == 0
        for _ in range(2):
            with pytest.raises(Exception, match="refunded"):
                await task.wait()
            assert (budget.spent, budget.remaining) == (0, 2)
        await client.submit("a")
    assert (simulator.ledger.charged, simulator.ledger.refunded) == (4, 2)


@pytest.mark.anyio
async def test_a_budget_of_nothing_pays_for_nothing() -> None:
    async with AsyncConceptViz(KEY, budget=0) as client:
        with pytest.raises(BudgetExceededError):
            await client.submit("a")
