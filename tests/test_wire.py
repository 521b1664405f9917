"""The wire format: the bytes of requests, and what is read from the documented, odd and broken answers."""

from __future__ import annotations

import base64
import io
import json
import logging
from typing import Any

import pytest
from python_multipart.multipart import Field, File, parse_form

from conceptviz import (
    ConceptVizError,
    Credits,
    EditRequest,
    GenerateRequest,
    GenerationFailedError,
    Image,
    InvalidRequestError,
    ServerError,
    SubmissionUnknownError,
    Unchecked,
    UnexpectedResponseError,
)
from conceptviz._calls import ApiCall, ImageFile, build_edit, build_generate, build_look, check_task_id
from conceptviz._images import GIF, JPEG, PNG
from conceptviz._spec import ERROR_CODES
from conceptviz._wire import Answer, build_result, failed_state, parse_submission, parse_task, unanswered_submission

# The literal answers of the API page.
SUBMITTED = b"""{
"taskId": "vaW29_MJ1wbnyFU4bl_pd",
"status": "pending",
"model": "cv-2",
"quality": "2k",
"aspect_ratio": "16:9",
"credits_used": 2,
"credits_remaining": 79,
"poll_url": "/api/v1/task/vaW29_MJ1wbnyFU4bl_pd"
}"""
COMPLETED = b"""{
"status": "completed",
"images": [
{
"url": "https://r2.conceptviz.app/images/abc123.png",
"prompt": "water cycle diagram"
}
]
}"""
FAILED = b"""{
"status": "failed",
"error": "Image generation failed. Please try again later.",
"code": "GENERATION_FAILED",
"credits_refunded": true
}"""
PROCESSING = b"""{
"status": "processing"
}"""

ID = "vaW29_MJ1wbnyFU4bl_pd"
REQUEST = GenerateRequest("water cycle diagram")
SETTINGS: dict[str, Any] = {"model": "cv-1", "quality": "4k", "aspect_ratio": "a4-portrait"}


def body_of(call: ApiCall) -> bytes:
    return b"".join(call.body)


def submission_of(body: bytes | Any, status: int = 200) -> Any:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_submission(Answer(status, {}, body), REQUEST)


def task_of(body: bytes | Any, status: int = 200, prompts: tuple[str, ...] = ()) -> Any:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse_task(Answer(status, {}, body), ID, prompts)


def parse_multipart(call: ApiCall) -> tuple[list[tuple[str, str]], list[tuple[str, str, str, bytes]]]:
    """The fields and the files of a multipart body, as a server's parser reads them."""
    fields: list[tuple[str, str]] = []
    files: list[tuple[str, str, str, bytes]] = []

    def on_field(field: Field) -> None:
        fields.append(((field.field_name or b"").decode(), (field.value or b"").decode()))

    def on_file(file: File) -> None:
        file.file_object.seek(0)
        name, filename = (file.field_name or b"").decode(), (file.file_name or b"").decode()
        files.append((name, filename, str(file.content_type), file.file_object.read()))

    assert call.content_type is not None
    headers = {"Content-Type": call.content_type.encode(), "Content-Length": str(call.content_length).encode()}
    parse_form(headers, io.BytesIO(body_of(call)), on_field, on_file)
    return fields, files


def test_one_prompt_is_prompt() -> None:
    """Settings that were not given are not on the wire."""
    call = build_generate(GenerateRequest("water cycle diagram"))
    assert (call.method, call.path, call.content_type) == ("POST", "/generate", "application/json")
    assert body_of(call) == b'{"prompt":"water cycle diagram"}'
    assert call.content_length == len(body_of(call))


def test_several_prompts_are_prompts() -> None:
    """`prompt` and `prompts` never go together."""
    assert body_of(build_generate(GenerateRequest(["a", "b"]))) == b'{"prompts":["a","b"]}'
    assert body_of(build_generate(GenerateRequest(["a"]))) == b'{"prompt":"a"}'


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"model": "cv-1"}, {"model": "cv-1"}),
        ({"quality": "2k"}, {"quality": "2k"}),
        ({"aspect_ratio": "9:16"}, {"aspectRatio": "9:16"}),
        (SETTINGS, {"model": "cv-1", "quality": "4k", "aspectRatio": "a4-portrait"}),
        ({"quality": Unchecked("8k")}, {"quality": "8k"}),
    ],
)
def test_given_settings_are_on_the_wire(settings: dict[str, Any], expected: dict[str, str]) -> None:
    """Only those, and under the documented keys."""
    body = json.loads(body_of(build_generate(GenerateRequest("x", **settings))))
    assert body == {"prompt": "x"} | expected
    edit = EditRequest("x", ["https://example.com/a.png"], **settings)
    body = json.loads(body_of(build_edit(edit, ["https://example.com/a.png"], boundary="b")))
    assert body == {"prompt": "x", "images": ["https://example.com/a.png"]} | expected
    fields, _ = parse_multipart(build_edit(edit, [ImageFile(b"1", PNG)], boundary="b"))
    assert dict(fields) == {"prompt": "x"} | expected


@pytest.mark.parametrize(
    "prompt", ['"quoted" \\ back', "line\r\nbreak", "nul\0", "Zellatmung äöü 細胞 🙂", "\u202eright"]
)
def test_prompts_arrive_as_they_are(prompt: str) -> None:
    """Whatever a prompt holds comes out of a parser unchanged, in JSON and in multipart."""
    assert json.loads(body_of(build_generate(GenerateRequest(prompt)))) == {"prompt": prompt}
    request = EditRequest(prompt, b"")
    fields, _ = parse_multipart(build_edit(request, [ImageFile(b"1", PNG)], boundary="0f" * 16))
    assert fields == [("prompt", prompt)]
    assert json.loads(body_of(build_edit(request, ["data:,"], boundary="b")))["prompt"] == prompt


def test_files_alone_go_as_multipart() -> None:
    """The `image` field is repeated; names and types are ours, and the bytes are untouched."""
    contents = [b"\x89PNG\r\n--0f0f\r\n\x00", bytes(range(256)), b"GIF"]
    images = [ImageFile(contents[0], PNG), ImageFile(contents[1], JPEG), ImageFile(contents[2], GIF)]
    call = build_edit(EditRequest("combine", images), images, boundary="0f" * 16)  # type: ignore[arg-type]  # unread
    assert (call.method, call.path) == ("POST", "/edit")
    assert call.content_type == f"multipart/form-data; boundary={'0f' * 16}"
    # The parser is content without the closing dashes; others are not.
    assert body_of(call).endswith(b"\r\n--" + b"0f" * 16 + b"--\r\n")
    fields, files = parse_multipart(call)
    assert fields == [("prompt", "combine")]
    assert files == [
        ("image", "image-1.png", "image/png", contents[0]),
        ("image", "image-2.jpg", "image/jpeg", contents[1]),
        ("image", "image-3.gif", "image/gif", contents[2]),
    ]


def test_large_images_are_not_copied() -> None:
    """The body holds the very bytes that were read, not a second copy of them."""
    content = b"x" * 1000
    assert any(
        piece is content for piece in build_edit(EditRequest("p", b""), [ImageFile(content, PNG)], boundary="b").body
    )


def test_a_mix_goes_as_json() -> None:
    """Files become data URLs, in the order in which the images were given."""
    url, data_url = 'https://example.com/a.png?q="x"&ü', "data:image/png;base64,AAAA"
    content = bytes(range(256))
    call = build_edit(EditRequest("mix", [url]), [url, ImageFile(content, JPEG), data_url], boundary="b")
    assert (call.method, call.path, call.content_type) == ("POST", "/edit", "application/json")
    as_url = "data:image/jpeg;base64," + base64.b64encode(content).decode()
    assert json.loads(body_of(call)) == {"prompt": "mix", "images": [url, as_url, data_url]}
    assert call.content_length == len(body_of(call))


def test_what_is_base64_already_is_not_encoded_again() -> None:
    """A file that was encoded when it was read goes into the body as it is, without a copy."""
    encoded = base64.b64encode(bytes(range(256)))
    images: list[ImageFile | str] = ["https://example.com/a.png", ImageFile(encoded, PNG, is_base64=True)]
    call = build_edit(EditRequest("mix", b""), images, boundary="b")
    assert json.loads(body_of(call))["images"][1] == "data:image/png;base64," + encoded.decode()
    assert any(piece is encoded for piece in call.body)


def test_reprs_hold_no_bodies() -> None:
    """Bodies are large, and hold what users wrote."""
    assert "secret" not in repr(ApiCall("POST", "/x", None, (b"secret",)))
    assert "secret" not in repr(Answer(200, {}, b"secret"))
    assert "secret" not in repr(ImageFile(b"secret", PNG))


@pytest.mark.parametrize(
    ("task_id", "path"),
    [
        (ID, f"/task/{ID}"),
        ("-_", "/task/-_"),
        ("../account", "/task/..%2Faccount"),
        ("?a=1#f", "/task/%3Fa%3D1%23f"),
        ("%2e%2e", "/task/%252e%252e"),
        ("a b\n", "/task/a%20b%0A"),
        ("//evil.example", "/task/%2F%2Fevil.example"),
        ("ü\ud800", "/task/%C3%BC%3F"),
    ],
)
def test_a_task_id_stays_in_its_place(task_id: str, path: str) -> None:
    """M40: an id can end neither the path nor the host."""
    call = build_look(task_id)
    assert (call.method, call.path, call.body, call.content_type) == ("GET", path, (), None)


@pytest.mark.parametrize("task_id", ["", ".", ".."])
def test_an_id_that_quoting_cannot_tame_is_refused(task_id: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"is not a task id\. Nothing was sent"):
        build_look(task_id)


@pytest.mark.parametrize("task_id", [ID, "-a", "a_", "a" * 128])
def test_a_callers_task_id_is_accepted(task_id: str) -> None:
    assert check_task_id(task_id) == task_id


@pytest.mark.parametrize(
    "task_id", ["../x", "%2e%2e", "?a", "#f", "a b", "a\n", "", ".", "x" * 10_000, None, 7, b"abc", "ü", "a" * 129]
)
def test_a_callers_malformed_task_id_is_refused(task_id: object) -> None:
    """M40: before any I/O, with a message of bounded length."""
    with pytest.raises(InvalidRequestError, match="is not a task id") as caught:
        check_task_id(task_id)
    assert len(str(caught.value)) < 300
    assert caught.value.credits is Credits.NOT_SPENT


def test_the_documented_receipt() -> None:
    """Source: "Response" of "Step 1: Submit Generation Request" and of "Edit Images"."""
    for request in (GenerateRequest(["a", "b"]), EditRequest("a", b"")):
        receipt = parse_submission(Answer(200, {}, SUBMITTED), request)
        assert receipt.task_id == ID
        assert (receipt.status, receipt.model, receipt.quality) == ("pending", "cv-2", "2k")
        assert (receipt.aspect_ratio, receipt.credits_used, receipt.credits_remaining) == ("16:9", 2, 79)
        assert receipt.prompts == request.prompts
        assert receipt.raw == json.loads(SUBMITTED)


def test_the_documented_receipt_raises_no_alarm(caplog: pytest.LogCaptureFixture) -> None:
    submission_of(SUBMITTED)
    assert not caplog.records


def test_the_documented_completed_task() -> None:
    """Source: "Response (completed)"."""
    state = task_of(COMPLETED, prompts=("water cycle diagram",))
    assert (state.status, state.is_terminal, state.task_id) == ("completed", True, ID)
    assert state.images == (Image("https://r2.conceptviz.app/images/abc123.png", "water cycle diagram", 0, task_id=ID),)
    assert state.raw == json.loads(COMPLETED)
    result = build_result(state, submission_of(SUBMITTED))
    assert result.image.index == 0
    assert result.submission == submission_of(SUBMITTED)
    assert result.missing_prompts == ()


def test_the_documented_failed_task() -> None:
    """Source: "Response (failed)"."""
    state = task_of(FAILED)
    assert (state.status, state.is_terminal, state.images) == ("failed", True, ())
    assert state.error == "Image generation failed. Please try again later."
    assert (state.code, state.credits_refunded) == ("GENERATION_FAILED", True)
    with pytest.raises(GenerationFailedError) as caught:
        build_result(state, None)
    error = caught.value
    assert (error.task_id, error.code, error.credits_refunded) == (ID, "GENERATION_FAILED", True)
    assert (error.message, error.credits) == (state.error, Credits.REFUNDED)


def test_the_documented_running_task() -> None:
    """Source: "Response (pending/processing)"."""
    state = task_of(PROCESSING)
    assert (state.status, state.is_terminal, state.images, state.error) == ("processing", False, (), None)


def test_the_extra_fields_of_the_field_are_used() -> None:
    """An `imageHash` is the SHA-256 of the bytes; what is not one is left alone."""
    digest = "AB" * 32
    state = task_of(
        {
            "status": "completed",
            "images": [
                {"url": "https://h/0-ab.jpg", "prompt": "p", "imageHash": digest, "storageKey": "images/x"},
                {"url": "https://h/1-ab.jpg", "prompt": "p", "imageHash": "not a hash"},
                {"url": "https://h/2-ab.jpg", "prompt": "p", "imageHash": 5},
            ],
        }
    )
    assert [image.sha256 for image in state.images] == [digest.lower(), None, None]
    assert state.images[0].raw["storageKey"] == "images/x"


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_with_an_id_is_a_success(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """M34: 202 without a poll_url is one too."""
    assert submission_of({"taskId": ID}, status).task_id == ID
    assert not caplog.records


@pytest.mark.parametrize("status", [302, 400, 403, 429, 500, 502, 503])
def test_an_id_in_an_answer_of_any_status_is_a_receipt(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """M34: the task exists and is paid for, and to say so takes a warning."""
    receipt = submission_of({"error": "late", "taskId": ID}, status)
    assert (receipt.task_id, receipt.status, receipt.credits_used) == (ID, "pending", None)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert ID in caplog.text


def test_a_refusal_with_its_own_id_is_a_receipt_all_the_same() -> None:
    body = {"error": "x", "code": "GENERATION_FAILED", "taskId": ID}
    assert submission_of(body, 500).task_id == ID


def test_the_id_of_another_task_inside_a_refusal_is_not_ours() -> None:
    """A refusal that was read whole refuses, whatever tasks it speaks of."""
    body = {"error": "busy", "code": "PLAN_LIMIT_EXCEEDED", "running": [{"taskId": "someone_elses"}]}
    with pytest.raises(ConceptVizError) as caught:
        submission_of(body, 403)
    assert caught.value.credits is Credits.NOT_SPENT
    assert getattr(caught.value, "code", None) == "PLAN_LIMIT_EXCEEDED"


@pytest.mark.parametrize(
    "changes",
    [
        {"surprise": {"nested": [1, 2]}},
        {"poll_url": "//evil.example/"},
        {"poll_url": None},
        {"status": "queued"},
    ],
)
def test_unknown_fields_and_strange_ones_do_no_harm(changes: dict[str, Any]) -> None:
    """M32, M38."""
    receipt = submission_of(json.loads(SUBMITTED) | changes)
    assert receipt.task_id == ID
    assert receipt.credits_used == 2


def test_both_spellings_of_the_id_are_read() -> None:
    """M32: keys are camelCase here and snake_case there."""
    assert submission_of({"task_id": ID}).task_id == ID
    assert submission_of({"taskId": None, "task_id": ID}).task_id == ID
    assert submission_of({"taskId": 7, "task_id": ID}).task_id == ID
    assert submission_of({"taskId": ID, "task_id": "other"}).task_id == ID


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (2, 2),
        (2.0, 2),
        ("2", 2),
        (0, 0),
        (True, None),
        (-1, None),
        (2.5, None),
        (None, None),
        ("two", None),
        ([], None),
    ],
)
def test_credits_are_read_leniently(value: object, expected: int | None) -> None:
    """M33: a price of a strange type loses no receipt."""
    receipt = submission_of({"taskId": ID, "credits_used": value, "credits_remaining": value})
    assert (receipt.credits_used, receipt.credits_remaining) == (expected, expected)
    assert submission_of({"taskId": ID}).credits_used is None
    assert submission_of({"taskId": ID, "credits_used": 10**400}).credits_used is None


@pytest.mark.parametrize(
    "body", [b"<html>ok</html>", b"", b"null", b"[]", b'"x"', b"{}", b"7", b'{"status":"pending"}']
)
@pytest.mark.parametrize("status", [200, 201, 204])
def test_a_success_without_an_id_is_unknown(body: bytes, status: int) -> None:
    """M28: it may have been charged; the body is kept for the support desk."""
    with pytest.raises(SubmissionUnknownError) as caught:
        submission_of(body, status)
    error = caught.value
    assert (error.credits, error.status_code, error.body) == (Credits.UNKNOWN, status, body)
    assert (error.task_id, error.expected_credits) == (None, 2)


@pytest.mark.parametrize("code", sorted(ERROR_CODES))
@pytest.mark.parametrize("status", [200, 302])
def test_a_success_with_a_code_but_no_id_is_unknown_too(code: str, status: int) -> None:
    """Only an error status refuses; anything else would make a lie of "nothing was spent"."""
    with pytest.raises(SubmissionUnknownError, match=code):
        submission_of({"error": "x", "code": code}, status)


@pytest.mark.parametrize("task_id", [None, 7, "", [], {}, True, "x" * 2**19, "x" * 513, ".", ".."])
def test_what_is_no_id_is_no_receipt(task_id: object) -> None:
    """M29."""
    with pytest.raises(SubmissionUnknownError):
        submission_of({"taskId": task_id})


@pytest.mark.parametrize("task_id", ["../x", "a b", "x" * 512, "ü", "..."])
def test_an_odd_id_is_kept_verbatim(task_id: str) -> None:
    """M29, T6: it is the id of a paid task; the path quotes it."""
    assert submission_of({"taskId": task_id}).task_id == task_id
    assert "/" not in build_look(task_id).path.removeprefix("/task/")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"data":{"taskId":"abc"}}', "abc"),
        (b'{"taskId":"abc","taskId":"abc"}', "abc"),
        (b'{"taskId":"abc","credits_used":NaN}', "abc"),
        (b'{"taskId":"abc","credits_used":1e400}', "abc"),
        (b'{"taskId":"abc","credits_used":' + b"1" * 5000 + b"}", "abc"),
        (b'{"taskId":"abc","x":"\\ud800"}', "abc"),
        (b'{"taskId":"abc","x":"\xff"}', "abc"),
        (b'{"taskId":"abc","x":' + b"[" * 100_000, "abc"),
        (b'{"taskId":"abc","x":' + b"[" * 100 + b"]" * 100 + b"}", "abc"),
        (b'\xef\xbb\xbf{"taskId":"abc"}', "abc"),
        ('{"taskId":"abc"}'.encode("utf-16"), "abc"),
        ('{"taskId":"abc"}'.encode("utf-32-be"), "abc"),
        (b'{"task_id" : "abc"} trailing', "abc"),
        (b"HTTP/1.1 weird\n" + SUBMITTED, ID),
    ],
)
def test_an_id_is_saved_from_a_broken_body(body: bytes, expected: str) -> None:
    """M30: an id is worth more than the good form of what surrounds it."""
    assert submission_of(body).task_id == expected
    assert unanswered_submission("it broke", Answer(200, {}, body), REQUEST).task_id == expected


def test_a_salvaged_id_is_said(caplog: pytest.LogCaptureFixture) -> None:
    submission_of(b'{"data":{"taskId":"abc"}}')
    assert "task abc" in caplog.text


@pytest.mark.parametrize("status", [200, 402, 500])
def test_a_body_cut_anywhere_gives_the_id_or_an_unknown(status: int) -> None:
    """M26: cut at each offset of the submit JSON, the id is read as soon as its closing quote is there."""
    closed = SUBMITTED.index(ID.encode()) + len(ID) + 1
    for end in range(len(SUBMITTED)):
        partial = Answer(status, {}, SUBMITTED[:end])
        if end >= closed:
            assert unanswered_submission("the connection broke", partial, REQUEST).task_id == ID
        else:
            with pytest.raises(SubmissionUnknownError) as caught:
                unanswered_submission("the connection broke", partial, REQUEST)
            assert caught.value.body == SUBMITTED[:end]
            assert caught.value.status_code == status


def test_an_answer_that_never_came_is_unknown() -> None:
    request = GenerateRequest("x", model="cv-9")
    with pytest.raises(
        SubmissionUnknownError, match="sent, but the line went dead before an answer was read"
    ) as caught:
        unanswered_submission("the line went dead", None, request)
    error = caught.value
    assert (error.status_code, error.body, error.expected_credits) == (None, b"", None)
    assert "its credits charged" in str(error)


def test_a_whole_but_unfinished_answer_with_an_odd_id_counts() -> None:
    """The connection may break after the last brace."""
    assert unanswered_submission("it broke", Answer(200, {}, b'{"taskId":"a b"}'), REQUEST).task_id == "a b"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308, 408, 409, 425, 500, 502, 503, 504, 520, 599, 999])
def test_a_gateways_answer_leaves_a_submit_unknown(status: int) -> None:
    """M36 and the last row of the table in reliability 3.1: something behind the gateway may have acted."""
    for body in (b"<html>", b'{"error":"x","code":"SOMETHING_NEW"}'):
        with pytest.raises(SubmissionUnknownError, match=f"HTTP {status}"):
            submission_of(body, status)


def test_a_long_body_of_an_unknown_submit_is_cut() -> None:
    with pytest.raises(SubmissionUnknownError) as caught:
        submission_of(b"x" * 10_000)
    assert len(caught.value.body) == 4096


@pytest.mark.parametrize(
    ("refunded", "credits", "sentence"),
    [
        (None, Credits.REFUNDED, "The API page says that the credits are refunded."),
        (True, Credits.REFUNDED, "The service says that the credits were refunded."),
        (False, Credits.SPENT, "The service says that the credits were not refunded."),
        ("yes", Credits.REFUNDED, "The API page says that the credits are refunded."),
    ],
)
def test_generation_failed_on_a_submit(refunded: object, credits: Credits, sentence: str) -> None:
    """Documented as refunded, unless the service itself says otherwise."""
    with pytest.raises(GenerationFailedError) as caught:
        submission_of({"error": "Sorry", "code": "GENERATION_FAILED", "credits_refunded": refunded}, 500)
    error = caught.value
    assert (error.task_id, error.code, error.message) == (None, "GENERATION_FAILED", "Sorry")
    assert error.credits is credits
    assert error.credits_refunded is (refunded if isinstance(refunded, bool) else None)
    assert sentence in str(error)


@pytest.mark.parametrize("word", ["COMPLETED", "Completed", "completed"])
def test_a_terminal_status_is_recognised_however_cased(word: str) -> None:
    """M44."""
    assert task_of({"status": word}).status == "completed"
    assert task_of({"status": word}).is_terminal


@pytest.mark.parametrize("body", [{"status": "queued"}, {"status": ""}, {"status": None}, {"status": 5}, {"x": 1}])
def test_every_other_status_is_still_running(body: dict[str, Any]) -> None:
    """M44."""
    state = task_of(body)
    assert not state.is_terminal
    assert state.status == ("queued" if body.get("status") == "queued" else "")


@pytest.mark.parametrize("images", [None, [], "x", {}, [None, 7, "u"], [{"prompt": "p"}], [{"url": ""}], [{"url": 5}]])
def test_images_that_are_none_are_none(images: object) -> None:
    """M46: no image is made up."""
    state = task_of({"status": "completed", "images": images})
    assert state.images == ()
    assert state.is_terminal


@pytest.mark.parametrize("body", [b"<html>", b"", b"null", b"[]", b"{}", b'{"status":"failed","status":"failed"}'])
def test_an_unreadable_look_is_no_failure(body: bytes) -> None:
    """A hiccup says nothing of the task."""
    with pytest.raises(UnexpectedResponseError) as caught:
        task_of(body)
    error = caught.value
    assert (error.task_id, error.status_code, error.body, error.credits) == (ID, 200, body, Credits.SPENT)
    assert "look again later" in str(error)


@pytest.mark.parametrize(
    ("refunded", "credits"), [(True, Credits.REFUNDED), (False, Credits.SPENT), (None, Credits.UNKNOWN)]
)
def test_a_refund_is_reported_as_said(refunded: bool | None, credits: Credits) -> None:
    """M90: three states, nothing inferred; on both roads by which a failure comes."""
    body = {"error": "Sorry", "code": "GENERATION_FAILED"}
    if refunded is not None:
        body["credits_refunded"] = refunded  # type: ignore[assignment]  # a bool among the texts
    state = task_of({"status": "failed"} | body)
    with pytest.raises(ServerError) as look:
        task_of(body, 500)
    for end in (state, failed_state(look.value, ID)):
        assert (end.status, end.task_id, end.code, end.error) == ("failed", ID, "GENERATION_FAILED", "Sorry")
        with pytest.raises(GenerationFailedError) as caught:
            build_result(end, None)
        assert (caught.value.credits_refunded, caught.value.credits) == (refunded, credits)
    assert failed_state(look.value, ID).raw == body


def test_a_failure_without_words_is_one_too() -> None:
    """`credits_refunded` of another type than bool says nothing."""
    state = task_of({"status": "failed", "error": {"message": "x"}, "code": 5, "credits_refunded": "true"})
    assert (state.error, state.code, state.credits_refunded) == (None, None, None)
    with pytest.raises(GenerationFailedError, match="no readable message") as caught:
        build_result(state, None)
    assert caught.value.credits is Credits.UNKNOWN
    assert failed_state(ServerError("x", status_code=500), ID).raw == {}


def test_a_short_answer_names_the_missing_prompts() -> None:
    request = GenerateRequest(["a", "b", "c"])
    receipt = parse_submission(Answer(200, {}, SUBMITTED), request)
    images = [{"url": "https://h/x.png", "prompt": "c"}, {"url": "https://h/y.png", "prompt": "a"}]
    result = build_result(task_of({"status": "completed", "images": images}, prompts=request.prompts), receipt)
    assert [(image.index, image.prompt) for image in result.images] == [(0, "a"), (2, "c")]
    assert result.missing_prompts == ("b",)
