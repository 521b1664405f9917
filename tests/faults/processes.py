"""Programs that submit, in processes of their own that can be killed and interrupted at any instant.

A process that has imported everything forks a child for each job: a child costs some milliseconds. This file is that
process's program, and the handle on it. It runs alone, so it imports nothing of the laboratory, and it starts no thread
before a fork.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

KEY = "cvk_OnlyInAProcessThatIsKilled"
# Seconds after which a child is taken for hanging.
HANG = 20
# The methods of the journal that write, by what they write.
RECORDS = {
    "INTENT": "claim",
    "SENDING": "sending",
    "INTENT again": "send_again",
    "ACCEPTED": "accepted",
    "an end": "ended",
    "a task's end": "finished",
}
POINTS = (
    *(f"{when} {record}" for record in RECORDS for when in ("before", "in", "after")),
    "the answer was read",
)


class Children:
    """A process that forks a child for each job."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.communicate()

    def run(
        self,
        base_url: str,
        journal: Path,
        keys: list[str],
        *,
        waits: bool = False,
        backend: str = "asyncio",
        signals: list[tuple[float, int]] | None = None,
        point: str | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Run a child that submits each key's work, and wait until it is dead.

        Args:
            base_url: The API.
            journal: The child's journal.
            keys: The names of the work, and its prompts.
            waits: Whether it waits for the tasks, too.
            backend: "asyncio" or "trio".
            signals: What it is sent: each after so many seconds.
            point: Where it kills itself: one of `POINTS`.

        Returns:
            Its wait status, and what it told: the outcome of each key, and under "raised" what ended it.
        """
        job = {
            "base_url": base_url,
            "journal": str(journal),
            "keys": keys,
            "waits": waits,
            "backend": backend,
            "signals": signals or [],
            "point": point,
        }
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(job) + "\n")
        stdin.flush()
        answer = json.loads(stdout.readline())
        return answer["status"], answer["told"]


def _serve() -> None:
    """Fork a child for each line of stdin; answer with a line when it is dead."""
    _import_everything()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # until a child can take it
    for line in sys.stdin:
        job = json.loads(line)
        ear, mouth = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ear)
            _be_a_child(job, mouth)
        os.close(mouth)
        for delay, number in job["signals"]:
            time.sleep(delay)
            os.kill(pid, number)
        told: dict[str, Any] = {}
        with os.fdopen(ear) as stream:
            for words in stream:
                with suppress(ValueError):  # killed in the middle of a line
                    told.update(json.loads(words))
        print(json.dumps({"status": os.waitpid(pid, 0)[1], "told": told}), flush=True)


def _import_everything() -> None:
    """Import what the children would, down to what libraries import only when they are used."""
    for name in (
        "anyio._backends._asyncio",
        "anyio._backends._trio",
        "conceptviz._client",
        "conceptviz._connections",
        "conceptviz._database",
        "conceptviz._httpcore",
    ):
        importlib.import_module(name)
    logging.getLogger("conceptviz").addHandler(logging.NullHandler())


def _be_a_child(job: dict[str, Any], mouth: int) -> None:
    import anyio

    signal.alarm(HANG)

    def tell(**words: Any) -> None:
        os.write(mouth, (json.dumps(words) + "\n").encode())

    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with _killed_at(job["point"]):
            anyio.run(_submit, job, tell, backend=job["backend"])
    except KeyboardInterrupt:
        tell(raised="KeyboardInterrupt")
    except BaseException:  # noqa: BLE001 - it is told, whatever it is
        tell(raised=traceback.format_exc())
    finally:
        os._exit(0)


async def _submit(job: dict[str, Any], tell: Callable[..., None]) -> None:
    import anyio

    from conceptviz import AsyncConceptViz, ConceptVizError, Polling, Retries, SubmissionUnknownError

    async def work(key: str) -> None:
        try:
            task = await cv.submit(key, key=key)
            tell(**{key: task.id})
            if job["waits"]:
                await task.wait()
        except SubmissionUnknownError as error:
            tell(**{key: {"unknown": error.attempt_id}})
        except ConceptVizError as error:
            tell(**{key: {"error": repr(error)}})

    cv = AsyncConceptViz(
        KEY,
        base_url=job["base_url"],
        journal=job["journal"],
        timeout=5.0,
        retries=Retries(base_delay=0.001, max_delay=0.002),
        polling=Polling(min_interval=0.001, max_interval=0.002, first_look=0.001),
    )
    async with cv:
        if len(job["keys"]) == 1:
            await work(job["keys"][0])
        else:
            async with anyio.create_task_group() as group:
                for key in job["keys"]:
                    group.start_soon(work, key)


@contextmanager
def _killed_at(point: str | None) -> Iterator[None]:
    """Patch the package so that it kills its process at a point."""
    from conceptviz import Journal
    from conceptviz._database import Database
    from conceptviz._transport import Transport

    def here(name: str) -> None:
        if name == point:
            os.kill(os.getpid(), signal.SIGKILL)

    writing = threading.local()

    def watch(record: str, name: str) -> None:
        method: Callable[..., Any] = getattr(Journal, name)

        def watched(self: Journal, *arguments: Any, **options: Any) -> Any:
            here(f"before {record}")
            writing.record = record
            given = method(self, *arguments, **options)
            writing.record = None
            here(f"after {record}")
            return given

        setattr(Journal, name, watched)

    transaction = Database.transaction

    @contextmanager
    def watched_transaction(self: Database) -> Iterator[Any]:
        with transaction(self) as db:
            yield db
            here(f"in {getattr(writing, 'record', None)}")  # executed, and not committed

    submit = Transport.submit

    async def watched_submit(self: Transport, *arguments: Any) -> Any:
        submission = await submit(self, *arguments)
        here("the answer was read")
        return submission

    if point is not None:
        for record, name in RECORDS.items():
            watch(record, name)
        Database.transaction = watched_transaction  # type: ignore[method-assign]  # for the rest of its life
        Transport.submit = watched_submit  # type: ignore[method-assign, assignment]  # likewise
    yield


if __name__ == "__main__":
    _serve()
