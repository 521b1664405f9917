"""The ConceptViz API reference as constants.

What lives here: every number, word and table that the API page fixes, each block named after the heading of the
page it was read from, and what the field has shown where the page is silent. What must never live here: behaviour,
and anything that is our choice rather than the service's.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

# Source: "Base URL"
DEFAULT_BASE_URL: Final = "https://conceptviz.app/api/v1"

# Source: "Authentication"
API_KEY_PREFIX: Final = "cvk_"

# Source: "Step 1: Submit Generation Request", "Edit Images"
GENERATE_PATH: Final = "/generate"
EDIT_PATH: Final = "/edit"
# Source: "Step 2: Poll for Results"
TASK_PATH: Final = "/task/"

# Source: "Step 1: Submit Generation Request" and "Limits". The literals are for editors; any string is accepted,
# because the service adds models and ratios without telling its clients.
Model: TypeAlias = Literal["cv-2", "cv-1"] | str  # noqa: PYI051 - for editors
Quality: TypeAlias = Literal["2k", "4k"] | str  # noqa: PYI051 - for editors
AspectRatio: TypeAlias = Literal["16:9", "1:1", "4:3", "9:16", "a4-portrait"] | str  # noqa: PYI051 - for editors
DEFAULT_MODEL: Final = "cv-2"
DEFAULT_QUALITY: Final = "2k"
QUALITIES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType({"cv-2": ("2k",), "cv-1": ("2k", "4k")})

# Source: "Limits" and "Edit Images"
MAX_PROMPTS: Final = 4
MAX_IMAGES: Final = 4
# "20MB" is 10^6 or 2^20 bytes a megabyte, the page does not say: above the first we warn, above the second we refuse.
IMAGE_BYTES_WARN: Final = 20 * 10**6
IMAGE_BYTES_LIMIT: Final = 20 * 2**20

# Source: "Limits": seconds between two looks at a task, and the seconds a generation typically takes.
POLL_INTERVAL: Final = (3.0, 5.0)
GENERATION_SECONDS: Final = (30.0, 90.0)

# Source: "Credit Cost": credits per image.
CREDITS_PER_IMAGE: Final[Mapping[tuple[str, str], int]] = MappingProxyType(
    {("cv-2", "2k"): 2, ("cv-1", "2k"): 1, ("cv-1", "4k"): 2}
)

# Source: "Step 2: Poll for Results". Only the first two end a task.
STATUS_COMPLETED: Final = "completed"
STATUS_FAILED: Final = "failed"
TERMINAL_STATUSES: Final = frozenset({STATUS_COMPLETED, STATUS_FAILED})
RUNNING_STATUSES: Final = frozenset({"pending", "processing"})

# Source: "Error Codes": the code and the HTTP status it is documented with.
ERROR_CODES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "INVALID_BODY": 400,
        "IMAGE_REQUIRED": 400,
        "INVALID_IMAGE": 400,
        "PROMPT_REQUIRED": 400,
        "TOO_MANY_IMAGES": 400,
        "TOO_MANY_PROMPTS": 400,
        "UNSUPPORTED_MODEL": 400,
        "UNAUTHORIZED": 401,
        "INVALID_API_KEY": 401,
        "INSUFFICIENT_CREDITS": 402,
        "PLAN_REQUIRED": 403,
        "QUALITY_NOT_ALLOWED": 403,
        "PLAN_LIMIT_EXCEEDED": 403,
        "TASK_NOT_FOUND": 404,
        "MODERATION_RATE_LIMITED": 429,
        "INPUT_MODERATION_BLOCKED": 400,
        "CREDIT_CONSUMPTION_FAILED": 500,
        "GENERATION_FAILED": 500,
    }
)
GENERATION_FAILED: Final = "GENERATION_FAILED"
QUALITY_NOT_ALLOWED: Final = "QUALITY_NOT_ALLOWED"

# Seen in the field, not promised: a task may be unknown for a moment after its own accept. Seconds.
NOT_YET_VISIBLE_SECONDS: Final = 30.0
# Seen in the field: 21 of these characters. Wider here, so that a longer id is not refused.
TASK_ID_CHARACTERS: Final = r"[A-Za-z0-9_-]{1,128}"
