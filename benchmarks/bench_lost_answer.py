"""What does each SDK do when a submit was charged and its answer was lost?

A server on loopback reads the whole POST, counts it as charged, and closes the connection without a word. What has come
in when a client gives up is what its user would have paid for. Every client has its own defaults, its own server and a
process of its own; all run side by side, for 40 seconds at the most. Proxies that are not there stand before every
other host, so that nothing can leave the machine.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from _harness import KEY, Goal, report, version

from conceptviz import AsyncConceptViz, ConceptViz, ConceptVizError

PROMPT = "water cycle diagram"
# Seconds until a client that still sends is stopped.
PATIENCE = 40.0
NOWHERE = "http://127.0.0.1:9"
OURS = (
    "AsyncConceptViz",
    "AsyncConceptViz, a journal, asked twice",
    "ConceptViz",
    "ConceptViz, a journal, asked twice",
)

Submit = Callable[[str], object]
CLIENTS: dict[str, tuple[Submit, str | None]] = {}


def client(name: str, *, needs: str | None = None) -> Callable[[Submit], Submit]:
    """Add a function that submits once, to the server whose URL it is given."""

    def add(submit: Submit) -> Submit:
        CLIENTS[name] = submit, needs
        return submit

    return add


class Server:
    """A server that takes every POST, charges for it, and closes the connection without an answer."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.origin = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.posts = 0
        self.keys = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            connection, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream, suppress(OSError, ValueError):
            method = stream.readline().split(b" ")[0]
            headers = {}
            while line := stream.readline().strip().decode("latin-1"):
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            if "chunked" in headers.get("transfer-encoding", ""):
                while size := int(stream.readline(), 16):
                    stream.read(size + 2)
            else:
                stream.read(int(headers.get("content-length", 0)))
            if method == b"POST":
                self.posts += 1
                self.keys += any("idempotency" in name for name in headers)


@client("AsyncConceptViz")
def ours_async(url: str) -> None:
    async def main() -> None:
        async with AsyncConceptViz(KEY, base_url=f"{url}/api/v1") as cv:
            await cv.submit(PROMPT)

    asyncio.run(main())


@client("AsyncConceptViz, a journal, asked twice")
def ours_async_journal(url: str) -> None:
    async def main(folder: str) -> None:
        async with AsyncConceptViz(KEY, base_url=f"{url}/api/v1", journal=Path(folder, "journal.db")) as cv:
            with suppress(ConceptVizError):
                await cv.submit(PROMPT, key="water cycle")
            await cv.submit(PROMPT, key="water cycle")

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(main(folder))


@client("ConceptViz")
def ours_sync(url: str) -> None:
    with ConceptViz(KEY, base_url=f"{url}/api/v1") as cv:
        cv.submit(PROMPT)


@client("ConceptViz, a journal, asked twice")
def ours_sync_journal(url: str) -> None:
    with (
        tempfile.TemporaryDirectory() as folder,
        ConceptViz(KEY, base_url=f"{url}/api/v1", journal=Path(folder, "journal.db")) as cv,
    ):
        with suppress(ConceptVizError):
            cv.submit(PROMPT, key="water cycle")
        cv.submit(PROMPT, key="water cycle")


@client("openai", needs="openai")
def openai(url: str) -> None:
    import_module("openai").OpenAI(api_key=KEY, base_url=f"{url}/v1").images.generate(prompt=PROMPT)


@client("runwayml", needs="runwayml")
def runwayml(url: str) -> None:
    client = import_module("runwayml").RunwayML(api_key=KEY, base_url=url)
    client.text_to_image.create(model="gen4_image", prompt_text=PROMPT, ratio="1024:1024")


@client("lumaai", needs="lumaai")
def lumaai(url: str) -> None:
    client = import_module("lumaai").LumaAI(auth_token=KEY, base_url=url)
    client.generations.image.create(model="photon-1", prompt=PROMPT)


@client("fal-client", needs="fal-client")
def fal_client(url: str) -> None:
    # It has no option for its host.
    module: Any = import_module("fal_client.client")
    module.QUEUE_URL_FORMAT = f"{url}/"
    module._BACKUP_DOMAINS = {}
    module.SyncClient(key=KEY).submit("fal-ai/flux/dev", {"prompt": PROMPT})


@client("replicate", needs="replicate")
def replicate(url: str) -> None:
    client = import_module("replicate").Client(api_token=KEY, base_url=url)
    client.predictions.create(model="black-forest-labs/flux-schnell", input={"prompt": PROMPT})


@client("google-genai", needs="google-genai")
def google_genai(url: str) -> None:
    client = import_module("google.genai").Client(api_key=KEY, http_options={"base_url": url})
    client.models.generate_content(model="gemini-2.5-flash-image", contents=PROMPT)


@client("requests, as on the API page", needs="requests")
def requests(url: str) -> None:
    import_module("requests").post(f"{url}/api/v1/generate", json={"prompt": PROMPT})


def lose_an_answer(name: str, url: str) -> None:
    """Have one client submit in this process; print the name of the error that it raises."""
    submit, _ = CLIENTS[name]
    try:
        submit(url)
    except Exception as error:  # noqa: BLE001 - which one it is, is the client's own affair
        print(type(error).__name__)


def lose_all_answers() -> None:
    """Have every client submit at the same time; count what arrives."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("CONCEPTVIZ", "FAL_"))}
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        environment |= {name: NOWHERE, name.upper(): NOWHERE}
    environment |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1"}
    present = [name for name, (_, needs) in CLIENTS.items() if needs is None or version(needs) is not None]
    servers = {name: Server() for name in present}
    started = time.perf_counter()
    processes = {
        name: subprocess.Popen(
            [sys.executable, sys.argv[0], name, server.origin],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for name, server in servers.items()
    }

    def outcome(name: str) -> dict[str, float | str]:
        process, server = processes[name], servers[name]
        try:
            told, _ = process.communicate(timeout=started + PATIENCE - time.perf_counter())
            ended = told.strip() or "no error"
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            ended = f"stopped after {PATIENCE:g} s"
        return {
            "posts": server.posts,
            "with_idempotency_key": server.keys,
            "seconds": round(time.perf_counter() - started, 1),
            "ended_with": ended,
        }

    with ThreadPoolExecutor(len(present)) as watchers:
        cells = dict(zip(present, watchers.map(outcome, present), strict=True))
    silent = {name: figures["ended_with"] for name, figures in cells.items() if not figures["posts"]}
    if silent:
        raise SystemExit(f"nothing was sent, so nothing was measured: {silent}")
    report(
        "How often is a submit sent whose answer is lost?",
        "posts",
        cells,
        [Goal("M11", f"POSTs whose answer is lost, {name}", name, "posts", 1) for name in OURS],
        {"rounds": 1, "not_installed": [name for name in CLIENTS if name not in present]},
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        lose_an_answer(sys.argv[1], sys.argv[2])
    else:
        lose_all_answers()
