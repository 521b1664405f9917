"""Every code block of the README and the docs runs, in the order of its page, against the served simulator."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import anyio
import pytest

from conceptviz import AsyncConceptViz, ConceptViz, Polling
from conceptviz.simulator import Simulator

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *ROOT.joinpath("docs").rglob("*.md")])
# A block that cannot run here is preceded by a comment that says why.
BLOCK = re.compile(r"(?ms)(?P<not_run><!-- not run: [^>]+ -->\n+)?^```(?P<language>\w+)\n(?P<code>.*?)^```$")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: Path) -> list[tuple[str, str]]:
    """The code blocks of a page that are to be run, each with its language."""
    found = BLOCK.finditer(page.read_text("utf-8"))
    return [(match["language"], match["code"]) for match in found if not match["not_run"]]


@pytest.fixture(scope="module")
def simulator_url() -> Iterator[tuple[str, str]]:
    """A served simulator, fast enough that no reader's example takes long."""
    simulator = Simulator(credits=1000, speed=200, seed=7)
    with simulator.serve() as base_url:
        yield base_url, simulator.api_key


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, simulator_url: tuple[str, str]) -> Path:
    """A reader's folder: the key in the environment, some sketches, and no patience."""
    base_url, api_key = simulator_url
    monkeypatch.setenv("CONCEPTVIZ_BASE_URL", base_url)
    monkeypatch.setenv("CONCEPTVIZ_API_KEY", api_key)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))  # the command line's journal: never the user's
    monkeypatch.delenv("CONCEPTVIZ_JOURNAL", raising=False)
    monkeypatch.chdir(tmp_path)
    quick = Polling(min_interval=0.05, max_interval=0.1, first_look=0.05)
    for client in (AsyncConceptViz, ConceptViz):
        defaults = client.__init__.__kwdefaults__
        assert defaults is not None
        assert "polling" in defaults
        monkeypatch.setitem(defaults, "polling", quick)
    from PIL import Image

    for name in ("sketch.png", "reference-1.png", "reference-2.png"):
        Image.new("RGB", (64, 48), "white").save(tmp_path / name)
    return tmp_path


def run_cells(codes: list[str], page: Path) -> None:
    """Run the blocks of a page one after another, as a notebook does; with an event loop only if a block awaits."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    cells = [compile(code, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True) for code in codes]

    async def in_a_loop() -> None:
        for cell in cells:
            outcome = eval(cell, namespace)
            if inspect.iscoroutine(outcome):
                await outcome

    if any(cell.co_flags & inspect.CO_COROUTINE for cell in cells):
        anyio.run(in_a_loop)
    else:
        for cell in cells:
            exec(cell, namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_python_blocks_of_a_page_run(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = [code for language, code in blocks(page) if language == "python"]
    if any("simulator.transport()" in code for code in codes):
        monkeypatch.delenv("CONCEPTVIZ_BASE_URL")  # the page brings its own service
    run_cells(codes, page)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_shell_blocks_of_a_page_run(page: Path, reader: Path) -> None:
    """Lines that install something are for a new environment; what they install is what these tests run in."""
    scripts = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    for language, code in blocks(page):
        if language != "sh" or "pip install" in code:
            continue
        subprocess.run(["bash", "-euo", "pipefail", "-c", code], cwd=reader, env=environment, check=True, timeout=50)


def test_the_readme_s_commands_are_the_two_of_the_project() -> None:
    """The first command makes a diagram, the second runs the tests."""
    first, second = [code.strip() for language, code in blocks(ROOT / "README.md") if language == "sh"]
    assert len(first.splitlines()) == len(second.splitlines()) == 1
    assert first.endswith("--simulate")
    assert second.endswith("python -m pytest")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_every_language_of_a_block_is_known() -> None:
    """A block in a language that nothing runs would go stale unseen."""
    assert {language for page in PAGES for language, _ in blocks(page)} <= {"python", "sh", "json", "text"}
