"""AsyncConceptViz: what it is made of, what its methods send, and what it tells on the way."""

import copy
import json
import logging
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import httpx
import pytest
from helpers import (
    API,
    KEY,
    QUICK,
    QUICK_POLLING,
    RECEIPT,
    RUNNING,
    TASK,
    Script,
    assert_no_key,
    assert_no_key_logged,
    client,
    completed,
    png,
)
from raw_server import Connection, RawServer

from conceptviz import (
    AsyncConceptViz,
    AsyncTask,
    ConceptVizError,
    Credits,
    Differed,
    Event,
    Image,
    InsufficientCreditsError,
    InvalidRequestError,
    NotSentError,
    Polling,
    Retries,
    SubmissionUnknownError,
    Submitted,
    Unchecked,
    _http,
)
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    caplog.set_level(1)
    monkeypatch.delenv("CONCEPTVIZ_API_KEY", raising=False)
    monkeypatch.delenv("CONCEPTVIZ_BASE_URL", raising=False)
    yield
    assert_no_key_logged(caplog)


def sent(script: Script, number: int = 0) -> Any:
    """The JSON of a request."""
    return json.loads(script.requests[number].content)


def simulated(simulator: Simulator, **options: Any) -> AsyncConceptViz:
    settings: dict[str, Any] = {"retries": QUICK, "polling": QUICK_POLLING, **options}
    return AsyncConceptViz(simulator.api_key, transport=simulator.transport(), **settings)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan"), True, "30", None])
def test_a_timeout_is_a_number_of_seconds(timeout: Any) -> None:
    with pytest.raises(InvalidRequestError, match="timeout"):
        AsyncConceptViz(KEY, timeout=timeout)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True, "20", None])
def test_max_connections_is_a_whole_number(limit: Any) -> None:
    with pytest.raises(InvalidRequestError, match="max_connections"):
        AsyncConceptViz(KEY, max_connections=limit)


@pytest.mark.parametrize(
    "key",
    [
        f"{KEY}\r\nX-Evil: 1",
        f"{KEY}\0",
        f"{KEY} ",
        f" {KEY}",
        f"Bearer {KEY}",
        f"{KEY}é",
        f"{KEY}\n\n",
        "",
    ],
)
def test_a_key_that_is_no_headers_value(key: str) -> None:
    """M60: refused at construction, and not shown."""
    with pytest.raises(InvalidRequestError) as caught:
        AsyncConceptViz(key)
    assert_no_key(caught.value, frames=False)  # the caller's own frames hold what the caller gave


async def test_the_key_from_a_callable_and_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The callable is called once; the environment counts only without the argument."""
    calls: list[int] = []

    def ask() -> str:
        calls.append(1)
        return KEY

    monkeypatch.setenv("CONCEPTVIZ_API_KEY", "cvk_other")
    script = Script(RUNNING)
    for api_key, expected in ((ask, KEY), (None, "cvk_other"), (KEY, KEY)):
        async with AsyncConceptViz(api_key, transport=httpx.MockTransport(script)) as cv:
            await cv.task(TASK).status()
            await cv.task(TASK).status()
        assert script.requests[-1].headers["authorization"] == f"Bearer {expected}"
    assert calls == [1]


def test_without_a_key() -> None:
    with pytest.raises(InvalidRequestError, match="CONCEPTVIZ_API_KEY"):
        AsyncConceptViz()


@pytest.mark.parametrize(
    "url",
    [
        "http://conceptviz.app/api/v1",
        "https://user:pass@conceptviz.app/api/v1",
        "https://conceptviz.app/api/v1?x=1",
        "https://conceptviz.app/api/v1#x",
        "ftp://127.0.0.1/",
        "https://",
        "conceptviz.app",
    ],
)
def test_a_base_url_that_is_none(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """M39: by argument and by environment."""
    with pytest.raises(InvalidRequestError, match="base URL"):
        AsyncConceptViz(KEY, base_url=url)
    monkeypatch.setenv("CONCEPTVIZ_BASE_URL", url)
    with pytest.raises(InvalidRequestError, match="base URL"):
        AsyncConceptViz(KEY)


async def test_requests_go_to_the_base_url() -> None:
    script = Script(RUNNING)
    for base_url in ("https://other.example/v2", "https://other.example/v2/", "http://[::1]:8787/v2"):
        async with AsyncConceptViz(KEY, base_url=base_url, transport=httpx.MockTransport(script)) as cv:
            await cv.task(TASK).status()
        assert str(script.requests[-1].url) == f"{base_url.rstrip('/')}/task/{TASK}"


def test_the_key_is_nowhere_to_be_seen() -> None:
    """M62: not in repr, str, vars, copies; and a client is not pickled."""
    cv, _ = client(RUNNING)
    assert repr(cv) == f"<AsyncConceptViz {API}>"
    for thing in (cv, cv._core.transport, cv._core.poller, cv._core.downloads, cv.task(TASK)):
        assert KEY not in repr(thing) + str(thing) + repr(getattr(thing, "__dict__", ""))
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        pickle.dumps(cv)
    with pytest.raises(TypeError, match="not pickled or copied"):
        copy.deepcopy(cv)


PNG_URL = "https://example.com/a.png"


async def test_one_prompt_is_prompt_and_several_are_prompts() -> None:
    cv, script = client(RECEIPT)
    async with cv:
        await cv.submit("a")
        await cv.submit(["a"])
        await cv.submit(("a", "b"))
        await cv.submit_edit("a", PNG_URL)
    assert [sent(script, n) for n in range(4)] == [
        {"prompt": "a"},
        {"prompt": "a"},
        {"prompts": ["a", "b"]},
        {"prompt": "a", "images": [PNG_URL]},
    ]
    assert script.paths == ["POST /api/v1/generate"] * 3 + ["POST /api/v1/edit"]


@pytest.mark.parametrize("method", ["submit", "generate", "submit_edit", "edit"])
async def test_settings_are_on_the_wire_only_when_given(method: str) -> None:
    def service(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=RECEIPT if request.method == "POST" else completed("a"))

    cv, script = client(service)
    arguments = ["a", PNG_URL] if "edit" in method else ["a"]
    async with cv:
        await getattr(cv, method)(*arguments)
        await getattr(cv, method)(*arguments, model="cv-1", quality="4k", aspect_ratio="a4-portrait")
    bare, full = (
        {key: value for key, value in sent(script, n).items() if key not in {"prompt", "images"}}
        for n, request in enumerate(script.requests)
        if request.method == "POST"
    )
    assert bare == {}
    assert full == {"model": "cv-1", "quality": "4k", "aspectRatio": "a4-portrait"}


@pytest.mark.parametrize(
    "prompt", ["", " \n", [], ["a", ""], list("abcde"), "\ud800", ["a", "\udfff"], None, 5, b"a", {"a"}, [["a"]]]
)
@pytest.mark.parametrize("method", ["submit", "generate"])
async def test_prompts_that_are_refused_here(prompt: Any, method: str) -> None:
    """M72: nothing is sent, and the error is a ValueError."""
    cv, script = client(RECEIPT)
    async with cv:
        with pytest.raises(ValueError, match="Nothing was sent") as caught:
            await getattr(cv, method)(prompt)
    assert isinstance(caught.value, InvalidRequestError)
    assert caught.value.credits is Credits.NOT_SPENT
    assert script.count == 0


@pytest.mark.parametrize("prompt", ["\0", "\u202eRTL", 'a "quoted"\r\nline', "水の循環 🌧", "x" * 1_000_000])
async def test_prompts_that_arrive_as_they_are(prompt: str) -> None:
    cv, script = client(RECEIPT)
    async with cv:
        await cv.submit(prompt)
        if len(prompt) < 1000:
            assert sent(script)["prompt"] == prompt
        else:
            assert script.requests[0].content == b'{"prompt":"' + prompt.encode() + b'"}'


async def test_cv_2_with_4k_is_refused_unless_insisted_on() -> None:
    cv, script = client(RECEIPT)
    async with cv:
        with pytest.raises(InvalidRequestError, match="4k"):
            await cv.submit("a", model="cv-2", quality="4k")
        with pytest.raises(InvalidRequestError, match="4k"):
            await cv.generate("a", quality="4k")
        with pytest.raises(InvalidRequestError, match="4k"):
            await cv.edit("a", PNG_URL, quality="4k")
        assert script.count == 0
        await cv.submit("a", quality=Unchecked("4k"))
    assert sent(script) == {"prompt": "a", "quality": "4k"}


async def test_generate_single_and_batch_at_the_simulator() -> None:
    simulator = Simulator(speed=100_000, render=render_tiny, seed=5)
    async with simulated(simulator) as cv:
        one = await cv.generate("the water cycle", aspect_ratio="1:1")
        many = await cv.generate(["a", "b", "a"], model="cv-1")
        edited = await cv.edit("bluer", [png(), PNG_URL])
    assert one.image.prompt == "the water cycle"
    assert one.submission is not None
    assert one.submission.aspect_ratio == "1:1"
    assert [(image.index, image.prompt) for image in many.images] == [(0, "a"), (1, "b"), (2, "a")]
    assert many.missing_prompts == ()
    with pytest.raises(ValueError, match="3 images"):
        _ = many.image
    assert edited.image.prompt == "bluer"
    assert (simulator.ledger.charged, simulator.ledger.submissions) == (2 + 3 + 2, 3)
    assert cv.credits_remaining == simulator.ledger.credits


async def test_a_partial_batch_names_the_missing_prompts() -> None:
    simulator = Simulator(speed=100_000, render=render_tiny)
    async with simulated(simulator) as cv:
        result = await cv.generate(["one", "two [sim:partial]", "three"])
    assert [image.prompt for image in result.images] == ["one", "three"]
    assert result.missing_prompts == ("two [sim:partial]",)


async def test_credits_remaining_follows_the_answers() -> None:
    """None before there is an answer, then what each said, a refusal's included."""
    simulator = Simulator(credits=5, render=render_tiny)
    async with simulated(simulator) as cv:
        assert cv.credits_remaining is None
        await cv.submit("a")
        assert cv.credits_remaining == 3
        simulator.ledger.charge(2)
        with pytest.raises(InsufficientCreditsError) as caught:
            await cv.submit("a")
        assert cv.credits_remaining == caught.value.credits_remaining == 1
        with pytest.raises(ConceptVizError):
            await cv.submit("[sim:credit-error]")
        assert cv.credits_remaining == 1


async def test_credits_remaining_keeps_the_last_answer_that_said_so() -> None:
    silent = {"taskId": TASK}
    cv, _ = client(RECEIPT | {"credits_remaining": "12"}, silent, RECEIPT | {"credits_remaining": -1})
    async with cv:
        for _ in range(3):
            await cv.submit("a")
            assert cv.credits_remaining == 12


@pytest.mark.parametrize(
    ("arguments", "settings", "credits"),
    [
        (1, {}, 2),
        (0, {}, 0),
        (1000, {}, 2000),
        ("a", {}, 2),
        (["a", "b", "c"], {}, 6),
        (list("abcdefgh"), {"model": "cv-1"}, 8),
        (3, {"model": "cv-2", "quality": "2k"}, 6),
        (3, {"model": "cv-1"}, 3),
        (3, {"model": "cv-1", "quality": "2k"}, 3),
        (3, {"model": "cv-1", "quality": "4k"}, 6),
    ],
)
async def test_estimate(arguments: Any, settings: dict[str, Any], credits: int) -> None:
    """Source: "Credit Cost"; nothing is asked of the service."""
    cv, script = client(RECEIPT)
    assert cv.estimate(arguments, **settings) == credits
    assert script.count == 0


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [(-1, {}), (True, {}), (1.5, {}), (None, {}), (1, {"quality": "4k"}), (1, {"model": "cv-9"})],
)
def test_what_cannot_be_estimated(arguments: Any, settings: dict[str, Any]) -> None:
    cv, _ = client(RECEIPT)
    with pytest.raises(InvalidRequestError):
        cv.estimate(arguments, **settings)


@pytest.mark.parametrize(("charged", "warned"), [(2, 0), (4, 1), (None, 0), (0, 1)])
async def test_a_price_that_is_not_the_pages(
    charged: int | None, warned: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The service drifts: what was expected is compared with what was charged."""
    events: list[Event] = []
    cv, _ = client(RECEIPT | {"credits_used": charged}, on_event=events.append)
    async with cv:
        task = await cv.submit("a")
    records = [record.message for record in caplog.records if "was accepted with credits" in record.message]
    assert records == [f"Task {TASK} was accepted with credits {charged}, where 2 was expected."] * warned
    assert [event.actual for event in events if isinstance(event, Differed)] == [charged] * warned
    assert task.submission is not None
    assert task.submission.credits_used == charged


async def test_a_model_without_a_price_is_not_compared(caplog: pytest.LogCaptureFixture) -> None:
    cv, _ = client(RECEIPT | {"credits_used": 9, "model": "cv-9"})
    async with cv:
        await cv.submit("a", model="cv-9")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_the_events_of_the_whole_road(kind: str, tmp_path: Path) -> None:
    """In order, and to a hook of either kind."""
    events: list[Any] = []

    async def hook(event: Any) -> None:
        await anyio.lowlevel.checkpoint()
        events.append(event)

    simulator = Simulator(speed=100_000, render=render_tiny)
    async with simulated(simulator, on_event=hook if kind == "async" else events.append) as cv:
        result = await cv.generate("a")
        path = await cv.save(result.image, tmp_path)
    names = [type(event).__name__ for event in events]
    assert names[0] == "Submitted"
    assert names[-3:] == ["Polled", "Completed", "Saved"]
    assert set(names[1:-2]) == {"Polled"}
    assert {event.task_id for event in events} == {result.task_id}
    assert events[0].submission.credits_used == 2
    assert events[-2].result == result
    assert (events[-1].image, events[-1].path) == (result.image, path)


@pytest.mark.parametrize("kind", ["sync", "async"])
async def test_a_hooks_error_surfaces_and_does_not_hide_a_paid_task(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """M96: the error is the caller's own; the id is in the log."""

    def fail(event: Any) -> None:
        raise LookupError("the hook's own")

    async def fail_later(event: Any) -> None:
        await anyio.lowlevel.checkpoint()
        fail(event)

    cv, script = client(RECEIPT, on_event=fail if kind == "sync" else fail_later)
    async with cv:
        with pytest.raises(LookupError, match="the hook's own"):
            await cv.submit("a")
        assert cv.credits_remaining == 79
    assert script.count == 1
    [record] = [r for r in caplog.records if r.name == "conceptviz" and r.levelno > logging.DEBUG]
    assert TASK in record.message
    assert record.levelno == logging.WARNING


async def test_a_hooks_error_does_not_become_a_second_submit() -> None:
    """A hook that raises one of our own retryable errors ends the call; the POST is not made again."""

    def fail(event: Any) -> None:
        if isinstance(event, Submitted):
            raise NotSentError("the hook's own")

    cv, script = client(RECEIPT, on_event=fail)
    async with cv:
        with pytest.raises(NotSentError, match="the hook's own"):
            await cv.submit("a")
    assert script.count == 1


async def test_a_lost_answer_is_charged_once() -> None:
    """The oracle is the server's book: accepted, answer lost, nothing sent again."""
    simulator = Simulator(render=render_tiny)
    simulator.faults.add("submit", close=True, accept=True)
    async with simulated(simulator) as cv:
        with pytest.raises(SubmissionUnknownError):
            await cv.generate("a")
    assert (simulator.ledger.submissions, simulator.ledger.charged) == (1, 2)
    assert simulator.requests["submit"] == 1


async def test_a_refused_connection_is_charged_once() -> None:
    simulator = Simulator(speed=100_000, render=render_tiny)
    simulator.faults.add("submit", refuse=True, times=2)
    async with simulated(simulator) as cv:
        await cv.generate("a")
    assert (simulator.ledger.submissions, simulator.ledger.charged) == (1, 2)


async def test_a_cut_answer_is_a_task() -> None:
    """The id was in what arrived."""
    simulator = Simulator(speed=100_000, render=render_tiny)
    simulator.faults.add("submit", cut=60)
    async with simulated(simulator) as cv:
        result = await cv.generate(["a", "b"])
    assert len(result.images) == 2
    assert simulator.ledger.submissions == 1


async def test_closing_twice_and_using_after() -> None:
    cv, script = client(RECEIPT)
    async with cv as same:
        assert same is cv
    await cv.aclose()
    image = Image("https://r2.conceptviz.app/images/a.png")
    for call in (lambda: cv.submit("a"), lambda: cv.generate("a"), lambda: cv.read(image), cv.task(TASK).status):
        with pytest.raises(InvalidRequestError, match="closed"):
            await call()
    assert script.count == 0


async def test_a_client_can_be_closed_while_it_is_used() -> None:
    """What is under way ends with an error of ours; nothing hangs."""

    def hold(connection: Connection) -> None:
        connection.read()
        connection.hold()

    async def look() -> None:
        with pytest.raises(ConceptVizError):
            await cv.task(TASK).status()

    with RawServer(hold) as server:
        cv = AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(look)
                await anyio.to_thread.run_sync(server.asked.wait, 5)
                await cv.aclose()


async def test_closing_waits_for_the_answer_to_a_submit() -> None:
    """Its id would be lost with the connection."""
    closing = threading.Event()

    def answer_late(connection: Connection) -> None:
        connection.read()
        closing.wait(5)
        connection.answer(json.dumps(RECEIPT).encode())

    tasks: list[AsyncTask] = []

    async def submit(cv: AsyncConceptViz) -> None:
        tasks.append(await cv.submit("a"))

    with RawServer(answer_late) as server:
        cv = AsyncConceptViz(KEY, base_url=server.base_url, retries=QUICK)
        with anyio.fail_after(5):
            async with anyio.create_task_group() as group:
                group.start_soon(submit, cv)
                await anyio.to_thread.run_sync(server.asked.wait, 5)
                group.start_soon(cv.aclose)
                await anyio.wait_all_tasks_blocked()
                closing.set()
    assert [task.id for task in tasks] == [TASK]


async def test_a_hook_may_close_its_client() -> None:
    """It does not wait for the submit that it was told of."""
    clients: list[AsyncConceptViz] = []
    cv, script = client(RECEIPT, on_event=lambda _: clients[0].aclose())
    clients.append(cv)
    with anyio.fail_after(5):
        assert (await cv.submit("a")).id == TASK
    assert script.count == 1


def test_making_a_client_does_no_io_and_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """No certificates are read, no socket is opened: a client may be made at import time."""
    _http.ssl_context.cache_clear()
    monkeypatch.setattr(httpx, "create_ssl_context", None)
    monkeypatch.setattr(time, "sleep", None)
    AsyncConceptViz(KEY, polling=Polling(), retries=Retries())
