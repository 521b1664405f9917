"""When to look at a task, learnt from how long the tasks before it took.

What lives here: arithmetic on ages and durations; the randomness is an argument. What must never live here: I/O, a
clock, what a look's outcome means (`_policy`).

All times are in seconds. Why the rule is this one: docs/design/fan-out.md, "When to look".
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from operator import mul
from random import Random

from attrs import define, field

from ._models import Polling

# The constants were chosen by simulation: benchmarks/bench_schedule.py.

# So many durations are kept, and fewer than so many say nothing.
_WINDOW = 200
_ENOUGH = 5

# The low end lies so many standard deviations of the logarithms below their mean; lower while few are known.
_BELOW = 1.85
_DOUBT = 2.5
# Two modes are no bell: whatever that formula says, the low end is this little above the duration that this share lies
# below.
_EARLY = 0.03
_ABOVE_EARLY = 1.05
# However alike all were: the service may become twice as fast.
_LATEST = 0.6
# A task that is ready at its first look was so at an unknown age before it.
_READY_AT_FIRST = 0.75

# When the mean of the last 5 to 15, without the longest and the shortest, is so many standard errors off that of all
# before them, of which there must be at least 5, the service has changed.
_SHORTEST = 5
_LONGEST = 15
_BEFORE = 5
_CHANGED = 4.2
# Durations seem more alike than they are, because looks are seconds apart.
_LEAST_SPREAD = 0.1

# A place is skipped when so many times as many have ended behind it as were ever under way at once; that number halves
# in 700 tasks. Never more than the last number are held back.
_PATIENCE = 4
_FADING = 0.999
_LEAST_BEHIND = 20
_MOST_BEHIND = 4096
_KINDS = 64

# Up to so many waiting tasks are looked at as often as allowed.
_FEW = 100
_SLOWING = 0.5
# A late look is put off by so many times its lateness at the most.
_PUT_OFF = 4.0
# A thousand tasks that were submitted together drift apart.
_JITTER = 0.02


def seen_duration(previous: float | None, age: float) -> float:
    """Return how long a task took, as far as the looks at it show.

    Args:
        previous: Its age at the last look that found it running, or None if the first look found it ended.
        age: Its age at the look that found it ended.
    """
    return _READY_AT_FIRST * age if previous is None else (previous + age) / 2


def spacing(polling: Polling, waiting: int) -> float:
    """Return the time between two looks at one task while `waiting` tasks are waited for.

    It is `max_interval - (max_interval - min_interval) * (100 / waiting) ** 0.5`: at the defaults 3 s up to 100, 4.4 s
    at 1,000 and 4.8 s at 10,000.
    """
    if waiting <= _FEW:
        return polling.min_interval
    return polling.max_interval - (polling.max_interval - polling.min_interval) * math.pow(_FEW / waiting, _SLOWING)


@define(eq=False)
class Durations:
    """How long the tasks of one kind took, and before which age none is likely to be ready.

    Durations are taken in the order of submission. Of a thousand tasks under way the fast ones end first; taken as they
    end, they would look like a service that becomes slower and slower.

    Attributes:
        polling: The client's.
    """

    polling: Polling
    _logs: list[float] = field(factory=list, init=False)
    _quiet: float | None = field(default=None, init=False)
    # Places are numbers, so that a task under way costs nothing here. All below `_next` are done with.
    _begun: int = field(default=0, init=False)
    _next: int = field(default=0, init=False)
    _ended: dict[int, float | None] = field(factory=dict, init=False)
    _most: float = field(default=0.0, init=False)

    def begin(self) -> int:
        """Return a place in the order of submission, for a task whose looks begin now."""
        self._begun += 1
        self._most = max(self._most, self._under_way())
        return self._begun - 1

    def end(self, place: int, seconds: float | None) -> None:
        """Take in how long a task took. Only the first call for a place counts.

        Args:
            place: What `begin` returned for it.
            seconds: Its `seen_duration`, or None if nothing was learnt: it was given up, or picked up late.
        """
        if place < self._next or place in self._ended:
            return
        self._most = max(_FADING * self._most, self._under_way())
        self._ended[place] = seconds
        if len(self._ended) > min(_MOST_BEHIND, _LEAST_BEHIND + _PATIENCE * self._most):
            # To leave out a straggler, or a place that nobody ends, is to learn too short a duration if anything.
            self._next = min(self._ended)
        while self._next in self._ended:
            self._learn(self._ended.pop(self._next))
            self._next += 1

    @property
    def is_learnt(self) -> bool:
        """Whether enough was learnt to say anything."""
        return len(self._logs) >= _ENOUGH

    @property
    def quiet(self) -> float:
        """The age before which none is likely to be ready; 0.0 as long as too little was learnt."""
        if self._quiet is None:
            self._quiet = self._low_end() if self.is_learnt else 0.0
        return self._quiet

    def _under_way(self) -> int:
        return self._begun - self._next - len(self._ended)

    def _learn(self, seconds: float | None) -> None:
        if seconds is None or not 0.0 <= seconds < math.inf:
            return
        # One absurd duration must not stretch the spread of all others.
        seconds = max(min(seconds, self.polling.timeout), self.polling.min_interval / 2)
        self._logs.append(math.log(seconds))
        del self._logs[:-_WINDOW]
        self._forget()
        self._quiet = None

    def _forget(self) -> None:
        """Drop what was before a change of the service."""
        count, total, squares = _sums(self._logs)
        furthest, begins, is_changed = 0.0, 0, False
        for recent in range(1, min(_LONGEST, count - _BEFORE) + 1):
            last = self._logs[-recent:]
            total -= last[0]
            squares -= last[0] * last[0]
            mean, spread = _moments(count - recent, total, squares)
            error = spread * math.sqrt(1 / recent + 1 / (count - recent))
            off = abs(sum(last) / recent - mean) / error
            if off > furthest:
                furthest, begins = off, recent
            if recent >= _SHORTEST:
                # One straggler is no change.
                middle = (sum(last) - min(last) - max(last)) / (recent - 2)
                is_changed = is_changed or abs(middle - mean) > _CHANGED * error
        if is_changed:
            del self._logs[:-begins]

    def _low_end(self) -> float:
        count = len(self._logs)
        mean, spread = _moments(*_sums(self._logs))
        early = sorted(self._logs)[int(_EARLY * count)]
        low = min(
            math.exp(mean - (_BELOW + _DOUBT / count) * spread),
            _ABOVE_EARLY * math.exp(early),
            _LATEST * math.exp(mean),
        )
        # The first look is spread over the interval around the low end.
        return max(0.0, low - self.polling.min_interval / 2)


def _sums(values: list[float]) -> tuple[int, float, float]:
    return len(values), sum(values), sum(map(mul, values, values))


def _moments(count: int, total: float, squares: float) -> tuple[float, float]:
    """Return the mean and the standard deviation."""
    mean = total / count
    variance = max(0.0, squares - total * mean) / (count - 1)
    return mean, max(math.sqrt(variance), _LEAST_SPREAD)


@define(eq=False)
class Schedule:
    """When one client looks at its tasks.

    Looks at a task are `min_interval` to `max_interval` apart. As long as nothing was learnt about its kind they are
    about `max_interval` apart before the typical time; once something was, the first comes when one might be ready.

    Source: "Limits", Poll interval.

    Attributes:
        polling: The client's.
        rng: What keeps tasks from being looked at in step.
    """

    polling: Polling
    rng: Random
    _kinds: dict[Hashable, Durations] = field(factory=dict, init=False)

    def of(self, kind: Hashable) -> Durations:
        """Return the durations of one kind of task: those that need not be alike are of different kinds."""
        durations = self._kinds.pop(kind, None) or Durations(self.polling)
        self._kinds[kind] = durations
        if len(self._kinds) > _KINDS:
            del self._kinds[next(iter(self._kinds))]  # the one that was not asked for the longest
        return durations

    def first_look(self, durations: Durations) -> float:
        """Return the age at which a task is first looked at."""
        polling = self.polling
        if durations.is_learnt:
            return max(polling.first_look, self._end_of_quiet(durations))
        return max(polling.first_look, self.rng.uniform(polling.min_interval, polling.max_interval))

    def next_look(self, durations: Durations, age: float, waiting: int) -> float:
        """Return the time from a look that found a task running to the next one.

        Args:
            durations: Those of its kind.
            age: Its age.
            waiting: How many tasks this client waits for.
        """
        polling = self.polling
        apart = spacing(polling, waiting)
        if not durations.is_learnt and age + polling.max_interval <= polling.typical[0]:
            apart = max(polling.min_interval, polling.max_interval / (1.0 + _JITTER))
        apart = min(polling.max_interval, apart * (1.0 + _JITTER * self.rng.random()))
        return max(apart, self._end_of_quiet(durations) - age)

    def put_off(self, durations: Durations, age: float, late: float) -> float:
        """Return the time by which a look that is late is put off further, to leave room for those that find something.

        Who has more waiting tasks than can be looked at in time is helped by no look at one that is hardly ready yet:
        before the typical time, as long as nothing was learnt, and before the quiet time afterwards. It is put off by
        a few times its lateness, and not for as long as that takes: the time may be wrong, and the crowd soon gone.

        Args:
            durations: Those of the task's kind.
            age: The task's age.
            late: For how long the look has been due.
        """
        polling = self.polling
        likely = durations.quiet if durations.is_learnt else polling.typical[0]
        if late < polling.min_interval or age >= likely:
            return 0.0
        return min(likely - age + self.rng.random() * polling.min_interval, _PUT_OFF * late)

    def _end_of_quiet(self, durations: Durations) -> float:
        """Return an age at which the quiet time is over; a different one for each task."""
        return durations.quiet + self.rng.random() * self.polling.min_interval
