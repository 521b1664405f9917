"""What does a journal add to a submit?

Wall time of one POST /generate, first byte to receipt, with its three commits (INTENT, SENDING, ACCEPTED), each synced
to the disk that holds this folder, and without. A submit with a journal and one without take turns in one process, so
that whatever else the machine does meets both alike. What is added is said twice over: median to median, and the
99th percentile with a journal to the median without, which is the harder figure.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from _harness import KEY, Benchmark, Figures, Goal

from conceptviz import AsyncConceptViz, ConceptViz

SUBMITS = 500
WARM_UP = 20
PROMPT = "water cycle diagram showing evaporation, condensation, and precipitation"

BENCHMARK = Benchmark(
    "What does a journal add to a submit?",
    figure="p50_ms",
    base="AsyncConceptViz",
    rounds=3,
    goals=[
        Goal(
            "journal", f"added by a journal, ms at the 99th percentile, {name}", f"{name}, a journal", "added_p99_ms", 5
        )
        for name in ("AsyncConceptViz", "ConceptViz")
    ],
)


def percentiles(seconds: list[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile, in milliseconds."""
    cuts = statistics.quantiles(seconds, n=100)
    return cuts[49] * 1e3, cuts[98] * 1e3


def compared(journalled: list[float], bare: list[float]) -> Figures:
    (p50, p99), (bare_p50, _) = percentiles(journalled), percentiles(bare)
    return {"p50_ms": p50, "p99_ms": p99, "added_p50_ms": p50 - bare_p50, "added_p99_ms": p99 - bare_p50}


@contextmanager
def on_disk() -> Iterator[Path]:
    """Give a file that is not there yet, in this folder: a temporary one may be in memory."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        yield Path(folder, "journal")


async def timed(*works: Callable[[], Awaitable[object]]) -> list[list[float]]:
    """Do some work in turns; return how long each took, each time but the first few."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(WARM_UP + SUBMITS):
        for work, seconds in zip(works, times, strict=True):
            start = time.perf_counter()
            await work()
            seconds.append(time.perf_counter() - start)
    return [seconds[WARM_UP:] for seconds in times]


def timed_sync(*works: Callable[[], object]) -> list[list[float]]:
    """Do as `timed` does, without a loop."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(WARM_UP + SUBMITS):
        for work, seconds in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            seconds.append(time.perf_counter() - start)
    return [seconds[WARM_UP:] for seconds in times]


@BENCHMARK.cell("AsyncConceptViz")
def ours_async(url: str) -> Figures:
    async def main() -> Figures:
        async with AsyncConceptViz(KEY, base_url=url) as cv:
            (bare,) = await timed(lambda: cv.submit(PROMPT))
        return dict(zip(("p50_ms", "p99_ms"), percentiles(bare), strict=True))

    return asyncio.run(main())


@BENCHMARK.cell("AsyncConceptViz, a journal")
def ours_async_journal(url: str) -> Figures:
    async def main() -> Figures:
        with on_disk() as file:
            async with (
                AsyncConceptViz(KEY, base_url=url, journal=file) as kept,
                AsyncConceptViz(KEY, base_url=url) as cv,
            ):
                return compared(*await timed(lambda: kept.submit(PROMPT), lambda: cv.submit(PROMPT)))

    return asyncio.run(main())


@BENCHMARK.cell("ConceptViz", against="ConceptViz")
def ours_sync(url: str) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        (bare,) = timed_sync(lambda: cv.submit(PROMPT))
    return dict(zip(("p50_ms", "p99_ms"), percentiles(bare), strict=True))


@BENCHMARK.cell("ConceptViz, a journal", against="ConceptViz")
def ours_sync_journal(url: str) -> Figures:
    with (
        on_disk() as file,
        ConceptViz(KEY, base_url=url, journal=file) as kept,
        ConceptViz(KEY, base_url=url) as cv,
    ):
        return compared(*timed_sync(lambda: kept.submit(PROMPT), lambda: cv.submit(PROMPT)))


@BENCHMARK.cell("three lines appended to a file, each synced", against="three lines appended to a file, each synced")
def three_syncs(_: str) -> Figures:
    """The floor: what the disk itself asks for three commits."""
    with on_disk() as path, path.open("ab", buffering=0) as file:

        def work() -> None:
            for _ in range(3):
                file.write(b"x" * 300)
                os.fsync(file.fileno())

        (seconds,) = timed_sync(work)
    return dict(zip(("p50_ms", "p99_ms"), percentiles(seconds), strict=True))


if __name__ == "__main__":
    BENCHMARK.main()
