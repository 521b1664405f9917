"""Whatever bytes, JSON and headers come: a value or a ConceptVizError, and no rule about money broken."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import ANSWERS, HEADERS, JSON_VALUES, OBJECTS, PROMPTS, REQUESTS, bodies

from conceptviz import (
    APIStatusError,
    ConceptVizError,
    Credits,
    EditRequest,
    GenerateRequest,
    GenerationFailedError,
    Result,
    ServerError,
    Submission,
    SubmissionUnknownError,
    TaskState,
    UnexpectedResponseError,
)
from conceptviz._calls import build_look, check_task_id
from conceptviz._images import HEAD_BYTES, TAIL_BYTES, ends_properly, sniff
from conceptviz._json import decode_json
from conceptviz._policy import SAFE_TO_SUBMIT_AGAIN, Watch
from conceptviz._refusals import parse_retry_after
from conceptviz._spec import ERROR_CODES
from conceptviz._wire import (
    Answer,
    build_result,
    failed_state,
    parse_error,
    parse_submission,
    parse_task,
    unanswered_submission,
)

properties = settings(max_examples=200, derandomize=True, deadline=None)
AnyRequest = GenerateRequest | EditRequest
T = TypeVar("T")


def check_error(error: ConceptVizError) -> None:
    """It says something in bounded length, and crosses to another process."""
    assert 0 < len(str(error)) < 2000
    twin = pickle.loads(pickle.dumps(error))
    assert (type(twin), str(twin), twin.credits) == (type(error), str(error), error.credits)


def check_receipt(receipt: Submission, request: AnyRequest) -> None:
    """Whatever the id is, it can be looked up and stays in its place."""
    assert receipt.prompts == request.prompts
    call = build_look(receipt.task_id)
    assert call.path.startswith("/task/")
    assert not set("/?#\r\n ") & set(call.path.removeprefix("/task/"))
    assert pickle.loads(pickle.dumps(receipt)) == receipt
    for count in (receipt.credits_used, receipt.credits_remaining):
        assert count is None or 0 <= count < 10**18


def outcome(read: Callable[..., T], *args: Any) -> T | ConceptVizError:
    """What is read, or the error that is raised; another error is none of ours, and fails the test."""
    try:
        return read(*args)
    except ConceptVizError as error:
        check_error(error)
        return error


@properties
@given(ANSWERS, REQUESTS)
def test_any_answer_to_a_submit(answer: Answer, request: AnyRequest) -> None:
    """A receipt, or an error that tells the truth about the credits; only a refusal may be sent again."""
    end = outcome(parse_submission, answer, request)
    if isinstance(end, Submission):
        check_receipt(end, request)
        return
    assert end.task_id is None
    assert not isinstance(end, UnexpectedResponseError)
    code = getattr(end, "code", None)
    if isinstance(end, SubmissionUnknownError):
        assert end.credits is Credits.UNKNOWN
    elif not isinstance(end, GenerationFailedError):
        assert end.credits is Credits.NOT_SPENT
        assert code in ERROR_CODES or 400 <= answer.status_code < 500
    if answer.status_code < 400:
        assert isinstance(end, SubmissionUnknownError)
    if isinstance(end, SAFE_TO_SUBMIT_AGAIN):
        assert code == "MODERATION_RATE_LIMITED" or (answer.status_code == 429 and code not in ERROR_CODES)


@properties
@given(ANSWERS | st.none(), REQUESTS)
def test_any_part_of_an_answer_to_a_submit(partial: Answer | None, request: AnyRequest) -> None:
    """A receipt or an unknown: nothing else is known for certain."""
    end = outcome(unanswered_submission, "the connection broke", partial, request)
    if isinstance(end, Submission):
        check_receipt(end, request)
    else:
        assert isinstance(end, SubmissionUnknownError)


@properties
@given(ANSWERS, st.lists(PROMPTS, max_size=4))
def test_any_answer_to_a_look(answer: Answer, prompts: list[str]) -> None:
    """A state, or an error with the task's id; only a terminal word in a 2xx ends a task."""
    end = outcome(parse_task, answer, "task", prompts)
    if isinstance(end, TaskState):
        assert 200 <= answer.status_code < 300
        assert pickle.loads(pickle.dumps(end)) == end
        assert all(image.url and image.task_id == "task" for image in end.images)
        assert repr(end)
        check_end(end, prompts)
        return
    assert end.task_id == "task"
    assert end.credits in {Credits.SPENT, Credits.UNKNOWN}
    assert isinstance(end, APIStatusError | UnexpectedResponseError)
    if isinstance(end, ServerError):
        check_end(failed_state(end, "task"), prompts)


def check_end(state: TaskState, prompts: list[str]) -> None:
    """Whatever the state, watching it goes on or ends; an ended one is a result or its own error."""
    watch = Watch("task", 0.0)
    for _ in range(3):
        assert outcome(watch.judge_state, state) in {True, False} or not state.images
    if not state.is_terminal:
        return
    end = outcome(build_result, state, Submission("task", prompts=tuple(prompts)))
    if isinstance(end, Result):
        assert state.status == "completed"
        assert end.images == state.images
        assert len(end.missing_prompts) >= len(prompts) - len(end.images)
        assert end._repr_html_() is not None
        return
    assert state.status == "failed"
    assert end.task_id == "task"
    refunded = {True: Credits.REFUNDED, False: Credits.SPENT, None: Credits.UNKNOWN}
    assert end.credits is refunded[state.credits_refunded]


@properties
@given(ANSWERS, st.none() | st.just("task"))
def test_any_error_answer(answer: Answer, task_id: str | None) -> None:
    """Even where nobody asks: a success is no error's answer, and yet is read without falling over."""
    error = parse_error(answer, task_id)
    check_error(error)
    assert (error.task_id, error.status_code) == (task_id, answer.status_code)
    if isinstance(error, APIStatusError):
        assert error.retry_after is None or 0 <= error.retry_after <= 1e9


GOOD_IDS = st.from_regex(r"\A[A-Za-z0-9_-]{1,128}\Z")


@properties
@given(GOOD_IDS, OBJECTS, st.booleans(), REQUESTS)
def test_salvaging_a_whole_body_is_reading_it(
    task_id: str, rest: dict[str, Any], first: bool, request: AnyRequest
) -> None:
    """Differential: the id picked out of the bytes is the one that a reading of the whole gives."""
    body = {"taskId": task_id} | rest | {"taskId": task_id} if first else rest | {"taskId": task_id}
    whole = json.dumps(body).encode()
    # Of several ids, bytes alone do not tell which is the outermost, and none is taken.
    assume(whole.count(b'"taskId"') == 1 and b'"task_id"' not in whole)
    strict = parse_submission(Answer(200, {}, whole), request)
    salvaged = parse_submission(Answer(200, {}, whole + b"}"), request)
    assert strict.task_id == salvaged.task_id == task_id
    assert salvaged.raw == {}


@properties
@given(GOOD_IDS, JSON_VALUES, st.binary(max_size=20), REQUESTS)
def test_a_good_id_is_never_lost(task_id: str, other: Any, tail: bytes, request: AnyRequest) -> None:
    """Invariant B: whatever stands before it or behind it, in whatever status and Unicode form."""
    whole = json.dumps({"other": other, "taskId": task_id})
    assume(whole.count('"taskId"') == 1)
    for status in (200, 302, 400, 500):
        for body in (whole.encode(), whole.encode("utf-16"), whole[:-1].encode() + tail):
            assert parse_submission(Answer(status, {}, body), request).task_id == task_id
            assert unanswered_submission("it broke", Answer(status, {}, body), request).task_id == task_id


@properties
@given(HEADERS)
def test_retry_after_is_total(headers: dict[str, str]) -> None:
    """A finite, bounded number of seconds, or None."""
    after = parse_retry_after(headers)
    assert after is None or (math.isfinite(after) and 0 <= after <= 1e9)


@properties
@given(bodies())
def test_strict_json_is_what_any_reader_would_read(body: bytes) -> None:
    """What is decoded can be written, copied and compared, and is the same again; all else is a ValueError."""
    try:
        value = decode_json(body)
    except ValueError:
        return
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    assert decode_json(text.encode()) == value
    assert pickle.loads(pickle.dumps(value)) == value


@properties
@given(st.text() | JSON_VALUES)
def test_a_task_id_is_checked_whatever_it_is(value: Any) -> None:
    checked = outcome(check_task_id, value)
    if not isinstance(checked, ConceptVizError):
        assert build_look(checked).path == f"/task/{value}"


@properties
@given(
    st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\x0a\x00\x00\x00WEBP", b"GIF89a"]),
    st.binary(max_size=60),
)
def test_any_bytes_are_judged_as_an_image(start: bytes, rest: bytes) -> None:
    """The few bytes that are kept of a download decide as the whole would."""
    content = start + rest
    head, tail = content[:HEAD_BYTES], content[-TAIL_BYTES:]
    assert sniff(head) == sniff(content)
    assert ends_properly(head, tail, len(content)) == ends_properly(content, content, len(content))
    assert sniff(content) is not None or not ends_properly(head, tail, len(content))
