"""`name`: what generate_many calls a file. It may come from a table that somebody else wrote."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conceptviz import Credits, EditRequest, GenerateRequest, InvalidRequestError


def make(kind: str, name: Any) -> GenerateRequest | EditRequest:
    return GenerateRequest("a", name=name) if kind == "generate" else EditRequest("a", b"\x89PNG", name=name)


@pytest.mark.parametrize("kind", ["generate", "edit"])
@pytest.mark.parametrize(
    "name",
    [
        "figure-1",
        "Abbildung 3.2",
        "v1.2",
        "水循环",
        "a" * 128,
        "con-1",
        "console",
        "my con.x",
        "com10",
        "#1 & (2) 'x'",
        "-",
        "_",
        "a..b",
    ],
)
def test_what_can_name_a_file(kind: str, name: str) -> None:
    assert make(kind, name).name == name


@pytest.mark.parametrize("kind", ["generate", "edit"])
def test_nothing_is_no_name(kind: str) -> None:
    assert make(kind, None).name is None


@pytest.mark.parametrize("kind", ["generate", "edit"])
@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../a",
        "a\\b",
        "/etc/passwd",
        "C:a",
        "a\0b",
        "a\nb",
        "a\x7f",
        "a?",
        "a*",
        "a|b",
        "<a>",
        'a"b',
        ".",
        "..",
        ".hidden",
        "a.",
        " a",
        "a ",
        "con",
        "NUL",
        "nul.png",
        "COM1",
        "lpt9.a.b",
        "a" * 129,
    ],
)
def test_what_cannot_name_a_file(kind: str, name: str) -> None:
    """It would leave the folder, be hidden, or be refused by one file system or another."""
    with pytest.raises(InvalidRequestError, match="cannot name a file") as caught:
        make(kind, name)
    assert caught.value.credits is Credits.NOT_SPENT
    assert len(str(caught.value)) < 400  # whatever its length, the message stays readable


@pytest.mark.parametrize("name", ["", " ", 5, b"a", "\ud800"])
def test_what_is_no_text(name: Any) -> None:
    with pytest.raises(InvalidRequestError, match="A name"):
        make("generate", name)


@given(st.text(max_size=140))
def test_no_name_leaves_its_folder(name: str) -> None:
    """Whatever is accepted is one step of a path, and neither the folder nor the one above."""
    try:
        accepted = GenerateRequest("a", name=name).name
    except InvalidRequestError:
        return
    assert accepted == name
    assert not set(name) & set('/\\:\0\r\n"<>|?*')
    assert name.strip(". ") == name != ""


def test_a_name_is_no_part_of_the_request() -> None:
    """It changes neither the settings nor the price."""
    named, other = GenerateRequest("a", name="x"), GenerateRequest("a")
    assert (named.settings, named.expected_credits) == (other.settings, other.expected_credits)
    assert named != other
