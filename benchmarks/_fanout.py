"""What the benchmarks of fan-out share: the clients, a run of one of them in a process of its own, and its figures.

Every client is asked for the same: so many generations at once, each submitted and looked at until it is over, with the
same mean time between two looks. What a client has imported and set up before its first request is not counted.

A run is bounded: after its patience the process tells how far it has come, and ends.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from _harness import KEY, clean_environment, serving, version

HEADERS = {"Authorization": f"Bearer {KEY}"}
# "Poll this endpoint every 3-5 seconds"; "Typical generation takes 30-90 seconds."
SPACING, TYPICAL = (3.0, 5.0), (30.0, 90.0)
# Seconds until the submits of a run without end are over, and those that count from then on.
SETTLING, WINDOW = 6.0, 5.0
OURS = "AsyncConceptViz"
OURS_GATHERED = "AsyncConceptViz, gather of generate"

RunFigures = dict[str, float | str]


@dataclass(frozen=True)
class Plan:
    """What a client has to do, and under which conditions.

    Attributes:
        count: How many generations, all at once.
        scale: 1 is real time; 0.1 a tenth of it, for the tasks and for the times between looks.
        latency_ms: How long the server holds each answer back.
        connections: The most that a client may open, if it can be told; None for its own default.
        patience: Seconds until what is left is given up.
        traced: Whether memory is what is measured: Python slows down, so nothing else is then.
        endless: Whether no task ends, so that the cost of looks alone is seen.
    """

    count: int
    scale: float
    latency_ms: float = 0.0
    connections: int | None = None
    patience: float = 120.0
    traced: bool = False
    endless: bool = False

    def scaled(self, times: tuple[float, float]) -> tuple[float, float]:
        return times[0] * self.scale, times[1] * self.scale

    @property
    def mean_spacing(self) -> float:
        return sum(self.scaled(SPACING)) / 2


class Work:
    """The generations of one run, and what became of them."""

    def __init__(self, url: str, plan: Plan) -> None:
        self.url = url
        self.origin = url.removesuffix("/api/v1")
        self.plan = plan
        self.done = 0
        self.errors: Counter[str] = Counter()
        self._spacing = plan.scaled(SPACING)

    def prompts(self) -> Iterator[str]:
        self._before = tracemalloc.get_traced_memory()[0]
        self._started = self._last = time.perf_counter()
        self._cpu = self._last_cpu = time.process_time()
        for number in range(self.plan.count):
            yield f"water cycle diagram {number}"

    def count(self, error: Exception | None = None) -> None:
        if error is None:
            self.done += 1
        else:
            self.errors[type(error).__name__] += 1
        self._last, self._last_cpu = time.perf_counter(), time.process_time()

    async def each(self, generate: Callable[[str], Awaitable[object]]) -> None:
        """Run all generations side by side, each as a task with a loop of its own."""

        async def one(prompt: str) -> None:
            if self.plan.endless:
                # What is asked is what looks cost: no burst of submits, which not every client survives.
                await asyncio.sleep(random.uniform(0.0, SETTLING / 2))
            try:
                await generate(prompt)
            except Exception as error:  # noqa: BLE001 - which one it is, is the client's own affair
                self.count(error)
            else:
                self.count()

        await asyncio.gather(*map(one, self.prompts()))

    async def pause(self) -> None:
        await asyncio.sleep(random.uniform(*self._spacing))

    def figures(self) -> RunFigures:
        if self.plan.traced:
            return {"kib_each": (tracemalloc.get_traced_memory()[1] - self._before) / 1024 / self.plan.count}
        if self.done + self.errors.total() < self.plan.count:
            self._last, self._last_cpu = time.perf_counter(), time.process_time()
        wall, cpu = self._last - self._started, self._last_cpu - self._cpu
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        figures: RunFigures = {
            "done": self.done,
            "errors": self.errors.total(),
            "last_s": wall,
            "cpu_s": cpu,
            "share_of_core": cpu / wall,
            "peak_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),  # bytes there, KiB here
        }
        if self.errors:
            figures["mostly"] = self.errors.most_common(1)[0][0]
        return figures


FanOut = Callable[[Work], Awaitable[None]]
CLIENTS: dict[str, tuple[FanOut, str | None]] = {}


def client(name: str, *, needs: str | None = None) -> Callable[[FanOut], FanOut]:
    """Add a client: a function that does all the work it is given."""

    def add(fan_out: FanOut) -> FanOut:
        CLIENTS[name] = fan_out, needs
        return fan_out

    return add


def present(*names: str) -> list[str]:
    """Return those of the clients named, or of all, that are installed."""
    needs = {name: needs for name, (_, needs) in CLIENTS.items()}
    return [name for name in names or CLIENTS if (needed := needs[name]) is None or version(needed) is not None]


def open_ours(work: Work) -> Any:
    import conceptviz._connections  # noqa: F401 - what the first request would import
    from conceptviz import AsyncConceptViz, Polling

    least, most = work.plan.scaled(SPACING)
    polling = Polling(
        min_interval=least, max_interval=most, first_look=least, typical=work.plan.scaled(TYPICAL), timeout=3600
    )
    return AsyncConceptViz(KEY, base_url=work.url, max_connections=work.plan.connections or 20, polling=polling)


@client(OURS)
async def ours(work: Work) -> None:
    async with open_ours(work) as cv:
        async for outcome in cv.generate_many(work.prompts(), batch_size=1, max_in_flight=work.plan.count):
            work.count(outcome.error)


@client(OURS_GATHERED)
async def ours_gathered(work: Work) -> None:
    async with open_ours(work) as cv:
        await work.each(cv.generate)


@client("aiohttp", needs="aiohttp")
async def aiohttp(work: Work) -> None:
    module = import_module("aiohttp")
    connector = module.TCPConnector(limit=work.plan.connections or 100)
    async with module.ClientSession(headers=HEADERS, connector=connector) as session:

        async def generate(prompt: str) -> None:
            async with session.post(f"{work.url}/generate", json={"prompt": prompt}) as response:
                task_id = (await response.json())["taskId"]
            while True:
                await work.pause()
                async with session.get(f"{work.url}/task/{task_id}") as response:
                    if (await response.json())["status"] == "completed":
                        return

        await work.each(generate)


@client("httpx.AsyncClient")
async def httpx(work: Work) -> None:
    async with import_module("httpx").AsyncClient(headers=HEADERS) as session:

        async def generate(prompt: str) -> None:
            task_id = (await session.post(f"{work.url}/generate", json={"prompt": prompt})).json()["taskId"]
            while True:
                await work.pause()
                if (await session.get(f"{work.url}/task/{task_id}")).json()["status"] == "completed":
                    return

        await work.each(generate)


@client("replicate, async_wait", needs="replicate")
async def replicate(work: Work) -> None:
    session = import_module("replicate").Client(api_token=KEY, base_url=work.origin)
    session.poll_interval = work.plan.mean_spacing

    async def generate(prompt: str) -> None:
        prediction = await session.predictions.async_create(version="1", input={"prompt": prompt})
        await prediction.async_wait()

    await work.each(generate)


@client("fal-client, subscribe", needs="fal-client")
async def fal_client(work: Work) -> None:
    # It has no option for its host.
    module: Any = import_module("fal_client.client")
    module.QUEUE_URL_FORMAT = f"{work.origin}/"
    module._BACKUP_DOMAINS = {}
    session = module.AsyncClient(key=KEY)

    async def generate(prompt: str) -> None:
        await session.subscribe("fal/flux", {"prompt": prompt}, interval=work.plan.mean_spacing)

    await work.each(generate)


@client("openai, create_and_poll", needs="openai")
async def openai(work: Work) -> None:
    # The attribute imports what it is made of.
    videos = import_module("openai").AsyncOpenAI(api_key=KEY, base_url=f"{work.origin}/v1").videos

    async def generate(prompt: str) -> None:
        await videos.create_and_poll(
            model="sora-2", prompt=prompt, poll_interval_ms=round(work.plan.mean_spacing * 1000)
        )

    await work.each(generate)


@client("runwayml, wait_for_task_output", needs="runwayml")
async def runwayml(work: Work) -> None:
    images = import_module("runwayml").AsyncRunwayML(api_key=KEY, base_url=work.origin).text_to_image
    # It has no option for this, only constants.
    module: Any = import_module("runwayml.lib.polling")
    module.POLL_TIME, module.POLL_JITTER = work.plan.mean_spacing, (SPACING[1] - SPACING[0]) * work.plan.scale

    async def generate(prompt: str) -> None:
        created = await images.create(model="gen4_image", prompt_text=prompt, ratio="1024:1024")
        await created.wait_for_task_output()

    await work.each(generate)


def measure(name: str, plan: Plan) -> RunFigures:
    """Run one client in a fresh process against a fresh server; return what both have counted."""
    scale = plan.scale if not plan.endless else 1e6
    with serving("_fanout_server.py", str(scale), str(plan.latency_ms)) as url:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, name, url, json.dumps(asdict(plan))],
            env=clean_environment(),
            stdout=subprocess.PIPE,
            timeout=plan.patience + 30,
            check=True,
        )
        figures: RunFigures = json.loads(done.stdout)
        stats = read_stats(url)
    # A slow client may be stopped before it has connected; one that fails without is a fault of the benchmark.
    if stats["unknown"] or (figures.get("errors") and not stats["opened"]):
        raise SystemExit(f"{name}: the server was asked for nothing, or for what it does not know: {stats}")
    if not plan.traced and not plan.endless:
        figures |= {each: value for each, value in stats.items() if each.startswith(("delay", "opened", "most"))}
        figures["requests"] = stats["posts"] + stats["looks"]
    return {each: _round(value) if isinstance(value, float) else value for each, value in figures.items()}


def read_stats(url: str) -> dict[str, float]:
    """Ask the server for its books."""
    connection = http.client.HTTPConnection(url.split("/")[2])
    connection.request("GET", "/stats")
    stats: dict[str, float] = json.loads(connection.getresponse().read())
    connection.close()
    return stats


def _round(value: float) -> float:
    return round(value) if value >= 100 else float(f"{value:.3g}")


async def _work(name: str, work: Work) -> None:
    working = asyncio.ensure_future(CLIENTS[name][0](work))
    if not work.plan.endless:
        await working
        return
    await asyncio.sleep(SETTLING)
    looks, cpu, wall = read_stats(work.url)["looks"], time.process_time(), time.perf_counter()
    await asyncio.sleep(WINDOW)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    looks = read_stats(work.url)["looks"] - looks
    if working.done():
        working.result()
    _tell({"looks_per_s": looks / wall, **({"cpu_us_per_look": cpu / looks * 1e6} if looks else {})})


def _tell(figures: RunFigures) -> None:
    """Print the figures and end: thousands of requests under way would take long to take leave of."""
    print(json.dumps(figures), flush=True)
    os._exit(0)


def main() -> None:
    _, name, url, plan = sys.argv
    work = Work(url, Plan(**json.loads(plan)))
    # A signal, because an event loop that is busy enough comes late to its own timers.
    signal.signal(signal.SIGALRM, lambda *_: _tell(work.figures()))
    signal.setitimer(signal.ITIMER_REAL, work.plan.patience)
    if work.plan.traced:
        tracemalloc.start()
    asyncio.run(_work(name, work))
    _tell(work.figures())


if __name__ == "__main__":
    main()
