"""Strict JSON, and lenient readings of its single values.

What lives here: bytes to a decoded value, and a decoded value to a type of ours or None. Pure. What must never live
here: a key of the API's answers (`_wire`).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

# An answer of the API has some hundred bytes and three levels; what is far larger is not one. The bound on the depth
# lets a decoded answer be copied, pickled and compared: each of these recurses.
MAX_ANSWER_BYTES = 2**20
MAX_DEPTH = 64
# More credits than anyone has.
_MAX_COUNT = 10**18


def decode_json(body: bytes) -> Any:
    """Decode a JSON text strictly: UTF-8, no NaN, infinity, doubled key or half character, bounded size and depth.

    Raises:
        ValueError: It is not one.
    """
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError("too large")
    try:
        text = body.decode("utf-8-sig")
        value = _DECODER.decode(text)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [v for v in level if isinstance(v, dict | list)]
        if not containers:
            return
        level = [child for v in containers for child in (v.values() if isinstance(v, dict) else v)]
    raise ValueError("nested too deeply")


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


# Made once: that takes as long as an answer to a look.
_DECODER = json.JSONDecoder(parse_constant=_refuse_number, parse_float=_finite, object_pairs_hook=_unique_keys)


def read_mapping(body: bytes) -> dict[str, Any]:
    """Decode a body that should be a JSON object; anything else is an empty one."""
    try:
        data = decode_json(body)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def text_or_none(value: object) -> str | None:
    return value if isinstance(value, str) else None


def flag_or_none(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def count_or_none(value: object) -> int | None:
    """Read a number of credits; 2.0 and "2" are 2, and what cannot be a number of credits is None."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value, re.ASCII):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_COUNT:
        return None
    return int(value) if value == int(value) else None
