"""kill -9 at any instant: after a resume each key was charged at most once, and each accepted id is known.

    python -m tests.faults.kill --random 2000 --points 20

A process that submits work under keys is killed at a random instant, or at a named point in the writing of its journal;
then another process asks for the same keys. What the server charged is the oracle. It prints its figures, and a
schedule that failed can be run again by its seed alone: `--first-seed N --random 1`.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from attrs import field, frozen

from .processes import KEY, POINTS, RECORDS, Children
from .server import Server
from .steps import End, Ledger, Script, Step, refuse


@frozen
class Schedule:
    """One run that is killed, decided by its seed.

    Attributes:
        seed: The seed.
        keys: The work.
        posts: What the server does with each POST.
        at: The instant at which it is killed, as a part of the time that it would take; None for a point.
        point: Where it is killed.
        backend: The event loop.
    """

    seed: int
    keys: list[str]
    posts: tuple[Step, ...] = field(repr=False)
    at: float | None
    point: str | None
    backend: str


def schedule(seed: int, point: str | None = None) -> Schedule:
    rng = Random(f"{seed} {point}")
    if point is not None:
        refused = {"INTENT again": 429, "an end": 402}.get(point.partition(" ")[2])
        posts: tuple[Step, ...] = (refuse(refused, ""),) if refused else ()
        count = 1
    else:
        posts = tuple(rng.choices([_slow(rng), refuse(429, ""), refuse(402, ""), _lost(rng)], [8, 1, 1, 1], k=6))
        count = rng.randint(1, 3)
    return Schedule(
        seed,
        [f"{seed} {point or 'random'} {n}" for n in range(count)],
        posts,
        None if point else rng.random(),
        point,
        rng.choice(["asyncio", "trio"]),
    )


def _slow(rng: Random) -> Step:
    return Step(delay=rng.uniform(0, 0.01))


def _lost(rng: Random) -> Step:
    return Step(delay=rng.uniform(0, 0.01), answer=None, end=End.FIN)


@frozen
class Outcome:
    """What came of a schedule.

    Attributes:
        schedule: The schedule.
        was_killed: Whether it was, rather than being done before.
        kinds: What each key came to.
        failures: Each invariant that was broken, in a sentence.
    """

    schedule: Schedule
    was_killed: bool
    kinds: list[str]
    failures: list[str]


def run(plan: Schedule, children: Children, journal: Path, span: float) -> Outcome:
    """Run a schedule: the process that is killed, and the one that takes up its work.

    Args:
        plan: The schedule.
        children: Where the processes come from.
        journal: Their journal.
        span: How long a process takes that is not killed, in seconds.
    """
    with Server(Script(posts=plan.posts), key=KEY) as server:
        signals = [] if plan.at is None else [(plan.at * span, int(signal.SIGKILL))]
        status, told = children.run(
            server.base_url,
            journal,
            plan.keys,
            waits=True,
            backend=plan.backend,
            signals=signals,
            point=plan.point,
        )
        charged_before = {post.prompts[0] for post in server.ledger.accepted}
        resumed_status, resumed = children.run(server.base_url, journal, plan.keys, backend=plan.backend)
    was_killed = status == signal.SIGKILL
    failures = list(judge(server.ledger, plan.keys, told, resumed))
    if resumed_status != 0 or (status != 0 and not was_killed):
        failures.append(f"a child ended with {status}, the next with {resumed_status}")
    if plan.point is not None and not was_killed:
        failures.append("the point was never reached")
    return Outcome(plan, was_killed, [_kind(key, charged_before, resumed.get(key)) for key in plan.keys], failures)


def _kind(key: str, charged_before: set[str], resumed: Any) -> str:
    if isinstance(resumed, dict):
        return str(next(iter(resumed)))
    return "taken up" if key in charged_before else "submitted by the next"


def judge(ledger: Ledger, keys: list[str], told: dict[str, Any], resumed: dict[str, Any]) -> Iterator[str]:
    """Name each invariant that is broken.

    Args:
        ledger: What the server charged.
        keys: The work.
        told: What the killed process had told before: an id for a key.
        resumed: What the next process told of each key: an id, an unknown attempt, or an error.
    """
    for words in (told, resumed):
        if "raised" in words:
            yield words["raised"]
    for key in keys:
        ids = [post.task_id for post in ledger.accepted if post.prompts == (key,)]
        end = resumed.get(key)
        if len(ids) > 1:
            yield f"{key}: charged {len(ids)} times"
        if end is None:
            yield f"{key}: nothing is known"
        elif isinstance(end, str):
            if ids != [end]:
                yield f"{key}: named {end}, and charged were {ids}"
        elif "error" in end and ids:
            yield f"{key}: {end['error']}, and charged were {ids}"
        elif end.get("unknown", True) is None:
            yield f"{key}: unknown, and not by the journal"
        if isinstance(told.get(key), str) and end != told[key]:
            yield f"{key}: told as {told[key]}, then as {end}"


def measure(children: Children, journal: Path) -> float:
    """Return about how many seconds a process takes that is not killed, on this machine as it is now."""
    taken = []
    for n in range(4):
        with Server(key=KEY) as server:
            began = time.perf_counter()
            children.run(server.base_url, journal, [f"measured {n} {key}" for key in "ab"], waits=True)
            taken.append(time.perf_counter() - began)
    return 1.2 * min(taken)


def campaign(plans: Iterable[Schedule], workers: int = 2) -> list[Outcome]:
    """Run schedules, some at a time; those of one worker share one journal."""
    local = threading.local()
    all_children: list[Children] = []

    def work(plan: Schedule) -> Outcome:
        if not hasattr(local, "children"):
            local.children, local.journal = Children(), folder / f"{threading.get_ident()}.journal"
            all_children.append(local.children)
            local.span = measure(local.children, local.journal)
        return run(plan, local.children, local.journal, local.span)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            with ThreadPoolExecutor(workers) as pool:
                return list(pool.map(work, plans))
        finally:
            for children in all_children:
                children.__exit__(None, None, None)


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    return {
        "runs": len(outcomes),
        "killed": sum(outcome.was_killed for outcome in outcomes),
        "keys": dict(Counter(kind for outcome in outcomes for kind in outcome.kinds)),
        "failed": [[repr(outcome.schedule), *outcome.failures] for outcome in outcomes if outcome.failures],
    }


def plans(random: int, points: int, first_seed: int = 0) -> Iterator[Schedule]:
    for seed in range(first_seed, first_seed + random):
        yield schedule(seed)
    for seed in range(first_seed, first_seed + points):
        for point in POINTS:
            yield schedule(seed, point)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--random", type=int, default=100, help="runs that are killed at a random instant")
    parser.add_argument("--points", type=int, default=1, help=f"runs for each of the {len(POINTS)} named points")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args(arguments)
    figures = summary(campaign(plans(options.random, options.points, options.first_seed), options.workers))
    print(json.dumps(figures, indent=2))
    return 1 if figures["failed"] else 0


assert set(RECORDS) == {point.partition(" ")[2] for point in POINTS[:-1]}

if __name__ == "__main__":
    sys.exit(main())
