"""Random schedules of faults, each made from one number.

    schedule(7, elsewhere="http://127.0.0.1:1")   the same, always: a stage, a fault in it, and perhaps an interruption

A schedule is one piece of work (a submit, or a submit and a wait) on a server of its own: whatever POSTs that server
sees belong together. What lives here: pure functions and values. What must never live here: a socket, a clock, the
client.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Literal, TypeAlias

from attrs import evolve, field, frozen

from .proxy import Toxics
from .steps import Answer, End, Flood, Raw, Script, Step, json_answer, refusal, refuse

ENDS = (End.FIN, End.RST, End.SILENCE)
# Source: "Error Codes". Answered to a submit that was read whole, each says that nothing was charged.
REFUSALS = (
    (400, "INVALID_BODY"),
    (400, "PROMPT_REQUIRED"),
    (400, "INPUT_MODERATION_BLOCKED"),
    (401, "INVALID_API_KEY"),
    (402, "INSUFFICIENT_CREDITS"),
    (403, "PLAN_REQUIRED"),
    (403, "PLAN_LIMIT_EXCEEDED"),
    (429, "MODERATION_RATE_LIMITED"),
    (500, "CREDIT_CONSUMPTION_FAILED"),
    (500, "GENERATION_FAILED"),
)


@frozen
class Interrupt:
    """An end that comes from outside.

    Attributes:
        kind: A cancel scope, `asyncio.wait_for`, `Task.cancel`, or SIGKILL to the client's whole process.
        at: The seconds from the beginning of the work.
        on_charge: Whether they count from the charge of its submit instead, for an interruption by asyncio itself.
    """

    kind: Literal["scope", "wait_for", "task", "kill"]
    at: float
    on_charge: bool = False


@frozen(kw_only=True)
class Schedule:
    """One piece of work, and all that goes wrong with it.

    Attributes:
        seed: What it was made from.
        stage: Where the fault is.
        fault: Its name within the stage.
        script: The server's.
        listen_after: The server's: when it begins to listen; None is never.
        receive_buffer: The server's.
        requests: What the way there is like; if this or `answers` is given, there is a proxy.
        answers: What the way back is like.
        upload: The bytes of the image to edit; 0 is a generation.
        waits: Whether the task is waited for, and its image fetched.
        task_seconds: How long the task takes.
        timeout: The client's, for one exchange.
        wait_timeout: The client's, for submit and wait together.
        interrupt: An end that comes from outside, or None.
    """

    seed: int
    stage: str = "none"
    fault: str = "none"
    script: Script = field(factory=Script)
    listen_after: float | None = 0.0
    receive_buffer: int | None = None
    requests: Toxics | None = None
    answers: Toxics | None = None
    upload: int = 0
    waits: bool = False
    task_seconds: float = 0.0
    timeout: float = 0.3
    wait_timeout: float = 0.6
    interrupt: Interrupt | None = None

    @property
    def is_answered_well(self) -> bool:
        """Whether each submit gets a whole answer as documented, long before its timeout."""
        on_its_way = self.listen_after != 0 or self.script.connections or self.requests or self.answers
        return not on_its_way and all(_is_well(step, self.timeout / 3) for step in self.script.posts)


def _is_well(step: Step, patience: float) -> bool:
    answer = step.answer
    if step.read != "whole" or step.delay > patience or not isinstance(answer, Answer) or not answer.is_whole:
        return False
    is_correct = step.charge and answer.status is None and answer.body is None
    is_refusal = not step.charge and answer.status == 429
    return (is_correct or is_refusal) and not (answer.head_pause or answer.body_pause)


Fault: TypeAlias = Callable[[Random, str], dict[str, Any]]
"""From randomness, and the origin of another server, to the changes that a fault makes to a `Schedule`."""


def _posts(*steps: Step) -> dict[str, Any]:
    return {"script": Script(posts=steps)}


def _post(make: Callable[[Random], Step]) -> Fault:
    return lambda rng, _: _posts(make(rng))


def _answer(make: Callable[[Random], Answer | Raw | Flood], *ends: End) -> Fault:
    """A submit that is charged, and answered in a strange way."""
    return lambda rng, _: _posts(Step(answer=make(rng), end=rng.choice(ends or (End.KEEP,))))


def _some(rng: Random, step: Callable[[Random], Step]) -> tuple[Step, ...]:
    return tuple(step(rng) for _ in range(rng.randint(1, 4)))


CONNECT: dict[str, Fault] = {
    "refused": lambda rng, _: {"listen_after": None},
    "refused for a while": lambda rng, _: {"listen_after": rng.uniform(0.001, 0.06)},
    "ends at accept": lambda rng, _: {
        "script": Script(connections=_some(rng, lambda rng: Step(read=0, answer=None, end=rng.choice(ENDS))))
    },
}

SEND: dict[str, Fault] = {
    "ends in the head": _post(lambda rng: Step(read=rng.randint(1, 150), answer=None, end=rng.choice(ENDS))),
    "ends after the head": _post(lambda rng: Step(read="head", answer=None, end=rng.choice(ENDS))),
    "ends in the body": lambda rng, _: {
        **_posts(Step(read=rng.randint(300, 200_000), answer=None, end=rng.choice(ENDS))),
        "upload": 200_000,
        "receive_buffer": 4096,
    },
    "stops reading": lambda rng, _: {
        **_posts(Step(read="head", answer=None, end=End.SILENCE)),
        "upload": 6_000_000,
        "receive_buffer": 4096,
    },
    "answers early": lambda rng, _: {
        **_posts(Step(read="head", answer=refusal(*rng.choice(REFUSALS)), end=rng.choice(ENDS))),
        "upload": rng.choice((0, 200_000, 3_000_000)),
        "receive_buffer": 4096,
    },
}

STATUS_LINES = (
    b"\x00\x01\x02\xff\xfe",
    b"{}\r\n\r\n",
    b"HTTP/0.9 200\r\n\r\n",
    b"HTTP/1.1 999 What\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 abc\r\n\r\n",
    b"HTTP/1.1\r\n\r\n",
    b"ICY 200 OK\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nX: \x00\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    b"<html>@task@</html>",
    b"\r\n" * 10,
)
FLOODS = (
    Flood(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    Flood(b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n", 0.001),
    Flood(b"HTTP/1.1 200 OK\r\n", b"X-Filler: " + b"y" * 100 + b"\r\n", 0.001),
    Flood(b"HTTP/1.1 200 OK\r\nX: ", b"y" * 1000, 0.001),
    Flood(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 1000, 0.001),
    Flood(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 0.001),
    Flood(b"", b""),
)

HEADERS: dict[str, Fault] = {
    "no answer": _post(lambda rng: Step(charge=rng.random() < 0.8, answer=None, end=rng.choice(ENDS))),
    "garbled": _answer(lambda rng: Raw(rng.choice(STATUS_LINES)), *ENDS),
    "floods": _answer(lambda rng: rng.choice(FLOODS)),
    "drips": _answer(lambda rng: Answer(head_pause=rng.choice((0.001, 0.01)))),
    "late": _post(lambda rng: Step(delay=10 ** rng.uniform(-2.0, -0.2))),
    "redirects": lambda rng, elsewhere: _posts(
        Step(
            charge=rng.random() < 0.5,
            answer=Answer(
                status=rng.choice((301, 302, 303, 307, 308)),
                body=b"",
                headers=(rng.choice((f"Location: {elsewhere}/api/v1/generate", "Location: /api/v1/edit")).encode(),),
            ),
        )
    ),
}

FRAMINGS = (
    b"Content-Length: 10000",
    b"Content-Length: 3",
    b"Content-Length: 0",
    b"Content-Length: -1",
    b"Content-Length: x",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 200\r\nTransfer-Encoding: chunked",
    b"Transfer-Encoding: chunked",
    b"Transfer-Encoding: gzip, chunked",
    b"Content-Encoding: gzip",
    b"Content-Encoding: br\r\nContent-Length: 5",
)

# It belongs to no request: whoever takes it for the answer to the next one is told that a paid task has failed.
ANOTHER = b'HTTP/1.1 200 OK\r\nContent-Length: 20\r\n\r\n{"status": "failed"}'

BODY: dict[str, Fault] = {
    "cut": _answer(lambda rng: Answer(cut=rng.randint(0, 240)), *ENDS),
    "cut, compressed": _answer(lambda rng: Answer(cut=rng.randint(0, 150), gzip=True), *ENDS),
    "drips": _answer(lambda rng: Answer(body_pause=rng.choice((0.0005, 0.002, 0.02)))),
    "wrongly framed": _answer(lambda rng: Answer(framing=rng.choice(FRAMINGS)), *ENDS),
    "well framed": _answer(
        lambda rng: Answer(framing=rng.choice(("chunked", "none")), gzip=rng.random() < 0.5), End.FIN
    ),
    "followed by another answer": lambda rng, _: {**_posts(Step(answer=Answer(after=ANOTHER))), "waits": True},
    "after interim answers": _answer(lambda rng: Answer(interim=b"HTTP/1.1 103 Early Hints\r\n\r\n" * 3)),
}

# With the task's id in them somewhere: it must be found there, or said to be unknown.
BODIES = (
    b"", b"null", b"[]", b'"x"', b"7", b"{}", b"{", b"true false", b"<html>busy</html>", b'\xff\xfe"',
    b"\xef\xbb\xbf{}", b"[" * 2000, b'{"a":' * 2000, b'{"taskId": "' + b"x" * 2**20 + b'"}',
    b'{"taskId": null}', b'{"taskId": 7}', b'{"taskId": ""}', b'{"taskId": "@task@"', b'{"taskId": "@task@"} trailing',
    b'{"taskId": "@task@", "credits_used": NaN}', b'{"taskId": "@task@", "credits_used": 1e400}',
    b'{"taskId": "@task@", "credits_used": ' + b"9" * 5000 + b"}", b'{"taskId": "@task@", "x": "\\ud800"}',
    b'{"taskId": "@task@", "x": "\xff"}', b'\xef\xbb\xbf{"taskId": "@task@"}', b'{"data": {"taskId": "@task@"}}',
    b'[{"taskId": "@task@"}]', b'{"task_id": "@task@"}', b'{"taskId": "@task@", "taskId": "@task@"}',
    b'{"taskId": "another", "taskId": "@task@"}', '{"taskId": "@task@"}'.encode("utf-16"),
    b'{"task": "@task@"}', b'{"taskId": {"id": "@task@"}}', b'{"taskId": ["@task@"]}',
    b'{"taskId": "@task@", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"x": "' + b"y" * 2**21 + b'", "taskId": "@task@"}',
    b'{"error": "Queued.", "code": "QUEUED", "taskId": "@task@"}',
    b'{"taskId": "@task@", "status": 7, "model": [], "credits_used": true, "credits_remaining": -1, "extra": {}}',
    b'{"taskId": "@task@", "credits_used": "2", "credits_remaining": 2.5, "poll_url": "//elsewhere.invalid/x"}',
)  # fmt: skip

JSON: dict[str, Fault] = {
    "strange body": _answer(lambda rng: Answer(body=rng.choice(BODIES))),
    "strange body, other status": _answer(
        lambda rng: Answer(body=rng.choice(BODIES), status=rng.choice((200, 201, 202, 207, 299, 500, 502)))
    ),
}

HTML = b"<html><body>Sorry, you have been blocked</body></html>"
RETRY_AFTER = (b"Retry-After: 0", b"Retry-After: 0.02", b"Retry-After: -1", b"Retry-After: 1e9", b"Retry-After: soon")
HOSTILE_IDS = ("../account", "a?b=1", "a#b", "a b", "%2e%2e", "a" * 128, "-_", "é")


def _refused(rng: Random, _: str) -> dict[str, Any]:
    status, code = rng.choice(REFUSALS)
    return _posts(refuse(status, code, credits_remaining=1))


SEMANTIC: dict[str, Fault] = {
    "refused": _refused,
    "refused for haste": lambda rng, _: _posts(
        *_some(rng, lambda rng: refuse(429, "MODERATION_RATE_LIMITED", *rng.sample(RETRY_AFTER, rng.randint(0, 1))))
    ),
    "refused by a gateway": lambda rng, _: _posts(
        Step(
            charge=False, answer=Answer(status=rng.choice((403, 429)), body=HTML, headers=(b"Content-Type: text/html",))
        )
    ),
    "lost in a gateway": _post(
        lambda rng: Step(
            charge=rng.random() < 0.7,
            answer=Answer(status=rng.choice((408, 409, 425, 500, 502, 503, 504, 520, 524)), body=HTML),
        )
    ),
    "accepted with an odd status": _answer(
        lambda rng: Answer(status=rng.choice((201, 202, 203, 206, 299, 500, 502, 503, 408, 409, 304)))
    ),
    "accepted with nothing": _answer(lambda rng: Answer(status=rng.choice((204, 205)), body=b"")),
    "hostile id": lambda rng, _: {**_posts(Step(task_id=rng.choice(HOSTILE_IDS))), "waits": True},
    "hostile poll_url": lambda rng, elsewhere: {
        **_posts(Step(answer=Answer(body=f'{{"taskId": "@task@", "poll_url": "{elsewhere}/x"}}'.encode()))),
        "waits": True,
    },
}

LOOKS: tuple[Callable[[Random], Step], ...] = (
    lambda rng: Step(answer=None, end=rng.choice(ENDS)),
    lambda rng: Step(answer=Answer(status=rng.choice((500, 502, 503, 520)), body=HTML)),
    lambda rng: Step(answer=Answer(cut=rng.randint(0, 20)), end=rng.choice(ENDS)),
    lambda rng: Step(answer=Answer(body=rng.choice(BODIES))),
    lambda rng: Step(answer=Raw(rng.choice(STATUS_LINES)), end=rng.choice(ENDS)),
    lambda rng: Step(answer=rng.choice(FLOODS)),
    lambda rng: Step(answer=Answer(body_pause=0.02)),
    lambda rng: Step(answer=refusal(404, "TASK_NOT_FOUND")),
    lambda rng: Step(answer=refusal(429, "SLOW", rng.choice(RETRY_AFTER))),
    lambda rng: Step(answer=refusal(500, "GENERATION_FAILED")),
    lambda rng: Step(answer=json_answer({"status": rng.choice(("queued", "", None, 5, "Running", "pending"))})),
    lambda rng: Step(answer=json_answer({"status": "completed", "images": rng.choice(([], None, [{}], [7]))})),
    lambda rng: Step(answer=json_answer({"state": "completed"})),
    lambda rng: Step(answer=Answer(body=b'{"status": "processing"}', after=ANOTHER)),
)

POLL: dict[str, Fault] = {
    "looks fail": lambda rng, _: {
        "script": Script(looks=_some(rng, lambda rng: rng.choice(LOOKS)(rng)), tasks_fail=rng.random() < 0.2),
        "waits": True,
        "task_seconds": rng.choice((0.0, 0.02)),
    },
    "looks are refused": lambda rng, _: {
        "script": Script(looks=(refuse(*rng.choice(((401, "INVALID_API_KEY"), (403, "PLAN_REQUIRED")))),)),
        "waits": True,
    },
    "looks are redirected": lambda rng, elsewhere: {
        "script": Script(
            looks=(Step(answer=Answer(status=302, body=b"", headers=(f"Location: {elsewhere}/@task@".encode(),))),) * 3
        ),
        "waits": True,
    },
    "never ends": lambda rng, _: {"waits": True, "task_seconds": 60.0},
    "fails": lambda rng, _: {"script": Script(tasks_fail=True), "waits": True, "task_seconds": 0.01},
}


def _toxics(rng: Random) -> Toxics:
    return Toxics(
        latency=rng.choice((0.0, 0.005, 0.03)),
        jitter=rng.choice((0.0, 0.01)),
        piece=rng.choice((None, 1, 17, 100)),
        bandwidth=rng.choice((None, None, 5_000.0)),
        slow_close=rng.choice((0.0, 0.02)),
        stop_after=rng.choice((None, rng.randint(0, 600))),
        stop=rng.choice(("end", "reset", "silence")),
    )


PROXY: dict[str, Fault] = {
    "bad way there": lambda rng, _: {"requests": _toxics(rng)},
    "bad way back": lambda rng, _: {"answers": _toxics(rng)},
    "bad ways": lambda rng, _: {"requests": _toxics(rng), "answers": _toxics(rng)},
}

STAGES: dict[str, dict[str, Fault]] = {
    "none": {"none": lambda rng, _: {"task_seconds": rng.choice((0.0, 0.02))}},
    "connect": CONNECT,
    "send": SEND,
    "headers": HEADERS,
    "body": BODY,
    "json": JSON,
    "semantic": SEMANTIC,
    "poll": POLL,
    "proxy": PROXY,
}


def schedule(seed: int, *, elsewhere: str, kinds: tuple[str, ...] = ("scope", "wait_for", "task")) -> Schedule:
    """Make the schedule of a seed.

    Args:
        seed: Any number.
        elsewhere: The origin of another server, where nothing of the API's is to arrive.
        kinds: The kinds of interruption that may come up; empty is none.
    """
    rng = Random(seed)
    stage = rng.choice(list(STAGES))
    fault = rng.choice(list(STAGES[stage]))
    plan = Schedule(seed=seed, stage=stage, fault=fault, waits=rng.random() < 0.5, timeout=rng.choice((0.15, 0.3, 0.5)))
    plan = evolve(plan, **STAGES[stage][fault](rng, elsewhere))
    script = plan.script
    if stage in {"send", "headers", "body", "json"} and rng.random() < 0.2:
        # The fault hits a submit that is a repetition already.
        script = evolve(script, posts=(refuse(429, "MODERATION_RATE_LIMITED"), *script.posts))
    if not script.looks and rng.random() < 0.2:
        script = evolve(script, looks=_some(rng, lambda rng: rng.choice(LOOKS)(rng)))
    interrupt = None
    if kinds and rng.random() < 0.35:
        # Evenly spread over the orders of magnitude: most exchanges are over within some milliseconds.
        interrupt = Interrupt(rng.choice(kinds), 10 ** rng.uniform(-4.0, -0.3))  # type: ignore[arg-type]
    return evolve(plan, script=script, interrupt=interrupt)
