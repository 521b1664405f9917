"""The pace after a 429: pure arithmetic, the clock is an argument."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptviz._pace import Pace


def gaps(pace: Pace, now: float, count: int) -> list[float]:
    """The distances between the next slots."""
    slots = [pace.book(now) for _ in range(count + 1)]
    return [round(later - earlier, 9) for earlier, later in pairwise(slots)]


def test_without_a_429_there_is_no_pace() -> None:
    pace = Pace()
    assert [pace.book(5.0) for _ in range(100)] == [0.0] * 100
    pace.answered()
    assert pace.book(5.0) == 0.0
    assert not pace.is_paused(5.0)


def test_a_429_spreads_all_that_follow() -> None:
    """Whoever books next comes behind whoever booked before, also when both book at once."""
    pace = Pace()
    pace.refused(10.0, 0.0)
    assert [round(pace.book(10.0), 9) for _ in range(4)] == [0.0, 0.05, 0.1, 0.15]
    assert pace.book(100.0) == 0.0  # the slots that nobody took are gone


def test_a_retry_after_holds_everybody() -> None:
    """The slots begin where the pause ends, and a slot that was booked before is no longer worth anything."""
    pace = Pace()
    pace.refused(10.0, 3.0)
    assert pace.is_paused(10.0)
    assert pace.is_paused(12.9)
    assert not pace.is_paused(13.0)
    assert [round(pace.book(11.0), 9) for _ in range(3)] == [2.0, 2.05, 2.1]


def test_the_longest_pause_that_was_asked_for_counts() -> None:
    """A later 429 with a shorter pause, or with none, takes nothing of it back."""
    pace = Pace()
    pace.refused(10.0, 3.0)
    pace.refused(10.1, 0.5)
    pace.refused(10.2, 0.0)
    assert pace.is_paused(12.9)
    assert not pace.is_paused(13.0)


def test_each_further_429_doubles_the_gap_up_to_five_seconds() -> None:
    pace = Pace()
    seen = []
    for _ in range(9):
        pace.refused(0.0, 0.0)
        seen += gaps(pace, 0.0, 1)
    assert seen == [0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]


def test_each_answer_takes_a_fifth_off_until_the_gap_is_gone() -> None:
    pace = Pace()
    pace.refused(0.0, 0.0)
    seen = []
    for _ in range(8):
        pace.answered()
        seen += gaps(pace, 0.0, 1)
    assert seen == pytest.approx([0.04, 0.032, 0.0256, 0.02048, 0.016384, 0.0131072, 0.01048576, 0.0])
    pace.refused(0.0, 0.0)
    assert gaps(pace, 1000.0, 1) == [0.05]  # it begins again as after the first


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("book"), st.floats(0, 10)),
            st.tuples(st.just("refused"), st.floats(0, 60)),
            st.tuples(st.just("answered"), st.just(0.0)),
        )
    )
)
def test_slots_never_lie_in_the_past_in_a_pause_or_out_of_order(steps: list[tuple[str, float]]) -> None:
    pace, now, last, paused_until = Pace(), 0.0, 0.0, 0.0
    for kind, value in steps:
        if kind == "refused":
            pace.refused(now, value)
            paused_until = max(paused_until, now + value)
        elif kind == "answered":
            pace.answered()
        else:
            now += value
            slot = now + pace.book(now)
            assert slot >= max(now, paused_until, last) - 1e-9
            last = slot
