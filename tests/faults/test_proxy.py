"""The fault proxy itself: each toxic does what it says, in its direction."""

import time
from collections.abc import Callable
from typing import Any

import pytest

from .caller import Caller, ask, body_of, post, serve
from .proxy import Proxy, Toxics
from .server import Server, refusing_port
from .steps import Answer, End, Flood, Step


def through(server: Server, *, requests: Toxics | None = None, answers: Toxics | None = None) -> Proxy:
    return Proxy(server.port, requests=requests, answers=answers, is_read=lambda size: server.ledger.received >= size)


def elapsed(do: Callable[[], object]) -> float:
    started = time.monotonic()
    do()
    return time.monotonic() - started


def test_a_proxy_without_toxics_changes_nothing() -> None:
    with serve(Step(answer=Answer(body=bytes(300_000)), end=End.FIN)) as server, through(server) as proxy:
        data, end = ask(proxy, post("é" * 100_000))
    assert (len(data.partition(b"\r\n\r\n")[2]), end) == (300_000, "fin")
    assert server.ledger.posts[0].prompts == ("é" * 100_000,)


@pytest.mark.parametrize("end", [End.FIN, End.RST])
def test_a_proxy_passes_the_end_on_as_it_is(end: End) -> None:
    with serve(Step(answer=None, end=end)) as server, through(server) as proxy:
        assert ask(proxy, post()) == (b"", end.value)


def test_a_proxy_to_nobody_closes() -> None:
    with refusing_port() as port, Proxy(port) as proxy, Caller(proxy.port) as caller:
        assert caller.to_end() == (b"", "fin")


def test_latency_and_jitter_in_each_direction() -> None:
    """At least the latencies, with some jitter on top that the seed decides."""
    with Server() as server:
        late = Toxics(latency=0.05)
        with through(server, requests=late, answers=late) as proxy, Caller(proxy.port) as caller:
            assert elapsed(lambda: caller.send(post()).until(b"}")) >= 0.1
        # The first number of this seed is 0.84.
        with through(server, requests=Toxics(jitter=0.1)) as proxy, Caller(proxy.port) as caller:
            assert elapsed(lambda: caller.send(post()).until(b"}")) >= 0.084


@pytest.mark.parametrize("direction", ["requests", "answers"])
def test_slices(direction: str) -> None:
    toxics: Any = {direction: Toxics(piece=7, bandwidth=7_000)}
    with Server() as server, through(server, **toxics) as proxy, Caller(proxy.port) as caller:
        caller.send(post())
        pieces = [caller.sock.recv(65536)]
        while not pieces[-1].endswith(b"}"):
            pieces.append(caller.sock.recv(65536))
    assert body_of(b"".join(pieces))["taskId"] == server.ledger.posts[0].task_id
    assert (len(pieces) > 10) == (direction == "answers")


def test_bandwidth() -> None:
    toxics = Toxics(piece=100, bandwidth=20_000)
    with (
        serve(Step(answer=Answer(body=bytes(2000)))) as server,
        through(server, answers=toxics) as proxy,
        Caller(proxy.port) as caller,
    ):
        assert elapsed(lambda: caller.send(post()).until(bytes(2000))) >= 0.1


@pytest.mark.parametrize(("stop", "seen"), [("end", "fin"), ("reset", "rst"), ("silence", "open")])
@pytest.mark.parametrize("size", [0, 40])
class TestStops:
    def test_in_an_answer(self, stop: Any, seen: str, size: int) -> None:
        """The client has so many bytes of it and no more; the server has charged."""
        with Server() as server, through(server, answers=Toxics(stop_after=size, stop=stop)) as proxy:
            assert ask(proxy, post(), seen) == (b"HTTP/1.1 200 Status\r\nContent-Type: application/json"[:size], seen)
        assert len(server.ledger.accepted) == 1

    def test_in_a_request(self, stop: Any, seen: str, size: int) -> None:
        """The server has so many bytes of it and no more; the client is told in the same way."""
        with Server() as server, through(server, requests=Toxics(stop_after=size, stop=stop)) as proxy:
            assert ask(proxy, post(), seen) == (b"", seen)
            while server.ledger.received < size:
                time.sleep(0.001)
        assert len(server.ledger.posts) == (1 if size else 0)
        assert server.ledger.accepted == []


def test_a_slow_close() -> None:
    with (
        serve(Step(end=End.FIN)) as server,
        through(server, answers=Toxics(slow_close=0.15)) as proxy,
        Caller(proxy.port) as caller,
    ):
        caller.send(post()).until(b"}")
        assert elapsed(lambda: caller.sock.recv(1)) >= 0.1


def test_a_proxy_closes_with_connections_open() -> None:
    with serve(Step(answer=Flood(b"", bytes(1000)))) as server:
        proxy = through(server, answers=Toxics(latency=10))
        with Caller(proxy.port) as caller:
            caller.send(post())
            while not server.ledger.posts:
                time.sleep(0.005)
            assert elapsed(proxy.close) < 2
