"""Where a client's configuration comes from, and the checks it passes before anything is sent.

What lives here: the API key and its wrapping, the base URL, the environment variables. What must never live here: a
socket, and the key in any form that a repr, a log, a pickle or an error could show.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import os
import re
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urlsplit

from ._errors import InvalidRequestError
from ._spec import API_KEY_PREFIX, DEFAULT_BASE_URL

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("conceptviz")

API_KEY_VARIABLE = "CONCEPTVIZ_API_KEY"
BASE_URL_VARIABLE = "CONCEPTVIZ_BASE_URL"

# What an HTTP header can carry without quoting: anything else is either a typing slip or a header injection.
_PRINTABLE = re.compile(r"[\x21-\x7e]+")
# No name ends in a number: a resolver reads such a host as an IPv4 address in one of its old spellings.
_OLD_ADDRESS = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)", re.IGNORECASE)


class Secret:
    """The API key, in a wrapping that shows it to nobody who does not ask for it by name."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        """Return the key itself: for the Authorization header, and for nothing else."""
        return self._value

    def fingerprint(self) -> str:
        """Return what tells accounts' keys apart and opens nothing: a part of a hash."""
        return hashlib.sha256(b"conceptviz journal " + self._value.encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        return f"{API_KEY_PREFIX}***"

    def __reduce__(self) -> NoReturn:
        raise TypeError("An API key is not pickled or copied: make the client again where it is needed.")


def resolve_api_key(api_key: str | Callable[[], str] | None) -> Secret:
    """Return the key from the argument, or else from CONCEPTVIZ_API_KEY.

    Args:
        api_key: The key, or a callable that returns it (a password manager), called once, here.

    Raises:
        InvalidRequestError: There is no key, or it cannot be a header's value. The message does not show it.
    """
    value = api_key() if callable(api_key) else api_key
    if value is None:
        value = os.environ.get(API_KEY_VARIABLE)
    if not isinstance(value, str) or not value:
        raise InvalidRequestError(
            f"There is no API key: pass api_key=, or set {API_KEY_VARIABLE}. Keys are made in Settings > API Keys. "
            "To try the SDK without one, use the simulator: conceptviz generate PROMPT --simulate."
        )
    if value.endswith("\n"):
        logger.warning("The API key ends in a line break, which was left out: mend the place it is read from.")
        value = value[:-1].removesuffix("\r")
    if not _PRINTABLE.fullmatch(value):
        raise InvalidRequestError(
            "The API key holds a space, a control character or a letter outside ASCII, which no key has: give the "
            f"bare key ({API_KEY_PREFIX}...), without 'Bearer' or quotes. Nothing was sent."
        )
    return Secret(value)


def resolve_base_url(base_url: str | None) -> str:
    """Return the base URL from the argument, CONCEPTVIZ_BASE_URL or the API page, without its trailing slash.

    Raises:
        InvalidRequestError: It is not https (a loopback address may be http), has no path, or holds credentials, a
            query or a fragment.
    """
    url = base_url or os.environ.get(BASE_URL_VARIABLE) or DEFAULT_BASE_URL

    def refuse(why: str) -> InvalidRequestError:
        return InvalidRequestError(
            f"The base URL {why}. It has the form {DEFAULT_BASE_URL}; nothing was sent, and the key went nowhere."
        )

    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        raise refuse("cannot be read as a URL") from None
    if not host or not _PRINTABLE.fullmatch(url):
        raise refuse("has no host, or holds characters that no URL has")
    if not _is_host(host):
        raise refuse("has a host that is neither a name nor an address")
    if parts.username is not None or parts.password is not None:
        raise refuse("holds a user name or a password")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise refuse("holds a query or a fragment")
    if parts.path in {"", "/"}:
        raise refuse("has no path, and the API's is /api/v1")
    if "//" in parts.path or "/." in parts.path:
        raise refuse("holds an empty or relative step in its path")
    if parts.scheme != "https" and not (parts.scheme == "http" and is_loopback(host)):
        raise refuse("must begin with https:// (http:// is for a loopback address such as 127.0.0.1)")
    return url.removesuffix("/")


def check_limits(timeout: float, max_connections: int) -> None:
    """Check a client's timeout, in seconds, and its number of connections.

    Raises:
        InvalidRequestError: One of them is not a number above 0.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout < float("inf"):
        raise InvalidRequestError(f"timeout must be a number of seconds above 0, not {timeout!r}.")
    if isinstance(max_connections, bool) or not isinstance(max_connections, int) or max_connections < 1:
        raise InvalidRequestError(f"max_connections must be at least 1, not {max_connections!r}.")


def _is_host(host: str) -> bool:
    """Say whether a host can be connected to, as far as its spelling shows."""
    try:
        if re.fullmatch(r"[0-9.]+", host) or ":" in host:
            ipaddress.ip_address(host.partition("%")[0])
        elif any(label.startswith("xn--") for label in host.split(".")):
            host.encode().decode("idna")
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Say whether a host name or address is this machine by definition, without asking a resolver."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def is_private(host: str) -> bool:
    """Say whether a host is an address that is not on the public internet, without asking a resolver.

    127.1 and 2130706433 are addresses too, to a resolver; as no honest URL has them, they count as private.
    """
    host = host.removesuffix(".")
    try:
        return not ipaddress.ip_address(host).is_global
    except ValueError:
        return is_loopback(host) or _OLD_ADDRESS.fullmatch(host) is not None
