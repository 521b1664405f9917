"""A client on a plain socket, for the laboratory's own tests: it sends what it is told and reads what comes."""

import json
import socket
from typing import TYPE_CHECKING, Any

from .proxy import Proxy
from .server import API, Server
from .steps import Script, Step

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "cvk_ThisKeyIsOnlyInTheLaboratory"


# How long silence is listened to, in seconds, before it counts as such.
SILENCE = 0.1
CLOSE = "Connection: close\r\n"


def post(prompt: str = "a", *, path: str = "/generate", headers: str = CLOSE, key: str = KEY, **fields: Any) -> bytes:
    body = json.dumps({"prompt": prompt, **fields}).encode()
    head = f"POST {API}{path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {key}\r\n{headers}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def look(task_id: str = "x", *, headers: str = CLOSE) -> bytes:
    return f"GET {API}/task/{task_id} HTTP/1.1\r\nAuthorization: Bearer {KEY}\r\n{headers}\r\n".encode()


class Caller:
    """One connection."""

    def __init__(self, port: int) -> None:
        self.sock = socket.create_connection(("127.0.0.1", port), timeout=5)

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> "Self":
        self.sock.sendall(data)
        return self

    def until(self, mark: bytes) -> bytes:
        """Read up to a mark, and whatever came in one go with it."""
        data = b""
        while mark not in data:
            piece = self.sock.recv(65536)
            assert piece, f"ended after {data!r}"
            data += piece
        return data

    def to_end(self, expected: str = "fin") -> tuple[bytes, str]:
        """Read to the end; return what came and how it ended: "fin", "rst", or "open" if that is silence."""
        data = b""
        self.sock.settimeout(SILENCE if expected == "open" else 5)
        while True:
            try:
                piece = self.sock.recv(65536)
            except ConnectionResetError:
                return data, "rst"
            except TimeoutError:
                return data, "open"
            if not piece:
                return data, "fin"
            data += piece


def ask(server: Server | Proxy, request: bytes, expected: str = "fin") -> tuple[bytes, str]:
    with Caller(server.port) as caller:
        return caller.send(request).to_end(expected)


def body_of(answer: bytes) -> Any:
    return json.loads(answer.partition(b"\r\n\r\n")[2])


def serve(*posts: Step, **options: Any) -> Server:
    return Server(Script(posts=posts), **options)
