"""The API reference as tables, and the checks a POST must pass before it is anyone's business who sent it.

Every number, price and code of the page is here, under the heading that states it. What the page leaves open
is decided in the way the field notes observed, and said where it is done.
"""

from collections.abc import Mapping
from typing import Any, NoReturn
from urllib.parse import unquote, urlsplit

import attrs

from ._body import Body, Upload
from ._pictures import is_image

API_PREFIX = "/api/v1"
IMAGE_PREFIX = "/images"

# Heading: Limits
MAX_IMAGES = 4
MAX_PROMPTS = 4
MAX_KEYS = 5
DURATION = (30.0, 90.0)

# Heading: JSON Request Body, "up to 20MB each". Read as 2**20 so that both readings of a megabyte pass.
MAX_IMAGE_BYTES = 20 * 2**20

# Heading: Credit Cost
PRICES = {("cv-2", "2k"): 2, ("cv-1", "2k"): 1, ("cv-1", "4k"): 2}

DEFAULT_MODEL = "cv-2"
DEFAULT_QUALITY = "2k"
DEFAULT_ASPECT_RATIO = "16:9"

# Heading: Error Codes. The text of each error is the page's description of its code.
ERRORS = {
    "INVALID_BODY": (400, "Request body is not valid JSON"),
    "IMAGE_REQUIRED": (400, "Edit request did not include an input image"),
    "INVALID_IMAGE": (400, "Input image data, URL, or file type is invalid"),
    "PROMPT_REQUIRED": (400, "No prompt or prompts provided"),
    "TOO_MANY_IMAGES": (400, "More than 4 images in one edit request"),
    "TOO_MANY_PROMPTS": (400, "More than 4 prompts in one request"),
    "UNSUPPORTED_MODEL": (400, "Model must be cv-2 or cv-1"),
    "UNAUTHORIZED": (401, "Missing or invalid Authorization header"),
    "INVALID_API_KEY": (401, "API key is invalid or disabled"),
    "INSUFFICIENT_CREDITS": (402, "Not enough credits"),
    "PLAN_REQUIRED": (403, "API access requires a Pro plan or higher"),
    "QUALITY_NOT_ALLOWED": (403, "Requested quality is not available for your plan"),
    "PLAN_LIMIT_EXCEEDED": (403, "Batch size exceeds your plan limit"),
    "TASK_NOT_FOUND": (404, "Task ID not found or doesn't belong to your account"),
    "MODERATION_RATE_LIMITED": (429, "Too many moderation requests in a short period"),
    "INPUT_MODERATION_BLOCKED": (400, "Prompt or input image was blocked by safety checks"),
    "CREDIT_CONSUMPTION_FAILED": (500, "Credits could not be consumed"),
    "GENERATION_FAILED": (500, "Image generation failed (credits auto-refunded)"),
}


@attrs.frozen
class Plan:
    """What an account may do. Only "API access requires a Pro plan" is documented; the rest is invented."""

    has_api: bool
    max_prompts: int
    qualities: frozenset[str]


PLANS = {
    "pro": Plan(has_api=True, max_prompts=MAX_PROMPTS, qualities=frozenset({"2k", "4k"})),
    "pro-single": Plan(has_api=True, max_prompts=1, qualities=frozenset({"2k"})),
    "free": Plan(has_api=False, max_prompts=0, qualities=frozenset()),
}


class RefusedError(Exception):
    """The service refuses a request: a code of the error table, and fields beside it."""

    def __init__(self, code: str, more: Mapping[str, Any]) -> None:
        super().__init__(code)
        self.code = code
        self.more = more


def refuse(code: str, **more: Any) -> NoReturn:
    """End the request with this code."""
    raise RefusedError(code, more)


@attrs.frozen
class Order:
    """A POST that passed every check of its form."""

    prompts: tuple[str, ...]
    model: str
    quality: str
    aspect_ratio: str
    images: tuple[Upload | str, ...] = ()

    @property
    def cost(self) -> int:
        """Heading: Credit Cost, "Credits per Image". An edit returns one image, whatever it began with."""
        return PRICES[self.model, self.quality] * len(self.prompts)

    def asks_for(self, test_prompt: str) -> bool:
        """Whether one of its prompts holds this test prompt."""
        return any(f"[sim:{test_prompt}]" in prompt for prompt in self.prompts)


def read_generate(body: Body) -> Order:
    """Heading: Request Body. "If both are provided, prompts takes priority"."""
    prompts = body.fields.get("prompts")
    if prompts is None:
        prompts = [body.fields.get("prompt")]
    return _read_order(body, prompts)


def read_edit(body: Body) -> Order:
    """Headings: JSON Request Body, Multipart Upload."""
    order = _read_order(body, [body.fields.get("prompt")])
    if not body.images:
        refuse("IMAGE_REQUIRED")
    if len(body.images) > MAX_IMAGES:
        refuse("TOO_MANY_IMAGES")
    images = tuple(image for image in body.images if image is not None and _is_acceptable(image))
    if len(images) != len(body.images):
        refuse("INVALID_IMAGE")
    return attrs.evolve(order, images=images)


def _read_order(body: Body, prompts: Any) -> Order:
    if not isinstance(prompts, list) or not prompts:
        refuse("PROMPT_REQUIRED")
    if len(prompts) > MAX_PROMPTS:
        refuse("TOO_MANY_PROMPTS")
    if not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        refuse("PROMPT_REQUIRED")
    model = body.fields.get("model")
    if model is None:
        model = DEFAULT_MODEL
    if model not in ("cv-2", "cv-1"):
        refuse("UNSUPPORTED_MODEL")
    quality = body.fields.get("quality")
    if quality is None or model == "cv-2":
        # "CV-2 uses "2k" automatically": whatever was asked for.
        quality = DEFAULT_QUALITY
    if not isinstance(quality, str) or (model, quality) not in PRICES:
        refuse("QUALITY_NOT_ALLOWED")
    aspect_ratio = body.fields.get("aspectRatio")
    if not isinstance(aspect_ratio, str):
        # The page gives only examples and no error code: any text is taken, anything else passed over.
        aspect_ratio = DEFAULT_ASPECT_RATIO
    return Order(tuple(prompts), model, quality, aspect_ratio)


def _is_acceptable(image: Upload | str) -> bool:
    """Whether an input image is one. The simulator fetches no URL, so of a URL it sees only the form."""
    if isinstance(image, str):
        try:
            parts = urlsplit(image)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and bool(parts.hostname)
    declared = image.content_type.partition(";")[0].strip()
    is_declared = not declared or declared.startswith("image/") or declared == "application/octet-stream"
    return is_declared and is_image(image.data) and len(image.data) <= MAX_IMAGE_BYTES


def is_blocked(image: Upload | str) -> bool:
    """The test prompt of moderation, written into a URL or anywhere into a file."""
    return "[sim:blocked]" in unquote(image) if isinstance(image, str) else b"[sim:blocked]" in image.data
