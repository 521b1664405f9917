"""Ctrl-C and `asyncio.wait_for` at any instant of a submit, and storms of cancellations.

    python -m tests.faults.interrupts --instants 500 --storms 100

After one Ctrl-C, or a `wait_for` that runs out, the id of what was charged is durable in the journal, or the journal
says UNKNOWN; after a second Ctrl-C the process is gone, and the journal says so too. What the server charged is the
oracle. Ctrl-C is a real signal to a process of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import anyio

from conceptviz import AsyncConceptViz, AttemptState, Journal, Retries

from .kill import measure
from .processes import KEY, Children
from .server import Server
from .steps import Answer, End, Ledger, Script, Step

RUNNING = Step(answer=Answer(status=200, body=b'{"status":"processing"}'))
ENDS = ("KeyboardInterrupt", "CancelledError\n")
# What asyncio's own runner makes of a Ctrl-C that comes while it puts its loop away, when the work is long done.
PUTTING_AWAY = "RuntimeError: Cannot close a running event loop\n"
# Seconds in which a process that was interrupted twice is gone, on the slowest of machines: its grace is twice that.
AT_ONCE = 5.0


def client(server: Server, journal: Journal | None = None, **options: Any) -> AsyncConceptViz:
    retries = Retries(base_delay=0.001, max_delay=0.002)
    return AsyncConceptViz(KEY, base_url=server.base_url, journal=journal, timeout=5.0, retries=retries, **options)


def judge(ledger: Ledger, journal: Journal, key: str) -> tuple[str, list[str]]:
    """Return what the journal says of an interrupted submit, and each way in which that is not so."""
    ids = [post.task_id for post in ledger.accepted if post.prompts == (key,)]
    entries = journal.entries(key=key)
    state = entries[0].state if entries else None
    failures = []
    if len(ids) > 1 or len(entries) > 1:
        failures.append(f"{key}: charged {len(ids)} times in {len(entries)} attempts")
    if ids and state is not AttemptState.UNKNOWN and [entry.task_id for entry in entries] != ids:
        failures.append(f"{key}: charged were {ids}, and the journal says {entries}")
    if not ids and state not in {None, AttemptState.NOT_SENT, AttemptState.UNKNOWN}:
        failures.append(f"{key}: nothing was charged, and the journal says {entries}")
    return "nothing" if state is None else state.value, failures


def ctrl_c(seeds: Iterator[int] | range, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Interrupt a process that submits, once; by turns on asyncio and on trio."""
    with Children() as children, Journal(folder / "ctrl-c") as journal:
        span = measure(children, journal.path)
        for seed in seeds:
            rng, key = Random(f"ctrl-c {seed}"), f"ctrl-c {seed}"
            at = [(rng.uniform(0, span), int(signal.SIGINT))]
            backend = ("asyncio", "trio")[seed % 2]
            with Server(Script(posts=(Step(delay=rng.uniform(0, span / 2)),)), key=KEY) as server:
                status, told = children.run(server.base_url, journal.path, [key], signals=at, backend=backend)
            kind, failures = judge(server.ledger, journal, key)
            # On Python 3.10 anyio's own runner leaves it at the cancellation.
            ends = (*ENDS, PUTTING_AWAY) if key in told else ENDS
            if status != 0 or not told.get("raised", "KeyboardInterrupt").endswith(ends):
                failures.append(f"{key}: ended with {status}, told {told}")
            yield f"{kind}, {'interrupted' if 'raised' in told else 'returned'}", failures


def ctrl_c_twice(seeds: Iterator[int] | range, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Interrupt a process twice that waits for an answer that does not come."""
    with Children() as children, Journal(folder / "twice") as journal:
        span = measure(children, journal.path)
        for seed in seeds:
            key, backend = f"twice {seed}", ("asyncio", "trio")[seed % 2]
            at = [(2 * span, int(signal.SIGINT)), (0.1, int(signal.SIGINT))]
            began = time.monotonic()
            with Server(Script(posts=(Step(answer=None, end=End.SILENCE),)), key=KEY) as server:
                _, told = children.run(server.base_url, journal.path, [key], signals=at, backend=backend)
                taken = time.monotonic() - began
            kind, failures = judge(server.ledger, journal, key)
            if taken > AT_ONCE or kind != "unknown" or told != {"raised": "KeyboardInterrupt"}:
                failures.append(f"{key}: {kind} after {taken:.1f} s, told {told}")
            yield kind, failures


def wait_for(seeds: Iterator[int] | range, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Let `asyncio.wait_for` run out while a submit is under way, and use the client again."""

    async def submit(seed: int, journal: Journal, span: float) -> tuple[Ledger, float]:
        rng, key = Random(f"wait_for {seed}"), f"wait_for {seed}"
        with Server(Script(posts=(Step(delay=rng.uniform(0, 0.01)),)), key=KEY) as server:
            async with client(server, journal) as cv:
                began = time.perf_counter()
                try:
                    await asyncio.wait_for(cv.submit(key, key=key), rng.uniform(0, span))
                except asyncio.TimeoutError:
                    pass
                else:
                    span = time.perf_counter() - began
                await asyncio.wait_for(cv.submit("again"), 5)
            return server.ledger, span

    with Journal(folder / "wait_for") as journal:
        span = 0.05
        for seed in seeds:
            ledger, taken = asyncio.run(submit(seed, journal, span))
            span = (9 * span + 1.2 * taken) / 10  # about as long as it takes, on this machine as it is now
            yield judge(ledger, journal, f"wait_for {seed}")


async def storm(seed: int, server: Server, rounds: int) -> None:
    """Cancel looks and submits of eight tasks again and again within 4 ms, over four connections; then use the client.

    Raises:
        TimeoutError: It is of no use any more.
    """
    async with client(server, max_connections=4) as cv:

        async def work(number: int) -> None:
            rng = Random(f"{seed} {number}")
            for _ in range(rounds):
                with anyio.move_on_after(rng.uniform(0, 0.004)):
                    await (cv.task("x").status() if rng.random() < 0.5 else cv.submit("a"))

        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(work, number)
        with anyio.fail_after(5):
            for _ in range(8):
                await cv.submit("b")


def storms(seeds: range, rounds: int = 150) -> Iterator[tuple[str, list[str]]]:
    for seed in seeds:
        with Server(Script(looks=(RUNNING,) * 8 * rounds), credits=1_000_000) as server:
            try:
                anyio.run(storm, seed, server, rounds, backend=("asyncio", "trio")[seed % 2])
            except TimeoutError:
                yield "wedged", [f"storm {seed}: the client does not answer any more"]
            else:
                yield "answers", []


def tally(outcomes: Iterator[tuple[str, list[str]]]) -> dict[str, Any]:
    every = list(outcomes)
    return {
        "runs": len(every),
        "kinds": dict(sorted(Counter(kind for kind, _ in every).items())),
        "failed": [failures for _, failures in every if failures],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--instants", type=int, default=50, help="of one Ctrl-C, and of wait_for")
    parser.add_argument("--twice", type=int, default=4, help="runs with two of them")
    parser.add_argument("--storms", type=int, default=2, help="storms of 8 tasks x 150 rounds")
    parser.add_argument("--first-seed", type=int, default=0)
    options = parser.parse_args(arguments)

    def seeds(count: int) -> range:
        return range(options.first_seed, options.first_seed + count)

    logging.getLogger("conceptviz").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures = {
            "Ctrl-C": tally(ctrl_c(seeds(options.instants), folder)),
            "Ctrl-C twice": tally(ctrl_c_twice(seeds(options.twice), folder)),
            "wait_for": tally(wait_for(seeds(options.instants), folder)),
            "storms": tally(storms(seeds(options.storms))),
        }
    print(json.dumps(figures, indent=2))
    return 1 if any(figure["failed"] for figure in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
