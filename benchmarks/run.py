"""Run the benchmarks, all or those named, and write their stored figures into README.md.

python benchmarks/run.py [NAME ...]    see ORDER
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import RESULTS, table

HERE = Path(__file__).parent
ORDER = (
    *("submit_and_poll", "import", "first_answer", "poll", "fan_out", "in_flight"),
    *("sync", "save", "upload", "journal", "lost_answer", "schedule"),
)
START, END = "<!-- figures: written by run.py -->", "<!-- end of figures -->"


def main() -> None:
    names = sys.argv[1:] or ORDER
    for name in names:
        if name not in ORDER:
            raise SystemExit(f"{name!r} is no benchmark: {', '.join(ORDER)}")
        subprocess.run([sys.executable, HERE / f"bench_{name}.py"], check=True)
    readme = HERE / "README.md"
    before, _, rest = readme.read_text().partition(START)
    _, _, after = rest.partition(END)
    stored = [RESULTS / f"{name}.json" for name in ORDER]
    reports = [json.loads(path.read_text()) for path in stored if path.exists()]
    readme.write_text(f"{before}{START}\n\n{render(reports)}\n{END}{after}")


def render(reports: list[dict[str, Any]]) -> str:
    lines = ["| row | figure | measured | goal | bold |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {goal['row']} | {goal['says']} | {goal['measured']:g} | {aim(goal)} | {bold(goal)} |"
        for report in reports
        for goal in report["goals"]
    ]
    for report in reports:
        versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
        lines += ["", f"### {report['question']}", "", *table(report["cells"], report["figure"]), ""]
        if report["not_installed"]:
            lines.append(f"Not installed, not measured: {', '.join(report['not_installed'])}.")
        if report["httpx_extras"]:
            lines.append(f"`import httpx` also loaded {', '.join(report['httpx_extras'])}.")
        rounds = "One run" if report["rounds"] == 1 else f"Medians of {report['rounds']} rounds"
        load = f", load average {report['load']:g}" if "load" in report else ""
        lines.append(f"{rounds}, {report['measured']}, {report['machine']}{load}, {report['python']}; {versions}.")
    return "\n".join(lines) + "\n"


def aim(goal: dict[str, Any]) -> str:
    return f"{'at least ' if goal.get('at_least') else ''}{goal['goal']:g}"


def bold(goal: dict[str, Any]) -> str:
    return "" if goal["bold"] is None else f"{goal['bold']:g}"


if __name__ == "__main__":
    main()
