"""P9: what does a blocking call cost beside the same call awaited, and beside it when a thread is busy?

Wall time of one look at a task. The busy thread computes in pure Python and gives up the interpreter only when it is
asked to, every few milliseconds: each hop between threads may then wait for it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import httpx
from _harness import KEY, TASK_ID, Benchmark, Figures, Goal, per_await, per_call

from conceptviz import AsyncConceptViz, ConceptViz

CALLS = 200
BUSY_CALLS = 40
HEADERS = {"Authorization": f"Bearer {KEY}"}

BENCHMARK = Benchmark(
    "What does a blocking call cost, beside the same call awaited?",
    figure="wall_us",
    base="AsyncConceptViz",
    rounds=5,
    goals=[
        Goal("P9", "sync call, x the same awaited", "ConceptViz", "ratio", 1.1, 0.85),
        Goal("P9", "the same with a busy thread", "ConceptViz, busy thread", "ratio", 1.2, 1.0),
    ],
)


def ours_async(url: str, calls: int) -> Figures:
    async def main() -> Figures:
        async with AsyncConceptViz(KEY, base_url=url) as cv:
            return await per_await(cv.task(TASK_ID).status, calls=calls)

    return asyncio.run(main())


def ours_sync(url: str, calls: int) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        return per_call(cv.task(TASK_ID).status, calls=calls)


def httpx_async(url: str, calls: int) -> Figures:
    async def main() -> Figures:
        async with httpx.AsyncClient(headers=HEADERS) as client:

            async def look() -> object:
                return (await client.get(f"{url}/task/{TASK_ID}")).json()

            return await per_await(look, calls=calls)

    return asyncio.run(main())


def httpx_sync(url: str, calls: int) -> Figures:
    with httpx.Client(headers=HEADERS) as client:
        return per_call(lambda: client.get(f"{url}/task/{TASK_ID}").json(), calls=calls)


def spin() -> None:
    while True:
        pass


def add(name: str, run: Callable[[str, int], Figures], awaited: str) -> None:
    @BENCHMARK.cell(name, against=awaited)
    def idle(url: str) -> Figures:
        return run(url, CALLS)

    @BENCHMARK.cell(f"{name}, busy thread", against=f"{awaited}, busy thread")
    def busy(url: str) -> Figures:
        threading.Thread(target=spin, daemon=True).start()
        # The process's CPU time is the busy thread's here.
        return {"wall_us": run(url, BUSY_CALLS)["wall_us"]}


add("AsyncConceptViz", ours_async, "AsyncConceptViz")
add("ConceptViz", ours_sync, "AsyncConceptViz")
add("httpx.AsyncClient", httpx_async, "httpx.AsyncClient")
add("httpx.Client", httpx_sync, "httpx.AsyncClient")

if __name__ == "__main__":
    BENCHMARK.main()
