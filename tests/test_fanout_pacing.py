"""generate_many, when there is more to do than can be done at once: what goes first, and what is drawn."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import anyio
import httpx
import pytest
from helpers import KEY, in_virtual_time

from conceptviz import AsyncConceptViz, Outcome, Polling, Retries

# Virtual seconds.
POLLING = Polling(min_interval=3, max_interval=5, first_look=3, typical=(30, 90), timeout=10_000)
PLACES = 20
SUBMITS = LOOKS = 15
FEW = 1
FIRST = 30


class Service:
    """Answers the first submits at once and then none until it is told to; each look takes a while."""

    def __init__(self, look_seconds: float) -> None:
        self.goes_on = anyio.Event()
        self.submits = self.looking = self.looks = self.most = 0
        self.is_over = False
        self._look_seconds = look_seconds

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.method == "POST":
            self.submits += 1
            number = self.submits
            if number > FIRST:
                await self.goes_on.wait()
            return httpx.Response(200, json={"taskId": f"task-{number}", "status": "pending"})
        self.looking += 1
        self.looks += 1
        self.most = max(self.most, self.looking)
        await anyio.sleep(self._look_seconds)
        self.looking -= 1
        if self.is_over:
            return httpx.Response(200, json={"status": "failed", "code": "CONTENT_REJECTED", "error": "No."})
        return httpx.Response(200, json={"status": "processing"})

    async def most_from_now(self, seconds: float) -> int:
        """Return how many looks at the most are under way at once in so many seconds."""
        self.most = self.looking
        await anyio.sleep(seconds)
        return self.most

    def client(self) -> AsyncConceptViz:
        return AsyncConceptViz(
            KEY,
            transport=httpx.MockTransport(self),
            polling=POLLING,
            retries=Retries(attempts=1),
            max_connections=PLACES,
            timeout=100_000,
        )


async def take(outcomes: AsyncIterator[Outcome]) -> None:
    await anext(outcomes)


def test_looks_are_few_while_submits_go_as_fast_as_they_may() -> None:
    """But only for as long as nobody has to wait for long: then they have what submits leave them."""

    async def main() -> list[int]:
        service, found = Service(look_seconds=0.5), list[int]()
        async with service.client() as cv:
            outcomes = cv.generate_many(map(str, range(200)), batch_size=1, max_in_flight=1000)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, outcomes)
                found.append(await service.most_from_now(10))
                assert service.submits == FIRST + SUBMITS
                assert service.looks > 5
                # Thirty looks every five seconds or less, one after the other, take longer than that: they become late.
                await anyio.sleep(60)
                found.append(await service.most_from_now(30))
                service.goes_on.set()
                await anyio.sleep(1)
                assert service.submits == 200
                found.append(await service.most_from_now(30))
                tasks.cancel_scope.cancel()
        return found

    amid, late, after = in_virtual_time(main)
    assert amid == FEW
    assert FEW < late <= PLACES - SUBMITS
    assert after == LOOKS


def test_workers_that_have_left_come_back() -> None:
    """A burst of submits in the middle of a run: before it and after it there are as many looks as it takes."""

    async def main() -> list[int]:
        service, found = Service(look_seconds=1.0), list[int]()
        later = anyio.Event()

        async def items() -> AsyncIterator[str]:
            for n in range(FIRST):
                yield str(n)
            await later.wait()
            for n in range(SUBMITS):
                yield str(n)

        async with service.client() as cv:
            outcomes = cv.generate_many(items(), batch_size=1, max_in_flight=1000)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, outcomes)
                await anyio.sleep(10)
                found.append(await service.most_from_now(10))
                later.set()
                await anyio.sleep(2)
                found.append(await service.most_from_now(5))
                service.goes_on.set()
                await anyio.sleep(1)
                found.append(await service.most_from_now(10))
                service.is_over = True
                with anyio.fail_after(1000):
                    async for _ in outcomes:
                        pass
                tasks.cancel_scope.cancel()
        return found

    before, amid, after = in_virtual_time(main)
    assert before > FEW
    assert amid == FEW
    assert after > FEW


@pytest.mark.parametrize("in_flight", [3, FIRST + 2, 1000])
@pytest.mark.parametrize("size", [1, 3])
def test_as_many_items_are_drawn_as_can_be_submitted(in_flight: int, size: int) -> None:
    """And one batch more, which the next place is for."""
    drawn = 0

    def items() -> Iterator[str]:
        nonlocal drawn
        while True:
            drawn += 1
            yield str(drawn)

    async def main() -> int:
        service = Service(look_seconds=0.1)
        async with service.client() as cv:
            outcomes = cv.generate_many(items(), batch_size=size, max_in_flight=in_flight)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(take, outcomes)
                await anyio.sleep(20)
                tasks.cancel_scope.cancel()
        return service.submits

    submits = in_virtual_time(main)
    assert submits == min(in_flight, FIRST + SUBMITS)
    assert drawn == size * (submits + 1)
