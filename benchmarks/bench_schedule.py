"""P8: how late is a result seen, and with how many looks, under each client's rule of when to look?

No server and no clock: durations are drawn from laws, looks are ages, and a task is seen to end at the first look after
its end. Every rule meets the same laws; the seeds are fixed, so that the figures are the same on every machine.

The optimum knows the law: of all first looks with one every 3 s after it, that with the fewest looks whose mean delay
is at most 1.55 s.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from random import Random
from statistics import fmean
from typing import NamedTuple

from _harness import Goal, report

from conceptviz import Polling
from conceptviz._schedule import Schedule, seen_duration

POLLING = Polling()
SPACING = 3.0
# The mean delay that the optimum may have.
ALLOWED = 1.55
RUNS = 100
# How many durations a rule that learns nothing is measured with.
DRAWN = 10_000


class Law(NamedTuple):
    name: str
    draw: Callable[[Random], float]
    below: Callable[[float], float]
    """The share of tasks that take less than so many seconds."""


class Seen(NamedTuple):
    seconds: float
    delay: float
    looks: int


def lognormal(sigma: float) -> Law:
    def below(seconds: float) -> float:
        return 0.5 * math.erfc(-math.log(seconds / 50) / (sigma * math.sqrt(2))) if seconds > 0 else 0.0

    return Law(f"lognormal, s = {sigma:g}", lambda rng: rng.lognormvariate(math.log(50), sigma), below)


LAWS = (
    Law("U(30, 90)", lambda rng: rng.uniform(30, 90), lambda seconds: min(1.0, max(0.0, (seconds - 30) / 60))),
    lognormal(0.35),
    lognormal(0.6),
)

# The constants of the schedule were not chosen by these.
OTHERS = (
    Law("20 + Exp(30)", lambda rng: 20 + rng.expovariate(1 / 30), lambda age: max(0.0, 1 - math.exp((20 - age) / 30))),
    Law("Weibull(60, 2)", lambda rng: rng.weibullvariate(60, 2), lambda age: 1 - math.exp(-((age / 60) ** 2))),
    Law(
        "normal(60, 6)",
        lambda rng: max(1.0, rng.gauss(60, 6)),
        lambda age: 0.5 * math.erfc((60 - age) / (6 * math.sqrt(2))),
    ),
)


def some_fast(share: float) -> Law:
    def draw(rng: Random) -> float:
        return 4.0 if rng.random() < share else rng.uniform(50, 70)

    return Law(f"{share:.0%} take 4 s, the rest U(50, 70)", draw, lambda _: math.nan)


def at_speed(law: Law, factor: float) -> Law:
    """Return the law of a service that takes so many times as long."""
    return Law(law.name, lambda rng: factor * law.draw(rng), lambda seconds: law.below(seconds / factor))


class Optimum:
    """The best that can be done at a spacing of 3 s by someone who knows the law."""

    def __init__(self, law: Law) -> None:
        step = 0.05
        ages = [step * n for n in range(round(1500 / step))]
        shares = [law.below(age) for age in ages]
        # The mean delay of all that end before the first look is the area under the law up to there.
        areas = [0.0]
        for sooner, later in pairwise(shares):
            areas.append(areas[-1] + step * (sooner + later) / 2)
        apart = round(SPACING / step)
        last = bisect_left(shares, 1 - 1e-5)
        best: tuple[float, float] | None = None
        for first in range(apart, last):
            looks, delay, age = 1.0, areas[first], first
            while age < last:
                looks += 1 - shares[age]
                delay += areas[age + apart] - areas[age] - SPACING * shares[age]
                age += apart
            if delay <= ALLOWED and (best is None or looks < best[0]):
                best = looks, delay
        assert best is not None
        self.looks, self.delay = best


def alone(pauses: Callable[[Random], Iterator[float]], law: Law) -> list[Seen]:
    """Put a rule that learns nothing to the test: each task gets pauses of its own."""
    rng = Random(law.name)
    seen = []
    for _ in range(DRAWN):
        seconds, age, looks = law.draw(rng), 0.0, 0
        for pause in pauses(rng):
            age += pause
            looks += 1
            if age >= seconds:
                break
        seen.append(Seen(seconds, age - seconds, looks))
    return seen


def every(low: float, high: float, first: float | None = None) -> Callable[[Random], Iterator[float]]:
    def pauses(rng: Random) -> Iterator[float]:
        if first is not None:
            yield first
        while True:
            yield rng.uniform(low, high)

    return pauses


RIVALS = {
    "the API page's loop, 5 s": every(5, 5),
    "jitter U(3, 5)": every(3, 5),
    "replicate, 0.5 s": every(0.5, 0.5),
    "fal, 0.1 s": every(0.1, 0.1),
    "runwayml, 6 ± 1.5 s": every(4.5, 7.5),
    "25 s, then every 3": every(3, 3, first=25),
}


def learning(laws: Sequence[Law], *, at_once: int = 1, under_way: int = 1, seed: int) -> list[Seen]:
    """Put the schedule to the test: one client, and each task has its law.

    Args:
        laws: One for each task, in the order of submission.
        at_once: How many are submitted in the first moment.
        under_way: A task is submitted whenever fewer than so many are waited for.
        seed: What the randomness begins with.
    """
    rng, schedule = Random(seed), Schedule(POLLING, Random(seed + 1))
    durations = schedule.of("kind")
    seen: dict[int, Seen] = {}
    # Clock at the look, number, clock at the submit, duration, place, age at the last look, looks so far.
    due: list[tuple[float, int, float, float, int, float | None, int]] = []
    now, begun = 0.0, 0
    while len(seen) < len(laws):
        while begun < len(laws) and (begun < at_once or len(due) < under_way):
            entry = (now, laws[begun].draw(rng), durations.begin(), None, 1)
            heapq.heappush(due, (now + schedule.first_look(durations), begun, *entry))
            begun += 1
        waiting = len(due)
        now, number, start, seconds, place, previous, looks = heapq.heappop(due)
        age = now - start
        if age < seconds:
            pause = schedule.next_look(durations, age, waiting)
            heapq.heappush(due, (now + pause, number, start, seconds, place, age, looks + 1))
        else:
            durations.end(place, seen_duration(previous, age))
            seen[number] = Seen(seconds, age - seconds, looks)
    return [seen[number] for number in range(len(laws))]


def figures(seen: Sequence[Seen], optimum: Optimum | None = None) -> dict[str, float | str]:
    delays = sorted(each.delay for each in seen)
    looks = fmean(each.looks for each in seen)
    found = {
        "mean_s": fmean(delays),
        "p95_s": delays[int(0.95 * len(delays))],
        "longest_s": delays[-1],
        "polls": looks,
    }
    if optimum:
        found["polls_x_optimum"] = looks / optimum.looks
    return rounded(found)


def known_best(optimum: Optimum) -> dict[str, float | str]:
    return rounded({"mean_s": optimum.delay, "polls": optimum.looks, "polls_x_optimum": 1})


def rounded(found: dict[str, float]) -> dict[str, float | str]:
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def together(runs: list[list[Seen]], start: int, stop: int | None = None) -> list[Seen]:
    return [each for run in runs for each in run[start:stop]]


def under(law: Law) -> dict[str, dict[str, float | str]]:
    """Measure one law: the rivals, the schedule in several ways of submitting, and changes of the service's speed."""
    optimum = Optimum(law)
    rows = {name: figures(alone(pauses, law), optimum) for name, pauses in RIVALS.items()}
    rows["the optimum, law known"] = known_best(optimum)
    one_by_one = [learning([law] * 500, seed=seed) for seed in range(RUNS)]
    rows["schedule"] = figures(together(one_by_one, 100), optimum)
    rows["schedule, tasks 1 to 20"] = figures(together(one_by_one, 0, 20), optimum)
    rows["schedule, tasks 1 to 5: nothing learnt"] = figures(together(one_by_one, 0, 5), optimum)

    rolling = [learning([law] * 500, under_way=100, seed=seed) for seed in range(RUNS // 5)]
    rows["schedule, 100 under way, tasks 101 to 200"] = figures(together(rolling, 100, 200), optimum)
    rows["schedule, 100 under way, tasks 201 to 500"] = figures(together(rolling, 200), optimum)
    burst = [learning([law] * 1500, at_once=1000, under_way=500, seed=seed) for seed in range(RUNS // 20)]
    rows["schedule, 1,000 at once"] = figures(together(burst, 0, 1000), optimum)
    rows["schedule, then 500 under way"] = figures(together(burst, 1000), optimum)

    for what, factor in (("twice as fast", 0.5), ("half as fast", 2.0)):
        changed = at_speed(law, factor)
        known = Optimum(changed)
        runs = [learning([law] * 300 + [changed] * 100, seed=seed) for seed in range(RUNS // 2)]
        rows[f"schedule, {what} from task 301, tasks 301 to 320"] = figures(together(runs, 300, 320), known)
        rows[f"schedule, {what} from task 301, tasks 321 to 400"] = figures(together(runs, 320), known)
    return rows


def other_laws() -> dict[str, dict[str, float | str]]:
    rows = {}
    for law in OTHERS:
        optimum = Optimum(law)
        runs = [learning([law] * 500, seed=seed) for seed in range(RUNS // 2)]
        rows[f"{law.name}: the optimum, law known"] = known_best(optimum)
        rows[f"{law.name}: schedule"] = figures(together(runs, 100), optimum)
        rows[f"{law.name}: schedule, tasks 1 to 20"] = figures(together(runs, 0, 20), optimum)
    return rows


def two_modes() -> dict[str, dict[str, float | str]]:
    rows = {}
    for share in (0.1, 0.05, 0.02):
        law = some_fast(share)
        runs = [learning([law] * 500, seed=seed) for seed in range(RUNS // 2)]
        settled = together(runs, 100)
        rows[f"{law.name}: schedule"] = figures(settled)
        rows[f"{law.name}: schedule, those of 4 s"] = figures([each for each in settled if each.seconds == 4.0])
    return rows


def goals(law: str) -> list[Goal]:
    cell = f"{law}: schedule"
    return [
        Goal("P8", f"mean delay of a learnt schedule, s, {law}", cell, "mean_s", 1.6, 1.55),
        Goal("P8", f"its 95th percentile, s, {law}", cell, "p95_s", 2.95, 2.9),
        Goal("P8", f"its polls, x the optimum, {law}", cell, "polls_x_optimum", 1.1, 1.05),
        Goal("P8", f"mean delay of the first 20 tasks, s, {law}", f"{cell}, tasks 1 to 20", "mean_s", 2.1, 1.8),
        Goal("P8", f"longest delay, nothing learnt, s, {law}", f"{cell}, tasks 1 to 5: nothing learnt", "longest_s", 5),
    ]


def main() -> None:
    cells = {f"{law.name}: {name}": row for law in LAWS for name, row in under(law).items()}
    report(
        "How late is a result seen, and with how many looks?",
        "mean_s",
        cells | other_laws() | two_modes(),
        [goal for law in LAWS for goal in goals(law.name)],
        {"rounds": 1, "not_installed": []},
    )


if __name__ == "__main__":
    main()
