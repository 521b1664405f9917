"""What a server, or whatever stands between, might answer: strategies for hypothesis.

Bodies are wild bytes, wild JSON, and the documented answers with pieces missing, exchanged or cut, because pure
noise never gets past the first line of a parser.
"""

from __future__ import annotations

import json
from typing import Any

from hypothesis import strategies as st

from conceptviz import EditRequest, GenerateRequest
from conceptviz._spec import ERROR_CODES
from conceptviz._wire import Answer

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["completed", "failed", "pending", "COMPLETED", "", "..", "../x", "2", "9" * 30, "\ud800"]),
    st.sampled_from(sorted(ERROR_CODES)),
    st.integers(min_value=10**17, max_value=10**400),
)
JSON_VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KEYS = [
    "taskId",
    "task_id",
    "status",
    "model",
    "quality",
    "aspect_ratio",
    "credits_used",
    "credits_remaining",
    "poll_url",
    "images",
    "error",
    "code",
    "credits_refunded",
]
PROMPTS = st.sampled_from(["a", "b", "a ", "the water cycle"])
IMAGES = st.fixed_dictionaries(
    {},
    optional={
        "url": st.sampled_from(["https://h/t/0-ab.png", "https://h/t/1-ab.jpg", "https://[x", "javascript:x"])
        | JSON_VALUES,
        "prompt": PROMPTS | JSON_VALUES,
        "imageHash": st.just("ab" * 32) | JSON_VALUES,
        "storageKey": JSON_VALUES,
    },
)
# An object with the documented keys, each perhaps absent and perhaps of another type than documented.
OBJECTS = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(KEYS, JSON_VALUES),
        "taskId": st.sampled_from(["vaW29_MJ1wbnyFU4bl_pd", "-x_", "../x", "a b"]) | JSON_VALUES,
        "status": st.sampled_from(["completed", "failed", "processing", "Failed"]) | JSON_VALUES,
        "code": st.sampled_from(sorted(ERROR_CODES)) | JSON_VALUES,
        "credits_refunded": st.booleans() | JSON_VALUES,
        "images": st.lists(IMAGES | JSON_VALUES, max_size=6) | JSON_VALUES,
        "surprise": JSON_VALUES,
    },
)


@st.composite
def bodies(draw: st.DrawFn) -> bytes:
    """The bytes of an answer."""
    kind = draw(st.sampled_from(["bytes", "json", "object", "object", "cut", "spliced"]))
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    value = draw(JSON_VALUES if kind == "json" else OBJECTS)
    # Python writes NaN, infinities and lone surrogates, which are not JSON: so might a server.
    body = json.dumps(value, ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    if kind == "cut":
        return body[: draw(st.integers(0, len(body)))]
    if kind == "spliced":
        place = draw(st.integers(0, len(body)))
        return body[:place] + draw(st.binary(max_size=8)) + body[place:]
    return body


DATES = st.sampled_from(
    ["Wed, 21 Oct 2026 07:28:00 GMT", "Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359"]
)
HEADER_VALUES = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    DATES,
    st.from_regex(
        r"\A[A-Z][a-z]{2}, [0-9]{1,2} [A-Z][a-z]{2} [0-9]{1,6} [0-9]{1,2}:[0-9]{2}(:[0-9]{2})? ?[-+A-Z0-9]*\Z"
    ),
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "date", "content-type", "location"]) | st.text(max_size=8),
    HEADER_VALUES,
    max_size=4,
)
STATUSES = st.sampled_from([*range(100, 600), 0, 999]) | st.sampled_from([200, 400, 404, 429, 500])
ANSWERS = st.builds(Answer, STATUSES, HEADERS, bodies())
REQUESTS = st.one_of(
    st.builds(
        GenerateRequest, st.lists(PROMPTS, min_size=1, max_size=4), model=st.sampled_from([None, "cv-1", "cv-9"])
    ),
    st.builds(EditRequest, PROMPTS, st.just(b"x")),
)
