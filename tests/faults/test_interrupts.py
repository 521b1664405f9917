"""Ctrl-C, `asyncio.wait_for` and storms at a few instants; `python -m tests.faults.interrupts` runs the rest."""

from pathlib import Path

import pytest

from conceptviz import Journal
from conceptviz._wire import read_receipt

from .interrupts import ctrl_c, ctrl_c_twice, judge, storms, tally, wait_for
from .steps import Ledger, Post


def test_ctrl_c(tmp_path: Path) -> None:
    """M75: the id is durable, or the journal says UNKNOWN."""
    figures = tally(ctrl_c(range(10), tmp_path))
    assert figures["failed"] == []
    assert len(figures["kinds"]) > 1


def test_ctrl_c_twice(tmp_path: Path) -> None:
    """M75: gone at once, and UNKNOWN."""
    assert tally(ctrl_c_twice(range(2), tmp_path)) == {"runs": 2, "kinds": {"unknown": 2}, "failed": []}


def test_wait_for(tmp_path: Path) -> None:
    """M74."""
    assert tally(wait_for(range(10), tmp_path))["failed"] == []


def test_storms() -> None:
    """M76, F2: bare httpx answers no more after any of these."""
    assert tally(storms(range(4), rounds=30)) == {"runs": 4, "kinds": {"answers": 4}, "failed": []}


@pytest.mark.parametrize(
    ("charged", "recorded", "broken"),
    [
        ((), None, 0),
        (("x",), "x", 0),
        (("x",), "unknown", 0),
        ((), "unknown", 0),
        (("x",), None, 1),
        (("x",), "y", 1),
        ((), "x", 1),
        (("x", "y"), "x", 2),
    ],
)
def test_what_is_judged(charged: tuple[str, ...], recorded: str | None, broken: int, tmp_path: Path) -> None:
    ledger = Ledger(posts=[Post(n, "/generate", 0.0, prompts=("k",), task_id=id_) for n, id_ in enumerate(charged)])
    with Journal(tmp_path / "journal") as journal:
        if recorded is not None:
            claim = journal.claim(
                key="k",
                fingerprint="",
                account="",
                base_url="",
                endpoint="",
                prompts=["k"],
                settings={},
                expected_credits=2,
                seconds=-1 if recorded == "unknown" else 60,
            )
            journal.sending(claim.entry.id)
            if recorded != "unknown":
                journal.accepted(claim.entry.id, read_receipt(recorded, ("k",), {}))
        assert len(judge(ledger, journal, "k")[1]) == broken
