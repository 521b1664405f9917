"""Faults to order: what should go wrong, with which requests, how often.

A fault is one value; the shells (`_transport`, `_server`) make it happen on the wire.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

from ._world import Reply, Request


@attrs.frozen(kw_only=True)
class Fault:
    """One thing that goes wrong.

    A fault that says what to answer (`close`, `status`, `body`, `headers` with one of them) strikes instead
    of the
    service: nothing is carried out and nothing charged, unless `accept` is set. A fault that only alters the
    true answer (`delay`, `cut`, `alter`, `headers`) lets the service act first.

    Attributes:
        on: Which requests: "submit" (both POSTs), "poll" or "image".
        times: How many requests it strikes; None: every one.
        skip: How many matching requests it lets pass first.
        containing: Only requests with this text in their path or in one of their prompts.
        accept: The request is carried out, and paid for, before the fault strikes.
        refuse: No connection is made. A served simulator has one by then, and closes it.
        close: The connection ends without an answer.
        delay: Seconds of real (or the loop's) time before the answer, whatever the simulator's speed.
        status: The status to answer.
        headers: Headers to add to the answer.
        body: The body to answer: bytes or text as they are, anything else as JSON.
        alter: Called with the JSON of the true answer; what it returns is sent.
        cut: How many bytes of the body are sent before the connection ends, though Content-Length promises
            all.
    """

    on: Literal["submit", "poll", "image"] = attrs.field(validator=attrs.validators.in_(["submit", "poll", "image"]))
    times: int | None = 1
    skip: int = 0
    containing: str = ""
    accept: bool = False
    refuse: bool = False
    close: bool = False
    delay: float = 0.0
    status: int | None = None
    headers: Mapping[str, str] = attrs.field(factory=dict)
    body: Any = None
    alter: Callable[[Any], Any] | None = None
    cut: int | None = None

    @property
    def is_instead(self) -> bool:
        """Whether it strikes before the service has seen the request."""
        speaks = self.close or self.status is not None or self.body is not None
        return self.refuse or (speaks and not self.accept)

    def matches(self, request: Request) -> bool:
        """Whether this request is one of those to strike."""
        texts = (request.path, *request.prompts)
        return request.kind == self.on and any(self.containing in text for text in texts)

    def reply(self, truth: Reply | None) -> Reply:
        """What is answered: the true answer with this fault's changes, or the fault's own."""
        status = self.status if self.status is not None else truth.status if truth is not None else 200
        headers = {name.lower(): value for name, value in self.headers.items()}
        if self.body is not None:
            raw = self.body.encode() if isinstance(self.body, str) else self.body
            own = Reply(status, raw) if isinstance(raw, bytes) else Reply.json(raw, status)
        elif status >= 400:
            own = Reply.json({"error": "A fault of the simulator."}, status)
        elif truth is None:
            own = Reply(status)
        elif self.alter is not None:
            own = attrs.evolve(truth, body=json.dumps(self.alter(json.loads(truth.body))).encode())
        else:
            own = truth
        return attrs.evolve(own, status=status, headers={**own.headers, **headers}, cut=self.cut)


@attrs.define
class _Waiting:
    fault: Fault
    skip: int
    left: int | None


class Faults:
    """The faults still to come, in the order in which they were added; the first that matches strikes."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []

    def add(self, on: Literal["submit", "poll", "image"], **what: Any) -> Fault:
        """Order a fault.

        Args:
            on: "submit", "poll" or "image".
            what: The other fields of `Fault`.

        Returns:
            The fault.
        """
        fault = Fault(on=on, **what)
        self._waiting.append(_Waiting(fault, fault.skip, fault.times))
        return fault

    def clear(self) -> None:
        """Forget those that have not struck."""
        self._waiting.clear()

    def take(self, request: Request) -> Fault | None:
        """The fault that strikes this request, if one does; it is used up by that."""
        for waiting in self._waiting:
            if not waiting.fault.matches(request):
                continue
            if waiting.skip:
                waiting.skip -= 1
                continue
            if waiting.left is not None:
                waiting.left -= 1
                if waiting.left <= 0:
                    self._waiting.remove(waiting)
            return waiting.fault
        return None
