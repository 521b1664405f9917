"""What the tests of the journal share: a folder for its file, a piece of work to claim, and another program's hand."""

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from helpers import TASK

from conceptviz import Journal, Submission
from conceptviz._database import this_process
from conceptviz._journal import Claim

RECEIPT = Submission(TASK, credits_used=2, credits_remaining=79, raw={"taskId": TASK})
# A process that has ended, of those that can be seen from here.
DEAD = f"999999999:1:{this_process().split(':', 2)[2]}"


@contextmanager
def journal_path() -> Iterator[Path]:
    """In memory where that can be had: hundreds of tests would wait for the disk, and none of them cuts the power."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder) / "journal"


def claim(journal: Journal, key: str | None = "a", **other: Any) -> Claim:
    work: dict[str, Any] = {
        "fingerprint": "f",
        "account": "acc",
        "base_url": "https://conceptviz.app/api/v1",
        "endpoint": "/generate",
        "prompts": ["the water cycle \u6c34\U0001f4a7"],
        "settings": {"model": "cv-2"},
        "expected_credits": 2,
        "seconds": 60.0,
    }
    return journal.claim(key=key, **{**work, **other})


def pay(journal: Journal, key: str, task_id: str) -> None:
    """Take a piece of work all the way to its receipt."""
    attempt = claim(journal, key).entry.id
    journal.sending(attempt)
    journal.accepted(attempt, Submission(task_id, raw={"taskId": task_id}))


def raw(path: Path, sql: str, *values: Any) -> list[Any]:
    """What another program does to the file."""
    db = sqlite3.connect(path, isolation_level=None)
    try:
        return db.execute(sql, values).fetchall()
    finally:
        db.close()
