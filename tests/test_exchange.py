"""What exchanges share: whose turn it is, what belongs to one event loop, and bodies in pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator

import anyio
import anyio.lowlevel
import pytest
from anyio.abc import TaskGroup

from conceptviz import InvalidRequestError
from conceptviz._exchange import PIECE, Kind, LoopBound, Pieces, Turns, finish, share_of

pytestmark = pytest.mark.anyio


def test_shares() -> None:
    """The last quarter is kept for the other kind; of fewer than four there is no quarter."""
    assert [share_of(limit) for limit in (1, 2, 3, 4, 5, 8, 20, 100)] == [1, 2, 3, 3, 4, 6, 15, 75]


class Crowd:
    """Those who want a turn, each in a task of its own, and who has one, in the order in which they got it."""

    def __init__(self, limit: int, tasks: TaskGroup) -> None:
        self.turns = Turns(limit)
        self.tasks = tasks
        self.held: list[str] = []
        self.scopes: dict[str, anyio.CancelScope] = {}

    async def ask(self, kind: Kind, *names: str) -> None:
        """Have some ask for a turn, one after the other, and let those come to it who can."""
        for name in names:
            self.scopes[name] = anyio.CancelScope()
            self.tasks.start_soon(self._take, kind, name)
            await anyio.wait_all_tasks_blocked()

    async def _take(self, kind: Kind, name: str) -> None:
        with self.scopes[name]:
            await self.turns.take(kind)
            self.held.append(name)

    async def give_back(self, kind: Kind) -> None:
        self.turns.give_back(kind)
        await anyio.wait_all_tasks_blocked()


async def test_each_kind_has_its_share_and_the_rest_is_for_the_other() -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(8, tasks)
        await crowd.ask("submit", *(f"s{n}" for n in range(9)))
        assert crowd.held == [f"s{n}" for n in range(6)]
        await crowd.ask("look", "l0", "l1", "l2")
        assert crowd.held[6:] == ["l0", "l1"]
        tasks.cancel_scope.cancel()


async def test_first_come_first_served() -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(1, tasks)
        await crowd.ask("look", "a", "b", "c", "d")
        for _ in range(3):
            await crowd.give_back("look")
        assert crowd.held == ["a", "b", "c", "d"]


async def test_nobody_overtakes_who_waits() -> None:
    """A place that is free for a moment is for the one in the queue, not for the one who comes by."""
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(1, tasks)
        await crowd.ask("look", "a", "waiting")
        crowd.turns.give_back("look")
        await crowd.ask("look", "coming by")
        assert crowd.held == ["a", "waiting"]
        await crowd.give_back("look")
        assert crowd.held == ["a", "waiting", "coming by"]


async def test_of_one_place_submits_and_looks_have_every_other() -> None:
    """Where there is no quarter to keep, the other kind comes first when a place is given back."""
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(1, tasks)
        await crowd.ask("look", "l0", "l1", "l2")
        await crowd.ask("submit", "s0", "s1")
        for kind in ("look", "submit", "look", "submit"):
            await crowd.give_back(kind)
        assert crowd.held == ["l0", "s0", "l1", "s1", "l2"]


async def test_who_waits_in_vain_leaves_nothing_behind() -> None:
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(1, tasks)
        await crowd.ask("look", "a", "cancelled", "b")
        crowd.scopes["cancelled"].cancel()
        await anyio.wait_all_tasks_blocked()
        await crowd.give_back("look")
        assert crowd.held == ["a", "b"]
        await crowd.give_back("look")
        await crowd.ask("submit", "c")
        assert crowd.held == ["a", "b", "c"]


async def test_a_place_that_is_given_in_the_moment_of_the_cancellation_is_not_lost() -> None:
    """Granted and cancelled before the waiting task ran again: the place goes to the next one."""
    async with anyio.create_task_group() as tasks:
        crowd = Crowd(1, tasks)
        await crowd.ask("look", "a", "cancelled", "b")
        crowd.scopes["cancelled"].cancel()
        await crowd.give_back("look")
        assert crowd.held == ["a", "b"]
        await crowd.give_back("look")
        await crowd.ask("submit", "c")
        assert crowd.held == ["a", "b", "c"]


async def test_however_it_goes_no_place_is_lost_or_made() -> None:
    """Takers that are cancelled all over the place, in every order."""
    turns = Turns(4)
    under_way, most = 0, 0

    async def visit(kind: Kind, patience: int, stay: int) -> None:
        nonlocal under_way, most
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def give_up() -> None:
                    for _ in range(patience):
                        await anyio.lowlevel.checkpoint()
                    scope.cancel()

                tasks.start_soon(give_up)
                await turns.take(kind)
                try:
                    under_way += 1
                    most = max(most, under_way)
                    for _ in range(stay):
                        await anyio.lowlevel.checkpoint()
                finally:
                    under_way -= 1
                    turns.give_back(kind)
                tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as crowd:
        for patience in range(1, 25):
            for stay in range(4):
                crowd.start_soon(visit, "look" if (patience + stay) % 2 else "submit", patience, stay)
    assert most == 4
    assert turns._free == 4
    assert turns._taken == {"look": 0, "submit": 0}
    assert not any(turns._waiting.values())


class Thing:
    """Something that belongs to an event loop."""

    made: list[Thing]

    def __init__(self) -> None:
        self.closed = 0
        self.made.append(self)

    async def aclose(self) -> None:
        self.closed += 1


@pytest.fixture(name="bound")
def _bound(monkeypatch: pytest.MonkeyPatch) -> LoopBound[Thing]:
    monkeypatch.setattr(Thing, "made", [], raising=False)
    return LoopBound(Thing, Thing.aclose)


def test_each_event_loop_has_its_own(bound: LoopBound[Thing], anyio_backend: str) -> None:
    async def twice() -> Thing:
        thing = bound.get()
        assert bound.get() is thing
        return thing

    assert Thing.made == []  # nothing is made before it is asked for
    first = anyio.run(twice, backend=anyio_backend)
    second = anyio.run(twice, backend=anyio_backend)
    assert Thing.made == [first, second]
    assert first is not second


async def test_after_the_end_it_is_refused(bound: LoopBound[Thing]) -> None:
    thing = bound.get()
    await bound.aclose()
    await bound.aclose()
    assert thing.closed == 1
    with pytest.raises(InvalidRequestError, match="closed"):
        bound.get()
    assert Thing.made == [thing]


async def test_what_was_never_used_is_closed_without_being_made(bound: LoopBound[Thing]) -> None:
    await bound.aclose()
    with pytest.raises(InvalidRequestError, match="closed"):
        bound.get()
    assert Thing.made == []


def test_in_another_event_loop_it_is_dropped(bound: LoopBound[Thing], anyio_backend: str) -> None:
    """Closing what belongs to a loop that has ended would fail, or wait for ever."""

    async def use() -> None:
        bound.get()

    anyio.run(use, backend=anyio_backend)
    anyio.run(bound.aclose, backend=anyio_backend)
    [thing] = Thing.made
    assert thing.closed == 0


async def test_a_body_in_pieces() -> None:
    """No piece is longer than that, none is empty, and together they are the body."""
    body = (b"a" * (2 * PIECE + 1), b"", b"b", b"c" * PIECE)
    pieces = [piece async for piece in Pieces(body)]
    assert [len(piece) for piece in pieces] == [PIECE, PIECE, 1, 1, PIECE]
    assert b"".join(pieces) == b"".join(body)


async def test_a_stream_that_never_waits_is_not_read_for_ever() -> None:
    """The cancellation that ends a body from within finds no place to strike."""

    class Endless:
        count = 0

        def __aiter__(self) -> Endless:
            return self

        async def __anext__(self) -> bytes:
            self.count += 1
            return b"x"

    stream = Endless()
    await finish(stream, ())
    assert stream.count == 1000


async def test_a_body_that_is_left_ends_from_within() -> None:
    """Each generator of the chain sees its end, and none is left to the garbage collector."""
    ended = []

    async def inner() -> AsyncIterator[bytes]:
        try:
            yield b"a"
            await anyio.sleep_forever()
        finally:
            ended.append("inner")

    async def outer() -> AsyncIterator[bytes]:
        try:
            async for piece in inner():
                yield piece
        finally:
            ended.append("outer")

    chunks = outer()
    assert await anext(chunks) == b"a"
    await finish(chunks, ())
    assert ended == ["inner", "outer"]
