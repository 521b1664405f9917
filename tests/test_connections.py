"""Submits over connections that are hard to make: TLS that is not to be trusted, proxies, few file descriptors.

The numbers M5 to M8, M98 and M99 are rows of the fault matrix.
"""

import datetime
import gc
import logging
import ssl
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trustme
from faults.server import Server
from helpers import KEY, QUICK, RECEIPT, TASK, assert_no_key, assert_no_key_logged, client
from raw_server import Connection, RawServer

from conceptviz import (
    AsyncConceptViz,
    AttemptState,
    Budget,
    Journal,
    NotSentError,
    SubmissionUnknownError,
    _http,
)

pytestmark = pytest.mark.anyio

EVER = datetime.datetime(2020, 1, 1, tzinfo=datetime.timezone.utc)


@pytest.fixture(autouse=True)
def _no_key_in_logs(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(1)
    yield
    assert_no_key_logged(caplog)


@pytest.fixture(scope="module", name="authority")
def _authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(name="trusting")
def _trusting(authority: trustme.CA, monkeypatch: pytest.MonkeyPatch) -> ssl.SSLContext:
    """Have the client trust one authority of our own; return its context."""
    context = ssl.create_default_context()
    authority.configure_trust(context)
    monkeypatch.setattr(_http, "ssl_context", lambda: context)
    return context


def secure(server: RawServer, journal: Journal | None = None, **options: Any) -> AsyncConceptViz:
    url = f"https://127.0.0.1:{server.port}/api/v1"
    return AsyncConceptViz(KEY, base_url=url, journal=journal, **{"timeout": 5.0, "retries": QUICK, **options})


class Secured:
    """A server's end of TLS."""

    def __init__(self, certificate: trustme.LeafCert) -> None:
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(self.context)
        self.heard: list[bytes] = []

    def accept(self, connection: Connection) -> None:
        """Shake hands, hear what the client says, and answer with a receipt."""
        with suppress(ssl.SSLError, OSError), self.context.wrap_socket(connection._sock, server_side=True) as sock:
            data = b""
            while not data.endswith(b'{"prompt":"a"}'):
                data += (got := sock.recv(65536))
                if not got:
                    break
            self.heard.append(data)
            if data:
                body = str(RECEIPT).replace("'", '"').encode()
                sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
                sock.unwrap()


@pytest.mark.usefixtures("trusting")
async def test_a_certificate_to_trust(authority: trustme.CA, tmp_path: Path) -> None:
    """What the next tests break."""
    secured = Secured(authority.issue_cert("127.0.0.1"))
    with RawServer(secured.accept) as server, Journal(tmp_path / "j") as journal:
        async with secure(server, journal) as cv:
            assert (await cv.submit("a")).id == TASK
        assert journal.entries()[0].state is AttemptState.ACCEPTED
    assert len(secured.heard) == 1


@pytest.mark.parametrize("case", ["expired", "self-signed", "wrong host", "no version in common", "no TLS at all"])
async def test_tls_that_is_not_to_be_trusted(
    case: str, authority: trustme.CA, trusting: ssl.SSLContext, tmp_path: Path
) -> None:
    """M6: not tried again, as it would be the same again; not a byte of HTTP is sent; the key's work is free."""
    issuer = trustme.CA() if case == "self-signed" else authority
    host = "localhost.example" if case == "wrong host" else "127.0.0.1"
    expiry: dict[str, Any] = (
        {"not_before": EVER, "not_after": EVER + datetime.timedelta(days=1)} if case == "expired" else {}
    )
    secured = Secured(issuer.issue_cert(host, **expiry))
    if case == "no version in common":
        secured.context.minimum_version = ssl.TLSVersion.TLSv1_3
        trusting.maximum_version = ssl.TLSVersion.TLSv1_2

    def plain(connection: Connection) -> None:
        connection.read_some(65536)
        connection.send(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")

    budget = Budget(2)
    behaviour = plain if case == "no TLS at all" else secured.accept
    with RawServer(behaviour) as server, Journal(tmp_path / "j") as journal:
        async with secure(server, journal, budget=budget) as cv:
            with pytest.raises(NotSentError, match="TLS was refused") as caught:
                await cv.submit("a", key="k")
        [entry] = journal.entries()
    assert server.connections == 1
    assert not any(secured.heard)
    assert entry.state is AttemptState.NOT_SENT
    assert (budget.reserved, budget.spent) == (0, 0)
    assert isinstance(caught.value.__cause__, ssl.SSLError)
    assert_no_key(caught.value)
    if case in {"expired", "self-signed", "wrong host"}:
        assert "certificate" in str(caught.value)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("heard", [0, 1], ids=["before the hello", "after it"])
@pytest.mark.parametrize("how", ["reset", "end"])
async def test_a_connection_that_breaks_before_tls_is_agreed(heard: int, how: str, tmp_path: Path) -> None:
    """M5: that may pass, so it is tried again."""

    def leave(connection: Connection) -> None:
        if heard:
            connection.read_some(65536)
        if how == "reset":
            connection.reset()

    with RawServer(leave) as server, Journal(tmp_path / "j") as journal:
        async with secure(server, journal) as cv:
            with pytest.raises(NotSentError) as caught:
                await cv.submit("a", key="k")
        assert journal.entries()[0].state is AttemptState.NOT_SENT
    # The second and third time, what is known of the host may be found wrong first.
    assert 3 <= server.connections <= 5
    assert caught.value.__cause__ is None
    assert_no_key(caught.value)


@pytest.mark.usefixtures("trusting")
async def test_tls_that_says_nothing(tmp_path: Path) -> None:
    """M7: bounded by the timeout, and not sent."""
    with RawServer(lambda connection: connection.hold()) as server, Journal(tmp_path / "j") as journal:
        async with secure(server, journal, timeout=0.3) as cv:
            with pytest.raises(NotSentError):
                await cv.submit("a", key="k")
        assert journal.entries()[0].state is AttemptState.NOT_SENT


def answers(data: bytes) -> Callable[[Connection], None]:
    def behave(connection: Connection) -> None:
        connection.read_some(65536)
        if data:
            connection.send(data)
        connection.hold()

    return behave


PROXIES = {
    "407": answers(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"),
    "502": answers(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 2\r\n\r\nno"),
    "garbage": answers(b"what?\r\n\r\n"),
    "silence": answers(b""),
    "the end": lambda connection: connection.read_some(65536),
    "a reset": lambda connection: (connection.read_some(65536), connection.reset()),
    "200, and then not TLS": answers(b"HTTP/1.1 200 OK\r\n\r\nwhat?\r\n\r\n"),
}


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("name", PROXIES)
async def test_a_proxy_that_connects_to_nobody(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """M8: the proxy has seen where to, and neither the key nor the work: nothing was sent."""
    budget = Budget(2)
    with RawServer(PROXIES[name]) as proxy, Journal(tmp_path / "j") as journal:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        cv = AsyncConceptViz(KEY, base_url="https://api.example/api/v1", timeout=0.2, retries=QUICK, journal=journal)
        cv._core.submits.budget = budget
        async with cv:
            with pytest.raises(NotSentError) as caught:
                await cv.submit("a", key="k")
        assert journal.entries()[0].state is AttemptState.NOT_SENT
    assert (budget.reserved, budget.spent) == (0, 0)
    assert 1 <= proxy.connections <= 3
    assert_no_key(caught.value)


@pytest.mark.usefixtures("trusting")
@pytest.mark.parametrize("lost", [False, True])
async def test_a_proxy_that_connects(
    lost: bool, authority: trustme.CA, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """M8: behind the tunnel the line is drawn where it always is."""
    secured = Secured(authority.issue_cert("api.example"))
    connects: list[bytes] = []
    states: list[AttemptState] = []

    def tunnel(connection: Connection) -> None:
        connects.append(connection.read_some(65536))
        states.append(journal.entries()[0].state)
        connection.send(b"HTTP/1.1 200 Connection established\r\n\r\n")
        if not lost:
            secured.accept(connection)
            return
        with secured.context.wrap_socket(connection._sock, server_side=True) as sock:
            secured.heard.append(sock.recv(65536))

    with RawServer(tunnel) as proxy, Journal(tmp_path / "j") as journal:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("NO_PROXY", raising=False)
        async with AsyncConceptViz(
            KEY, base_url="https://api.example/api/v1", timeout=5.0, retries=QUICK, journal=journal
        ) as cv:
            if lost:
                with pytest.raises(SubmissionUnknownError):
                    await cv.submit("a", key="k")
            else:
                assert (await cv.submit("a", key="k")).id == TASK
        [entry] = journal.entries()
    assert entry.state is (AttemptState.UNKNOWN if lost else AttemptState.ACCEPTED)
    assert states == [AttemptState.INTENT]  # the CONNECT is not the submit
    assert len(connects) == len(secured.heard) == 1
    assert KEY[4:].encode() not in connects[0]


STARVED = """
import resource, sys
from collections import Counter
import anyio
from conceptviz import AsyncConceptViz, ConceptVizError, Retries

async def main(backend, base_url, journal):
    kinds = Counter()
    async def submit(cv, n):
        try:
            await cv.submit(f"{n}", key=f"{n}")
        except ConceptVizError as error:
            kinds[type(error).__name__] += 1
        else:
            kinds["returned"] += 1
    async with AsyncConceptViz(
        "cvk_x", base_url=base_url, journal=journal, max_connections=200, retries=Retries(attempts=1)
    ) as cv:
        await submit(cv, "first")
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, limit[1]))
        async with anyio.create_task_group() as group:
            for n in range(200):
                group.start_soon(submit, cv, n)
        for n in range(3):
            await submit(cv, f"afterwards {n}")
    print(kinds["returned"], kinds["NotSentError"], sum(kinds.values()))

anyio.run(main, *sys.argv[1:], backend=sys.argv[1])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it has no such limit")
def test_few_file_descriptors(anyio_backend: str, tmp_path: Path) -> None:
    """M98: what finds no descriptor was not sent; the others are paid for once, and afterwards all is as before."""
    with Server() as server:
        done = subprocess.run(
            [sys.executable, "-c", STARVED, anyio_backend, server.base_url, str(tmp_path / "j")],
            capture_output=True,
            text=True,
            timeout=50,
            check=False,
        )
    assert done.stderr == ""
    returned, not_sent, every = map(int, done.stdout.split())
    assert returned + not_sent == every == 204
    assert not_sent > 0
    assert len(server.ledger.posts) == len(server.ledger.accepted) == returned >= 4
    with Journal(tmp_path / "j") as journal:
        assert len(journal.entries(AttemptState.ACCEPTED)) == returned


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
async def test_submits_leave_no_descriptor_behind(tmp_path: Path) -> None:
    """M99: accepted and lost ones alike."""

    def behave(connection: Connection) -> None:
        if connection.read().path.endswith("generate") and server.connections % 2:
            body = str(RECEIPT).replace("'", '"').encode()
            connection.answer(body)

    with RawServer(behave) as server, Journal(tmp_path / "j") as journal:
        async with AsyncConceptViz(KEY, base_url=server.base_url, journal=journal, timeout=2.0) as cv:

            async def submit() -> None:
                with suppress(SubmissionUnknownError):
                    await cv.submit("a")

            await submit()
            client_side = sockets()
            for _ in range(20):
                await submit()
            assert sockets() <= client_side + 1  # the server closes its own end a moment later


def sockets() -> int:
    gc.collect()
    found = 0
    for descriptor in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one that lists them
            found += str(descriptor.readlink()).startswith("socket:")
    return found


async def test_memory_is_flat_over_many_submits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """M99: a submit that has ended leaves nothing behind in the client."""
    caplog.set_level(logging.CRITICAL)  # pytest keeps the records
    with Journal(tmp_path / "j") as journal:
        cv, script = client(RECEIPT, journal=journal)
        async with cv:
            for _ in range(30):
                await cv.submit("a")
                script.requests.clear()
            gc.collect()
            tracemalloc.start()
            try:
                for _ in range(60):
                    await cv.submit("a")
                    script.requests.clear()
                gc.collect()
                grown = tracemalloc.get_traced_memory()[0]
            finally:
                tracemalloc.stop()
    assert grown < 60 * 1000
