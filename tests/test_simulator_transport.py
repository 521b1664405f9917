"""The simulator in process, through httpx: every error by its documented cause, every fault, both event loops."""

import base64
import hashlib
import json
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import httpx
import pytest
import trio
import trio.testing

from conceptviz.simulator import Fault, Simulator, render_tiny

pytestmark = pytest.mark.anyio

API = "https://conceptviz.app/api/v1"
PNG = render_tiny("x", model="cv-2", quality="2k", aspect_ratio="1:1", seed=0, format="png")
PNG_URL = "data:image/png;base64," + base64.b64encode(PNG).decode()


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def make(**options: Any) -> Simulator:
    return Simulator(**{"render": render_tiny, "seed": 3, **options})


def client(simulator: Simulator, key: str | None = None) -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key or simulator.api_key}"}
    return httpx.AsyncClient(transport=simulator.transport(), base_url=API, headers=headers)


async def submit(simulator: Simulator, prompt: str = "x", **fields: Any) -> httpx.Response:
    async with client(simulator) as http:
        return await http.post("/generate", json={"prompt": prompt, **fields})


async def completed(simulator: Simulator, clock: Clock, prompt: str = "x", **fields: Any) -> Any:
    """The images of a task that has run its time."""
    task_id = (await submit(simulator, prompt, **fields)).json()["taskId"]
    clock.now += 90
    async with client(simulator) as http:
        return (await http.get(f"/task/{task_id}")).json()["images"]


async def test_the_whole_road() -> None:
    """Submit with the key, poll with the key, fetch the image without it."""
    clock = Clock()
    simulator = make(clock=clock)
    images = await completed(simulator, clock, prompts=["one", "two"])
    async with httpx.AsyncClient(transport=simulator.transport()) as http:
        for image in images:
            answer = await http.get(image["url"])
            assert answer.status_code == 200
            assert hashlib.sha256(answer.content).hexdigest() == image["imageHash"]
            assert image["url"].startswith("https://r2.conceptviz.app/images/")
    assert simulator.requests == {"submit": 1, "poll": 1, "image": 2}


Ask = Callable[[Simulator, httpx.AsyncClient], Awaitable[httpx.Response]]


def generate(**fields: Any) -> Ask:
    return lambda _, http: http.post("/generate", json=fields)


def edit(*images: Any, **fields: Any) -> Ask:
    return lambda _, http: http.post("/edit", json={"prompt": "x", "images": list(images), **fields})


def upload(*images: bytes, **fields: str) -> Ask:
    files = [("image", (f"{index}.png", data, "image/png")) for index, data in enumerate(images)]
    # A part that is no file keeps httpx on multipart where there is no image at all.
    return lambda _, http: http.post("/edit", data={"prompt": "x", **fields}, files=files or {"note": (None, "x")})


async def with_a_disabled_key(simulator: Simulator, http: httpx.AsyncClient) -> httpx.Response:
    simulator.disable_key()
    return await http.get("/task/x")


async def with_anothers_task(simulator: Simulator, http: httpx.AsyncClient) -> httpx.Response:
    task_id = (await submit(simulator)).json()["taskId"]
    async with client(simulator, simulator.add_account().api_key) as other:
        return await other.get(f"/task/{task_id}")


async def too_often(simulator: Simulator, http: httpx.AsyncClient) -> httpx.Response:
    for _ in range(2):
        (await http.post("/generate", json={"prompt": "x"})).raise_for_status()
    return await http.post("/generate", json={"prompt": "x"})


@pytest.mark.parametrize(
    ("status", "code", "options", "ask"),
    [
        (400, "INVALID_BODY", {}, lambda _, http: http.post("/generate", content=b'{"prompt": "x"')),
        (400, "INVALID_BODY", {}, lambda _, http: http.post("/edit", content=b"[1]")),
        (400, "IMAGE_REQUIRED", {}, lambda _, http: http.post("/edit", json={"prompt": "x"})),
        (400, "IMAGE_REQUIRED", {}, edit()),
        (400, "IMAGE_REQUIRED", {}, upload()),
        (400, "INVALID_IMAGE", {}, edit("data:image/png;base64,???")),
        (400, "INVALID_IMAGE", {}, edit("not a url")),
        (400, "INVALID_IMAGE", {}, edit(PNG_URL, 5)),
        (400, "INVALID_IMAGE", {}, upload(b"plain text")),
        (400, "INVALID_IMAGE", {}, upload(PNG + bytes(20 * 2**20))),
        (400, "PROMPT_REQUIRED", {}, generate()),
        (400, "PROMPT_REQUIRED", {}, generate(prompt=" \n")),
        (400, "PROMPT_REQUIRED", {}, generate(prompts=[])),
        (400, "PROMPT_REQUIRED", {}, generate(prompts=["x", ""])),
        (400, "PROMPT_REQUIRED", {}, edit(PNG_URL, prompt="")),
        (400, "TOO_MANY_IMAGES", {}, edit(*[PNG_URL] * 5)),
        (400, "TOO_MANY_IMAGES", {}, upload(*[PNG] * 5)),
        (400, "TOO_MANY_PROMPTS", {}, generate(prompts=["x"] * 5)),
        (400, "UNSUPPORTED_MODEL", {}, generate(prompt="x", model="cv-3")),
        (400, "UNSUPPORTED_MODEL", {}, upload(PNG, model="")),
        (401, "UNAUTHORIZED", {}, lambda _, http: http.post("/generate", headers={"Authorization": ""}, json={})),
        (401, "UNAUTHORIZED", {}, lambda _, http: http.get("/task/x", headers={"Authorization": "Bearer"})),
        (401, "UNAUTHORIZED", {}, lambda _, http: http.get("/task/x", headers={"Authorization": "Basic cvk_x"})),
        (401, "INVALID_API_KEY", {}, lambda _, http: http.get("/task/x", headers={"Authorization": "Bearer cvk_x"})),
        (401, "INVALID_API_KEY", {}, with_a_disabled_key),
        (402, "INSUFFICIENT_CREDITS", {"credits": 1}, generate(prompt="x")),
        (402, "INSUFFICIENT_CREDITS", {"credits": 7}, generate(prompts=["x"] * 4)),
        (402, "INSUFFICIENT_CREDITS", {"credits": 0}, upload(PNG)),
        (403, "PLAN_REQUIRED", {"plan": "free"}, generate(prompt="x")),
        (403, "QUALITY_NOT_ALLOWED", {"plan": "pro-single"}, generate(prompt="x", model="cv-1", quality="4k")),
        (403, "QUALITY_NOT_ALLOWED", {}, generate(prompt="x", model="cv-1", quality="8k")),
        (403, "PLAN_LIMIT_EXCEEDED", {"plan": "pro-single"}, generate(prompts=["x", "y"])),
        (404, "TASK_NOT_FOUND", {}, lambda _, http: http.get("/task/vaW29_MJ1wbnyFU4bl_pd")),
        (404, "TASK_NOT_FOUND", {}, with_anothers_task),
        (429, "MODERATION_RATE_LIMITED", {"moderation_limit": 2}, too_often),
        (429, "MODERATION_RATE_LIMITED", {}, generate(prompt="x [sim:rate-limited]")),
        (400, "INPUT_MODERATION_BLOCKED", {}, generate(prompts=["x", "y [sim:blocked]"])),
        (400, "INPUT_MODERATION_BLOCKED", {}, upload(PNG + b"[sim:blocked]")),
        (500, "CREDIT_CONSUMPTION_FAILED", {}, generate(prompt="x [sim:credit-error]")),
        (500, "GENERATION_FAILED", {}, generate(prompt="x [sim:server-error]")),
    ],
)
async def test_each_error_has_its_documented_cause(status: int, code: str, options: dict[str, Any], ask: Ask) -> None:
    """Heading: Error Codes. Whatever is refused has cost nothing, and 402 says what is left."""
    simulator = make(**options)
    before = simulator.ledger.credits
    async with client(simulator) as http:
        answer = await ask(simulator, http)
    content = answer.json()
    assert (answer.status_code, content["code"]) == (status, code)
    assert answer.headers["content-type"] == "application/json"
    assert list(content) == ["error", "code"] + ["credits_remaining"] * (status == 402)
    assert content.get("credits_remaining", before) == before
    if ask not in (with_anothers_task, too_often):
        assert simulator.ledger.credits == before


async def test_uploads_and_data_urls_reach_the_renderer() -> None:
    """Multipart with a repeated `image`, and JSON with data URLs, are two spellings of one edit."""
    seen: list[tuple[str, tuple[bytes, ...]]] = []

    def render(prompt: str, **settings: Any) -> bytes:
        seen.append((prompt, tuple(settings["inputs"])))
        return render_tiny(prompt, **settings)

    clock = Clock()
    simulator = make(clock=clock, render=render)
    async with client(simulator) as http:
        for ask in (upload(PNG, PNG + b"2", prompt="mix"), edit(PNG_URL, "https://example.com/a.png", prompt="mix")):
            task_id = (await ask(simulator, http)).json()["taskId"]
            clock.now += 90
            images = (await http.get(f"/task/{task_id}")).json()["images"]
            assert [image["prompt"] for image in images] == ["mix"]
    assert seen == [("mix", (PNG, PNG + b"2")), ("mix", (PNG, b""))]


async def test_a_large_json_body_is_decoded_outside_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    loads = json.loads

    def spy(data: Any, **options: Any) -> Any:
        threads.append(threading.get_ident())
        return loads(data, **options)

    simulator = make()
    large = "data:image/png;base64," + base64.b64encode(PNG + bytes(2**20)).decode()
    monkeypatch.setattr("conceptviz.simulator._body.json.loads", spy)
    async with client(simulator) as http:
        for image in (PNG_URL, large):
            assert (await edit(image)(simulator, http)).is_success
    assert threads[0] == threading.get_ident() != threads[1]


async def test_pictures_are_drawn_once_and_outside_the_loop() -> None:
    """Two polls at the same moment wait for one drawing; a third finds it done."""
    drawn: list[int] = []

    def render(prompt: str, **settings: Any) -> bytes:
        drawn.append(threading.get_ident())
        time.sleep(0.05)
        return render_tiny(prompt, **settings)

    clock = Clock()
    simulator = make(clock=clock, render=render)
    async with client(simulator) as http:
        task_id = (await submit(simulator)).json()["taskId"]
        clock.now += 90
        answers: list[bytes] = []

        async def poll() -> None:
            answers.append((await http.get(f"/task/{task_id}")).content)

        async with anyio.create_task_group() as group:
            group.start_soon(poll)
            group.start_soon(poll)
        await poll()
    assert len(set(answers)) == 1
    assert len(drawn) == 1
    assert drawn[0] != threading.get_ident()


async def test_a_lone_surrogate_in_a_prompt_is_told_as_it_came_and_drawn_without() -> None:
    clock = Clock()
    simulator = make(clock=clock, render=lambda prompt, **_: prompt.encode())
    async with client(simulator) as http:
        answer = await http.post("/generate", content=rb'{"prompt": "a \ud800"}')
        clock.now += 90
        images = (await http.get(f"/task/{answer.json()['taskId']}")).json()["images"]
    assert images[0]["prompt"] == "a \ud800"


async def test_durations_pass_on_the_loops_own_clock() -> None:
    """At a high speed a task completes in real time on either loop, with no clock given."""
    simulator = make(speed=3000)
    async with client(simulator) as http:
        task_id = (await submit(simulator)).json()["taskId"]
        with anyio.fail_after(10):
            while (await http.get(f"/task/{task_id}")).json()["status"] != "completed":  # noqa: ASYNC110 - polling is the API
                await anyio.sleep(0.005)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/api/v1/task/x",
        "http://conceptviz.app/api/v1/task/x",
        "https://conceptviz.app:8443/api/v1/task/x",
        "https://cvk_secret@api.conceptviz.app/api/v1/task/x",
    ],
)
async def test_no_other_host_can_be_reached(url: str) -> None:
    """A client that goes astray, with its key, finds nobody there."""
    async with httpx.AsyncClient(transport=make().transport()) as http:
        with pytest.raises(httpx.ConnectError) as caught:
            await http.get(url)
    assert "cvk_secret" not in str(caught.value)


async def test_each_host_has_its_own_paths() -> None:
    clock = Clock()
    simulator = make(clock=clock)
    (image,) = await completed(simulator, clock)
    async with client(simulator) as http:
        assert (await http.get("https://r2.conceptviz.app/api/v1/task/x")).status_code == 404
        assert (await http.get(image["url"].replace("r2.", ""))).status_code == 404
        assert (await http.get(image["url"])).status_code == 400


async def test_an_answer_streams_like_one_from_a_network() -> None:
    """The raw bytes can be read piece by piece: a body that was read beforehand could not."""
    clock = Clock()
    simulator = make(clock=clock, render=lambda prompt, **_: b"\xff\xd8" + bytes(200_000))
    (image,) = await completed(simulator, clock)
    async with (
        httpx.AsyncClient(transport=simulator.transport()) as http,
        http.stream("GET", image["url"]) as answer,
    ):
        pieces = [piece async for piece in answer.aiter_raw()]
    assert len(pieces) > 1
    assert len(b"".join(pieces)) == 200_002 == int(answer.headers["content-length"])


async def test_the_trace_comes_before_the_request_is_carried_out() -> None:
    """What is raised in it stops the request; where the connection is refused it is not called."""
    simulator = make()
    events: list[tuple[str, int]] = []

    async def trace(name: str, info: dict[str, Any]) -> None:
        events.append((name, simulator.ledger.submissions))
        if len(events) == 2:
            raise InterruptedError

    async def post() -> None:
        async with client(simulator) as http:
            await http.post("/generate", json={"prompt": "x"}, extensions={"trace": trace})

    await post()
    with pytest.raises(InterruptedError):
        await post()
    simulator.faults.add("submit", refuse=True)
    with pytest.raises(httpx.ConnectError):
        await post()
    assert events == [("http11.send_request_headers.started", 0), ("http11.send_request_headers.started", 1)]
    assert simulator.ledger.submissions == 1


async def test_a_lost_answer_was_paid_for() -> None:
    simulator = make()
    simulator.faults.add("submit", accept=True, close=True)
    with pytest.raises(httpx.ReadError):
        await submit(simulator)
    assert (simulator.ledger.charged, simulator.requests["submit"]) == (2, 1)


async def test_a_connection_closed_before_the_service_acts_costs_nothing() -> None:
    simulator = make()
    simulator.faults.add("submit", close=True)
    with pytest.raises(httpx.ReadError):
        await submit(simulator)
    assert (simulator.ledger.charged, simulator.requests["submit"]) == (0, 1)


async def test_a_refused_connection_never_arrives() -> None:
    simulator = make()
    simulator.faults.add("submit", refuse=True, times=2)
    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            await submit(simulator)
    assert simulator.requests["submit"] == 0
    assert (await submit(simulator)).is_success


@pytest.mark.parametrize("headers", [{}, {"Retry-After": "2"}])
async def test_too_many_requests_with_and_without_retry_after(headers: dict[str, str]) -> None:
    simulator = make()
    simulator.faults.add("submit", status=429, headers=headers)
    answer = await submit(simulator)
    assert answer.status_code == 429
    assert answer.headers.get("retry-after") == headers.get("Retry-After")
    assert list(answer.json()) == ["error"]
    assert simulator.ledger.charged == 0


async def test_a_poll_fails_as_often_as_ordered_after_those_let_through() -> None:
    simulator = make()
    simulator.faults.add("poll", status=502, times=2, skip=1)
    async with client(simulator) as http:
        task_id = (await submit(simulator)).json()["taskId"]
        statuses = [(await http.get(f"/task/{task_id}")).status_code for _ in range(5)]
    assert statuses == [200, 502, 502, 200, 200]


async def test_a_fault_without_end_lasts_until_it_is_cleared() -> None:
    simulator = make()
    simulator.faults.add("submit", status=503, times=None)
    assert {(await submit(simulator)).status_code for _ in range(5)} == {503}
    simulator.faults.clear()
    assert (await submit(simulator)).is_success


async def test_a_fault_strikes_only_the_prompt_or_path_it_names() -> None:
    simulator = make()
    simulator.faults.add("submit", containing="unlucky", status=500)
    simulator.faults.add("poll", containing="nobody", status=500)
    assert (await submit(simulator)).is_success
    assert (await submit(simulator, prompts=["lucky", "the unlucky one"])).status_code == 500
    async with client(simulator) as http:
        assert (await http.get("/task/somebody")).status_code == 404
        assert (await http.get("/task/nobody")).status_code == 500


async def test_the_first_fault_that_matches_strikes_first() -> None:
    simulator = make()
    for status in (500, 502):
        simulator.faults.add("submit", status=status)
    assert [(await submit(simulator)).status_code for _ in range(3)] == [500, 502, 200]


async def test_an_answer_can_be_malformed_after_the_service_acted() -> None:
    simulator = make()
    simulator.faults.add("submit", accept=True, body="<html>")
    answer = await submit(simulator)
    assert (answer.status_code, answer.text, simulator.ledger.charged) == (200, "<html>", 2)


async def test_an_accepted_submit_can_carry_another_status() -> None:
    simulator = make()
    simulator.faults.add("submit", accept=True, status=202)
    answer = await submit(simulator)
    assert answer.status_code == 202
    assert len(answer.json()["taskId"]) == 21


async def test_the_true_answer_can_be_altered() -> None:
    clock = Clock()
    simulator = make(clock=clock)
    simulator.faults.add("poll", alter=lambda answer: {**answer, "images": answer["images"][1:]})
    images = await completed(simulator, clock, prompts=["one", "two"])
    assert [image["prompt"] for image in images] == ["two"]


async def test_a_status_word_and_a_body_can_be_dictated() -> None:
    simulator = make()
    simulator.faults.add("poll", body={"status": "dreaming"})
    async with client(simulator) as http:
        assert (await http.get("/task/x")).json() == {"status": "dreaming"}


async def test_an_image_can_break_off_be_html_or_redirect() -> None:
    clock = Clock()
    simulator = make(clock=clock)
    (image,) = await completed(simulator, clock)
    simulator.faults.add("image", cut=100)
    simulator.faults.add("image", body="<html>", headers={"Content-Type": "text/html"})
    simulator.faults.add("image", status=302, headers={"Location": "http://169.254.169.254/"})
    async with httpx.AsyncClient(transport=simulator.transport()) as http:
        async with http.stream("GET", image["url"]) as answer:
            pieces = answer.aiter_raw()
            assert len(await anext(pieces)) == 100 < int(answer.headers["content-length"])
            with pytest.raises(httpx.RemoteProtocolError, match="received 100 bytes"):
                await anext(pieces)
        answer = await http.get(image["url"])
        assert (answer.status_code, answer.text, answer.headers["content-type"]) == (200, "<html>", "text/html")
        answer = await http.get(image["url"])
        assert (answer.status_code, answer.content) == (302, b"")
        assert answer.headers["location"] == "http://169.254.169.254/"
        assert hashlib.sha256((await http.get(image["url"])).content).hexdigest() == image["imageHash"]


def test_a_fault_on_something_unknown_is_refused() -> None:
    with pytest.raises(ValueError, match="on"):
        Fault(on="submits")  # type: ignore[arg-type]


def test_virtual_time_needs_no_waiting_and_does_not_run_away_while_drawing() -> None:
    """Under trio's MockClock a minute of polling takes no time, and no deadline passes while a picture is drawn."""

    def render(prompt: str, **settings: Any) -> bytes:
        time.sleep(0.05)
        return render_tiny(prompt, **settings)

    simulator = make(render=render)

    async def main() -> float:
        async with client(simulator) as http:
            task_id = (await http.post("/generate", json={"prompt": "x"})).json()["taskId"]
            started = trio.current_time()
            while (await http.get(f"/task/{task_id}", timeout=5)).json()["status"] != "completed":  # noqa: ASYNC110 - polling is the API
                await trio.sleep(4)
            return trio.current_time() - started

    assert 30 <= trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) <= 94


def test_a_slow_answer_meets_the_callers_read_timeout() -> None:
    """The request was carried out; the answer came too late."""
    simulator = make()
    simulator.faults.add("submit", delay=20, times=2)

    async def main() -> list[float]:
        times = []
        async with client(simulator) as http:
            for timeout in (30, 5):
                started = trio.current_time()
                try:
                    await http.post("/generate", json={"prompt": "x"}, timeout=timeout)
                except httpx.ReadTimeout:
                    times.append(-1.0)
                times.append(trio.current_time() - started)
        return times

    assert trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0)) == [20, -1, 5]
    assert simulator.ledger.submissions == 2


def test_a_task_can_be_looked_at_from_another_event_loop() -> None:
    """Each loop counts seconds from a start of its own; a task's age is the same in all of them."""
    simulator = make(speed=0.01)

    async def start() -> str:
        return str((await submit(simulator)).json()["taskId"])

    async def look(task_id: str) -> str:
        async with client(simulator) as http:
            return str((await http.get(f"/task/{task_id}")).json()["status"])

    async def later(task_id: str) -> str:
        assert await look(task_id) == "pending"
        await trio.sleep(9_000)
        return await look(task_id)

    for backend in ("asyncio", "trio"):
        task_id = anyio.run(start, backend=backend)
        for other in ("trio", "asyncio"):
            assert anyio.run(look, task_id, backend=other) == "pending"
    clock = trio.testing.MockClock(autojump_threshold=0)
    assert trio.run(later, task_id, clock=clock) == "completed"
    assert anyio.run(look, task_id, backend="asyncio") == "completed"


@pytest.mark.parametrize(
    "options", [{"credits": -1}, {"plan": "basic"}, {"speed": 0}, {"speed": float("inf")}, {"speed": float("nan")}]
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        Simulator(**options)


def test_keys_are_added_disabled_and_never_shown() -> None:
    simulator = make()
    second = simulator.add_key()
    assert second != simulator.api_key
    assert simulator.api_key not in repr(simulator)
    account = simulator.add_account(credits=5)
    assert account.api_key not in repr(account)
    assert account.ledger.credits == 5
    simulator.disable_key(second)
    with pytest.raises(KeyError):
        simulator.disable_key("cvk_unknown")


def test_without_pillow_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "conceptviz\[simulator\]"'):
        Simulator().transport()
    make().transport()


async def test_without_python_multipart_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "python_multipart.multipart", None)
    simulator = make()
    async with client(simulator) as http:
        with pytest.raises(ModuleNotFoundError, match=r'pip install "conceptviz\[simulator\]"'):
            await upload(PNG)(simulator, http)


async def test_whole_pages_are_drawn_by_default() -> None:
    """No renderer given: the page is as large as the settings say, and a real file."""
    clock = Clock()
    simulator = Simulator(seed=1, clock=clock)
    (image,) = await completed(simulator, clock, "the water cycle")
    async with httpx.AsyncClient(transport=simulator.transport()) as http:
        data = (await http.get(image["url"])).content
    assert len(data) > 20_000
    assert hashlib.sha256(data).hexdigest() == image["imageHash"]
