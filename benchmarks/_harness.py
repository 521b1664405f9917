"""What every benchmark shares: rounds, cells, the server, the printed table and the stored figures.

A benchmark is one question put to several clients. Each client is a cell, and each cell of each round is a fresh
process: nothing that one client has imported, opened or warmed helps another. The cells of a round run one after the
other, so that whatever else the machine does meets all of them alike; the first round warms the disk's cache and is
thrown away; a ratio is the median of the rounds' own ratios.

A rival that is not installed is named in the table and in the stored figures, never left out in silence.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

KEY = "cvk_benchmark"
TASK_ID = "vaW29_MJ1wbnyFU4bl_pd"
# How often `per_run` measures what takes long.
RUNS = 3
RESULTS = Path(__file__).parent / "results"
DISTRIBUTIONS = (
    *("conceptviz", "anyio", "attrs", "httpx", "httpcore", "h11"),
    *("aiohttp", "requests", "openai", "replicate", "fal-client", "runwayml", "lumaai", "google-genai"),
)
# What `import httpx` loads when it is there, for a command line that no SDK uses.
HTTPX_EXTRAS = ("click", "pygments", "rich")

Figures = dict[str, float]
Measure = Callable[[str], Figures]


@dataclass(frozen=True)
class Goal:
    """A figure to reach.

    Attributes:
        row: Its name in the list of goals, such as "P3".
        says: What the figure is, for a reader.
        cell: The cell it is read from.
        figure: The figure's name in that cell.
        limit: The goal.
        bold: The bold goal, if there is one.
        at_least: Whether the goal is a figure to reach from below, such as how many were done.
    """

    row: str
    says: str
    cell: str
    figure: str
    limit: float
    bold: float | None = None
    at_least: bool = False

    def is_met(self, measured: float) -> bool:
        return measured >= self.limit if self.at_least else measured <= self.limit


@dataclass(frozen=True)
class Cell:
    """One client's answer to the question: a whole program, or a function that measures itself.

    Attributes:
        name: The client, as the table shows it.
        run: The source of a program, or a function; both are given the stub's base URL.
        against: The cell that its ratio is formed with.
        needs: The distribution that must be installed for it.
    """

    name: str
    run: str | Measure
    against: str
    needs: str | None

    @property
    def is_absent(self) -> bool:
        return self.needs is not None and version(self.needs) is None


@dataclass
class Benchmark:
    """A question and the cells that answer it.

    Attributes:
        question: The question, in one sentence.
        figure: The figure that ratios are formed of.
        base: The cell that ratios are formed with.
        rounds: How many rounds count.
        goals: What the answer should be.
        less: The cell whose figure is taken off all others before ratios are formed: what every one of them pays.
    """

    question: str
    figure: str
    base: str
    rounds: int
    goals: Sequence[Goal] = ()
    less: str | None = None
    cells: dict[str, Cell] = field(default_factory=dict)

    def program(self, name: str, source: str, *, needs: str | None = None) -> None:
        """Add a whole program, whose process is measured from its start to its end."""
        self.cells[name] = Cell(name, source, self.base, needs)

    def cell(self, name: str, *, needs: str | None = None, against: str | None = None) -> Callable[[Measure], Measure]:
        """Add a function that measures itself, in a process of its own."""

        def add(measure: Measure) -> Measure:
            self.cells[name] = Cell(name, measure, against or self.base, needs)
            return measure

        return add

    def main(self) -> None:
        """Measure one cell if the command line names one, as for a fresh process; else all of them."""
        if len(sys.argv) == 3:
            measure = self.cells[sys.argv[1]].run
            assert callable(measure)
            print(json.dumps(measure(sys.argv[2])))
        else:
            self._measure_all()

    def _measure_all(self) -> None:
        present = [cell for cell in self.cells.values() if not cell.is_absent]
        rounds: list[dict[str, Figures]] = []
        with serving() as url:
            for number in range(self.rounds + 1):
                start = number % len(present)
                order = present[start:] + present[:start]
                rounds.append({cell.name: _run(cell, url) for cell in order})
        self._report(present, rounds[1:])

    def _report(self, present: Sequence[Cell], rounds: Sequence[Mapping[str, Figures]]) -> None:
        base_line = statistics.median(each[self.less][self.figure] for each in rounds) if self.less else 0.0
        cells: dict[str, Figures] = {}
        for cell in present:
            figures = {
                name: _round(statistics.median(each[cell.name][name] for each in rounds))
                for name in rounds[0][cell.name]
            }
            if cell.name != self.less:
                figures["ratio"] = _round(
                    statistics.median(
                        (each[cell.name][self.figure] - base_line) / (each[cell.against][self.figure] - base_line)
                        for each in rounds
                    )
                )
            cells[cell.name] = figures
        absent = [cell.name for cell in self.cells.values() if cell.is_absent]
        report(
            self.question,
            self.figure,
            cells,
            self.goals,
            {"base": self.base, "less": self.less, "rounds": self.rounds, "not_installed": absent},
        )


def report(
    question: str,
    figure: str,
    cells: Mapping[str, Mapping[str, float | str]],
    goals: Sequence[Goal],
    more: Mapping[str, Any],
) -> None:
    """Store what was measured, with where and with what, under the name of the running script; print it."""
    extras = [name for name in HTTPX_EXTRAS if version(name)]
    reached = [(goal, float(cells[goal.cell][goal.figure])) for goal in goals]
    stored = {
        "question": question,
        "figure": figure,
        **more,
        "cells": cells,
        "goals": [
            {
                "row": goal.row,
                "says": goal.says,
                "measured": measured,
                "goal": goal.limit,
                "bold": goal.bold,
                "at_least": goal.at_least,
            }
            for goal, measured in reached
        ],
        "measured": datetime.now(timezone.utc).date().isoformat(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load": round(os.getloadavg()[0], 1),
        "versions": {name: found for name in DISTRIBUTIONS if (found := version(name))},
        "httpx_extras": extras,
    }
    name = Path(sys.argv[0]).stem.removeprefix("bench_")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(stored, indent=2) + "\n")
    print(f"{question}\n")
    print("\n".join(table(cells, figure)))
    for absent in more["not_installed"]:
        print(f"not installed, not measured: {absent}")
    if extras:
        print(f"`import httpx` also loads {', '.join(extras)} here: an environment without them is the fair one")
    for goal, measured in reached:
        met = "met" if goal.is_met(measured) else "NOT met"
        bold = "" if goal.bold is None else f"; bold {goal.bold:g}"
        print(f"{goal.row} {goal.says}: {measured:g}; goal {goal.limit:g} {met}{bold}")
    print()


def table(cells: Mapping[str, Mapping[str, float | str]], figure: str) -> list[str]:
    """Return the lines of a Markdown table: the ratio first, then the figure it is formed of, then the rest."""
    names = list(dict.fromkeys(name for figures in cells.values() for name in figures))
    first = [name for name in ("ratio", figure) if name in names]
    names = [*first, *(name for name in names if name not in first)]
    rows = [
        f"| {cell} | {' | '.join(_shown(figures.get(name, '')) for name in names)} |" for cell, figures in cells.items()
    ]
    return ["| client | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names), *rows]


def _shown(figure: float | str) -> str:
    return figure if isinstance(figure, str) else f"{figure:g}"


def version(distribution: str) -> str | None:
    """Return the version of what is installed, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def serving(script: str = "_server.py", *arguments: str) -> Iterator[str]:
    """Run a stub in a process of its own; give the base URL."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/api/v1"
        # Leaving the block closes its standard input, which is what it ends with.


def per_call(call: Callable[[], object], *, calls: int, warm_up: int = 10) -> Figures:
    """Measure one call of many, in this thread."""
    for _ in range(warm_up):
        call()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        call()
    return _each(cpu, wall, calls)


async def per_await(call: Callable[[], Awaitable[object]], *, calls: int, warm_up: int = 10) -> Figures:
    """Measure one awaited call of many."""
    for _ in range(warm_up):
        await call()
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(calls):
        await call()
    return _each(cpu, wall, calls)


def per_run(run: Callable[[Path], object]) -> Figures:
    """Measure runs in empty folders of their own: one to warm up, one for its memory, the rest for their time."""
    with tempfile.TemporaryDirectory() as made:
        folders = [Path(made, str(n)) for n in range(RUNS + 2)]
        for folder in folders:
            folder.mkdir()
        run(folders[0])
        tracemalloc.start()
        run(folders[1])
        memory = tracemalloc.get_traced_memory()[1] / 2**20
        tracemalloc.stop()
        cpu, wall = _cpu_seconds(), time.perf_counter()
        for folder in folders[2:]:
            run(folder)
        wall, cpu = time.perf_counter() - wall, _cpu_seconds() - cpu
    return {"wall_ms": wall / RUNS * 1e3, "cpu_ms": cpu / RUNS * 1e3, "memory_mib": memory}


def per_run_async(
    open_client: Callable[[], AbstractAsyncContextManager[T]], run: Callable[[T, Path], Coroutine[Any, Any, object]]
) -> Figures:
    """Measure awaited runs as `per_run` does, with one client in one event loop."""
    loop = asyncio.new_event_loop()

    async def opened() -> tuple[AbstractAsyncContextManager[T], T]:
        manager = open_client()
        return manager, await manager.__aenter__()

    manager, client = loop.run_until_complete(opened())
    try:
        return per_run(lambda folder: loop.run_until_complete(run(client, folder)))
    finally:
        loop.run_until_complete(manager.__aexit__(None, None, None))
        loop.close()


def image_url(base_url: str) -> str:
    """Return the URL of the stub's image."""
    return base_url.removesuffix("/api/v1") + "/images/0-water.png"


def clean_environment() -> dict[str, str]:
    """Return the environment without what would change a measurement.

    A proxy must not come between a client and the loopback; PYTHONDONTWRITEBYTECODE would have a source tree compiled
    again and again while installed rivals are not.
    """
    return {k: v for k, v in os.environ.items() if not re.search("proxy|^PYTHON|^CONCEPTVIZ", k, re.IGNORECASE)}


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of those it has waited for: `os.times` counts in steps of 10 ms."""
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _each(cpu: float, wall: float, calls: int) -> Figures:
    return {
        "cpu_us": (time.process_time() - cpu) / calls * 1e6,
        "wall_us": (time.perf_counter() - wall) / calls * 1e6,
    }


def _run(cell: Cell, url: str) -> Figures:
    environment = clean_environment()
    if callable(cell.run):
        done = subprocess.run(
            [sys.executable, sys.argv[0], cell.name, url], env=environment, stdout=subprocess.PIPE, check=True
        )
        figures: Figures = json.loads(done.stdout)
        return figures
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", cell.run, url], env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it again
    if process.returncode:
        raise SystemExit(f"the cell {cell.name!r} failed: see above")
    return {"cpu_ms": (usage.ru_utime + usage.ru_stime) * 1e3, "wall_ms": wall * 1e3}


def _round(value: float) -> float:
    return float(f"{value:.3g}")
