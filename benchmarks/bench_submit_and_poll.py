"""The first question of this folder: what do a submit and a poll cost beside bare httpx?

CPU time of the client for one POST /generate and one GET /task/{taskId}, on a kept-alive connection. Bare httpx is
handed the body and decodes the JSON; it checks nothing and knows nothing of what may be sent twice.
"""

from __future__ import annotations

import asyncio
from importlib import import_module

import httpx
from _harness import KEY, Benchmark, Figures, per_await, per_call

from conceptviz import AsyncConceptViz, ConceptViz

CALLS = 150
HEADERS = {"Authorization": f"Bearer {KEY}"}
PROMPT = "water cycle diagram showing evaporation, condensation, and precipitation"
BODY = {"prompt": PROMPT, "model": "cv-2", "quality": "2k"}

BENCHMARK = Benchmark(
    "What do a submit and a poll cost, beside bare httpx?",
    figure="cpu_us",
    base="httpx.AsyncClient",
    rounds=5,
)


@BENCHMARK.cell("httpx.AsyncClient")
def httpx_async(url: str) -> Figures:
    async def main() -> Figures:
        async with httpx.AsyncClient(headers=HEADERS) as client:

            async def both() -> object:
                submission = (await client.post(f"{url}/generate", json=BODY)).json()
                return (await client.get(f"{url}/task/{submission['taskId']}")).json()

            return await per_await(both, calls=CALLS)

    return asyncio.run(main())


@BENCHMARK.cell("AsyncConceptViz")
def ours_async(url: str) -> Figures:
    async def main() -> Figures:
        async with AsyncConceptViz(KEY, base_url=url) as cv:

            async def both() -> object:
                task = await cv.submit(PROMPT, model="cv-2", quality="2k")
                return await task.status()

            return await per_await(both, calls=CALLS)

    return asyncio.run(main())


@BENCHMARK.cell("ConceptViz")
def ours_sync(url: str) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        return per_call(lambda: cv.submit(PROMPT, model="cv-2", quality="2k").status(), calls=CALLS)


@BENCHMARK.cell("httpx.Client")
def httpx_sync(url: str) -> Figures:
    with httpx.Client(headers=HEADERS) as client:

        def both() -> object:
            submission = client.post(f"{url}/generate", json=BODY).json()
            return client.get(f"{url}/task/{submission['taskId']}").json()

        return per_call(both, calls=CALLS)


@BENCHMARK.cell("requests.Session", needs="requests")
def requests_session(url: str) -> Figures:
    with import_module("requests").Session() as session:
        session.headers.update(HEADERS)

        def both() -> object:
            submission = session.post(f"{url}/generate", json=BODY).json()
            return session.get(f"{url}/task/{submission['taskId']}").json()

        return per_call(both, calls=CALLS)


@BENCHMARK.cell("aiohttp", needs="aiohttp")
def aiohttp(url: str) -> Figures:
    async def main() -> Figures:
        async with import_module("aiohttp").ClientSession(headers=HEADERS) as session:

            async def both() -> object:
                async with session.post(f"{url}/generate", json=BODY) as response:
                    submission = await response.json()
                async with session.get(f"{url}/task/{submission['taskId']}") as response:
                    return await response.json()

            return await per_await(both, calls=CALLS)

    return asyncio.run(main())


if __name__ == "__main__":
    BENCHMARK.main()
