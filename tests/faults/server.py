"""The ConceptViz API on raw sockets: it breaks what its script says, and keeps a ledger of what it charged.

The ledger is the oracle of the tests, so this is written to be obviously right: a thread for each connection, blocking
calls, no HTTP library, nothing of the package under test and nothing of its event loop.

    with Server(Script(posts=(Step(answer=None, end=End.FIN),))) as server:
        ...  # a submit to server.base_url is charged, and never answered
    assert len(server.ledger.accepted) == 1
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from urllib.parse import unquote

from attrs import define, frozen

from .listener import Listener
from .steps import TASK, Answer, End, Flood, Ledger, Post, Raw, Script, Step, json_answer, refusal

PNG = base64.b64decode(b"iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
# Source: "Base URL", "Step 2: Poll for Results".
API = "/api/v1"
# Source: "Credit Cost".
CREDITS = {("cv-2", "2k"): 2, ("cv-1", "2k"): 1, ("cv-1", "4k"): 2}

_FIELD = re.compile(rb'name="([a-zA-Z]+)"\r\n\r\n(.*?)\r\n--', re.DOTALL)


@frozen
class _Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@define
class _Task:
    post: Post
    due: float


class _Wire:
    """One connection's bytes. EOFError says that the client ended where more was needed."""

    def __init__(self, sock: socket.socket, over: threading.Event, count: Callable[[int], None]) -> None:
        self.sock = sock
        self.buffer = bytearray()
        self._over = over
        self._count = count

    def until(self, mark: bytes) -> int:
        """Wait for a mark; return where it ends."""
        while mark not in self.buffer:
            self._receive()
        return self.buffer.index(mark) + len(mark)

    def wait_for(self, size: int) -> None:
        """Wait until so many bytes have arrived."""
        while len(self.buffer) < size:
            self._receive()

    def take(self, size: int) -> bytes:
        taken = bytes(self.buffer[:size])
        del self.buffer[:size]
        return taken

    def _receive(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError
        self.buffer += data
        self._count(len(data))

    def send(self, data: bytes, pause: float = 0.0) -> None:
        """Send bytes in one go, or one by one with a pause after each."""
        if not pause:
            self.sock.sendall(data)
            return
        for byte in data:
            self.sock.sendall(bytes([byte]))
            self._over.wait(pause)

    def finish(self, end: End) -> None:
        if end is End.FIN:
            # To close at once would send a RST if the client is still sending.
            self.sock.shutdown(socket.SHUT_WR)
            while self.sock.recv(65536):
                pass
        elif end is End.RST:
            # A linger time of 0 makes close() send a RST.
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.sock.close()
        elif end is End.SILENCE:
            self._over.wait()


class Server(Listener):
    """The API on 127.0.0.1, until `close()`: then its ledger is whole.

    Args:
        script: What goes wrong.
        key: The API key that is asked for; None takes any.
        task_seconds: How long a task takes.
        credits: The account's credits.
        image_origin: Where images are said to be, such as another server's `origin`; None is here.
        receive_buffer: The size in bytes of the kernel's receive buffer: a small one, for a small upload to fill.
        listen_after: The seconds for which connections are refused; None is until `listen()`.
    """

    def __init__(
        self,
        script: Script | None = None,
        *,
        key: str | None = None,
        task_seconds: float = 0.0,
        credits: int = 1000,
        image_origin: str | None = None,
        receive_buffer: int | None = None,
        listen_after: float | None = 0.0,
    ) -> None:
        super().__init__(receive_buffer)
        self.ledger = Ledger()
        self._told = threading.Event()
        self._script = script or Script()
        self._key = key
        self._task_seconds = task_seconds
        self._credits = credits
        self._tasks: dict[str, _Task] = {}
        self._steps = {
            "connection": iter(self._script.connections),
            "post": iter(self._script.posts),
            "look": iter(self._script.looks),
            "image": iter(self._script.images),
        }
        self.base_url = self.origin + API
        self._image_origin = image_origin or self.origin
        if listen_after is not None:
            self.listen(listen_after)

    def tell(self) -> None:
        """Let the answers go that wait for it."""
        self._told.set()

    def close(self) -> None:
        """Break off whatever is under way, and wait for it to end."""
        self._told.set()
        super().close()

    def _welcome(self, sock: socket.socket) -> Callable[[], None]:
        self.ledger.connections += 1
        return partial(self._serve, sock, next(self._steps["connection"], None))

    def _serve(self, sock: socket.socket, step: Step | None) -> None:
        wire = _Wire(sock, self._over, self._count)
        try:
            if step is not None:
                assert isinstance(step.read, int)
                wire.wait_for(step.read)
                self._answer(wire, step.answer, Answer(), "")
                wire.finish(step.end)
            else:
                while self._exchange(wire):
                    pass
        except (OSError, EOFError):
            pass  # the client is gone: scripts bring that about
        finally:
            self._let_go(sock)

    def _count(self, size: int) -> None:
        with self._lock:
            self.ledger.received += size

    def _exchange(self, wire: _Wire) -> bool:
        """Do one exchange; return whether the connection is kept for another."""
        line = bytes(wire.buffer[: wire.until(b"\r\n")]).decode("latin-1")
        method, path, *_ = line.split(" ")
        kind = "post" if method == "POST" else "look" if path.startswith(f"{API}/task/") else "image"
        with self._lock:
            step = next(self._steps[kind], None) or Step()
            post = self._note(kind, path)
        request = self._read(wire, step, method, path)
        if post is None:
            correct, task_id = self._look(request, path) if kind == "look" else (_picture(), "")
        else:
            correct = self._submit(post, request, step)
            task_id = post.task_id or ""
        self._over.wait(step.delay)
        if step.until_told:
            self._told.wait()
        self._answer(wire, step.answer, correct, task_id)
        if post is not None and isinstance(step.answer, Answer) and step.answer.is_whole:
            post.answered = step.answer.status or correct.status
        if step.end is End.KEEP and request is not None and request.headers.get("connection", "").lower() != "close":
            return True
        wire.finish(End.FIN if step.end is End.KEEP else step.end)
        return False

    def _note(self, kind: str, path: str) -> Post | None:
        if kind == "look":
            self.ledger.looks += 1
        elif kind == "image":
            self.ledger.images += 1
        else:
            post = Post(len(self.ledger.posts) + 1, path, time.monotonic())
            self.ledger.posts.append(post)
            return post
        return None

    def _read(self, wire: _Wire, step: Step, method: str, path: str) -> _Request | None:
        """Read as much of a request as the step says; None if that is not the whole of it."""
        if isinstance(step.read, int):
            wire.wait_for(step.read)
            with self._lock:
                self.ledger.heads.append(bytes(wire.buffer[: step.read]))
            return None
        head = wire.take(wire.until(b"\r\n\r\n"))
        with self._lock:
            self.ledger.heads.append(head)
        if step.read == "head":
            return None
        lines = head.decode("latin-1").split("\r\n")[1:-2]
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        size = int(headers.get("content-length", "0"))
        wire.wait_for(size)
        return _Request(method, path, headers, wire.take(size))

    def _submit(self, post: Post, request: _Request | None, step: Step) -> Answer:
        """Take a submit into the ledger, charged or not; return the correct answer to it."""
        if request is None:
            return refusal(400, "INVALID_BODY")
        fields = _fields(request)
        prompts = fields.get("prompts", [fields.get("prompt")])
        post.whole = True
        post.body_sha256 = hashlib.sha256(request.body).hexdigest()
        if isinstance(prompts, list):
            post.prompts = tuple(prompt for prompt in prompts if isinstance(prompt, str) and prompt)
        settings = str(fields.get("model", "cv-2")), str(fields.get("quality", "2k"))
        if not self._is_allowed(request):
            return refusal(401, "INVALID_API_KEY")
        if post.path not in {f"{API}/generate", f"{API}/edit"}:
            return Answer(status=404, body=b"Not Found")
        if not fields:
            return refusal(400, "INVALID_BODY")
        if not post.prompts:
            return refusal(400, "PROMPT_REQUIRED")
        if len(post.prompts) > 4:
            return refusal(400, "TOO_MANY_PROMPTS")
        if settings not in CREDITS:
            return refusal(400, "UNSUPPORTED_MODEL")
        cost = CREDITS[settings] * len(post.prompts)
        with self._lock:
            if cost > self._credits:
                return refusal(402, "INSUFFICIENT_CREDITS", credits_remaining=self._credits)
            if not step.charge:
                return refusal(500, "CREDIT_CONSUMPTION_FAILED")
            self._credits -= cost
            remaining, now = self._credits, time.monotonic()
            # 21 characters of A-Za-z0-9_-, as the API has them, and never two alike.
            post.task_id = step.task_id if step.task_id is not None else secrets.token_urlsafe(16)[:21]
            post.credits, post.charged_at = cost, now
            self._tasks[post.task_id] = _Task(post, now + self._task_seconds)
        return json_answer(
            {
                "taskId": post.task_id,
                "status": "pending",
                "model": settings[0],
                "quality": settings[1],
                "aspect_ratio": fields.get("aspectRatio", "16:9"),
                "credits_used": cost,
                "credits_remaining": remaining,
                "poll_url": f"{API}/task/{post.task_id}",
            },
            200,
            b"Content-Type: application/json",
        )

    def _look(self, request: _Request | None, path: str) -> tuple[Answer, str]:
        """Return the correct answer to a look, and the id that it asks for."""
        task_id = unquote(path.removeprefix(f"{API}/task/"))
        if request is None or not self._is_allowed(request):
            return refusal(401, "INVALID_API_KEY"), task_id
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None:
                return refusal(404, "TASK_NOT_FOUND"), task_id
            if time.monotonic() < task.due:
                return json_answer({"status": "processing"}), task_id
            if not self._script.tasks_fail:
                url = f"{self._image_origin}/images/{task_id}"
                images = [{"url": f"{url}/{n}.png", "prompt": prompt} for n, prompt in enumerate(task.post.prompts)]
                return json_answer({"status": "completed", "images": images}), task_id
            task.post.refunded = task.post.credits
            failed = {"status": "failed", "error": "It failed.", "code": "GENERATION_FAILED", "credits_refunded": True}
            return json_answer(failed), task_id

    def _is_allowed(self, request: _Request) -> bool:
        return self._key is None or request.headers.get("authorization") == f"Bearer {self._key}"

    def _answer(self, wire: _Wire, answer: Answer | Raw | Flood | None, correct: Answer, task_id: str) -> None:
        if isinstance(answer, Raw):
            wire.send(answer.data.replace(TASK, task_id.encode()))
        elif isinstance(answer, Flood):
            wire.send(answer.first)
            while not self._over.wait(answer.pause):
                wire.send(answer.again)
        elif answer is not None:
            head, body = answer.render(correct, task_id)
            if answer.head_pause or answer.body_pause:
                wire.send(head, answer.head_pause)
                wire.send(body, answer.body_pause)
                wire.send(answer.after)
            else:
                wire.send(head + body + answer.after)


def _picture() -> Answer:
    return Answer(status=200, body=PNG, headers=(b"Content-Type: image/png",))


def _fields(request: _Request) -> dict[str, Any]:
    """Read the fields of a submit, JSON or multipart; an unreadable one has none."""
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        return {name.decode(): value.decode() for name, value in _FIELD.findall(request.body)}
    try:
        fields = json.loads(request.body)
    except ValueError:
        return {}
    return fields if isinstance(fields, dict) else {}


@contextmanager
def refusing_port() -> Iterator[int]:
    """Hold a port of 127.0.0.1 on which nobody listens: every connection to it is refused."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def full_port() -> Iterator[int]:
    """Hold a port whose queue of waiting connections is full: a new one is neither made nor refused."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        try:
            for filler in fillers:
                filler.setblocking(False)
                filler.connect_ex(("127.0.0.1", port))
            yield port
        finally:
            for filler in fillers:
                filler.close()
