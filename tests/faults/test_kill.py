"""kill -9 at random instants and at each named point, a few of each; `python -m tests.faults.kill` runs the rest."""

from typing import Any

import pytest

from .kill import campaign, judge, plans, schedule, summary
from .processes import POINTS
from .steps import Ledger, Post


def test_random_instants() -> None:
    figures = summary(campaign(plans(20, 0)))
    assert figures["failed"] == []
    assert figures["killed"] > 5


def test_each_point() -> None:
    figures = summary(campaign(plans(0, 1)))
    assert figures["failed"] == []
    assert figures["killed"] == len(POINTS)


def test_a_seed_is_a_schedule() -> None:
    assert schedule(7) == schedule(7) != schedule(8)


def charged(*ids: str) -> Ledger:
    return Ledger(posts=[Post(n, "/generate", 0.0, prompts=("k",), task_id=id_) for n, id_ in enumerate(ids)])


@pytest.mark.parametrize(
    ("ledger", "told", "resumed", "broken"),
    [
        (charged("x"), {}, {"k": "x"}, 0),
        (charged("x"), {"k": "x"}, {"k": "x"}, 0),
        (charged("x"), {}, {"k": {"unknown": "1"}}, 0),
        (charged(), {}, {"k": {"unknown": "1"}}, 0),
        (charged(), {}, {"k": {"error": "402"}}, 0),
        (charged("x", "y"), {}, {"k": {"unknown": "1"}}, 1),
        (charged("x"), {}, {"k": "y"}, 1),
        (charged("x"), {}, {"k": {"error": "402"}}, 1),
        (charged("x"), {}, {"k": {"unknown": None}}, 1),
        (charged("x"), {"k": "x"}, {"k": {"unknown": "1"}}, 1),
        (charged("x"), {}, {}, 1),
        (charged(), {}, {"k": {"error": "402"}, "raised": "KeyError"}, 1),
    ],
)
def test_what_is_judged(ledger: Ledger, told: dict[str, Any], resumed: dict[str, Any], broken: int) -> None:
    assert len(list(judge(ledger, ["k"], told, resumed))) == broken
