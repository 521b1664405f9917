"""The errors: their tree, what they carry, and that they cross to another process whole."""

from __future__ import annotations

import ast
import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from conceptviz import _errors
from conceptviz._errors import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    BudgetExceededError,
    ConceptVizError,
    Credits,
    DownloadError,
    GenerationFailedError,
    InsufficientCreditsError,
    InvalidImageError,
    InvalidRequestError,
    JournalError,
    ModerationBlockedError,
    NotSentError,
    PlanError,
    PlanLimitExceededError,
    PollInterruptedError,
    RateLimitedError,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    UnexpectedResponseError,
    WaitTimeoutError,
)
from conceptviz._models import Image, Submission, TaskState

TREE: dict[type[ConceptVizError], tuple[type[BaseException], ...]] = {
    ConceptVizError: (Exception,),
    InvalidRequestError: (ConceptVizError, ValueError),
    BudgetExceededError: (ConceptVizError,),
    NotSentError: (ConceptVizError,),
    SubmissionUnknownError: (ConceptVizError,),
    PollInterruptedError: (ConceptVizError,),
    UnexpectedResponseError: (ConceptVizError,),
    APIStatusError: (ConceptVizError,),
    BadRequestError: (APIStatusError,),
    ModerationBlockedError: (BadRequestError,),
    InvalidImageError: (BadRequestError,),
    AuthenticationError: (APIStatusError,),
    InsufficientCreditsError: (APIStatusError,),
    PlanError: (APIStatusError,),
    PlanLimitExceededError: (PlanError,),
    TaskNotFoundError: (APIStatusError,),
    RateLimitedError: (APIStatusError,),
    ServerError: (APIStatusError,),
    GenerationFailedError: (ConceptVizError,),
    WaitTimeoutError: (ConceptVizError, TimeoutError),
    JournalError: (ConceptVizError,),
    DownloadError: (ConceptVizError,),
}

STATE = TaskState("task", "processing", (Image("https://h/x.png"),), raw={"status": "processing"})
API: dict[str, Any] = {
    "status_code": 418,
    "code": "TEAPOT",
    "api_message": "I am one",
    "body": {"code": "TEAPOT", "deep": [1, {"x": None}]},
    "retry_after": 2.5,
    "task_id": "task",
    "credits": Credits.UNKNOWN,
}
API_KEPT = {("message" if name == "api_message" else name): value for name, value in API.items()}
BASE: dict[str, Any] = {"task_id": "task", "credits": Credits.SPENT}

BARE = (ConceptVizError, InvalidRequestError, BudgetExceededError, NotSentError, PollInterruptedError)
UNKNOWN: dict[str, Any] = {
    "status_code": 502,
    "headers": {"cf-ray": "x"},
    "body": b"<html>",
    "expected_credits": 4,
    "attempt_id": "a",
    "endpoint": "/generate",
    "sent_at": 1.5,
    "request_sha256": "f" * 64,
    "last_step": "http11.receive_response_body.failed",
    "credits_remaining": 9,
}
RECEIPT = Submission("task", raw={"taskId": "task"})

# Each class with its arguments and the attributes that it must keep.
CASES: list[tuple[type[ConceptVizError], dict[str, Any], dict[str, Any]]] = [
    *((cls, BASE, BASE) for cls in BARE),
    (
        SubmissionUnknownError,
        UNKNOWN,
        UNKNOWN | {"task_id": None, "credits": Credits.UNKNOWN},
    ),
    (
        UnexpectedResponseError,
        {"status_code": 302, "body": b"x", **BASE},
        {"status_code": 302, "body": b"x", **BASE},
    ),
    *((cls, API, API_KEPT) for cls in TREE if issubclass(cls, APIStatusError) and cls is not InsufficientCreditsError),
    (InsufficientCreditsError, API | {"credits_remaining": 1}, API_KEPT | {"credits_remaining": 1}),
    (
        GenerationFailedError,
        {"code": "X", "api_message": "Sorry", "credits_refunded": False, **BASE},
        {"code": "X", "message": "Sorry", "credits_refunded": False, **BASE},
    ),
    (WaitTimeoutError, {"task_id": "task", "last_state": STATE}, {"last_state": STATE, **BASE}),
    (JournalError, {"submission": RECEIPT}, {"submission": RECEIPT, **BASE}),
    (
        DownloadError,
        {"url": "https://h/x.png", "path": Path("a/b.png"), "task_id": "task"},
        {"url": "https://h/x.png", "path": Path("a/b.png"), **BASE},
    ),
]


def test_the_tree() -> None:
    """A caller catches by it: no class may move."""
    classes = {cls for cls in vars(_errors).values() if isinstance(cls, type) and issubclass(cls, BaseException)}
    assert classes == TREE.keys()
    for cls, bases in TREE.items():
        assert cls.__bases__ == bases


def test_the_drawn_tree_is_the_real_one() -> None:
    """The module's docstring draws each class below its base, with the built-in it is besides in brackets."""
    drawn: dict[str, tuple[str, ...]] = {}
    above: list[str] = []
    for line in (ast.get_docstring(ast.parse(Path(_errors.__file__).read_text("utf-8"))) or "").splitlines():
        match = re.match(r" *([│ ├└]*)([A-Za-z]+Error)(?: \((\w+)\))?(?: |$)", line)
        if match is None:
            continue
        # The root stands alone; each level below it is drawn three characters further in, and ends in a branch.
        depth = 0 if match[1].strip() == "" else match[1].lstrip(" ").replace("└", "├").index("├") // 3 + 1
        above[depth:] = [match[2]]
        drawn[match[2]] = tuple(filter(None, [above[depth - 1] if depth else "Exception", match[3]]))
    assert drawn == {cls.__name__: tuple(base.__name__ for base in bases) for cls, bases in TREE.items()}


def test_the_cases_cover_the_tree() -> None:
    assert {case[0] for case in CASES} == TREE.keys()


def same(one: ConceptVizError, other: ConceptVizError) -> bool:
    return (type(one), str(one), one.args, vars(one)) == (type(other), str(other), other.args, vars(other))


@pytest.mark.parametrize(("cls", "given", "kept"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_an_error_keeps_what_it_carries(
    cls: type[ConceptVizError], given: dict[str, Any], kept: dict[str, Any]
) -> None:
    """Through pickle, copy and deepcopy, with notes, and with nothing else in it."""
    error = cls("What happened. What was spent. What to do.", **given)
    assert vars(error) == kept
    assert str(error) == "What happened. What was spent. What to do."
    vars(error)["__notes__"] = ["as error.add_note writes it, from Python 3.11"]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert same(pickle.loads(pickle.dumps(error, protocol)), error)
    assert same(copy.copy(error), error)
    assert same(copy.deepcopy(error), error)
    assert "What happened" in repr(error)


@pytest.mark.parametrize(("cls", "given", "kept"), CASES, ids=lambda value: getattr(value, "__name__", ""))
def test_an_error_can_be_raised_again_after_a_journey(
    cls: type[ConceptVizError], given: dict[str, Any], kept: dict[str, Any]
) -> None:
    with pytest.raises(cls, match=r"^x$"):
        raise pickle.loads(pickle.dumps(cls("x", **given)))


def test_what_is_known_of_the_credits_by_default() -> None:
    """What nobody says otherwise of: an unknown submit is unknown, a task that is there is paid for."""
    assert [member.name for member in Credits] == ["NOT_SPENT", "SPENT", "REFUNDED", "UNKNOWN"]
    assert ConceptVizError("x").credits is Credits.NOT_SPENT
    assert ConceptVizError("x").task_id is None
    assert InvalidRequestError("x").credits is Credits.NOT_SPENT
    assert NotSentError("x").credits is Credits.NOT_SPENT
    assert BadRequestError("x", status_code=400).credits is Credits.NOT_SPENT
    assert SubmissionUnknownError("x").credits is Credits.UNKNOWN
    assert UnexpectedResponseError("x", status_code=200).credits is Credits.UNKNOWN
    assert GenerationFailedError("x").credits is Credits.UNKNOWN
    assert WaitTimeoutError("x", task_id="t").credits is Credits.SPENT
    assert DownloadError("x", url="https://h/").credits is Credits.SPENT


def test_what_is_not_said_is_none() -> None:
    for error in (RateLimitedError("x", status_code=429), InsufficientCreditsError("x", status_code=402)):
        assert (error.code, error.message, error.body, error.retry_after) == (None, None, None, None)
    assert InsufficientCreditsError("x", status_code=402).credits_remaining is None
    failed = GenerationFailedError("x")
    assert (failed.code, failed.message, failed.credits_refunded) == (None, None, None)
    unknown = SubmissionUnknownError("x")
    assert (unknown.status_code, unknown.body, unknown.expected_credits) == (None, b"", None)
    assert WaitTimeoutError("x", task_id="t").last_state is None
    assert DownloadError("x", url="https://h/").path is None


def test_only_the_beginning_of_a_body_is_kept() -> None:
    body = bytes(range(256)) * 100
    assert SubmissionUnknownError("x", body=body).body == body[:4096]
    assert UnexpectedResponseError("x", status_code=200, body=body).body == body[:4096]


def test_a_timeout_and_a_wrong_value_are_what_the_language_calls_so() -> None:
    with pytest.raises(TimeoutError):
        raise WaitTimeoutError("x", task_id="t")
    with pytest.raises(ValueError, match="x"):
        raise InvalidRequestError("x")
