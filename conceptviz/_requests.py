"""What callers hand in: requests, and the local checks in their constructors.

A request that exists is a request worth sending. What must never live here: a client, I/O, a JSON key.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeAlias

from attrs import Attribute, field, frozen

from ._errors import InvalidRequestError
from ._spec import (
    CREDITS_PER_IMAGE,
    DEFAULT_MODEL,
    DEFAULT_QUALITY,
    MAX_IMAGES,
    MAX_PROMPTS,
    QUALITIES,
    AspectRatio,
    Model,
    Quality,
)

ImageInput: TypeAlias = Path | bytes | IO[bytes] | str
"""An image to edit: a `Path`, bytes, an open binary file, or a `str` that is an http(s) or data URL."""

Prompts: TypeAlias = str | Sequence[str]
"""One prompt, or a sequence of one to four."""


# What Windows keeps for devices, whatever the extension.
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?", re.IGNORECASE)


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


def _check_name(_: object, __: object, name: str | None) -> None:
    if name is None:
        return
    _check_text("A name", name)
    # What would leave the folder, hide the file, or be refused by some file system or other.
    if len(name) > 128 or re.search(r'[\x00-\x1f\x7f<>:"/\\|?*]|^[. ]|[. ]$', name) or _RESERVED.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:80]!r} cannot name a file: at most 128 characters are expected, none of them a slash or another "
            "that file systems refuse, and no dot or space at either end. Nothing was sent."
        )


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
        name: What `generate_many` calls the saved file, without its extension, or None for the task's id. The files of
            several prompts are numbered.

    Raises:
        InvalidRequestError: The request could only be refused. Nothing was sent.
    """

    prompts: tuple[str, ...] = field(converter=_to_prompts)
    model: Model | None = field(default=None, validator=_check_setting, kw_only=True)
    quality: Quality | None = field(default=None, validator=[_check_setting, _check_quality], kw_only=True)
    aspect_ratio: AspectRatio | None = field(default=None, validator=_check_setting, kw_only=True)
    key: str | None = field(default=None, validator=_check_key, kw_only=True)
    name: str | None = field(default=None, validator=_check_name, kw_only=True)

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
        name: As for `GenerateRequest`.

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
    name: str | None = field(default=None, validator=_check_name, kw_only=True)

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
