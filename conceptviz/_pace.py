"""How fast requests may follow each other once the service has said that they came too fast.

Pure: the clock is an argument. What must never live here: an await, a decision about what is sent again (`_policy`).
"""

from __future__ import annotations

from attrs import define

# Seconds between two requests after the first 429, and at the most.
_FIRST_GAP = 0.05
_LONGEST_GAP = 5.0
# What each answer leaves of the gap; below the least of them it is gone.
_RECOVERY = 0.8
_LEAST_GAP = 0.01


@define(eq=False)
class Pace:
    """The pace of all requests of one kind: a 429 to one slows them all down, each answer speeds them up again.

    Until the first 429 there is no pace: every request goes at once.
    """

    _gap: float = 0.0
    _next_at: float = 0.0
    _paused_until: float = 0.0

    def book(self, now: float) -> float:
        """Take the next slot; return the seconds until it comes."""
        at = max(now, self._next_at, self._paused_until)
        self._next_at = at + self._gap
        return at - now

    def is_paused(self, now: float) -> bool:
        """Say whether the service has asked for a pause that is not over: a slot within it has to be booked anew."""
        return now < self._paused_until

    def refused(self, now: float, pause: float) -> None:
        """Take in a 429, and the seconds for which it asks to wait."""
        self._gap = min(max(2 * self._gap, _FIRST_GAP), _LONGEST_GAP)
        self._paused_until = max(self._paused_until, now + pause)

    def answered(self) -> None:
        """Take in any other answer."""
        self._gap *= _RECOVERY
        if self._gap < _LEAST_GAP:
            self._gap = 0.0
