"""The key and the base URL: where they come from, what is refused, and that the key is shown to nobody."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from conceptviz import Credits, InvalidRequestError
from conceptviz._config import Secret, is_loopback, is_private, resolve_api_key, resolve_base_url

KEY = "cvk_0123456789abcdefSECRET"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own."""
    monkeypatch.delenv("CONCEPTVIZ_API_KEY", raising=False)
    monkeypatch.delenv("CONCEPTVIZ_BASE_URL", raising=False)


def test_the_key_from_the_argument() -> None:
    assert resolve_api_key(KEY).reveal() == KEY


def test_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument comes first."""
    monkeypatch.setenv("CONCEPTVIZ_API_KEY", KEY)
    assert resolve_api_key(None).reveal() == KEY
    assert resolve_api_key("cvk_other").reveal() == "cvk_other"


def test_the_key_from_a_callable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called once; what it does not know, the environment may."""
    calls = []

    def ask() -> str:
        calls.append(1)
        return KEY

    assert resolve_api_key(ask).reveal() == KEY
    assert len(calls) == 1
    monkeypatch.setenv("CONCEPTVIZ_API_KEY", "cvk_env")
    nothing: Callable[[], Any] = lambda: None  # noqa: E731 - as a caller would write it
    assert resolve_api_key(nothing).reveal() == "cvk_env"


def test_the_error_of_a_callable_is_the_callers() -> None:
    def locked() -> str:
        raise PermissionError("the password manager is locked")

    with pytest.raises(PermissionError, match="locked"):
        resolve_api_key(locked)


@pytest.mark.parametrize("key", [None, "", 5, b"cvk_x", lambda: "", lambda: b"cvk_x"])
def test_no_key(key: Any) -> None:
    """The message names both places, where keys are made, and the way without one."""
    with pytest.raises(InvalidRequestError, match=r"api_key=.*CONCEPTVIZ_API_KEY.*Settings > API Keys.*--simulate"):
        resolve_api_key(key)


@pytest.mark.parametrize(
    "key",
    [
        f"{KEY}\r\nX: y",
        f"{KEY}\0",
        f"{KEY}é",
        f"{KEY} ",
        f" {KEY}",
        f"Bearer {KEY}",
        f"{KEY}\n\n",
        f"\n{KEY}",
        f"{KEY}\t",
        f"{KEY}\ud800",
        "\n",
        " ",
    ],
)
def test_a_malformed_key_is_refused_without_showing_it(key: str) -> None:
    """M60: it would be an illegal header, and the HTTP library's error shows it whole."""
    with pytest.raises(InvalidRequestError, match="Nothing was sent") as caught:
        resolve_api_key(key)
    error = caught.value
    assert error.credits is Credits.NOT_SPENT
    assert error.__cause__ is None
    assert error.__context__ is None
    for shown in (str(error), repr(error), repr(vars(error)), pickle.dumps(error).decode("latin-1")):
        assert "SECRET" not in shown


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_one_line_break_is_left_out(end: str, caplog: pytest.LogCaptureFixture) -> None:
    """T5: as a file or a command gives it; with a warning that does not show the key."""
    assert resolve_api_key(KEY + end).reveal() == KEY
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "SECRET" not in caplog.text


def test_the_key_is_shown_to_nobody() -> None:
    """M62: it is there for who asks for it by name, and crosses no border."""
    secret = Secret(KEY)
    for shown in (repr(secret), str(secret), f"{secret}", f"{[secret]}", "%s" % secret):  # noqa: UP031 - all ways
        assert "SECRET" not in shown
    assert repr(secret) == "cvk_***"
    assert not hasattr(secret, "__dict__")
    dumps: list[Callable[[Any], object]] = [copy.copy, copy.deepcopy, json.dumps, pickle.Pickler(io.BytesIO()).dump]
    dumps += [lambda value, p=p: pickle.dumps(value, p) for p in range(pickle.HIGHEST_PROTOCOL + 1)]  # type: ignore[misc]  # a default binds p
    for dump in dumps:
        with pytest.raises(TypeError) as caught:
            dump(secret)
        assert "SECRET" not in str(caught.value)


def test_the_base_url(monkeypatch: pytest.MonkeyPatch) -> None:
    """The argument, else the environment, else the API page."""
    assert resolve_base_url(None) == "https://conceptviz.app/api/v1"
    monkeypatch.setenv("CONCEPTVIZ_BASE_URL", "https://env.example/api/v1")
    assert resolve_base_url(None) == "https://env.example/api/v1"
    assert resolve_base_url("https://arg.example/api/v1") == "https://arg.example/api/v1"
    monkeypatch.setenv("CONCEPTVIZ_BASE_URL", "")
    assert resolve_base_url(None) == "https://conceptviz.app/api/v1"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("https://conceptviz.app/api/v1/", "https://conceptviz.app/api/v1"),
        ("https://gateway.example:8443/conceptviz", "https://gateway.example:8443/conceptviz"),
        ("http://127.0.0.1:8787/api/v1", "http://127.0.0.1:8787/api/v1"),
        ("http://[::1]:8787/api/v1", "http://[::1]:8787/api/v1"),
        ("http://localhost/api/v1", "http://localhost/api/v1"),
        ("http://sim.localhost/api/v1", "http://sim.localhost/api/v1"),
    ],
)
def test_a_good_base_url(given: str, used: str) -> None:
    assert resolve_base_url(given) == used


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("http://conceptviz.app/api/v1", "must begin with https"),
        ("http://10.0.0.1/api/v1", "must begin with https"),
        ("http://localhost.evil.example/api/v1", "must begin with https"),
        ("ftp://127.0.0.1/api/v1", "must begin with https"),
        ("https://user@conceptviz.app/api/v1", "holds a user name"),
        ("https://user:SECRET@conceptviz.app/api/v1", "holds a user name"),
        ("https://:SECRET@conceptviz.app/api/v1", "holds a user name"),
        ("https://@conceptviz.app/api/v1", "holds a user name"),
        ("https://conceptviz.app/api/v1?x=1", "holds a query"),
        ("https://conceptviz.app/api/v1?", "holds a query"),
        ("https://conceptviz.app/api/v1#", "holds a query"),
        ("https://conceptviz.app/api/v1#x", "holds a query"),
        ("https://conceptviz.app", "has no path"),
        ("https://conceptviz.app/", "has no path"),
        ("https://conceptviz.app//", "empty or relative step"),
        ("https://conceptviz.app/api/v1//", "empty or relative step"),
        ("https://conceptviz.app//api/v1", "empty or relative step"),
        ("https://conceptviz.app/api/../v1", "empty or relative step"),
        ("https://conceptviz.app/api/./v1", "empty or relative step"),
        ("conceptviz.app/api/v1", "has no host"),
        ("https:///api/v1", "has no host"),
        ("https://conceptviz.app/api/v1\n", "characters that no URL has"),
        ("https://conceptviz.app /api/v1", "characters that no URL has"),
        ("https://conceptvíz.app/api/v1", "characters that no URL has"),
        ("https://[::1/api/v1", "cannot be read"),
        ("https://conceptviz.app:99999/api/v1", "cannot be read"),
        ("https://conceptviz.app:x/api/v1", "cannot be read"),
    ],
)
def test_a_base_url_that_would_send_the_key_astray_is_refused(url: str, why: str) -> None:
    """M39, T3: before anything is sent, and without repeating what may be a password."""
    with pytest.raises(InvalidRequestError, match=why) as caught:
        resolve_base_url(url)
    assert "the key went nowhere" in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"])
def test_loopback(host: str) -> None:
    assert is_loopback(host)
    assert is_private(host)


@pytest.mark.parametrize(
    "host", ["", "conceptviz.app", "localhost.evil.example", "evil-localhost", "8.8.8.8", "::", "a:b"]
)
def test_not_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "10.0.0.1",
        "192.168.1.1",
        "172.16.0.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "fe80::1",
        "fc00::1",
        "::ffff:169.254.169.254",
        "::",
        "127.0.0.1.",
        "localhost.",
        "127.1",
        "2130706433",
        "0x7f.1",
        "0x7F000001",
        "0177.0.0.1",
    ],
)
def test_private(host: str) -> None:
    """M58: also in the spellings that a resolver reads as an address."""
    assert is_private(host)


@pytest.mark.parametrize("host", ["r2.conceptviz.app", "8.8.8.8", "2606:4700::1111", "1e100.net", "0x7f.example", "a1"])
def test_not_private(host: str) -> None:
    assert not is_private(host)
