"""P11: what does the upload of 4 images of 20 MB cost beside `curl -F`?

Wall time from the paths to the answer, the files in the disk's cache. The memory is what Python holds at the peak
beyond what it held before: in MiB, and as a multiple of the 80 MB that are sent. `reads_on_loop` counts the reads of
files in the event loop's own thread, each of which is a slow disk's chance to stall every other task.
"""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import IO, Any, TypeVar

import httpx
from _harness import KEY, Benchmark, Figures, Goal, per_run, per_run_async
from _server import IMAGE_BYTES, build_image

from conceptviz import AsyncConceptViz, ConceptViz

T = TypeVar("T")

IMAGES = 4
PAYLOAD_MIB = IMAGES * IMAGE_BYTES / 2**20
PROMPT = "Combine these references into one clean diagram"
HEADERS = {"Authorization": f"Bearer {KEY}"}

BENCHMARK = Benchmark(
    "What does the upload of 4 images of 20 MB cost, beside `curl -F`?",
    figure="wall_ms",
    base="curl -F",
    rounds=5,
    goals=[
        Goal("P11", "upload of 4 x 20 MB, x `curl -F`", "AsyncConceptViz", "ratio", 2.0, 1.2),
        Goal("P11", "its memory, x payload", "AsyncConceptViz", "memory_x_payload", 2.2, 0.05),
        Goal("P11", "its reads on the loop", "AsyncConceptViz", "reads_on_loop", 0, 0),
    ],
)


def sources(folder: Path) -> list[Path]:
    """Return the images to send, which are made once for all runs of a cell."""
    paths = [folder.parent / f"image-{n}.png" for n in range(IMAGES)]
    for path in paths:
        if not path.exists():
            path.write_bytes(build_image())
    return paths


def opened(files: ExitStack, folder: Path) -> list[IO[bytes]]:
    return [files.enter_context(path.open("rb")) for path in sources(folder)]


def with_payload(figures: Figures) -> Figures:
    return figures | {"memory_x_payload": figures["memory_mib"] / PAYLOAD_MIB}


def measured_async(
    open_client: Callable[[], AbstractAsyncContextManager[T]], upload: Callable[[T, Path], Awaitable[object]]
) -> Figures:
    """Measure awaited uploads, and count the reads in this thread during the second one."""
    runs = reads = 0

    def count(_: FrameType, event: str, function: Any) -> None:
        nonlocal reads
        if event == "c_call" and function.__name__ in {"read", "readinto", "readall", "read1"}:
            reads += isinstance(function.__self__, io.IOBase)

    async def run(client: T, folder: Path) -> None:
        nonlocal runs
        runs += 1
        if runs == 2:
            sys.setprofile(count)
        try:
            await upload(client, folder)
        finally:
            sys.setprofile(None)

    return with_payload(per_run_async(open_client, run)) | {"reads_on_loop": reads}


@BENCHMARK.cell("curl -F")
def curl(url: str) -> Figures:
    def upload(folder: Path) -> None:
        command = ["curl", "--silent", "--show-error", "--fail", "-H", f"Authorization: Bearer {KEY}"]
        command += ["-F", f"prompt={PROMPT}"]
        for path in sources(folder):
            command += ["-F", f"image=@{path}"]
        subprocess.run([*command, f"{url}/edit"], stdout=subprocess.DEVNULL, check=True)

    figures = per_run(upload)
    del figures["memory_mib"]  # curl's own is not to be seen from here
    return figures


@BENCHMARK.cell("AsyncConceptViz")
def ours_async(url: str) -> Figures:
    return measured_async(
        lambda: AsyncConceptViz(KEY, base_url=url), lambda cv, folder: cv.submit_edit(PROMPT, sources(folder))
    )


@BENCHMARK.cell("ConceptViz")
def ours_sync(url: str) -> Figures:
    with ConceptViz(KEY, base_url=url) as cv:
        return with_payload(per_run(lambda folder: cv.submit_edit(PROMPT, sources(folder))))


@BENCHMARK.cell("httpx.AsyncClient")
def httpx_async(url: str) -> Figures:
    async def upload(client: httpx.AsyncClient, folder: Path) -> None:
        with ExitStack() as files:
            images = [("image", file) for file in opened(files, folder)]
            response = await client.post(f"{url}/edit", data={"prompt": PROMPT}, files=images)
            response.raise_for_status().json()

    return measured_async(lambda: httpx.AsyncClient(headers=HEADERS, timeout=30), upload)


@BENCHMARK.cell("httpx.Client")
def httpx_sync(url: str) -> Figures:
    with httpx.Client(headers=HEADERS, timeout=30) as client:

        def upload(folder: Path) -> None:
            with ExitStack() as files:
                images = [("image", file) for file in opened(files, folder)]
                client.post(f"{url}/edit", data={"prompt": PROMPT}, files=images).raise_for_status().json()

        return with_payload(per_run(upload))


@BENCHMARK.cell("requests", needs="requests")
def requests(url: str) -> Figures:
    with import_module("requests").Session() as session:
        session.headers.update(HEADERS)

        def upload(folder: Path) -> None:
            with ExitStack() as files:
                images = [("image", file) for file in opened(files, folder)]
                response = session.post(f"{url}/edit", data={"prompt": PROMPT}, files=images)
                response.raise_for_status()
                response.json()

        return with_payload(per_run(upload))


@BENCHMARK.cell("aiohttp", needs="aiohttp")
def aiohttp(url: str) -> Figures:
    module = import_module("aiohttp")

    async def upload(session: Any, folder: Path) -> None:
        with ExitStack() as files:
            form = module.FormData()
            form.add_field("prompt", PROMPT)
            for file in opened(files, folder):
                form.add_field("image", file, filename=Path(file.name).name)
            async with session.post(f"{url}/edit", data=form) as response:
                response.raise_for_status()
                await response.json()

    return measured_async(lambda: module.ClientSession(headers=HEADERS), upload)


if __name__ == "__main__":
    BENCHMARK.main()
