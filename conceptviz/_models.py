"""The values that callers hand in and get back.

What lives here: frozen attrs classes, and the local checks in their constructors, so that a request that exists is a
request worth sending. Times are seconds, sizes bytes, money credits. What must never live here: a client, I/O, a JSON
key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeAlias
from urllib.parse import urlsplit

from attrs import Attribute, field, frozen

from ._config import is_loopback
from ._errors import InvalidRequestError
from ._spec import (
    CREDITS_PER_IMAGE,
    DEFAULT_MODEL,
    DEFAULT_QUALITY,
    GENERATION_SECONDS,
    MAX_IMAGES,
    MAX_PROMPTS,
    POLL_INTERVAL,
    QUALITIES,
    TERMINAL_STATUSES,
    AspectRatio,
    Model,
    Quality,
)

ImageInput: TypeAlias = Path | bytes | IO[bytes] | str
"""An image to edit: a `Path`, bytes, an open binary file, or a `str` that is an http(s) or data URL."""

Prompts: TypeAlias = str | Sequence[str]
"""One prompt, or a sequence of one to four."""


class Unchecked(str):
    """A setting that is sent as it is, past the local table: the way out when the service learns something new.

    `generate(prompt, model="cv-2", quality="4k")` is refused here, because the API page lists no such row;
    `quality=Unchecked("4k")` leaves the judgement to the service.
    """

    __slots__ = ()


def _check_text(what: str, text: object, if_blank: str = "describe the diagram in it") -> str:
    if not isinstance(text, str):
        raise InvalidRequestError(f"{what} must be a str, not {type(text).__name__}. Nothing was sent.")
    if not text.strip():
        raise InvalidRequestError(f"{what} is blank. Nothing was sent: {if_blank}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} holds half a character (a lone surrogate) at position {error.start}, which UTF-8 cannot carry. "
            "Nothing was sent: read the text with its right encoding."
        ) from None
    return text


def _check_setting(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is not None:
        _check_text(attribute.name, value, "leave it out, and the service chooses")


def _check_key(_: object, __: object, key: str | None) -> None:
    if key is not None and len(_check_text("A key", key)) > 512:
        raise InvalidRequestError("A key has at most 512 characters. Nothing was sent.")


def _check_quality(request: Any, _: Attribute[Any], quality: str | None) -> None:
    """Source: "Step 1: Submit Generation Request", parameter `quality`, and "Limits"."""
    if quality is None or isinstance(quality, Unchecked) or isinstance(request.model, Unchecked):
        return
    model = request.model or DEFAULT_MODEL
    allowed = QUALITIES.get(model)
    if allowed is not None and quality not in allowed:
        raise InvalidRequestError(
            f"The model {model} has no quality {quality!r}: the API page lists {model} with {' and '.join(allowed)} "
            f'under "Limits"{" (cv-1 has 4k)" if quality == "4k" else ""}. Nothing was sent. If the service has '
            f"changed since, quality=conceptviz.Unchecked({quality!r}) sends it as it is."
        )


def _to_prompts(prompts: Prompts) -> tuple[str, ...]:
    if isinstance(prompts, str):
        prompts = (prompts,)
    elif not isinstance(prompts, Sequence) or isinstance(prompts, bytes | bytearray):
        raise InvalidRequestError(
            f"A prompt is a str or a sequence of one to {MAX_PROMPTS} str, not {type(prompts).__name__}. "
            "Nothing was sent."
        )
    if not 1 <= len(prompts) <= MAX_PROMPTS:
        raise InvalidRequestError(
            f"{len(prompts)} prompts were given: one request takes one to {MAX_PROMPTS}. Nothing was sent."
        )
    name = "The prompt" if len(prompts) == 1 else "Prompt {}"
    return tuple(_check_text(name.format(n), prompt) for n, prompt in enumerate(prompts, 1))


def _to_images(images: ImageInput | Iterable[ImageInput]) -> tuple[ImageInput, ...]:
    if isinstance(images, str | bytes | bytearray | memoryview | Path) or hasattr(images, "read"):
        return (images,)  # type: ignore[return-value]  # hasattr does not narrow a union
    if not isinstance(images, Iterable):
        raise InvalidRequestError(
            f"An image is a Path, bytes, an open binary file or a URL, not {type(images).__name__}. Nothing was sent."
        )
    # One more than is allowed is enough to refuse them, should they have no end.
    return tuple(islice(images, MAX_IMAGES + 1))


def _check_edit_prompt(_: object, __: object, prompt: str) -> None:
    _check_text("The edit prompt", prompt)


def _check_image_count(_: object, __: object, images: tuple[ImageInput, ...]) -> None:
    if not 1 <= len(images) <= MAX_IMAGES:
        count = f"More than {MAX_IMAGES}" if images else "No"
        raise InvalidRequestError(f"{count} images were given: one edit takes one to {MAX_IMAGES}. Nothing was sent.")


@frozen
class GenerateRequest:
    """One POST /generate: one to four prompts of equal settings.

    Source: "Step 1: Submit Generation Request".

    Attributes:
        prompts: One prompt as a str, or one to four in a sequence; kept as a tuple.
        model: "cv-2" or "cv-1"; None leaves the choice to the service, which takes cv-2.
        quality: "2k", or "4k" with cv-1; None leaves the choice to the service.
        aspect_ratio: Such as "16:9", "1:1", "4:3", "9:16", "a4-portrait"; None leaves it to the service.
        key: Your own name for this piece of work, or None: what has the same key is not paid for twice.

    Raises:
        InvalidRequestError: The request could only be refused. Nothing was sent.
    """

    prompts: tuple[str, ...] = field(converter=_to_prompts)
    model: Model | None = field(default=None, validator=_check_setting, kw_only=True)
    quality: Quality | None = field(default=None, validator=[_check_setting, _check_quality], kw_only=True)
    aspect_ratio: AspectRatio | None = field(default=None, validator=_check_setting, kw_only=True)
    key: str | None = field(default=None, validator=_check_key, kw_only=True)

    @property
    def expected_credits(self) -> int | None:
        """The credits this request should cost, or None for a model or quality without a documented price."""
        return price(len(self.prompts), model=self.model, quality=self.quality)

    @property
    def settings(self) -> dict[str, str]:
        """The settings that were given, by the names of the attributes."""
        return _settings(self)


@frozen
class EditRequest:
    """One POST /edit: an instruction and one to four images.

    Source: "Edit Images".

    Attributes:
        prompt: The edit instruction.
        images: One to four of `Path`, bytes, an open binary file, or a `str` that is an http(s) or data URL. Files are
            read when the request is sent, not before.
        model: As for `GenerateRequest`.
        quality: As for `GenerateRequest`.
        aspect_ratio: As for `GenerateRequest`.
        key: As for `GenerateRequest`.

    Raises:
        InvalidRequestError: The request could only be refused. Nothing was sent.
    """

    prompt: str = field(validator=_check_edit_prompt)
    images: tuple[ImageInput, ...] = field(
        converter=_to_images, validator=_check_image_count, repr=lambda images: f"<{len(images)} images>"
    )
    model: Model | None = field(default=None, validator=_check_setting, kw_only=True)
    quality: Quality | None = field(default=None, validator=[_check_setting, _check_quality], kw_only=True)
    aspect_ratio: AspectRatio | None = field(default=None, validator=_check_setting, kw_only=True)
    key: str | None = field(default=None, validator=_check_key, kw_only=True)

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompt as a tuple of one: what the answer's images are matched with."""
        return (self.prompt,)

    @property
    def expected_credits(self) -> int | None:
        """The credits of one output image, which is what an edit makes; None without a documented price."""
        return price(1, model=self.model, quality=self.quality)

    @property
    def settings(self) -> dict[str, str]:
        """The settings that were given, by the names of the attributes."""
        return _settings(self)


def _settings(request: GenerateRequest | EditRequest) -> dict[str, str]:
    given = {"model": request.model, "quality": request.quality, "aspect_ratio": request.aspect_ratio}
    return {name: str(value) for name, value in given.items() if value is not None}


def price(count: int, *, model: str | None, quality: str | None) -> int | None:
    """Return the credits of `count` images, or None for a model or quality without a documented price.

    Source: "Credit Cost".
    """
    each = CREDITS_PER_IMAGE.get((model or DEFAULT_MODEL, quality or DEFAULT_QUALITY))
    return None if each is None else each * count


def estimate(prompts_or_count: Prompts | int, *, model: Model | None = None, quality: Quality | None = None) -> int:
    """Return the credits that images would cost, as `AsyncConceptViz.estimate` describes."""
    if isinstance(prompts_or_count, bool | bytes | bytearray) or not isinstance(prompts_or_count, int | str | Sequence):
        raise InvalidRequestError("A number of images, a prompt or a sequence of prompts is expected.")
    if isinstance(prompts_or_count, int):
        count = prompts_or_count
    else:
        count = 1 if isinstance(prompts_or_count, str) else len(prompts_or_count)
    if count < 0:
        raise InvalidRequestError(f"A number of images is 0 or more, not {count}.")
    credits = price(count, model=model, quality=quality)
    if credits is None:
        raise InvalidRequestError(
            f"The API page has no price for model {model or 'cv-2'} at quality {quality or '2k'}: it lists cv-2 at 2k, "
            "cv-1 at 2k and cv-1 at 4k."
        )
    return credits


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
