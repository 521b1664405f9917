"""docs/reliability.md: taken apart for its tests, and its figures written by `python -m tests.reliability_page`."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attrs import frozen

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "reliability.md"
RESULTS = HERE / "faults" / "results"
LOST_ANSWER = HERE.parent / "benchmarks" / "results" / "lost_answer.json"
START, END = "<!-- figures -->", "<!-- end of figures -->"
# A table within the figures that is longer than this stays in the file.
_LONG = 20
_ROW = re.compile(r"^\| M([0-9]+) \| (.+?) \| (.*?) ?\| (.+) \|$", re.MULTILINE)
_TEST = re.compile(r"`([\w/]+\.py::\w+)`")


@frozen
class Row:
    """A row of the matrix.

    Attributes:
        number: 11 of M11.
        fault: What goes wrong.
        tests: The tests that inject it, as "file.py::name".
        result: What came of it.
    """

    number: int
    fault: str
    tests: tuple[str, ...]
    result: str


def read_rows(page: str) -> list[Row]:
    """Return the rows of the page's matrix, in its order."""
    return [Row(int(n), fault, tuple(_TEST.findall(tests)), result) for n, fault, tests, result in _ROW.findall(page)]


def read_tests() -> set[str]:
    """Return the name of every test there is, as "file.py::name"; a test in a class has its own name alone."""
    found = set()
    for path in HERE.rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
                found.add(f"{path.relative_to(HERE).as_posix()}::{node.name}")
    return found


def render_figures() -> str:
    """Return what the stored runs have come to, as Markdown."""
    lost = json.loads(LOST_ANSWER.read_text("utf-8"))
    lines = [
        "### A lost answer",
        "",
        "| client | POSTs | with an idempotency key | ended with |",
        "|---|---:|---:|---|",
    ]
    for client, seen in lost["cells"].items():
        lines.append(f"| {client} | {seen['posts']} | {seen['with_idempotency_key']} | {seen['ended_with']} |")
    versions = ", ".join(f"{name} {version}" for name, version in lost["versions"].items())
    lines += ["", f"{lost['measured']}; {versions}.", ""]
    for path in sorted(RESULTS.glob("*.json")):
        figures = dict(_figures(json.loads(path.read_text("utf-8"))))
        lines += [f"### {path.stem.replace('_', ' ').capitalize()}", "", "| | |", "|---|---:|"]
        lines += [f"| {name} | {value} |" for name, value in figures.items()]
        lines.append("")
    return "\n".join(lines)


def _figures(stored: dict[str, Any], under: str = "") -> Iterator[tuple[str, str]]:
    for name, value in stored.items():
        if isinstance(value, dict) and len(value) <= _LONG:
            yield from _figures(value, f"{under}{name}: ")
        elif isinstance(value, list):
            yield under + name, f"{len(value):,}"
        elif not isinstance(value, dict):
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            yield under + name, f"{value:,}" if is_number else str(value)


def with_figures(page: str) -> str:
    """Return the page with the stored figures in their place."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n\n{render_figures()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_figures(PAGE.read_text("utf-8")), "utf-8")
