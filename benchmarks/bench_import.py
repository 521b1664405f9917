"""P1: what does `import conceptviz` cost beside `import httpx`?

CPU time of a whole interpreter that does nothing else, less that of one that does nothing at all.
"""

from __future__ import annotations

from _harness import Benchmark, Goal

BENCHMARK = Benchmark(
    "What does `import conceptviz` cost beside `import httpx`?",
    figure="cpu_ms",
    base="httpx",
    rounds=9,
    less="nothing",
    goals=[Goal("P1", "import, x httpx", "conceptviz", "ratio", 1.15, 0.1)],
)
BENCHMARK.program("nothing", "pass")
BENCHMARK.program("conceptviz", "import conceptviz")
BENCHMARK.program("conceptviz, its client too", "from conceptviz import AsyncConceptViz")
BENCHMARK.program("httpx", "import httpx")
BENCHMARK.program("anyio, attrs and httpx", "import anyio, attrs, httpx")
for module, distribution in {
    "aiohttp": "aiohttp",
    "requests": "requests",
    "fal_client": "fal-client",
    "replicate": "replicate",
    "lumaai": "lumaai",
    "runwayml": "runwayml",
    "openai": "openai",
    "google.genai": "google-genai",
}.items():
    BENCHMARK.program(distribution, f"import {module}", needs=distribution)

if __name__ == "__main__":
    BENCHMARK.main()
