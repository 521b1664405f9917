"""P5: what do 1,000 generations at once cost, from submit to result, and how late is each seen to be over?

At a tenth of real time: tasks take 3 to 9 s, and two looks at one are 0.3 to 0.5 s apart. 1,000 tasks so ask for 2,500
looks a second, which is what 10,000 ask for in real time. Rivals without a spread have the mean, 0.4 s, by their own
option or, where there is none, by their constant; a tenth of their own defaults would ask for 20,000 looks a second
(replicate) or 100,000 (fal), and they would look worse.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from _fanout import CLIENTS, OURS, Plan, RunFigures, measure, present
from _harness import Goal, report

COUNT = 1000
SCALE = 0.1
# What the last of 1,000 durations between 3 and 9 s comes to.
IDEAL_S = 9.0
# How long the growth of memory is watched: all is submitted or queued by then, and the last task is over.
MEMORY_S = 20.0
# Few at once are so little work that several clients can do it side by side: how many at once, and how many clients.
SIDE_BY_SIDE = {COUNT // 100: 8, COUNT // 10: 3}
# Milliseconds that each answer is held back, and connections enough for 2,500 looks a second then.
AWAY = {50: 160, 200: 640}
COLUMNS = (
    *("cpu_s", "done", "errors", "last_s", "delay_mean_s", "delay_p95_s", "kib_each"),
    *("opened", "opened_to_look", "most_open", "most_open_to_look", "requests", "mostly"),
)


def pick(figures: RunFigures) -> RunFigures:
    return {name: figures[name] for name in COLUMNS if name in figures}


def side_by_side(names: list[str], count: int, runs: int) -> dict[str, RunFigures]:
    """Run several clients at a time, each with a server of its own."""
    with ThreadPoolExecutor(runs) as runners:
        return dict(zip(names, runners.map(lambda name: measure(name, Plan(count, SCALE)), names), strict=True))


def main() -> None:
    names = present()
    in_flight = {
        count: {name: pick(figures) for name, figures in side_by_side(names, count, runs).items()}
        for count, runs in SIDE_BY_SIDE.items()
    }
    cells: dict[str, RunFigures] = {}
    for name in names:
        memory = measure(name, Plan(COUNT, SCALE, patience=MEMORY_S, traced=True))
        cells[name] = pick(measure(name, Plan(COUNT, SCALE)) | memory)
    for latency, connections in AWAY.items():
        for name in present(OURS, "aiohttp"):
            cells[f"{name}, {latency} ms away"] = pick(measure(name, Plan(COUNT, SCALE, latency)))
            plan = Plan(COUNT, SCALE, latency, connections)
            cells[f"{name}, {latency} ms away, {connections} connections"] = pick(measure(name, plan))
    if "aiohttp" in cells:
        for figures in cells.values():
            figures["ratio"] = float(f"{float(figures['cpu_s']) / float(cells['aiohttp']['cpu_s']):.3g}")
    report(
        "What do 1,000 generations at once cost, at a tenth of real time?",
        "cpu_s",
        cells,
        [
            Goal("P5", "1,000 at once: done", OURS, "done", COUNT, at_least=True),
            Goal("P5", "errors", OURS, "errors", 0),
            Goal("P5", f"last result, s (ideal {IDEAL_S:g})", OURS, "last_s", 9.9, 9.6),
            Goal("P5", "connections opened, those of submits aside", OURS, "opened_to_look", 24, 19),
            Goal("P5", "connections open at once, those of submits aside", OURS, "most_open_to_look", 24, 19),
            Goal("P5", "CPU, x bare aiohttp", OURS, "ratio", 2.0, 1.3),
            Goal("P5", "delay, s at the 95th percentile", OURS, "delay_p95_s", 0.45, 0.42),
            Goal("P5", "memory for each generation, streamed, KiB", OURS, "kib_each", 2, 0.7),
        ],
        {
            "base": "aiohttp",
            "rounds": 1,
            "not_installed": [name for name in CLIENTS if name not in names],
            "count": COUNT,
            "in_flight": in_flight,
        },
    )


if __name__ == "__main__":
    main()
