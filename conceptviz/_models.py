"""The values that callers get back, and how they say what waiting and repeating should be like.

What lives here: frozen attrs classes. Times are seconds, sizes bytes, money credits. What must never live here: a
client, I/O, a JSON key.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from attrs import Attribute, field, frozen

from ._config import is_loopback
from ._errors import ConceptVizError, InvalidRequestError
from ._spec import (
    GENERATION_SECONDS,
    POLL_INTERVAL,
    TERMINAL_STATUSES,
)


@frozen
class Submission:
    """The service's receipt for a submit: the task exists and is paid for.

    Source: "Response" of "Step 1: Submit Generation Request" and of "Edit Images".

    Attributes:
        task_id: The task's id.
        status: The service's word, "pending" as documented.
        model: The model the service says it uses, or None if it did not say.
        quality: Likewise.
        aspect_ratio: Likewise.
        credits_used: The credits this submit cost, or None if the service did not say.
        credits_remaining: The credits left in the account after it, or None.
        prompts: The prompts that were sent.
        raw: The decoded answer.
    """

    task_id: str
    status: str = "pending"
    model: str | None = None
    quality: str | None = None
    aspect_ratio: str | None = None
    credits_used: int | None = None
    credits_remaining: int | None = None
    prompts: tuple[str, ...] = ()
    raw: Mapping[str, Any] = field(factory=dict, repr=False, eq=False)


def _private(url: str) -> str:
    """Show a URL's host and last step: what lies between identifies an account."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "'...'"
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        return "'...'"
    return repr(f"{parts.scheme}://{parts.hostname}/.../{parts.path.rpartition('/')[2][-64:]}")


@frozen
class Image:
    """One finished image, still at the image host.

    Source: "Response (completed)".

    Attributes:
        url: Where it can be fetched, for a time that nobody has documented. It identifies your account.
        prompt: The prompt it was made from.
        index: The place of that prompt in the request, from 0; None if the answer did not let it be told. Several
            images of a request with one prompt are numbered.
        sha256: The SHA-256 of its bytes in hex, or None if the service did not say.
        raw: The decoded object of the answer.
        task_id: The task that made it, or None.
    """

    url: str = field(repr=_private)
    prompt: str = ""
    index: int | None = None
    sha256: str | None = None
    raw: Mapping[str, Any] = field(factory=dict, repr=False, eq=False)
    task_id: str | None = None

    def _repr_html_(self) -> str:
        """Show the image in a notebook, from its URL."""
        import html

        text = html.escape(self.prompt)
        try:
            parts = urlsplit(self.url)
            shown = parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))
        except ValueError:
            shown = False
        picture = f'<img src="{html.escape(self.url)}" alt="{text}" style="max-width:100%">' if shown else ""
        return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"


@frozen
class TaskState:
    """A task as it was at one look.

    Source: "Step 2: Poll for Results".

    Attributes:
        task_id: The task's id.
        status: The service's word: "completed" and "failed" end a task, any other means that it is still running.
        images: The finished images; empty until it is completed.
        error: The service's sentence on a failed task, or None.
        code: The service's code on a failed task, verbatim, or None.
        credits_refunded: True or False as the service said, None if it did not say.
        raw: The decoded answer.
    """

    task_id: str
    status: str
    images: tuple[Image, ...] = ()
    error: str | None = None
    code: str | None = None
    credits_refunded: bool | None = None
    raw: Mapping[str, Any] = field(factory=dict, repr=False, eq=False)

    @property
    def is_terminal(self) -> bool:
        """Whether the task has ended: nothing about it changes any more."""
        return self.status in TERMINAL_STATUSES


@frozen
class Result:
    """What a completed task made.

    Attributes:
        task_id: The task's id.
        images: The images, those matched with a prompt first, in the order of the prompts.
        submission: The receipt, or None for a task that was picked up by its id.
        missing_prompts: The prompts that no image could be matched with; an image without an index may be one of
            theirs. What that refunds is not documented.
    """

    task_id: str
    images: tuple[Image, ...]
    submission: Submission | None = None
    missing_prompts: tuple[str, ...] = ()

    @property
    def image(self) -> Image:
        """The one image.

        Raises:
            ValueError: There is not exactly one: use `.images`.
        """
        if len(self.images) != 1:
            raise ValueError(f"The result has {len(self.images)} images: use .images for all of them.")
        return self.images[0]

    def _repr_html_(self) -> str:
        """Show the images in a notebook, and the prompts that came back without one."""
        import html

        missing = "".join(f"<p>No image came back for: {html.escape(p)}</p>" for p in self.missing_prompts)
        return "".join(image._repr_html_() for image in self.images) + missing


def _positive(_: object, attribute: Attribute[Any], value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidRequestError(f"{attribute.name} must be a number above 0, not {value!r}.")


def _whole(_: object, attribute: Attribute[Any], value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequestError(f"{attribute.name} must be a whole number of at least 1, not {value!r}.")


@frozen
class Outcome:
    """What became of one prompt of `generate_many`.

    Attributes:
        index: The place of its item among the items, from 0. The prompts of one request share it.
        prompt: The prompt, or "" for an item that is none.
        key: The request's key, or None.
        task_id: The task, or None if there is none: the prompt was not submitted, or nobody knows.
        image: The image, or None.
        error: What went wrong, or None. With an image there is only one thing: it was not saved.
        path: The saved file, or None.
        credits_used: This prompt's share of what its task cost, be it now or at an earlier run of the same key; 0 if
            nothing was spent, all was refunded, or it stands with an earlier item of the same key; None if nobody
            knows.
    """

    index: int
    prompt: str
    key: str | None = None
    task_id: str | None = None
    image: Image | None = None
    error: ConceptVizError | None = None
    path: Path | None = None
    credits_used: int | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing went wrong."""
        return self.error is None


def _span(_: object, attribute: Attribute[Any], value: Any) -> None:
    is_pair = isinstance(value, tuple) and [type(number) in {int, float} for number in value] == [True, True]
    if not is_pair or not 0 < value[0] <= value[1] < math.inf:
        raise InvalidRequestError(f"{attribute.name} must be two numbers above 0 in their order, not {value!r}.")


@frozen(kw_only=True)
class Polling:
    """How a task is waited for. All times are in seconds.

    Source: "Limits" (Poll interval) and "Step 2: Poll for Results".

    Attributes:
        min_interval: The shortest time between two looks.
        max_interval: The longest, except while no task of its kind is likely to be ready.
        first_look: The time from the submit to the first look. A task picked up by its id is looked at once.
        typical: How long a task takes, from and to, as long as none has been seen to end: it places the looks.
        timeout: How long `wait` waits if it is not told otherwise.
        max_failures: How many looks in a row may fail before `wait` gives up with `PollInterruptedError`.
    """

    min_interval: float = field(default=POLL_INTERVAL[0], validator=_positive)
    max_interval: float = field(default=POLL_INTERVAL[1], validator=_positive)
    first_look: float = field(default=POLL_INTERVAL[0], validator=_positive)
    typical: tuple[float, float] = field(default=GENERATION_SECONDS, validator=_span)
    timeout: float = field(default=600.0, validator=_positive)
    max_failures: int = field(default=60, validator=_whole)

    def __attrs_post_init__(self) -> None:
        if self.min_interval > self.max_interval:
            raise InvalidRequestError(
                f"min_interval ({self.min_interval}) is longer than max_interval ({self.max_interval})."
            )


@frozen(kw_only=True)
class Retries:
    """How often what is safe to repeat is repeated. All times are in seconds.

    A submit is repeated only if no connection was made, or if it was refused with 429: never if it may have been
    charged. Looks and downloads cost nothing and are repeated on any passing fault. The pause before attempt n + 1 is
    drawn evenly from 0 to `min(max_delay, base_delay * 2 ** (n - 1))`, or is what `Retry-After` asks if that is longer.

    Attributes:
        attempts: How often a request is made at the most, the first time included. 1 repeats nothing.
        base_delay: See the formula.
        max_delay: See the formula.
        max_retry_after: A `Retry-After` above this is not waited for: the error is raised, and carries it. While a
            task is waited for, it is the wait's own timeout that bounds it.
    """

    attempts: int = field(default=3, validator=_whole)
    base_delay: float = field(default=0.5, validator=_positive)
    max_delay: float = field(default=8.0, validator=_positive)
    max_retry_after: float = field(default=60.0, validator=_positive)
