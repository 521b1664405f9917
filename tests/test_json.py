"""Strict JSON and lenient single values."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from conceptviz._json import (
    MAX_ANSWER_BYTES,
    MAX_DEPTH,
    count_or_none,
    decode_json,
    flag_or_none,
    read_mapping,
    text_or_none,
)

GOOD: list[Any] = [
    {"taskId": "x", "credits_used": 2, "deep": [{"a": None, "b": [True, 1.5, -1, "ü🙂"]}]},
    [],
    "x",
    7,
    None,
    {"": ""},
    {"escaped": "\u2028 \ufffd \U0001f9ec"},
]


@pytest.mark.parametrize("value", GOOD)
def test_json_is_read(value: Any) -> None:
    """With and without escapes, and with the byte order mark that some servers send."""
    assert decode_json(json.dumps(value).encode()) == value
    assert decode_json(json.dumps(value, ensure_ascii=False).encode()) == value
    assert decode_json(b"\xef\xbb\xbf" + json.dumps(value).encode()) == value


# M30, F17: what Python's own decoder takes, or fails at with another error than a ValueError.
BAD = {
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":Infinity}',
    "-Infinity": b"[-Infinity]",
    "1e400": b'{"a":1e400}',
    "5000 digits": b'{"a":' + b"1" * 5000 + b"}",
    "100k nest": b"[" * 100_000 + b"]" * 100_000,
    "100k nest of objects": b'{"a":' * 100_000,
    "one level too deep": b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
    "xff": b'{"a":"\xff"}',
    "UTF-16": '{"a":1}'.encode("utf-16"),
    "UTF-16 without its mark": '{"a":1}'.encode("utf-16-le"),
    "two marks": b"\xef\xbb\xbf\xef\xbb\xbf{}",
    "lone surrogate": b'{"a":"\\ud800"}',
    "lone surrogate in a key": b'{"\\udfff":1}',
    "trailing data": b"{} {}",
    "doubled key": b'{"a":1,"a":1}',
    "doubled key below": b'[{"a":1,"a":2}]',
    "single quotes": b"{'a':1}",
    "control character": b'{"a":"\x01"}',
    "empty": b"",
    "cut": b'{"a":',
    "HTML": b"<html>",
    "too large": b'"' + b"x" * MAX_ANSWER_BYTES + b'"',
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_strict_json_is_one_kind_of_error(name: str) -> None:
    """And as a mapping an empty one."""
    with pytest.raises(ValueError, match=r"."):
        decode_json(BAD[name])
    assert read_mapping(BAD[name]) == {}


def test_the_largest_and_the_deepest_that_are_read() -> None:
    largest = b'"' + b"x" * (MAX_ANSWER_BYTES - 2) + b'"'
    assert len(decode_json(largest)) == MAX_ANSWER_BYTES - 2
    deepest = decode_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)
    assert pickle.loads(pickle.dumps(deepest)) == copy.deepcopy(deepest) == deepest
    objects = decode_json(b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH)
    assert json.dumps(objects).count("a") == MAX_DEPTH


def test_a_real_pair_of_surrogates_is_a_character() -> None:
    assert decode_json(b'"\\ud83d\\ude42"') == "🙂"


@pytest.mark.parametrize("body", [b"[]", b"null", b'"x"', b"7", b"true"])
def test_what_is_no_object_is_an_empty_one(body: bytes) -> None:
    assert read_mapping(body) == {}


def test_an_object_is_itself() -> None:
    assert read_mapping(b'{"a":[1]}') == {"a": [1]}


@pytest.mark.parametrize(
    ("value", "text", "flag"), [("x", "x", None), ("", "", None), (True, None, True), (False, None, False)]
)
def test_texts_and_flags(value: object, text: str | None, flag: bool | None) -> None:
    assert text_or_none(value) == text
    assert flag_or_none(value) is flag


@pytest.mark.parametrize("value", [None, 0, 1, 1.0, [], {}, b"x"])
def test_what_is_neither_text_nor_flag(value: object) -> None:
    """1 and 0 are numbers."""
    assert text_or_none(value) is None
    assert flag_or_none(value) is None


@pytest.mark.parametrize(
    ("value", "count"),
    [
        (0, 0),
        (2, 2),
        (2.0, 2),
        ("2", 2),
        ("0", 0),
        (10**18 - 1, 10**18 - 1),
        (10**18, None),
        (10**400, None),
        (1e308, None),
        ("9" * 18, 10**18 - 1),
        ("9" * 19, None),
        (-1, None),
        (-0.5, None),
        (2.5, None),
        ("2.0", None),
        ("-1", None),
        (" 2", None),
        ("2\n", None),
        ("٢", None),
        ("", None),
        (True, None),
        (False, None),
        (None, None),
        ([2], None),
        (float("nan"), None),
        (float("inf"), None),
    ],
)
def test_numbers_of_credits(value: object, count: int | None) -> None:
    """M33: an int of bounded size, or nothing."""
    result = count_or_none(value)
    assert result == count
    assert result is None or type(result) is int
