"""What is installed is what the project says it is."""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

import conceptviz

ROOT = Path(__file__).parents[1]


def requirements(extra: str | None) -> set[str]:
    """The names of the libraries an extra asks for, or the core."""
    found = set()
    for line in metadata.requires("conceptviz") or []:
        marker = re.search(r"extra == ['\"](\w+)['\"]", line)
        if (marker[1] if marker else None) == extra:
            found.add(re.match(r"[A-Za-z0-9_.-]+", line)[0].lower())  # type: ignore[index]  # a requirement has a name
    return found


def test_the_core_depends_on_three_libraries() -> None:
    assert requirements(None) == {"anyio", "attrs", "httpx"}


def test_the_extras_are_there() -> None:
    assert {"cli", "simulator", "all"} <= set(metadata.metadata("conceptviz").get_all("Provides-Extra") or [])
    assert requirements("cli") == {"rich", "typer"}


def test_the_version_is_the_changelog_s_newest() -> None:
    newest = re.search(r"^## \[([0-9.]+)\]", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == conceptviz.__version__ == metadata.version("conceptviz")


def test_the_package_is_typed_and_has_a_command() -> None:
    assert (Path(conceptviz.__file__).parent / "py.typed").is_file()
    (command,) = metadata.entry_points(group="console_scripts", name="conceptviz")
    assert callable(command.load())
