"""The simulated service as a pure function: no loop, no socket, no clock but the one passed in."""

import hashlib
import io
import json
import re
import subprocess
import sys
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conceptviz.simulator import render_tiny
from conceptviz.simulator._body import Body, BodyReader, Upload
from conceptviz.simulator._page import ERRORS, PRICES
from conceptviz.simulator._pictures import Format
from conceptviz.simulator._world import Account, Reply, Request, World

LONGEST = 90.0


class Desk:
    """One customer at the counter of a world."""

    def __init__(self, *, credits: int = 100, plan: str = "pro", seed: int = 7, **world: Any) -> None:
        self.world = World(rng=Random(seed), **{"speed": 1.0, **world})
        self.account = self.world.open_account(credits, plan)
        self.now = 1000.0

    def ask(self, method: str, path: str, body: Body | None = None, *, account: Account | None = None) -> Reply:
        path, _, query = path.partition("?")
        key = f"Bearer {(account or self.account).api_key}"
        authorization = None if path.startswith("/images/") else key
        request = Request(method, path, query, authorization, body, image_origin="https://images.test")
        while not isinstance(outcome := self.world.answer(request, self.now), Reply):
            for picture in outcome:
                picture.draw(render_tiny)
        return outcome

    def submit(self, *images: Upload | str | None, **fields: Any) -> Reply:
        path = "/api/v1/edit" if images else "/api/v1/generate"
        return self.ask("POST", path, Body(fields, images))

    def start(self, prompt: str, **fields: Any) -> str:
        return str(content(self.submit(prompt=prompt, **fields))["taskId"])

    def poll(self, task_id: str, **kwargs: Any) -> Any:
        return content(self.ask("GET", f"/api/v1/task/{task_id}", **kwargs))

    def finish(self, task_id: str) -> Any:
        self.now += LONGEST
        return self.poll(task_id)


def content(reply: Reply) -> Any:
    return json.loads(reply.body)


def test_submit_answers_like_the_page() -> None:
    """Heading: Submit Generation Request; the same keys, in the same order, and the same values."""
    reply = Desk(credits=81).submit(prompt="water cycle diagram")
    answer = content(reply)
    task_id = answer["taskId"]
    assert reply.status == 200
    assert list(answer.items()) == [
        ("taskId", task_id),
        ("status", "pending"),
        ("model", "cv-2"),
        ("quality", "2k"),
        ("aspect_ratio", "16:9"),
        ("credits_used", 2),
        ("credits_remaining", 79),
        ("poll_url", f"/api/v1/task/{task_id}"),
    ]


def test_edit_answers_like_the_page() -> None:
    """Heading: Edit Images, Response: the same as for generate."""
    reply = Desk(credits=81).submit("https://example.com/marked-up-diagram.png", prompt="Replace", model="cv-2")
    assert list(content(reply)) == list(content(Desk().submit(prompt="x")))
    assert content(reply)["credits_remaining"] == 79


def test_completed_answers_like_the_page() -> None:
    """Heading: Response (completed)."""
    desk = Desk(observed_fields=False)
    answer = desk.finish(desk.start("water cycle diagram"))
    assert list(answer) == ["status", "images"]
    assert answer["status"] == "completed"
    (image,) = answer["images"]
    assert list(image) == ["url", "prompt"]
    assert image["prompt"] == "water cycle diagram"
    assert image["url"].startswith("https://images.test/images/")


def test_failed_answers_like_the_page() -> None:
    """Heading: Response (failed), to the letter."""
    desk = Desk()
    assert list(desk.finish(desk.start("x [sim:failed]")).items()) == [
        ("status", "failed"),
        ("error", "Image generation failed. Please try again later."),
        ("code", "GENERATION_FAILED"),
        ("credits_refunded", True),
    ]


def test_running_answers_like_the_page() -> None:
    """Heading: Response (pending/processing): first the one, then the other."""
    desk = Desk()
    task_id = desk.start("x")
    assert desk.poll(task_id) == {"status": "pending"}
    desk.now += 29
    assert desk.poll(task_id) == {"status": "processing"}


def test_errors_answer_like_the_page() -> None:
    """Heading: Error Handling."""
    reply = Desk(credits=1).submit(prompt="x")
    assert (reply.status, list(content(reply))) == (402, ["error", "code", "credits_remaining"])
    assert content(reply)["credits_remaining"] == 1
    assert list(content(Desk().submit())) == ["error", "code"]


def test_there_are_the_eighteen_codes_of_the_page() -> None:
    assert len(ERRORS) == 18
    assert {status for status, _ in ERRORS.values()} == {400, 401, 402, 403, 404, 429, 500}


@pytest.mark.parametrize(
    ("fields", "cost", "model", "quality"),
    [
        ({}, 2, "cv-2", "2k"),
        ({"model": "cv-2", "quality": "2k"}, 2, "cv-2", "2k"),
        ({"model": "cv-2", "quality": "4k"}, 2, "cv-2", "2k"),
        ({"model": "cv-1"}, 1, "cv-1", "2k"),
        ({"model": "cv-1", "quality": "2k"}, 1, "cv-1", "2k"),
        ({"model": "cv-1", "quality": "4k"}, 2, "cv-1", "4k"),
        ({"model": None, "quality": None, "aspectRatio": None}, 2, "cv-2", "2k"),
    ],
)
@pytest.mark.parametrize("count", [1, 4])
def test_prices(fields: dict[str, Any], cost: int, model: str, quality: str, count: int) -> None:
    """Heading: Credit Cost; "CV-2 uses 2k automatically", whatever quality was asked for."""
    desk = Desk()
    answer = content(desk.submit(prompts=["x"] * count, **fields))
    assert (answer["credits_used"], answer["credits_remaining"]) == (cost * count, 100 - cost * count)
    assert (answer["model"], answer["quality"]) == (model, quality)
    assert desk.account.ledger.charged == cost * count


def test_an_edit_is_paid_by_its_output_not_by_its_inputs() -> None:
    answer = content(Desk().submit(*["https://example.com/a.png"] * 4, prompt="x"))
    assert answer["credits_used"] == 2


def test_prompts_takes_priority_over_prompt() -> None:
    desk = Desk()
    answer = desk.finish(desk.start("one", prompts=["two", "three"]))
    assert [image["prompt"] for image in answer["images"]] == ["two", "three"]
    assert content(desk.submit(prompt="one", prompts=[]))["code"] == "PROMPT_REQUIRED"
    assert desk.submit(prompt="one", prompts=None).status == 200


@pytest.mark.parametrize("ratio", ["1:1", "4:3", "9:16", "a4-portrait", "21:9"])
def test_any_aspect_ratio_is_taken_and_echoed(ratio: str) -> None:
    assert content(Desk().submit(prompt="x", aspectRatio=ratio))["aspect_ratio"] == ratio


def test_durations_are_those_of_the_page_and_scale_with_speed() -> None:
    """Heading: Limits, "30-90 seconds typical"; ten times as fast at speed 10, ten times as slow on demand."""
    for speed, prompt, low, high in [(1, "x", 30, 90), (10, "x", 3, 9), (1, "x [sim:slow]", 300, 900)]:
        desk = Desk(speed=speed, credits=400)
        starts = {desk.start(prompt): desk.now for _ in range(40)}
        ends: dict[str, float] = {}
        for step in range(1, 101):
            desk.now = 1000.0 + high * step / 100
            for task_id in starts.keys() - ends.keys():
                if desk.poll(task_id)["status"] == "completed":
                    ends[task_id] = desk.now - starts[task_id]
        assert len(ends) == 40
        assert low <= min(ends.values()) < max(ends.values()) <= high
        assert max(ends.values()) - min(ends.values()) > (high - low) / 2


def test_the_same_seed_gives_the_same_service() -> None:
    first, second, other = Desk(seed=1), Desk(seed=1), Desk(seed=2)
    assert first.submit(prompt="x").body == second.submit(prompt="x").body != other.submit(prompt="x").body
    assert first.account.api_key == second.account.api_key != other.account.api_key


def test_ids_look_like_those_of_the_service() -> None:
    desk = Desk(credits=1000)
    ids = {desk.start("x") for _ in range(300)}
    assert len(ids) == 300
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{21}", task_id) for task_id in ids)
    assert any(task_id[0] in "-_" for task_id in ids)
    assert re.fullmatch(r"cvk_[A-Za-z0-9]{32}", desk.account.api_key)


def test_images_look_like_those_of_the_service() -> None:
    """Field notes: hash of the bytes, the key is the path, the path names account, task, index and hash."""
    desk = Desk()
    task_id = desk.start("one", prompts=["one", "two"])
    for index, image in enumerate(desk.finish(task_id)["images"]):
        assert list(image) == ["url", "prompt", "imageHash", "storageKey"]
        assert image["url"] == f"https://images.test/{image['storageKey']}"
        reply = desk.ask("GET", f"/{image['storageKey']}")
        assert reply.status == 200
        assert hashlib.sha256(reply.body).hexdigest() == image["imageHash"]
        assert re.fullmatch(
            rf"images/[A-Za-z0-9]{{32}}/{re.escape(task_id)}/{index}-{image['imageHash'][:16]}\.(jpg|png)",
            image["storageKey"],
        )


def test_most_images_are_jpeg_and_some_png() -> None:
    desk = Desk(credits=1000)
    task_ids = [desk.start("x", prompts=["a", "b", "c", "d"]) for _ in range(100)]
    desk.now += LONGEST
    kinds: list[str] = []
    for task_id in task_ids:
        for image in desk.poll(task_id)["images"]:
            reply = desk.ask("GET", f"/{image['storageKey']}")
            with Image.open(io.BytesIO(reply.body)) as picture:
                picture.load()
                kinds.append(str(picture.format))
            assert reply.headers["content-type"] == f"image/{kinds[-1].lower()}"
            assert image["url"].endswith({"JPEG": ".jpg", "PNG": ".png"}[kinds[-1]])
    assert len(kinds) == 400
    assert 5 < kinds.count("PNG") < 80


@pytest.mark.parametrize("picture_format", ["jpeg", "png"])
def test_tiny_pictures_are_valid_and_differ(picture_format: Format) -> None:
    settings: dict[str, Any] = {"model": "cv-2", "quality": "2k", "aspect_ratio": "1:1", "format": picture_format}
    files = [render_tiny(prompt, seed=seed, **settings) for prompt in ("水循环", "b" * 70_000) for seed in (1, 2)]
    assert len(set(files)) == 4
    for data in files:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
            assert picture.format == picture_format.upper()
        assert b"simulated" in data


def test_a_partial_batch_lacks_one_image_and_keeps_the_order() -> None:
    desk = Desk()
    answer = desk.finish(desk.start("a", prompts=["a", "b [sim:partial]", "c"]))
    assert [image["prompt"] for image in answer["images"]] == ["a", "c"]
    assert desk.account.ledger.charged == 6
    assert len(desk.finish(desk.start("alone [sim:partial]"))["images"]) == 1


def test_an_unknown_status_passes_through_and_ends_well() -> None:
    desk = Desk()
    task_id = desk.start("x [sim:unknown-status]")
    seen = []
    for _ in range(95):
        seen.append(desk.poll(task_id)["status"])
        desk.now += 1
    assert list(dict.fromkeys(seen)) == ["pending", "enhancing", "processing", "completed"]


def test_an_expired_url_is_fresh_at_the_next_look() -> None:
    desk = Desk()
    task_id = desk.start("x [sim:expired-url]")
    stale = desk.finish(task_id)["images"][0]["url"].removeprefix("https://images.test")
    fresh = desk.poll(task_id)["images"][0]["url"].removeprefix("https://images.test")
    assert desk.ask("GET", stale).status == 403
    assert desk.ask("GET", fresh).status == 200
    assert desk.ask("GET", stale).status == 403


def test_a_failed_task_is_refunded_at_its_end_even_if_nobody_looks() -> None:
    desk = Desk(credits=8)
    desk.start("x [sim:failed]", prompts=["x [sim:failed]", "y"])
    assert desk.account.ledger.credits == 4
    desk.now += LONGEST
    assert content(desk.submit(prompt="next"))["credits_remaining"] == 6
    assert desk.account.ledger.refunded == 4


@pytest.mark.parametrize("word", ["blocked", "rate-limited", "credit-error"])
def test_a_refused_submit_costs_nothing(word: str) -> None:
    desk = Desk()
    assert desk.submit(prompts=["fine", f"[sim:{word}]"]).status >= 400
    assert desk.account.ledger == Desk().account.ledger


def test_an_error_of_the_server_at_submit_is_charged_and_refunded() -> None:
    """Heading: Error Codes, "Image generation failed (credits auto-refunded)"."""
    desk = Desk()
    reply = desk.submit(prompt="x [sim:server-error]")
    ledger = desk.account.ledger
    assert (reply.status, content(reply)["code"]) == (500, "GENERATION_FAILED")
    assert (ledger.credits, ledger.charged, ledger.refunded, ledger.submissions) == (100, 2, 2, 1)


def test_tasks_and_keys_belong_to_an_account() -> None:
    desk = Desk()
    task_id = desk.start("x")
    other = desk.world.open_account(100, "pro")
    assert desk.poll(task_id, account=other)["code"] == "TASK_NOT_FOUND"
    assert desk.poll(task_id)["status"] == "pending"
    assert other.ledger.charged == 0


def test_an_account_has_at_most_five_keys() -> None:
    """Heading: Limits, "Max API keys per account"."""
    desk = Desk()
    keys = {desk.account.api_key, *(desk.world.add_key(desk.account) for _ in range(4))}
    assert len(keys) == 5
    with pytest.raises(ValueError, match="at most 5"):
        desk.world.add_key(desk.account)


def test_the_moderation_limit_counts_a_minute() -> None:
    desk = Desk(moderation_limit=2, speed=2)
    assert [desk.submit(prompt="x").status for _ in range(3)] == [200, 200, 429]
    desk.now += 29
    assert desk.submit(prompt="x").status == 429
    desk.now += 2
    assert desk.submit(prompt="x").status == 200


def test_the_free_plan_has_no_api_not_even_to_look() -> None:
    desk = Desk()
    task_id = desk.start("x")
    desk.account.plan = "free"
    assert desk.poll(task_id)["code"] == "PLAN_REQUIRED"
    assert content(desk.submit(prompt="x"))["code"] == "PLAN_REQUIRED"


def test_pro_single_allows_one_prompt_at_2k() -> None:
    desk = Desk(plan="pro-single")
    assert content(desk.submit(prompts=["a", "b"]))["code"] == "PLAN_LIMIT_EXCEEDED"
    assert content(desk.submit(prompt="a", model="cv-1", quality="4k"))["code"] == "QUALITY_NOT_ALLOWED"
    assert desk.submit(prompts=["a"], model="cv-1").status == 200


PNG = render_tiny("x", model="cv-2", quality="2k", aspect_ratio="1:1", seed=0, format="png")


@pytest.mark.parametrize(
    "image",
    [
        "https://example.com/a.png",
        "http://127.0.0.1:1/a",
        Upload(PNG, "image/png"),
        Upload(PNG),
        Upload(PNG, "application/octet-stream"),
        Upload(PNG + bytes(20 * 2**20 - len(PNG)), "image/png"),
        Upload(b"RIFF\0\0\0\0WEBP", "image/webp"),
        Upload(b"GIF89a", "image/gif"),
    ],
)
def test_images_that_are_taken(image: Upload | str) -> None:
    assert Desk().submit(image, prompt="x").status == 200


@pytest.mark.parametrize(
    "image",
    [
        None,
        "",
        "sketch.png",
        "ftp://example.com/a.png",
        "https://",
        "http://[",
        Upload(b"", "image/png"),
        Upload(b"<svg/>", "image/svg+xml"),
        Upload(b"text", "image/png"),
        Upload(PNG, "text/plain"),
        Upload(PNG + bytes(20 * 2**20 + 1 - len(PNG)), "image/png"),
    ],
)
def test_images_that_are_not_taken(image: Upload | str | None) -> None:
    """Headings: JSON Request Body (20 MB each), Error Codes ("data, URL, or file type is invalid")."""
    desk = Desk()
    assert content(desk.submit("https://example.com/a.png", image, prompt="x"))["code"] == "INVALID_IMAGE"
    assert desk.account.ledger.charged == 0


@pytest.mark.parametrize(
    "image",
    ["https://example.com/[sim:blocked].png", "https://x.test/%5Bsim:blocked%5D", Upload(PNG + b"[sim:blocked]")],
)
def test_input_images_are_moderated(image: Upload | str) -> None:
    assert content(Desk().submit(image, prompt="x"))["code"] == "INPUT_MODERATION_BLOCKED"


def test_an_edit_is_drawn_from_its_inputs_and_a_url_is_not_fetched() -> None:
    desk = Desk()
    task_id = str(content(desk.submit(Upload(PNG), "https://example.com/a.png", prompt="x"))["taskId"])
    desk.now += LONGEST
    request = Request("GET", f"/api/v1/task/{task_id}", "", f"Bearer {desk.account.api_key}")
    pictures = desk.world.answer(request, desk.now)
    assert isinstance(pictures, tuple)
    assert [picture.inputs for picture in pictures] == [(PNG, b"")]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/generate", 405),
        ("PUT", "/api/v1/edit", 405),
        ("POST", "/api/v1/task/abc", 405),
        ("DELETE", "/images/a/b/c.png", 405),
        ("GET", "/api/v1", 404),
        ("GET", "/api/v1/account", 404),
        ("POST", "/api/v2/generate", 404),
        ("GET", "/images/a/b/c.png", 404),
        ("GET", "/api/v1/task/..%2Fgenerate", 404),
    ],
)
def test_what_is_not_there(method: str, path: str, status: int) -> None:
    reply = Desk().ask(method, path)
    assert reply.status == status
    if not path.startswith("/images/") or status == 405:
        assert set(content(reply)) == {"error", "code"}
    assert ("allow" in reply.headers) == (status == 405)


def test_the_image_host_takes_no_key() -> None:
    desk = Desk()
    image = desk.finish(desk.start("x"))["images"][0]
    request = Request("GET", f"/{image['storageKey']}", "", f"Bearer {desk.account.api_key}")
    reply = desk.world.answer(request, desk.now)
    assert isinstance(reply, Reply)
    assert reply.status == 400


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["x", "[sim:failed]", "[sim:blocked]", "[sim:server-error]", "[sim:partial]", "[sim:slow]"]
            ),
            st.integers(1, 4),
            st.sampled_from(sorted(PRICES)),
            st.floats(0, 1000),
        ),
        max_size=30,
    )
)
def test_the_ledger_always_adds_up(orders: list[tuple[str, int, tuple[str, str], float]]) -> None:
    """Credits are conserved, never negative, and charged and refunded exactly as the answers said."""
    desk = Desk(credits=20)
    ledger = desk.account.ledger
    told: dict[str, int] = {}
    hidden = 0
    for prompt, count, (model, quality), later in orders:
        before = ledger.credits
        reply = desk.submit(prompts=[prompt] * count, model=model, quality=quality)
        answer = content(reply)
        if reply.status == 200:
            told[answer["taskId"]] = answer["credits_used"]
            assert answer["credits_remaining"] == before - answer["credits_used"] == ledger.credits
        elif answer["code"] == "GENERATION_FAILED":
            hidden += PRICES[model, quality] * count
        elif answer["code"] == "INSUFFICIENT_CREDITS":
            assert answer["credits_remaining"] == before < PRICES[model, quality] * count
        desk.now += later
        states = {task_id: desk.poll(task_id) for task_id in told}
        failed = sum(told[task_id] for task_id, state in states.items() if state["status"] == "failed")
        assert ledger.charged == sum(told.values()) + hidden
        assert ledger.refunded == failed + hidden
        assert ledger.credits == 20 - ledger.charged + ledger.refunded >= 0


# A few characters: the tables of all of Unicode take hypothesis a second to build, and no rule here reads them.
TEXT = st.text("ab \n[é", max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT | st.sampled_from(["cv-1", "4k"]),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("prompt", "prompts", "images", "model", "quality", "aspectRatio"), JSON)
)


@given(st.sampled_from(["generate", "edit"]), FIELDS)
def test_any_json_gets_an_answer_of_the_page(route: str, fields: dict[str, Any]) -> None:
    reader = BodyReader("application/json")
    reader.feed(json.dumps(fields).encode())
    body = reader.finish()
    assert body is not None
    reply = Desk().ask("POST", f"/api/v1/{route}", body)
    answer = content(reply)
    if reply.status == 200:
        assert answer["credits_used"] > 0
    else:
        assert ERRORS[answer["code"]] == (reply.status, answer["error"])


@given(
    st.sampled_from(["application/json", "", 'multipart/form-data; boundary="b"', "multipart/form-data"]), st.binary()
)
def test_any_bytes_are_a_body_or_none(content_type: str, data: bytes) -> None:
    reader = BodyReader(content_type)
    reader.feed(data[:3])
    reader.feed(data[3:])
    assert isinstance(reader.finish(), Body | None)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'"x"', b"\xff", b"[" * 100_000], ids=lambda data: repr(data[:5]))
def test_what_is_not_a_json_object_is_no_body(data: bytes) -> None:
    reader = BodyReader("application/json")
    reader.feed(data)
    assert reader.finish() is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("data:image/png;base64,aGk=", Upload(b"hi", "image/png")),
        ("DATA:image/svg+xml;charset=utf-8;base64,aGk=", Upload(b"hi", "image/svg+xml")),
        ("data:image/png,hi", None),
        ("data:text/plain;base64,aGk=", None),
        ("data:image/png;base64,a!Gk=", None),
        ("data:image/png;base64", None),
        ("https://example.com/a.png", "https://example.com/a.png"),
        (5, None),
    ],
)
def test_images_in_json(value: Any, expected: Upload | str | None) -> None:
    reader = BodyReader("application/json")
    reader.feed(json.dumps({"images": [value]}).encode())
    body = reader.finish()
    assert body is not None
    assert body.images == (expected,)


def test_a_form_is_read_in_any_pieces() -> None:
    """The `image` field repeats, other fields are text, and where the pieces end does not matter."""
    form = (
        b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\nw\xc3\xa4ter\r\n'
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="a;\\"b.png"\r\nContent-Type: image/png\r\n\r\n'
        b"\r\n--x\r\n\r\n"
        b'--b\r\nContent-Disposition: form-data; name="image"; filename="c"\r\n\r\n\0\r\n'
        b'--b\r\nContent-Disposition: form-data; name="image"\r\n\r\nhttps://x.test/a\r\n'
        b'--b\r\nContent-Disposition: form-data; name="other"; filename="d"\r\n\r\nnot a field\r\n--b--\r\n'
    )
    expected = Body({"prompt": "wäter"}, (Upload(b"\r\n--x\r\n", "image/png"), Upload(b"\0"), "https://x.test/a"))
    for size in (1, 2, 7, len(form)):
        reader = BodyReader('multipart/form-data; boundary="b"')
        for start in range(0, len(form), size):
            reader.feed(form[start : start + size])
        assert reader.finish() == expected
    cut_short = BodyReader("multipart/form-data; boundary=b")
    cut_short.feed(form[:-10])
    assert cut_short.finish() is None


def test_importing_the_simulator_loads_none_of_its_libraries() -> None:
    program = (
        "import sys, conceptviz.simulator; "
        "print(*{'PIL', 'uvicorn', 'starlette', 'python_multipart'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == ""
