"""Many lives of a program that pays: hypothesis plays the service, the disk, death and the person at the keyboard.

    CONCEPTVIZ_STATE_MACHINE=5000x50 python -m pytest -n0 --timeout=0 tests/test_state_machine.py   runs x steps

One journal outlives every client. The oracle is the service's book of charges: after each step nothing is charged
twice, every charge is in the journal or shown there as unknown, and the budget holds exactly what it should.
"""

import json
import os
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import anyio
import httpx
import pytest
from attrs import define, field
from helpers import KEY, QUICK, QUICK_POLLING
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from conceptviz import (
    AsyncConceptViz,
    AsyncTask,
    AttemptState,
    Budget,
    BudgetExceededError,
    ConceptVizError,
    Credits,
    GenerationFailedError,
    Journal,
    JournalEntry,
    JournalError,
    SubmissionUnknownError,
)

T = TypeVar("T")

PRICE = 2
PAID = {AttemptState.ACCEPTED, AttemptState.COMPLETED, AttemptState.FAILED}
# A journal syncs each commit, and no power fails here.
IN_MEMORY = Path("/dev/shm") if Path("/dev/shm").is_dir() else None


class Death(BaseException):
    """The process ends here, and nothing of it runs any more."""


@define
class Charge:
    """What the service charged for one task."""

    work: str
    task_id: str
    credits: int
    state: dict[str, Any] = field(factory=lambda: {"status": "processing"})
    is_given_up: bool = False

    @property
    def is_refunded(self) -> bool:
        return self.state.get("credits_refunded") is True


def receipt(charge: Charge) -> dict[str, Any]:
    return {"taskId": charge.task_id, "credits_used": charge.credits, "model": "cv-2", "quality": "2k"}


def refusal(status: int, code: str) -> httpx.Response:
    return httpx.Response(status, json={"error": "No.", "code": code})


class Service(httpx.AsyncBaseTransport):
    """The API: it charges what arrives, and answers as it is told to."""

    def __init__(self) -> None:
        self.charges: dict[str, Charge] = {}
        self.posts = 0
        self.moods: Iterator[str] = iter(())
        self.die: Callable[[], None] = lambda: None

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            charge = self.charges.get(request.url.path.rpartition("/")[2])
            return httpx.Response(200, json=charge.state) if charge else refusal(404, "TASK_NOT_FOUND")
        mood = next(self.moods, "answers")
        if mood == "is not there":
            raise httpx.ConnectError("refused", request=request)
        self.posts += 1
        if mood == "loses the request":
            raise httpx.ReadError("reset", request=request)
        if mood == "never gets it, and you die":
            self.die()
        if mood.startswith("refuses"):
            _, status, code = mood.split(":")
            return refusal(int(status), code)
        work = json.loads(request.content)["prompt"]
        charge = Charge(work, f"task-{len(self.charges)}", PRICE + (mood == "charges more"))
        self.charges[charge.task_id] = charge
        return self._answer(mood, charge, request)

    def _answer(self, mood: str, charge: Charge, request: httpx.Request) -> httpx.Response:
        if mood == "gets it, and you die":
            self.die()
        if mood == "loses the answer":
            raise httpx.ReadError("reset", request=request)
        if mood == "answers in HTML":
            return httpx.Response(200, text="<html>Thank you</html>")
        if mood == "names two tasks":
            return httpx.Response(200, text=f'{{"taskId": "another", "taskId": "{charge.task_id}"}}')
        return httpx.Response(502 if mood == "breaks, with an id" else 200, json=receipt(charge))


# What is drawn is mostly what is usual: nobody gets far whose every step goes wrong.
MOODS = st.sampled_from(
    [
        *["answers"] * 8,
        "charges more",
        "breaks, with an id",
        "loses the request",
        "loses the answer",
        "answers in HTML",
        "names two tasks",
        "is not there",
        "refuses:402:INSUFFICIENT_CREDITS",
        "refuses:403:PLAN_REQUIRED",
        "refuses:429:MODERATION_RATE_LIMITED",
        "refuses:500:CREDIT_CONSUMPTION_FAILED",
        "refuses:500:GENERATION_FAILED",
        "refuses:503:",
        "never gets it, and you die",
        "gets it, and you die",
    ]
)
WORKS = st.sampled_from("ab")
STEPS = ["claim", "sending", "send_again", "accepted", "ended"]
DEATHS = st.sampled_from([*[None] * 30, *((step, when) for step in STEPS for when in ("before", "after", "full"))])
DEATHS_AT_THE_END = st.sampled_from([None, None, None, None, "before", "after"])
ENDS = st.sampled_from(
    [
        {"status": "completed", "images": [{"url": "https://h/x.png", "prompt": "a"}]},
        {"status": "failed", "error": "No.", "code": "GENERATION_FAILED", "credits_refunded": True},
        {"status": "failed", "error": "No.", "code": "GENERATION_FAILED", "credits_refunded": False},
        {"status": "failed", "error": "No.", "code": "GENERATION_FAILED"},
    ]
)


class Lives(RuleBasedStateMachine):
    """One journal, one service, and one program after another."""

    def __init__(self) -> None:
        super().__init__()
        self.life = 0
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr("conceptviz._database.this_process", lambda: f"life {self.life}")
        self.patches.setattr("conceptviz._database.is_alive", lambda owner: owner == f"life {self.life}")
        self.patches.setattr("conceptviz._submits._JOURNAL_PAUSE", 0.001)
        self.folder = TemporaryDirectory(dir=IN_MEMORY)
        self.path = Path(self.folder.name) / "journal.db"
        self.service = Service()
        self.service.die = self.die
        self.unkeyed = 0
        self.journals: list[Journal] = []
        self.begin(100)

    def teardown(self) -> None:
        for journal in self.journals:
            journal.close()
        self.folder.cleanup()
        self.patches.undo()

    def begin(self, limit: int) -> None:
        """Begin a life: a process with a client, a budget, and whatever an earlier one has written down."""
        self.life += 1
        self.is_dead = False
        self.budget = Budget(limit)
        self.held = 0
        self.tasks: dict[str, tuple[AsyncTask, int]] = {}
        self.stuck: set[str] = set()
        self.journals = []
        self.client = self.open()

    def open(self) -> AsyncConceptViz:
        journal = Journal(self.path)
        self.journals.append(journal)
        return AsyncConceptViz(
            KEY,
            retries=QUICK,
            polling=QUICK_POLLING,
            budget=self.budget,
            journal=journal,
            transport=self.service,
        )

    def die(self) -> None:
        self.is_dead = True
        for journal in self.journals:
            journal.close()
        raise Death

    def run(self, work: Callable[[], Awaitable[T]]) -> T | ConceptVizError | Death:
        try:
            outcome: T | ConceptVizError | Death = anyio.run(work)
        except (ConceptVizError, Death) as error:
            outcome = error
        if self.is_dead:
            self.begin(100)
            return Death()
        return outcome

    def arm(self, step: str, when: str) -> None:
        """Have the process die right before or after a step of the journal, or the disk be full there."""
        journal = self.journals[0]
        take = getattr(journal, step)

        def deadly(*args: Any, **options: Any) -> Any:
            if when == "full":
                self.stuck.add("full")
                raise JournalError("The disk is full.")
            if when == "after":
                take(*args, **options)
            return self.die()

        setattr(journal, step, deadly)

    def entries(self, *states: AttemptState) -> list[JournalEntry]:
        return self.journals[0].entries(*states)

    def of(self, work: str) -> list[Charge]:
        return [charge for charge in self.service.charges.values() if charge.work == work]

    @rule(work=WORKS | st.none(), moods=st.lists(MOODS, max_size=2), death=DEATHS)
    def submit(self, work: str | None, moods: list[str], death: tuple[str, str] | None) -> None:
        if work in self.stuck:
            return  # it is under way, as far as this life can tell, and would be waited for
        prompt = work or f"unkeyed {self.unkeyed}"
        self.unkeyed += 1
        posts, charges = self.service.posts, len(self.of(prompt))
        refunded = {entry.task_id for entry in self.entries() if entry.is_refunded}
        self.service.moods = iter(moods)
        self.stuck.discard("full")
        if death is not None:
            self.arm(*death)
        outcome = self.run(lambda: self.client.submit(prompt, key=work))
        if isinstance(outcome, Death):
            return
        if death is not None:
            delattr(self.journals[0], death[0])
        was_charged = len(self.of(prompt)) > charges
        was_sent = self.service.posts > posts
        if isinstance(outcome, AsyncTask):
            charge = self.service.charges[outcome.id]
            assert charge.work == prompt
            assert outcome.id not in refunded
            self.held += charge.credits if was_charged else 0
            self.tasks[outcome.id] = (outcome, charge.credits if was_charged else 0)
        elif isinstance(outcome, SubmissionUnknownError):
            self.held += PRICE if was_sent else 0
        elif isinstance(outcome, GenerationFailedError):
            assert not was_charged or outcome.task_id is not None
            self.held += PRICE if was_sent else 0
        elif isinstance(outcome, JournalError) and outcome.submission is not None:
            assert was_charged
            self.held += self.service.charges[outcome.submission.task_id].credits
        else:
            assert outcome.credits is Credits.NOT_SPENT
            assert not was_charged
            if isinstance(outcome, BudgetExceededError):
                assert self.held + PRICE > self.budget.limit
        if "full" in self.stuck:
            self.stuck.add(prompt)

    @rule(work=WORKS)
    def submit_from_two_clients_at_once(self, work: str) -> None:
        """One pays, and both have the same task."""
        if work in self.stuck:
            return
        self.service.moods = iter(())
        charges = len(self.of(work))
        outcomes: list[AsyncTask | ConceptVizError] = []

        async def submit(client: AsyncConceptViz) -> None:
            try:
                outcomes.append(await client.submit(work, key=work))
            except ConceptVizError as error:
                outcomes.append(error)

        async def both() -> None:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(submit, self.client)
                tasks.start_soon(submit, self.open())

        self.run(both)
        assert len(self.of(work)) <= charges + 1
        self.held += sum(charge.credits for charge in self.of(work)[charges:])
        kinds = {outcome.id if isinstance(outcome, AsyncTask) else type(outcome) for outcome in outcomes}
        assert len(kinds) == 1
        assert kinds <= {*self.service.charges, SubmissionUnknownError, BudgetExceededError}

    @rule(limit=st.sampled_from([3, 7, 100]))
    def die_and_begin_anew(self, limit: int) -> None:
        for journal in self.journals:
            journal.close()
        self.begin(limit)

    @precondition(lambda self: any(c.state["status"] == "processing" for c in self.service.charges.values()))
    @rule(data=st.data(), end=ENDS, waits=st.booleans(), death=DEATHS_AT_THE_END)
    def a_task_ends(self, data: st.DataObject, end: dict[str, Any], waits: bool, death: str | None) -> None:
        running = [charge for charge in self.service.charges.values() if charge.state["status"] == "processing"]
        data.draw(st.sampled_from(running)).state = end

        if waits:
            self.wait_for_what_has_ended(death)

    @rule(work=WORKS, end=ENDS)
    def the_same_work_again_after_its_end(self, work: str, end: dict[str, Any]) -> None:
        """It is paid for again only if the first time was refunded."""
        self.submit(work, [], None)
        for charge in self.of(work):
            if charge.state["status"] == "processing":
                charge.state = end
        self.wait_for_what_has_ended(None)
        self.submit(work, [], None)

    def wait_for_what_has_ended(self, death: str | None) -> None:
        """Through the tasks that this life has in hand, and through those that it takes up from the journal."""
        resumed = self.run(self.client.resume)
        assert isinstance(resumed, list)
        accepted = {entry.task_id for entry in self.entries(AttemptState.ACCEPTED)}
        assert {task.id for task in resumed} == accepted
        in_hand = [(task, held) for task, held in self.tasks.values() if task.id in accepted]
        others = [(task, 0) for task in resumed if task.id not in self.tasks]
        for task, held in in_hand + others:
            charge = self.service.charges[task.id]
            if charge.state["status"] == "processing":
                continue
            if death is not None:
                self.arm("finished", death)
            outcome = self.run(task.wait)
            if isinstance(outcome, Death):
                return
            assert isinstance(outcome, GenerationFailedError) == (charge.state["status"] == "failed")
            if charge.is_refunded:
                self.held -= held

    @precondition(lambda self: self.entries(AttemptState.UNKNOWN))
    @rule(data=st.data(), looks=st.booleans())
    def a_person_resolves(self, data: st.DataObject, looks: bool) -> None:
        """Whoever looks into the account finds the task, if there is one; whoever does not is willing to pay again."""
        entry = data.draw(st.sampled_from(self.entries(AttemptState.UNKNOWN)))
        known = {e.task_id for e in self.entries()}
        charged = [charge for charge in self.of(entry.prompts[0]) if charge.task_id not in known]
        unclaimed = [charge for charge in charged if not charge.is_given_up]
        if looks and unclaimed:
            self.journals[0].resolve(entry.id, task_id=unclaimed[0].task_id)
        else:
            self.journals[0].resolve(entry.id)
            for charge in unclaimed:
                charge.is_given_up = True

    @rule()
    def forget_what_has_ended(self) -> None:
        before = {entry.task_id for entry in self.entries()}
        self.journals[0].prune(older_than=0)
        for task_id in before - {entry.task_id for entry in self.entries()}:
            if task_id is not None:
                assert self.service.charges[task_id].state["status"] != "processing"
                self.service.charges[task_id].is_given_up = True

    @invariant()
    def nothing_is_charged_twice(self) -> None:
        """Invariant A."""
        refunded = {entry.task_id for entry in self.entries() if entry.is_refunded}
        counting = [
            charge.work
            for charge in self.service.charges.values()
            if not charge.is_given_up and not (charge.is_refunded and charge.task_id in refunded)
        ]
        assert len(counting) == len(set(counting))

    @invariant()
    def nothing_is_lost(self) -> None:
        """Invariant B."""
        entries = self.entries()
        paid = {entry.task_id for entry in entries if entry.state in PAID}
        # SENDING is what a full disk leaves; the next life reads it as UNKNOWN.
        unknown = {e.prompts[0] for e in entries if e.state in {AttemptState.UNKNOWN, AttemptState.SENDING}}
        for charge in self.service.charges.values():
            assert charge.is_given_up or charge.task_id in paid or charge.work in unknown
        assert paid - {None} <= set(self.service.charges)

    @invariant()
    def nothing_is_left_open(self) -> None:
        """What is not under way is said to be so, unless it could not be written down."""
        states = (AttemptState.INTENT, AttemptState.SENDING)
        assert {entry.prompts[0] for entry in self.entries(*states)} <= self.stuck

    @invariant()
    def the_budget_is_exact(self) -> None:
        assert self.budget.spent + self.budget.reserved == self.held
        assert self.budget.remaining == max(0, self.budget.limit - self.held)


def test_many_lives() -> None:
    runs, steps = os.environ.get("CONCEPTVIZ_STATE_MACHINE", "50x30").split("x")
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=int(runs),
            stateful_step_count=int(steps),
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
