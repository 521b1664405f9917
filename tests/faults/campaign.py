"""Random faults over real sockets, in numbers: what the client says is held against what the servers charged.

    python -m tests.faults.campaign --schedules 500
    python -m tests.faults.campaign --seed 1234 --schedules 1     one that failed, again
    python -m tests.faults.campaign --schedules 20000 --json tests/faults/results/campaign.json     for a release

Every schedule has a client, a server and a journal of its own, and many run at once on one event loop. When its work
has ended, however that came, a second client with the same journal submits the same work under the same key: it must
not be paid for twice. The exit code is 1 if an invariant was broken; the seeds are printed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import pickle
import platform
import sqlite3
import sys
import time
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.to_thread
from attrs import define, evolve, field, frozen

from conceptviz import (
    AsyncConceptViz,
    Budget,
    ConceptVizError,
    Event,
    Journal,
    Polling,
    Result,
    Retries,
    Retrying,
    SubmissionUnknownError,
    Submitted,
)

from .invariants import (
    KEY_MARK,
    OPEN,
    Record,
    Report,
    double_charges,
    false_denials,
    false_failures,
    false_ids,
    forgotten_credits,
    is_refused,
    leaks,
    lost_ids,
    overshoot,
    uncounted_credits,
    unrecorded_ids,
    unsafe_repeats,
)
from .proxy import Proxy
from .schedules import Interrupt, Schedule, schedule
from .server import PNG, Server
from .steps import Ledger

RETRIES = Retries(base_delay=0.01, max_delay=0.02, max_retry_after=0.05)
POLLING = Polling(min_interval=0.005, max_interval=0.01, first_look=0.002)
BEAT = 0.02
BUDGET = 100
# The name of every schedule's piece of work.
WORK = "a diagram"
BROKEN = (
    "double charges",
    "unsafe repeats",
    "lost ids",
    "unrecorded ids",
    "attempts left open",
    "false ids",
    "false denials",
    "false failures",
    "uncounted credits",
    "forgotten credits",
    "unknown in vain",
    "images not read",
    "key leaks",
    "redirects followed",
    "overshoots",
    "foreign errors",
)
# A journal syncs each commit, and no power fails here.
IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
# What the crowd may be to blame for.
TIMELY = frozenset({"unknown in vain", "images not read", "overshoots"})
# The errors of a client that misjudges its own journal.
FOREIGN = frozenset({"InvalidRequestError", "JournalError", "BudgetExceededError"})


def key_of(seed: int) -> str:
    """Return a schedule's API key. It is made where it is used, so that no variable here holds it."""
    return f"{KEY_MARK}{seed}"


@define
class Pulse:
    """How late the event loop is: for that the machine is to blame, not the client. Times are in seconds."""

    beats: deque[tuple[float, float]] = field(factory=lambda: deque(maxlen=1000))

    async def beat(self) -> None:
        while True:
            due = time.perf_counter() + BEAT
            await anyio.sleep(BEAT)
            self.beats.append((due, time.perf_counter() - due))

    def lag(self, since: float) -> float:
        """Return by how much it has been late at the most since then."""
        return max((late for due, late in self.beats if due >= since - BEAT), default=0.0)


class LogWatch(logging.Handler):
    """Looks for keys in every record of every library, at every level."""

    def __init__(self) -> None:
        super().__init__(1)
        self.found = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.found += KEY_MARK[4:] in f"{record.msg} {record.args} {record.exc_info}"


@frozen
class Outcome:
    """A schedule, what its server saw, what its clients told, and which invariants that breaks.

    Attributes:
        plan: The schedule.
        ledger: The server's.
        report: The client's.
        again: What the second client told, who was to do the same work; None if there was none.
        posts: How many POSTs there were before the second client.
        broken: The invariants.
    """

    plan: Schedule
    ledger: Ledger
    report: Report
    again: Report | None
    posts: int
    broken: tuple[str, ...] = ()

    @property
    def story(self) -> dict[str, Any]:
        """What it takes to understand a failure."""
        plan, report, again = self.plan, self.report, self.again
        return {
            "seed": plan.seed,
            "broken": list(self.broken),
            "stage": plan.stage,
            "fault": plan.fault,
            "interrupt": plan.interrupt and f"{plan.interrupt.kind} at {plan.interrupt.at:.4f} s",
            "posts": [
                f"{'whole' if post.whole else 'partial'}, task {post.task_id}, answered {post.answered}"
                for post in self.ledger.posts
            ],
            "posts before the second client": self.posts,
            "outcome": report.outcome,
            "task_ids": sorted(report.task_ids),
            "records": [f"{record.state} {record.task_id}" for record in report.records],
            "held": report.held,
            "second outcome": again and again.outcome,
            "second task_ids": again and sorted(again.task_ids),
            "second records": again and [f"{record.state} {record.task_id}" for record in again.records],
            "elapsed": round(report.elapsed, 4),
            "bound": round(report.bound, 4),
            "lag": round(report.lag, 4),
            "script": repr(plan.script)[:2000],
        }


def all_of(error: BaseException | None) -> Iterator[str]:
    """Say all that an error holds and leads to, as a traceback with locals does, but in less time."""
    while error is not None:
        yield from (str(error), repr(error), repr(vars(error)))
        for frame, _ in traceback.walk_tb(error.__traceback__):
            for value in frame.f_locals.values():
                try:
                    yield repr(value)
                except Exception as failure:  # noqa: BLE001, PERF203 - such as an object that is not finished
                    yield repr(failure)
        error = error.__cause__ or error.__context__


class Interrupted(Exception):  # noqa: N818 - no error: what a schedule asks for
    """The work was ended from outside."""


async def interrupted(
    work: Callable[[], Awaitable[None]], interrupt: Interrupt | None, is_charged: Callable[[], bool]
) -> None:
    """Do some work until it is done or interrupted.

    Raises:
        Interrupted: It was.
    """
    if interrupt is None:
        await work()
    elif interrupt.kind == "scope":
        with anyio.move_on_after(interrupt.at) as scope:
            await work()
        if scope.cancelled_caught:
            raise Interrupted
    else:
        assert interrupt.kind != "kill", "that takes a process of its own"
        task = asyncio.ensure_future(work())
        try:
            while interrupt.on_charge and not is_charged():  # noqa: ASYNC110 - it is in another thread
                await asyncio.sleep(0.002)
            if interrupt.kind == "wait_for":
                await asyncio.wait_for(task, interrupt.at)
            else:
                asyncio.get_running_loop().call_later(interrupt.at, task.cancel)
                await task
        except (asyncio.TimeoutError, asyncio.CancelledError) as error:
            if isinstance(error, ConceptVizError):
                raise
            raise Interrupted from None


@define
class Witness:
    """All that the client tells about one piece of work."""

    plan: Schedule
    is_charged: Callable[[], bool] = lambda: False
    started: float = 0.0
    elapsed: float = 0.0
    events: list[tuple[float, Event]] = field(factory=list)
    results: list[Result] = field(factory=list)
    task_ids: set[str] = field(factory=set)

    def on_event(self, event: Event) -> None:
        self.events.append((time.perf_counter() - self.started, event))
        if isinstance(event, Submitted):
            self.task_ids.add(event.task_id)

    async def work(self, client: AsyncConceptViz) -> None:
        plan = self.plan
        if plan.upload:
            task = await client.submit_edit("a", PNG + bytes(plan.upload), key=WORK)
            self.task_ids.add(task.id)
        elif plan.waits:
            result = await client.generate("a", timeout=plan.wait_timeout, key=WORK)
            self.task_ids.add(result.task_id)
            self.results.append(result)
        else:
            task = await client.submit("a", key=WORK)
            self.task_ids.add(task.id)

    async def watch(self, client: AsyncConceptViz) -> Exception | None:
        """Have the work done, as far as it is not interrupted; return what it raised."""
        self.started = time.perf_counter()
        try:
            await interrupted(lambda: self.work(client), self.plan.interrupt, self.is_charged)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what is judged
            return error
        finally:
            self.elapsed = time.perf_counter() - self.started
        return None

    async def finds_its_images(self, client: AsyncConceptViz) -> bool:
        """Fetch the images of what was returned; return whether they are what they should be."""
        images = [image for result in self.results for image in result.images]
        try:
            return all([await client.read(image) == PNG for image in images])
        except ConceptVizError:
            return False

    def bound(self) -> float:
        """Return the seconds that the work may have taken, by what is documented."""
        plan = self.plan
        repeats = [e.delay for _, e in self.events if isinstance(e, Retrying) and e.task_id is None]
        submit = (len(repeats) + 1) * plan.timeout + sum(repeats)
        # A submit under way is neither cut short by the end of a wait nor by an interruption: it has its own timeout.
        whole = max(submit, plan.wait_timeout) if plan.waits else submit
        if plan.interrupt is None:
            return whole
        accepted_at = min((at for at, e in self.events if isinstance(e, Submitted)), default=None)
        ends_at = plan.interrupt.at + plan.timeout if accepted_at is None else max(plan.interrupt.at, accepted_at)
        return min(whole, ends_at)

    def report(self, error: Exception | None, pulse: Pulse) -> Report:
        outcome = "returned" if error is None else type(error).__name__
        ids = set(self.task_ids)
        told = [repr(self.events), repr(self.results)]
        if error is not None:
            told += all_of(error)
        if isinstance(error, ConceptVizError):
            told.append(repr(pickle.dumps(error)))
            ids |= {error.task_id} if error.task_id else set()
        return Report(
            outcome="interrupted" if isinstance(error, Interrupted) else outcome,
            foreign=outcome in FOREIGN or not isinstance(error, ConceptVizError | Interrupted | None),
            task_ids=frozenset(ids),
            unknown=isinstance(error, SubmissionUnknownError),
            told="".join(told),
            elapsed=self.elapsed,
            bound=self.bound(),
            lag=pulse.lag(self.started),
        )


@define
class Client:
    """A client, the journal it keeps, and what is left when it is gone."""

    plan: Schedule
    base_url: str
    journal: Path
    pulse: Pulse
    is_charged: Callable[[], bool]

    async def report(self) -> Report:
        """Have the schedule's work done, and return what came of it."""
        plan, witness, budget = self.plan, Witness(self.plan, self.is_charged), Budget(BUDGET)
        journal = await anyio.to_thread.run_sync(Journal, self.journal)
        async with AsyncConceptViz(
            lambda: key_of(plan.seed),
            base_url=self.base_url,
            timeout=plan.timeout,
            retries=RETRIES,
            polling=POLLING,
            budget=budget,
            journal=journal,
            on_event=witness.on_event,
        ) as client:
            error = await witness.watch(client)
            report = witness.report(error, self.pulse)
            if not await witness.finds_its_images(client):
                report = evolve(report, outcome="an image was not read")
        records, bytes_ = await anyio.to_thread.run_sync(self._close, journal)
        return evolve(report, records=records, held=budget.spent + budget.reserved, told=report.told + bytes_)

    def _close(self, journal: Journal) -> tuple[tuple[Record, ...], str]:
        written = b"".join(path.read_bytes() for path in self.journal.parent.glob(self.journal.name + "*"))
        records = tuple(Record(e.state.value, e.task_id, e.is_refunded is True) for e in journal.entries())
        journal.close()
        return records, written.decode("latin-1")


async def run(plan: Schedule, elsewhere: Server, pulse: Pulse) -> Outcome:
    """Run one schedule to its end, and judge it."""
    server = Server(
        plan.script,
        key=key_of(plan.seed),
        task_seconds=plan.task_seconds,
        image_origin=elsewhere.origin,
        receive_buffer=plan.receive_buffer,
        listen_after=plan.listen_after,
    )
    proxy = None
    if plan.requests or plan.answers:
        proxy = Proxy(server.port, requests=plan.requests, answers=plan.answers, seed=plan.seed)
    again = None
    try:
        with TemporaryDirectory(dir=IN_MEMORY) as folder:
            base_url, journal = (proxy or server).base_url, Path(folder) / "journal.db"
            client = Client(plan, base_url, journal, pulse, lambda: bool(server.ledger.accepted))
            report = await client.report()
            posts = len(server.ledger.posts)
            if not report.records_say(*OPEN):
                # What is under way is waited for, and that would take as long as an attempt may take.
                again = await evolve(client, plan=evolve(plan, interrupt=None, waits=False)).report()
    finally:
        with anyio.CancelScope(shield=True):
            if proxy is not None:
                await anyio.to_thread.run_sync(proxy.close)
            await anyio.to_thread.run_sync(server.close)
    outcome = Outcome(plan, server.ledger, report, again, posts)
    return evolve(outcome, broken=tuple(judge(outcome)))


def judge(outcome: Outcome) -> Iterator[str]:
    """Name each invariant that is broken, one of `BROKEN`."""
    plan, ledger, report = outcome.plan, outcome.ledger, outcome.report
    again = outcome.again or Report(outcome="interrupted", records=report.records)
    before, after = ledger.posts[: outcome.posts], ledger.posts[outcome.posts :]
    first, second = Ledger(posts=before), Ledger(posts=after)
    is_free = all(record.is_free for record in report.records)
    found = {
        "double charges": double_charges(ledger),
        "unsafe repeats": unsafe_repeats(before) + unsafe_repeats(after) if is_free else unsafe_repeats(ledger.posts),
        # What came to nothing and was given back is no more to be named.
        "lost ids": lost_ids(first, report) + lost_ids(second if is_free else ledger, again),
        "unrecorded ids": unrecorded_ids(first, report) + unrecorded_ids(ledger, again),
        "attempts left open": report.records_say(*OPEN) or again.records_say(*OPEN),
        "false ids": false_ids(ledger, report) + false_ids(ledger, again),
        "false denials": false_denials(first, report) + false_denials(second, evolve(again, records=())),
        "false failures": false_failures(first, report, tasks_fail=plan.script.tasks_fail),
        "uncounted credits": uncounted_credits(first, report),
        "forgotten credits": forgotten_credits(report),
        "unknown in vain": plan.is_answered_well and report.lag < plan.timeout / 3 and report.records_say("unknown"),
        "images not read": report.outcome == "an image was not read",
        "key leaks": leaks(report, []) + leaks(again, []),
        "overshoots": overshoot(report) or overshoot(again),
        "foreign errors": report.foreign or again.foreign,
    }
    return (name for name, broken in found.items() if broken)


@define
class Tally:
    """What a campaign has come to so far."""

    counts: Counter[str] = field(factory=Counter)
    outcomes: Counter[str] = field(factory=Counter)
    faults: Counter[str] = field(factory=Counter)
    broken: Counter[str] = field(factory=Counter)
    failures: list[dict[str, Any]] = field(factory=list)
    worst_overshoot: float = 0.0
    worst_lag: float = 0.0

    def add(self, outcome: Outcome) -> None:
        ledger, report = outcome.ledger, outcome.report
        self.counts["schedules"] += 1
        self.counts["interrupted"] += report.outcome == "interrupted"
        self.counts["connections"] += ledger.connections
        self.counts["POSTs"] += len(ledger.posts)
        self.counts["accepted"] += len(ledger.accepted)
        self.counts["refused"] += sum(map(is_refused, ledger.posts))
        self.counts["said to be unknown"] += report.unknown
        self.counts["taken up by the second client"] += bool(
            outcome.again and outcome.again.task_ids & report.recorded_ids
        )
        self.outcomes[report.outcome] += 1
        self.faults[f"{outcome.plan.stage}: {outcome.plan.fault}"] += 1
        self.broken.update(outcome.broken)
        if outcome.broken:
            self.failures.append(outcome.story)
        self.worst_overshoot = max(self.worst_overshoot, report.elapsed - report.bound - report.lag)
        self.worst_lag = max(self.worst_lag, report.lag)

    @property
    def summary(self) -> dict[str, Any]:
        return {
            **self.counts,
            **{name: self.broken[name] for name in BROKEN},
            "worst overshoot (s)": round(self.worst_overshoot, 3),
            "worst lag of the event loop (s)": round(self.worst_lag, 3),
            "outcomes": dict(self.outcomes.most_common()),
            "faults": dict(sorted(self.faults.items())),
            "failures": self.failures,
        }


async def campaign(seeds: Iterable[int], concurrency: int = 12, kinds: tuple[str, ...] = ()) -> Tally:
    """Run the schedules of some seeds, so many at a time.

    What misses a deadline in the crowd is run again by itself, and counts if it misses it again.
    """
    tally, pulse, logs = Tally(), Pulse(), LogWatch()
    root = logging.getLogger()
    level, left, late = root.level, iter(seeds), list[int]()
    root.addHandler(logs)
    root.setLevel(1)

    async def once(seed: int, elsewhere: Server) -> Outcome:
        return await run(schedule(seed, elsewhere=elsewhere.origin, kinds=kinds), elsewhere, pulse)

    async def worker(elsewhere: Server) -> None:
        for seed in left:
            outcome = await once(seed, elsewhere)
            if outcome.broken and TIMELY.issuperset(outcome.broken):
                late.append(seed)
            else:
                tally.add(outcome)

    try:
        with Server() as elsewhere:
            async with anyio.create_task_group() as background:
                background.start_soon(pulse.beat)
                async with anyio.create_task_group() as workers:
                    for _ in range(concurrency):
                        workers.start_soon(worker, elsewhere)
                for seed in late:
                    tally.add(await once(seed, elsewhere))
                background.cancel_scope.cancel()
    finally:
        root.removeHandler(logs)
        root.setLevel(level)
    # An image is all that anyone fetches there.
    seen = elsewhere.ledger
    tally.broken["key leaks"] += logs.found + len(leaks(Report(outcome=""), seen.heads))
    tally.broken["redirects followed"] += len(seen.posts) + seen.looks
    tally.broken = +tally.broken
    tally.counts["late in the crowd"] = len(late)
    return tally


def versions() -> dict[str, str]:
    """Return the versions of what a campaign depends on."""
    packages = ("conceptviz", "httpx", "httpcore", "h11", "anyio")
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "sqlite": sqlite3.sqlite_version,
        **{package: version(package) for package in packages},
    }


def main(arguments: list[str] | None = None) -> int:
    """Run a campaign from the command line; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.campaign", description="Random faults over real sockets, in numbers."
    )
    parser.add_argument("--schedules", type=int, default=500, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first; the others follow it")
    parser.add_argument("--concurrency", type=int, default=12, help="how many at a time")
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    parser.add_argument("--no-interrupts", action="store_true", help="faults alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where to write the figures")
    options = parser.parse_args(arguments)
    kinds = ("scope",) if options.backend == "trio" else ("scope", "wait_for", "task")
    started = time.perf_counter()
    tally = anyio.run(
        campaign,
        range(options.seed, options.seed + options.schedules),
        options.concurrency,
        () if options.no_interrupts else kinds,
        backend=options.backend,
    )
    seconds = time.perf_counter() - started
    summary = {
        "seeds": f"{options.seed} to {options.seed + options.schedules - 1}",
        "backend": options.backend,
        "versions": versions(),
        "seconds": round(seconds, 1),
        "a second": round(options.schedules / seconds, 1),
        **tally.summary,
    }
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        failures = {failure["seed"]: failure["broken"] for failure in tally.failures}
        options.json.write_text(json.dumps({**summary, "failures": failures}, indent=1) + "\n", "utf-8")
    for name, value in summary.items():
        if name not in {"faults", "failures"}:
            print(f"{name:32} {value}")
    for name in BROKEN:
        if broken := [failure for failure in tally.failures if name in failure["broken"]]:
            print(f"\n{name}: seeds {', '.join(str(failure['seed']) for failure in broken)}; the first of them:")
            print(json.dumps(broken[0], indent=1))
    return 1 if tally.broken else 0


if __name__ == "__main__":
    sys.exit(main())
