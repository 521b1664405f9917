"""Budget: how many credits a program may spend, kept exactly under concurrency.

Pure bookkeeping: credits are reserved before a submit, settled by what the service says it used, given back when it
says that it refunded, and kept when nobody knows. What must never live here: I/O, an await.
"""

from __future__ import annotations

import threading

from ._errors import BudgetExceededError, InvalidRequestError


class Budget:
    """Credits that may be spent, by one client or by several that share it.

    It counts what this process spends through it: other programs with a key of the same account are not seen.

    Args:
        limit: The credits that may be spent.

    Raises:
        InvalidRequestError: The limit is not a whole number of 0 or more.
    """

    def __init__(self, limit: int) -> None:
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 0:
            raise InvalidRequestError(f"A budget is a whole number of credits, 0 or more, not {limit!r}.")
        self._limit = limit
        self._spent = 0
        self._reserved = 0
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"<Budget {self._spent} spent and {self._reserved} reserved of {self._limit}>"

    @property
    def limit(self) -> int:
        """The credits that may be spent."""
        return self._limit

    @property
    def spent(self) -> int:
        """The credits that accepted tasks have cost, without what was refunded."""
        return self._spent

    @property
    def reserved(self) -> int:
        """The credits that submits under way may cost, and those of which nobody knows whether they were charged."""
        return self._reserved

    @property
    def remaining(self) -> int:
        """The credits that may still be reserved."""
        return max(0, self._limit - self._spent - self._reserved)

    def reserve(self, credits: int | None) -> Reservation:
        """Set credits aside for a submit that is about to be sent.

        Args:
            credits: What it costs, or None if the API page has no price for it.

        Raises:
            BudgetExceededError: It would, or could, cost more than remains. Nothing was sent.
        """
        if credits is None:
            raise BudgetExceededError(
                "The API page has no price for this model and quality, so a budget cannot be kept. Nothing was sent: "
                "use a model with a price, or a client without a budget."
            )
        with self._lock:
            remaining = self._limit - self._spent - self._reserved
            if credits > remaining:
                raise BudgetExceededError(
                    f"This request costs {credits} credits, and {max(0, remaining)} of the budget of "
                    f"{self._limit} remain ({self._spent} spent, {self._reserved} reserved). Nothing was sent: ask for "
                    "less, or raise the budget."
                )
            self._reserved += credits
        return Reservation(self, credits)


class Reservation:
    """Credits set aside for one submit. Each of its methods counts once: what comes after the end changes nothing."""

    def __init__(self, budget: Budget, credits: int) -> None:
        self._budget = budget
        self._reserved: int | None = credits
        self._spent = 0

    def release(self) -> None:
        """Give the credits back: the submit was never sent, or was refused."""
        with self._budget._lock:
            self._end()

    def settle(self, credits_used: int | None) -> None:
        """Count the credits as spent: the submit was accepted. What was reserved is the least that is counted."""
        with self._budget._lock:
            reserved = self._end()
            if reserved is not None:
                self._spent = max(reserved, credits_used or 0)
                self._budget._spent += self._spent

    def refund(self) -> None:
        """Give spent credits back: the service says that it refunded them."""
        with self._budget._lock:
            self._budget._spent -= self._spent
            self._spent = 0

    def _end(self) -> int | None:
        """Take the credits out of those reserved; return None if they are no longer among them."""
        reserved, self._reserved = self._reserved, None
        self._budget._reserved -= reserved or 0
        return reserved


def resolve_budget(budget: Budget | int | None) -> Budget | None:
    """Return a client's budget, made if it was given as a number.

    Raises:
        InvalidRequestError: The number is not one of credits.
    """
    return budget if budget is None or isinstance(budget, Budget) else Budget(budget)
