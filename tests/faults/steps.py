"""What the fault server is told, and what it tells: frozen values to compose, and the ledger.

A step is told in the order in which things happen: how much of a request is read, whether it is charged, what is
answered, and how it ends. All times are in seconds.

    Step()                                                      a correct answer
    Step(answer=None, end=End.FIN)                              charged, and the answer is lost
    Step(charge=False, answer=None, end=End.FIN)                closed just before the charge: the client sees the same
    Step(read=0, answer=None, end=End.RST)                      for a connection: reset at accept
    Step(read="head", answer=None, end=End.SILENCE)             it stops reading
    Step(read="head", answer=refusal(402, "..."), end=End.FIN)  an early answer while the body is still on its way
    Step(answer=Answer(cut=40), end=End.RST)                    charged, and cut off after 40 bytes of the body
    Step(answer=Answer(body=b'{"x": {"taskId": "@task@"}}'))    charged, and answered in another shape
    refuse(429, "MODERATION_RATE_LIMITED")                      not charged

What lives here: values and the bytes they stand for. What must never live here: a socket.
"""

from __future__ import annotations

import enum
import gzip
import json
from typing import Any, Literal

from attrs import define, field, frozen

# In an answer's headers and body: the id of the task that the request made or asked for.
TASK = b"@task@"


class End(enum.Enum):
    """What becomes of a connection after an exchange."""

    KEEP = "keep"
    """It waits for the next request, or is closed if the client said that there is none."""
    FIN = "fin"
    """It is closed in an orderly way: the client reads to the end of the stream."""
    RST = "rst"
    """It is reset: the client's next read or write fails, and what it has not read yet is lost."""
    SILENCE = "silence"
    """It stays open, and nothing more is read or written."""


@frozen(kw_only=True)
class Answer:
    """An HTTP answer: the correct one but for what is given.

    Attributes:
        status: The HTTP status; None is the correct one.
        body: The body; None is the correct one.
        headers: More header lines, as they are. A Content-Type among them takes the place of the correct one.
        framing: How the end of the body is told: by its length, in one chunk, not at all (the connection's end is the
            body's), or whatever these header lines say, which may lie.
        gzip: Whether the body is compressed.
        interim: Bytes sent before the answer, such as a 103.
        after: Bytes sent in one go with the end of the body, such as an answer that nobody asked for.
        cut: How many bytes of the body are sent; None is all of them.
        head_pause: The pause after each byte of the head.
        body_pause: The pause after each byte of the body.
    """

    status: int | None = None
    body: bytes | None = None
    headers: tuple[bytes, ...] = ()
    framing: Literal["length", "chunked", "none"] | bytes = "length"
    gzip: bool = False
    interim: bytes = b""
    after: bytes = b""
    cut: int | None = None
    head_pause: float = 0.0
    body_pause: float = 0.0

    @property
    def is_whole(self) -> bool:
        """Whether a client that reads to the end has read a whole, well-formed answer."""
        return self.cut is None and not isinstance(self.framing, bytes)

    def render(self, correct: Answer, task_id: str) -> tuple[bytes, bytes]:
        """Return the bytes of the head and of the body, what is not given taken from `correct`."""
        status = self.status if self.status is not None else correct.status
        body = self.body if self.body is not None else correct.body or b""
        body = body.replace(TASK, task_id.encode())
        lines = [f"HTTP/1.1 {status} Status".encode(), *(line.replace(TASK, task_id.encode()) for line in self.headers)]
        if not any(line.lower().startswith(b"content-type:") for line in self.headers):
            lines += correct.headers
        if self.gzip:
            body = gzip.compress(body)
            lines.append(b"Content-Encoding: gzip")
        if isinstance(self.framing, bytes):
            lines.append(self.framing)
        elif self.framing == "chunked":
            body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
            lines.append(b"Transfer-Encoding: chunked")
        elif self.framing == "length":
            lines.append(b"Content-Length: %d" % len(body))
        return self.interim + b"\r\n".join(lines) + b"\r\n\r\n", body[: self.cut]


@frozen
class Raw:
    """Exactly these bytes in place of an HTTP answer, but for the task's id."""

    data: bytes


@frozen
class Flood:
    """Bytes sent again and again, until the client goes away or the server is closed.

    Attributes:
        first: What is sent once, before.
        again: What is repeated.
        pause: The pause after each.
    """

    first: bytes
    again: bytes
    pause: float = 0.0


@frozen(kw_only=True)
class Step:
    """What the server does with one request.

    Attributes:
        read: How much of it has arrived before anything else happens: all of it, its head, or so many bytes. What is
            not read whole is never charged.
        charge: Whether a submit that was read whole, and is as documented, makes a task and is charged.
        task_id: The id of that task; None is one as the API has them.
        delay: The time from the charge to the answer.
        until_told: Whether the answer then waits for `Server.tell()`.
        answer: What is sent; None is nothing.
        end: What becomes of the connection.
    """

    read: Literal["whole", "head"] | int = "whole"
    charge: bool = True
    task_id: str | None = None
    delay: float = 0.0
    until_told: bool = False
    answer: Answer | Raw | Flood | None = Answer()
    end: End = End.KEEP


def json_answer(value: Any, status: int = 200, *headers: bytes) -> Answer:
    """Return an answer with this value as its body."""
    return Answer(status=status, body=json.dumps(value).encode(), headers=headers)


def refusal(status: int, code: str, *headers: bytes, **more: Any) -> Answer:
    """Return an error answer, with `more` in its body. Source: "Error Handling"."""
    return json_answer({"error": f"This is {code}.", "code": code, **more}, status, *headers)


def refuse(status: int, code: str, *headers: bytes, **more: Any) -> Step:
    """Return a step that charges nothing and answers with an error."""
    return Step(charge=False, answer=refusal(status, code, *headers, **more))


@frozen(kw_only=True)
class Script:
    """The steps of a server: each is taken once, in its turn, and after the last everything is answered correctly.

    Attributes:
        connections: One for each new connection: None to go on to its requests, or a step that is all that happens on
            it. No request is looked for then: `read` must be a number, and `answer` no `Answer`.
        posts: One for each POST.
        looks: One for each GET of a task.
        images: One for each other GET.
        tasks_fail: Whether tasks end as failed, with a refund, rather than as completed.
    """

    connections: tuple[Step | None, ...] = ()
    posts: tuple[Step, ...] = ()
    looks: tuple[Step, ...] = ()
    images: tuple[Step, ...] = ()
    tasks_fail: bool = False


@define
class Post:
    """One POST, as the server saw it.

    Attributes:
        number: Which POST it was, from 1, in the order in which their first lines arrived.
        path: Its path.
        at: The monotonic clock at that time.
        whole: Whether it was read to its end.
        body_sha256: The digest of its body in hex, or "" if it was not read whole.
        prompts: Its prompts, as far as it was read whole and they were readable.
        task_id: The task that it made: it was accepted and charged. None: it was not.
        credits: What was charged for it.
        charged_at: The monotonic clock at the charge, or None.
        answered: The status of the well-formed answer that was sent to its end, or None.
        refunded: The credits given back because its task failed.
    """

    number: int
    path: str
    at: float
    whole: bool = False
    body_sha256: str = ""
    prompts: tuple[str, ...] = ()
    task_id: str | None = None
    credits: int = 0
    charged_at: float | None = None
    answered: int | None = None
    refunded: int = 0


@define
class Ledger:
    """What a server saw and what it charged. A charge is in it before its answer; all of it, once the server is closed.

    Attributes:
        connections: How many connections were accepted.
        heads: The head of each request, or what was read of it, in the order of arrival.
        looks: How many GETs of a task there were.
        images: How many other GETs there were.
        posts: Every POST whose first line arrived.
        received: How many bytes were read, on all connections together.
    """

    connections: int = 0
    heads: list[bytes] = field(factory=list)
    looks: int = 0
    images: int = 0
    posts: list[Post] = field(factory=list)
    received: int = 0

    @property
    def requests(self) -> int:
        """How many requests there were whose first line arrived."""
        return len(self.posts) + self.looks + self.images

    @property
    def accepted(self) -> list[Post]:
        """The POSTs that made a task and were charged."""
        return [post for post in self.posts if post.task_id is not None]

    @property
    def charged(self) -> int:
        """The credits charged, whatever was given back."""
        return sum(post.credits for post in self.posts)

    @property
    def refunded(self) -> int:
        """The credits given back for failed tasks."""
        return sum(post.refunded for post in self.posts)
