"""200 prompts and a kill in the middle; `python -m tests.faults.fan_out --prompts 10000` is the long version."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from .fan_out import BLOCKED, FAILED, IMAGE, UNKNOWN, Post, Run, Told, campaign, judge_keyed, judge_plain, prompt


def test_200_prompts(tmp_path: Path) -> None:
    figures = campaign(200, tmp_path, in_flight=60, speed=600.0)
    assert figures["broken"] == []
    keyed = figures["with keys, killed and run again"]
    assert 100 <= keyed["accepted before the kill"] < 180
    assert keyed["told before the kill"] < 180
    unknown = 1 + keyed["under way at the kill"]
    assert keyed["outcomes"][UNKNOWN] == unknown
    # Of those under way when it was killed, one may have been to be refused, or to fail.
    assert keyed["outcomes"][IMAGE] >= 196 - unknown
    assert figures["without keys"]["outcomes"] == {IMAGE: 186, FAILED: 8, UNKNOWN: 4, BLOCKED: 2}


# Prompts by their fates: 0 to 2 are good, 3 is blocked, 53 fails, 127 is lost.
GOOD, OTHER, BAD, FAILING, LOST = (prompt(number) for number in (0, 1, 3, 53, 127))


def killed(*told: Told, posts: list[Post]) -> Run:
    return Run(-signal.SIGKILL, 1.0, list(told), posts)


def ended(*told: Told, posts: list[Post]) -> Run:
    return Run(0, 1.0, list(told), posts)


def post(text: str, task_id: str | None) -> Post:
    return Post((text,), task_id)


SEEN = Told(GOOD, IMAGE, "x")
REFUNDED = Told(FAILING, FAILED, "f")
UNHEARD = Told(LOST, UNKNOWN, None)


@pytest.mark.parametrize(
    ("first", "second", "unknown", "broken"),
    [
        # Taken up, or done by the second run.
        (killed(posts=[post(GOOD, "x")]), ended(SEEN, posts=[]), set(), 0),
        (killed(posts=[]), ended(SEEN, posts=[post(GOOD, "x")]), set(), 0),
        # Paid for again; or submitted again, and refused.
        (killed(posts=[post(GOOD, "x")]), ended(Told(GOOD, IMAGE, "y"), posts=[post(GOOD, "y")]), set(), 2),
        (killed(posts=[post(GOOD, "x")]), ended(SEEN, posts=[post(GOOD, None)]), set(), 1),
        (killed(posts=[]), ended(SEEN, posts=[post(GOOD, None), post(GOOD, "x")]), set(), 1),
        # Another task's image; another image than was told before; an image of no task.
        (killed(posts=[post(GOOD, "x")]), ended(Told(GOOD, IMAGE, "y"), posts=[]), set(), 1),
        (killed(Told(GOOD, IMAGE, "y"), posts=[post(GOOD, "x")]), ended(SEEN, posts=[]), set(), 1),
        (killed(posts=[]), ended(SEEN, posts=[]), set(), 1),
        # Nothing is known of it, or more than one thing.
        (killed(posts=[post(GOOD, "x")]), ended(posts=[]), set(), 2),
        (killed(posts=[post(GOOD, "x")]), ended(SEEN, SEEN, posts=[]), set(), 1),
        # Under way at the kill: unknown, whether it was accepted or not. Without the journal's word it is not.
        (killed(posts=[post(GOOD, "x")]), ended(Told(GOOD, UNKNOWN, None), posts=[]), {GOOD}, 0),
        (killed(posts=[]), ended(Told(GOOD, UNKNOWN, None), posts=[]), {GOOD}, 0),
        (killed(posts=[]), ended(Told(GOOD, UNKNOWN, None), posts=[]), set(), 2),
        (killed(posts=[post(GOOD, "x")]), ended(SEEN, posts=[]), {GOOD}, 1),
        (killed(posts=[post(GOOD, "x")]), ended(SEEN, posts=[]), {prompt(200 * n) for n in range(21)}, 2),
        # A failed one is submitted again if it was seen to be refunded.
        (killed(REFUNDED, posts=[post(FAILING, "f")]), ended(Told(FAILING, FAILED, "g"), posts=[post(FAILING, "g")]),
         set(), 0),
        (killed(posts=[post(FAILING, "f")]), ended(REFUNDED, posts=[]), set(), 0),
        (killed(REFUNDED, posts=[post(FAILING, "f")]), ended(REFUNDED, posts=[]), set(), 1),
        (killed(REFUNDED, posts=[post(FAILING, "f")]), ended(Told(FAILING, FAILED, "h"), posts=[
            post(FAILING, "g"), post(FAILING, "h")]), set(), 2),
        # What was never answered is unknown; what is moderated is never paid for.
        (killed(posts=[post(LOST, "l")]), ended(UNHEARD, posts=[]), {LOST}, 0),
        (killed(posts=[post(LOST, "l")]), ended(UNHEARD, posts=[post(LOST, "m")]), {LOST}, 2),
        (killed(posts=[]), ended(UNHEARD, posts=[]), {LOST}, 1),
        (killed(posts=[post(BAD, None)]), ended(Told(BAD, BLOCKED, None), posts=[post(BAD, None)]), set(), 0),
        (killed(posts=[]), ended(Told(BAD, IMAGE, "b"), posts=[post(BAD, "b")]), set(), 1),
        # The second was to be killed and was not, or ended badly.
        (ended(posts=[]), ended(SEEN, posts=[post(GOOD, "x")]), set(), 1),
        (killed(posts=[]), killed(SEEN, posts=[post(GOOD, "x")]), set(), 1),
    ],
)  # fmt: skip
def test_what_is_judged_with_keys(first: Run, second: Run, unknown: set[str], broken: int) -> None:
    [text] = {words.prompt for words in second.told} or {GOOD}
    assert len(list(judge_keyed([text], first, second, unknown))) == broken


@pytest.mark.parametrize(
    ("run", "broken"),
    [
        (ended(SEEN, Told(OTHER, IMAGE, "x"), posts=[Post((GOOD, OTHER), "x")]), 0),
        (ended(SEEN, Told(OTHER, IMAGE, "y"), posts=[Post((GOOD, OTHER), None), post(GOOD, "x"), post(OTHER, "y")]), 0),
        (ended(SEEN, posts=[Post((GOOD, OTHER), "x")]), 2),
        (ended(SEEN, Told(OTHER, IMAGE, "y"), posts=[Post((GOOD, OTHER), "x"), post(OTHER, "y")]), 1),
        (ended(SEEN, Told(OTHER, IMAGE, "y"), posts=[Post((GOOD, OTHER), "x")]), 1),
        (ended(SEEN, Told(OTHER, UNKNOWN, None), posts=[Post((GOOD, OTHER), "x")]), 1),
        (ended(SEEN, Told(OTHER, BLOCKED, None), posts=[Post((GOOD, OTHER), None), post(GOOD, "x")]), 2),
        (killed(SEEN, Told(OTHER, IMAGE, "x"), posts=[Post((GOOD, OTHER), "x")]), 1),
    ],
)
def test_what_is_judged_without_keys(run: Run, broken: int) -> None:
    assert len(list(judge_plain([GOOD, OTHER], run))) == broken


@pytest.mark.parametrize(
    ("text", "kind", "task_id", "broken"),
    [
        (FAILING, FAILED, "f", 0),
        (FAILING, IMAGE, "f", 2),
        (LOST, UNKNOWN, None, 0),
        (LOST, UNKNOWN, "f", 2),
    ],
)
def test_a_neighbour_in_a_task_shares_its_fate(text: str, kind: str, task_id: str | None, broken: int) -> None:
    run = ended(Told(text, kind, task_id), Told(GOOD, kind, task_id), posts=[Post((GOOD, text), "f")])
    assert len(list(judge_plain([GOOD, text], run))) == broken
