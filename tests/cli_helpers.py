"""What the tests of the command line share: an empty home, a service to reach, and commands in their own process."""

from __future__ import annotations

import shlex
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from conceptviz import ConceptViz, Polling, Retries
from conceptviz.cli import _work
from conceptviz.simulator import Simulator

QUICK = Polling(min_interval=0.01, max_interval=0.02, first_look=0.01, max_failures=3)
AT_ONCE = Retries(base_delay=0.001, max_delay=0.002)


def move_in(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder, without configuration and with a journal of its own: never the user's."""
    monkeypatch.chdir(home)
    for name in ("CONCEPTVIZ_API_KEY", "CONCEPTVIZ_BASE_URL", "CONCEPTVIZ_JOURNAL", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    return home


def reach(simulator: Simulator, monkeypatch: pytest.MonkeyPatch, api_key: str | None = None) -> Simulator:
    """Let a simulator be the service that the commands reach."""
    client = partial(
        ConceptViz, api_key or simulator.api_key, transport=simulator.transport(), polling=QUICK, retries=AT_ONCE
    )
    monkeypatch.setattr(_work, "ConceptViz", client)
    return simulator


def start(*args: str, **options: Any) -> subprocess.Popen[str]:
    """Start the command line in a process of its own."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "conceptviz", *args], **options)


def wait_for_submit(simulator: Simulator) -> None:
    """Wait until a submit has arrived and is being answered."""
    for _ in range(1000):
        if simulator.requests["submit"] or simulator.ledger.submissions:
            return
        threading.Event().wait(0.01)
    pytest.fail("no submit came")


def advised(err: str) -> list[str]:
    """The command on the last indented line of what was said, as `main` takes it."""
    command = shlex.split([line for line in err.splitlines() if line.startswith("  ")][-1])
    assert command[0] == "conceptviz"
    return command[1:]
