"""Strict JSON, and lenient readings of its single values.

What lives here: bytes to a decoded value, and a decoded value to a type of ours or None. Pure. What must never live
here: a key of the API's answers (`_wire`).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

# An answer of the API has some hundred bytes; what is far larger is not one.
MAX_ANSWER_BYTES = 2**20


def decode_json(body: bytes) -> Any:
    """Decode a JSON text strictly: UTF-8, no NaN, infinity, doubled key or half character, bounded size and depth.

    Raises:
        ValueError: It is not one.
    """
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError("too large")
    try:
        text = body.decode("utf-8-sig")
        value = json.loads(text, parse_constant=_refuse_number, parse_float=_finite, object_pairs_hook=_unique_keys)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


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
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        return None
    return int(value)
