"""What the mutants of `tests/mutation.py` showed to be unguarded: the code could get it wrong, and no test noticed."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import json
import logging
import pkgutil
import sqlite3
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import Any

import httpx
import pytest
from attrs import evolve
from helpers import RECEIPT, answer, client

import conceptviz
from conceptviz import (
    APIStatusError,
    BadRequestError,
    EditRequest,
    GenerateRequest,
    InsufficientCreditsError,
    InvalidRequestError,
    JournalError,
    NotSentError,
    RateLimitedError,
    Retries,
    ServerError,
    SubmissionUnknownError,
    TaskState,
    UnexpectedResponseError,
)
from conceptviz._budget import Budget, Reservation
from conceptviz._calls import ApiCall, ImageFile, build_edit, build_generate, check_task_id, fingerprint
from conceptviz._config import Secret, check_limits, is_loopback, resolve_base_url
from conceptviz._database import Database, is_alive, this_process
from conceptviz._images import PNG
from conceptviz._journal import AttemptState, Claim, Journal
from conceptviz._json import MAX_ANSWER_BYTES
from conceptviz._policy import Watch, pause_after_look, retry_delay
from conceptviz._refusals import error_class, is_refusal, parse_retry_after, quoted
from conceptviz._transport import _decoded, _reason
from conceptviz._wire import (
    Answer,
    build_result,
    failed_state,
    parse_submission,
    parse_task,
    read_receipt,
    read_state,
    unanswered_submission,
)

KEY = "cvk_0123456789abcdefSECRET"
ID = "vaW29_MJ1wbnyFU4bl_pd"
REQUEST = GenerateRequest("a water cycle")

# By these an exchange can be found again at the service; each other header may hold what is nobody's business.
FINDABLE = {
    "cf-ray": "8f1-FRA",
    "content-type": "text/html",
    "date": "Mon, 23 Nov 2026 18:00:00 GMT",
    "location": "/elsewhere",
    "server": "cloudflare",
    "x-request-id": "r" * 200,
}
HEADERS = {**FINDABLE, "set-cookie": "session=1", "authorization": KEY, "x-request-id": "r" * 201}


class Lowest(Random):
    """Randomness that always falls on the lower end of the range."""

    def uniform(self, a: float, b: float) -> float:
        return a


class Highest(Random):
    """Randomness that always falls on the upper end of the range."""

    def uniform(self, a: float, b: float) -> float:
        return b


def test_everything_is_logged_under_one_name() -> None:
    """A program silences or keeps the package's log by that name."""
    names = [found.name for found in pkgutil.iter_modules(conceptviz.__path__) if found.name != "__main__"]
    modules = [importlib.import_module(f"conceptviz.{name}") for name in names]
    loggers = [logger for module in modules if isinstance(logger := getattr(module, "logger", None), logging.Logger)]
    assert len(loggers) > 3
    assert {logger.name for logger in loggers} == {"conceptviz"}


@pytest.mark.parametrize("spends", [True, False])
@pytest.mark.parametrize("error", [NotSentError("x"), RateLimitedError("x", status_code=429)])
def test_no_pause_is_made_up_that_nobody_asked_for(error: Any, spends: bool) -> None:
    assert retry_delay(error, 1, Retries(), Lowest(), spends=spends) == 0.0


def test_after_an_answered_look_the_regular_interval_is_kept() -> None:
    """However long the pauses after failures are."""
    assert pause_after_look(Watch(ID), None, 0.5, Retries(base_delay=8.0), Highest()) == 0.5


def test_the_fingerprint_of_a_key_is_the_same_in_every_release() -> None:
    """It stands in journals: with another one, a paid task would count as somebody else's."""
    expected = hashlib.sha256(b"conceptviz journal " + KEY.encode()).hexdigest()[:16]
    assert Secret(KEY).fingerprint() == expected
    assert Secret(KEY + "x").fingerprint() != expected


def test_the_error_of_a_bad_url_is_not_chained_to_one_that_quotes_it() -> None:
    """What cannot be read as a port may be the end of a password."""
    url = "https://user:" + "hunter2/x@host/api/v1"
    with pytest.raises(InvalidRequestError) as caught:
        resolve_base_url(url)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("timeout", [0.001, 1, 30.0, 1e9])
def test_a_timeout_is_any_number_of_seconds_above_0(timeout: float) -> None:
    check_limits(timeout, 1)


@pytest.mark.parametrize("timeout", [0, 0.0, -1, float("inf"), float("nan"), True, "30", None])
def test_no_other_timeout_is_taken(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout must be a number of seconds above 0"):
        check_limits(timeout, 1)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, "20", None])
def test_no_other_number_of_connections_is_taken(limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_connections must be at least 1"):
        check_limits(30.0, limit)


def test_a_name_is_loopback_or_not_and_nothing_between() -> None:
    assert is_loopback("localhost") is True
    assert is_loopback("conceptviz.app") is False


def test_an_answer_without_an_id_keeps_what_it_can_be_found_by() -> None:
    """Its headers that identify it, shortened, and the service's own words; no other header."""
    body = json.dumps({"error": "Half done."}).encode()
    with pytest.raises(SubmissionUnknownError, match=r"Half done\., HTTP 200") as caught:
        parse_submission(Answer(200, HEADERS, body), REQUEST)
    assert caught.value.headers == FINDABLE
    assert caught.value.body == body


def test_half_an_answer_keeps_what_it_can_be_found_by() -> None:
    with pytest.raises(SubmissionUnknownError) as caught:
        unanswered_submission("it broke", Answer(502, HEADERS, b"<html>"), REQUEST, "http11.receive_response.started")
    assert caught.value.headers == FINDABLE
    assert caught.value.last_step == "http11.receive_response.started"
    assert (caught.value.status_code, caught.value.body) == (502, b"<html>")


@pytest.mark.parametrize("name", ["taskId", "task_id"])
@pytest.mark.parametrize(("status", "is_strange"), [(199, True), (200, False), (299, False), (300, True)])
def test_only_a_strange_answer_with_an_id_is_logged(
    name: str, status: int, is_strange: bool, caplog: pytest.LogCaptureFixture
) -> None:
    body = json.dumps({name: ID}).encode()
    assert parse_submission(Answer(status, {}, body), REQUEST).task_id == ID
    assert ("counts as accepted and paid for" in caplog.text) is is_strange


@pytest.mark.parametrize("name", ["taskId", "task_id"])
def test_an_id_of_another_form_is_kept_under_either_name(name: str) -> None:
    """It is paid for, whatever letters the service makes its ids of."""
    body = json.dumps({name: "task 1/2"}).encode()
    assert parse_submission(Answer(200, {}, body), REQUEST).task_id == "task 1/2"


def test_a_receipt_says_what_the_service_said() -> None:
    assert read_receipt(ID, ("a",), {"status": "queued"}).status == "queued"
    assert read_receipt(ID, ("a",), {}).status == "pending"


def test_only_a_terminal_status_is_read_in_any_case() -> None:
    """An undocumented word stays as it was said."""
    assert read_state(ID, (), {"status": "COMPLETED"}).status == "completed"
    assert read_state(ID, (), {"status": "Rendering"}).status == "Rendering"


@pytest.mark.parametrize("status", [200, 299])
def test_a_look_is_answered_by_any_success(status: int) -> None:
    assert parse_task(Answer(status, {}, b'{"status": "processing"}'), ID).status == "processing"


@pytest.mark.parametrize("status", [199, 300])
def test_a_look_is_answered_by_nothing_else(status: int) -> None:
    with pytest.raises(UnexpectedResponseError) as caught:
        parse_task(Answer(status, {}, b'{"status": "processing"}'), ID)
    assert caught.value.body == b'{"status": "processing"}'


@pytest.mark.parametrize("body", [None, {"error": "Other words.", "code": "OTHER"}])
def test_a_failure_is_told_in_the_words_of_its_error(body: dict[str, Any] | None) -> None:
    """Also when nothing but the error itself is left of the answer."""
    error = ServerError("x", status_code=500, code="GENERATION_FAILED", api_message="It failed.", body=body)
    state = failed_state(error, ID)
    assert (state.status, state.error, state.code) == ("failed", error.message, "GENERATION_FAILED")


def test_a_task_picked_up_by_its_id_misses_no_prompt() -> None:
    """Nobody knows which were asked for."""
    assert build_result(TaskState(task_id=ID, status="completed"), None).missing_prompts == ()


def test_an_image_without_a_prompt_has_an_empty_one() -> None:
    state = read_state(ID, (), {"status": "completed", "images": [{"url": "https://h/1.png"}]})
    assert [image.prompt for image in state.images] == [""]


@pytest.mark.parametrize("code", [None, "GENERATION_FAILED", "UNHEARD_OF"])
def test_no_status_below_400_refuses(code: str | None) -> None:
    assert not is_refusal(code, 399)


def test_each_documented_and_each_client_error_refuses() -> None:
    assert is_refusal("GENERATION_FAILED", 400)
    assert is_refusal(None, 400)
    assert is_refusal(None, 499)
    assert not is_refusal(None, 500)


@pytest.mark.parametrize(
    ("status", "cls"), [(399, None), (400, BadRequestError), (499, BadRequestError), (500, ServerError)]
)
def test_the_family_of_a_status(status: int, cls: type[APIStatusError] | None) -> None:
    assert error_class(None, status) is cls


@pytest.mark.parametrize("value", ["Mon, 01 Jan 2024 00:00:00 +99999999999", "+99999999999 Jan 00:00:00 01"])
def test_a_pause_until_a_date_beyond_all_calendars_is_unreadable(value: str) -> None:
    assert parse_retry_after({"retry-after": value, "date": "Mon, 23 Nov 2026 18:00:00 GMT"}) is None


def test_the_shortest_pause_until_a_date_counts() -> None:
    now = "Mon, 23 Nov 2026 18:00:00 GMT"
    assert parse_retry_after({"retry-after": "Mon, 23 Nov 2026 18:00:01 GMT", "date": now}) == 1.0
    assert parse_retry_after({"retry-after": now, "date": now}) is None


def test_a_quotation_is_short() -> None:
    assert quoted("m" * 501, "c" * 101, 500) == "m" * 500 + ", " + "c" * 100 + ", HTTP 500"


def test_the_fingerprint_of_a_request_is_the_same_in_every_release() -> None:
    """It stands in journals: with another one, a key would count as that of other work."""
    body = b'{"prompt":"a water cycle"}'
    assert fingerprint(build_generate(REQUEST)) == hashlib.sha256(b"/generate" + body).hexdigest()
    assert fingerprint(ApiCall("POST", "/edit", "application/json", (body,))) != fingerprint(build_generate(REQUEST))
    assert fingerprint(ApiCall("POST", "/generate")) == hashlib.sha256(b"/generate").hexdigest()


def test_the_fingerprint_of_an_upload_is_of_what_is_uploaded() -> None:
    """Not of the boundary, which is drawn anew each time."""
    request = EditRequest("brighter", [b"unused"])

    def of(content: bytes, boundary: str, request: EditRequest = request) -> str:
        return fingerprint(build_edit(request, [ImageFile(content, PNG)], boundary=boundary))

    assert of(b"image", "0" * 32) == of(b"image", "1" * 32)
    assert of(b"image", "0" * 32) != of(b"other", "0" * 32)
    assert of(b"image", "0" * 32) != of(b"image", "0" * 32, EditRequest("darker", [b"unused"]))


@pytest.mark.parametrize(("length", "shown"), [(78, 80), (79, 80), (500, 80)])
def test_what_is_no_task_id_is_quoted_on_one_line(length: int, shown: int) -> None:
    """80 characters of it at most, the quotes included."""
    with pytest.raises(InvalidRequestError) as caught:
        check_task_id("/" * length)
    quotation = str(caught.value).partition(" is not a task id")[0]
    assert len(quotation) == shown
    assert quotation == (f"'{'/' * 78}'" if length == 78 else f"'{'/' * 76}...")


def test_a_prompt_is_sent_in_its_own_letters() -> None:
    (body,) = build_generate(GenerateRequest("le cycle de l'eau: é, 水")).body
    assert body == '{"prompt":"le cycle de l\'eau: é, 水"}'.encode()


def claim_of(journal: Journal, key: str | None = "a") -> Claim:
    return journal.claim(
        key=key,
        fingerprint="f",
        account="acc",
        base_url="https://conceptviz.app/api/v1",
        endpoint="/generate",
        prompts=("a water cycle",),
        settings={},
        expected_credits=2,
        seconds=60,
    )


def test_a_journal_is_known_by_its_header_in_every_release(tmp_path: Path) -> None:
    """To another mark or version, what is paid for in the journals of today would be a stranger's file."""
    with Journal(tmp_path / "journal.sqlite"), sqlite3.connect(tmp_path / "journal.sqlite") as db:
        assert db.execute("PRAGMA application_id").fetchone() == (int.from_bytes(b"CVZJ", "big"),)
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    db.close()


def test_a_transaction_holds_the_write_lock_from_its_beginning(tmp_path: Path) -> None:
    """What it reads is then what it acts on: two claims of one key never both see that it is free."""
    database = Database(tmp_path / "journal.sqlite")
    other = sqlite3.connect(tmp_path / "journal.sqlite", timeout=0, isolation_level=None)
    with database.transaction(), pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("BEGIN IMMEDIATE")
    other.execute("BEGIN IMMEDIATE")
    other.close()
    database.close()


def test_of_two_tasks_of_one_key_the_latest_is_taken_up(tmp_path: Path) -> None:
    """There are two if an attempt was given up, and accepted after all while another one was already being sent."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        first = claim_of(journal).entry.id
        journal.sending(first)
        journal.ended(first, AttemptState.UNKNOWN)
        journal.resolve(first)
        second = claim_of(journal).entry.id
        journal.sending(second)
        journal.accepted(first, read_receipt("task-1", ("a",), {}))
        journal.accepted(second, read_receipt("task-2", ("a",), {}))
        claim = claim_of(journal)
    assert (claim.is_ours, claim.entry.task_id) == (False, "task-2")


def test_the_words_of_the_states_are_the_same_in_every_release() -> None:
    """They stand in journals, and scripts read them from the command line."""
    words = ["intent", "sending", "accepted", "completed", "failed", "rejected", "not_sent", "unknown", "abandoned"]
    assert [state.value for state in AttemptState] == words


def test_what_a_service_sent_is_no_part_of_an_entrys_name_or_sameness(tmp_path: Path) -> None:
    """Whoever logs an entry logs what the journal is about, and not whatever the service has said."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        entry = claim_of(journal).entry
    told = evolve(entry, receipt={"x": "told"}, answer={"x": "told"})
    assert "told" not in repr(told)
    assert "acc" in repr(told)
    assert told == entry


def test_a_journal_that_was_replaced_while_nobody_held_it_is_refused(tmp_path: Path) -> None:
    """As after a fork, which no connection crosses: to write into another file would leave the keys here unpaid."""
    path = tmp_path / "journal.sqlite"
    database = Database(path)
    database._disconnect()
    path.rename(tmp_path / "moved")
    with Journal(path), pytest.raises(JournalError, match="replaced"), database.transaction():
        raise AssertionError("it was used")
    database.close()


@pytest.mark.parametrize(("length", "is_read"), [(1, True), (512, True), (513, False)])
def test_how_long_the_id_of_a_paid_task_may_be(tmp_path: Path, length: int, is_read: bool) -> None:
    """As long as one that is taken from an answer."""
    with Journal(tmp_path / "journal.sqlite") as journal:
        attempt = claim_of(journal).entry.id
        journal.sending(attempt)
        journal.accepted(attempt, read_receipt("t" * length, ("a",), {}))
        with nullcontext() if is_read else pytest.raises(JournalError):
            assert journal.entries()[0].task_id == "t" * length


@pytest.mark.parametrize("pid", ["9" * 30, "9" * 5000, "-1", "", "one"])
def test_an_owner_that_no_process_can_be_may_be_alive(pid: str) -> None:
    """Whoever wrote it: nobody's attempt is taken over in doubt."""
    _, started, namespace = this_process().split(":", 2)
    assert is_alive(f"{pid}:{started}:{namespace}") is True


def test_an_owner_of_whom_only_the_id_is_known_is_alive_as_long_as_that() -> None:
    pid, _, namespace = this_process().split(":", 2)
    assert is_alive(f"{pid}::{namespace}") is True


def test_only_what_is_declared_as_compressed_is_decoded() -> None:
    packed = gzip.compress(b"{}")
    assert _decoded(packed, " X-GZIP ") == b"{}"
    assert _decoded(packed, "") == packed
    assert _decoded(b"{}", "gzip") == b"{}"


@pytest.mark.parametrize(
    "change",
    [
        lambda budget, reservation: budget.reserve(1),
        lambda budget, reservation: reservation.release(),
        lambda budget, reservation: reservation.settle(2),
        lambda budget, reservation: reservation.refund(),
    ],
    ids=["reserve", "release", "settle", "refund"],
)
def test_a_budget_is_changed_by_one_thread_at_a_time(change: Callable[[Budget, Reservation], None]) -> None:
    budget = Budget(10)
    thread = threading.Thread(target=change, args=(budget, budget.reserve(2)))
    with budget._lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive(), "it does not wait for its turn"
    thread.join()


def test_a_compressed_answer_is_decoded_as_far_as_an_answer_may_go() -> None:
    """One byte further, by which it is known to be too long; and whatever distance its repetitions look back."""
    assert len(_decoded(gzip.compress(bytes(MAX_ANSWER_BYTES + 9)), "gzip")) == MAX_ANSWER_BYTES + 1
    far = Random(1).randbytes(20_000) * 2
    assert _decoded(gzip.compress(far), "gzip") == far


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (httpx.ConnectTimeout, "no connection was made in time"),
        (httpx.ConnectError, "no connection could be made"),
        (httpx.ProxyError, "the proxy made no connection"),
        (httpx.PoolTimeout, "no connection was free in time"),
        (httpx.ReadTimeout, "the connection fell silent"),
        (httpx.WriteTimeout, "the connection fell silent"),
        (httpx.RemoteProtocolError, "the connection ended or was garbled"),
        (httpx.ReadError, "the connection broke"),
        (httpx.LocalProtocolError, "it failed (LocalProtocolError)"),
    ],
)
def test_what_happened_is_told_without_the_words_of_the_library(error: type[Exception], words: str) -> None:
    """They may hold a header's value."""
    assert _reason(error(f"Illegal header value b'Bearer {KEY}'")) == words


@pytest.mark.anyio
async def test_a_refusal_that_names_no_credits_leaves_what_is_known_of_them() -> None:
    cv, _ = client(RECEIPT, answer(402, {"error": "Not enough.", "code": "INSUFFICIENT_CREDITS"}))
    async with cv:
        await cv.submit("a water cycle")
        with pytest.raises(InsufficientCreditsError):
            await cv.submit("a rock cycle")
        assert cv.credits_remaining == 79
