"""Which image belongs to which prompt.

Neither the order of a task's images nor their number is documented. Pure: images and prompts in, numbered images out.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from operator import itemgetter
from urllib.parse import urlsplit

from attrs import evolve

from ._models import Image

# Seen in the field: .../<taskId>/<index>-<first 16 hex of the hash>.<ext>
_URL_INDEX = re.compile(r"/(\d)-[0-9a-fA-F]+\.[A-Za-z]+$", re.ASCII)


def match_images(images: Sequence[Image], prompts: Sequence[str]) -> tuple[Image, ...]:
    """Return the images with the index and the text of their prompts, in the order of the prompts.

    A prompt is matched by its text, then by its text but for spacing and composition, then by the index in the URL;
    never by position when the texts disagree. What matches nothing comes last, with no index.

    Args:
        images: The images in the order of the answer, each with the prompt that the service gave it, or "".
        prompts: The prompts that were submitted; empty if they are not known.
    """
    if len(prompts) <= 1:
        return _number_images(images, prompts)
    found: dict[int, Image] = {}
    rest = images
    for same in (_exactly, _normalised):
        unmatched = []
        for image in rest:
            free = [n for n, p in enumerate(prompts) if n not in found and same(p) == same(image.prompt)]
            hint = _url_index(image.url)
            if free:
                found[hint if hint in free else free[0]] = image
            else:
                unmatched.append(image)
        rest = unmatched
    strangers = []
    texts = {_normalised(prompt) for prompt in prompts}
    for image in rest:
        hint = _url_index(image.url)
        # One that says it is a second image of some prompt is not the first of another.
        surplus = _normalised(image.prompt) in texts
        if hint is not None and hint < len(prompts) and hint not in found and not surplus:
            found[hint] = image
        else:
            strangers.append(image)
    if not found and len(images) == len(prompts) and not any(image.prompt for image in images):
        found, strangers = dict(enumerate(images)), []
    return tuple(evolve(found[n], index=n, prompt=prompts[n]) for n in sorted(found)) + tuple(strangers)


def _number_images(images: Sequence[Image], prompts: Sequence[str]) -> tuple[Image, ...]:
    """Give numbers to the images of one prompt, or of a task picked up by its id: there is nothing to confuse."""
    numbers = [n for n in (_url_index(image.url) for image in images) if n is not None]
    if len(set(numbers)) < len(images):
        numbers = list(range(len(images)))
    in_order = sorted(zip(numbers, images, strict=True), key=itemgetter(0))
    if prompts:
        return tuple(evolve(image, index=n, prompt=prompts[0]) for n, (_, image) in enumerate(in_order))
    return tuple(evolve(image, index=n) for n, image in in_order)


def _exactly(text: str) -> str:
    return text


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _url_index(url: str) -> int | None:
    try:
        match = _URL_INDEX.search(urlsplit(url).path)
    except ValueError:
        return None
    return int(match[1]) if match else None
