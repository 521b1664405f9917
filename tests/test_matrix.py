"""Rows of the fault matrix that belong to no one module: real sockets, and the public client on top of everything.

Each test names its row. The oracle is the server: what it was sent, and in whose ledger the charge is.
"""

import gc
import itertools
import json
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tracemalloc
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import HTTP
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
import trio
from faults.proxy import Proxy, Toxics
from faults.server import PNG, Server, full_port
from faults.steps import Answer, End, Flood, Raw, Script, Step, refusal, refuse
from helpers import (
    KEY,
    QUICK,
    QUICK_POLLING,
    RECEIPT,
    RUNNING,
    TASK,
    answer,
    assert_no_key,
    client,
    completed,
    in_virtual_time,
    png,
)
from raw_server import Connection, RawServer, answering
from trio.testing import MockClock

from conceptviz import (
    AsyncConceptViz,
    AuthenticationError,
    Budget,
    Credits,
    Image,
    InsufficientCreditsError,
    Journal,
    NotSentError,
    Polled,
    Polling,
    PollInterruptedError,
    RateLimitedError,
    SubmissionUnknownError,
    Submitted,
    WaitTimeoutError,
)
from conceptviz._journal import AttemptState

pytestmark = pytest.mark.anyio


def client_of(server: Server | RawServer | Proxy, **options: Any) -> AsyncConceptViz:
    """A client with short times, unless they are given."""
    settings: dict[str, Any] = {"timeout": 2.0, "retries": QUICK, "polling": QUICK_POLLING, **options}
    return AsyncConceptViz(KEY, base_url=server.base_url, **settings)


def ids_of(server: Server) -> list[str | None]:
    """The tasks that were charged."""
    return [post.task_id for post in server.ledger.accepted]


async def test_a_server_whose_queue_is_full_was_sent_nothing() -> None:
    """M2: the connection is neither made nor refused; the deadline ends it, and it is tried again."""
    retried: list[Any] = []
    with full_port() as port:
        base_url = f"http://127.0.0.1:{port}/api/v1"
        async with AsyncConceptViz(KEY, base_url=base_url, timeout=0.1, retries=QUICK, on_event=retried.append) as cv:
            with anyio.fail_after(3), pytest.raises(NotSentError) as caught:
                await cv.submit("a")
    assert len(retried) == 2
    assert caught.value.credits is Credits.NOT_SPENT


async def test_a_name_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """M4: no address, no connection, nothing sent."""

    def unknown(*_: object, **__: object) -> list[Any]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with AsyncConceptViz(KEY, base_url="https://api.test/api/v1", retries=QUICK) as cv:
        with pytest.raises(NotSentError, match=r"api\.test") as caught:
            await cv.submit("a")
    assert_no_key(caught.value)


async def test_a_name_with_a_dead_address_and_a_live_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """M4: the second address is tried, and it is one POST."""

    def both(_: object, port: int, *__: object, **___: object) -> list[Any]:
        dead = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("::1", port, 0, 0))
        return [dead, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    with Server() as server:
        base_url = server.base_url.replace("127.0.0.1", "localhost")
        async with AsyncConceptViz(KEY, base_url=base_url, timeout=2, retries=QUICK) as cv:
            await cv.submit("a")
    assert len(server.ledger.accepted) == len(server.ledger.posts) == 1


async def test_a_connection_that_is_reset_at_once() -> None:
    """M9: before the first byte or after it, which the machine decides; only what was not sent is tried again."""
    retried: list[Any] = []
    with RawServer(Connection.reset) as server:
        async with client_of(server, on_event=retried.append) as cv:
            with pytest.raises((NotSentError, SubmissionUnknownError)) as caught:
                await cv.submit("a")
    assert server.posts == 0
    assert [type(event.error) for event in retried] == [NotSentError] * len(retried)
    assert server.connections == len(retried) + 1
    assert len(retried) == 2 or isinstance(caught.value, SubmissionUnknownError)


async def test_an_upload_that_is_reset_at_any_byte() -> None:
    """M15: from the first byte on it is unknown, and sent once."""
    picture = png(1_000_000)
    for read in (1, 10, 100, *range(1000, 1_000_000, 41_000)):

        def reset(connection: Connection, left: int = read) -> None:
            while left > 0:
                left -= len(connection.read_some(min(left, 65536))) or left
            connection.reset()

        with RawServer(reset) as server:
            async with client_of(server) as cv:
                with pytest.raises(SubmissionUnknownError):
                    await cv.submit_edit("a", picture)
        assert server.connections == 1, read


async def test_an_early_refusal_on_a_connection_that_nobody_reads() -> None:
    """M17: the answer is there and the upload stands still; that ends in time, and is never sent again."""
    with Server(
        Script(posts=(Step(read="head", answer=refusal(401, "INVALID_API_KEY"), end=End.SILENCE),)),
        receive_buffer=4096,
    ) as server:
        async with client_of(server, timeout=0.3) as cv:
            with anyio.fail_after(3), pytest.raises((AuthenticationError, SubmissionUnknownError)):
                await cv.submit_edit("a", png(12_000_000))
    assert len(server.ledger.posts) == 1


def chunked(*lines: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"\r\n".join(lines)


MALFORMED: dict[str, Raw | Flood] = {
    "HTTP/0.9": Raw(b"<html>an answer of 1991</html>"),
    "a status of letters": Raw(b"HTTP/1.1 OK 200\r\n\r\n{}"),
    "a status of 999": Raw(b"HTTP/1.1 999 Odd\r\nContent-Length: 2\r\n\r\n{}"),
    "another protocol": Raw(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "10,000 headers": Raw(b"HTTP/1.1 200 OK\r\n" + b"X-Header: value\r\n" * 10_000 + b"\r\n{}"),
    "an endless header": Flood(b"HTTP/1.1 200 OK\r\nX: ", b"x" * 65536),
    "a length below 0": Raw(b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n{}"),
    "a length of letters": Raw(b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\n{}"),
    "a length and chunks": Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}"),
    "a chunk below 0": Raw(chunked(b"-2", b"{}", b"0", b"", b"")),
    "a chunk with 1 MiB of extension": Raw(chunked(b"2;x=" + b"y" * 2**20, b"{}", b"0", b"", b"")),
    "a chunk that never comes": Raw(chunked(b"ffffff", b"{}")),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_an_answer_that_is_no_http(name: str) -> None:
    """M21, M22, M25: paid for and unreadable: unknown, one POST, and in no more time than an exchange has."""
    with Server(Script(posts=(Step(answer=MALFORMED[name], end=End.FIN),))) as server:
        async with client_of(server) as cv:
            with anyio.fail_after(4), pytest.raises(SubmissionUnknownError) as caught:
                await cv.submit("a")
    assert len(server.ledger.posts) == len(server.ledger.accepted) == 1
    assert_no_key(caught.value)


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_look_whose_answer_is_no_http_is_taken_again(name: str) -> None:
    """M21, M22, M25: a look is free, and the task goes on."""
    with Server(Script(looks=(Step(answer=MALFORMED[name], end=End.FIN),))) as server:
        async with client_of(server) as cv:
            result = await cv.generate("a")
    assert [result.task_id] == ids_of(server)
    assert server.ledger.looks >= 2


async def test_an_endless_header_takes_no_memory() -> None:
    """M22: it is given up long before it fills anything."""
    with Server(Script(posts=(Step(answer=MALFORMED["an endless header"]),))) as server:
        async with client_of(server) as cv:
            tracemalloc.start()
            try:
                with pytest.raises(SubmissionUnknownError):
                    await cv.submit("a")
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
    assert peak < 20 * 2**20


# What saves an image, and is killed in the middle, half of it being on the disk.
SAVES = """
    import sys
    from conceptviz import ConceptViz
    from conceptviz import Image
    with ConceptViz("cvk_a", base_url=sys.argv[1]) as cv:
        print("ready", flush=True)
        cv.save(Image(url=sys.argv[2], prompt="a"), sys.argv[3])
"""


def test_a_download_that_is_killed_leaves_no_image(tmp_path: Path) -> None:
    """M57: no file has the final name until it is whole, and the next run saves it."""
    with Server(Script(images=(Step(answer=Answer(body=png(3_000_000), cut=1_500_000), end=End.SILENCE),))) as server:
        url = f"{server.origin}/images/{TASK}/0.png"
        command = [sys.executable, "-c", textwrap.dedent(SAVES), server.base_url, url, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            give_up = time.monotonic() + 10
            while not any(path.stat().st_size for path in tmp_path.iterdir()) and time.monotonic() < give_up:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        [partial] = tmp_path.iterdir()
        assert partial.stat().st_size > 0
        assert partial.suffix not in {".png", ".jpg"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=20)
    [saved] = tmp_path.glob("*.png")
    assert saved.read_bytes() == PNG


async def test_netrc_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """M66: what it says of the host does not take the key's place, and goes nowhere."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login somebody password sesame\ndefault login somebody password sesame\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    with Server(key=KEY) as server:
        async with client_of(server) as cv:
            image = (await cv.generate("a")).image
            await cv.read(image)
    heads = [head.lower() for head in server.ledger.heads]
    assert [b"authorization: bearer" in head for head in heads] == [True] * (len(heads) - 1) + [False]
    assert not any(b"basic" in head for head in heads)


async def test_a_files_name_stays_at_home(tmp_path: Path) -> None:
    """M71: what is sent is named by this package, so that no name can end its field or its header."""
    name = 'a"; filename="b\r\nX-Injected: 1\r\n\r\né.png'
    path = tmp_path / name
    path.write_bytes(PNG)
    with RawServer(answering(json.dumps(RECEIPT).encode())) as server:
        async with client_of(server) as cv:
            await cv.submit_edit('c"; name="image"\r\n\r\nd', path)
    [request] = server.requests
    kind = request.headers["content-type"]
    message = message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + request.body, policy=HTTP)
    parts = [part for part in message.iter_parts() if isinstance(part, EmailMessage)]
    assert [(part.get_param("name", header="content-disposition"), part.get_filename()) for part in parts] == [
        ("prompt", None),
        ("image", "image-1.png"),
    ]
    assert parts[0].get_payload(decode=True) == b'c"; name="image"\r\n\r\nd'
    assert b"Injected" not in request.body


# Everything that may write to standard error: warnings, a client nobody closes, a traceback, a dump of all threads.
NOISY = """
    import asyncio, faulthandler, logging, sys, warnings
    from conceptviz import AsyncConceptViz
    faulthandler.enable()
    logging.basicConfig(level=1)
    async def main():
        cv = AsyncConceptViz(open(0).read(), base_url=sys.argv[1], timeout=1)
        faulthandler.dump_traceback(all_threads=True)
        asyncio.get_running_loop().create_task(cv.submit("a"))
        await asyncio.sleep(0.1)
        await cv.submit("a")
    asyncio.run(main(), debug=True)
"""


def test_standard_error_never_holds_the_key() -> None:
    """M64: in development mode, with every warning, every logger and a traceback."""
    with Server(Script(posts=(Step(answer=None, end=End.FIN),) * 2)) as server:
        done = subprocess.run(
            [sys.executable, "-X", "dev", "-c", textwrap.dedent(NOISY), server.base_url],
            input=KEY.encode(),
            capture_output=True,
            check=False,
            timeout=20,
        )
    assert done.returncode == 1
    assert b"SubmissionUnknownError" in done.stderr
    assert KEY[4:].encode() not in done.stderr + done.stdout
    assert len(server.ledger.posts) == 2


@pytest.mark.parametrize(
    ("asked", "waited"),
    [
        ("0", True),
        ("-1", True),
        ("NaN", True),
        ("1e9", True),
        ("abc", True),
        ("Wed, 21 Oct 2015 07:28:00 GMT", True),
        ("1000000000", False),
        ("Fri, 21 Oct 2095 07:28:00 GMT", False),
    ],
)
async def test_a_strange_retry_after(asked: str, waited: bool) -> None:
    """M87: what is no number of seconds is not there; what is too long to wait for ends the submit; at most 3 tries."""
    headers = {"retry-after": asked, "date": "Mon, 23 Nov 2026 12:00:00 GMT"}
    cv, script = client(answer(429, {"error": "slow down", "code": "MODERATION_RATE_LIMITED"}, headers))
    async with cv:
        with anyio.fail_after(2), pytest.raises(RateLimitedError) as caught:
            await cv.submit("a")
    assert script.count == (3 if waited else 1)
    assert caught.value.credits is Credits.NOT_SPENT


async def test_one_lost_answer_among_twenty() -> None:
    """M88: nineteen tasks and one unknown; the budget keeps what that one may have cost."""
    budget = Budget(100)
    posts = (*(Step() for _ in range(7)), Step(answer=None, end=End.FIN))
    outcomes: list[str | SubmissionUnknownError] = []
    with Server(Script(posts=posts)) as server:
        async with client_of(server, budget=budget) as cv:

            async def submit(prompt: str) -> None:
                try:
                    outcomes.append((await cv.submit(prompt)).id)
                except SubmissionUnknownError as error:
                    outcomes.append(error)

            async with anyio.create_task_group() as tasks:
                for n in range(20):
                    tasks.start_soon(submit, f"prompt {n}")
    ids = {outcome for outcome in outcomes if isinstance(outcome, str)}
    assert len(ids) == 19
    assert ids < set(ids_of(server))
    assert len(server.ledger.posts) == len(server.ledger.accepted) == 20
    assert (budget.spent, budget.reserved) == (38, 2)


@pytest.mark.parametrize("jump", [-1e7, 1e7])
def test_the_clock_on_the_wall_may_jump(jump: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """M91: waiting goes by the monotonic clock: neither a shorter nor a longer wait, nor a look more."""
    real, jumps = time.time, 0.0

    def jumping() -> float:
        nonlocal jumps
        jumps += jump
        return real() + jumps

    async def main() -> tuple[int, float]:
        cv, script = client(RECEIPT, answer(200, RUNNING, {"date": "Thu, 01 Jan 1970 00:00:00 GMT"}), polling=Polling())
        async with cv:
            started = anyio.current_time()
            with pytest.raises(WaitTimeoutError):
                await cv.generate("a", timeout=60)
            return script.count, anyio.current_time() - started

    monkeypatch.setattr(time, "time", jumping)
    looks, elapsed = in_virtual_time(main)
    assert elapsed == 60
    assert 12 <= looks <= 21


def test_a_laptop_that_slept_does_not_hurry() -> None:
    """M91: after an hour asleep in the middle of a wait the looks that were missed are not made up for."""
    times: list[float] = []

    def on_event(event: object) -> None:
        if isinstance(event, Polled):
            times.append(anyio.current_time())
            if len(times) == 2:
                clock = trio.lowlevel.current_clock()
                assert isinstance(clock, MockClock)
                clock.jump(3600)

    async def main() -> None:
        cv, script = client(RECEIPT, *[RUNNING] * 5, completed("a"), polling=Polling(), on_event=on_event)
        async with cv:
            await cv.generate("a", timeout=7200)
        assert script.count == 7

    in_virtual_time(main)
    pauses = [after - before for before, after in itertools.pairwise(times)]
    assert len(pauses) == 5
    assert pauses[1] >= 3600
    assert min(pauses) >= 3


async def test_a_hook_that_hangs_hears_of_what_is_written_down(tmp_path: Path) -> None:
    """M96: when `Submitted` is told the id is on the disk for every reader, and giving the hook up undoes nothing."""
    file = tmp_path / "journal"
    seen: list[tuple[AttemptState, str | None]] = []

    async def on_event(event: object) -> None:
        if isinstance(event, Submitted):
            with Journal(file) as other:
                seen.extend((entry.state, entry.task_id) for entry in other.entries())
            told.set()
            await anyio.sleep_forever()

    with Server() as server:
        async with client_of(server, journal=file, on_event=on_event) as cv, anyio.create_task_group() as tasks:
            told = anyio.Event()
            tasks.start_soon(cv.submit, "a")
            with anyio.fail_after(5):
                await told.wait()
            tasks.cancel_scope.cancel()
    [task_id] = ids_of(server)
    assert seen == [(AttemptState.ACCEPTED, task_id)]
    with Journal(file) as journal:
        assert [(entry.state, entry.task_id) for entry in journal.entries()] == seen


NONE = Toxics()
# On the way to the server, and on the way back.
TOXICS: dict[str, tuple[Toxics, Toxics]] = {
    "latency and jitter": (Toxics(latency=0.01, jitter=0.02), Toxics(latency=0.01, jitter=0.02)),
    "slices of one byte": (Toxics(piece=1), Toxics(piece=1)),
    "bandwidth": (NONE, Toxics(piece=100, bandwidth=10_000)),
    "a slow close": (Toxics(slow_close=0.1), Toxics(slow_close=0.1)),
    "the answer ends early": (NONE, Toxics(stop_after=100)),
    "the answer ends late": (NONE, Toxics(stop_after=215)),
    "the answer is reset": (NONE, Toxics(stop_after=150, stop="reset")),
    "the answer falls silent": (NONE, Toxics(stop_after=150, stop="silence")),
    "the request ends early": (Toxics(stop_after=100), NONE),
    "the request is reset": (Toxics(stop_after=100, stop="reset"), NONE),
    "the request falls silent": (Toxics(stop_after=100, stop="silence"), NONE),
}
# Where everything arrives, if late.
HARMLESS = ("latency and jitter", "slices of one byte", "bandwidth", "a slow close")


@pytest.mark.parametrize("name", TOXICS)
async def test_whatever_the_way_does_to_it_a_submit_is_sent_once(name: str) -> None:
    """M97: invariants A and B: at most one charge, and its id is known or said to be unknown; in the time it has."""
    requests, answers = TOXICS[name]
    with Server() as server, Proxy(server.port, requests=requests, answers=answers) as proxy:
        timeout = 5.0 if name in HARMLESS else 0.5
        async with client_of(proxy, timeout=timeout) as cv:
            with anyio.fail_after(timeout + 2):
                try:
                    outcome = (await cv.submit("a")).id
                except SubmissionUnknownError:
                    outcome = "unknown"
    assert len(server.ledger.posts) <= 1
    assert len(server.ledger.accepted) <= 1
    assert outcome == "unknown" or [outcome] == ids_of(server)
    assert outcome != "unknown" or name not in HARMLESS


@pytest.mark.parametrize("name", [name for name in TOXICS if "request" not in name])
async def test_whatever_the_way_does_to_looks_the_task_goes_on(name: str) -> None:
    """M97: a paid task is waited for through anything, or the wait ends with its id."""
    requests, answers = TOXICS[name]
    with Server() as server, Proxy(server.port, requests=requests, answers=answers) as proxy:
        async with client_of(server) as cv:
            task = await cv.submit("a")
        async with client_of(proxy, timeout=0.3) as cv:
            with anyio.fail_after(5):
                try:
                    named = (await cv.task(task.id).wait(timeout=0.6)).task_id
                except (PollInterruptedError, WaitTimeoutError) as error:
                    named = error.task_id or ""
    assert [named] == ids_of(server)


def held() -> tuple[int, int]:
    """Return how many objects and how many descriptors this process holds."""
    gc.collect()
    return len(gc.get_objects()), len(list(Path("/dev/fd").iterdir()))


async def test_looks_and_clients_leave_nothing_behind() -> None:
    """M99: no look and no client keeps an object or a descriptor."""

    async def looks(count: int) -> None:
        for _ in range(count):
            await task.status()

    async def clients(count: int) -> None:
        for _ in range(count):
            await AsyncConceptViz(KEY).aclose()

    transport = httpx.MockTransport(lambda _: httpx.Response(200, json=RUNNING))
    async with AsyncConceptViz(KEY, transport=transport) as cv:
        task = cv.task(TASK)
        for work, count in ((looks, 300), (clients, 3000)):
            await work(10)
            objects, descriptors = held()
            await work(count)
            after = held()
            assert after[0] - objects < count // 10
            assert after[1] == descriptors


async def test_answers_in_segments_of_one_byte() -> None:
    """M100: a submit, an edit, a refusal, a wait and an image come out as they do in one piece."""
    posts = (Step(task_id="first"), Step(task_id="second"), refuse(402, "INSUFFICIENT_CREDITS", credits_remaining=1))
    told = []
    for answers in (Toxics(), Toxics(piece=1, bandwidth=100_000)):
        with Server(Script(posts=posts)) as server, Proxy(server.port, answers=answers) as proxy:
            async with client_of(proxy) as cv:
                submitted, edited = await cv.submit(["a", "b"]), await cv.submit_edit("c", PNG)
                with pytest.raises(InsufficientCreditsError) as caught:
                    await cv.submit("d")
                result = await cv.task("first").wait()
                image = await cv.read(Image(url=f"{proxy.origin}/images/first/0.png", prompt="a"))
        assert len(server.ledger.posts) == 3
        prompts = [image.prompt for image in result.images]
        told.append(
            (submitted.submission, edited.submission, caught.value.body, caught.value.credits_remaining, prompts, image)
        )
    assert told[0] == told[1]
    assert told[0][0] is not None
