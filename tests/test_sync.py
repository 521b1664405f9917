"""ConceptViz and Task: the async twin's surface, and every situation that a blocking caller may be in."""

import contextvars
import inspect
import logging
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from conceptviz import (
    AsyncConceptViz,
    AsyncTask,
    ConceptViz,
    Event,
    GenerationFailedError,
    InvalidRequestError,
    Polled,
    Polling,
    Submitted,
    Task,
    TaskNotFoundError,
    WaitTimeoutError,
)
from conceptviz.simulator import Simulator, render_tiny

pytestmark = pytest.mark.timeout(40)  # what is wrong here hangs

FAST = Polling(min_interval=0.01, max_interval=0.02, first_look=0.01)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
posix = pytest.mark.skipif(os.name == "nt", reason="forks, or sends SIGINT")


@pytest.fixture
def simulator() -> Simulator:
    return Simulator(speed=1000, seed=1, render=render_tiny)


@pytest.fixture
def client(simulator: Simulator) -> Iterator[ConceptViz]:
    with ConceptViz(simulator.api_key, transport=simulator.transport(), polling=FAST) as cv:
        yield cv


class Clock:
    """A simulator's clock that stands still until it is moved, so that a task ends when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def serving(simulator: Simulator) -> Iterator[Simulator]:
    with simulator.serve() as url, pytest.MonkeyPatch.context() as env:
        env.setenv("CONCEPTVIZ_BASE_URL", url)
        env.setenv("CONCEPTVIZ_API_KEY", simulator.api_key)
        yield simulator


@pytest.fixture
def served() -> Iterator[Simulator]:
    """A simulator on a port, for scripts in other processes."""
    with serving(Simulator(speed=1000, seed=1, render=render_tiny, credits=1000)) as simulator:
        yield simulator


@pytest.fixture
def stopped(clock: Clock) -> Iterator[Simulator]:
    """The same, with a clock that is moved by hand."""
    with serving(Simulator(clock=clock, seed=1, render=render_tiny)) as simulator:
        yield simulator


def command(script: str) -> list[str]:
    """Run a script as strictly as Python can: what it leaves open or unsaid becomes noise on stderr."""
    head = """
        import logging, os, sys, threading, time, warnings
        from conceptviz import ConceptViz, Polling
        logging.getLogger("asyncio").setLevel(logging.ERROR)  # its debug mode complains of a slow machine
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        FAST = Polling(min_interval=0.01, max_interval=0.02, first_look=0.01)
    """
    return [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(head) + textwrap.dedent(script)]


def run_script(script: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(command(script), capture_output=True, text=True, timeout=20, check=False)


def surface(cls: type) -> dict[str, Any]:
    """Every public member, and those that a `with` statement uses, as text without what makes it async."""
    members: dict[str, Any] = {}
    for name, member in inspect.getmembers(cls):
        if not name.startswith("_") or name in {"__init__", "__enter__", "__aenter__", "__exit__", "__aexit__"}:
            twin = {"aclose": "close", "__aenter__": "__enter__", "__aexit__": "__exit__"}.get(name, name)
            members[twin] = (
                "property" if isinstance(member, property) else without_async(str(inspect.signature(member)))
            )
    return members


def without_async(text: str) -> str:
    return re.sub(r"\bAsync(ConceptViz|Task|Iterator)\b", r"\1", text)


TWINS = pytest.mark.parametrize(("blocking", "awaited"), [(ConceptViz, AsyncConceptViz), (Task, AsyncTask)])


@TWINS
def test_both_clients_have_the_same_members_with_the_same_parameters(blocking: type, awaited: type) -> None:
    theirs, ours = surface(awaited), surface(blocking)
    if blocking is Task:  # nobody makes one by hand
        del theirs["__init__"], ours["__init__"]
    assert ours == theirs


@TWINS
def test_nothing_blocking_is_awaitable(blocking: type, awaited: type) -> None:
    for name in surface(blocking):
        assert not inspect.iscoroutinefunction(inspect.getattr_static(blocking, name)), name


@TWINS
def test_both_clients_are_documented_in_the_same_words(blocking: type, awaited: type) -> None:
    for name in surface(blocking):
        if not name.startswith("_"):
            theirs = inspect.getdoc(getattr(awaited, {"close": "aclose"}.get(name, name)))
            assert theirs
            assert inspect.getdoc(getattr(blocking, name)) == without_async(theirs), name


def test_a_prompt_becomes_a_file(client: ConceptViz, simulator: Simulator, tmp_path: Path) -> None:
    assert client.credits_remaining is None
    assert client.estimate(["one", "two"]) == 4
    result = client.generate(["the water cycle", "a cell"], model="cv-1", quality="4k", aspect_ratio="1:1")
    assert [image.prompt for image in result.images] == ["the water cycle", "a cell"]
    paths = client.save(result, tmp_path)
    assert client.save(result.images[0], tmp_path) == paths[0]
    assert paths[1].read_bytes() == client.read(result.images[1])
    assert client.credits_remaining == simulator.ledger.credits == 96


def test_a_file_is_edited(client: ConceptViz, simulator: Simulator) -> None:
    data = client.read(client.generate("a sketch").image)
    assert client.edit("cleaner", data, model="cv-2", aspect_ratio="16:9").image.prompt
    task = client.submit_edit("cleaner still", [data, data])
    assert task.wait().task_id == task.id
    assert simulator.ledger.submissions == 3


def test_a_task_is_waited_for_looked_at_and_taken_up_again(client: ConceptViz) -> None:
    task = client.submit("the water cycle")
    assert task.submission is not None
    assert task.id == task.submission.task_id
    assert task.wait().image.prompt == "the water cycle"
    assert task.status().is_terminal
    again = client.task(task.id)
    assert again.submission is None
    assert again.wait().images[0].url
    assert repr(again) == f"<Task {task.id}>"
    with pytest.raises(InvalidRequestError):
        client.task("../account")
    with pytest.raises(TaskNotFoundError):
        client.task("A" * 21).status()


def test_errors_arrive_as_they_are_raised(client: ConceptViz) -> None:
    with pytest.raises(GenerationFailedError) as failed:
        client.generate("[sim:failed] the water cycle")
    assert failed.value.task_id
    with pytest.raises(WaitTimeoutError) as late:
        client.generate("[sim:slow] the water cycle", timeout=0.05)
    assert client.task(late.value.task_id or "").id == late.value.task_id


def test_watch_is_an_iterator_of_looks_that_ends_with_the_task(stopped: Simulator, clock: Clock) -> None:
    ended = []
    with ConceptViz(polling=FAST) as cv:
        for number, state in enumerate(cv.submit("the water cycle").watch(), 1):
            ended.append(state.is_terminal)
            clock.now += 100.0 if number == 3 else 0.0
    assert ended == [False, False, False, True]


def test_leaving_watch_early_stops_the_looking(stopped: Simulator) -> None:
    with ConceptViz(polling=FAST) as cv:
        task = cv.submit("the water cycle")
        for _ in task.watch():
            break
        task.status()
        assert stopped.requests["poll"] == 2


def test_configuration_errors_come_at_construction_and_start_nothing() -> None:
    script = """
        from conceptviz import InvalidRequestError
        for wrong in ({"api_key": "cvk a"}, {"api_key": "cvk_a", "base_url": "http://example.com"},
                      {"api_key": "cvk_a", "timeout": -1}, {"api_key": lambda: ""}):
            try:
                ConceptViz(**wrong)
            except InvalidRequestError:
                print("refused")
        ConceptViz("cvk_a").estimate(3)
        print(threading.active_count())
    """
    done = run_script(script)
    assert (done.stdout.split(), done.stderr) == (["refused"] * 4 + ["1"], "")


def test_the_key_is_asked_for_once_and_shown_nowhere(simulator: Simulator) -> None:
    asked: list[int] = []

    def key() -> str:
        asked.append(1)
        return simulator.api_key

    client = ConceptViz(key, transport=simulator.transport(), polling=FAST)
    client.generate("the water cycle")
    assert asked == [1]
    assert simulator.api_key not in repr(client) + repr(vars(client)) + repr(vars(client._blocking))
    with pytest.raises(Exception) as refused:  # noqa: PT011 - of which kind, is Python's affair
        pickle.dumps(client)
    assert simulator.api_key not in str(refused.value)
    client.close()


def test_a_closed_client_refuses_clearly_and_can_be_closed_again(client: ConceptViz, simulator: Simulator) -> None:
    task = client.submit("the water cycle")
    client.close()
    client.close()
    for call in (lambda: client.generate("another"), task.wait, lambda: next(task.watch())):
        with pytest.raises(InvalidRequestError, match="closed"):
            call()
    assert simulator.ledger.submissions == 1
    unused = ConceptViz(simulator.api_key, transport=simulator.transport())
    unused.close()
    with pytest.raises(InvalidRequestError, match="closed"):
        unused.submit("another")


def test_eight_threads_share_one_client(client: ConceptViz, simulator: Simulator) -> None:
    with ThreadPoolExecutor(8) as pool:
        prompts = [f"diagram {n}" for n in range(24)]
        results = list(pool.map(client.generate, prompts))
    assert [result.image.prompt for result in results] == prompts
    assert simulator.ledger.submissions == 24


def test_two_clients_in_two_threads_keep_apart() -> None:
    def work(number: int) -> tuple[int, int]:
        simulator = Simulator(speed=1000, seed=number, render=render_tiny, credits=10 + number)
        with ConceptViz(simulator.api_key, transport=simulator.transport(), polling=FAST) as cv:
            cv.generate("the water cycle")
            return cv.credits_remaining or 0, simulator.ledger.credits

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, (1, 2))) == [(9, 9), (10, 10)]


@pytest.mark.anyio
async def test_it_works_inside_a_running_loop(client: ConceptViz) -> None:
    """As in a notebook, whose cells run inside an event loop."""
    assert client.generate("the water cycle").image
    assert [state.is_terminal for state in client.submit("a cell").watch()][-1]


def test_a_hook_sees_the_callers_context(simulator: Simulator) -> None:
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")
    seen: list[tuple[type[Event], str]] = []
    client = ConceptViz(
        simulator.api_key,
        transport=simulator.transport(),
        polling=FAST,
        on_event=lambda event: seen.append((type(event), request.get())),
    )
    request.set("number 7")
    list(client.submit("the water cycle").watch())
    client.close()
    assert {kind for kind, _ in seen} == {Submitted, Polled}
    assert {value for _, value in seen} == {"number 7"}


@pytest.mark.parametrize("kind", [Submitted, Polled])
@pytest.mark.parametrize(
    "error", [ValueError("x"), StopIteration(1), SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr
)
def test_what_a_hook_raises_reaches_the_caller_unchanged(
    simulator: Simulator, error: BaseException, kind: type[Event]
) -> None:
    """M95. The loop thread survives it, and serves others."""

    def hook(event: Event) -> None:
        if isinstance(event, kind):
            raise error

    other = ConceptViz(simulator.api_key, transport=simulator.transport(), polling=FAST)
    client = ConceptViz(simulator.api_key, transport=simulator.transport(), polling=FAST, on_event=hook)
    with other, client, ThreadPoolExecutor(1) as pool:
        slow = pool.submit(other.generate, "the water cycle")
        with pytest.raises(type(error)) as raised:
            client.generate("a cell")
        assert raised.value is error
        assert slow.result().image


def test_a_hook_that_calls_back_is_told_so(simulator: Simulator) -> None:
    def hook(event: Event) -> None:
        cv.task(event.task_id or "").status()

    cv = ConceptViz(simulator.api_key, transport=simulator.transport(), polling=FAST, on_event=hook)
    with cv, pytest.raises(RuntimeError, match="would wait for itself"):
        cv.generate("the water cycle")


def test_a_plain_script_need_not_close(served: Simulator) -> None:
    done = run_script(
        """
        cv = ConceptViz(polling=FAST)
        print(cv.generate("the water cycle").image.prompt)
        import atexit, gc
        atexit.register(gc.collect)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "the water cycle\n", "")


def test_exit_with_a_wait_in_flight_ends_and_names_the_task(stopped: Simulator) -> None:
    done = run_script(
        """
        cv = ConceptViz(polling=FAST)
        task = cv.submit("the water cycle")
        looks = task.watch()
        next(looks)
        for wait in (task.wait, lambda: cv.task(task.id).wait(), lambda: list(looks)):
            threading.Thread(target=wait, daemon=True).start()
        while len(cv._blocking._loop._calls) < 3:
            time.sleep(0.001)
        print(task.id)
        """
    )
    assert done.returncode == 0
    assert done.stderr.count(f"Stopped waiting for task {done.stdout.strip()}") == 2
    assert "Traceback" not in done.stderr


def test_a_client_can_be_closed_by_an_exit_handler(served: Simulator) -> None:
    """Also by one that was registered first, and so runs last."""
    done = run_script(
        """
        import atexit
        early = ConceptViz(polling=FAST)
        atexit.register(lambda: (early.generate("at exit"), early.close(), print("closed", flush=True)))
        from conceptviz import _blocking
        atexit.unregister(_blocking._LoopThread.settle_down)
        atexit.register(_blocking._LoopThread.settle_down)
        early.generate("before")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "closed\n", "")


@posix
def test_ctrl_c_in_mid_wait_ends_at_once_and_the_task_is_taken_up_again(stopped: Simulator, clock: Clock) -> None:
    script = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background inherits it as ignored
        cv = ConceptViz(polling=FAST)
        task = cv.submit("the water cycle")
        print(task.id, flush=True)
        task.wait()
    """
    process = subprocess.Popen(command(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while stopped.requests["poll"] < 3 and process.poll() is None:  # until it is in mid-wait
        threading.Event().wait(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=5)
    assert process.returncode == -signal.SIGINT
    assert f"Stopped waiting for task {stdout.strip()}" in stderr
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    clock.now += 100
    with ConceptViz(polling=FAST) as second:
        assert second.task(stdout.strip()).wait().images


@posix
def test_after_a_fork_parent_and_child_both_go_on(served: Simulator) -> None:
    """By `os.fork` with either way of ending, with the client collected in the child, and by multiprocessing."""
    done = run_script(
        """
        import gc, multiprocessing

        from conceptviz import InvalidRequestError

        cv, forgotten, closed = ConceptViz(polling=FAST), ConceptViz(polling=FAST), ConceptViz(polling=FAST)
        forgotten.generate("before")
        closed.estimate(1)
        closed.close()
        task = cv.submit("in the parent")
        looks = cv.submit("[sim:slow] drawn on").watch()
        assert not next(looks).is_terminal

        def go_on(who):
            assert cv.generate(who).image.prompt == who
            assert task.wait().image.prompt == "in the parent"
            assert task.submission.prompts == ("in the parent",)

        for leave in (os._exit, sys.exit):
            child = os.fork()
            if child == 0:
                del forgotten
                gc.collect()
                go_on("the child")
                try:
                    next(looks)
                except RuntimeError as error:
                    assert "fork" in str(error)
                del looks
                gc.collect()
                try:
                    closed.generate("refused")
                except InvalidRequestError as error:
                    assert "closed" in str(error)
                if leave is sys.exit:
                    cv.close()
                leave(0)
            go_on("the parent")
            assert os.waitpid(child, 0)[1] == 0
            go_on("the parent again")
        assert list(looks)[-1].is_terminal
        forgotten.generate("after")

        context = multiprocessing.get_context("fork")
        process = context.Process(target=go_on, args=("a worker",))
        process.start()
        process.join(10)
        assert process.exitcode == 0
        go_on("the parent at last")
        print("done")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert served.ledger.submissions == 3 + 2 * 3 + 1 + 2


@posix
def test_a_fork_while_others_wait_leaves_the_child_free(stopped: Simulator) -> None:
    done = run_script(
        """
        cv = ConceptViz(polling=FAST)
        task = cv.submit("the water cycle")
        threading.Thread(target=task.wait, daemon=True).start()
        while not cv._blocking._loop._calls:
            time.sleep(0.001)
        child = os.fork()
        if child == 0:
            task.status()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        task.status()
        """
    )
    assert done.returncode == 0
    assert done.stderr.startswith("Stopped waiting for task")  # at exit, in the parent
    assert done.stderr.count("\n") == 1


@posix
def test_a_fork_while_the_loop_is_being_started_leaves_the_child_free(stopped: Simulator) -> None:
    """The lock that another thread holds at that moment is held for ever in the child."""
    done = run_script(
        """
        from conceptviz._blocking import _LoopThread
        cv = ConceptViz(polling=FAST)
        task = cv.submit("the water cycle")
        with _LoopThread.lock:
            threading.Thread(target=lambda: os.fork() or (task.status(), os._exit(0))).start()
            assert os.wait()[1] == 0
        """
    )
    assert (done.returncode, done.stderr) == (0, "")


@posix
def test_a_transport_of_the_callers_own_is_refused_in_a_forked_child(served: Simulator) -> None:
    """Its connections are the parent's: to write on them would mix the two processes' answers."""
    done = run_script(
        """
        import httpx
        cv = ConceptViz(polling=FAST, transport=httpx.AsyncHTTPTransport(verify=False))
        unused = ConceptViz(polling=FAST, transport=httpx.AsyncHTTPTransport(verify=False))
        cv.generate("before")
        child = os.fork()
        if child == 0:
            unused.generate("first used here")
            try:
                cv.generate("in the child")
            except RuntimeError as error:
                print(error, flush=True)
            cv.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        cv.generate("after")
        """
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "make a new client, with a new transport, in the child" in done.stdout.replace("Make", "make")


@linux
def test_clients_leave_no_file_open(served: Simulator) -> None:
    """200 of them, half closed and half forgotten."""

    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with ConceptViz(polling=FAST) as first:
        task_id = first.submit("the water cycle").id
        before = open_files()
        for number in range(200):
            cv = ConceptViz(polling=FAST)
            cv.task(task_id).status()
            if number % 2:
                cv.close()
            del cv
        for _ in range(500):  # the forgotten are closed by the loop thread, and the server's ends after them
            if open_files() <= before + 2:
                break
            threading.Event().wait(0.01)
        assert open_files() <= before + 2


def test_the_task_of_a_call_that_was_done_when_it_was_interrupted_is_named(
    client: ConceptViz, caplog: pytest.LogCaptureFixture
) -> None:
    task = client.submit("the water cycle")
    with caplog.at_level(logging.WARNING, "conceptviz"):
        client._blocking._lost(task._task)  # type: ignore[misc]  # it is given
        client._blocking._lost(task.wait())  # type: ignore[misc]  # likewise
        client._blocking._lost([Path()])  # type: ignore[misc]  # likewise
    assert [record.getMessage().count(task.id) for record in caplog.records] == [2, 2]
