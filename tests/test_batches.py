"""Items become batches: what is joined, what is taken apart, what files are called, and how items are drawn."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptviz import (
    BudgetExceededError,
    Credits,
    EditRequest,
    GenerateRequest,
    Image,
    InvalidRequestError,
    Outcome,
    Result,
    ServerError,
)
from conceptviz._batches import Batch, Options, as_batch, check_items, draw, in_threads
from conceptviz._outcomes import no_image, not_submitted, outcomes_of

PNG = b"\x89PNG"


def batch(*items: Any) -> Batch:
    """The batch of items that follow each other."""
    return reduce(Batch.join, (as_batch(item, place, place) for place, item in enumerate(items)))


def takes(one: Any, other: Any) -> bool:
    return as_batch(one, 0, 0).takes(as_batch(other, 1, 1))


def test_a_str_is_a_request() -> None:
    made = as_batch("a", 3, 2)
    assert made.request == GenerateRequest("a")
    assert (made.place, made.index, made.size, made.is_one_item, made.names) == (3, 2, 1, False, (None,))


@pytest.mark.parametrize("item", [5, None, b"a", ["a"], object()])
def test_what_is_no_item(item: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"Item 7 is neither .* but {type(item).__name__}") as caught:
        as_batch(item, 9, 7)
    assert caught.value.credits is Credits.NOT_SPENT


def test_a_bad_prompt_is_a_bad_item() -> None:
    with pytest.raises(InvalidRequestError, match="blank"):
        as_batch("  ", 0, 0)


def test_files_of_one_request_are_numbered() -> None:
    """One prompt has the name as it is, several have it with their place; without a name there is none to number."""
    assert as_batch(GenerateRequest("a", name="x"), 0, 0).names == ("x",)
    assert as_batch(GenerateRequest(["a", "b"], name="x"), 0, 0).names == ("x-0", "x-1")
    assert as_batch(GenerateRequest(["a", "b"]), 0, 0).names == (None, None)
    assert as_batch(EditRequest("a", PNG, name="x"), 0, 0).names == ("x",)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", "b"),
        ("a", GenerateRequest("b")),
        (GenerateRequest("a", name="x"), GenerateRequest("b", name="y")),
        (GenerateRequest("a", model="cv-1", quality="4k"), GenerateRequest("b", model="cv-1", quality="4k")),
        (GenerateRequest(["a"]), GenerateRequest("b")),
    ],
)
def test_what_may_share_a_request(one: Any, other: Any) -> None:
    assert takes(one, other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a", GenerateRequest("b", model="cv-1")),
        (GenerateRequest("a", aspect_ratio="1:1"), GenerateRequest("b", aspect_ratio="4:3")),
        ("a", GenerateRequest("b", model="cv-2")),  # the same by the page of today, and not said to be
        ("a", GenerateRequest("b", key="k")),
        (GenerateRequest("a", key="k"), "b"),
        (GenerateRequest("a", key="k"), GenerateRequest("b", key="k")),
        ("a", GenerateRequest(["b", "c"])),
        (GenerateRequest(["a", "b"]), "c"),
        ("a", EditRequest("b", PNG)),
        (EditRequest("a", PNG), "b"),
        (EditRequest("a", PNG), EditRequest("b", PNG)),
    ],
)
def test_what_may_not(one: Any, other: Any) -> None:
    """Other settings, a key, an item that is a batch already, an edit."""
    assert not takes(one, other)


def test_only_neighbours_share_a_request() -> None:
    """Between the two of a batch there is no item of another: what index an outcome has follows from its place."""
    assert not as_batch("a", 0, 0).takes(as_batch("b", 2, 2))
    assert not as_batch("a", 1, 1).takes(as_batch("b", 0, 0))
    assert batch("a", "b").takes(as_batch("c", 2, 2))
    assert not batch("a", "b").takes(as_batch("c", 1, 1))


def test_joined() -> None:
    joined = batch(GenerateRequest("a", model="cv-1", name="x"), GenerateRequest("b", model="cv-1", name="y"))
    assert joined.request == GenerateRequest(["a", "b"], model="cv-1")  # the request has no name: its prompts do
    assert (joined.names, joined.size, joined.is_one_item) == (("x", "y"), 2, False)
    assert joined.can_grow
    assert joined.can_be_halved


def test_halves_of_items() -> None:
    """Each half knows which items and prompts are its own."""
    first, second = batch(*(GenerateRequest(prompt, name=f"n{prompt}") for prompt in "abcd")).halves()
    assert (first.request.prompts, first.place, first.index, first.names) == (("a", "b"), 0, 0, ("na", "nb"))
    assert (second.request.prompts, second.place, second.index, second.names) == (("c", "d"), 2, 2, ("nc", "nd"))
    last = second.halves()[1]
    assert (last.request.prompts, last.place, last.index, last.names) == (("d",), 3, 3, ("nd",))
    assert not last.can_be_halved


def test_halves_of_one_item() -> None:
    """Its prompts keep its index and their numbers, also where they are alone."""
    first, second = as_batch(GenerateRequest(["a", "b", "c"], model="cv-1", name="x"), 10, 4).halves()
    assert (first.request.prompts, first.place, first.index, first.names) == (("a",), 10, 4, ("x-0",))
    assert (second.request.prompts, second.place, second.index, second.names) == (("b", "c"), 11, 4, ("x-1", "x-2"))
    assert first.is_one_item
    assert first.request.model == "cv-1"
    assert not first.can_grow  # nobody else's prompt comes into the place of the other half


def test_what_a_key_names_is_not_taken_apart() -> None:
    assert not as_batch(GenerateRequest(["a", "b"], key="k"), 0, 0).can_be_halved
    assert as_batch(GenerateRequest(["a", "b"]), 0, 0).can_be_halved
    assert not as_batch(EditRequest("a", PNG), 0, 0).can_be_halved


@given(st.integers(2, 4), st.booleans(), st.integers(0, 50), st.integers(0, 50))
def test_halves_of_halves_are_all_of_it_once(size: int, is_one_item: bool, place: int, index: int) -> None:
    prompts = [f"p{n}" for n in range(size)]
    if is_one_item:
        whole = as_batch(GenerateRequest(prompts, name="x"), place, index)
    else:
        items = (as_batch(GenerateRequest(p, name=p), place + n, index + n) for n, p in enumerate(prompts))
        whole = reduce(Batch.join, items)
    pending, singles = [whole], []
    while pending:
        one = pending.pop(0)
        if one.can_be_halved:
            pending[:0] = one.halves()
        else:
            singles.append(one)
    assert [single.request.prompts for single in singles] == [(prompt,) for prompt in prompts]
    assert [single.place for single in singles] == list(range(place, place + size))
    assert [single.index for single in singles] == [index + (0 if is_one_item else n) for n in range(size)]
    assert sum((single.names for single in singles), ()) == whole.names


@pytest.mark.parametrize("items", ["a prompt", b"a", bytearray(b"a"), GenerateRequest("a"), EditRequest("a", PNG)])
def test_one_item_is_no_items(items: Any) -> None:
    """A str above all: it would be as many prompts as it has letters."""
    with pytest.raises(InvalidRequestError, match="put it in a list"):
        check_items(items)


@pytest.mark.parametrize("items", [5, None, object()])
def test_what_cannot_be_drawn_from(items: Any) -> None:
    with pytest.raises(InvalidRequestError, match=type(items).__name__):
        check_items(items)


@pytest.mark.parametrize("items", [[], (), iter("ab"), {"a": 1}, (c for c in "ab")])
def test_what_can(items: Any) -> None:
    check_items(items)


@pytest.mark.parametrize("good", [(1, 1, None), (4, 10_000, 0.5), (2, 5, 3)])
def test_options(good: tuple[int, int, float | None]) -> None:
    size, most, timeout = good
    assert Options(size, most, False, Path("x"), timeout).batch_size == size


@pytest.mark.parametrize(
    ("size", "most", "timeout", "said"),
    [
        (0, 5, None, "batch_size must be 1 to 4"),
        (5, 5, None, "batch_size must be 1 to 4"),
        (True, 5, None, "batch_size"),
        (2.0, 5, None, "batch_size"),
        (4, 0, None, "max_in_flight must be at least 1"),
        (4, True, None, "max_in_flight"),
        (4, 5, 0, "timeout"),
        (4, 5, -1.0, "timeout"),
        (4, 5, True, "timeout"),
        (4, 5, "5", "timeout"),
        (4, 5, float("nan"), "timeout"),
    ],
)
def test_options_that_cannot_be(size: Any, most: Any, timeout: Any, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        Options(size, most, False, None, timeout)


def test_what_a_task_cost_is_shared_out_to_the_last_credit() -> None:
    """What does not divide evenly is on the first ones."""
    three = batch("a", "b", "c")
    images: list[Any] = [Outcome(0, "", image=Image(f"https://x/{n}", index=n)) for n in range(3)]
    outcomes = outcomes_of(three, images, "task", 8)
    assert [outcome.credits_used for outcome in outcomes] == [3, 3, 2]
    assert [(outcome.index, outcome.prompt, outcome.task_id) for outcome in outcomes] == [
        (0, "a", "task"),
        (1, "b", "task"),
        (2, "c", "task"),
    ]
    assert [outcome.image and outcome.image.index for outcome in outcomes] == [0, 1, 2]
    assert [outcome.credits_used for outcome in outcomes_of(three, images, "task", None)] == [None] * 3


@pytest.mark.parametrize(
    ("credits", "share"),
    [(Credits.NOT_SPENT, 0), (Credits.REFUNDED, 0), (Credits.SPENT, 2), (Credits.UNKNOWN, 2)],
)
def test_what_an_error_cost(credits: Credits, share: int) -> None:
    """Nothing if it says so; else what the receipt says."""
    error = ServerError("no", status_code=500, credits=credits)
    outcomes = outcomes_of(batch("a", "b"), [error, error], "task", 4)
    assert [(outcome.error, outcome.credits_used) for outcome in outcomes] == [(error, share)] * 2


def test_the_prompts_of_one_item_share_its_index_and_key() -> None:
    item = as_batch(GenerateRequest(["a", "b"], key="k"), 5, 3)
    error = BudgetExceededError("no")
    outcomes = outcomes_of(item, [error, error])
    assert [(outcome.index, outcome.key, outcome.task_id) for outcome in outcomes] == [(3, "k", None)] * 2


def test_one_result_for_each_prompt() -> None:
    with pytest.raises(ValueError, match="zip"):
        outcomes_of(batch("a", "b"), [Outcome(0, "")], "task", 4)


def test_what_was_not_submitted_says_why() -> None:
    refusal = BudgetExceededError("The budget is used up.")
    error = not_submitted(refusal)
    assert "The budget is used up." in str(error)
    assert error.__cause__ is refusal
    assert error.credits is Credits.NOT_SPENT


def test_what_came_back_without_an_image_names_its_task() -> None:
    error = no_image(Result("task-1", (Image("https://x/0"),)))
    assert "task-1" in str(error)
    assert (error.task_id, error.credits) == ("task-1", Credits.SPENT)


@pytest.mark.anyio
async def test_any_iterable_is_drawn_one_by_one() -> None:
    drawn = []

    def source() -> Iterator[str]:
        for prompt in "abc":
            drawn.append(prompt)
            yield prompt

    items = draw(source())
    assert drawn == []
    assert await anext(items) == "a"
    assert drawn == ["a"]
    assert [item async for item in items] == ["b", "c"]


@pytest.mark.anyio
@pytest.mark.parametrize("way", ["to the end", "left early", "it raises", "cancelled"])
async def test_an_async_generator_is_closed_however_that_comes(way: str) -> None:
    """Its own clean-up may await, though whoever drew is cancelled; nothing is left to the garbage collector."""
    closed = []

    async def source() -> AsyncIterator[str]:
        try:
            yield "a"
            if way == "it raises":
                raise ZeroDivisionError
            if way == "cancelled":
                await anyio.sleep_forever()
        finally:
            closed.append("begun")
            await anyio.lowlevel.checkpoint()
            closed.append("done")

    items = draw(source())
    assert await anext(items) == "a"
    if way == "to the end":
        assert [item async for item in items] == []
    elif way == "left early":
        with anyio.CancelScope() as scope:
            scope.cancel()
            await items.aclose()
    elif way == "it raises":
        with pytest.raises(ZeroDivisionError):
            await anext(items)
    else:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anext, items)
            await anyio.wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
    # One that is cancelled in its own step is cancelled in its clean-up too, as everywhere.
    assert closed == (["begun"] if way == "cancelled" else ["begun", "done"])


@pytest.mark.anyio
async def test_what_cannot_be_closed_need_not_be() -> None:
    class Source:
        def __init__(self) -> None:
            self._left = iter("ab")

        def __aiter__(self) -> Source:
            return self

        async def __anext__(self) -> str:
            for prompt in self._left:
                return prompt
            raise StopAsyncIteration

    assert [item async for item in draw(Source())] == ["a", "b"]


@pytest.mark.anyio
async def test_what_may_block_is_drawn_in_other_threads() -> None:
    """The event loop goes on meanwhile: here it is what lets the source go on."""
    go_on, threads = threading.Event(), []

    def source() -> Iterator[str]:
        threads.append(threading.get_ident())
        yield "a"
        threads.append(threading.get_ident())
        assert go_on.wait(10)
        yield "b"

    items = in_threads(source())
    assert isinstance(items, AsyncIterator)
    assert await anext(items) == "a"
    drawn = []

    async def rest() -> None:
        drawn.extend([item async for item in items])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rest)
        await anyio.lowlevel.checkpoint()
        go_on.set()
    assert drawn == ["b"]
    assert threading.get_ident() not in threads
    with pytest.raises(StopAsyncIteration):
        await anext(items)


@pytest.mark.anyio
async def test_what_a_source_raises_in_a_thread_comes_through() -> None:
    def source() -> Iterator[str]:
        yield "a"
        raise ZeroDivisionError

    items = in_threads(source())
    assert isinstance(items, AsyncIterator)
    assert await anext(items) == "a"
    with pytest.raises(ZeroDivisionError):
        await anext(items)


@pytest.mark.parametrize("items", [["a"], ("a",), "a", draw(["a"]), 5, None])
def test_what_does_not_come_one_by_one_is_drawn_as_it_is(items: Any) -> None:
    assert in_threads(items) is items
