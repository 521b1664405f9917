"""Draw the stored figures of fan-out into docs/images: rivals beside ours, at a glance.

python benchmarks/plot.py [FOLDER]
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from _fanout import OURS, OURS_GATHERED
from _harness import RESULTS

IMAGES = Path(__file__).parent.parent / "docs" / "images"
# What a reader sees of the names: short, and ours first.
LABELS = {
    OURS: "conceptviz\ngenerate_many",
    OURS_GATHERED: "conceptviz\ngather of generate",
    "aiohttp": "aiohttp, bare",
    "httpx.AsyncClient": "httpx, bare",
    "replicate, async_wait": "replicate\nasync_wait",
    "fal-client, subscribe": "fal-client\nsubscribe",
    "openai, create_and_poll": "openai\ncreate_and_poll",
    "runwayml, wait_for_task_output": "runwayml\nwait_for_task_output",
}
STRONG, RELATED, FLOOR, REST = "#c2410c", "#fb923c", "#1d4ed8", "#9ca3af"
COLORS = {OURS: STRONG, OURS_GATHERED: RELATED, "aiohttp": FLOOR}
INK, FAINT = "#1f2937", "#e5e7eb"
STYLE = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": REST,
    "axes.titlesize": 11.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "conceptviz",  # the same figures, the same file
}

Cells = Mapping[str, Mapping[str, Any]]


def color(name: str) -> str:
    return COLORS.get(name, REST)


def label(name: str, figures: Mapping[str, Any], count: int) -> str:
    """Return a client's name, and how far it came if that was not the end."""
    lacking = "" if figures["done"] == count else f"\nonly {figures['done']:,} of {count:,} done"
    return LABELS[name] + lacking


def draw_bars(axes: Any, cells: Cells, figure: str, title: str) -> None:
    """Draw one bar for each client, with its value at its end."""
    values = [float(figures[figure]) for figures in cells.values()]
    axes.barh(range(len(cells)), values, color=[color(name) for name in cells], height=0.62)
    for row, value in enumerate(values):
        axes.annotate(shown(value), (value, row), xytext=(4, 0), textcoords="offset points", va="center")
    finish(axes, title)
    axes.set_xlim(0, max(values) * 1.25)


def draw_connections(axes: Any, cells: Cells, title: str) -> None:
    """Draw connections opened: those that looks came on, and in a lighter shade those for submits alone."""
    totals = [float(figures["opened"]) for figures in cells.values()]
    looks = [float(figures["opened_to_look"]) for figures in cells.values()]
    shades = [color(name) for name in cells]
    axes.barh(range(len(cells)), totals, color=shades, alpha=0.3, height=0.62)
    axes.barh(range(len(cells)), looks, color=shades, height=0.62)
    for row, (total, look) in enumerate(zip(totals, looks, strict=True)):
        told = shown(look) + (f" + {shown(total - look)}" if total > look else "")
        axes.annotate(told, (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    finish(axes, title)
    axes.set_xlim(0, max(totals) * 1.4)


def draw_delays(axes: Any, cells: Cells, title: str) -> None:
    """Draw for each client a line from the mean to the 95th percentile."""
    most = max(float(figures.get("delay_p95_s", 0)) for figures in cells.values())
    for row, (name, figures) in enumerate(cells.items()):
        if "delay_p95_s" not in figures:
            axes.annotate("none was seen", (0, row), xytext=(7, 0), textcoords="offset points", va="center")
            continue
        mean, late = float(figures["delay_mean_s"]), float(figures["delay_p95_s"])
        axes.plot([mean, late], [row, row], color=color(name), linewidth=2.5, solid_capstyle="butt")
        axes.plot([mean], [row], "o", color=color(name), markersize=7)
        axes.plot([late], [row], "|", color=color(name), markersize=14, markeredgewidth=2.5)
        told = f"{shown(mean)} / {shown(late)}"
        axes.annotate(told, (late, row), xytext=(7, 0), textcoords="offset points", va="center")
    finish(axes, title)
    axes.set_xlim(0, most * 1.45)


def finish(axes: Any, title: str, *, grid: str = "x") -> None:
    axes.set_title(title, linespacing=1.35, pad=10)
    axes.grid(axis=grid, color=FAINT)
    axes.tick_params(length=0)


def shown(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2g}" if value < 10 else f"{value:.3g}"


def name_rows(axes: Any, labels: Sequence[str], rows: int) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(rows - 0.45, -0.55)
    for tick, text in zip(axes.get_yticklabels(), labels, strict=True):
        if text.startswith(LABELS[OURS]):
            tick.set_fontweight("bold")
            tick.set_color(STRONG)


def draw_fan_out(plt: Any, report: Mapping[str, Any]) -> Any:
    """Draw 1,000 at once: CPU, delay and connections of every client, in one order."""
    count = report["count"]
    cells = {name: figures for name, figures in report["cells"].items() if name in LABELS}
    rest = sorted((name for name in cells if color(name) == REST), key=lambda name: float(cells[name]["cpu_s"]))
    cells = {name: cells[name] for name in [*(name for name in COLORS if name in cells), *rest]}
    canvas, (cpu, delay, connections) = plt.subplots(1, 3, figsize=(13, 0.62 * len(cells) + 1.8), sharey=True)
    draw_bars(cpu, cells, "cpu_s", "CPU time of the client, s")
    draw_delays(delay, cells, "From ready to seen, s\n(dot: mean; bar: 95th percentile)")
    draw_connections(connections, cells, "Connections opened: for looks\n+ for submits alone (lighter)")
    name_rows(cpu, [label(name, figures, count) for name, figures in cells.items()], len(cells))
    canvas.suptitle(
        f"{count:,} generations at once, a tenth of real time: less is better everywhere",
        x=0.012,
        ha="left",
        fontweight="bold",
    )
    return canvas


def draw_in_flight(plt: Any, report: Mapping[str, Any]) -> Any:
    """Draw how cost, delay and connections grow with the generations in flight."""
    runs = {int(count): cells for count, cells in report["in_flight"].items()}
    runs[report["count"]] = report["cells"]
    counts = sorted(runs)
    canvas, panels = plt.subplots(1, 3, figsize=(14, 4.8))
    wanted = (
        ("cpu_s", "CPU time per generation, ms"),
        ("delay_p95_s", "From ready to seen, s, 95th percentile"),
        ("most_open", "Connections open at once"),
    )
    for axes, (figure, title) in zip(panels, wanted, strict=True):
        lines = {
            name: [float(runs[n][name][figure]) * (1000 / n if figure == "cpu_s" else 1) for n in counts]
            for name in LABELS
            if all(figure in runs[n].get(name, {}) for n in counts)
        }
        for name, values in reversed(lines.items()):
            width = 2.6 if color(name) != REST else 1.4
            axes.plot(counts, values, "o-", color=color(name), linewidth=width, markersize=width + 2.5)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(counts, [f"{n:,}" for n in counts])
        axes.yaxis.set_major_locator(import_module("matplotlib.ticker").LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
        axes.minorticks_off()
        axes.set_xlabel("generations in flight")
        finish(axes, f"{title}\n(log axes)", grid="y")
        name_ends(axes, counts[-1], {name: values[-1] for name, values in lines.items()})
    canvas.suptitle("More in flight: what each further generation costs", x=0.012, ha="left", fontweight="bold")
    return canvas


def name_ends(axes: Any, x: float, ends: Mapping[str, float]) -> None:
    """Write each line's name at its end, moved up as far as the name below it asks."""
    low, high = axes.get_ylim()
    last = -1.0
    for name in sorted(ends, key=lambda name: ends[name]):
        height = math.log(ends[name] / low) / math.log(high / low)
        last = max(height, last + 0.062)
        axes.annotate(
            "conceptviz, gather" if name == OURS_GATHERED else LABELS[name].split("\n")[0],
            (x, last),
            xycoords=("data", "axes fraction"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            color=color(name) if color(name) != REST else INK,
            fontweight="bold" if name == OURS else None,
            fontsize=9.5,
            annotation_clip=False,
        )


def draw_ten_thousand(plt: Any, report: Mapping[str, Any]) -> Any:
    """Draw 10,000 at once: what they take in real time, and how late they get at a tenth of it."""
    count = report["count"]
    real, tenth = (
        {name: cells for name in LABELS if (cells := report["cells"].get(f"{name}, 10,000 {pace}"))}
        for pace in ("in real time", "at a tenth")
    )
    canvas, panels = plt.subplots(1, 4, figsize=(15, 0.62 * max(len(real), len(tenth)) + 1.9))
    draw_bars(panels[0], real, "share_of_core", "In real time:\nshare of a core")
    draw_bars(panels[1], real, "peak_mib", "In real time:\npeak memory, MiB")
    draw_bars(panels[2], tenth, "x_ideal", "At a tenth (overload):\nlast result, x ideal")
    draw_delays(panels[3], tenth, "At a tenth: from ready to seen, s\n(dot: mean; bar: 95th percentile)")
    for at, cells in enumerate((real, real, tenth, tenth)):
        labels = [label(name, figures, count) for name, figures in cells.items()]
        name_rows(panels[at], labels, max(len(real), len(tenth)))
        if at % 2:
            panels[at].set_yticklabels([])
    canvas.suptitle(f"{count:,} generations at once: less is better everywhere", x=0.01, ha="left", fontweight="bold")
    return canvas


PLOTS = {
    "fan-out": ("fan_out", draw_fan_out),
    "in-flight": ("fan_out", draw_in_flight),
    "ten-thousand": ("in_flight", draw_ten_thousand),
}


def main() -> None:
    try:
        import_module("matplotlib").use("svg")
    except ImportError:
        raise SystemExit('Plots need matplotlib: pip install -e ".[bench]"') from None
    plt: Any = import_module("matplotlib.pyplot")
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES
    folder.mkdir(parents=True, exist_ok=True)
    for name, (source, draw) in PLOTS.items():
        stored = RESULTS / f"{source}.json"
        if not stored.exists():
            raise SystemExit(f"there are no figures yet: python benchmarks/run.py {source}")
        report = json.loads(stored.read_text())
        with plt.rc_context(STYLE):
            canvas = draw(plt, report)
            canvas.tight_layout(w_pad=2.5)
            told = f"{report['measured']}, {report['machine']}, {report['python']}; a stub of the API on loopback"
            canvas.text(0.995, 0.985, told, ha="right", va="top", fontsize=8.5, color="#6b7280")
            canvas.savefig(folder / f"{name}.svg", bbox_inches="tight", facecolor="white", metadata={"Date": None})
            plt.close(canvas)
        print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
