"""10,000 prompts of which some are refused, fail or go unanswered, a kill -9 in the middle, and the service's book.

    python -m tests.faults.fan_out --prompts 10000 --json tests/faults/results/fan_out.json

A process hands requests with keys to `generate_many` and is killed when half of them were accepted; the same program
then runs again to its end, on the same journal. A third process has the same prompts without keys, in batches of four.
What each prompt was charged is read from the book of the service, which is in this process. It prints its figures and
ends with 1 if something was charged twice, if an outcome is wrong or missing, or if the second run submitted what had
been accepted before.

A failed task is refunded, and then its key may be submitted again (`_attempts.is_free`): the second run does so for
every failure that the first had seen. What the first had not seen fail is taken up, not submitted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import anyio
from attrs import field, frozen

from conceptviz import AsyncConceptViz, AttemptState, GenerateRequest, Journal, Outcome, Polling, __version__
from conceptviz.simulator import Simulator, render_tiny
from conceptviz.simulator._world import Reply, Request

# What a prompt without a picture comes to, by its number modulo 200, and what says so in its text. No two of them are
# ever in one batch of four.
FATES = {
    3: ("ModerationBlockedError", "[sim:blocked]"),
    103: ("ModerationBlockedError", "[sim:blocked]"),
    53: ("GenerationFailedError", "[sim:failed]"),
    153: ("GenerationFailedError", "[sim:failed]"),
    127: ("SubmissionUnknownError", "[lost]"),
}
IMAGE, BLOCKED, FAILED, UNKNOWN = "image", "ModerationBlockedError", "GenerationFailedError", "SubmissionUnknownError"
COST = 2  # Source: "Credit Cost", cv-2 at 2k.
SIZE = 4
CONNECTIONS = 20
# Seconds after which a run is given up.
PATIENCE = 900


def prompt(number: int) -> str:
    return f"{number}. diagram {FATES.get(number % 200, ('', ''))[1]}".strip()


def fate(text: str) -> str:
    return FATES.get(int(text.partition(".")[0]) % 200, (IMAGE, ""))[0]


@frozen
class Post:
    """A submit that the service has read.

    Attributes:
        prompts: Its prompts.
        task_id: The task that was charged for it, or None if it was refused.
    """

    prompts: tuple[str, ...]
    task_id: str | None


class Service(Simulator):
    """A simulator whose book says what was charged for which prompt, whether anybody heard of it or not."""

    def __init__(self, prompts: int, speed: float) -> None:
        super().__init__(credits=4 * COST * prompts, speed=speed, render=render_tiny)
        self.posts: list[Post] = []
        self.faults.add("submit", accept=True, close=True, containing="[lost]", times=None)

    async def _act(self, request: Request) -> Reply:
        reply = await super()._act(request)
        if request.kind == "submit":
            self.posts.append(Post(request.prompts, json.loads(reply.body).get("taskId")))
        return reply


@frozen
class Told:
    """What the program told of one prompt.

    Attributes:
        prompt: The prompt.
        kind: "image", or the name of the error's class.
        task_id: The task, if there is one.
    """

    prompt: str
    kind: str
    task_id: str | None


def describe(outcome: Outcome, expected: Told, key: str | None) -> Told:
    """Return what there is to tell of an outcome; an image or a key of somebody else is one of a kind of its own."""
    kind = IMAGE if outcome.error is None else type(outcome.error).__name__
    is_its_own = outcome.prompt == expected.prompt and outcome.key == key
    if outcome.image is not None:
        is_its_own = is_its_own and outcome.image.prompt == outcome.prompt
    return Told(expected.prompt, kind if is_its_own else f"{kind} of another prompt", outcome.task_id)


async def program(
    *, base_url: str, key: str, journal: str | None, told: str, prompts: int, in_flight: int, speed: float
) -> None:
    """What is killed and run again: it generates all prompts, and tells each outcome when it has it."""
    texts = [prompt(number) for number in range(prompts)]
    items = texts if journal is None else [GenerateRequest(text, key=text) for text in texts]
    polling = Polling(
        min_interval=30 / speed, max_interval=45 / speed, first_look=30 / speed, typical=(30 / speed, 90 / speed)
    )
    client = AsyncConceptViz(
        key, base_url=base_url, journal=journal, polling=polling, max_connections=CONNECTIONS, timeout=PATIENCE
    )
    with Path(told).open("w") as mouth:  # noqa: ASYNC230 - a line now and then holds nobody up
        async with client:
            async for outcome in client.generate_many(items, batch_size=SIZE, max_in_flight=in_flight):
                text = texts[outcome.index]
                words = describe(outcome, Told(text, "", None), None if journal is None else text)
                print(json.dumps([words.prompt, words.kind, words.task_id]), file=mouth, flush=True)


@frozen
class Run:
    """One process, from its start to its end.

    Attributes:
        status: Its exit status.
        seconds: How long it ran.
        told: What it told, in that order.
        posts: What it submitted.
    """

    status: int
    seconds: float
    told: list[Told] = field(repr=False)
    posts: list[Post] = field(repr=False)

    @property
    def accepted(self) -> dict[str, list[str]]:
        """The tasks that each prompt was charged for."""
        tasks = defaultdict(list)
        for post in self.posts:
            for text in post.prompts if post.task_id is not None else ():
                tasks[text].append(str(post.task_id))
        return tasks


def run(service: Service, is_enough: Callable[[], bool] = lambda: False, **told: Any) -> Run:
    """Run the program in a process of its own; kill it as soon as it is enough."""
    before, began = len(service.posts), time.monotonic()
    command = [sys.executable, "-m", "tests.faults.fan_out", "--program", json.dumps(told)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        while process.poll() is None and time.monotonic() < began + PATIENCE:
            if is_enough():
                break
            time.sleep(0.002)
    finally:
        process.kill()
        status = process.wait()
    seconds = time.monotonic() - began
    _wait_for_quiet(service)
    lines = Path(told["told"]).read_text().split("\n")[:-1]  # what is behind the last line's end was being written
    return Run(status, seconds, [Told(*json.loads(line)) for line in lines], service.posts[before:])


def _wait_for_quiet(service: Service) -> None:
    """Wait until what a dead process had sent has been read and charged."""
    seen = -1
    while seen != service.requests.total():
        seen = service.requests.total()
        time.sleep(0.1)


def campaign(
    prompts: int, folder: Path, *, in_flight: int = 400, speed: float = 30.0, backend: str = "asyncio"
) -> dict[str, Any]:
    """Run all three processes; return the figures, with the broken rules under "broken"."""
    told: dict[str, Any] = {"prompts": prompts, "in_flight": in_flight, "speed": speed}
    job: dict[str, Any] = {**told, "backend": backend, "told": str(folder / "told")}
    keyed, plain = Service(prompts, speed), Service(prompts, speed)
    with keyed.serve() as base_url:
        job |= {"base_url": base_url, "key": keyed.api_key, "journal": str(folder / "journal")}
        first = run(keyed, lambda: keyed.ledger.submissions >= prompts // 2, **job)
        second = run(keyed, **job)
        _settle(base_url, speed)
    with Journal(folder / "journal") as journal:
        unknown = {str(entry.key) for entry in journal.entries(AttemptState.UNKNOWN)}
    with plain.serve() as base_url:
        alone = run(plain, **(job | {"base_url": base_url, "key": plain.api_key, "journal": None}))
        _settle(base_url, speed)
    texts = [prompt(number) for number in range(prompts)]
    return {
        **told,
        "backend": backend,
        "versions": {"python": platform.python_version(), "conceptviz": __version__},
        "with keys, killed and run again": _keyed_figures(texts, keyed, first, second, unknown),
        "without keys": _plain_figures(alone, plain),
        "broken": [*judge_keyed(texts, first, second, unknown), *judge_plain(texts, alone)]
        + [f"the ledger: {line}" for line in (*judge_ledger(keyed), *judge_ledger(plain))],
    }


def _settle(base_url: str, speed: float) -> None:
    """Let every task end, and the service write down what it refunds: it does so with the next request."""
    time.sleep(100 / speed)
    with urlopen(base_url.removesuffix("/api/v1")) as answer:
        answer.read()


def judge_keyed(texts: list[str], first: Run, second: Run, unknown: set[str]) -> Iterator[str]:
    """Name each rule that the two runs with keys have broken.

    Args:
        texts: The prompts, which are their keys too.
        first: The run that was killed.
        second: The run to the end.
        unknown: What the journal calls unknown after it.
    """
    if (first.status, second.status) != (-signal.SIGKILL, 0):
        yield f"the first run ended with {first.status}, the second with {second.status}"
    outcomes = {words.prompt: words for words in second.told}
    seen_to_fail = {words.prompt for words in first.told if words.kind == FAILED}
    before, after = first.accepted, second.accepted
    submitted = Counter(text for post in second.posts for text in post.prompts)
    # Sent and not answered when the process was killed.
    under_way = {text for text in unknown if fate(text) != UNKNOWN}
    if len(under_way) > CONNECTIONS:
        yield f"{len(under_way)} were under way at the kill"
    if len(second.told) != len(texts):
        yield f"{len(second.told)} outcomes of {len(texts)}"
    for text in texts:
        tasks = before.get(text, []) + after.get(text, [])
        words = outcomes.get(text, Told(text, "nothing", None))
        # An outcome of the killed process may have been seen and not told; its refund is in the journal.
        may_be_again = fate(text) == FAILED and text in before
        if len(tasks) > 1 + may_be_again:
            yield f"{text}: charged {len(tasks)} times"
        if text in before and submitted[text] and not may_be_again:
            yield f"{text}: was accepted before and is submitted again"
        if text in seen_to_fail and not submitted[text]:
            yield f"{text}: was refunded before and is not submitted again"
        if submitted[text] > 1:
            yield f"{text}: was submitted {submitted[text]} times by the second run"
        if words.kind != (UNKNOWN if text in under_way else fate(text)):
            yield f"{text}: came to {words.kind}"
        if words.kind in {IMAGE, FAILED} and words.task_id not in tasks[-1:]:
            yield f"{text}: is told as {words.task_id}, and charged were {tasks}"
        if not tasks and words.kind == UNKNOWN and text not in under_way:
            yield f"{text}: is unknown, and was never received"
    for words in first.told:
        if words.kind == IMAGE and words != outcomes.get(words.prompt):
            yield f"{words.prompt}: was told as {words}, then as {outcomes.get(words.prompt)}"


def judge_plain(texts: list[str], run: Run) -> Iterator[str]:
    """Name each rule that the run without keys has broken. What a batch is, the service's book says."""
    if run.status != 0:
        yield f"the run without keys ended with {run.status}"
    if sorted(words.prompt for words in run.told) != sorted(texts):
        yield f"without keys: {len(run.told)} outcomes of {len(texts)}"
    outcomes = {words.prompt: words for words in run.told}
    accepted = {text: post for post in run.posts if post.task_id for text in post.prompts}
    charges = Counter(text for post in run.posts if post.task_id for text in post.prompts)
    for text in texts:
        if charges[text] != (fate(text) != BLOCKED):
            yield f"{text}: charged {charges[text]} times"
        # A task is all of its prompts: it fails, or is not heard of, for each of them.
        task = accepted.get(text, Post((text,), None))
        expected = next(iter({fate(other) for other in task.prompts} - {IMAGE}), IMAGE)
        words = outcomes.get(text, Told(text, "nothing", None))
        task_id = task.task_id if expected in {IMAGE, FAILED} else None
        if (words.kind, words.task_id) != (expected, task_id):
            yield f"{text}: is told as {words.kind} of {words.task_id}, and is {expected} of {task_id}"


def judge_ledger(service: Service) -> Iterator[str]:
    """Say whether what was charged for the prompts, and given back for the failed ones, is what the account shows."""
    accepted = [post for post in service.posts if post.task_id is not None]
    charged = sum(COST * len(post.prompts) for post in accepted)
    refunded = sum(COST * len(post.prompts) for post in accepted if FAILED in map(fate, post.prompts))
    ledger = service.ledger
    if (ledger.charged, ledger.refunded) != (charged, refunded):
        yield f"{ledger.charged} charged and {ledger.refunded} refunded, and not {charged} and {refunded}"


def _keyed_figures(texts: list[str], service: Service, first: Run, second: Run, unknown: set[str]) -> dict[str, Any]:
    before, after = first.accepted, second.accepted
    under_way = [text for text in unknown if fate(text) != UNKNOWN]
    return {
        "seconds of the first run": round(first.seconds, 1),
        "seconds of the second run": round(second.seconds, 1),
        "POSTs of the first run": len(first.posts),
        "accepted before the kill": len(before),
        "told before the kill": len(first.told),
        "under way at the kill": len(under_way),
        "of which accepted": sum(text in before for text in under_way),
        "POSTs of the second run": len(second.posts),
        "of which never accepted before": sum(post.prompts[0] not in before for post in second.posts),
        "of which refused as moderated": sum(post.task_id is None for post in second.posts),
        "of which failed and refunded before": sum(post.prompts[0] in before for post in second.posts),
        "prompts charged": len(before.keys() | after.keys()),
        "prompts charged twice and not refunded": sum(
            len(before.get(text, []) + after.get(text, [])) > 1 for text in texts if fate(text) != FAILED
        ),
        "credits charged": service.ledger.charged,
        "credits refunded": service.ledger.refunded,
        "outcomes": _outcomes(second),
    }


def _plain_figures(run: Run, service: Service) -> dict[str, Any]:
    charges = Counter(text for post in run.posts if post.task_id for text in post.prompts)
    return {
        "seconds": round(run.seconds, 1),
        "POSTs": len(run.posts),
        "accepted": sum(post.task_id is not None for post in run.posts),
        "prompts charged once": sum(count == 1 for count in charges.values()),
        "prompts charged twice": sum(count > 1 for count in charges.values()),
        "credits charged": service.ledger.charged,
        "credits refunded": service.ledger.refunded,
        "outcomes": _outcomes(run),
    }


def _outcomes(run: Run) -> dict[str, int]:
    return dict(Counter(words.kind for words in run.told).most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prompts", type=int, default=400)
    parser.add_argument("--in-flight", type=int, default=400, help="tasks unfinished at once")
    parser.add_argument("--speed", type=float, default=30.0, help="how much faster than in reality a task ends")
    parser.add_argument("--backend", choices=("asyncio", "trio"), default="asyncio")
    parser.add_argument("--json", type=Path, help="where the figures are stored, too")
    parser.add_argument("--program", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.program:
        told = json.loads(options.program)
        signal.alarm(PATIENCE)
        anyio.run(_program, told, backend=told.pop("backend"))
        return 0
    with TemporaryDirectory() as folder:
        figures = campaign(
            options.prompts,
            Path(folder),
            in_flight=options.in_flight,
            speed=options.speed,
            backend=options.backend,
        )
    text = json.dumps(figures, indent=2) + os.linesep
    print(text, end="")
    if options.json:
        options.json.write_text(text)
    return 1 if figures["broken"] else 0


async def _program(told: dict[str, Any]) -> None:
    await program(**told)


if __name__ == "__main__":
    sys.exit(main())
