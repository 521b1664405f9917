"""P10: what does it cost to have a 20 MB image safely on disk, beside curl?

Wall time from the request to the return of fsync. Ours also checks the SHA-256, the leading bytes and the length, and
names the file in one step; the rivals write what comes. The memory is what Python holds at the peak of one save beyond
what it held before.
"""

from __future__ import annotations

import os
import subprocess
from importlib import import_module
from pathlib import Path
from typing import IO, Any

import anyio
import httpx
from _harness import KEY, TASK_ID, Benchmark, Figures, Goal, image_url, per_run, per_run_async

from conceptviz import AsyncConceptViz, ConceptViz

BENCHMARK = Benchmark(
    "What does a 20 MB image on disk, verified and synced, cost beside curl?",
    figure="wall_ms",
    base="curl",
    rounds=7,
    goals=[
        Goal("P10", "20 MB saved, verified and synced, x curl", "AsyncConceptViz", "ratio", 1.2, 0.95),
        Goal("P10", "its memory, MiB", "AsyncConceptViz", "memory_mib", 2, 1),
    ],
)


def sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@BENCHMARK.cell("curl")
def curl(url: str) -> Figures:
    def save(folder: Path) -> None:
        path = folder / "image.png"
        subprocess.run(["curl", "--silent", "--show-error", "--fail", "-o", path, image_url(url)], check=True)
        with path.open("rb+") as file:
            sync(file)

    figures = per_run(save)
    del figures["memory_mib"]  # curl's own is not to be seen from here
    return figures


@BENCHMARK.cell("AsyncConceptViz")
def ours_async(url: str) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        image = cv.task(TASK_ID).status().images[0]
    return per_run_async(lambda: AsyncConceptViz(KEY, base_url=url), lambda cv, folder: cv.save(image, folder))


@BENCHMARK.cell("ConceptViz")
def ours_sync(url: str) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        image = cv.task(TASK_ID).status().images[0]
        return per_run(lambda folder: cv.save(image, folder))


@BENCHMARK.cell("httpx.AsyncClient, aiter_bytes, a thread hop per chunk")
def httpx_hops(url: str) -> Figures:
    async def save(client: httpx.AsyncClient, folder: Path) -> None:
        async with client.stream("GET", image_url(url)) as response, await anyio.open_file(folder / "i", "wb") as file:
            async for chunk in response.aiter_bytes():
                await file.write(chunk)
            await anyio.to_thread.run_sync(sync, file.wrapped)

    return per_run_async(httpx.AsyncClient, save)


@BENCHMARK.cell("httpx.AsyncClient, aiter_raw, writing on the loop")
def httpx_plain(url: str) -> Figures:
    async def save(client: httpx.AsyncClient, folder: Path) -> None:
        async with client.stream("GET", image_url(url)) as response:
            with (folder / "i").open("wb") as file:
                async for chunk in response.aiter_raw():
                    file.write(chunk)
                sync(file)

    return per_run_async(httpx.AsyncClient, save)


@BENCHMARK.cell("httpx.Client, iter_raw")
def httpx_sync(url: str) -> Figures:
    with httpx.Client() as client:

        def save(folder: Path) -> None:
            with client.stream("GET", image_url(url)) as response, (folder / "i").open("wb") as file:
                for chunk in response.iter_raw():
                    file.write(chunk)
                sync(file)

        return per_run(save)


@BENCHMARK.cell("requests", needs="requests")
def requests(url: str) -> Figures:
    with import_module("requests").Session() as session:

        def save(folder: Path) -> None:
            with session.get(image_url(url), stream=True) as response, (folder / "i").open("wb") as file:
                for chunk in response.iter_content(65536):
                    file.write(chunk)
                sync(file)

        return per_run(save)


@BENCHMARK.cell("aiohttp", needs="aiohttp")
def aiohttp(url: str) -> Figures:
    async def save(session: Any, folder: Path) -> None:
        async with session.get(image_url(url)) as response:
            with (folder / "i").open("wb") as file:
                async for chunk in response.content.iter_chunked(65536):
                    file.write(chunk)
                sync(file)

    return per_run_async(lambda: import_module("aiohttp").ClientSession(), save)


if __name__ == "__main__":
    BENCHMARK.main()
