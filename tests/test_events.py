"""Events: small values that hold what is public."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import attrs
import pytest

from conceptviz import (
    Completed,
    Differed,
    Event,
    Failed,
    GenerationFailedError,
    Image,
    NotSentError,
    Polled,
    Result,
    Retrying,
    Saved,
    Submission,
    Submitted,
    TaskState,
    _events,
)

IMAGE = Image("https://h/account/0-ab.png", task_id="t")
RECEIPT = Submission("t")
EVENTS: list[tuple[type[Event], dict[str, Any]]] = [
    (Submitted, {"task_id": "t", "submission": RECEIPT}),
    (Polled, {"task_id": "t", "state": TaskState("t", "processing"), "elapsed": 3.0}),
    (Retrying, {"task_id": None, "attempt": 1, "delay": 0.5, "error": NotSentError("x")}),
    (Completed, {"task_id": "t", "result": Result("t", (IMAGE,)), "elapsed": 60.0}),
    (Failed, {"task_id": "t", "error": GenerationFailedError("x", task_id="t"), "elapsed": 60.0}),
    (Differed, {"task_id": "t", "what": "model", "expected": "cv-2", "actual": "cv-1"}),
    (Saved, {"task_id": "t", "image": IMAGE, "path": Path("t-0.png")}),
]


def test_each_event_is_here() -> None:
    classes = {cls for cls in vars(_events).values() if isinstance(cls, type) and issubclass(cls, Event)}
    assert {cls for cls, _ in EVENTS} == classes - {Event}


@pytest.mark.parametrize(("cls", "fields"), EVENTS, ids=lambda value: getattr(value, "__name__", ""))
def test_an_event(cls: type[Event], fields: dict[str, Any]) -> None:
    """Made by name, frozen, fit for another process, and no wider than this."""
    event = cls(**fields)
    assert attrs.asdict(event, recurse=False) == fields
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.task_id = "other"  # type: ignore[misc]  # what is tested
    with pytest.raises(TypeError):
        cls("t")  # type: ignore[call-arg]  # what is tested
    assert repr(pickle.loads(pickle.dumps(event))) == repr(event)
    assert "account" not in repr(event)
