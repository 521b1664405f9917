"""The fault laboratory itself: each fault does what it says, and the ledger counts right.

The client is a plain socket, or httpx where it is a whole client that matters: nothing of the package under test.
"""

import gzip
import hashlib
import json
import socket
import time
from typing import Any

import httpx
import pytest

from .caller import CLOSE, KEY, Caller, ask, body_of, look, post, serve
from .server import PNG, Server, full_port, refusing_port
from .steps import Answer, End, Flood, Post, Raw, Script, Step, json_answer, refusal, refuse

OK = b"HTTP/1.1 200 Status\r\n"
JSON = b"Content-Type: application/json\r\n"


def only(server: Server) -> Post:
    """Close the server, and return its only POST."""
    server.close()
    [entry] = server.ledger.posts
    return entry


def test_a_correct_submit_is_in_the_ledger_with_all_that_is_known_of_it() -> None:
    before = time.monotonic()
    request = post("the water cycle", model="cv-1", quality="4k")
    with serve(key=KEY, credits=10) as server:
        data, end = ask(server, request)
    receipt = body_of(data)
    [entry] = server.ledger.posts
    assert end == "fin"
    assert data.startswith(b"HTTP/1.1 200 ")
    assert b"Content-Type: application/json" in data
    assert entry.task_id == receipt["taskId"]
    assert len(receipt["taskId"]) == 21
    assert receipt == {
        "taskId": entry.task_id,
        "status": "pending",
        "model": "cv-1",
        "quality": "4k",
        "aspect_ratio": "16:9",
        "credits_used": 2,
        "credits_remaining": 8,
        "poll_url": f"/api/v1/task/{entry.task_id}",
    }
    assert (entry.number, entry.path, entry.whole, entry.answered) == (1, "/api/v1/generate", True, 200)
    assert entry.prompts == ("the water cycle",)
    assert entry.body_sha256 == hashlib.sha256(request.partition(b"\r\n\r\n")[2]).hexdigest()
    assert entry.charged_at is not None
    assert before <= entry.at <= entry.charged_at <= time.monotonic()
    assert (server.ledger.charged, server.ledger.refunded, server.ledger.connections) == (2, 0, 1)
    assert server.ledger.heads == [request.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"]


def test_a_whole_task_with_a_real_client() -> None:
    """Submit, look twice, fetch: over one kept connection, and with another origin's image if that is asked for."""
    with Server(task_seconds=0.05) as server, httpx.Client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        receipt = client.post(f"{server.base_url}/generate", json={"prompts": ["a", "é"]}).json()
        task = f"{server.base_url}/task/{receipt['taskId']}"
        assert client.get(task).json() == {"status": "processing"}
        time.sleep(0.06)
        done = client.get(task).json()
        assert [image["prompt"] for image in done["images"]] == ["a", "é"]
        image = client.get(done["images"][0]["url"])
    assert image.content == PNG
    assert image.headers["content-type"] == "image/png"
    ledger = server.ledger
    assert (ledger.connections, ledger.looks, ledger.images, ledger.requests) == (1, 2, 1, 4)
    assert (ledger.charged, ledger.accepted[0].prompts) == (4, ("a", "é"))
    assert len(ledger.heads) == 4


def test_images_elsewhere() -> None:
    with Server() as elsewhere, Server(image_origin=elsewhere.origin) as server:
        task = body_of(ask(server, post())[0])["taskId"]
        url = body_of(ask(server, look(task))[0])["images"][0]["url"]
    assert url.startswith(f"{elsewhere.origin}/images/")


def test_an_edit_as_multipart() -> None:
    with Server() as server:
        httpx.post(f"{server.base_url}/edit", data={"prompt": "é\n", "model": "cv-1"}, files={"image": PNG})
    [entry] = server.ledger.posts
    assert (entry.path, entry.prompts, entry.credits) == ("/api/v1/edit", ("é\n",), 1)


@pytest.mark.parametrize(
    ("request_", "status", "code"),
    [
        (post(key="cvk_other"), 401, "INVALID_API_KEY"),
        (post(prompt=""), 400, "PROMPT_REQUIRED"),
        (post(prompts=[]), 400, "PROMPT_REQUIRED"),
        (post(prompts="abc"), 400, "PROMPT_REQUIRED"),
        (post(prompts=["a"] * 5), 400, "TOO_MANY_PROMPTS"),
        (post(model="cv-3"), 400, "UNSUPPORTED_MODEL"),
        (post(model=[]), 400, "UNSUPPORTED_MODEL"),
        (post(prompts=["a"] * 4), 402, "INSUFFICIENT_CREDITS"),
        (post().replace(b"{", b"["), 400, "INVALID_BODY"),
        (look("nobody's"), 404, "TASK_NOT_FOUND"),
        (look().replace(KEY.encode(), b"cvk_other"), 401, "INVALID_API_KEY"),
    ],
)
def test_what_is_not_as_documented_is_not_charged(request_: bytes, status: int, code: str) -> None:
    with Server(key=KEY, credits=7) as server:
        data, _ = ask(server, request_)
    assert data.startswith(b"HTTP/1.1 %d " % status)
    assert body_of(data)["code"] == code
    assert server.ledger.accepted == []
    assert [entry.answered for entry in server.ledger.posts] in ([], [status])


def test_a_post_to_a_path_that_is_no_endpoint_is_not_charged() -> None:
    with Server() as server:
        data, _ = ask(server, post(path="/api/v1/generate"))
    assert data.startswith(b"HTTP/1.1 404 ")
    assert only(server).task_id is None


def test_the_balance_falls_with_every_charge() -> None:
    with Server(credits=4) as server:
        left = [body_of(ask(server, post())[0])["credits_remaining"] for _ in range(3)]
    assert left == [2, 0, 0]
    assert server.ledger.charged == 4
    assert [entry.answered for entry in server.ledger.posts] == [200, 200, 402]


def test_a_task_of_any_id_can_be_looked_at() -> None:
    with serve(Step(task_id="../a b")) as server:
        assert body_of(ask(server, post())[0])["taskId"] == "../a b"
        assert body_of(ask(server, look("..%2Fa%20b"))[0])["status"] == "completed"


def test_a_failed_task_is_refunded_once() -> None:
    with Server(Script(tasks_fail=True)) as server:
        task = body_of(ask(server, post())[0])["taskId"]
        states = [body_of(ask(server, look(task))[0]) for _ in range(2)]
    assert states[0] == states[1]
    assert (states[0]["status"], states[0]["credits_refunded"]) == ("failed", True)
    assert (server.ledger.charged, server.ledger.refunded) == (2, 2)


def test_each_request_takes_the_next_step_of_its_kind() -> None:
    """A look takes no POST's step; after the last step everything is correct."""
    looks = (Step(answer=json_answer({"status": "queued"})),)
    script = Script(
        posts=(refuse(429, "SLOW", b"Retry-After: 1"), Step()), looks=looks, images=(Step(answer=Raw(b"?")),)
    )
    with Server(script) as server, Caller(server.port) as caller:
        assert b"Retry-After: 1\r\n" in caller.send(post(headers="")).until(b"}")
        assert b'"queued"' in caller.send(look(headers="")).until(b"}")
        task = body_of(caller.send(post(headers="")).until(b"}"))["taskId"]
        assert b'"completed"' in caller.send(look(task, headers="")).until(b"]}")
        assert caller.send(b"GET /images/x HTTP/1.1\r\n\r\n").until(b"?") == b"?"
    assert [(entry.number, entry.answered, entry.task_id) for entry in server.ledger.posts] == [
        (1, 429, None),
        (2, 200, task),
    ]
    assert server.ledger.connections == 1


def test_a_connection_is_kept_unless_the_client_closes_it() -> None:
    with Server() as server:
        assert ask(server, post(headers=""), "open")[1] == "open"
        assert ask(server, post(headers=CLOSE))[1] == "fin"


def test_refused() -> None:
    with refusing_port() as port, pytest.raises(ConnectionRefusedError):
        Caller(port)


def test_refused_until_it_listens() -> None:
    with Server(listen_after=None) as server:
        with pytest.raises(ConnectionRefusedError):
            Caller(server.port)
        server.listen()
        assert body_of(ask(server, post())[0])["credits_used"] == 2


def test_refused_for_a_while() -> None:
    with Server(listen_after=0.1) as server:
        with pytest.raises(ConnectionRefusedError):
            Caller(server.port)
        time.sleep(0.2)
        assert body_of(ask(server, post())[0])["credits_used"] == 2


def test_close_while_it_still_refuses() -> None:
    started = time.monotonic()
    Server(listen_after=10.0).close()
    assert time.monotonic() - started < 2


def test_a_full_queue_neither_takes_nor_refuses_a_connection() -> None:
    with full_port() as port, pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", port), timeout=0.15)


@pytest.mark.parametrize(
    ("end", "seen"), [(End.FIN, "fin"), (End.RST, "rst"), (End.SILENCE, "open")], ids=["fin", "rst", "silence"]
)
class TestEnds:
    def test_at_accept(self, end: End, seen: str) -> None:
        """Nothing is read: there is no request. The connection after that is not affected."""
        script = Script(connections=(Step(read=0, answer=None, end=end), None))
        with Server(script, listen_after=None) as server:
            server.queue()
            with Caller(server.port) as caller:
                server.listen()
                assert caller.to_end(seen) == (b"", seen)
            assert body_of(ask(server, post())[0])["status"] == "pending"
        assert (server.ledger.connections, len(server.ledger.posts)) == (2, 1)

    def test_after_some_bytes_of_a_connection(self, end: End, seen: str) -> None:
        with Server(Script(connections=(Step(read=3, answer=None, end=end),))) as server, Caller(server.port) as caller:
            assert caller.send(b"PO").to_end("open") == (b"", "open")
            assert caller.send(b"S").to_end(seen) == (b"", seen)
        assert server.ledger.requests == 0

    @pytest.mark.parametrize("read", [60, "head"])
    def test_after_a_part_of_a_request(self, read: Any, end: End, seen: str) -> None:
        with serve(Step(read=read, answer=None, end=end)) as server, Caller(server.port) as caller:
            caller.send(post()[:50])
            time.sleep(0.02)
            assert caller.send(post()[50:-1]).to_end(seen) == (b"", seen)
        entry = only(server)
        assert (entry.whole, entry.body_sha256, entry.task_id, entry.answered) == (False, "", None, None)
        assert server.ledger.heads == [post()[:60] if read == 60 else post().partition(b"{")[0]]

    def test_before_the_charge(self, end: End, seen: str) -> None:
        with serve(Step(charge=False, answer=None, end=end)) as server:
            assert ask(server, post(), seen) == (b"", seen)
        entry = only(server)
        assert (entry.whole, entry.task_id, entry.answered) == (True, None, None)

    def test_after_the_charge(self, end: End, seen: str) -> None:
        with serve(Step(answer=None, end=end)) as server:
            assert ask(server, post(), seen) == (b"", seen)
        entry = only(server)
        assert entry.task_id is not None
        assert (entry.credits, entry.answered) == (2, None)

    def test_after_the_answer(self, end: End, seen: str) -> None:
        with serve(Step(end=end)) as server, Caller(server.port) as caller:
            caller.send(post(headers="")).until(b"}")
            assert caller.to_end(seen) == (b"", seen)
        assert only(server).answered == 200

    def test_in_the_body_of_the_answer(self, end: End, seen: str) -> None:
        with serve(Step(answer=Answer(cut=12), end=end)) as server, Caller(server.port) as caller:
            data = caller.send(post()).until(b'{"taskId": "')
            assert data.endswith(b'\r\n\r\n{"taskId": "')
            assert caller.to_end(seen) == (b"", seen)
        entry = only(server)
        assert entry.task_id is not None
        assert entry.answered is None


def test_an_early_answer_charges_nothing() -> None:
    """Answered after the head, while the client still has megabytes to send; and a FIN is read as such."""
    with serve(Step(read="head", answer=refusal(402, "INSUFFICIENT_CREDITS"), end=End.FIN)) as server:
        head = post().partition(b"{")[0].replace(b"Content-Length: 15", b"Content-Length: 15000000")
        with Caller(server.port) as caller:
            data = caller.send(head).until(b"}")
            caller.send(bytes(3_000_000))
            assert caller.to_end() == (b"", "fin")
    assert b" 402 " in data
    assert only(server).task_id is None


def test_it_stops_reading() -> None:
    step = Step(read="head", answer=None, end=End.SILENCE)
    with serve(step, receive_buffer=4096) as server, Caller(server.port) as caller:
        caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        caller.sock.settimeout(0.2)
        with pytest.raises(TimeoutError):
            caller.send(post("a" * 200_000))
    assert not only(server).whole


def test_the_answer_is_late_and_the_charge_is_not() -> None:
    with serve(Step(delay=10.0)) as server:
        assert ask(server, post(), "open") == (b"", "open")
        assert len(server.ledger.accepted) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (Answer(body=b"x"), OK + JSON + b"Content-Length: 1\r\n\r\nx"),
        (Answer(body=b"", headers=(b"Content-Type: a/b",)), OK + b"Content-Type: a/b\r\nContent-Length: 0\r\n\r\n"),
        (
            Answer(status=302, body=b"", headers=(b"Location: /@task@",)),
            b"HTTP/1.1 302 Status\r\nLocation: /ID\r\n" + JSON + b"Content-Length: 0\r\n\r\n",
        ),
        (
            Answer(body=b"@task@", framing="chunked"),
            OK + JSON + b"Transfer-Encoding: chunked\r\n\r\n2\r\nID\r\n0\r\n\r\n",
        ),
        (Answer(body=b"x", framing="none"), OK + JSON + b"\r\nx"),
        (Answer(body=b"x", framing=b"Content-Length: -1"), OK + JSON + b"Content-Length: -1\r\n\r\nx"),
        (
            Answer(body=b"xyz", cut=-1, interim=b"HTTP/1.1 103 E\r\n\r\n", after=b"more"),
            b"HTTP/1.1 103 E\r\n\r\n" + OK + JSON + b"Content-Length: 3\r\n\r\nxymore",
        ),
        (Raw(b"!@#$ @task@"), b"!@#$ ID"),
    ],
)
def test_what_an_answer_is_on_the_wire(answer: Answer | Raw, expected: bytes) -> None:
    with serve(Step(task_id="ID", answer=answer)) as server:
        assert ask(server, post())[0] == expected
    entry = only(server)
    assert entry.task_id == "ID"
    well_formed = isinstance(answer, Answer) and answer.cut is None and not isinstance(answer.framing, bytes)
    assert entry.answered == ((answer.status or 200) if well_formed and isinstance(answer, Answer) else None)


def test_gzip() -> None:
    with serve(Step(answer=Answer(gzip=True))) as server:
        head, _, body = ask(server, post())[0].partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert b"Content-Length: %d" % len(body) in head
    assert json.loads(gzip.decompress(body))["taskId"] == only(server).task_id


def test_a_second_answer_in_the_same_segment() -> None:
    """What a client that keeps connections may take for the answer to its next request."""
    after = b"HTTP/1.1 200 Desync\r\nContent-Length: 0\r\n\r\n"
    with serve(Step(answer=Answer(after=after))) as server, Caller(server.port) as caller:
        data = caller.send(post()).sock.recv(65536)
    assert data.endswith(b"}" + after)


@pytest.mark.parametrize("where", ["head_pause", "body_pause"])
def test_a_drip_comes_byte_by_byte(where: str) -> None:
    options: Any = {where: 0.004}
    answer = Answer(body=b"0123456789" * 2, framing=b"X: y", **options)
    pieces = 0
    with serve(Step(answer=answer, end=End.FIN)) as server, Caller(server.port) as caller:
        caller.send(post())
        while caller.sock.recv(65536):
            pieces += 1
    size = (
        20 if where == "body_pause" else len(b"HTTP/1.1 200 Status\r\nContent-Type: application/json\r\nX: y\r\n\r\n")
    )
    # Some of them may be read together on a busy machine.
    assert size / 3 < pieces <= size + 1


@pytest.mark.parametrize("pause", [0.0, 0.001])
def test_a_flood_ends_when_the_client_goes(pause: float) -> None:
    with serve(Step(answer=Flood(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", pause))) as server:
        with Caller(server.port) as caller:
            data = caller.send(post()).until(b"X: y\r\n" * 5)
        assert data.startswith(b"HTTP/1.1 200 OK\r\nX: y\r\n")
        assert body_of(ask(server, post())[0])["status"] == "pending"


@pytest.mark.parametrize("answer", [Flood(b"", b"x" * 65536), Flood(b"", b"", 10.0), None])
def test_close_breaks_off_whatever_is_under_way(answer: Flood | None) -> None:
    server = serve(Step(answer=answer, end=End.SILENCE))
    with Caller(server.port) as caller:
        caller.send(post())
        while not server.ledger.accepted:
            time.sleep(0.005)
        started = time.monotonic()
        server.close()
        assert time.monotonic() - started < 2


def test_submits_at_once_are_all_counted() -> None:
    with Server() as server:
        callers = [Caller(server.port) for _ in range(20)]
        for caller in callers:
            caller.send(post())
        ids = {body_of(caller.until(b"}"))["taskId"] for caller in callers}
        for caller in callers:
            caller.sock.close()
    assert {entry.task_id for entry in server.ledger.accepted} == ids
    assert [entry.number for entry in server.ledger.posts] == list(range(1, 21))
    assert (len(ids), server.ledger.charged) == (20, 40)
