"""Refusals: each documented code as its class, what was spent, what to do next, and `Retry-After`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from conceptviz import (
    APIStatusError,
    AuthenticationError,
    BadRequestError,
    ConceptVizError,
    Credits,
    EditRequest,
    GenerateRequest,
    GenerationFailedError,
    InsufficientCreditsError,
    InvalidImageError,
    ModerationBlockedError,
    PlanError,
    PlanLimitExceededError,
    RateLimitedError,
    ServerError,
    SubmissionUnknownError,
    TaskNotFoundError,
    UnexpectedResponseError,
)
from conceptviz._refusals import parse_retry_after, quoted
from conceptviz._wire import Answer, build_result, parse_submission, parse_task, unanswered_submission

ID = "vaW29_MJ1wbnyFU4bl_pd"

# Code, HTTP status and class, and what the message says is to be done.
CODES: list[tuple[str, int, type[ConceptVizError], str]] = [
    ("INVALID_BODY", 400, BadRequestError, "report it"),
    ("IMAGE_REQUIRED", 400, BadRequestError, "Give one to four images"),
    ("INVALID_IMAGE", 400, InvalidImageError, "Give PNG, JPEG or WebP"),
    ("PROMPT_REQUIRED", 400, BadRequestError, "Give a prompt"),
    ("TOO_MANY_IMAGES", 400, BadRequestError, "Give at most four images"),
    ("TOO_MANY_PROMPTS", 400, BadRequestError, "Give at most four prompts"),
    ("UNSUPPORTED_MODEL", 400, BadRequestError, "cv-2 and cv-1"),
    ("UNAUTHORIZED", 401, AuthenticationError, "CONCEPTVIZ_API_KEY"),
    ("INVALID_API_KEY", 401, AuthenticationError, "Settings > API Keys"),
    ("INSUFFICIENT_CREDITS", 402, InsufficientCreditsError, "Add credits"),
    ("PLAN_REQUIRED", 403, PlanError, "Pro plan"),
    ("QUALITY_NOT_ALLOWED", 403, PlanError, "lower quality"),
    ("PLAN_LIMIT_EXCEEDED", 403, PlanLimitExceededError, "fewer prompts"),
    ("TASK_NOT_FOUND", 404, TaskNotFoundError, "another API key"),
    ("MODERATION_RATE_LIMITED", 429, RateLimitedError, "more slowly"),
    ("INPUT_MODERATION_BLOCKED", 400, ModerationBlockedError, "Change the prompt or the image"),
    ("CREDIT_CONSUMPTION_FAILED", 500, ServerError, "Try again later"),
    ("GENERATION_FAILED", 500, ServerError, "It can be submitted again"),
]
FAMILIES: list[tuple[int, type[APIStatusError], str]] = [
    (400, BadRequestError, "Change the request"),
    (401, AuthenticationError, "Check the API key"),
    (402, InsufficientCreditsError, "Add credits"),
    (403, PlanError, "Check what the account's plan allows"),
    (404, TaskNotFoundError, "Check the base URL"),
    (413, BadRequestError, "Change the request"),
    (418, BadRequestError, "Change the request"),
    (429, RateLimitedError, "more slowly"),
]
REQUESTS: list[GenerateRequest | EditRequest] = [GenerateRequest(["a", "b"]), EditRequest("a", b"")]


def kind(error: object) -> type[Any]:
    """The exact class, which a type checker is not to draw conclusions from."""
    return type(error)


def refuse_submit(status: int, body: Any, headers: dict[str, str] | None = None) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ConceptVizError) as caught:
        parse_submission(Answer(status, headers or {}, content), REQUESTS[0])
    return caught.value


def refuse_look(status: int, body: Any, headers: dict[str, str] | None = None) -> Any:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    with pytest.raises(ConceptVizError) as caught:
        parse_task(Answer(status, headers or {}, content), ID)
    return caught.value


@pytest.mark.parametrize(("code", "status", "cls", "advice"), CODES)
def test_each_code_on_a_submit(code: str, status: int, cls: type[ConceptVizError], advice: str) -> None:
    """The class, the code and the sentence of the service, what was spent, and what to do."""
    body = {"error": f"Sentence of {code}", "code": code}
    error = refuse_submit(status, body)
    if code == "GENERATION_FAILED":
        assert kind(error) is GenerationFailedError
        assert error.credits is Credits.REFUNDED
        assert "credits are refunded" in str(error)
    else:
        assert kind(error) is cls
        assert error.credits is Credits.NOT_SPENT
        assert (error.status_code, error.body) == (status, body)
        assert "Nothing was spent." in str(error)
    assert (error.code, error.message, error.task_id) == (code, f"Sentence of {code}", None)
    assert f"Sentence of {code}, {code}, HTTP {status}" in str(error)
    assert advice in str(error)


@pytest.mark.parametrize(("code", "status", "cls", "advice"), CODES)
def test_each_code_on_a_look(code: str, status: int, cls: type[ConceptVizError], advice: str) -> None:
    """The task keeps its id, and is paid for unless nobody knows it."""
    error = refuse_look(status, {"error": "x", "code": code})
    assert kind(error) is cls
    assert (error.task_id, error.code, error.status_code) == (ID, code, status)
    if cls is TaskNotFoundError:
        assert error.credits is Credits.UNKNOWN
        assert f"Whether task {ID} was paid for is not known." in str(error)
    else:
        assert error.credits is Credits.SPENT
        assert f"Task {ID} itself is paid for and keeps its id." in str(error)
    assert advice in str(error)


@pytest.mark.parametrize(("code", "status", "cls", "advice"), CODES)
@pytest.mark.parametrize(
    ("refunded", "credits", "sentence"),
    [
        (True, Credits.REFUNDED, "were refunded"),
        (False, Credits.SPENT, "were not refunded"),
        (None, Credits.UNKNOWN, "did not say whether"),
    ],
)
def test_each_code_of_a_failed_task(
    code: str,
    status: int,
    cls: type[ConceptVizError],
    advice: str,
    refunded: bool | None,
    credits: Credits,
    sentence: str,
) -> None:
    """By its code first: moderation may speak after the task was accepted."""
    body = {"status": "failed", "error": "x", "code": code, "credits_refunded": refunded}
    state = parse_task(Answer(200, {}, json.dumps(body).encode()), ID)
    with pytest.raises(ConceptVizError) as caught:
        build_result(state, None)
    error: Any = caught.value
    assert kind(error) is (GenerationFailedError if code == "GENERATION_FAILED" else cls)
    assert (error.task_id, error.code, error.message, error.credits) == (ID, code, "x", credits)
    assert str(error).startswith(f"Task {ID} ended as failed (x, {code}). ")
    assert sentence in str(error)
    assert advice in str(error)
    if isinstance(error, APIStatusError):
        assert (error.status_code, error.body) == (status, body)


@pytest.mark.parametrize("code", ["NEW_CODE", None])
def test_an_unknown_code_of_a_failed_task_keeps_its_text(code: str | None) -> None:
    state = parse_task(Answer(200, {}, json.dumps({"status": "failed", "code": code}).encode()), ID)
    with pytest.raises(GenerationFailedError) as caught:
        build_result(state, None)
    assert caught.value.code == code
    assert "It can be submitted again." in str(caught.value)


@pytest.mark.parametrize(("status", "cls", "advice"), FAMILIES)
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b'{"error":"x","code":"NEW_CODE"}', "NEW_CODE"),
        (b'{"error":{"message":"x"}}', None),
        (b'{"error":"x","code":5}', None),
        (b'{"error":"x","code":["INVALID_BODY"]}', None),
        (b"<html>Attention Required!</html>", None),
        (b"[]", None),
        (b"", None),
    ],
)
def test_an_unknown_code_falls_to_the_family_of_its_status(
    status: int, cls: type[APIStatusError], advice: str, body: bytes, code: str | None
) -> None:
    """On a submit a 4xx refuses, even one of a gateway; on a look it says nothing of the task."""
    error = refuse_submit(status, body)
    assert kind(error) is cls
    assert (error.status_code, error.code, error.credits) == (status, code, Credits.NOT_SPENT)
    assert "Nothing was spent." in str(error)
    assert advice in str(error)
    error = refuse_look(status, body)
    assert kind(error) is cls
    assert (error.code, error.task_id) == (code, ID)
    assert "Take the task up again by its id later." in str(error)


@pytest.mark.parametrize("status", [500, 502, 503, 504, 520, 599, 999])
def test_a_servers_error_on_a_look(status: int) -> None:
    """M41: on a submit the same answers leave it unknown."""
    error = refuse_look(status, b"<html>Bad gateway</html>")
    assert kind(error) is ServerError
    assert (error.code, error.message, error.body) == (None, None, None)
    assert (error.task_id, error.credits) == (ID, Credits.SPENT)
    assert type(refuse_submit(status, b"<html>Bad gateway</html>")) is SubmissionUnknownError


@pytest.mark.parametrize("status", [100, 301, 302, 307, 308, 408, 409, 425])
def test_an_undocumented_status_on_a_look(status: int) -> None:
    """M37: a redirect is not followed, and a gateway's answer is not taken for the service's."""
    error = refuse_look(status, b'{"error":"Request timeout"}')
    assert kind(error) is UnexpectedResponseError
    assert (error.status_code, error.task_id, error.credits) == (status, ID, Credits.SPENT)
    assert f"Request timeout, HTTP {status}" in str(error)
    assert f"Task {ID} itself is paid for and keeps its id. Look again later." in str(error)


def test_a_code_comes_before_the_status() -> None:
    """The service may move a code to another status."""
    assert type(refuse_submit(422, {"code": "INVALID_IMAGE"})) is InvalidImageError
    assert type(refuse_submit(409, {"code": "INSUFFICIENT_CREDITS"})) is InsufficientCreditsError
    assert type(refuse_submit(503, {"code": "UNAUTHORIZED"})) is AuthenticationError
    assert type(refuse_submit(400, {"code": "CREDIT_CONSUMPTION_FAILED"})) is ServerError
    assert type(refuse_look(408, {"code": "TASK_NOT_FOUND"})) is TaskNotFoundError
    assert type(refuse_look(302, {"code": "TASK_NOT_FOUND"})) is TaskNotFoundError


def test_an_errors_body_in_a_200_is_an_error() -> None:
    """A look whose answer has no status but a documented code has nothing to wait for."""
    error = refuse_look(200, {"error": "gone", "code": "TASK_NOT_FOUND"})
    assert kind(error) is TaskNotFoundError
    state = parse_task(Answer(200, {}, b'{"status":"processing","code":"TASK_NOT_FOUND"}'), ID)
    assert not state.is_terminal


@pytest.mark.parametrize(
    ("left", "expected"), [(5, 5), ("5", 5), (5.0, 5), (0, 0), (None, None), (True, None), (-1, None)]
)
def test_the_credits_left_are_told(left: object, expected: int | None) -> None:
    """Source: "Error Codes", INSUFFICIENT_CREDITS (includes credits_remaining)."""
    error = refuse_submit(402, {"error": "x", "code": "INSUFFICIENT_CREDITS", "credits_remaining": left})
    assert error.credits_remaining == expected
    assert (f"{expected} credits are left. Nothing was spent." in str(error)) is (expected is not None)


def test_the_pause_asked_for_is_told() -> None:
    """Whoever answers with it: a 429, or a 503 of something on the way."""
    error = refuse_submit(429, {"error": "x", "code": "MODERATION_RATE_LIMITED"}, {"retry-after": "7"})
    assert error.retry_after == 7.0
    assert "The service asks to wait 7 s. Nothing was spent." in str(error)
    assert refuse_submit(429, b"<html>").retry_after is None
    assert refuse_look(503, b"<html>", {"retry-after": "30"}).retry_after == 30.0


def test_what_the_service_says_is_quoted_short_and_on_one_line() -> None:
    """The attributes keep it whole."""
    sentence, code = "line one\r\nline two \x1b" + "x" * 10_000, "C" * 10_000
    error = refuse_submit(400, {"error": sentence, "code": code})
    assert (error.message, error.code) == (sentence, code)
    assert len(str(error)) < 800
    assert "\n" not in str(error)
    assert "line one line two" in str(error)
    assert quoted(" \n", None) == "no readable message"


def check_unknown(error: SubmissionUnknownError, request: GenerateRequest | EditRequest) -> None:
    cost = 2 * len(request.prompts)
    assert f"may have been accepted and {cost} credits charged" in str(error)
    assert "Compare the credits in your account before you submit it again." in str(error)
    assert error.expected_credits == cost
    assert error.credits is Credits.UNKNOWN


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_unknown_submit_says_what_it_may_have_cost(request_: GenerateRequest | EditRequest) -> None:
    """What happened, what it may have cost, and that nobody will send it again without being told to."""
    for answer in (Answer(200, {}, b"<html>"), Answer(302), Answer(503, {}, b"<html>")):
        with pytest.raises(SubmissionUnknownError, match=f"HTTP {answer.status_code}") as caught:
            parse_submission(answer, request_)
        check_unknown(caught.value, request_)
    with pytest.raises(SubmissionUnknownError, match="sent, but the connection broke") as caught:
        unanswered_submission("the connection broke", None, request_)
    check_unknown(caught.value, request_)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", 0.0),
        ("7", 7.0),
        (" 7 ", 7.0),
        ("1.5", 1.5),
        ("1000000000", 1e9),
        ("9" * 400, 1e9),
        ("-1", None),
        ("1e9", None),
        ("NaN", None),
        ("inf", None),
        ("abc", None),
        ("", None),
        ("٣", None),
        ("Wed, 21 Oct 2026 07:28:30 GMT", 30.0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", None),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 1e9),
        ("Wed, 21 Oct 2026 07:28:30 -0000", None),
        ("Wed, 99 Oct 2026 07:28:30 GMT", None),
    ],
)
def test_retry_after(value: str, expected: float | None) -> None:
    """M87: seconds, or a date against the answer's own clock; anything else is as if it were absent."""
    headers = {"retry-after": value, "date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    assert parse_retry_after(headers) == expected


def test_a_retry_after_date_without_a_clock_to_hold_it_against() -> None:
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT"}) is None
    assert parse_retry_after({"retry-after": "Wed, 21 Oct 2026 07:28:30 GMT", "date": "x"}) is None
    assert parse_retry_after({}) is None
