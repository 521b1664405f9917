"""What the fault server and the fault proxy have in common: a port of 127.0.0.1, and a thread for each connection."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self


class Listener:
    """Takes connections until `close()`.

    Args:
        receive_buffer: The size in bytes of the kernel's receive buffers; None is the kernel's own choice.
    """

    def __init__(self, receive_buffer: int | None = None) -> None:
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if receive_buffer is not None:
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._listener.bind(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.origin = f"http://127.0.0.1:{self.port}"

    def _welcome(self, sock: socket.socket) -> Callable[[], None] | None:
        """Take a new connection, in the order in which they come; return the work that a thread then does with it."""
        raise NotImplementedError

    def queue(self) -> None:
        """Let connections be made, and take them only at `listen()`: none ends before its caller knows it began."""
        self._listener.listen(128)

    def listen(self, after: float = 0.0) -> None:
        """Take connections, after a time in seconds for which they are still refused."""
        if after:
            self._start(self._listen_after, after)
        else:
            self._listener.listen(128)
            self._start(self._accept)

    def close(self) -> None:
        """Break off whatever is under way, and wait for it to end."""
        with self._lock:
            self._over.set()
            for sock in [*self._open, self._listener]:
                with suppress(OSError):  # it is not connected, or no longer is
                    # Closing alone would not wake whoever reads, writes or accepts there.
                    sock.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(5)
            assert not thread.is_alive(), "a connection outlived its listener"
        for sock in [*self._open, self._listener]:
            sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=work, args=arguments, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _listen_after(self, seconds: float) -> None:
        self._over.wait(seconds)
        with self._lock:  # a listener that is shut down before it listens would not wake
            if self._over.is_set():
                return
            self._listener.listen(128)
        self._accept()

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return  # closed
            work = self._welcome(sock)
            if work is not None and self._adopt(sock):
                self._start(work)
            else:
                self._let_go(sock)

    def _adopt(self, sock: socket.socket) -> bool:
        """Have a socket shut down and closed when all ends; return whether there is still time to use it."""
        with self._lock:
            self._open.add(sock)
            return not self._over.is_set()

    def _let_go(self, sock: socket.socket) -> None:
        """Close a socket."""
        with self._lock:
            self._open.discard(sock)
        sock.close()
