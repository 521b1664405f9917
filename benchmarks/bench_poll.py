"""P3: what does one look at a task cost, with its typed result, beside one bare GET of httpx?

CPU time of the client per look: one at a time, on a kept-alive connection unless said. Every rival decodes the JSON.
"""

from __future__ import annotations

import asyncio
from importlib import import_module

import httpx
from _harness import KEY, TASK_ID, Benchmark, Figures, Goal, per_await, per_call

from conceptviz import AsyncConceptViz, ConceptViz

CALLS = 300
HEADERS = {"Authorization": f"Bearer {KEY}"}

BENCHMARK = Benchmark(
    "What does one look at a task cost, beside one bare GET of httpx?",
    figure="cpu_us",
    base="httpx.AsyncClient",
    rounds=5,
    goals=[Goal("P3", "CPU per poll with typed result, x httpx", "AsyncConceptViz", "ratio", 0.75, 0.45)],
)


@BENCHMARK.cell("httpx.AsyncClient")
def httpx_async(url: str) -> Figures:
    async def main() -> Figures:
        async with httpx.AsyncClient(headers=HEADERS) as client:

            async def look() -> object:
                return (await client.get(f"{url}/task/{TASK_ID}")).json()

            return await per_await(look, calls=CALLS)

    return asyncio.run(main())


@BENCHMARK.cell("AsyncConceptViz")
def ours_async(url: str) -> Figures:
    async def main() -> Figures:
        async with AsyncConceptViz(KEY, base_url=url) as cv:
            return await per_await(cv.task(TASK_ID).status, calls=CALLS)

    return asyncio.run(main())


@BENCHMARK.cell("ConceptViz")
def ours_sync(url: str) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        return per_call(cv.task(TASK_ID).status, calls=CALLS)


@BENCHMARK.cell("httpx.Client")
def httpx_sync(url: str) -> Figures:
    with httpx.Client(headers=HEADERS) as client:
        return per_call(lambda: client.get(f"{url}/task/{TASK_ID}").json(), calls=CALLS)


@BENCHMARK.cell("requests.Session", needs="requests")
def requests_session(url: str) -> Figures:
    with import_module("requests").Session() as session:
        session.headers.update(HEADERS)
        return per_call(lambda: session.get(f"{url}/task/{TASK_ID}").json(), calls=CALLS)


@BENCHMARK.cell("requests, as on the API page", needs="requests")
def requests_get(url: str) -> Figures:
    requests = import_module("requests")
    return per_call(lambda: requests.get(f"{url}/task/{TASK_ID}", headers=HEADERS).json(), calls=CALLS)


@BENCHMARK.cell("aiohttp", needs="aiohttp")
def aiohttp(url: str) -> Figures:
    async def main() -> Figures:
        async with import_module("aiohttp").ClientSession(headers=HEADERS) as session:

            async def look() -> object:
                async with session.get(f"{url}/task/{TASK_ID}") as response:
                    return await response.json()

            return await per_await(look, calls=CALLS)

    return asyncio.run(main())


if __name__ == "__main__":
    BENCHMARK.main()
