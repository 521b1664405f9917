"""A small TCP proxy on loopback that makes the way to a server slow, narrow, choppy or short.

    with Server() as server, Proxy(server.port, answers=Toxics(piece=1)) as proxy:
        ...  # everything from proxy.base_url comes in segments of one byte

Each connection has two pumps, one for each direction with its own `Toxics`: a pump reads, waits, and passes on, so a
delay holds up what comes behind it, as a slow wire does. All times are in seconds, all sizes in bytes.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from random import Random
from typing import Literal

from attrs import define, frozen

from .listener import Listener
from .server import API


@frozen(kw_only=True)
class Toxics:
    """What is wrong with one direction of a connection; by itself nothing is.

    Attributes:
        latency: The delay of whatever is passed on.
        jitter: A random part on top of it, from 0 to this.
        piece: The largest piece that is passed on at once; None is as it comes.
        bandwidth: Bytes in each second, counted piece by piece; None is as many as come.
        slow_close: The delay of the end of the stream.
        stop_after: After so many bytes it stops; None is never.
        stop: How: the end of the stream in place of the rest; both sides reset; or silence, in which everything is
            still read but nothing is passed on, not even the end.
    """

    latency: float = 0.0
    jitter: float = 0.0
    piece: int | None = None
    bandwidth: float | None = None
    slow_close: float = 0.0
    stop_after: int | None = None
    stop: Literal["end", "reset", "silence"] = "end"


@define(eq=False)
class _Link:
    """The two sides of one connection."""

    client: socket.socket
    server: socket.socket
    is_reset: bool = False

    def reset(self) -> None:
        """See to it that both sides end with a RST, once both pumps have ended."""
        self.is_reset = True
        for sock in (self.client, self.server):
            with suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                sock.shutdown(socket.SHUT_RD)  # it says nothing to the other side, but wakes the pump that reads here


class Proxy(Listener):
    """A proxy on 127.0.0.1 to a port of 127.0.0.1, until `close()`.

    Args:
        target: The port of the server.
        requests: What is wrong on the way from the client to the server.
        answers: What is wrong on the way from the server to the client.
        seed: The seed of the jitter.
        is_read: Says whether the server has read so many bytes of a request. If it is given, a reset waits for that, so
            as not to overtake what was passed on.
    """

    def __init__(
        self,
        target: int,
        *,
        requests: Toxics | None = None,
        answers: Toxics | None = None,
        seed: int = 0,
        is_read: Callable[[int], bool] = lambda size: True,
    ) -> None:
        super().__init__()
        self._target = target
        self._requests = requests or Toxics()
        self._answers = answers or Toxics()
        self._rng = Random(seed)
        self._is_read = is_read
        self.base_url = self.origin + API
        self.listen()

    def _welcome(self, sock: socket.socket) -> Callable[[], None] | None:
        try:
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            return None
        self._adopt(server)
        return partial(self._relay, _Link(sock, server))

    def _relay(self, link: _Link) -> None:
        answers = threading.Thread(target=self._pump, args=(link, link.server, link.client, self._answers), daemon=True)
        answers.start()
        self._pump(link, link.client, link.server, self._requests)
        answers.join()
        self._let_go(link.client)
        self._let_go(link.server)

    def _pump(self, link: _Link, source: socket.socket, sink: socket.socket, toxics: Toxics) -> None:
        try:
            if self._pass_on(source, sink, toxics):
                self._over.wait(toxics.slow_close)
                if not link.is_reset:
                    sink.shutdown(socket.SHUT_WR)
                while source.recv(65536):
                    pass
        except OSError:
            link.reset()  # as one side was

    def _pass_on(self, source: socket.socket, sink: socket.socket, toxics: Toxics) -> bool:
        """Pass on what comes, to the end; return whether the end is to be passed on too."""
        left = toxics.stop_after
        while data := source.recv(65536):
            self._over.wait(toxics.latency + self._rng.random() * toxics.jitter)
            data = data[:left]
            size = toxics.piece or 65536
            for piece in (data[at : at + size] for at in range(0, len(data), size)):
                sink.sendall(piece)
                self._over.wait(len(piece) / toxics.bandwidth if toxics.bandwidth else 0.0)
            if left is None:
                continue
            left -= len(data)
            if left == 0 and toxics.stop == "end":
                return True
            if left == 0 and toxics.stop == "reset":
                while toxics is self._requests and not self._is_read(toxics.stop_after or 0):
                    if self._over.wait(0.001):
                        break
                raise ConnectionResetError
        return left != 0
