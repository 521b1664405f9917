"""The API as a stub for thousands of tasks at once: each takes its time, and the server keeps the books.

It is a process of its own, with one event loop and raw protocols: it prints its port and ends with its standard input.
A task's duration is drawn by its number, so that every client meets the same ones. `GET /stats` answers what was seen
so far: connections, requests, and for each task how long it was ready before the first look that found it so. That
delay is the server's own, and so the same measure for every client. The shapes in which rivals ask their own services
lead to the same tasks. It must never become a simulator: that is `conceptviz.simulator`.

python benchmarks/_fanout_server.py SCALE LATENCY_MS
    SCALE       1 for real time (30 to 90 s for a task), 0.1 for a tenth of it
    LATENCY_MS  how long each answer is held back
"""

from __future__ import annotations

import asyncio
import gc
import json
import random
import re
import sys
from collections.abc import Callable
from statistics import fmean, quantiles

# "Typical generation takes 30-90 seconds."
DURATIONS = (30.0, 90.0)
SEED = 20261125
# Of 21 characters, as the ids of the API.
ID = "benchmark-task-%06d"
_NUMBER = re.compile(rb"benchmark-task-([0-9]{6})")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding:", re.IGNORECASE)
_HEAD = b"HTTP/1.1 %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
_NOT_FOUND = _HEAD % (b"404 Not Found", 2) + b"{}"


def build_answer(data: object) -> bytes:
    body = json.dumps(data).encode()
    return _HEAD % (b"200 OK", len(body)) + body


class Task:
    """A generation: when it is ready, and when it was first seen to be."""

    __slots__ = ("found_at", "id", "prompts", "ready_at")

    def __init__(self, number: int, prompts: list[str], ready_at: float) -> None:
        self.id = ID % number
        self.prompts = prompts
        self.ready_at = ready_at
        self.found_at: float | None = None


class Connection(asyncio.Protocol):
    """One connection, and the requests that come on it, one after another."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._received = b""
        # None until the first request; True while all that came were POSTs.
        self.only_posts: bool | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._server.opened += 1
        self._server.open += 1
        self._server.most_open = max(self._server.most_open, self._server.open)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - a name that asyncio gives
        self._server.open -= 1
        self._server.open_to_look -= self.only_posts is False

    def data_received(self, data: bytes) -> None:
        self._received += data
        while True:
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if not end:
                return
            length = 0
            if not head.startswith(b"GET "):
                found = _LENGTH.search(head)
                length = int(found[1]) if found else 0
                if _CHUNKED.search(head):
                    # No client here sends one: it would be a fault of the benchmark, which the client will report.
                    self._transport.abort()
                    return
                if len(rest) < length:
                    return
            self._received = rest[length:]
            self._answer(head, rest[:length])

    def _answer(self, head: bytes, body: bytes) -> None:
        server = self._server
        method, path, _ = head.split(b" ", 2)
        is_post = method == b"POST"
        if path == b"/stats":
            server.opened -= 1  # the benchmark's own
        elif self.only_posts is not False:
            if self.only_posts is None and is_post:
                self.only_posts = True
            elif not is_post:
                self.only_posts = False
                server.opened_to_look += 1
                server.open_to_look += 1
                server.most_open_to_look = max(server.most_open_to_look, server.open_to_look)
        answer = server.answer(is_post, path, body)
        if server.latency:
            server.loop.call_later(server.latency, self._write, answer)
        else:
            self._transport.write(answer)

    def _write(self, answer: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(answer)


class Server:
    """The tasks, the books, and the answers."""

    def __init__(self, loop: asyncio.AbstractEventLoop, scale: float, latency: float) -> None:
        self.loop = loop
        self.latency = latency
        self._scale = scale
        self._rng = random.Random(SEED)
        self._tasks: list[Task] = []
        self._origin = ""
        self.opened = self.open = self.most_open = 0
        self.opened_to_look = self.open_to_look = self.most_open_to_look = 0
        self._posts = self._looks = self._unknown = 0
        self._processing = build_answer({"status": "processing"})

    def listens_at(self, port: int) -> None:
        self._origin = f"http://127.0.0.1:{port}"

    def answer(self, is_post: bool, path: bytes, body: bytes) -> bytes:
        """Answer one request, in the shape that its path asks for."""
        if path == b"/stats":
            return build_answer(self._stats())
        for prefix, accepted, seen in SHAPES:
            if path.startswith(prefix):
                if is_post:
                    self._posts += 1
                    return build_answer(accepted(self._accept(body), self._origin))
                number = _NUMBER.search(path)
                if number is None or int(number[1]) >= len(self._tasks):
                    break
                self._looks += 1
                task = self._tasks[int(number[1])]
                now = self.loop.time()
                if now >= task.ready_at and task.found_at is None:
                    task.found_at = now
                if seen is see and now < task.ready_at:
                    return self._processing
                return build_answer(seen(task, now >= task.ready_at, path))
        self._unknown += 1
        return _NOT_FOUND

    def _accept(self, body: bytes) -> Task:
        duration = self._rng.uniform(*DURATIONS) * self._scale
        try:
            sent = json.loads(body)
            prompts = sent.get("prompts") or [sent.get("prompt", "")]
        except ValueError:  # a rival's form
            prompts = [""]
        task = Task(len(self._tasks), prompts, self.loop.time() + duration)
        self._tasks.append(task)
        return task

    def _stats(self) -> dict[str, float]:
        delays = [task.found_at - task.ready_at for task in self._tasks if task.found_at is not None]
        # One delay is its own percentile; of none there is nothing to tell.
        late = quantiles(delays, n=20, method="inclusive")[-1] if len(delays) > 1 else sum(delays)
        return {
            **({"delay_mean_s": fmean(delays), "delay_p95_s": late} if delays else {}),
            "posts": self._posts,
            "looks": self._looks,
            "unknown": self._unknown,
            "opened": self.opened,
            "most_open": self.most_open,
            "opened_to_look": self.opened_to_look,
            "most_open_to_look": self.most_open_to_look,
        }


# What follows are the answers of the API page with the fields seen in the field, then those of rivals' services, as
# short as their SDKs accept.


def accept(task: Task, _origin: str) -> object:
    return {
        "taskId": task.id,
        "status": "pending",
        "model": "cv-2",
        "quality": "2k",
        "aspect_ratio": "16:9",
        "credits_used": 2 * len(task.prompts),
        "credits_remaining": 79,
        "poll_url": f"/api/v1/task/{task.id}",
    }


def see(task: Task, ready: bool, _path: bytes) -> object:
    if not ready:
        return {"status": "processing"}
    images = []
    for index, prompt in enumerate(task.prompts):
        key = f"images/3f9d0c5be1a24c7f8e6b5a4d3c2b1a09/{task.id}/{index}-9f86d081884c7d65.jpg"
        image = {"url": f"https://r2.conceptviz.app/{key}", "prompt": prompt, "imageHash": "9f86d081884c7d65" * 4}
        images.append({**image, "storageKey": key})
    return {"status": "completed", "images": images}


def accept_prediction(task: Task, origin: str) -> object:
    return {**_prediction(task, "starting"), "urls": {"get": f"{origin}/v1/predictions/{task.id}"}}


def see_prediction(task: Task, ready: bool, _path: bytes) -> object:
    return _prediction(task, "succeeded" if ready else "processing")


def _prediction(task: Task, status: str) -> dict[str, object]:
    output = [f"https://replicate.delivery/{task.id}.png"] if status == "succeeded" else None
    told: dict[str, object] = {"input": {}, "output": output, "logs": "", "error": None, "metrics": None, "urls": None}
    times = dict.fromkeys(("created_at", "started_at", "completed_at"), "2026-11-25T12:00:00Z")
    return {"id": task.id, "model": "a/model", "version": "1", "status": status, **told, **times}


def accept_queued(task: Task, origin: str) -> object:
    url = f"{origin}/fal/requests/{task.id}"
    return {"request_id": task.id, "response_url": url, "status_url": f"{url}/status", "cancel_url": f"{url}/cancel"}


def see_queued(task: Task, ready: bool, path: bytes) -> object:
    if b"/status" not in path:
        return {"images": [{"url": f"https://v3.fal.media/{task.id}.png"}]}
    return {"status": "COMPLETED" if ready else "IN_PROGRESS", "logs": None, "metrics": {}}


def accept_video(task: Task, _origin: str) -> object:
    return _video(task, "queued")


def see_video(task: Task, ready: bool, _path: bytes) -> object:
    return _video(task, "completed" if ready else "in_progress")


def _video(task: Task, status: str) -> object:
    told = {"model": "sora-2", "progress": 0, "seconds": "4", "size": "1280x720", "created_at": 1}
    return {"id": task.id, "object": "video", "status": status, **told}


def accept_runway(task: Task, _origin: str) -> object:
    return {"id": task.id, "estimatedCost": {"credits": 2}}


def see_runway(task: Task, ready: bool, _path: bytes) -> object:
    told = {"id": task.id, "createdAt": "2026-11-25T12:00:00Z"}
    if not ready:
        return {**told, "status": "RUNNING", "progress": 0.5, "estimatedCost": {"credits": 2}}
    return {**told, "status": "SUCCEEDED", "output": [f"https://runway.example/{task.id}.png"], "cost": {"credits": 2}}


SHAPES: tuple[tuple[bytes, Callable[[Task, str], object], Callable[[Task, bool, bytes], object]], ...] = (
    (b"/api/v1/", accept, see),
    (b"/v1/predictions", accept_prediction, see_prediction),
    (b"/fal/", accept_queued, see_queued),
    (b"/v1/videos", accept_video, see_video),
    (b"/v1/text_to_image", accept_runway, see_runway),
    (b"/v1/tasks/", accept_runway, see_runway),
)


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = Server(loop, float(sys.argv[1]), float(sys.argv[2]) / 1e3)
    # A burst of connections waits here, and is not refused.
    listener = await loop.create_server(lambda: Connection(server), "127.0.0.1", 0, backlog=4096)
    port = listener.sockets[0].getsockname()[1]
    server.listens_at(port)
    print(port, flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    # A collection among ten thousand tasks would show as delay.
    gc.disable()
    asyncio.run(main())
