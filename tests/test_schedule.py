"""When to look, without a clock: ages and durations in, pauses out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptviz import Polling
from conceptviz._schedule import Durations, Schedule, seen_duration, spacing

POLLING = Polling()
SCALED = Polling(min_interval=0.1, max_interval=0.17, first_look=0.1, typical=(1, 3))
EVEN = Polling(min_interval=4, max_interval=4)
Law = Callable[[Random], float]


def uniform(low: float, high: float) -> Law:
    return lambda rng: rng.uniform(low, high)


def learnt(seconds: Iterable[float], polling: Polling = POLLING) -> Durations:
    durations = Durations(polling)
    for each in seconds:
        durations.end(durations.begin(), each)
    return durations


def ages(schedule: Schedule, durations: Durations, seconds: float, waiting: int = 1) -> list[float]:
    """The ages at which a task is looked at that takes so long."""
    looks = [schedule.first_look(durations)]
    while looks[-1] < seconds:
        looks.append(looks[-1] + schedule.next_look(durations, looks[-1], waiting))
    return looks


def one_by_one(laws: Iterable[Law], polling: Polling = POLLING, seed: int = 1) -> list[tuple[float, int]]:
    """The delay and the number of looks of tasks that follow one another, each seen only through its looks."""
    rng, schedule = Random(seed), Schedule(polling, Random(seed))
    durations, seen = schedule.of("kind"), []
    for law in laws:
        seconds, place = law(rng), durations.begin()
        looks = ages(schedule, durations, seconds)
        durations.end(place, seen_duration(looks[-2] if len(looks) > 1 else None, looks[-1]))
        seen.append((looks[-1] - seconds, len(looks)))
    return seen


USUAL = uniform(30, 90)


def spread(n: int, law: Law = USUAL) -> list[float]:
    rng = Random(n)
    return [law(rng) for _ in range(n)]


@given(
    seconds=st.floats(0.1, 300.0),
    seed=st.integers(0, 99),
    waiting=st.integers(1, 10**5),
    known=st.integers(0, 4),
    polling=st.sampled_from([POLLING, EVEN]),
)
def test_nothing_learnt_nothing_late(seconds: float, seed: int, waiting: int, known: int, polling: Polling) -> None:
    """However early a task ends, it is seen within the documented interval."""
    schedule = Schedule(polling, Random(seed))
    durations = schedule.of("kind")
    for _ in range(known):
        durations.end(durations.begin(), 60.0)
    assert durations.quiet == 0.0
    looks = ages(schedule, durations, seconds, waiting)
    assert looks[-1] - seconds <= 5.0
    for sooner, later in pairwise([0.0, *looks]):
        assert polling.min_interval - 1e-9 <= later - sooner <= polling.max_interval + 1e-9


@given(
    seconds=st.floats(0.1, 300.0),
    seed=st.integers(0, 99),
    waiting=st.integers(1, 10**5),
    typical=st.floats(0.5, 500.0),
    polling=st.sampled_from([POLLING, SCALED, EVEN]),
)
def test_looks_keep_the_documented_distance(
    seconds: float, seed: int, waiting: int, typical: float, polling: Polling
) -> None:
    """Source: "Limits", Poll interval. The only longer pause is the quiet time."""
    schedule = Schedule(polling, Random(seed))
    durations = learnt(spread(20, uniform(typical / 2, typical * 2)), polling)
    looks = ages(schedule, durations, seconds, waiting)
    assert polling.first_look <= looks[0] <= max(polling.first_look, durations.quiet + polling.min_interval)
    for sooner, later in pairwise(looks):
        assert polling.min_interval - 1e-9 <= later - sooner
        assert later - sooner <= polling.max_interval + 1e-9 or sooner < durations.quiet


def test_before_the_typical_time_looks_are_far_apart_and_then_close() -> None:
    looks = ages(Schedule(POLLING, Random(1)), Durations(POLLING), 60.0)
    pauses = {sooner: later - sooner for sooner, later in pairwise(looks)}
    assert all(pause > 4.9 for age, pause in pauses.items() if age <= 25.0)
    assert all(pause < 3.1 for age, pause in pauses.items() if age > 25.0)


def test_what_was_learnt_while_a_task_runs_holds_for_it_too() -> None:
    """A task that was looked at early is left alone until one of its kind may be ready."""
    schedule, durations = Schedule(POLLING, Random(1)), learnt(spread(50))
    age = 5.0 + schedule.next_look(durations, 5.0, 1)
    assert 0.0 <= age - durations.quiet <= 3.0


def test_the_first_look_is_around_the_low_end() -> None:
    """Of U(30, 90) about one in thirty is ready by then, and a thousand tasks are not looked at in step."""
    schedule, durations = Schedule(POLLING, Random(1)), learnt(spread(200))
    firsts = [schedule.first_look(durations) for _ in range(1000)]
    assert 28.5 < durations.quiet < 32.0
    assert min(firsts) - durations.quiet < 0.05
    assert 2.95 < max(firsts) - durations.quiet <= 3.0
    assert len(set(firsts)) == 1000


def test_pauses_differ_a_little() -> None:
    schedule, durations = Schedule(POLLING, Random(1)), learnt(spread(50))
    assert len({schedule.next_look(durations, 50.0, 1) for _ in range(100)}) == 100


def test_a_short_kind_is_looked_at_closely_from_the_start() -> None:
    """The documented typical time counts for nothing once durations are known."""
    schedule, durations = Schedule(POLLING, Random(1)), learnt([4.0] * 10)
    assert durations.is_learnt
    assert schedule.first_look(durations) <= 4.0
    assert schedule.next_look(durations, 4.0, 1) < 3.1


@pytest.mark.parametrize(
    ("waiting", "apart"), [(0, 3.0), (1, 3.0), (100, 3.0), (1000, 4.368), (10_000, 4.8), (10**9, 4.999)]
)
def test_many_waiting_tasks_are_looked_at_less_often(waiting: int, apart: float) -> None:
    assert math.isclose(spacing(POLLING, waiting), apart, abs_tol=1e-3)
    durations = learnt(spread(50))
    pause = Schedule(POLLING, Random(1)).next_look(durations, 50.0, waiting)
    assert apart - 1e-3 <= pause <= min(5.0, apart * 1.02 + 1e-3)


@given(st.integers(0, 10**6))
def test_the_spacing_only_grows(waiting: int) -> None:
    assert 3.0 <= spacing(POLLING, waiting) <= spacing(POLLING, waiting + 1) <= 5.0


def test_a_duration_lies_between_two_looks() -> None:
    assert seen_duration(30.0, 33.0) == 31.5
    assert seen_duration(None, 20.0) == 15.0


@given(st.permutations(range(60)), st.integers(0, 60))
def test_durations_count_in_the_order_of_submission(order: list[int], given_up: int) -> None:
    """However the ends are shuffled, the outcome is that of tasks which ended in their order."""
    # The service has changed in the middle, so that the order matters.
    seconds: list[float | None] = [*spread(30, uniform(15, 25)), *spread(30, uniform(60, 100))]
    if given_up < 60:
        seconds[given_up] = None
    durations = Durations(POLLING)
    places = [durations.begin() for _ in seconds]
    for n in order:
        durations.end(places[n], seconds[n])
    assert durations.quiet == learnt([each for each in seconds if each is not None]).quiet


def test_the_fast_ones_of_many_at_once_say_nothing_yet() -> None:
    """Whoever took the durations as they came in would see a service that becomes slower and slower."""
    durations, seconds = Durations(POLLING), spread(1000)
    places = {durations.begin(): each for each in seconds}
    quiet = []
    for place, each in sorted(places.items(), key=lambda item: item[1]):
        durations.end(place, each)
        quiet.append(durations.quiet)
    assert max(quiet) < 34.0
    assert math.isclose(quiet[-1], learnt(seconds).quiet)


def test_a_place_counts_once() -> None:
    durations, expected = Durations(POLLING), learnt(spread(100)).quiet
    places = [durations.begin() for _ in range(101)]
    for place, seconds in zip(places[1:], spread(100), strict=True):
        durations.end(place, seconds)
        durations.end(place, 1.0)
    durations.end(places[0], None)
    assert durations.quiet == expected
    for place in places * 10:
        durations.end(place, 1.0)
    assert durations.quiet == expected
    assert not durations._ended


@pytest.mark.parametrize("seconds", [None, float("nan"), float("inf"), -1.0])
def test_nothing_is_learnt_of_what_is_no_duration(seconds: float | None) -> None:
    durations, expected = learnt(spread(20)), learnt(spread(20)).quiet
    durations.end(durations.begin(), seconds)
    assert durations.quiet == expected


def test_a_place_that_was_given_up_blocks_nobody() -> None:
    durations = Durations(POLLING)
    first, places = durations.begin(), [durations.begin() for _ in range(20)]
    for place in places:
        durations.end(place, 60.0)
    assert durations.quiet == 0.0
    durations.end(first, None)
    assert durations.quiet > 30.0


def test_a_place_that_nobody_ends_blocks_only_for_a_while() -> None:
    """One task after the other, and the first was forgotten: the next 30 do not wait for ever."""
    durations = Durations(POLLING)
    forgotten = durations.begin()
    for _ in range(30):
        durations.end(durations.begin(), 60.0)
    quiet = durations.quiet
    assert quiet > 30.0
    durations.end(forgotten, 600.0)
    assert durations.quiet == quiet


def test_a_forgotten_place_blocks_for_a_while_even_after_many_at_once() -> None:
    """How many were once under way is forgotten in time."""
    durations = Durations(POLLING)
    for place in [durations.begin() for _ in range(1000)]:
        durations.end(place, 60.0)
    durations.begin()
    for _ in range(1500):
        durations.end(durations.begin(), 20.0)
    assert durations.quiet < 12.0


def test_a_straggler_among_many_is_waited_for_and_then_left_out() -> None:
    """With a hundred under way, hundreds may end behind one; nothing is kept without bound."""
    durations = Durations(POLLING)
    durations.begin()
    under_way = [durations.begin() for _ in range(99)]
    for n in range(5000):
        under_way.append(durations.begin())
        durations.end(under_way.pop(0), 60.0)
        if n == 200:
            assert not durations.is_learnt
        assert len(durations._ended) < 450
    assert durations.is_learnt


def test_at_most_4096_durations_are_held_back() -> None:
    durations = Durations(POLLING)
    places = [durations.begin() for _ in range(10_000)]
    for place in places[1:4097]:
        durations.end(place, 60.0)
    assert not durations.is_learnt
    durations.end(places[4097], 60.0)
    assert durations.is_learnt
    assert not durations._ended


@pytest.mark.parametrize("factor", [0.5, 2.0])
@pytest.mark.parametrize(
    "law", [uniform(30, 90), lambda rng: rng.lognormvariate(math.log(50), 0.35), lambda _: 60.0], ids="uls"
)
def test_a_change_of_speed_is_learnt_within_20_tasks(law: Law, factor: float) -> None:
    """Means over 20 runs of the tasks 21 to 60 after the change, beside a service that was always so."""

    def changed(rng: Random) -> float:
        return factor * law(rng)

    after = [one_by_one([law] * 200 + [changed] * 60, seed=seed)[220:] for seed in range(20)]
    always = [one_by_one([changed] * 260, seed=seed)[220:] for seed in range(20)]
    assert fmean(delay for run in after for delay, _ in run) < 1.75
    looks, usual = (fmean(looks for run in runs for _, looks in run) for runs in (after, always))
    assert looks < 1.15 * usual
    assert max(delay for run in after for delay, _ in run) < 40.0


def test_looks_are_few_and_delays_short() -> None:
    """U(30, 90): one look in three seconds from the low end on; without learning there would be six more."""
    runs = [one_by_one([uniform(30, 90)] * 200, seed=seed) for seed in range(10)]
    settled = [each for run in runs for each in run[100:]]
    assert fmean(delay for delay, _ in settled) < 1.6
    assert fmean(looks for _, looks in settled) < 11.6
    assert fmean(delay for run in runs for delay, _ in run[:20]) < 2.1


@pytest.mark.parametrize("share", [0.02, 0.05, 0.1, 0.2])
def test_two_modes_are_safe(share: float) -> None:
    """Some take 4 s and most 60: none of the fast waits for longer than 0.6 of the usual time."""

    def law(rng: Random) -> float:
        return 4.0 if rng.random() < share else 60.0

    runs = [one_by_one([law] * 300, seed=seed)[100:] for seed in range(10)]
    delays = [delay for run in runs for delay, _ in run]
    assert max(delays) < 0.6 * 60.0 + 3.0
    assert fmean(delays) < 2.6
    if share >= 0.1:
        assert fmean(delays) < 1.7


def test_scaled_times() -> None:
    """The simulator is thirty times as fast, and so are the looks."""
    seen = one_by_one([uniform(1, 3)] * 300, SCALED)[100:]
    assert fmean(delay for delay, _ in seen) < 0.055
    assert fmean(looks for _, looks in seen) < 12.0
    early = one_by_one([uniform(0.05, 3)] * 5, SCALED)
    assert max(delay for delay, _ in early) <= 0.17


SECONDS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.sampled_from([0.0, 5e-324, 60.0, 1e308]), st.floats(0, 200)
)


@given(st.lists(SECONDS, max_size=30), st.integers(1, 50), st.sampled_from([POLLING, SCALED]))
def test_any_duration_is_survived(seconds: list[float], times: int, polling: Polling) -> None:
    """0 s, huge, identical, not a number: never an error, never a quiet time above its cap."""
    durations = Durations(polling)
    for each in seconds * times:
        durations.end(durations.begin(), each)
    assert 0.0 <= durations.quiet <= 0.6 * polling.timeout
    real = [max(each, 0.05) for each in seconds if 0.0 <= each < math.inf]
    if real:
        assert durations.quiet <= 0.6 * max(*real, polling.min_interval / 2)
    for pause in (
        Schedule(polling, Random(1)).first_look(durations),
        Schedule(polling, Random(1)).next_look(durations, durations.quiet, 1),
    ):
        assert 0.0 < pause < math.inf


def test_identical_durations_leave_room_for_a_faster_service() -> None:
    durations = learnt([60.0] * 200)
    assert math.isclose(durations.quiet, 0.6 * 60.0 - 1.5)


def test_one_outlier_is_no_change() -> None:
    """It takes several tasks to say that the service has changed."""
    durations = learnt([*spread(100, uniform(55, 65)), 400.0])
    assert durations.is_learnt
    assert 30.0 < durations.quiet < 36.0


def test_few_durations_are_taken_with_doubt() -> None:
    few = [30.0, 45.0, 60.0, 75.0, 90.0]
    assert learnt(few).quiet < learnt(few * 10).quiet - 4.0


def test_only_the_last_200_are_kept() -> None:
    assert learnt(spread(500)).quiet == learnt(spread(500)[-200:]).quiet
    assert len(learnt(spread(500))._logs) == 200


def test_each_kind_learns_for_itself() -> None:
    schedule = Schedule(POLLING, Random(1))
    slow, fast = schedule.of(("generate", "cv-2", "2k", 1)), schedule.of(("generate", "cv-1", "2k", 1))
    for _ in range(10):
        slow.end(slow.begin(), 60.0)
    assert schedule.of(("generate", "cv-2", "2k", 1)) is slow
    assert slow.quiet > 30.0
    assert fast.quiet == 0.0


def test_kinds_are_bounded() -> None:
    """A caller may invent models for ever; the kind that was not asked for the longest is forgotten."""
    schedule = Schedule(POLLING, Random(1))
    kept, dropped = schedule.of("kept"), schedule.of("dropped")
    for n in range(63):
        schedule.of(n)
        assert schedule.of("kept") is kept
    assert schedule.of("dropped") is not dropped


def test_late_looks_make_room_for_those_that_find_something() -> None:
    """A look that is late is put off while its task is hardly ready yet, by a few times its lateness at the most."""
    schedule = Schedule(POLLING, Random(1))
    durations = schedule.of("kind")
    assert schedule.put_off(durations, 10.0, 2.9) == 0.0  # hardly late
    assert schedule.put_off(durations, 10.0, 3.0) == 12.0
    assert 20.0 <= schedule.put_off(durations, 10.0, 60.0) <= 23.0
    assert 1.0 <= schedule.put_off(durations, 29.0, 60.0) <= 4.0
    assert schedule.put_off(durations, 30.0, 60.0) == 0.0
    for seconds in [50.0] * 20:
        durations.end(durations.begin(), seconds)
    assert 0.0 < schedule.put_off(durations, 10.0, 60.0) <= durations.quiet - 10.0 + 3.0
    assert schedule.put_off(durations, durations.quiet, 60.0) == 0.0
