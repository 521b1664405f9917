"""Many processes, one journal, the same keys: each key is paid for once, by the service's own book.

    python -m tests.faults.many_processes --items 1000

The processes are forked from one that has loaded the package, and each opens the journal for itself, all at the same
moment. Some answers are lost after the charge: those keys are unknown to everybody, and charged once. The exit code is
1 if a key was paid for twice, if two processes have different tasks for one key, or if an outcome is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from functools import partial
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import anyio

from conceptviz import AsyncConceptViz, AttemptState, Journal, SubmissionUnknownError
from conceptviz.simulator import Simulator, render_tiny

UNKNOWN = "unknown"


async def work(*, base_url: str, key: str, journal: str, items: int, keys: int, seed: int) -> list[tuple[int, str]]:
    """Submit items at random, a few at a time; return for each its number and its task, or that it is unknown."""
    rng = Random(seed)
    numbers = [rng.randrange(keys) for _ in range(items)]
    outcomes: list[tuple[int, str]] = []

    async def take() -> None:
        while numbers:
            number = numbers.pop()
            try:
                task = await client.submit(f"prompt {number}.", key=f"key-{number}")
                outcomes.append((number, task.id))
            except SubmissionUnknownError:
                outcomes.append((number, UNKNOWN))

    async with AsyncConceptViz(key, base_url=base_url, journal=journal) as client, anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(take)
    return outcomes


def fork(told: dict[str, Any], processes: int) -> int:
    """Fork the processes, each of which leaves a file of outcomes, and wait for them; return how many failed."""
    children = []
    for seed in range(processes):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        status = 1
        try:
            outcomes = anyio.run(partial(work, **told, seed=seed))
            (Path(told["journal"]).parent / f"outcomes-{seed}").write_text(json.dumps(outcomes))
            status = 0
        finally:
            os._exit(status)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children)


def run(*, processes: int = 8, items: int = 1000, keys: int = 0, lost_every: int = 10, folder: Path) -> dict[str, Any]:
    """Run the processes on a journal in this folder; return what happened, with the broken rules under "broken"."""
    keys = keys or max(1, processes * items // 4)
    simulator = Simulator(credits=10**9, render=render_tiny)
    lost = [number for number in range(keys) if number % lost_every == 1]
    for number in lost:
        simulator.faults.add("submit", close=True, accept=True, containing=f"prompt {number}.")
    started = time.monotonic()
    with simulator.serve() as base_url:
        told = {
            "base_url": base_url,
            "key": simulator.api_key,
            "journal": str(folder / "journal"),
            "items": items,
            "keys": keys,
        }
        process = subprocess.run(
            [sys.executable, "-m", "tests.faults.many_processes", "--fork", str(processes)],
            input=json.dumps(told),
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
    outcomes = [(number, task) for file in folder.glob("outcomes-*") for number, task in json.loads(file.read_text())]
    tasks: dict[int, set[str]] = defaultdict(set)
    for number, task in outcomes:
        tasks[number].add(task)
    with Journal(folder / "journal") as journal:
        unknown = len(journal.entries(AttemptState.UNKNOWN))
    broken = [f"key-{number} came to {sorted(found)}" for number, found in tasks.items() if len(found) > 1]
    if process.returncode:
        broken.append(f"{process.returncode} processes failed")
    if len(outcomes) != processes * items:
        broken.append(f"{len(outcomes)} outcomes of {processes * items}")
    if simulator.ledger.submissions != len(tasks):
        broken.append(f"{simulator.ledger.submissions} charges for {len(tasks)} keys")
    if {number for number, found in tasks.items() if UNKNOWN in found} != set(lost) & tasks.keys():
        broken.append("the unknown keys are not those whose answers were lost")
    return {
        "processes": processes,
        "items": len(outcomes),
        "keys": len(tasks),
        "charges": simulator.ledger.submissions,
        "unknown": unknown,
        "seconds": round(time.monotonic() - started, 1),
        "broken": broken,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--items", type=int, default=20, help="for each process")
    parser.add_argument("--keys", type=int, default=0, help="0: a quarter of all items")
    parser.add_argument("--fork", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fork:
        return fork(json.load(sys.stdin), options.fork)
    with TemporaryDirectory() as folder:
        found = run(processes=options.processes, items=options.items, keys=options.keys, folder=Path(folder))
    print(json.dumps(found))
    return 1 if found["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
