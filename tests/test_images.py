"""Leading and trailing bytes: real files are told apart, and cut ones noticed."""

from __future__ import annotations

import io

import pytest
from PIL import Image as Pillow

from conceptviz._images import FORMATS, GIF, HEAD_BYTES, JPEG, PNG, TAIL_BYTES, WEBP, ImageFormat, ends_properly, sniff


def encode(name: str, size: tuple[int, int] = (5, 3)) -> bytes:
    buffer = io.BytesIO()
    Pillow.new("RGB", size, (200, 30, 30)).save(buffer, name)
    return buffer.getvalue()


FILES = {PNG: encode("PNG"), JPEG: encode("JPEG"), WEBP: encode("WEBP"), GIF: encode("GIF")}
formats = pytest.mark.parametrize("format_", FORMATS, ids=lambda format_: format_.media_type)


def complete(content: bytes) -> bool:
    return ends_properly(content[:HEAD_BYTES], content[-TAIL_BYTES:], len(content))


@formats
def test_a_real_file_is_recognised(format_: ImageFormat) -> None:
    """By its first bytes alone."""
    content = FILES[format_]
    assert sniff(content) is format_
    assert sniff(content[:HEAD_BYTES]) is format_
    assert complete(content)


@formats
def test_a_cut_file_is_not_complete(format_: ImageFormat) -> None:
    """M47: wherever it is cut."""
    content = FILES[format_]
    for end in range(len(content) - 1):
        assert not complete(content[:end]), end


@pytest.mark.parametrize("format_", [PNG, JPEG, GIF], ids=lambda format_: format_.media_type)
def test_bytes_after_the_end_are_noticed(format_: ImageFormat) -> None:
    """M50: a picture that is an archive too does not end as a picture."""
    assert not complete(FILES[format_] + b"PK\x03\x04 and so on")


@pytest.mark.parametrize("extra", [-1, 2, 100])
def test_a_webp_states_its_own_size(extra: int) -> None:
    """M48."""
    content = FILES[WEBP]
    assert not complete(content[:extra] if extra < 0 else content + b"\0" * extra)


def test_a_webp_may_be_padded_by_one() -> None:
    """RIFF chunks are padded to an even size."""
    assert complete(FILES[WEBP] + b"\0")


@pytest.mark.parametrize("version", [b"GIF87a", b"GIF89a"])
def test_both_gif_versions(version: bytes) -> None:
    assert sniff(version + b"rest") is GIF


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x89PN",
        b"\x89PNG\r\n\x1a\r",
        b"\xff\xd8",
        b"RIFF\x10\0\0\0WAVE",
        b"RIFF\x10\0\0\0",
        b"XXXX\x10\0\0\0WEBP",
        b"GIF88a",
        b"<html>not found</html>",
        b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        b"%PDF-1.7",
        b"PK\x03\x04",
        b" \x89PNG\r\n\x1a\n",
    ],
)
def test_what_is_no_image_is_none(content: bytes) -> None:
    """M50: nor does it end as one, whatever its last bytes."""
    assert sniff(content) is None
    assert not ends_properly(content, b"\xff\xd9", len(content) + 2)
    assert not ends_properly(content, b";", len(content) + 1)


def test_the_formats() -> None:
    assert [(f.media_type, f.extension) for f in FORMATS] == [
        ("image/png", ".png"),
        ("image/jpeg", ".jpg"),
        ("image/webp", ".webp"),
        ("image/gif", ".gif"),
    ]
