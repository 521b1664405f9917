"""Tasks that a caller's cancellation does not reach.

What lives here: work at whose end something is at stake, and work that goes on between the steps of an iterator. The
one module that knows which event loop it is in, because neither can be had of anyio alone. What must never live here:
anything that knows ConceptViz.
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import anyio
from attrs import define

T = TypeVar("T")

# Seconds that a submit under way is still given after its caller was cancelled: its answer holds the id of paid work.
GRACE = 10.0


@define
class Stake:
    """What work and whoever waits for it tell each other.

    Attributes:
        is_held: Whether the work has begun something that must not be broken off; the work says so.
        is_stopped: Whether nobody waits for the work any more: it is to begin nothing new.
    """

    is_held: bool = False
    is_stopped: bool = False


async def to_the_end(work: Callable[[Stake], Awaitable[T]]) -> T:
    """Run `work` in a task of its own, which the cancellation of this one does not reach while something is at stake.

    A shielded scope around the work would not do: the event loop's own cancellation, which is what `asyncio.wait_for`,
    `Task.cancel` and the first Ctrl-C use, goes through it. It is the waiting that is cancelled here, not the work.
    When it is, work that holds nothing is cancelled with it; else it is given `GRACE` seconds to finish what it began.
    """
    stake, done = Stake(), anyio.Event()
    shield = anyio.CancelScope(shield=True)
    values: list[T] = []
    errors: list[BaseException] = []
    has_begun = False

    async def run() -> None:
        nonlocal has_begun
        has_begun = True
        try:
            with shield:
                try:
                    values.append(await work(stake))
                except BaseException as error:  # noqa: BLE001 - SystemExit of a hook too belongs to the caller
                    errors.append(error)
        finally:
            done.set()

    trio = sys.modules.get("trio")
    if trio is not None:
        # Its Ctrl-C is raised in whatever is running, which could be in the middle of reading an answer.
        run = trio.lowlevel.enable_ki_protection(run)
    interruption: BaseException | None = None
    try:
        async with anyio.create_task_group() as tasks:
            try:
                tasks.start_soon(run)
                await done.wait()
            except BaseException as error:  # noqa: BLE001 - it is raised below, when the work has ended
                interruption = error
                stake.is_stopped = True
                shield.deadline = anyio.current_time() + (GRACE if stake.is_held else 0.0)
                with anyio.CancelScope(shield=True):
                    # asyncio cancels every task when its loop ends: one that has not begun never does, nor says so.
                    while has_begun and not done.is_set():
                        try:
                            await done.wait()
                        except anyio.get_cancelled_exc_class():  # noqa: PERF203 - a loop of two turns
                            pass  # to be cancelled once more, by the event loop itself, changes nothing
                        except BaseException as error:  # noqa: BLE001 - a second Ctrl-C on trio: that ends it at once
                            interruption = error
                            shield.cancel()
    except BaseException as error:  # noqa: BLE001 - a Ctrl-C on trio, between two of these lines
        interruption = interruption or error
    if interruption is not None:
        raise _alone(interruption)
    if errors:
        raise _alone(errors[0])
    return values[0]


def _alone(error: BaseException) -> BaseException:
    """Return the one error of a group: trio's Ctrl-C comes in one where it meets a group of tasks."""
    while len(inner := tuple(getattr(error, "exceptions", ()))) == 1:
        error = inner[0]
    return error


def spawn(work: Callable[[], Coroutine[Any, Any, None]]) -> object:
    """Start `work` in a task that belongs to the event loop; return what keeps it alive.

    It ends with the loop if not before, and must not raise: nobody is there to hear of it. Who started it sees to it
    that it is stopped.
    """
    trio = sys.modules.get("trio")
    if trio is not None and trio.lowlevel.in_trio_run():
        return trio.lowlevel.spawn_system_task(work)
    # asyncio itself refers to its tasks weakly.
    return sys.modules["asyncio"].get_running_loop().create_task(work())
