"""Where credits are spent: what each outcome of a submit means to the caller, the journal and the budget.

The oracle is the ledger of the raw server in `faults`. M and F numbers are rows of the fault matrix.
"""

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from attrs import frozen
from faults.server import Server, refusing_port
from faults.steps import Answer, End, Raw, Script, Step, json_answer, refuse
from helpers import KEY, QUICK, QUICK_POLLING, RECEIPT, TASK, answer, assert_no_key, assert_no_key_logged, client
from raw_server import Connection, RawServer

from conceptviz import (
    APIStatusError,
    AsyncConceptViz,
    AttemptState,
    AuthenticationError,
    BadRequestError,
    Budget,
    BudgetExceededError,
    ConceptVizError,
    Credits,
    Event,
    GenerateRequest,
    GenerationFailedError,
    InsufficientCreditsError,
    InvalidRequestError,
    Journal,
    JournalEntry,
    JournalError,
    NotSentError,
    PlanError,
    RateLimitedError,
    Retries,
    Retrying,
    ServerError,
    SubmissionUnknownError,
    Submitted,
    TaskState,
)
from conceptviz._calls import build_generate, fingerprint
from conceptviz._wire import read_receipt

pytestmark = pytest.mark.anyio

INTENT, SENDING, ACCEPTED = AttemptState.INTENT, AttemptState.SENDING, AttemptState.ACCEPTED
REJECTED, NOT_SENT, UNKNOWN = AttemptState.REJECTED, AttemptState.NOT_SENT, AttemptState.UNKNOWN
COMPLETED, FAILED = AttemptState.COMPLETED, AttemptState.FAILED


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


@pytest.fixture(name="journal")
def _journal(path: Path) -> Iterator[Journal]:
    with Journal(path) as opened:
        yield opened
    for file in path.parent.glob("journal*"):
        assert KEY[4:].encode() not in file.read_bytes()


def at(server: Server | RawServer, journal: Journal | None = None, **options: Any) -> AsyncConceptViz:
    settings: dict[str, Any] = {"timeout": 2.0, "retries": QUICK, "polling": QUICK_POLLING, **options}
    return AsyncConceptViz(KEY, base_url=server.base_url, journal=journal, **settings)


def only(journal: Journal) -> JournalEntry:
    [entry] = journal.entries()
    return entry


HTML = b"<html>no</html>"


def odd(status: int, body: bytes = HTML, *headers: bytes) -> Step:
    """An answer of something on the way, which names no code; whether it charged, the client cannot know."""
    return Step(answer=Answer(status=status, body=body, headers=headers or (b"Content-Type: text/html",)))


LOST = Step(answer=None, end=End.FIN)


@frozen
class Row:
    """One row of the table of outcomes (reliability.md, 3.1)."""

    posts: tuple[Step, ...]
    error: type[ConceptVizError] | None
    state: AttemptState
    reserved: int = 0
    spent: int = 0
    count: int = 1
    timeout: float = 2.0


ROWS = {
    "200 with an id": Row((Step(),), None, ACCEPTED, spent=2),
    "201 with an id": Row((Step(answer=Answer(status=201)),), None, ACCEPTED, spent=2),
    "202 with an id": Row((Step(answer=Answer(status=202)),), None, ACCEPTED, spent=2),
    "an id, and a price above the page's": Row(
        (Step(answer=json_answer({"taskId": "x", "credits_used": 3})),), None, ACCEPTED, spent=3
    ),
    "an id, and no price": Row((Step(answer=json_answer({"taskId": "x"})),), None, ACCEPTED, spent=2),
    "500 with an id": Row((Step(answer=Answer(status=500)),), None, ACCEPTED, spent=2),
    "an id in HTML": Row((odd(200, b'<pre>"taskId": "@task@"</pre>'),), None, ACCEPTED, spent=2),
    "an id in a cut body": Row((Step(answer=Answer(cut=60), end=End.FIN),), None, ACCEPTED, spent=2),
    "reset before the request is read": Row(
        (Step(read=10, answer=None, end=End.RST),), SubmissionUnknownError, UNKNOWN, reserved=2
    ),
    "closed after the head": Row(
        (Step(read="head", answer=None, end=End.FIN),), SubmissionUnknownError, UNKNOWN, reserved=2
    ),
    "closed without an answer": Row((LOST,), SubmissionUnknownError, UNKNOWN, reserved=2),
    "reset without an answer": Row((Step(answer=None, end=End.RST),), SubmissionUnknownError, UNKNOWN, reserved=2),
    "silence": Row((Step(answer=None, end=End.SILENCE),), SubmissionUnknownError, UNKNOWN, reserved=2, timeout=0.2),
    "no HTTP": Row((Step(answer=Raw(b"what?\r\n\r\n"), end=End.FIN),), SubmissionUnknownError, UNKNOWN, reserved=2),
    "a body cut before the id": Row(
        (Step(answer=Answer(cut=12), end=End.FIN),), SubmissionUnknownError, UNKNOWN, reserved=2
    ),
    "200 without an id": Row((Step(answer=json_answer({})),), SubmissionUnknownError, UNKNOWN, reserved=2),
    "200 in HTML": Row((odd(200),), SubmissionUnknownError, UNKNOWN, reserved=2),
    **{
        f"{status}": Row((odd(status, b"", b"Location: /x"),), SubmissionUnknownError, UNKNOWN, reserved=2)
        for status in (301, 302, 303, 307, 308)
    },
    **{
        f"{status} of a gateway": Row((odd(status),), SubmissionUnknownError, UNKNOWN, reserved=2)
        for status in (408, 409, 500, 502, 503, 504, 520, 599)
    },
    "400": Row((refuse(400, "INVALID_BODY"),), BadRequestError, REJECTED),
    "401": Row((refuse(401, "INVALID_API_KEY"),), AuthenticationError, REJECTED),
    "402": Row((refuse(402, "INSUFFICIENT_CREDITS", credits_remaining=1),), InsufficientCreditsError, REJECTED),
    "403": Row((refuse(403, "PLAN_REQUIRED"),), PlanError, REJECTED),
    "403 in HTML": Row((Step(charge=False, answer=Answer(status=403, body=HTML)),), PlanError, REJECTED),
    "429 again and again": Row((refuse(429, "MODERATION_RATE_LIMITED"),) * 3, RateLimitedError, REJECTED, count=3),
    "429 in HTML": Row(
        (Step(charge=False, answer=Answer(status=429, body=HTML)),) * 3, RateLimitedError, REJECTED, count=3
    ),
    "429, then an id": Row((refuse(429, "MODERATION_RATE_LIMITED"),), None, ACCEPTED, spent=2, count=2),
    "429, then a lost answer": Row(
        (refuse(429, "MODERATION_RATE_LIMITED"), LOST), SubmissionUnknownError, UNKNOWN, reserved=2, count=2
    ),
    "no credits could be taken": Row((refuse(500, "CREDIT_CONSUMPTION_FAILED"),), ServerError, REJECTED),
    "failed at once": Row((refuse(500, "GENERATION_FAILED"),), GenerationFailedError, FAILED, reserved=2),
}


@pytest.mark.parametrize("name", ROWS)
async def test_each_row_of_the_table_of_outcomes(name: str, journal: Journal) -> None:
    """M9 to M14, M21, M28, M34, M36: what is raised and written down, what is kept of the budget, how many POSTs."""
    row, budget = ROWS[name], Budget(4)
    with Server(Script(posts=row.posts)) as server:
        async with at(server, journal, budget=budget, timeout=row.timeout) as cv:
            error: BaseException | None = None
            submission = None
            try:
                submission = (await cv.submit("a", key="k")).submission
            except ConceptVizError as caught:
                error = caught
                assert_no_key(caught)
            entry = only(journal)
            assert type(error) is (row.error or type(None))
            assert entry.state is row.state
            assert (budget.reserved, budget.spent) == (row.reserved, row.spent)
            assert len(server.ledger.posts) == row.count
            if error is None:
                assert submission is not None
                assert (entry.task_id, entry.error) == (submission.task_id, None)
            else:
                assert entry.task_id is None
                assert entry.error == str(error)
            # What the key may do after that is what the journal says.
            if row.state is ACCEPTED:
                assert (await cv.submit("a", key="k")).id == entry.task_id
            elif row.state is UNKNOWN:
                with pytest.raises(SubmissionUnknownError, match="earlier submit") as again:
                    await cv.submit("a", key="k")
                assert again.value.attempt_id == entry.id
            elif row.error is not InsufficientCreditsError:
                assert (await cv.submit("a", key="k")).id == journal.entries(ACCEPTED)[0].task_id
    repeated = row.state in {REJECTED, FAILED} and row.error is not InsufficientCreditsError
    assert len(server.ledger.posts) == row.count + repeated
    assert len(server.ledger.accepted) <= 1


@pytest.mark.parametrize("attempts", [1, 3])
async def test_nobody_listens(attempts: int, journal: Journal) -> None:
    """M1: it was never sent, is tried again, and frees its key and its credits."""
    events: list[Event] = []
    budget = Budget(2)
    with refusing_port() as port:
        cv = AsyncConceptViz(
            KEY,
            base_url=f"http://127.0.0.1:{port}/api/v1",
            retries=Retries(attempts=attempts, base_delay=0.001),
            journal=journal,
            budget=budget,
            on_event=events.append,
        )
        async with cv:
            with pytest.raises(NotSentError):
                await cv.submit("a", key="k")
    assert [type(event) for event in events] == [Retrying] * (attempts - 1)
    assert only(journal).state is NOT_SENT
    assert (budget.reserved, budget.spent) == (0, 0)


async def test_somebody_listens_at_the_third_attempt(journal: Journal) -> None:
    """M3: one POST."""
    with Server(listen_after=0.05) as server:
        retries = Retries(attempts=50, base_delay=0.01, max_delay=0.01)
        async with at(server, journal, retries=retries) as cv:
            await cv.submit("a", key="k")
    assert only(journal).state is ACCEPTED
    assert len(server.ledger.posts) == 1


class Watched(Journal):
    """A journal that tells when each of its records is about to be written and when it is committed."""

    def __init__(self, path: Path, watch: Callable[[str], object]) -> None:
        super().__init__(path)
        self._watch = watch

    def _watched(self, name: str, *arguments: Any, **options: Any) -> Any:
        self._watch(f"before {name}")
        given = getattr(super(), name)(*arguments, **options)
        self._watch(f"after {name}")
        return given

    def claim(self, **options: Any) -> Any:
        return self._watched("claim", **options)

    def sending(self, attempt: str) -> None:
        self._watched("sending", attempt)

    def send_again(self, attempt: str) -> None:
        self._watched("send_again", attempt)

    def accepted(self, attempt: str, submission: Any) -> None:
        self._watched("accepted", attempt, submission)

    def ended(self, attempt: str, state: AttemptState, error: str | None = None) -> None:
        self._watched("ended", attempt, state, error)

    def finished(self, state: Any) -> None:
        self._watched("finished", state)


async def test_the_order_is_the_promise(path: Path) -> None:
    """F4: INTENT before a connection, SENDING before the first byte, ACCEPTED before anybody hears of it."""
    heard: list[str] = []
    seen: dict[str, tuple[Any, ...]] = {}

    def durable() -> list[str]:
        with sqlite3.connect(path) as db:
            states = [state for (state,) in db.execute("SELECT state FROM attempts")]
        db.close()
        return states

    def watch(point: str) -> None:
        time.sleep(0.05)  # for whatever comes too early to arrive
        ledger = server.ledger
        seen[point] = durable(), ledger.connections, len(ledger.heads), len(ledger.accepted), list(heard)

    with Server() as server, Watched(path, watch) as journal:
        async with at(server, journal, on_event=lambda event: heard.append(type(event).__name__)) as cv:
            await cv.submit("a", key="k")
    #                             durable       connections  heads  charges  heard
    assert seen["before claim"] == ([], 0, 0, 0, [])
    assert seen["after claim"] == (["intent"], 0, 0, 0, [])
    assert seen["before sending"] == (["intent"], 1, 0, 0, [])
    assert seen["after sending"] == (["sending"], 1, 0, 0, [])
    assert seen["before accepted"] == (["sending"], 1, 1, 1, [])
    assert seen["after accepted"] == (["accepted"], 1, 1, 1, [])
    assert heard == ["Submitted"]


async def test_a_refused_submit_is_intended_anew(path: Path) -> None:
    """Between a 429 and the next attempt the journal says INTENT again: a crash in the pause is a crash before it."""
    seen: list[tuple[str, str]] = []

    def watch(point: str) -> None:
        if point != "before claim":
            with sqlite3.connect(path) as db:
                seen.append((point, db.execute("SELECT state FROM attempts").fetchone()[0]))
            db.close()

    script = Script(posts=(refuse(429, "MODERATION_RATE_LIMITED"),))
    with Server(script) as server, Watched(path, watch) as journal:
        async with at(server, journal) as cv:
            await cv.submit("a")
    assert [s for point, s in seen if point.startswith("after")] == [
        "intent",
        "sending",
        "intent",
        "sending",
        "accepted",
    ]


def failing_at(point: str, error: Exception) -> Callable[[str], None]:
    def watch(here: str) -> None:
        if here == point:
            raise error

    return watch


@pytest.mark.parametrize("point", ["before claim", "after claim"])
async def test_what_cannot_be_written_down_is_not_connected_for(point: str, path: Path) -> None:
    """M79 at INTENT: no connection, and the credits are free again."""
    budget = Budget(2)
    with Server() as server, Watched(path, failing_at(point, JournalError("full"))) as journal:
        async with at(server, journal, budget=budget) as cv:
            with pytest.raises(JournalError, match="full") as caught:
                await cv.submit("a", key="k")
    assert caught.value.credits is Credits.NOT_SPENT
    assert server.ledger.connections == 0
    assert (budget.reserved, budget.spent) == (0, 0)


@pytest.mark.parametrize("point", ["before sending", "after sending"])
async def test_what_cannot_be_written_down_is_not_sent(point: str, path: Path) -> None:
    """M79 at SENDING: a connection, closed in good order without a byte on it, and never a second."""
    arrived: list[bytes] = []
    budget = Budget(2)

    def listen(connection: Connection) -> None:
        arrived.append(connection.read_some(65536))

    with RawServer(listen) as server, Watched(path, failing_at(point, JournalError("full"))) as journal:
        async with at(server, journal, budget=budget) as cv:
            with pytest.raises(JournalError, match="full") as caught:
                await cv.submit("a", key="k")
        entry = only(journal)
    assert caught.value.credits is Credits.NOT_SPENT
    assert caught.value.submission is None
    assert not any(arrived)
    assert server.connections == 1
    assert entry.state is NOT_SENT
    assert (budget.reserved, budget.spent) == (0, 0)


@pytest.mark.parametrize("error", [JournalError("full"), UnicodeError("odd")], ids=["full", "odd"])
async def test_an_id_that_cannot_be_written_down_is_in_the_error(
    error: Exception, path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """M79 at ACCEPTED: the error carries the receipt, the log names the id, and nothing is sent again."""
    events: list[Event] = []
    budget = Budget(4)
    with Server() as server, Watched(path, failing_at("before accepted", error)) as journal:
        async with at(server, journal, budget=budget, on_event=events.append) as cv:
            with pytest.raises(JournalError) as caught:
                await cv.submit("a", key="k")
        entry = only(journal)
    [post] = server.ledger.posts
    assert post.task_id is not None
    assert caught.value.submission is not None
    assert caught.value.submission.task_id == caught.value.task_id == post.task_id
    assert caught.value.credits is Credits.SPENT
    assert caught.value.__cause__ is error
    assert [r.levelname for r in caplog.records if r.name == "conceptviz" and post.task_id in r.message] == ["ERROR"]
    assert events == []
    assert entry.state is SENDING  # read as UNKNOWN by whoever comes after this process
    assert (budget.reserved, budget.spent) == (0, 2)


async def test_an_end_that_cannot_be_written_down_does_not_hide_the_error(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = failing_at("before ended", JournalError("full"))
    with Server(Script(posts=(LOST,))) as server, Watched(path, watch) as journal:
        async with at(server, journal) as cv:
            with pytest.raises(SubmissionUnknownError):
                await cv.submit("a", key="k")
        assert only(journal).state is SENDING
    assert "was not written down: full" in caplog.text


async def test_an_end_of_a_task_that_cannot_be_written_down_is_logged(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = failing_at("before finished", JournalError("full"))
    with Server() as server, Watched(path, watch) as journal:
        async with at(server, journal) as cv:
            result = await cv.generate("a", key="k")
        assert only(journal).state is ACCEPTED
    assert f"The end of task {result.task_id} was not written down: full" in caplog.text


async def test_a_second_attempt_that_cannot_be_written_down_is_not_made(path: Path) -> None:
    """The refusal of the first stands."""
    budget = Budget(2)
    watch = failing_at("before send_again", JournalError("full"))
    script = Script(posts=(refuse(429, "MODERATION_RATE_LIMITED"),))
    with Server(script) as server, Watched(path, watch) as journal:
        async with at(server, journal, budget=budget) as cv:
            with pytest.raises(JournalError, match="full"):
                await cv.submit("a", key="k")
        assert only(journal).state is REJECTED
    assert len(server.ledger.posts) == 1
    assert (budget.reserved, budget.spent) == (0, 0)


async def test_an_attempt_that_was_taken_over_is_not_sent(path: Path) -> None:
    """A process that slept through its own time limit finds its attempt taken for dead, and sends nothing."""

    def take_over(point: str) -> None:
        if point == "before sending":
            [attempt] = journal.entries()
            journal.ended(attempt.id, NOT_SENT)

    with Server() as server, Watched(path, take_over) as journal:
        async with at(server, journal) as cv:
            with pytest.raises(JournalError, match="taken for dead"):
                await cv.submit("a", key="k")
    assert server.ledger.posts == []


async def test_a_hooks_error_in_a_pause_leaves_the_refusal_standing(journal: Journal) -> None:
    """What was refused was not charged, whatever ends the pause after it."""
    budget = Budget(2)

    def hook(event: Event) -> None:
        raise LookupError("mine")

    with Server(Script(posts=(refuse(429, "MODERATION_RATE_LIMITED"),))) as server:
        async with at(server, journal, budget=budget, on_event=hook) as cv:
            with pytest.raises(LookupError, match="mine"):
                await cv.submit("a", key="k")
            entry = only(journal)
            assert entry.state is REJECTED
            assert entry.error is not None
            assert "MODERATION_RATE_LIMITED" in entry.error
            assert (budget.reserved, budget.spent) == (0, 0)


@pytest.mark.parametrize("error", [SystemExit(3), LookupError("mine")], ids=["SystemExit", "LookupError"])
async def test_a_hooks_error_comes_after_the_id_is_durable(
    error: BaseException, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    """M95, M96: it reaches the caller unchanged, and the log names the task."""

    def hook(event: Event) -> None:
        raise error

    with Server() as server:
        async with at(server, journal, on_event=hook) as cv:
            with pytest.raises(type(error)) as caught:
                await cv.submit("a", key="k")
    assert caught.value is error
    entry = only(journal)
    assert (entry.state, entry.task_id) == (ACCEPTED, server.ledger.posts[0].task_id)
    assert f"Interrupted after task {entry.task_id} was accepted" in caplog.text


async def test_system_exit_of_a_hook_in_a_pause_reaches_the_caller(journal: Journal) -> None:
    """M95: out of the submit's own task."""

    def hook(event: Event) -> None:
        raise SystemExit(3)

    with Server(Script(posts=(refuse(429, "MODERATION_RATE_LIMITED"),))) as server:
        async with at(server, journal, on_event=hook) as cv:
            with pytest.raises(SystemExit):
                await cv.submit("a", key="k")
    assert only(journal).state is REJECTED


async def test_what_an_unknown_submit_tells(journal: Journal) -> None:
    """Everything that is known, for a look at the account."""
    unreadable = Step(answer=Answer(status=502, body=HTML, headers=(b"CF-Ray: 7", b"Set-Cookie: secret")))
    request = GenerateRequest("a", model="cv-1", quality="4k", key="k2")
    before = time.time()
    with Server(Script(posts=(Step(), unreadable, LOST))) as server:
        async with at(server, journal) as cv:
            await cv.submit("first")
            with pytest.raises(SubmissionUnknownError) as caught:
                await cv.submit("a", model="cv-1", quality="4k", key="k2")
            with pytest.raises(SubmissionUnknownError) as lost:
                await cv.submit("b")
            assert cv.credits_remaining == 998
    error = caught.value
    assert error.attempt_id == journal.entries(key="k2")[0].id
    assert error.endpoint == "/generate"
    assert error.sent_at is not None
    assert before <= error.sent_at <= time.time()
    assert error.request_sha256 == fingerprint(build_generate(request))
    assert (error.status_code, error.body, error.headers) == (502, HTML, {"cf-ray": "7", **error.headers})
    assert "set-cookie" not in error.headers
    assert (error.expected_credits, error.credits_remaining) == (2, 998)
    assert error.credits is Credits.UNKNOWN
    assert lost.value.status_code is None
    assert lost.value.last_step == "http11.receive_response_headers.started"


async def test_an_unknown_submit_without_a_journal(caplog: pytest.LogCaptureFixture) -> None:
    with Server(Script(posts=(LOST,))) as server:
        async with at(server) as cv:
            with pytest.raises(SubmissionUnknownError) as caught:
                await cv.submit("a")
    assert caught.value.attempt_id is None
    assert caught.value.sent_at is not None
    assert "Interrupted" not in caplog.text


async def test_a_transport_that_reports_no_steps_is_written_down_before_it_is_used(path: Path) -> None:
    """SENDING comes earlier there, never later."""
    seen: list[str] = []

    def handle(_: httpx.Request) -> httpx.Response:
        seen.append(only(journal).state.value)
        return httpx.Response(200, json=RECEIPT)

    with Journal(path) as journal:
        async with AsyncConceptViz(KEY, transport=httpx.MockTransport(handle), journal=journal) as cv:
            await cv.submit("a", key="k")
    assert seen == ["sending"]


async def test_a_transport_made_of_httpxs_own_is_not_trusted_to_report_its_steps(journal: Journal) -> None:
    class Cached(httpx.AsyncHTTPTransport):
        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            assert only(journal).state is SENDING
            raise httpx.ReadTimeout("", request=request)

    budget = Budget(2)
    async with AsyncConceptViz(KEY, transport=Cached(), journal=journal, budget=budget) as cv:
        with pytest.raises(SubmissionUnknownError):
            await cv.submit("a", key="k")
    assert only(journal).state is UNKNOWN
    assert budget.reserved == 2


async def test_a_mock_in_place_of_the_default_transport_reports_nothing(
    journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As respx has it: the journal and the budget say what the caller is told, though SENDING was never written."""

    async def handle(self: Any, request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("", request=request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", handle)
    budget = Budget(2)
    async with AsyncConceptViz(KEY, journal=journal, budget=budget) as cv:
        with pytest.raises(SubmissionUnknownError):
            await cv.submit("a", key="k")
    assert only(journal).state is UNKNOWN
    assert budget.reserved == 2


async def test_time_that_runs_out_before_a_silent_transport_is_used(path: Path) -> None:
    """The commit of SENDING took longer than the whole exchange may: nothing was sent, and that is said."""

    def watch(point: str) -> None:
        if point == "before sending":
            time.sleep(0.1)
            raise JournalError("late")

    with Watched(path, watch) as journal:
        cv, script = client(RECEIPT, journal=journal, timeout=0.05)
        async with cv:
            with pytest.raises((JournalError, NotSentError)):
                await cv.submit("a", key="k")
        assert only(journal).state is NOT_SENT
    assert script.count == 0


async def test_a_budget_that_does_not_suffice_leaves_no_trace(journal: Journal) -> None:
    budget = Budget(3)
    with Server() as server:
        async with at(server, journal, budget=budget) as cv:
            with pytest.raises(BudgetExceededError):
                await cv.submit(["a", "b"], key="k")
            assert journal.entries() == []
            await cv.submit("a", key="k")
            with pytest.raises(BudgetExceededError):
                await cv.submit("b")
            assert (await cv.submit("a", key="k")).id == only(journal).task_id  # paid for already
    assert (budget.reserved, budget.spent) == (0, 2)
    assert server.ledger.charged == 2


async def test_twenty_at_once_with_a_budget_for_three() -> None:
    """M89: exactly three POSTs."""
    budget = Budget(7)
    errors: list[ConceptVizError] = []

    async def submit(cv: AsyncConceptViz, n: int) -> None:
        try:
            await cv.submit(f"{n}")
        except BudgetExceededError as error:
            errors.append(error)

    with Server() as server:
        async with at(server, budget=budget) as cv, anyio.create_task_group() as group:
            for n in range(20):
                group.start_soon(submit, cv, n)
    assert len(server.ledger.posts) == 3
    assert len(errors) == 17
    assert (budget.reserved, budget.spent) == (0, 6)


async def test_a_refund_goes_back_into_the_budget_once(journal: Journal) -> None:
    budget = Budget(4)
    with Server(Script(tasks_fail=True)) as server:
        async with at(server, journal, budget=budget) as cv:
            task = await cv.submit("a", key="k")
            assert budget.spent == 2
            for _ in range(2):
                with pytest.raises(GenerationFailedError):
                    await task.wait()
            assert (budget.reserved, budget.spent) == (0, 0)
            assert only(journal).state is FAILED
            # All was given back: the key may be paid for again.
            assert (await cv.submit("a", key="k")).id != task.id
    assert server.ledger.charged - server.ledger.refunded == 2


@pytest.mark.parametrize("journaled", [True, False], ids=["journal", "no journal"])
@pytest.mark.parametrize("error", [InsufficientCreditsError, NotSentError, BudgetExceededError])
async def test_nothing_is_warned_of_where_nothing_was_charged(
    error: type[ConceptVizError], journaled: bool, journal: Journal, caplog: pytest.LogCaptureFixture
) -> None:
    script = Script(posts=(refuse(402, "INSUFFICIENT_CREDITS"),))
    with Server(script, listen_after=None if error is NotSentError else 0.0) as server:
        budget = Budget(1 if error is BudgetExceededError else 2)
        async with at(server, journal if journaled else None, budget=budget) as cv:
            with pytest.raises(error):
                await cv.submit("a")
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_what_was_spent_stays_spent_when_its_task_has_ended() -> None:
    """Only the service's word for a refund gives anything back."""
    budget = Budget(4)
    with Server() as server:
        async with at(server, budget=budget) as cv:
            await cv.generate("a")
    assert (budget.reserved, budget.spent) == (0, 2)
    failed = {"status": "failed", "error": "It failed.", "code": "GENERATION_FAILED"}
    for word in ({}, {"credits_refunded": False}):
        budget = Budget(4)
        with Server(Script(looks=(Step(answer=json_answer({**failed, **word})),))) as server:
            async with at(server, budget=budget) as cv:
                with pytest.raises(GenerationFailedError):
                    await cv.generate("a")
        assert (budget.reserved, budget.spent) == (0, 2)


async def test_a_refund_without_a_budget_is_the_callers_to_count() -> None:
    with Server(Script(tasks_fail=True)) as server:
        async with at(server) as cv:
            with pytest.raises(GenerationFailedError) as caught:
                await cv.generate("a")
    assert caught.value.credits is Credits.REFUNDED


async def test_a_key_is_paid_for_once(journal: Journal) -> None:
    """The second caller gets the first one's task, and its end without a look."""
    events: list[Event] = []
    with Server() as server:
        async with at(server, journal, on_event=events.append) as cv:
            first = await cv.submit("a", key="k")
            second = await cv.submit("a", key="k")
            assert second.submission == first.submission
            result = await first.wait()
            looks = server.ledger.looks
            third = await cv.submit("a", key="k")
            assert await third.wait() == result
            assert server.ledger.looks == looks
            assert await cv._core.submits.unended() == []
    assert len(server.ledger.posts) == 1
    assert [type(event) for event in events].count(Submitted) == 1


@pytest.mark.parametrize("key", ["k", None], ids=["with a key", "without one"])
async def test_images_of_an_ended_task_that_nobody_saved_cost_nothing_more(
    key: str | None, path: Path, tmp_path: Path
) -> None:
    """It is no more to be resumed: its key brings it back, or the id that the journal holds."""
    with Server() as server:
        with Journal(path) as journal:
            async with at(server, journal) as cv:
                await cv.generate("a", key=key)
        with Journal(path) as journal:  # in another process, after the first was killed
            async with at(server, journal) as cv:
                assert await cv.resume() == []
                [ended] = journal.entries(COMPLETED)
                assert ended.task_id is not None
                result = await (cv.generate("a", key=key) if key else cv.task(ended.task_id).wait())
                assert [saved.exists() for saved in await cv.save(result, tmp_path)] == [True]
                assert result.task_id == ended.task_id
    assert len(server.ledger.posts) == 1


async def test_a_task_that_failed_without_a_refund_is_not_paid_for_again(journal: Journal) -> None:
    """Its end, an HTTP 500 that does not hold the word, is recalled as what it was."""
    five_hundred = answer(500, {"error": "no", "code": "GENERATION_FAILED"})
    cv, script = client(RECEIPT, five_hundred, journal=journal)
    entry = _claimed(journal, "a", cv)
    journal.sending(entry.id)
    async with cv:
        _accepted(journal, entry)
        state = TaskState(task_id=TASK, status="failed", code="GENERATION_FAILED", raw={"code": "GENERATION_FAILED"})
        await cv._core.submits.end(state, None)
        task = await cv.submit("a", key="k")
        with pytest.raises(GenerationFailedError):
            await task.wait()
    assert script.count == 0


def _claimed(journal: Journal, prompt: str, cv: AsyncConceptViz, **changes: Any) -> JournalEntry:
    """Claim a key as another caller would."""
    submits = cv._core.submits
    options: dict[str, Any] = {
        "key": "k",
        "fingerprint": fingerprint(build_generate(GenerateRequest(prompt))),
        "account": submits.account,
        "base_url": submits.base_url,
        "endpoint": "/generate",
        "prompts": [prompt],
        "settings": {},
        "expected_credits": 2,
        "seconds": 60.0,
    }
    claim = journal.claim(**{**options, **changes})
    assert claim.is_ours
    return claim.entry


def _accepted(journal: Journal, entry: JournalEntry) -> None:
    journal.accepted(entry.id, read_receipt(TASK, ("a",), RECEIPT))


@pytest.mark.parametrize("end", ["accepted", "unknown", "not sent"])
async def test_a_key_that_is_under_way_elsewhere_is_waited_for(end: str, path: Path) -> None:
    """Whatever the other's submit comes to, the key is not paid for twice."""
    looked = threading.Event()

    def watch(point: str) -> None:
        if point == "after claim":
            looked.set()

    got: list[Any] = []

    async def submit(cv: AsyncConceptViz) -> None:
        try:
            got.append((await cv.submit("a", key="k")).id)
        except SubmissionUnknownError as error:
            got.append(error.attempt_id)

    with Server() as server, Journal(path) as other, Watched(path, watch) as journal:
        async with at(server, journal) as cv:
            entry = _claimed(other, "a", cv)
            other.sending(entry.id)
            async with anyio.create_task_group() as group:
                group.start_soon(submit, cv)
                await anyio.to_thread.run_sync(looked.wait, 5)
                await anyio.wait_all_tasks_blocked()
                assert got == []
                assert server.ledger.connections == 0
                if end == "accepted":
                    _accepted(other, entry)
                else:
                    other.ended(entry.id, UNKNOWN if end == "unknown" else NOT_SENT)
        posts = server.ledger.posts
    expected = {"accepted": TASK, "unknown": entry.id, "not sent": posts[0].task_id if posts else ""}
    assert got == [expected[end]]
    assert len(posts) == (end == "not sent")


async def test_one_key_names_one_piece_of_work(journal: Journal) -> None:
    with Server() as server:
        async with at(server, journal) as cv:
            await cv.submit("a", key="k")
            with pytest.raises(InvalidRequestError, match="other work"):
                await cv.submit("b", key="k")
    assert len(server.ledger.posts) == 1


async def test_what_was_left_behind_is_found(path: Path) -> None:
    """A process that is taken for dead left one INTENT, one SENDING and one ACCEPTED: free, unknown, and taken up."""
    with Server() as server, Journal(path) as journal:
        async with at(server, journal) as cv:
            for key in ("intent", "sending", "accepted"):
                entry = _claimed(journal, key, cv, key=key)
                if key != "intent":
                    journal.sending(entry.id)
                if key == "accepted":
                    _accepted(journal, entry)
            with sqlite3.connect(path) as db:
                db.execute("UPDATE attempts SET stale_at = 0")
            db.close()
            assert [paid.submission.task_id for paid in await cv._core.submits.unended()] == [TASK]
            assert (await cv.submit("accepted", key="accepted")).id == TASK
            with pytest.raises(SubmissionUnknownError):
                await cv.submit("sending", key="sending")
            await cv.submit("intent", key="intent")
    assert [post.prompts for post in server.ledger.posts] == [("intent",)]


async def test_unended_is_this_accounts_own(journal: Journal) -> None:
    cv, _ = client(RECEIPT, journal=journal)
    async with cv:
        for number, change in enumerate(({"account": "another"}, {"base_url": "https://another"}, {})):
            entry = _claimed(journal, "a", cv, key=f"{number}", **change)
            _accepted(journal, entry)
        assert len(await cv._core.submits.unended()) == 1


async def test_without_a_journal() -> None:
    """All the same, but that nothing is written down."""
    budget = Budget(2)
    with Server(Script(posts=(refuse(429, "MODERATION_RATE_LIMITED"),), tasks_fail=True)) as server:
        async with at(server, budget=budget) as cv:
            with pytest.raises(GenerationFailedError):
                await cv.generate("a", key="k")
            assert await cv._core.submits.unended() == []
    assert len(server.ledger.posts) == 2
    assert (budget.reserved, budget.spent) == (0, 0)


async def test_the_time_limit_of_an_attempt_covers_all_its_repeats(path: Path) -> None:
    """Nobody takes an attempt for dead that is only patient."""
    with Server() as server, Journal(path) as journal:
        retries = Retries(attempts=5, max_retry_after=60)
        async with at(server, journal, timeout=30.0, retries=retries) as cv:
            await cv.submit("a")
        entry = only(journal)
    assert entry.stale_at - entry.created_at > 5 * (30 + 60)


async def test_an_error_of_a_refused_account_updates_what_is_known_of_its_credits() -> None:
    with Server(Script(posts=(refuse(402, "INSUFFICIENT_CREDITS", credits_remaining=1),))) as server:
        async with at(server) as cv:
            with pytest.raises(APIStatusError):
                await cv.submit("a")
            assert cv.credits_remaining == 1


async def test_a_submit_meets_no_answer_to_another(journal: Journal) -> None:
    """M35, F13: an answer too many, in the same segment, is nobody's; each submit has a connection of its own."""
    stray = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"taskId":"stray"}'
    with Server(Script(posts=(Step(answer=Answer(after=stray)),) * 3)) as server:
        async with at(server, journal, max_connections=1) as cv:
            ids = [(await cv.submit(f"{n}")).id for n in range(3)]
    assert ids == [post.task_id for post in server.ledger.posts]
    assert server.ledger.connections == 3


async def test_a_look_does_not_leave_its_connection_to_a_submit() -> None:
    """M18, M20: what an idle connection has in store, a late 408 and its end among it, never meets a submit."""
    late = b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with Server(Script(looks=(Step(answer=Answer(after=late)),))) as server:
        async with at(server, max_connections=1) as cv:
            first = await cv.submit("a")
            await first.status()
            second = await cv.submit("b")
    assert [first.id, second.id] == [post.task_id for post in server.ledger.posts]
    assert server.ledger.connections == 3


def test_the_log_at_level_1_was_looked_at(caplog: pytest.LogCaptureFixture) -> None:
    assert logging.getLogger().isEnabledFor(1)
