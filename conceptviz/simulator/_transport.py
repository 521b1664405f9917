"""The simulator in process: an httpx transport without a socket. The one file here that speaks httpx."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import httpx

from ._body import Body, BodyReader
from ._page import IMAGE_PREFIX
from ._simulator import finish_body
from ._world import Reply, Request

if TYPE_CHECKING:
    from ._simulator import Simulator

API_HOST = "conceptviz.app"
IMAGE_HOST = "r2.conceptviz.app"

_PIECE = 64 * 1024


class SimulatorTransport(httpx.AsyncBaseTransport):
    """Answers for the API's host and the image host, and refuses to connect to any other.

    It fails as a real connection fails: with `httpx.ConnectError`, `httpx.ReadError`, `httpx.ReadTimeout` and
    `httpx.RemoteProtocolError`, and calls the `trace` extension before the request leaves.
    """

    def __init__(self, simulator: "Simulator") -> None:
        self._simulator = simulator

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request.

        Raises:
            httpx.TransportError: A fault struck, the host is not a simulated one, or the read timeout passed.
        """
        host = request.url.host
        if request.url.scheme != "https" or host not in (API_HOST, IMAGE_HOST) or request.url.port is not None:
            origin = request.url.copy_with(raw_path=b"/", username=None, password=None)
            raise httpx.ConnectError(
                f"The simulator answers for https://{API_HOST} and https://{IMAGE_HOST}, not for {origin}",
                request=request,
            )
        incoming = await _read(request)
        fault = self._simulator.strike(incoming)
        if fault is not None and fault.refuse:
            raise httpx.ConnectError("Connection refused (a fault of the simulator)", request=request)
        # As in httpcore, the event that says the server may have the request comes just before it does.
        if (trace := request.extensions.get("trace")) is not None:
            await trace("http11.send_request_headers.started", {"request": request})
        await anyio.lowlevel.checkpoint()
        limit = request.extensions.get("timeout", {}).get("read")
        try:
            with anyio.fail_after(limit):
                outcome = await self._simulator.exchange(incoming, fault)
        except TimeoutError:
            raise httpx.ReadTimeout(f"No answer within {limit:g} s", request=request) from None
        # A caller that is cancelled here has paid and never learns of it, as on a real connection.
        await anyio.lowlevel.checkpoint()
        if outcome is None:
            raise httpx.ReadError("Connection closed without an answer (a fault of the simulator)", request=request)
        headers = {**outcome.headers, "content-length": str(len(outcome.body))}
        return httpx.Response(outcome.status, headers=headers, stream=_Stream(outcome, request), request=request)


async def _read(request: httpx.Request) -> Request:
    body: Body | None = None
    if request.method == "POST":
        reader = BodyReader(request.headers.get("content-type", ""))
        assert isinstance(request.stream, httpx.AsyncByteStream)
        async for piece in request.stream:
            reader.feed(piece)
        body = await finish_body(reader)
    path, _, query = request.url.raw_path.decode("ascii").partition("?")
    if (request.url.host == IMAGE_HOST) != path.startswith(f"{IMAGE_PREFIX}/"):
        path = ""  # a path of the other host
    return Request(
        request.method,
        path,
        query,
        request.headers.get("authorization"),
        body,
        image_origin=f"https://{IMAGE_HOST}",
    )


class _Stream(httpx.AsyncByteStream):
    """A body that arrives in pieces, or breaks off."""

    def __init__(self, reply: Reply, request: httpx.Request) -> None:
        self._reply = reply
        self._request = request

    async def __aiter__(self) -> AsyncIterator[bytes]:
        body, cut = self._reply.body, self._reply.cut
        for start in range(0, len(body) if cut is None else min(cut, len(body)), _PIECE):
            await anyio.lowlevel.checkpoint()
            yield body[start : start + _PIECE if cut is None else min(start + _PIECE, cut)]
        if cut is not None and cut < len(body):
            raise httpx.RemoteProtocolError(
                f"peer closed connection without sending complete message body (received {cut} bytes, "
                f"expected {len(body)})",
                request=self._request,
            )
