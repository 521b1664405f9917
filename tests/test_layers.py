"""The house: imports run one way, and the libraries that may be replaced are behind a few doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import conceptviz

PACKAGE = Path(conceptviz.__file__).parent

# From the foundation to the roof. A module imports only from layers before its own, never a neighbour.
LAYERS = [
    {"_version", "_spec"},
    {"_errors", "_images"},
    {"_config", "_detached", "_json"},
    {"_models", "_requests"},
    {"_matching", "_events"},
    {"_refusals"},
    {"_attempts", "_budget", "_calls", "_pace", "_policy", "_schedule", "_wire"},
    {"_exchange"},
    {"_http1", "_httpcore"},
    {"_connections", "_database", "_files", "_http"},
    {"_transport"},
    {"_uploads", "_downloads", "_journal"},
    {"_submits"},
    {"_poller"},
    {"_core"},
    {"_batches"},
    {"_outcomes"},
    {"_fanout", "_task"},
    {"_client"},
    {"_blocking"},
    {"_sync_task"},
    {"_sync"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}


def modules() -> list[Path]:
    """The modules of the core, without its face."""
    return sorted(path for path in PACKAGE.glob("_*.py") if path.stem != "__init__" and path.stem != "__main__")


def imported(path: Path, *, typing_too: bool = False) -> set[str]:
    """The absolute names a module imports; those for type checkers alone only if asked for."""
    tree = ast.parse(path.read_text("utf-8"))
    if not typing_too:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = path.relative_to(PACKAGE.parent).with_suffix("").parts
            base = ".".join(parents[: len(parents) - node.level]) + "." if node.level else ""
            if node.module:
                names.add(base + node.module)
            else:
                names |= {base + alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_imports_run_one_way(path: Path) -> None:
    """A module of the core imports only what lies below it."""
    assert path.stem in RANK, f"{path.name} has no place in the house: give it a layer here"
    for name in imported(path):
        if name.startswith("conceptviz."):
            target = name.split(".")[1]
            assert RANK.get(target, len(LAYERS)) < RANK[path.stem], f"{path.stem} must not import {target}"


def test_every_layer_is_inhabited() -> None:
    """A module that has gone leaves no name behind in the layers."""
    assert RANK.keys() == {path.stem for path in modules()}


def test_http_libraries_are_behind_four_doors() -> None:
    """A move to another HTTP library costs four files."""
    doors = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] in {"httpx", "httpcore"} for name in imported(path))
    }
    assert doors == {"_httpcore.py", "_http.py", "_downloads.py", "simulator/_transport.py"}


def test_no_module_knows_asyncio_or_trio() -> None:
    """Trio users are users. Only the simulator looks at trio, for the clock of its tests."""
    for path in [*PACKAGE.glob("*.py"), *(PACKAGE / "cli").glob("*.py")]:
        known = {name.split(".")[0] for name in imported(path, typing_too=True)}
        assert not known & {"asyncio", "trio"}, path


@pytest.mark.parametrize(
    "name",
    [
        "_spec",
        "_errors",
        "_models",
        "_requests",
        "_images",
        "_json",
        "_matching",
        "_wire",
        "_pace",
        "_schedule",
        "_policy",
        "_events",
    ],
)
def test_the_pure_core_does_no_io(name: str) -> None:
    """No clock, no socket, no event loop in the pure modules."""
    impure = {"anyio", "httpx", "os", "io", "socket", "time", "subprocess", "threading", "sqlite3", "tempfile"}
    assert not {part.split(".")[0] for part in imported(PACKAGE / f"{name}.py")} & impure


def test_the_simulator_is_a_reading_of_its_own() -> None:
    """The simulator shares nothing with the client, so that a wrong key cannot pass both sides."""
    for path in (PACKAGE / "simulator").rglob("*.py"):
        ours = {name for name in imported(path, typing_too=True) if name.startswith("conceptviz")}
        assert all(name.startswith("conceptviz.simulator") for name in ours), path


def test_importing_the_package_imports_almost_nothing() -> None:
    """Names are loaded when they are used; the simulator and the command line only when they are asked for."""
    code = (
        "import sys; before = set(sys.modules); import conceptviz; "
        "new = {n.split('.')[0] for n in set(sys.modules) - before}; "
        "assert not new & {'httpx', 'anyio', 'attr', 'attrs', 'typer', 'PIL', 'starlette'}, new; "
        "conceptviz.AsyncConceptViz('cvk_x', base_url='http://localhost/api/v1'); "
        "assert not {'httpx', 'httpcore', 'sqlite3'} & (set(sys.modules) - before), 'a client is heavy'; "
        "heavy = {'typer', 'PIL', 'starlette', 'uvicorn', 'conceptviz.simulator', 'conceptviz.cli'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    """A file of more than 450 lines is two rooms."""
    assert len(path.read_text("utf-8").splitlines()) <= 450
