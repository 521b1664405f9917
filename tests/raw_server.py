"""A TCP server on loopback that answers byte by byte, as the test says, and counts what it was sent."""

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from attrs import frozen
from typing_extensions import Self


@frozen
class RawRequest:
    """A request that was read whole."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Connection:
    """One connection, seen from the server."""

    def __init__(self, server: "RawServer", sock: socket.socket) -> None:
        self._server = server
        self._sock = sock

    def read(self) -> RawRequest:
        """Read one whole request, which is counted; an EOFError says that none came."""
        with self._sock.makefile("rb") as stream:
            method, path, _ = (stream.readline().decode("latin-1") + "  ").split(" ", 2)
            if not method:
                raise EOFError
            headers = {}
            while line := stream.readline().strip().decode("latin-1"):
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            request = RawRequest(method, path, headers, stream.read(int(headers.get("content-length", 0))))
        self._server.requests.append(request)
        self._server.asked.set()
        return request

    def read_some(self, size: int) -> bytes:
        """Read some bytes of what may be no whole request."""
        return self._sock.recv(size)

    def send(self, data: bytes) -> None:
        self._sock.sendall(data)

    def answer(self, body: bytes, status: str = "200 OK", *, length: int | None = None, more: str = "") -> None:
        """Send an answer, whose Content-Length may lie."""
        length = len(body) if length is None else length
        head = f"HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n"
        self.send(head.encode() + body)

    def reset(self) -> None:
        """Close with a RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def hold(self) -> None:
        """Keep the connection open, saying nothing, until the other side closes it or the test is over."""
        self._server.over.wait(5)

    def drip(self, data: bytes, pause: float = 0.02) -> None:
        """Send a byte at a time, for as long as anyone listens; then start again."""
        while True:
            for byte in data:
                if self._server.over.wait(pause):
                    return
                self.send(bytes([byte]))


Behaviour = Callable[[Connection], object]


def answering(body: bytes, status: str = "200 OK", *, length: int | None = None, more: str = "") -> Behaviour:
    """Read a request and answer it, as `Connection.answer` does."""

    def behave(connection: Connection) -> None:
        connection.read()
        connection.answer(body, status, length=length, more=more)

    return behave


class RawServer:
    """A server whose connections behave one after another as given, the last behaviour repeated.

    Args:
        behaviours: Called with each new connection, in a thread of its own; the connection is closed at the end.
        listening: False binds the port without listening: connections are refused until `listen()`.
    """

    def __init__(self, *behaviours: Behaviour, listening: bool = True) -> None:
        self._behaviours = behaviours
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self.port: int = self._listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/api/v1"
        self.requests: list[RawRequest] = []
        self.connections = 0
        self.asked = threading.Event()
        self.over = threading.Event()
        if listening:
            self.listen()

    @property
    def posts(self) -> int:
        """How many POSTs were read whole."""
        return sum(request.method == "POST" for request in self.requests)

    def listen(self) -> None:
        self._listener.listen()
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.over.set()
        # Closing alone does not wake the thread that accepts.
        if self._threads:
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join(5)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.settimeout(5)
            behaviour = self._behaviours[min(self.connections, len(self._behaviours) - 1)]
            self.connections += 1
            self._start(lambda sock=sock, behaviour=behaviour: self._serve(sock, behaviour))  # type: ignore[misc]

    def _serve(self, sock: socket.socket, behaviour: Behaviour) -> None:
        # The other side may go away, which tests bring about on purpose.
        with sock, suppress(OSError, EOFError):
            behaviour(Connection(self, sock))
