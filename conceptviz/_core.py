"""What a client is made of: the parts, put together once, and closed together.

What lives here: which part is given what. What must never live here: a public method (`_client`), a decision.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Protocol
from urllib.parse import urlsplit

import anyio
from anyio import to_thread

from ._budget import Budget, resolve_budget
from ._config import check_limits, is_loopback, resolve_api_key, resolve_base_url
from ._errors import InvalidRequestError
from ._models import Image, Polling, Retries
from ._poller import Poller
from ._transport import Transport

if TYPE_CHECKING:
    import httpx

    from ._downloads import Downloads
    from ._events import Event, EventHook
    from ._journal import Journal
    from ._submits import Submits


class Background(Protocol):
    """What goes on between the calls of its user, until it is stopped."""

    async def stop(self) -> None:
        """Begin nothing new, let what must not be broken off come to its end, and stop."""


class Core:
    """The parts of one client. The arguments are those of `AsyncConceptViz`.

    Attributes:
        transport: The API.
        poller: How tasks are waited for.
        background: What goes on in the background, to be stopped before the connections are closed.
    """

    def __init__(
        self,
        api_key: str | Callable[[], str] | None,
        *,
        base_url: str | None,
        timeout: float,
        polling: Polling,
        retries: Retries,
        max_connections: int,
        budget: Budget | int | None,
        journal: Journal | str | os.PathLike[str] | None,
        on_event: EventHook | None,
        transport: httpx.AsyncBaseTransport | None,
    ) -> None:
        check_limits(timeout, max_connections)
        self.base_url = resolve_base_url(base_url)
        self._timeout = timeout
        self._retries = retries
        self._max_connections = max_connections
        self._given = transport
        self._on_event = on_event
        emit = self.emit if on_event is not None else None
        self._rng = Random()  # noqa: S311 - it spreads pauses, and guards nothing
        secret = resolve_api_key(api_key)
        self.transport = Transport(
            secret,
            self.base_url,
            timeout=timeout,
            retries=retries,
            max_connections=max_connections,
            transport=transport,
            emit=emit,
            rng=self._rng,
        )
        self.journal = None
        if journal is not None:
            from ._journal import resolve_journal  # SQLite is loaded by those who keep one

            self.journal = resolve_journal(journal)
        self._owns_journal = self.journal is not journal
        self._budget = resolve_budget(budget)
        self._account = secret.fingerprint()
        self.poller = Poller(self.transport, polling, retries, emit, self._rng)
        self.background: set[Background] = set()
        self._is_closed = False

    @cached_property
    def submits(self) -> Submits:
        """Where credits are spent."""
        from ._submits import Submits

        return Submits(
            self.transport,
            self._retries,
            self._budget,
            self.journal,
            account=self._account,
            base_url=self.base_url,
            timeout=self._timeout,
            emit=self.emit,
            rng=self._rng,
        )

    @cached_property
    def downloads(self) -> Downloads:
        """The image host."""
        from ._downloads import Downloads  # httpx is loaded by those who fetch an image

        if self._is_closed:
            raise InvalidRequestError("The client is closed: make a new one. Nothing was sent.")
        return Downloads(
            look=lambda task_id: self.transport.look_patiently(task_id, ()),
            timeout=self._timeout,
            retries=self._retries,
            max_connections=self._max_connections,
            transport=self._given,
            allow_loopback=is_loopback(urlsplit(self.base_url).hostname or ""),
            emit=self.emit,
            rng=self._rng,
        )

    async def aclose(self) -> None:
        """Stop what goes on in the background, hear the answers to what was sent, and close the connections."""
        with anyio.CancelScope(shield=True):
            for background in list(self.background):
                await background.stop()
            if "submits" in vars(self):
                await self.submits.settled()
            await self.transport.aclose()
            self._is_closed = True
            if "downloads" in vars(self):
                await self.downloads.aclose()
            if self._owns_journal and self.journal is not None:
                await to_thread.run_sync(self.journal.close)

    @property
    def has_hook(self) -> bool:
        """Whether anybody hears of events."""
        return self._on_event is not None

    async def announce_saved(self, image: Image, path: Path) -> None:
        """Tell the hook that an image lies on disk."""
        if self._on_event is not None:
            from ._events import Saved  # events are loaded by those who listen

            await self.emit(Saved(task_id=image.task_id, image=image, path=path))

    async def emit(self, event: Event) -> None:
        """Tell the hook; an awaitable that it returns is awaited."""
        if self._on_event is not None:
            outcome = self._on_event(event)
            if inspect.isawaitable(outcome):
                await outcome
