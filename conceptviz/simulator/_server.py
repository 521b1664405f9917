"""The simulator on a port: an ASGI application, and uvicorn to run it in a background thread.

Four routes and one body parser need no web framework: the application turns ASGI messages into a `Request`
for the world, and its answer into ASGI messages, and that is all.
"""

import ipaddress
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import anyio

from ._body import Body, BodyReader
from ._page import API_PREFIX
from ._pictures import missing
from ._simulator import finish_body
from ._world import Reply, Request

if TYPE_CHECKING:
    import uvicorn

    from ._simulator import Simulator

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]

# An idle connection is kept this long, in seconds, as common web servers keep it: longer than any polling
# interval.
_KEEP_ALIVE = 75


class App:
    """The ASGI application.

    Args:
        simulator: Who answers.
        hang_up: Given the ASGI scope, closes the connection under it. ASGI itself knows no way to end a
            request without an answer.
    """

    def __init__(self, simulator: "Simulator", hang_up: Callable[[Scope], None]) -> None:
        self._simulator = simulator
        self._hang_up = hang_up

    async def __call__(
        self,
        scope: Scope,
        receive: Callable[[], Awaitable[Message]],
        send: Callable[[Message], Awaitable[None]],
    ) -> None:
        """Answer one request."""
        try:
            outcome = await self._answer(scope, receive)
            if outcome is not None:
                await _send(outcome, send)
            if outcome is not None and outcome.cut is None:
                return
        except anyio.get_cancelled_exc_class():
            # The server stops while an answer is drawn or delayed. The task ends here in any case, and
            # uvicorn would log a cancelled one as a crash of the application.
            pass
        self._hang_up(scope)
        while (await receive())["type"] != "http.disconnect":
            pass

    async def _answer(self, scope: Scope, receive: Callable[[], Awaitable[Message]]) -> Reply | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        reader = BodyReader(headers.get("content-type", ""))
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            reader.feed(message.get("body", b""))
            if not message.get("more_body"):
                break
        body: Body | None = await finish_body(reader) if scope["method"] == "POST" else None
        request = Request(
            scope["method"],
            scope["raw_path"].decode("ascii"),
            scope["query_string"].decode("ascii"),
            headers.get("authorization"),
            body,
            image_origin=f"{scope['scheme']}://{headers.get('host', '')}",
        )
        fault = self._simulator.strike(request)
        if fault is not None and fault.refuse:
            return None
        return await self._simulator.exchange(request, fault)


async def _send(reply: Reply, send: Callable[[Message], Awaitable[None]]) -> None:
    headers = {**reply.headers, "content-length": str(len(reply.body))}
    await send(
        {
            "type": "http.response.start",
            "status": reply.status,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": reply.body[: reply.cut], "more_body": reply.cut is not None})


@contextmanager
def serve(
    simulator: "Simulator", *, host: str = "127.0.0.1", port: int = 0, allow_remote: bool = False
) -> Iterator[str]:
    """Serve a simulator from a background thread; see `Simulator.serve`."""
    if not allow_remote and not _is_loopback(host):
        raise ValueError(
            f"The simulator listens on this machine only, and {host} is open to others. "
            "Pass allow_remote=True if they are meant to reach it."
        )
    server = _make_server(simulator)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family, backlog=2048) as listener:
        address = f"[{host}]" if ":" in host else host
        base_url = f"http://{address}:{listener.getsockname()[1]}{API_PREFIX}"
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listener]}, name="conceptviz-simulator", daemon=True
        )
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                time.sleep(0.001)
            yield base_url
        finally:
            server.should_exit = True
            thread.join()


def run(
    simulator: "Simulator",
    *,
    host: str = "127.0.0.1",
    port: int = 8787,
    on_ready: Callable[[str], object] = print,
    allow_remote: bool = False,
) -> None:
    """Serve a simulator until Ctrl-C.

    Args:
        simulator: What to serve.
        host: A loopback address or "localhost".
        port: 0 takes a free one.
        on_ready: Called with the base URL as soon as requests are answered.
        allow_remote: Accept another host, so that other machines can reach it.

    Raises:
        ValueError: The host is not loopback and `allow_remote` is not set.
        ModuleNotFoundError: Pillow or uvicorn is missing.
        OSError: The port is taken.
    """
    with simulator.serve(host, port, allow_remote=allow_remote) as base_url:
        on_ready(base_url)
        try:
            while True:
                time.sleep(3600)  # unlike a wait on an event, Ctrl-C ends it on Windows too
        except KeyboardInterrupt:
            pass


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _make_server(simulator: "Simulator") -> "uvicorn.Server":
    try:
        import uvicorn
        from uvicorn.protocols.http.h11_impl import H11Protocol
    except ModuleNotFoundError as error:
        raise missing("uvicorn", "serving over HTTP") from error

    class Server(uvicorn.Server):
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # An answer that is delayed on purpose must not delay the end.
            for task in tuple(self.server_state.tasks):
                task.cancel()
            await super().shutdown(sockets)

        def hang_up(self, scope: Scope) -> None:
            for connection in self.server_state.connections:
                if isinstance(connection, H11Protocol) and connection.client == scope["client"]:
                    connection.transport.close()

    server: Server
    app = App(simulator, lambda scope: server.hang_up(scope))  # noqa: PLW0108 - the server is made after it
    server = Server(
        uvicorn.Config(
            app,
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE,
        )
    )
    return server
