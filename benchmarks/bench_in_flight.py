"""P4, P6, P7: does a look cost the same however many wait, and what do 10,000 waiting tasks cost?

- P4: tasks that never end are looked at 2,500 times a second, if the client gets so far: one of them without rest, then
  1,000 of them each at a tenth of real time. CPU per look; `x_at_one` is its ratio to the same client with one task.
- P6: 10,000 at once in real time: tasks take 30 to 90 s, looks are 3 to 5 s apart.
- P7: 10,000 at once at a tenth of real time, ten times what P6 asks for: more than one core of Python can do. How late
  do results get?
"""

from __future__ import annotations

from _fanout import CLIENTS, OURS, OURS_GATHERED, Plan, RunFigures, measure, present
from _harness import Goal, report

COUNT = 10_000
WAITING = 1000
RIVALS = ("aiohttp", "httpx.AsyncClient")
# What the last of 10,000 durations between 30 and 90 s, and between 3 and 9 s, comes to.
IDEAL_S = {1.0: 90.0, 0.1: 9.0}
# Milliseconds that each answer is held back, and connections enough for 2,500 looks a second then.
AWAY = {50: 160, 200: 640}
PATIENCE_S = {1.0: 150.0, 0.1: 60.0}
COLUMNS = (
    *("share_of_core", "done", "errors", "last_s", "x_ideal", "delay_mean_s", "delay_p95_s", "cpu_s", "peak_mib"),
    *("opened", "opened_to_look", "most_open", "most_open_to_look", "requests", "mostly"),
)


def cost_of_a_look(name: str) -> RunFigures:
    """Measure the CPU time of a look while many tasks wait, and beside it while one does."""
    one = measure(name, Plan(1, 0.1 / WAITING, endless=True))
    many = measure(name, Plan(WAITING, 0.1, endless=True))
    figures = {**many, "cpu_us_per_look_at_one": one["cpu_us_per_look"]}
    if "cpu_us_per_look" in many:  # else none was answered
        figures["x_at_one"] = float(f"{float(many['cpu_us_per_look']) / float(one['cpu_us_per_look']):.3g}")
    return figures


def ten_thousand(name: str, scale: float, latency_ms: float = 0.0, connections: int | None = None) -> RunFigures:
    """Run 10,000 generations at once."""
    figures = measure(name, Plan(COUNT, scale, latency_ms, connections, PATIENCE_S[scale]))
    figures["x_ideal"] = float(f"{float(figures['last_s']) / IDEAL_S[scale]:.3g}")
    return {column: figures[column] for column in COLUMNS if column in figures}


def main() -> None:
    cells: dict[str, RunFigures] = {}
    for name in present(OURS, OURS_GATHERED, *RIVALS):
        cells[f"{name}, 1,000 waiting"] = cost_of_a_look(name)
    for name in present(OURS, "aiohttp"):
        cells[f"{name}, 10,000 in real time"] = ten_thousand(name, 1.0)
    for latency, connections in AWAY.items():
        away = f"{latency} ms away, {connections} connections"
        cells[f"{OURS}, 10,000 in real time, {away}"] = ten_thousand(OURS, 1.0, latency, connections)
    for name in present(OURS, *RIVALS):
        cells[f"{name}, 10,000 at a tenth"] = ten_thousand(name, 0.1)
    look, real, tenth = (f"{OURS}, {what}" for what in ("1,000 waiting", "10,000 in real time", "10,000 at a tenth"))
    report(
        "What does a look cost while thousands wait, and what do 10,000 waiting tasks?",
        "share_of_core",
        cells,
        [
            Goal("P4", "CPU per look at 1,000 waiting, x itself at 1", look, "x_at_one", 1.2, 1.0),
            Goal("P6", "10,000 in real time: done", real, "done", COUNT, at_least=True),
            Goal("P6", "errors", real, "errors", 0),
            Goal("P6", "share of a core", real, "share_of_core", 0.75, 0.45),
            Goal("P6", "peak memory of the process, MiB", real, "peak_mib", 64, 40),
            Goal("P6", "connections opened, those of submits aside", real, "opened_to_look", 40, 35),
            Goal("P7", "10,000 at a tenth: last result, x ideal", tenth, "x_ideal", 1.5, 1.2),
            Goal("P7", "delay, s at the 95th percentile", tenth, "delay_p95_s", 2.5, 1.0),
        ],
        {
            "base": "aiohttp",
            "rounds": 1,
            "not_installed": [name for name in CLIENTS if name in RIVALS and name not in present(*RIVALS)],
            "count": COUNT,
        },
    )


if __name__ == "__main__":
    main()
