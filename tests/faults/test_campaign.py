"""The campaign: what it holds against a client, that it notices what it should, and what it says of ours."""

import asyncio
import json
import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Iterable
from itertools import count, islice
from typing import Any, Literal

import anyio
import httpx
import pytest

from conceptviz import (
    AsyncConceptViz,
    AttemptState,
    Journal,
    NotSentError,
    RateLimitedError,
    Retrying,
    Submission,
    SubmissionUnknownError,
    Submitted,
)
from conceptviz._connections import _Stream
from conceptviz._detached import Stake
from conceptviz._submits import Paid, Submits

from .campaign import Outcome, Pulse, Tally, Witness, all_of, campaign, key_of
from .campaign import run as run_one
from .invariants import (
    Record,
    Report,
    double_charges,
    false_denials,
    false_failures,
    false_ids,
    forgotten_credits,
    leaks,
    lost_ids,
    overshoot,
    uncounted_credits,
    unrecorded_ids,
    unsafe_repeats,
)
from .schedules import STAGES, Interrupt, Schedule, schedule
from .server import Server
from .steps import Answer, Ledger, Post, Script, Step

ELSEWHERE = "http://127.0.0.1:1"
ASYNCIO = ("scope", "wait_for", "task")


def run(seeds: Iterable[int], *, backend: str = "asyncio", kinds: tuple[str, ...] = ()) -> Tally:
    return anyio.run(campaign, seeds, 12, kinds, backend=backend)


def seeds_where(which: Callable[[Schedule], bool], n: int = 6, kinds: tuple[str, ...] = ()) -> list[int]:
    """The first seeds whose schedules are such."""
    plans = (schedule(seed, elsewhere=ELSEWHERE, kinds=kinds) for seed in count())
    return list(islice((plan.seed for plan in plans if which(plan)), n))


def of(stage: str, *faults: str) -> Callable[[Schedule], bool]:
    return lambda plan: plan.stage == stage and plan.fault in faults


def is_interrupted_before_its_answer(plan: Schedule) -> bool:
    """By the event loop itself, which goes through a shielded scope."""
    (step, *_) = plan.script.posts or (Step(),)
    at, kind = (plan.interrupt.at, plan.interrupt.kind) if plan.interrupt else (0.0, "")
    return plan.is_answered_well and kind in {"wait_for", "task"} and 0.02 < at < step.delay - 0.01


def has_an_answer_too_many(plan: Schedule) -> bool:
    """To the first look, which is told that the task is running."""
    (look, *_) = plan.script.looks or (Step(),)
    is_followed = isinstance(look.answer, Answer) and bool(look.answer.after)
    return of("poll", "looks fail")(plan) and is_followed and not plan.script.tasks_fail


def test_a_seed_is_a_schedule() -> None:
    """The same one every time, and whatever else draws random numbers."""
    plans = [schedule(seed, elsewhere=ELSEWHERE) for seed in range(50)]
    random.seed(1)
    assert [schedule(seed, elsewhere=ELSEWHERE) for seed in range(50)] == plans
    assert len({repr(plan) for plan in plans}) == 50


def test_every_fault_comes_up_and_every_kind_of_interruption_that_is_asked_for() -> None:
    plans = [schedule(seed, elsewhere=ELSEWHERE, kinds=("scope", "kill")) for seed in range(2000)]
    every = {(stage, fault) for stage, faults in STAGES.items() for fault in faults}
    assert {(plan.stage, plan.fault) for plan in plans} == every
    assert {plan.interrupt.kind for plan in plans if plan.interrupt} == {"scope", "kill"}
    assert 500 < sum(plan.interrupt is not None for plan in plans) < 900
    assert not any(schedule(seed, elsewhere=ELSEWHERE, kinds=()).interrupt for seed in range(100))


def posts(*entries: tuple[str | None, int | None]) -> Ledger:
    """A ledger of POSTs, each with the task it made and the status it was answered with."""
    return Ledger(posts=[Post(0, "/", 0.0, task_id=task, answered=status) for task, status in entries])


@pytest.mark.parametrize(
    ("ledger", "charges", "repeats"),
    [
        (posts(), 0, 0),
        (posts(("A", 200)), 0, 0),
        (posts((None, 429), (None, 402), ("A", None)), 0, 0),
        (posts((None, 429), ("A", 200), ("B", 200)), 1, 1),
        (posts((None, None), ("A", 200)), 0, 1),
        (posts((None, 503), (None, 429), ("A", 200)), 0, 2),
        (posts((None, 500), ("A", 200)), 0, 1),
        (posts(("A", 429), ("B", 200), ("C", 200)), 2, 2),
    ],
)
def test_a_submit_is_repeated_only_after_a_refusal(ledger: Ledger, charges: int, repeats: int) -> None:
    """Invariant A, by its effect and by its rule."""
    assert (len(double_charges(ledger)), len(unsafe_repeats(ledger.posts))) == (charges, repeats)


@pytest.mark.parametrize(
    ("report", "lost", "false"),
    [
        (Report(outcome="returned", task_ids=frozenset("A")), [], []),
        (Report(outcome="SubmissionUnknownError", unknown=True), [], []),
        (Report(outcome="NotSentError"), ["A"], []),
        (Report(outcome="returned", task_ids=frozenset("B")), ["A"], ["B"]),
        (Report(outcome="returned", task_ids=frozenset("AB")), [], ["B"]),
    ],
)
def test_a_paid_task_is_named_or_said_to_be_unknown(report: Report, lost: list[str], false: list[str]) -> None:
    """Invariant B; and no task is named that there is not."""
    ledger = posts((None, 429), ("A", None))
    assert (lost_ids(ledger, report), false_ids(ledger, report)) == (lost, false)
    assert lost_ids(posts((None, 402)), Report(outcome="NotSentError")) == []


@pytest.mark.parametrize(
    ("records", "unrecorded", "false"),
    [
        ([Record("accepted", "A")], [], []),
        ([Record("completed", "A"), Record("failed", "B", refunded=True)], [], ["B"]),
        ([Record("rejected"), Record("accepted", "A")], [], []),
        ([Record("unknown")], [], []),
        ([Record("sending")], ["A"], []),
        ([Record("not_sent")], ["A"], []),
        ([Record("accepted", "B")], ["A"], ["B"]),
        ([], ["A"], []),
    ],
)
def test_a_paid_task_is_written_down(records: list[Record], unrecorded: list[str], false: list[str]) -> None:
    """Invariant B, for whoever was interrupted and has been told nothing."""
    report = Report(outcome="interrupted", records=tuple(records))
    assert lost_ids(posts(("A", None)), report) == []
    assert (unrecorded_ids(posts(("A", None)), report), false_ids(posts(("A", None)), report)) == (unrecorded, false)


def test_what_may_be_paid_for_again() -> None:
    free = [Record("not_sent"), Record("rejected"), Record("abandoned"), Record("failed"), Record("failed", "A", True)]
    paid = [Record(state, "A") for state in ("intent", "sending", "accepted", "completed", "failed", "unknown")]
    assert [record.is_free for record in free + paid] == [True] * 5 + [False] * 6


def test_credits() -> None:
    """What was charged is counted until it is given back, and what was not charged is not."""
    ledger = Ledger(posts=[Post(1, "/", 0.0, task_id="A", credits=2), Post(2, "/", 0.0, task_id="B", credits=2)])
    assert uncounted_credits(ledger, Report(outcome="", held=3)) == 1
    ledger.posts[0].refunded = 2
    assert uncounted_credits(ledger, Report(outcome="", held=3)) == 0
    assert double_charges(ledger) == []
    unknown, refused = (Report(outcome="", held=2, records=(Record(state),)) for state in ("unknown", "rejected"))
    assert (forgotten_credits(unknown), forgotten_credits(refused)) == (0, 2)


def test_what_arrived_was_sent() -> None:
    """A POST that was refused may be followed by one that is not sent."""
    report = Report(outcome="NotSentError")
    assert false_denials(posts((None, 429), (None, None)), report) == posts((None, None)).posts
    assert false_denials(posts((None, None)), Report(outcome="SubmissionUnknownError")) == []
    rejected, unsent = (Report(outcome="interrupted", records=(Record(s),)) for s in ("rejected", "not_sent"))
    assert false_denials(posts((None, 402)), rejected) == []
    assert false_denials(posts((None, None)), rejected) == posts((None, None)).posts
    assert false_denials(posts((None, 429)), unsent) == []
    assert false_denials(posts((None, 200)), unsent) == posts((None, 200)).posts


def test_a_failure_is_the_tasks_own() -> None:
    report = Report(outcome="GenerationFailedError")
    assert false_failures(posts(("A", 200)), report, tasks_fail=False) == ["A"]
    assert false_failures(posts(("A", 200)), report, tasks_fail=True) == []
    assert false_failures(posts((None, 500)), report, tasks_fail=False) == []


def test_leaks() -> None:
    key = key_of(7)
    assert leaks(Report(outcome="", told=f"x {key} x"), [b"GET / HTTP/1.1"]) == ["told"]
    assert leaks(Report(outcome=""), [f"GET /?k={key}".encode(), b"AUTHORIZATION: x"]) == ["sent elsewhere"] * 2


class _Silent(httpx.AsyncBaseTransport):
    """It holds a request as HTTP libraries do, and says nothing."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        headers = request.headers.raw
        await anyio.sleep_forever()
        raise AssertionError(headers)


def test_a_cancelled_look_leads_to_no_frame_that_holds_the_key() -> None:
    """The event loop's own cancellation comes up through all of them: seed 896 of a campaign."""

    async def cancelled() -> BaseException:
        async with AsyncConceptViz(key_of(7), transport=_Silent()) as client:
            look = asyncio.ensure_future(client.task("A").status())
            await asyncio.sleep(0.02)
            look.cancel()
            try:
                await look
            except asyncio.CancelledError as error:
                return error
        raise AssertionError

    error = anyio.run(cancelled)
    assert "in look\n" in "".join(traceback.format_exception(type(error), error, error.__traceback__))
    assert leaks(Report(outcome="", told="".join(all_of(error))), []) == []


def test_overshoot() -> None:
    """Beyond the bound, what is allowed, and what the machine is to blame for."""
    assert overshoot(Report(outcome="", elapsed=1.4, bound=1.0, lag=0.2)) == 0
    assert overshoot(Report(outcome="", elapsed=1.5, bound=1.0, lag=0.2)) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("waits", "accepted_at", "interrupted_at", "bound"),
    [
        (False, None, None, 0.3),
        (True, None, None, 0.6),
        (True, None, 0.1, 0.4),
        (True, None, 0.4, 0.6),
        (False, None, 0.1, 0.3),
        (True, 0.05, 0.1, 0.1),
        (True, 0.2, 0.1, 0.2),
        (True, 0.05, 5.0, 0.6),
    ],
)
def test_how_long_work_may_take(
    waits: bool, accepted_at: float | None, interrupted_at: float | None, bound: float
) -> None:
    """An interruption ends a wait at once, and a submit once the exchange under way is out of time."""
    interrupt = Interrupt("scope", interrupted_at) if interrupted_at else None
    witness = Witness(Schedule(seed=0, waits=waits, timeout=0.3, wait_timeout=0.6, interrupt=interrupt))
    if accepted_at:
        witness.events.append((accepted_at, Submitted(task_id="A", submission=Submission("A"))))
    assert witness.bound() == pytest.approx(bound)
    witness.events.append((0.0, Retrying(task_id=None, attempt=1, delay=0.02, error=NotSentError("x"))))
    witness.plan = Schedule(seed=0, timeout=0.3)
    assert witness.bound() == pytest.approx(0.62)


def retry_the_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    safe = (NotSentError, RateLimitedError, SubmissionUnknownError)
    monkeypatch.setattr("conceptviz._policy.SAFE_TO_SUBMIT_AGAIN", safe)


def mistake_sent_for_unsent(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsent(*_: object) -> None:
        raise NotSentError("Not sent.")

    monkeypatch.setattr("conceptviz._wire.unanswered_submission", unsent)
    monkeypatch.setattr("conceptviz._policy.SAFE_TO_SUBMIT_AGAIN", ())


def open_clients_with(where: str, change: Callable[[httpx.AsyncClient], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def sabotage(monkeypatch: pytest.MonkeyPatch) -> None:
        from conceptviz._http import open_http_client

        def open_changed(*args: Any, **options: Any) -> httpx.AsyncClient:
            client = open_http_client(*args, **options)
            change(client)
            return client

        monkeypatch.setattr("conceptviz._transport.may_go_direct", lambda **_: False)
        monkeypatch.setattr(f"conceptviz.{where}.open_http_client", open_changed)

    return sabotage


def tell_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptviz._transport.may_go_direct", lambda **_: False)
    monkeypatch.setattr("conceptviz._transport._reason", lambda error: f"{error.request.headers.raw}")


def log_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def log(error: httpx.HTTPError) -> str:
        logging.getLogger("anywhere").debug("%s", error.request.headers.raw)
        return "it failed"

    monkeypatch.setattr("conceptviz._transport.may_go_direct", lambda **_: False)
    monkeypatch.setattr("conceptviz._transport._reason", log)


def let_it_drip(monkeypatch: pytest.MonkeyPatch) -> None:
    from conceptviz._transport import Transport

    patient = Transport.__init__

    def init(self: Transport, *args: Any, timeout: float, **options: Any) -> None:
        patient(self, *args, timeout=timeout + 0.4, **options)

    monkeypatch.setattr(Transport, "__init__", init)


def journal_after_return(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = Submits.submit
    accepted = Journal.accepted

    async def submit_and_write_down(self: Submits, *args: Any) -> Paid:
        paid = await submit(self, *args)
        if self.journal is not None and paid.is_new:
            (entry,) = self.journal.entries(AttemptState.SENDING)
            await anyio.to_thread.run_sync(accepted, self.journal, entry.id, paid.submission)
        return paid

    monkeypatch.setattr(Submits, "submit", submit_and_write_down)
    monkeypatch.setattr(Journal, "accepted", lambda *_: None)


def shield_instead_of_a_task_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    async def shielded(work: Callable[[Stake], Awaitable[Any]]) -> Any:
        with anyio.CancelScope(shield=True):
            return await work(Stake())

    monkeypatch.setattr("conceptviz._submits.to_the_end", shielded)


def forget_the_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    claim = Journal.claim
    monkeypatch.setattr(Journal, "claim", lambda self, **options: claim(self, **{**options, "key": None}))


def take_the_unknown_for_free(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = Journal.ended
    monkeypatch.setattr(Journal, "ended", lambda self, attempt, *_: ended(self, attempt, AttemptState.REJECTED))


def release_what_was_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptviz._budget.Reservation.settle", lambda self, _: self.release())


def keep_the_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptviz._budget.Reservation.release", lambda _: None)


def believe_kept_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take a byte at a time for all that came: what is behind an answer stays where the event loop hides it."""

    async def receive(self: _Stream) -> bytes:
        return await self._stream.receive(1)

    monkeypatch.setattr(_Stream, "receive", receive)


def read_nothing_unusual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conceptviz._wire.read_mapping", json.loads)


SABOTAGES: list[tuple[Callable[[pytest.MonkeyPatch], None], Callable[[Schedule], bool], set[str]]] = [
    (retry_the_unknown, of("headers", "no answer"), {"double charges", "unsafe repeats"}),
    (retry_the_unknown, of("body", "cut"), {"double charges", "unsafe repeats"}),
    (mistake_sent_for_unsent, of("headers", "no answer"), {"lost ids", "unrecorded ids"}),
    (forget_the_keys, of("none", "none"), {"double charges", "unsafe repeats"}),
    (take_the_unknown_for_free, of("headers", "no answer"), {"double charges", "unrecorded ids"}),
    (journal_after_return, is_interrupted_before_its_answer, {"unrecorded ids", "attempts left open"}),
    (release_what_was_spent, of("none", "none"), {"uncounted credits"}),
    (keep_the_refused, of("semantic", "refused"), {"forgotten credits"}),
    (believe_kept_connections, has_an_answer_too_many, {"false failures"}),
    (
        open_clients_with("_http", lambda client: setattr(client, "follow_redirects", True)),
        of("headers", "redirects"),
        {"redirects followed"},
    ),
    (
        open_clients_with("_downloads", lambda client: client.headers.update({"x-api-key": key_of(0)})),
        of("poll", "looks fail"),
        {"key leaks"},
    ),
    (tell_the_request, of("headers", "no answer"), {"key leaks"}),
    (log_the_request, of("headers", "no answer"), {"key leaks"}),
    (let_it_drip, of("headers", "drips"), {"overshoots"}),
    (read_nothing_unusual, of("json", "strange body"), {"foreign errors"}),
]


def kinds_for(which: Callable[[Schedule], bool]) -> tuple[str, ...]:
    return ASYNCIO if which is is_interrupted_before_its_answer else ()


@pytest.mark.parametrize("kinds", [(), ASYNCIO])
def test_what_is_to_be_broken_on_purpose_holds(kinds: tuple[str, ...]) -> None:
    """So that it is the sabotage that is noticed in the next test."""
    seeds = {seed for _, which, _ in SABOTAGES if kinds_for(which) == kinds for seed in seeds_where(which, kinds=kinds)}
    assert run(sorted(seeds), kinds=kinds).broken == {}


@pytest.mark.parametrize(("sabotage", "which", "noticed"), SABOTAGES)
def test_what_is_broken_on_purpose_is_noticed(
    sabotage: Callable[[pytest.MonkeyPatch], None],
    which: Callable[[Schedule], bool],
    noticed: set[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kinds = kinds_for(which)
    sabotage(monkeypatch)
    assert noticed <= set(run(seeds_where(which, kinds=kinds), kinds=kinds).broken)


@pytest.mark.parametrize("kind", ["wait_for", "task"])
def test_a_shield_instead_of_a_task_of_its_own_is_noticed(
    kind: Literal["wait_for", "task"], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop's own cancellation goes through it: the id is lost though the answer is on its way."""
    well = Step(delay=0.3)
    plan = Schedule(seed=0, script=Script(posts=(well,)), timeout=10.0, interrupt=Interrupt(kind, 0.0, on_charge=True))

    async def one() -> Outcome:
        with Server() as elsewhere:
            return await run_one(plan, elsewhere, Pulse())

    assert anyio.run(one).broken == ()
    shield_instead_of_a_task_of_its_own(monkeypatch)
    assert anyio.run(one).broken == ("unknown in vain",)


@pytest.mark.parametrize(
    ("backend", "seeds", "kinds"),
    [
        *(("asyncio", range(first, first + 125), ASYNCIO) for first in range(0, 500, 125)),
        ("trio", range(10_000, 10_060), ("scope",)),
    ],
)
def test_random_faults(backend: str, seeds: range, kinds: tuple[str, ...]) -> None:
    """Nothing is charged twice or lost, no key leaks, no redirect is followed, no deadline missed, no error foreign."""
    tally = run(seeds, backend=backend, kinds=kinds)
    assert tally.failures == []
    assert tally.broken["key leaks"] + tally.broken["redirects followed"] == 0
    assert tally.counts["schedules"] == len(seeds)
    assert tally.counts["accepted"] > 0.4 * len(seeds)
    assert tally.counts["interrupted"] > 0.1 * len(seeds)


def test_an_answer_too_many_is_not_taken_for_the_next_one() -> None:
    """M35."""
    assert run(seeds_where(of("body", "followed by another answer"))).failures == []


def test_an_interrupted_submit_is_not_lost() -> None:
    """M73, M74: its id is in the journal, whatever interrupts it, and it is not called unknown if it was answered."""
    seeds = seeds_where(lambda plan: of("headers", "late", "drips")(plan) and plan.interrupt is not None, 30, ASYNCIO)
    tally = run(seeds, kinds=ASYNCIO)
    assert tally.failures == []
    assert tally.counts["interrupted"] > 10


def test_of_two_ids_none_is_taken_for_certain() -> None:
    """M29: a doubled key, each time with another id."""
    seeds = seeds_where(lambda plan: '{"taskId": "another", ' in repr(plan.script.posts), 2)
    assert run(seeds).failures == []
