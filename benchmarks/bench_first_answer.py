"""P2: how long is it from the start of a process to the API's first answer, beside bare httpx?

CPU time of whole processes, interpreter, imports, client, one look at a task and exit included. Over http, where no
client needs certificates; httpx reads them all the same.
"""

from __future__ import annotations

from _harness import KEY, TASK_ID, Benchmark, Goal

BENCHMARK = Benchmark(
    "What does a whole process cost, up to the first answer, beside one on bare httpx?",
    figure="cpu_ms",
    base="httpx.AsyncClient",
    rounds=11,
    goals=[Goal("P2", "whole process to the first answer, x httpx", "AsyncConceptViz", "ratio", 0.95, 0.77)],
)
BENCHMARK.program(
    "httpx.AsyncClient",
    f"""
import asyncio, sys, httpx
async def main():
    async with httpx.AsyncClient(headers={{"Authorization": "Bearer {KEY}"}}) as client:
        response = await client.get(sys.argv[1] + "/task/{TASK_ID}")
        assert response.json()["status"] == "completed"
asyncio.run(main())
""",
)
BENCHMARK.program(
    "AsyncConceptViz",
    f"""
import asyncio, sys
from conceptviz import AsyncConceptViz
async def main():
    async with AsyncConceptViz("{KEY}", base_url=sys.argv[1]) as cv:
        assert (await cv.task("{TASK_ID}").status()).is_terminal
asyncio.run(main())
""",
)
BENCHMARK.program(
    "AsyncConceptViz, a submit",
    f"""
import asyncio, sys
from conceptviz import AsyncConceptViz
async def main():
    async with AsyncConceptViz("{KEY}", base_url=sys.argv[1]) as cv:
        assert (await cv.submit("the water cycle")).id
asyncio.run(main())
""",
)
BENCHMARK.program(
    "ConceptViz",
    f"""
import sys
from conceptviz import ConceptViz
with ConceptViz("{KEY}", base_url=sys.argv[1]) as cv:
    assert cv.task("{TASK_ID}").status().is_terminal
""",
)
BENCHMARK.program(
    "httpx.Client",
    f"""
import sys, httpx
with httpx.Client(headers={{"Authorization": "Bearer {KEY}"}}) as client:
    assert client.get(sys.argv[1] + "/task/{TASK_ID}").json()["status"] == "completed"
""",
)
BENCHMARK.program(
    "requests",
    f"""
import sys, requests
response = requests.get(sys.argv[1] + "/task/{TASK_ID}", headers={{"Authorization": "Bearer {KEY}"}})
assert response.json()["status"] == "completed"
""",
    needs="requests",
)
BENCHMARK.program(
    "aiohttp",
    f"""
import asyncio, sys, aiohttp
async def main():
    async with aiohttp.ClientSession(headers={{"Authorization": "Bearer {KEY}"}}) as session:
        async with session.get(sys.argv[1] + "/task/{TASK_ID}") as response:
            assert (await response.json())["status"] == "completed"
asyncio.run(main())
""",
    needs="aiohttp",
)

if __name__ == "__main__":
    BENCHMARK.main()
