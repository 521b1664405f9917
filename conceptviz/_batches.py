"""Items become batches: what generate_many is given, drawn one by one and put together as the service takes it.

What lives here: the options, the drawing, and which prompts may share a request. What must never live here: HTTP,
money, what becomes of a batch (`_fanout`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import anyio
from anyio import to_thread
from attrs import define, evolve

from ._errors import InvalidRequestError
from ._requests import EditRequest, GenerateRequest
from ._spec import MAX_PROMPTS

Item: TypeAlias = str | GenerateRequest | EditRequest
Items: TypeAlias = Iterable[Item] | AsyncIterable[Item]

_END: Any = object()
_UNNAMED = (None,)


@define(eq=False, weakref_slot=False)
class Batch:
    """One request to be submitted, and the prompts whose outcomes it decides.

    Attributes:
        request: The request.
        place: The place of its first prompt among all prompts, from 0.
        index: The place of its first item among all items, from 0.
        is_one_item: Whether all its prompts are of one item, rather than each an item of its own.
        names: What the files of its prompts are called, or None where they are named after the task.
    """

    request: GenerateRequest | EditRequest
    place: int
    index: int
    is_one_item: bool
    names: tuple[str | None, ...]

    @property
    def size(self) -> int:
        """How many prompts it has."""
        return len(self.names)

    @property
    def can_grow(self) -> bool:
        """Whether prompts of other items may be added: it has no key, which names one request."""
        return not self.is_one_item and isinstance(self.request, GenerateRequest) and self.request.key is None

    @property
    def can_be_halved(self) -> bool:
        """Whether its prompts may be submitted apart: what a key names is submitted as it is."""
        return self.size > 1 and self.request.key is None

    def takes(self, other: Batch) -> bool:
        """Say whether the prompts of another one that comes right behind may be added."""
        return (
            self.can_grow
            and other.can_grow
            and other.index == self.index + self.size
            and self.request.settings == other.request.settings
        )

    def join(self, other: Batch) -> Batch:
        """Add the prompts of another one."""
        assert isinstance(self.request, GenerateRequest)
        request = evolve(self.request, prompts=self.request.prompts + other.request.prompts, name=None)
        return evolve(self, request=request, names=self.names + other.names)

    def halves(self) -> tuple[Batch, Batch]:
        """Take it apart."""
        assert isinstance(self.request, GenerateRequest)
        at = self.size // 2
        step = 0 if self.is_one_item else at
        first, second = self.request.prompts[:at], self.request.prompts[at:]
        return (
            evolve(self, request=evolve(self.request, prompts=first), names=self.names[:at]),
            evolve(
                self,
                request=evolve(self.request, prompts=second),
                place=self.place + at,
                index=self.index + step,
                names=self.names[at:],
            ),
        )


def as_batch(item: object, place: int, index: int) -> Batch:
    """Make the batch of one item.

    Raises:
        InvalidRequestError: It is none: nothing was sent.
    """
    if isinstance(item, str):
        item = GenerateRequest(item)
    if not isinstance(item, GenerateRequest | EditRequest):
        raise InvalidRequestError(
            f"Item {index} is neither a str nor a GenerateRequest or EditRequest, but {type(item).__name__}. "
            "Nothing was sent for it."
        )
    count, name = len(item.prompts), item.name
    if count == 1 and name is None:
        return Batch(item, place, index, is_one_item=False, names=_UNNAMED)
    names = (name,) if count == 1 else tuple(None if name is None else f"{name}-{n}" for n in range(count))
    return Batch(item, place, index, is_one_item=count > 1, names=names)


@define(frozen=True)
class Options:
    """How generate_many goes about it. The arguments are those of `AsyncConceptViz.generate_many`.

    Raises:
        InvalidRequestError: One of them is not what it can be.
    """

    batch_size: int
    max_in_flight: int
    ordered: bool
    folder: Path | None
    timeout: float | None

    def __attrs_post_init__(self) -> None:
        _check_whole("batch_size", self.batch_size, MAX_PROMPTS)
        _check_whole("max_in_flight", self.max_in_flight, None)
        timeout = self.timeout
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0
        ):
            raise InvalidRequestError(f"timeout must be a number of seconds above 0, not {timeout!r}.")


def _check_whole(name: str, value: object, most: int | None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= (most or value):
        raise InvalidRequestError(f"{name} must be {f'1 to {most}' if most else 'at least 1'}, not {value!r}.")


def check_items(items: object) -> None:
    """Check what is to be drawn from.

    Raises:
        InvalidRequestError: It is a single prompt, or nothing that can be drawn from.
    """
    if isinstance(items, str | bytes | bytearray | GenerateRequest | EditRequest):
        raise InvalidRequestError(
            f"generate_many takes any number of items, not one {type(items).__name__}: put it in a list. "
            "Nothing was sent."
        )
    if not isinstance(items, Iterable | AsyncIterable):
        raise InvalidRequestError(
            f"Items are an iterable or an async iterable, not {type(items).__name__}. Nothing was sent."
        )


async def draw(items: Items) -> AsyncGenerator[object, None]:
    """Draw the items one by one; an async generator among them is closed at the end, however that comes."""
    if not isinstance(items, AsyncIterable):
        for item in items:
            yield item
        return
    iterator = aiter(items)
    try:
        async for drawn in iterator:
            yield drawn
    finally:
        close = getattr(iterator, "aclose", None)
        if close is not None:
            with anyio.CancelScope(shield=True):
                await close()


def in_threads(items: Items) -> Items:
    """Have the items drawn in worker threads, if they come one by one: that may block, and every other call with it."""
    if isinstance(items, Sequence | AsyncIterable) or not isinstance(items, Iterable):
        return items
    return _DrawnInThreads(items)


class _DrawnInThreads(AsyncIterator[Item]):
    """An iterable that may block, or call a blocking client itself."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._iterator: Iterator[Item] = iter(items)

    async def __anext__(self) -> Item:
        item = await to_thread.run_sync(next, self._iterator, _END)
        if item is _END:
            raise StopAsyncIteration
        return item
