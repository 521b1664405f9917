"""What must hold after every schedule: functions of the server's ledger and of what the client told and wrote down.

The ledger is that of one piece of work: whatever POSTs it holds belong together. What lives here: pure functions and
two values. What must never live here: a socket, a clock, the client.
"""

from __future__ import annotations

from attrs import frozen

from .steps import Ledger, Post

# Every key of a campaign begins with this, and nothing else holds it.
KEY_MARK = "cvk_OnlyInACampaign"
# After one of these, read whole, nothing was charged and a submit may be sent again.
REFUSING_STATUSES = frozenset({400, 401, 402, 403, 429})
# Seconds by which a deadline may be missed.
OVERSHOOT = 0.25

# What a journal says of an attempt: that it is under way, that it came to nothing, that it is paid for.
OPEN = frozenset({"intent", "sending"})
FREE = frozenset({"not_sent", "rejected", "abandoned"})
PAID = frozenset({"accepted", "completed", "failed"})


@frozen
class Record:
    """What the client's journal says of one attempt.

    Attributes:
        state: Its state.
        task_id: The task, once it is known.
        refunded: Whether the credits of a failed task were given back.
    """

    state: str
    task_id: str | None = None
    refunded: bool = False

    @property
    def is_free(self) -> bool:
        """Whether the same work may be paid for again."""
        return self.state in FREE or (self.state == "failed" and (self.refunded or self.task_id is None))


@frozen(kw_only=True)
class Report:
    """What the client told about a piece of work.

    Attributes:
        outcome: "returned", "interrupted", or the name of the class of what was raised.
        foreign: Whether that is an error that the package does not document.
        task_ids: The tasks it named: returned, in an event, or in an error.
        unknown: Whether it said that there may be a charge it does not know of.
        records: What its journal says.
        held: The credits of its budget that are spent or reserved.
        told: All that it said, showed and wrote down, to look for the key in.
        elapsed: The seconds it took.
        bound: The seconds it may have taken.
        lag: The longest time that the event loop, or the machine, made everybody wait meanwhile.
    """

    outcome: str
    foreign: bool = False
    task_ids: frozenset[str] = frozenset()
    unknown: bool = False
    records: tuple[Record, ...] = ()
    held: int = 0
    told: str = ""
    elapsed: float = 0.0
    bound: float = 0.0
    lag: float = 0.0

    @property
    def recorded_ids(self) -> frozenset[str]:
        """The tasks that its journal names as paid for."""
        return frozenset(r.task_id for r in self.records if r.task_id is not None and r.state in PAID)

    def records_say(self, *states: str) -> bool:
        """Whether its journal has an attempt in one of these states."""
        return any(record.state in states for record in self.records)


def is_refused(post: Post) -> bool:
    """Say whether a POST was refused for certain, and its client told so."""
    return post.task_id is None and post.answered in REFUSING_STATUSES


def double_charges(ledger: Ledger) -> list[Post]:
    """Invariant A by its effect: the charges after the first for one piece of work, without what was given back."""
    return [post for post in ledger.accepted if not post.refunded][1:]


def unsafe_repeats(posts: list[Post]) -> list[Post]:
    """Invariant A by its rule: the POSTs that came though an earlier one may have been charged.

    With other luck each of these would have been a double charge.
    """
    for n, post in enumerate(posts):
        if not is_refused(post):
            return posts[n + 1 :]
    return []


def lost_ids(ledger: Ledger, report: Report) -> list[str]:
    """Invariant B, as the caller sees it: the paid tasks that were neither named nor said to be possible.

    Whoever was interrupted has been told nothing, and has the journal.
    """
    if report.unknown or report.outcome == "interrupted":
        return []
    return _without(ledger, report.task_ids)


def unrecorded_ids(ledger: Ledger, report: Report) -> list[str]:
    """Invariant B, as the journal has it: the paid tasks that it neither names nor shows as unknown."""
    return [] if report.records_say("unknown") else _without(ledger, report.recorded_ids)


def _without(ledger: Ledger, named: frozenset[str]) -> list[str]:
    return [post.task_id for post in ledger.accepted if post.task_id is not None and post.task_id not in named]


def false_ids(ledger: Ledger, report: Report) -> list[str]:
    """The tasks that the client named or wrote down though the server made no such task."""
    return sorted((report.task_ids | report.recorded_ids) - {post.task_id for post in ledger.accepted})


def false_denials(ledger: Ledger, report: Report) -> list[Post]:
    """The POSTs that arrived and were not refused, though the client said, or wrote down, that nothing was sent.

    And those that were never answered, though it wrote down that they were rejected.
    """
    if report.outcome == "NotSentError" or report.records_say("not_sent"):
        return [post for post in ledger.posts if not is_refused(post)]
    return [post for post in ledger.posts if report.records_say("rejected") and (post.task_id or not post.answered)]


def false_failures(ledger: Ledger, report: Report, *, tasks_fail: bool) -> list[str]:
    """The paid tasks that the client said had failed though they had not: another answer was taken for theirs."""
    failed = report.outcome == "GenerationFailedError" and not tasks_fail
    return [str(post.task_id) for post in ledger.accepted if failed]


def uncounted_credits(ledger: Ledger, report: Report) -> int:
    """The credits that were charged and not given back, and that the budget knows nothing of."""
    return max(0, ledger.charged - ledger.refunded - report.held)


def forgotten_credits(report: Report) -> int:
    """The credits that the budget still holds for what certainly came to nothing."""
    return report.held if all(record.state in FREE for record in report.records) else 0


def leaks(report: Report, heads_elsewhere: list[bytes], mark: str = KEY_MARK) -> list[str]:
    """Where the key, or an Authorization header, was seen outside the API's own server."""
    found = ["told"] if mark[4:] in report.told else []
    heads = (head.lower() for head in heads_elsewhere)
    return found + ["sent elsewhere" for head in heads if mark[4:].lower().encode() in head or b"authorization" in head]


def overshoot(report: Report) -> float:
    """The seconds by which a deadline was missed, beyond what is allowed and what the machine is to blame for."""
    return max(0.0, report.elapsed - report.bound - report.lag - OVERSHOOT)
